//! Stories that depend on what a host does with packets: its own calls, rewritten addresses, bridges, connections that
//! were there before.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails here")]

mod common;

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use bulkhead_dataplane::{Dataplane, DataplaneError};
use bulkhead_dataplane_testing::namespace::now_ns;
use bulkhead_dataplane_testing::namespace::{Namespace, enter_new_namespace, ifindex, interface, run};
use bulkhead_dataplane_testing::policy::{Rule, cell, compile, policy};
use bulkhead_dataplane_testing::traffic::world_policy;
use bulkhead_model::flow::{DropReason, FlowEvent, RawFlow};
use bulkhead_model::host_policy::{CompiledId, EndpointBinding, HostDelta, HostPolicy, RuleId};
use bulkhead_model::verdict::Direction;
use bulkhead_model::verdict::Verdict::{Allow, Deny};
use bulkhead_nft::{Capacities, NftDataplane};
use common::World;

fn events(world: &mut World) -> Vec<RawFlow> {
    let mut events = Vec::new();
    world.dataplane.poll(&mut |flow| events.push(flow)).unwrap();
    events
}

/// How a call ends within a while.
fn call(to: &str) -> Result<(), ErrorKind> {
    let to: SocketAddr = to.parse().unwrap();
    TcpStream::connect_timeout(&to, Duration::from_millis(400)).map(drop).map_err(|error| error.kind())
}

#[test]
fn the_host_reaches_its_workloads_unless_a_written_rule_forbids_it() {
    let mut world = World::new();
    world.dataplane.replace(&world_policy(Deny, 0)).unwrap();
    events(&mut world);
    // Nobody listens: what answers is the workload itself.
    assert_eq!(call("10.0.2.2:9"), Err(ErrorKind::ConnectionRefused));
    let opened = events(&mut world);
    let opened = opened.iter().find(|flow| flow.event == FlowEvent::Open).unwrap();
    assert_eq!((opened.rule, opened.direction), (RuleId(3), Direction::Ingress));
    let from_another = world.a.exec(|| call("10.0.2.2:9"));
    assert_eq!(from_another, Err(ErrorKind::TimedOut), "not from elsewhere");
    events(&mut world);
    // From an address for which a written rule says no.
    run("ip addr add 10.0.1.77/32 dev lo");
    let out = UdpSocket::bind("10.0.1.77:0").unwrap();
    let to = world.b.exec(|| UdpSocket::bind("10.0.2.2:5002").unwrap());
    to.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    assert!(out.send_to(b"no", "10.0.2.2:5002").is_err(), "refused where it begins");
    assert!(to.recv(&mut [0; 8]).is_err());
    let denied = events(&mut world);
    assert_eq!(denied.iter().find(|flow| flow.event == FlowEvent::Deny).unwrap().rule, RuleId(22));
}

#[test]
fn policy_speaks_of_who_is_really_reached() {
    let mut world = World::new();
    run("nft -f tests/translation.nft");
    world.dataplane.replace(&world_policy(Allow, 0)).unwrap();
    events(&mut world);
    let listener = world.b.exec(|| TcpListener::bind("10.0.2.2:5001").unwrap());
    // A service's address; and the host's own, published.
    for (port, service) in [(80u16, "10.0.9.9:80"), (8080, "10.0.1.1:8080")] {
        let mut caller = world.a.exec(move || TcpStream::connect(service).unwrap());
        let (mut called, peer) = listener.accept().unwrap();
        assert_eq!(peer.ip(), caller.local_addr().unwrap().ip());
        caller.write_all(b"hello").unwrap();
        assert_eq!(called.read(&mut [0; 8]).unwrap(), 5);
        let opened = events(&mut world);
        let opened: Vec<_> = opened.iter().filter(|flow| flow.event == FlowEvent::Open).collect();
        let side = |direction| opened.iter().find(|flow| flow.direction == direction).unwrap();
        let (out, to) = (side(Direction::Egress), side(Direction::Ingress));
        assert_eq!((out.key.peer_port, out.peer_port), (port, 5001), "as seen, and as it is");
        assert_eq!(out.peer, "10.0.2.2".parse::<std::net::IpAddr>().unwrap());
        assert_eq!((to.rule, to.key.local_port, to.peer), (RuleId(21), 5001, peer.ip()));
    }
    // By another port of the same service to one that is refused.
    assert_eq!(world.a.exec(|| call("10.0.9.9:81")), Err(ErrorKind::TimedOut));
}

#[test]
fn errors_pass_with_the_connection_that_they_quote() {
    let mut world = World::new();
    world.dataplane.replace(&world_policy(Allow, 0)).unwrap();
    let refused = world.a.exec(|| {
        let socket = UdpSocket::bind("10.0.1.2:0").unwrap();
        socket.connect("10.0.2.2:5001").unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
        socket.send(b"anybody?").unwrap();
        socket.recv(&mut [0; 8]).unwrap_err().kind()
    });
    assert_eq!(refused, ErrorKind::ConnectionRefused, "port unreachable has come back");
}

/// Established while nobody tracked or judged anything.
fn connection(a: &Namespace, b: &Namespace) -> (TcpStream, TcpStream) {
    let listener = b.exec(|| TcpListener::bind("10.0.2.2:5001").unwrap());
    let caller = a.exec(|| TcpStream::connect("10.0.2.2:5001").unwrap());
    let (called, _) = listener.accept().unwrap();
    for side in [&caller, &called] {
        side.set_read_timeout(Some(Duration::from_millis(400))).unwrap();
    }
    (caller, called)
}

#[test]
fn a_connection_from_before_goes_on_whoever_speaks_first_and_can_be_cut() {
    for called_first in [false, true] {
        enter_new_namespace();
        run("ip link set lo up");
        run("sysctl -qw net.ipv4.ip_forward=1");
        let (a, b) = (Namespace::workload("wa", 1), Namespace::workload("wb", 2));
        let (mut caller, mut called) = connection(&a, &b);
        let mut dataplane = NftDataplane::open(Capacities::default()).unwrap();
        // Egress of wb allows nothing: only as an answer its packets pass.
        dataplane.replace(&world_policy(Allow, 0)).unwrap();
        dataplane.attach(interface("wa")).unwrap();
        dataplane.attach(interface("wb")).unwrap();
        let mut buffer = [0; 16];
        if called_first {
            called.write_all(b"hello").unwrap();
            assert_eq!(caller.read(&mut buffer).unwrap(), 5);
        }
        caller.write_all(b"hi").unwrap();
        assert_eq!(called.read(&mut buffer).unwrap(), 2, "called first: {called_first}");
        called.write_all(b"there").unwrap();
        assert_eq!(caller.read(&mut buffer).unwrap(), 5);
        dataplane.replace(&world_policy(Deny, 0)).unwrap();
        called.write_all(b"no").unwrap();
        assert!(caller.read(&mut buffer).is_err(), "cut");
        caller.write_all(b"no").unwrap();
        assert!(called.read(&mut buffer).is_err(), "cut both ways");
    }
}

#[test]
fn what_a_bridge_carries_is_judged_too() {
    enter_new_namespace();
    for command in
        ["link set lo up", "link add br0 type bridge", "addr add 10.0.5.1/24 dev br0", "link set br0 up"]
    {
        run(&format!("ip {command}"));
    }
    let before = std::fs::read_to_string("/proc/sys/net/bridge/bridge-nf-call-iptables").unwrap();
    run("sysctl -qw net.bridge.bridge-nf-call-iptables=0");
    let member = |number: u8| {
        let namespace = Namespace::new();
        run(&format!("ip link add b{number} type veth peer name c{number}"));
        run(&format!("ip link set c{number} netns {}", namespace.tid));
        run(&format!("ip link set b{number} master br0 up"));
        namespace.exec(move || {
            run(&format!("ip addr add 10.0.5.{number}/24 dev c{number}"));
            run(&format!("ip link set c{number} up"));
        });
        namespace
    };
    let (a, b) = (member(2), member(3));
    let mut dataplane = NftDataplane::open(Capacities::default()).unwrap();
    dataplane.attach(interface("b2")).unwrap();
    dataplane.attach(interface("b3")).unwrap();
    let rules = [Rule("10.0.5.2/32", "tcp/5001", Allow, 20)];
    let mut state = policy(ifindex("b3"), &["10.0.5.3".parse().unwrap()], &rules, &[], Deny);
    state.policies.insert(CompiledId(5), compile(CompiledId(5), &[], &[], cell(Allow, 60, false)));
    let binding = EndpointBinding {
        attachment: interface("b2"),
        addresses: vec!["10.0.5.2".parse().unwrap()],
        ingress: CompiledId(5),
        egress: CompiledId(5),
    };
    state.endpoints.insert("a".into(), binding);
    dataplane.replace(&state).unwrap();
    let _listeners = b.exec(|| ["10.0.5.3:5001", "10.0.5.3:5002"].map(|at| TcpListener::bind(at).unwrap()));
    assert_eq!(a.exec(|| call("10.0.5.3:5001")), Ok(()));
    assert_eq!(a.exec(|| call("10.0.5.3:5002")), Err(ErrorKind::TimedOut));
    // To everybody on the link: no policy can be asked about that, so it passes only where all is allowed.
    let shout = b.exec(|| UdpSocket::bind("0.0.0.0:7000").unwrap());
    shout.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    a.exec(|| {
        let socket = UdpSocket::bind("10.0.5.2:0").unwrap();
        socket.set_broadcast(true).unwrap();
        socket.send_to(b"all", "10.0.5.255:7000").unwrap();
    });
    assert!(shout.recv(&mut [0; 8]).is_err());
    dataplane.cleanup().unwrap();
    let after = std::fs::read_to_string("/proc/sys/net/bridge/bridge-nf-call-iptables").unwrap();
    assert_eq!(after.trim(), "0", "as it was before us (a fresh namespace has {})", before.trim());
    assert_eq!(a.exec(|| call("10.0.5.3:5002")), Ok(()));
}

#[test]
fn a_plan_that_does_not_fit_is_refused_whole() {
    enter_new_namespace();
    run("ip link add w type veth peer name wp");
    let capacities = Capacities { steps: 8, ..Capacities::default() };
    let mut dataplane = NftDataplane::open(capacities).unwrap();
    dataplane.attach(interface("w")).unwrap();
    let rules = [Rule("10.0.1.0/24", "tcp/80", Allow, 20)];
    let state = policy(ifindex("w"), &["10.0.0.2".parse().unwrap()], &rules, &[], Deny);
    dataplane.replace(&state).unwrap();
    let used = dataplane.stats().unwrap().tables;
    let more = [Rule("10.0.1.0/24", "tcp/1-5", Allow, 20), Rule("10.0.1.0/24", "udp/1-5", Allow, 21)];
    let mut compiled = policy(1, &[], &more, &[], Deny)
        .policies
        .remove(&bulkhead_dataplane_testing::policy::INGRESS)
        .unwrap();
    compiled.id = CompiledId(9);
    let delta = HostDelta { revision: 2, policies: vec![compiled], ..HostDelta::default() };
    let error = dataplane.apply(&delta).unwrap_err();
    assert!(matches!(error, DataplaneError::Capacity { table: "steps", .. }), "{error}");
    assert_eq!(dataplane.stats().unwrap().tables, used);
    assert_eq!(without_names(dataplane.read_back().unwrap()), without_names(state));
}

fn without_names(mut state: HostPolicy) -> HostPolicy {
    state.revision = 0;
    let endpoints = std::mem::take(&mut state.endpoints);
    let name = |binding: &EndpointBinding| Arc::from(binding.attachment.to_string());
    state.endpoints = endpoints.into_values().map(|binding| (name(&binding), binding)).collect();
    state
}

#[test]
fn counts_go_on_over_a_repair() {
    let mut world = World::new();
    world.dataplane.replace(&world_policy(Allow, 0)).unwrap();
    assert_eq!(world.a.exec(|| call("10.0.2.2:9")), Err(ErrorKind::TimedOut));
    let before = world.dataplane.stats().unwrap().drops[&DropReason::Policy];
    assert!(before > 0);
    // They go on from what the last sweep saw.
    world.dataplane.sweep(now_ns(), &mut |_| ()).unwrap();
    run("nft flush ruleset");
    events(&mut world);
    assert_eq!(world.a.exec(|| call("10.0.2.2:9")), Err(ErrorKind::TimedOut));
    assert!(world.dataplane.stats().unwrap().drops[&DropReason::Policy] > before);
}
