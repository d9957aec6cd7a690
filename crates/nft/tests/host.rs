//! The host itself as an endpoint: what comes to it and goes from it.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails here")]

mod common;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use bulkhead_dataplane::Dataplane;
use bulkhead_dataplane_testing::namespace::{Namespace, ifindex, interface, run};
use bulkhead_dataplane_testing::policy::Rule;
use bulkhead_dataplane_testing::world::{
    EVERYTHING, End, call, opened, serve, services_of_the_host, some, tables, tcp, udp,
};
use bulkhead_model::flow::{DropReason, FlowEvent};
use bulkhead_model::host_policy::{Attachment, HostPolicy};
use bulkhead_model::verdict::Direction;
use bulkhead_model::verdict::Verdict::{Allow, Deny};
use common::Host;

/// The host answers datagrams and connections on a port, in this thread's namespace.
fn host_serves(name: &'static str, port: u16) {
    let datagrams = UdpSocket::bind(("0.0.0.0", port)).unwrap();
    std::thread::spawn(move || {
        let mut buffer = [0; 64];
        while let Ok((_, from)) = datagrams.recv_from(&mut buffer) {
            let _ = datagrams.send_to(name.as_bytes(), from);
        }
    });
    let listener = TcpListener::bind(("0.0.0.0", port)).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            let _ = stream.write_all(name.as_bytes());
        }
    });
}

/// A call of the host itself: one datagram and one connection.
fn host_calls(to: &str) -> (bool, bool) {
    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
    socket.set_read_timeout(Some(Duration::from_millis(400))).unwrap();
    // A refused datagram of one's own is an error of the call.
    let answered = socket.send_to(b"?", to).is_ok() && socket.recv(&mut [0; 64]).is_ok();
    let connected = TcpStream::connect_timeout(&to.parse().unwrap(), Duration::from_millis(400)).is_ok();
    (answered, connected)
}

#[test]
fn what_comes_to_a_host_and_what_goes_from_it() {
    let mut world = Host::new();
    let (outside, other) = (Namespace::workload("eth0", 1), Namespace::workload("eth1", 2));
    serve(&outside, "o", 8080);
    serve(&outside, "o", 8081);
    serve(&other, "p", 8080);
    host_serves("h", 9000);
    host_serves("h", 9001);
    // Nobody is judged before there is a host endpoint.
    world.put(&[]);
    assert_eq!(call(&outside, "10.0.1.1:9001"), some("h"));
    let ingress = [Rule("10.0.1.2/32", "tcp/9000", Allow, 20), Rule("10.0.1.2/32", "udp/9000", Allow, 20)];
    let egress = [Rule("10.0.1.2/32", "tcp/8080", Allow, 21), Rule("10.0.1.2/32", "udp/8080", Allow, 21)];
    let eth0 = Attachment::Host(ifindex("eth0"));
    world.put(&[End(eth0, &["10.0.1.1"], &ingress, &egress)]);
    assert_eq!(call(&outside, "10.0.1.1:9000"), some("h"));
    assert_eq!(call(&outside, "10.0.1.1:9001"), None);
    assert_eq!(host_calls("10.0.1.2:8080"), (true, true));
    assert_eq!(host_calls("10.0.1.2:8081"), (false, false));
    let events = world.events();
    assert_eq!(opened(&events, eth0).len(), 4, "{events:?}");
    let denied: Vec<_> = events.iter().filter(|flow| flow.event == FlowEvent::Deny).collect();
    assert_eq!(denied.len(), 4, "{denied:?}");
    assert!(denied.iter().all(|flow| flow.rule.0 == 99 && flow.reason == DropReason::Policy));
    // Its other interface is no endpoint, but who calls this one's address from there is judged as well.
    assert_eq!(call(&other, "10.0.2.1:9001"), some("h"));
    assert_eq!(call(&other, "10.0.1.1:9000"), None);
    assert_eq!(host_calls("10.0.2.2:8080"), (true, true));
    // What the host says to itself is its own business.
    assert_eq!(host_calls("127.0.0.1:9001"), (true, true));
    assert_eq!(host_calls("10.0.1.1:9001"), (true, true));

    // One endpoint for all interfaces that have none of their own.
    let all = [Rule("10.0.2.2/32", "any", Allow, 22)];
    world.put(&[End(eth0, &["10.0.1.1"], &ingress, &egress), End(Attachment::Host(0), &[], &all, &[])]);
    assert_eq!(call(&outside, "10.0.1.1:9001"), None);
    assert_eq!(call(&outside, "10.0.1.1:9000"), some("h"));
    assert_eq!(call(&other, "10.0.2.1:9001"), some("h"));
    assert_eq!(host_calls("10.0.2.2:8080"), (false, false));
    // Gone, it judges nothing any more.
    world.put(&[]);
    assert_eq!(call(&outside, "10.0.1.1:9001"), some("h"));
    assert_eq!(host_calls("10.0.2.2:8080"), (true, true));
}

#[test]
fn a_workload_that_calls_its_host_is_judged_at_both_ends() {
    let mut world = Host::new();
    let a = Namespace::workload("wa", 1);
    host_serves("h", 9000);
    let host = Attachment::Host(0);
    let only_a = [Rule("10.0.1.2/32", "any", Allow, 20)];
    let only_host = [Rule("10.0.1.1/32", "any", Allow, 21)];
    for (a_may, host_lets, reached) in [(true, true, true), (true, false, false), (false, true, false)] {
        world.put(&[
            End(interface("wa"), &["10.0.1.2"], &[], if a_may { &only_host } else { &[] }),
            End(host, &[], if host_lets { &only_a } else { &[] }, &[]),
        ]);
        assert_eq!(call(&a, "10.0.1.1:9000").is_some(), reached, "{a_may} {host_lets}");
    }
    // The host reaches its workload (DESIGN 4.10) if its own policy lets it.
    serve(&a, "a", 8080);
    world.put(&[End(interface("wa"), &["10.0.1.2"], &[], &[]), End(host, &[], &[], &[])]);
    assert_eq!(host_calls("10.0.1.2:8080"), (false, false));
    world.put(&[End(interface("wa"), &["10.0.1.2"], &[], &[]), End(host, &[], &[], EVERYTHING)]);
    assert_eq!(host_calls("10.0.1.2:8080"), (true, true));
}

#[test]
fn a_host_that_calls_a_service_is_judged_by_the_backend() {
    let mut world = Host::new();
    let _backends = services_of_the_host();
    let egress = [Rule("10.0.1.2/32", "any", Allow, 20)];
    world.put(&[End(Attachment::Host(0), &[], &[], &egress)]);
    assert_eq!(host_calls("10.96.0.1:80"), (true, true));
    assert_eq!(host_calls("10.96.0.2:80"), (false, false));
}

#[test]
fn a_live_connection_to_the_host_is_cut_and_one_that_was_there_before_goes_on() {
    let mut world = Host::new();
    let outside = Namespace::workload("eth0", 1);
    let listener = TcpListener::bind("0.0.0.0:9000").unwrap();
    let connect = || TcpStream::connect("10.0.1.1:9000").unwrap();
    let mut client = outside.exec(connect);
    let (mut served, _) = listener.accept().unwrap();
    client.set_read_timeout(Some(Duration::from_millis(400))).unwrap();
    let mut says = |text: &[u8]| {
        served.write_all(text).unwrap();
        client.read(&mut [0; 64]).is_ok()
    };
    assert!(says(b"before there is policy"));
    let host = Attachment::Host(0);
    let ingress = [Rule("10.0.1.0/24", "tcp/9000", Allow, 20)];
    world.put(&[End(host, &["10.0.1.1"], &ingress, &[])]);
    assert!(says(b"judged in the middle, as the one it was"));
    world.put(&[End(host, &["10.0.1.1"], &[], &[])]);
    assert!(!says(b"cut"));
    assert_eq!(tcp(&outside, "10.0.1.1:9000"), None);
    assert_eq!(udp(&outside, "10.0.1.1:9000"), None);
    let cut: Vec<_> = world.events().into_iter().filter(|flow| flow.reason == DropReason::Revoked).collect();
    assert_eq!((cut.len(), cut[0].verdict), (1, Deny));
    let stats = world.dataplane.stats().unwrap();
    assert!(stats.drops[&DropReason::Revoked] > 0, "{stats:?}");
}

#[test]
fn a_successor_judges_the_host_and_its_workloads_as_before() {
    let mut world = Host::new();
    let (outside, a) = (Namespace::workload("eth0", 1), Namespace::workload("wa", 2));
    host_serves("h", 9000);
    serve(&outside, "o", 8080);
    let rules = [Rule("10.0.1.2/32", "any", Allow, 20)];
    let from_a = [Rule("10.0.2.2/32", "any", Allow, 21)];
    let host_lets = [rules.clone(), from_a].concat();
    let ends = [
        End(Attachment::Host(0), &["10.0.1.1"], &host_lets, &rules),
        End(interface("wa"), &["10.0.2.2"], &[], &rules),
    ];
    world.put(&ends);
    let check = |world: &Host, when: &str| {
        assert_eq!(call(&outside, "10.0.1.1:9000"), some("h"), "{when}");
        assert_eq!(call(&a, "10.0.1.2:8080"), some("o 10.0.2.2"), "{when}");
        assert_eq!(call(&a, "10.0.1.1:9000"), None, "{when}");
        assert_eq!(host_calls("10.0.1.2:8080"), (true, true), "{when}");
        assert_eq!(host_calls("10.0.2.2:8080"), (false, false), "{when}");
        assert!(world.dataplane.stats().unwrap().drops.len() <= 1, "{when}");
    };
    check(&world, "first");
    world.reopen();
    check(&world, "opened again, nothing applied");
    world.put(&ends);
    check(&world, "applied again");
    world.reopen();
    world.put(&ends);
    check(&world, "a third");
    world.dataplane.cleanup().unwrap();
    assert_eq!(tcp(&a, "10.0.1.1:9000"), some("h"));
    assert!(!common::listing().contains("bulkhead"));
}

/// What a host that is closed to everybody must still do for those whose packets it carries.
#[test]
fn a_closed_host_finds_its_neighbours_and_tells_how_large_a_packet_may_be() {
    let mut world = Host::new();
    let (outside, other) = (Namespace::workload("eth0", 1), Namespace::workload("eth1", 2));
    world.put(&[End(Attachment::Host(0), &["10.0.1.1"], &[], &[])]);
    serve(&other, "p", 8080);
    assert_eq!(call(&outside, "10.0.2.2:8080"), some("p 10.0.1.2"), "what it forwards is not its own");
    // Behind its other interface packets must be smaller: nobody but the host knows.
    run("ip link set eth1 mtu 1300");
    let told = outside.exec(|| {
        let socket = UdpSocket::bind("10.0.1.2:0").unwrap();
        run("ip route flush cache");
        let large = vec![0; 1400];
        socket.send_to(&large, "10.0.2.2:8081").unwrap();
        std::thread::sleep(Duration::from_millis(200));
        let output = std::process::Command::new("ip").args(["route", "get", "10.0.2.2"]).output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    });
    assert!(told.contains("mtu 1300"), "{told}");
    // Closed it is, and nobody's reset gets through either.
    assert_eq!(tcp(&outside, "10.0.1.1:9000"), None);
    assert_eq!(host_calls("10.0.1.2:8080"), (false, false));
    // Neighbours are asked for and answer, or nothing of IPv6 would go at all.
    run("ip -6 addr add fd00:1::1/64 dev eth0 nodad");
    outside.exec(|| run("ip -6 addr add fd00:1::2/64 dev eth0p nodad"));
    serve(&outside, "o", 8080);
    let calls = || {
        let to = "[fd00:1::2]:8080".parse().unwrap();
        TcpStream::connect_timeout(&to, Duration::from_millis(400)).is_ok()
    };
    assert!(!calls());
    let allowed = [Rule("fd00:1::2/128", "tcp/8080", Allow, 20)];
    world.put(&[End(Attachment::Host(0), &["10.0.1.1"], &[], &allowed)]);
    assert!(calls());
}

/// Conntrack's errors come with the connection that they are about.
#[test]
fn errors_about_a_connection_that_is_allowed_reach_the_host_and_leave_it() {
    let mut world = Host::new();
    let outside = Namespace::workload("eth0", 1);
    let any = [Rule("10.0.1.2/32", "udp/9000-9001", Allow, 20)];
    world.put(&[End(Attachment::Host(0), &["10.0.1.1"], &any, &any)]);
    let refused = |socket: &UdpSocket, to: &str| {
        socket.set_read_timeout(Some(Duration::from_millis(400))).unwrap();
        socket.connect(to).unwrap();
        socket.send(b"?").is_ok()
            && socket.recv(&mut [0; 8]).unwrap_err().kind() == std::io::ErrorKind::ConnectionRefused
    };
    // Nobody listens at either end.
    assert!(refused(&UdpSocket::bind("10.0.1.1:0").unwrap(), "10.0.1.2:9000"));
    assert!(outside.exec(move || refused(&UdpSocket::bind("10.0.1.2:0").unwrap(), "10.0.1.1:9001")));
}

/// An endpoint behind each of two interfaces, and none behind the third: by the interface, where no address tells.
#[test]
fn a_host_is_another_endpoint_behind_each_interface() {
    let mut world = Host::new();
    let sides = [1, 2, 3].map(|number| Namespace::workload(&format!("eth{number}"), number));
    host_serves("h", 9000);
    host_serves("h", 9001);
    let [one, two] = ["eth1", "eth2"].map(|name| Attachment::Host(ifindex(name)));
    let (first, second) =
        ([Rule("0.0.0.0/0", "tcp/9000", Allow, 20)], [Rule("0.0.0.0/0", "tcp/9001", Allow, 21)]);
    world.put(&[End(one, &[], &first, &first), End(two, &[], &second, &second)]);
    let reached = |from: usize, port: u16| {
        let to = format!("10.0.{}.1:{port}", from + 1);
        tcp(&sides[from], &to).is_some()
    };
    assert_eq!(
        [0, 1, 2].map(|side| (reached(side, 9000), reached(side, 9001))),
        [(true, false), (false, true), (true, true)]
    );
    // The address of one, through the other.
    assert_eq!((tcp(&sides[0], "10.0.2.1:9000"), tcp(&sides[0], "10.0.2.1:9001")), (some("h"), None));
    let events = world.events();
    assert!(!opened(&events, one).is_empty() && !opened(&events, two).is_empty());
}

/// Both ends: found by address and by interface, through `read_back` and another process.
#[test]
fn what_is_read_back_is_what_was_put() {
    let mut world = Host::new();
    let _outside = Namespace::workload("eth0", 1);
    let eth0 = Attachment::Host(ifindex("eth0"));
    let rules = [Rule("10.0.1.2/32", "any", Allow, 20)];
    let ends =
        [End(eth0, &["10.0.1.1", "fd00:1::1"], &rules, &[]), End(Attachment::Host(0), &[], &[], &rules)];
    world.put(&ends);
    let expected = tables(&ends);
    assert!(common::listing().contains("chain host_input4"), "nft can print it");
    for _ in 0..2 {
        let read = world.dataplane.read_back().unwrap();
        assert_eq!(read.addresses, expected.addresses);
        assert_eq!(read.policies, expected.policies);
        let by_place = |policy: &HostPolicy| -> Vec<_> {
            let mut all: Vec<_> = policy.endpoints.values().cloned().collect();
            all.sort_by_key(|binding| binding.attachment);
            all
        };
        assert_eq!(by_place(&read), by_place(&expected));
        let key = bulkhead_model::ports::Protocol::TCP.key(80);
        let peer = "10.0.1.2".parse().unwrap();
        for (at, direction) in [(eth0, Direction::Ingress), (Attachment::Host(0), Direction::Egress)] {
            let cell = world.dataplane.lookup(at, direction, peer, key, 0).unwrap().unwrap();
            assert_eq!((cell.verdict, cell.rule.0), (Allow, 20));
        }
        world.reopen();
    }
    run("nft flush ruleset");
    world.dataplane.poll(&mut |_| ()).unwrap();
    assert_eq!(world.dataplane.read_back().unwrap().endpoints.len(), 2, "what stood there stands again");
}
