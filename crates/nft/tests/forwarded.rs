//! What a host forwards, at the interfaces of its host endpoints.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails here")]

mod common;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};

use bulkhead_dataplane::Dataplane;
use bulkhead_dataplane_testing::namespace::{Namespace, ifindex, interface, run};
use bulkhead_dataplane_testing::policy::{Rule, reject};
use bulkhead_dataplane_testing::world::{EVERYTHING, End, PATIENCE, call, opened, serve, some, tables};
use bulkhead_model::flow::{DropReason, FlowEvent};
use bulkhead_model::host_policy::Attachment;
use bulkhead_model::verdict::Verdict::{Allow, Deny};
use common::{Host, listing};

fn through(name: &str) -> Attachment {
    Attachment::Forwarded(ifindex(name))
}

#[test]
fn what_comes_in_and_what_goes_out_are_judged_where_they_pass() {
    let mut world = Host::new();
    let (a, b) = (Namespace::workload("eth0", 1), Namespace::workload("eth1", 2));
    serve(&a, "a", 8080);
    serve(&b, "b", 8080);
    serve(&b, "b", 8081);
    let both = || (call(&a, "10.0.2.2:8080"), call(&b, "10.0.1.2:8080"));
    let from_a = [Rule("10.0.1.2/32", "tcp/8080", Allow, 20), Rule("10.0.1.2/32", "udp/8080", Allow, 20)];
    let to_b = [Rule("10.0.2.2/32", "tcp/8080", Allow, 21), Rule("10.0.2.2/32", "udp/8080", Allow, 21)];
    assert_eq!(both(), (some("b 10.0.1.2"), some("a 10.0.2.2")));
    // Whoever comes in through eth0 may ask for port 8080, whoever goes out there for nothing.
    world.put(&[End(through("eth0"), &[], &from_a, &[])]);
    assert_eq!(both(), (some("b 10.0.1.2"), None));
    assert_eq!(call(&a, "10.0.2.2:8081"), None);
    let events = world.events();
    let seen = opened(&events, through("eth0"));
    assert_eq!(seen.len(), 2, "{events:?}");
    assert!(seen.iter().all(|(real, _, rule)| real.starts_with("10.0.1.2:") && *rule == 20));
    let denied: Vec<_> = events.iter().filter(|flow| flow.event == FlowEvent::Deny).collect();
    assert_eq!(denied.len(), 4, "{denied:?}");
    assert!(denied.iter().all(|flow| flow.reason == DropReason::Policy && flow.rule.0 == 99));
    // The same at the other side.
    world.put(&[End(through("eth1"), &[], &[], &to_b)]);
    assert_eq!(both(), (some("b 10.0.1.2"), None));
    assert_eq!(call(&a, "10.0.2.2:8081"), None);
    // Both must let it.
    world.put(&[End(through("eth0"), &[], &from_a, &[]), End(through("eth1"), &[], &[], &to_b)]);
    assert_eq!(both(), (some("b 10.0.1.2"), None));
    world.put(&[End(through("eth0"), &[], &from_a, &[]), End(through("eth1"), &[], &[], &[])]);
    assert_eq!(both(), (None, None));
    // What comes to the host itself and goes from it is another matter.
    assert!(a.exec(|| {
        TcpStream::connect_timeout(&"10.0.1.1:9".parse().unwrap(), PATIENCE)
            .is_err_and(|error| error.kind() == std::io::ErrorKind::ConnectionRefused)
    }));
    let listener = TcpListener::bind("10.0.1.1:9000").unwrap();
    a.exec(|| TcpStream::connect_timeout(&"10.0.1.1:9000".parse().unwrap(), PATIENCE).unwrap());
    drop(listener);
    assert!(listing().contains("chain any_out_egress_ports4"), "nft can print it");
    // Another process takes over.
    world.put(&[End(through("eth0"), &[], &from_a, &[])]);
    world.reopen();
    assert_eq!(both(), (some("b 10.0.1.2"), None));
    assert_eq!(world.dataplane.read_back().unwrap().endpoints.len(), 1);
    world.put(&[]);
    assert_eq!(both(), (some("b 10.0.1.2"), some("a 10.0.2.2")));
    assert!(!listing().contains("chain any_out"), "no rules for what nobody asks for");
}

#[test]
fn an_endpoint_for_all_interfaces_is_not_about_workloads() {
    let mut world = Host::new();
    let (a, b, outside) =
        (Namespace::workload("wa", 1), Namespace::workload("wb", 2), Namespace::workload("eth0", 3));
    serve(&a, "a", 8080);
    serve(&b, "b", 8080);
    serve(&outside, "o", 8080);
    let ends = |all: &'static [Rule]| {
        [
            End(interface("wa"), &["10.0.1.2"], EVERYTHING, EVERYTHING),
            End(interface("wb"), &["10.0.2.2"], EVERYTHING, EVERYTHING),
            End(Attachment::Forwarded(0), &[], all, &[]),
        ]
    };
    world.put(&ends(&[]));
    assert_eq!(call(&a, "10.0.2.2:8080"), some("b 10.0.1.2"));
    assert_eq!(call(&a, "10.0.3.2:8080"), None, "out of the host");
    assert_eq!(call(&outside, "10.0.1.2:8080"), None, "into the host");
    world.put(&ends(EVERYTHING));
    assert_eq!(call(&outside, "10.0.1.2:8080"), some("a 10.0.3.2"));
    assert_eq!(call(&a, "10.0.3.2:8080"), None);
}

#[test]
fn services_are_judged_as_what_is_behind_them_and_errors_find_their_way() {
    let mut world = Host::new();
    let (a, b) = (Namespace::workload("eth0", 1), Namespace::workload("eth1", 2));
    serve(&b, "b", 8080);
    for protocol in ["tcp", "udp"] {
        run(&format!(
            "iptables -t nat -A PREROUTING -d 10.96.0.1 -p {protocol} --dport 80 -j DNAT --to 10.0.2.2:8080"
        ));
    }
    run("iptables -t nat -A POSTROUTING -o eth1 -j MASQUERADE");
    let to_b = ["tcp/8080", "udp/8080", "udp/9000"].map(|port| Rule("10.0.2.2/32", port, Allow, 21));
    let from_a = ["tcp/8080", "udp/8080", "udp/9000"].map(|port| Rule("10.0.1.2/32", port, Allow, 22));
    world.put(&[End(through("eth0"), &[], &from_a, &[]), End(through("eth1"), &[], &[], &to_b)]);
    assert_eq!(call(&a, "10.96.0.1:80"), some("b 10.0.2.1"));
    // Nobody serves there: the error comes back through both.
    let told = a.exec(|| {
        let socket = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
        socket.connect("10.0.2.2:9000").unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket.send(b"?").unwrap();
        socket.recv(&mut [0; 8]).unwrap_err().kind()
    });
    assert_eq!(told, std::io::ErrorKind::ConnectionRefused);
}

#[test]
fn a_live_connection_is_cut_and_told() {
    let mut world = Host::new();
    let (a, b) = (Namespace::workload("eth0", 1), Namespace::workload("eth1", 2));
    let listener = b.exec(|| TcpListener::bind("10.0.2.2:8080").unwrap());
    let mut client = a.exec(|| TcpStream::connect("10.0.2.2:8080").unwrap());
    let (mut server, _) = listener.accept().unwrap();
    // In the middle of a connection: allowed as the one it was.
    world.put(&[End(through("eth1"), &[], &[], &[Rule("10.0.2.2/32", "tcp/8080", Allow, 20)])]);
    client.write_all(b"before").unwrap();
    server.read_exact(&mut [0; 6]).unwrap();
    server.write_all(b"answer").unwrap();
    client.read_exact(&mut [0; 6]).unwrap();
    let mut cut = tables(&[End(through("eth1"), &[], &[], &[Rule("10.0.2.2/32", "tcp/8080", Deny, 21)])]);
    reject(&mut cut);
    world.dataplane.replace(&cut).unwrap();
    let told = [&mut client, &mut server].map(|end| {
        end.write_all(b"after").unwrap();
        end.set_read_timeout(Some(PATIENCE)).unwrap();
        end.read(&mut [0; 8]).unwrap_err().kind()
    });
    assert_eq!(told, [std::io::ErrorKind::ConnectionReset; 2]);
    assert!(world.dataplane.stats().unwrap().drops[&DropReason::Revoked] > 0);
}
