//! Real packets between two workloads through real tables.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails here")]

mod common;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use bulkhead_dataplane::{Dataplane, DataplaneError};
use bulkhead_dataplane_testing::namespace::now_ns;
use bulkhead_dataplane_testing::namespace::{ifindex, run};
use bulkhead_dataplane_testing::traffic::world_policy;
use bulkhead_model::flow::{DropReason, FlowEvent, RawFlow};
use bulkhead_model::host_policy::{Attachment, RuleId};
use bulkhead_model::verdict::Direction;
use bulkhead_model::verdict::Verdict::{Allow, Deny};
use bulkhead_nft::{Capacities, NftDataplane};
use common::{World, listing};

fn events(world: &mut World) -> Vec<RawFlow> {
    let mut events = Vec::new();
    world.dataplane.poll(&mut |flow| events.push(flow)).unwrap();
    events
}

#[test]
fn policy_decides_and_is_told_with_its_rules() {
    let mut world = World::new();
    world.dataplane.replace(&world_policy(Allow, 0)).unwrap();
    events(&mut world);
    let listener = world.b.exec(|| TcpListener::bind("10.0.2.2:5001").unwrap());
    let mut caller = world.a.exec(|| TcpStream::connect("10.0.2.2:5001").unwrap());
    let (mut called, _) = listener.accept().unwrap();
    caller.write_all(b"hello").unwrap();
    let mut buffer = [0; 16];
    assert_eq!(called.read(&mut buffer).unwrap(), 5);
    let opened: Vec<_> =
        events(&mut world).into_iter().filter(|flow| flow.event == FlowEvent::Open).collect();
    let told = |direction: Direction| opened.iter().find(|flow| flow.direction == direction).unwrap();
    let (out, to) = (told(Direction::Egress), told(Direction::Ingress));
    assert_eq!(out.key.attachment, Attachment::Interface(ifindex("wa")));
    assert_eq!((out.rule, out.verdict, out.key.peer_port), (RuleId(60), Allow, 5001));
    assert_eq!(to.key.attachment, Attachment::Interface(ifindex("wb")));
    assert_eq!((to.rule, to.verdict, to.key.local_port), (RuleId(21), Allow, 5001));
    // Refused, and told once.
    let probe = world.a.exec(|| UdpSocket::bind("10.0.1.2:0").unwrap());
    for _ in 0..5 {
        probe.send_to(b"no", "10.0.2.2:5002").unwrap();
    }
    let denied: Vec<_> =
        events(&mut world).into_iter().filter(|flow| flow.event == FlowEvent::Deny).collect();
    assert_eq!(denied.len(), 1, "{denied:?}");
    assert_eq!((denied[0].rule, denied[0].reason), (RuleId(22), DropReason::Policy));
    assert_eq!(denied[0].key.peer_port, probe.local_addr().unwrap().port());
    let mut swept = Vec::new();
    world.dataplane.sweep(now_ns(), &mut |flow| swept.push(flow)).unwrap();
    let rest = swept.iter().find(|flow| flow.event == FlowEvent::Deny).unwrap();
    assert_eq!((rest.counters.packets_forward, rest.rule), (4, RuleId(22)));
    assert_eq!(world.dataplane.stats().unwrap().drops[&DropReason::Policy], 5);
    drop((caller, called));
    let deadline = Instant::now() + Duration::from_secs(10);
    let mut closed = Vec::new();
    while closed.len() < 2 && Instant::now() < deadline {
        closed.extend(events(&mut world).into_iter().filter(|flow| flow.event == FlowEvent::Close));
    }
    assert!(closed.iter().all(|flow| flow.counters.packets_forward >= 4), "{closed:?}");
    assert_eq!(closed.len(), 2);
}

#[test]
fn revocation_cuts_a_live_tcp_connection() {
    let mut world = World::new();
    world.dataplane.replace(&world_policy(Allow, 0)).unwrap();
    let listener = world.b.exec(|| TcpListener::bind("10.0.2.2:5001").unwrap());
    let mut caller = world.a.exec(|| TcpStream::connect("10.0.2.2:5001").unwrap());
    let (mut called, _) = listener.accept().unwrap();
    called.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    let mut buffer = [0; 32];
    caller.write_all(b"one").unwrap();
    assert_eq!(called.read(&mut buffer).unwrap(), 3);
    events(&mut world);
    world.dataplane.replace(&world_policy(Deny, 0)).unwrap();
    caller.write_all(b"two").unwrap();
    assert!(called.read(&mut buffer).is_err(), "cut");
    called.write_all(b"and the other way").unwrap();
    caller.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    assert!(caller.read(&mut buffer).is_err(), "cut both ways");
    let changed: Vec<_> =
        events(&mut world).into_iter().filter(|flow| flow.event == FlowEvent::Change).collect();
    assert_eq!(changed.len(), 1, "{changed:?}");
    assert_eq!(changed[0].key.attachment, Attachment::Interface(ifindex("wb")));
    assert_eq!((changed[0].verdict, changed[0].reason), (Deny, DropReason::Revoked));
    assert!(world.dataplane.stats().unwrap().drops[&DropReason::Revoked] >= 2);
    world.dataplane.replace(&world_policy(Allow, 0)).unwrap();
    called.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    assert_eq!(called.read(&mut buffer).unwrap(), 3, "allowed again, retransmission arrives");
}

#[test]
fn without_a_binding_nothing_passes() {
    let mut world = World::new();
    let out = world.a.exec(|| {
        TcpStream::connect_timeout(&"10.0.1.1:9".parse().unwrap(), Duration::from_millis(200)).map(drop)
    });
    assert_eq!(out.unwrap_err().kind(), std::io::ErrorKind::TimedOut, "not even an answer of the host");
    assert!(world.dataplane.stats().unwrap().drops[&DropReason::Unprogrammed] > 0);
    world.dataplane.replace(&world_policy(Allow, 0)).unwrap();
    let out = world.a.exec(|| {
        TcpStream::connect_timeout(&"10.0.1.1:9".parse().unwrap(), Duration::from_secs(5)).map(drop)
    });
    assert_eq!(out.unwrap_err().kind(), std::io::ErrorKind::ConnectionRefused, "the host answers");
}

#[test]
fn the_later_agent_fences_off_the_earlier_and_cleanup_leaves_nothing() {
    let before = {
        bulkhead_dataplane_testing::namespace::enter_new_namespace();
        run("nft add table inet somebody");
        listing()
    };
    let mut world = World::here();
    world.dataplane.replace(&world_policy(Allow, 0)).unwrap();
    let mut later = NftDataplane::open(Capacities::default()).unwrap();
    let error = world.dataplane.replace(&world_policy(Deny, 0)).unwrap_err();
    assert!(matches!(error, DataplaneError::Fenced { current: 2, own: 1 }), "{error}");
    assert!(matches!(world.dataplane.poll(&mut |_| ()), Err(DataplaneError::Fenced { .. })));
    let read = later.read_back().unwrap();
    assert_eq!(read.endpoints.len(), 2, "still in force");
    assert_eq!(later.attached().unwrap().len(), 2);
    later.replace(&world_policy(Allow, 1)).unwrap();
    let tables = listing();
    assert!(tables.contains("table inet bulkhead") && tables.contains("table netdev bulkhead"));
    assert!(tables.contains("chain packet"), "nft can print it");
    later.cleanup().unwrap();
    assert_eq!(listing(), before);
}

#[test]
fn what_is_refused_while_the_earlier_agent_still_listens_is_told_when_it_has_let_go() {
    let mut world = World::new();
    world.dataplane.replace(&world_policy(Allow, 0)).unwrap();
    events(&mut world);
    let mut later = NftDataplane::open(Capacities::default()).unwrap();
    later.replace(&world_policy(Allow, 0)).unwrap();
    let denied = |dataplane: &mut NftDataplane| {
        let mut denied = Vec::new();
        dataplane.poll(&mut |flow| denied.push(flow)).unwrap();
        denied.retain(|flow| flow.event == FlowEvent::Deny);
        denied
    };
    denied(&mut later);
    let probes = [(), ()].map(|()| world.a.exec(|| UdpSocket::bind("10.0.1.2:0").unwrap()));
    probes[0].send_to(b"no", "10.0.2.2:5002").unwrap();
    assert_eq!(denied(&mut later), [], "the earlier one's socket is still open");
    // As when a process that it has forked ends at last.
    world.dataplane = later;
    probes[1].send_to(b"no", "10.0.2.2:5002").unwrap();
    let mut told = denied(&mut world.dataplane);
    told.sort_by_key(|flow| flow.key.peer_port);
    let mut ports = probes.map(|probe| probe.local_addr().unwrap().port());
    ports.sort_unstable();
    let found: Vec<_> = told.iter().map(|flow| (flow.key.peer_port, flow.rule, flow.reason)).collect();
    assert_eq!(found, ports.map(|port| (port, RuleId(22), DropReason::Policy)));
    let mut swept = Vec::new();
    world.dataplane.sweep(now_ns(), &mut |flow| swept.push(flow)).unwrap();
    assert!(swept.iter().all(|flow| flow.event != FlowEvent::Deny), "told once: {swept:?}");
}

#[test]
fn a_foreign_flush_is_noticed_and_repaired() {
    let mut world = World::new();
    world.dataplane.replace(&world_policy(Allow, 0)).unwrap();
    events(&mut world);
    let before = world.dataplane.read_back().unwrap();
    for damage in
        ["nft flush ruleset", "nft flush map inet bulkhead rows", "nft delete table netdev bulkhead"]
    {
        run(damage);
        let ready = world.dataplane.event_fd().is_some_and(common::is_readable);
        assert!(ready, "{damage} is heard");
        events(&mut world);
        assert_eq!(world.dataplane.read_back().unwrap(), before, "{damage}");
        let out = world.a.exec(|| UdpSocket::bind("10.0.1.2:0").unwrap());
        let to = world.b.exec(|| UdpSocket::bind("10.0.2.2:0").unwrap());
        to.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        out.send_to(b"no", to.local_addr().unwrap()).unwrap();
        assert!(to.recv(&mut [0; 8]).is_err(), "{damage}: judged again");
    }
    // Our own changes are none of somebody else's.
    world.dataplane.replace(&world_policy(Deny, 0)).unwrap();
    let repaired = world.dataplane.read_back().unwrap();
    run("nft add table inet somebody");
    events(&mut world);
    assert_eq!(world.dataplane.read_back().unwrap(), repaired);
}
