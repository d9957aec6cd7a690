//! The host itself as an endpoint: what comes to it and goes from it.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails here")]

mod common;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use bulkhead_dataplane::Dataplane;
use bulkhead_model::flow::{DropReason, FlowEvent};
use bulkhead_model::host_policy::Attachment;
use bulkhead_model::verdict::Verdict::{Allow, Deny};
use common::live::Namespace;
use common::world::{EVERYTHING, End, World, call, opened, serve, services_of_the_host, some, tcp, udp};
use common::{Rule, ifindex, interface};

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
    let mut world = World::new();
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
    let mut world = World::new();
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
    let mut world = World::new();
    let _backends = services_of_the_host();
    let egress = [Rule("10.0.1.2/32", "any", Allow, 20)];
    world.put(&[End(Attachment::Host(0), &[], &[], &egress)]);
    assert_eq!(host_calls("10.96.0.1:80"), (true, true));
    assert_eq!(host_calls("10.96.0.2:80"), (false, false));
}

#[test]
fn a_live_connection_to_the_host_is_cut_and_one_that_was_there_before_goes_on() {
    let mut world = World::new();
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
    let mut world = World::new();
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
    let check = |world: &World, when: &str| {
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
    assert!(!world.root_exists());
}
