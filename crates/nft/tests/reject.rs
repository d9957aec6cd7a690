//! `reject`: who is refused is told, by the one who was called.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails here")]

mod common;

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use bulkhead_dataplane::{Dataplane, DataplaneStats};
use bulkhead_dataplane_testing::namespace::{Namespace, interface, run};
use bulkhead_dataplane_testing::policy::{Rule, reject};
use bulkhead_dataplane_testing::processes::Group;
use bulkhead_dataplane_testing::traffic::wait;
use bulkhead_dataplane_testing::world::{
    EVERYTHING, End, PATIENCE, call, serve, services_of_the_host, some, tables, udp,
};
use bulkhead_model::flow::{DropReason, FlowEvent};
use bulkhead_model::host_policy::{Attachment, RuleId};
use bulkhead_model::verdict::Verdict::{Allow, Deny};
use common::{Host, listing};

fn put_rejecting(host: &mut Host, ends: &[End<'_>]) {
    let mut policy = tables(ends);
    reject(&mut policy);
    host.dataplane.replace(&policy).unwrap();
    for end in ends {
        host.dataplane.attach(end.0).unwrap();
    }
}

/// How a connection and a datagram end.
type Ends = (ErrorKind, ErrorKind);

/// Told: a reset for the one, an ICMP error for the other. IPv6 calls the latter by another name.
const TOLD: Ends = (ErrorKind::ConnectionRefused, ErrorKind::HostUnreachable);
const TOLD_V6: Ends = (ErrorKind::ConnectionRefused, ErrorKind::PermissionDenied);
/// What is not told is not heard of again.
const SILENT: Ends = (ErrorKind::TimedOut, ErrorKind::WouldBlock);

/// Both, from this thread's namespace.
fn tried(to: &str) -> Ends {
    let to: SocketAddr = to.parse().unwrap();
    let connection = TcpStream::connect_timeout(&to, PATIENCE).unwrap_err().kind();
    let any: IpAddr = if to.is_ipv4() { "0.0.0.0" } else { "::" }.parse().unwrap();
    let socket = UdpSocket::bind((any, 0)).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket.connect(to).unwrap();
    let datagram = socket.send(b"?").and_then(|_| socket.recv(&mut [0; 64])).unwrap_err().kind();
    (connection, datagram)
}

fn tried_from(from: &Namespace, to: &'static str) -> Ends {
    from.exec(move || tried(to))
}

fn add_ipv6(name: &'static str, at: &Namespace, number: u8) {
    run(&format!("ip addr add fd00:{number}::1/64 dev {name} nodad"));
    at.exec(move || {
        run(&format!("ip addr add fd00:{number}::2/64 dev {name}p nodad"));
        run(&format!("ip route add default via fd00:{number}::1"));
    });
}

#[test]
fn workloads_are_told_whichever_end_refuses_them() {
    let mut world = Host::new();
    let (a, b) = (Namespace::workload("wa", 1), Namespace::workload("wb", 2));
    add_ipv6("wa", &a, 1);
    add_ipv6("wb", &b, 2);
    serve(&b, "b", 8080);
    let (own_a, own_b) = (["10.0.1.2", "fd00:1::2"], ["10.0.2.2", "fd00:2::2"]);
    let open = ["tcp/8080", "udp/8080"].map(|port| Rule("0.0.0.0/0", port, Allow, 20));
    let ends = |egress, ingress| {
        [End(interface("wa"), &own_a, &[], egress), End(interface("wb"), &own_b, ingress, EVERYTHING)]
    };
    // Discovery waits until the addresses of the interfaces are known to be nobody else's.
    world.put(&ends(EVERYTHING, EVERYTHING));
    assert!(wait(|| udp(&a, "[fd00:2::2]:8080").is_some()));
    for (egress, ingress) in [(&open[..], EVERYTHING), (EVERYTHING, &open[..])] {
        put_rejecting(&mut world, &ends(egress, ingress));
        assert_eq!(call(&a, "10.0.2.2:8080"), some("b 10.0.1.2"));
        assert_eq!(tried_from(&a, "10.0.2.2:9000"), TOLD);
        assert_eq!(tried_from(&a, "[fd00:2::2]:9000"), TOLD_V6);
        // Again: each refused packet is told, not the first alone.
        assert_eq!(tried_from(&a, "10.0.2.2:9000"), TOLD);
        world.put(&ends(egress, ingress));
        assert_eq!(tried_from(&a, "10.0.2.2:9000"), SILENT);
    }
    let stats = world.dataplane.stats().unwrap();
    assert_eq!(stats.untold_refusals, 0);
    assert!(stats.drops[&DropReason::Policy] >= 12, "{stats:?}");
}

#[test]
fn whoever_calls_a_service_is_told_by_the_service() {
    let mut world = Host::new();
    let (a, b) = (Namespace::workload("wa", 1), Namespace::workload("wb", 2));
    serve(&b, "b", 8080);
    for protocol in ["tcp", "udp"] {
        run(&format!(
            "iptables -t nat -A PREROUTING -d 10.96.0.1 -p {protocol} --dport 80 -j DNAT --to 10.0.2.2:8080"
        ));
    }
    for hidden in [false, true] {
        if hidden {
            run("iptables -t nat -A POSTROUTING -d 10.0.2.2 -j MASQUERADE");
        }
        for (egress, ingress) in [(&[][..], EVERYTHING), (EVERYTHING, &[][..])] {
            put_rejecting(
                &mut world,
                &[
                    End(interface("wa"), &["10.0.1.2"], &[], egress),
                    End(interface("wb"), &["10.0.2.2"], ingress, EVERYTHING),
                ],
            );
            assert_eq!(tried_from(&a, "10.96.0.1:80"), TOLD, "{hidden} {egress:?}");
        }
    }
}

#[test]
fn both_ends_of_a_live_connection_are_told_when_it_is_cut() {
    for hidden in [false, true] {
        std::thread::spawn(move || {
            let mut world = Host::new();
            let (a, b) = (Namespace::workload("wa", 1), Namespace::workload("wb", 2));
            run("iptables -t nat -A PREROUTING -d 10.96.0.1 -p tcp --dport 80 -j DNAT --to 10.0.2.2:8080");
            // By which the service's address leaves the host at all.
            run("ip route add default via 10.0.2.2 dev wb");
            if hidden {
                run("iptables -t nat -A POSTROUTING -d 10.0.2.2 -j MASQUERADE");
            }
            let listener = b.exec(|| TcpListener::bind("10.0.2.2:8080").unwrap());
            for (egress, ingress, rejects) in
                [(&[][..], EVERYTHING, true), (EVERYTHING, &[][..], true), (&[][..], EVERYTHING, false)]
            {
                let (wa, wb) = (interface("wa"), interface("wb"));
                world.put(&[
                    End(wa, &["10.0.1.2"], &[], EVERYTHING),
                    End(wb, &["10.0.2.2"], EVERYTHING, EVERYTHING),
                ]);
                let mut client = a.exec(|| TcpStream::connect("10.96.0.1:80").unwrap());
                let (mut server, _) = listener.accept().unwrap();
                client.write_all(b"before").unwrap();
                server.read_exact(&mut [0; 6]).unwrap();
                let cut = [End(wa, &["10.0.1.2"], &[], egress), End(wb, &["10.0.2.2"], ingress, EVERYTHING)];
                if rejects {
                    put_rejecting(&mut world, &cut)
                } else {
                    world.put(&cut)
                }
                let told = {
                    [&mut client, &mut server].map(|end| {
                        // Each hears it when it next says something.
                        end.write_all(b"after").unwrap();
                        end.set_read_timeout(Some(PATIENCE)).unwrap();
                        end.read(&mut [0; 8]).unwrap_err().kind()
                    })
                };
                let kind = if rejects { ErrorKind::ConnectionReset } else { ErrorKind::WouldBlock };
                assert_eq!(told, [kind, kind], "{hidden} {egress:?}");
            }
        })
        .join()
        .unwrap();
    }
}

#[test]
fn a_host_is_told_and_tells() {
    let mut world = Host::new();
    let _backends = services_of_the_host();
    let outside = Namespace::workload("eth2", 3);
    let host = Attachment::Host(0);
    put_rejecting(&mut world, &[End(host, &[], &[], &[])]);
    assert_eq!(tried_from(&outside, "10.0.3.1:9000"), TOLD);
    // The kernel answers a refused datagram of one's own by itself.
    let own = (ErrorKind::ConnectionRefused, ErrorKind::PermissionDenied);
    assert_eq!(tried("10.0.3.2:9000"), own);
    assert_eq!(tried("10.96.0.2:80"), own);
    world.put(&[End(host, &[], &[], &[])]);
    assert_eq!(tried_from(&outside, "10.0.3.1:9000"), SILENT);
    assert_eq!(tried("10.0.3.2:9000").0, ErrorKind::TimedOut);
}

#[test]
fn callers_of_a_process_are_told() {
    let mut world = Host::new();
    let outside = Namespace::workload("eth0", 1);
    let mut group = Group::new("p");
    group.serve(9000);
    let own = group.attachment().own_address().unwrap().to_string();
    // Written, since a host may call its processes unless that is forbidden.
    let nobody = ["0.0.0.0/0", "::/0"].map(|all| Rule(all, "any", Deny, 40));
    let end = [End(group.attachment(), &[&own], &nobody, EVERYTHING)];
    put_rejecting(&mut world, &end);
    assert_eq!(tried_from(&outside, "10.0.1.1:9000"), TOLD);
    assert_eq!(tried("127.0.0.1:9000").0, ErrorKind::ConnectionRefused, "where it has come back by itself");
    world.put(&end);
    assert_eq!(tried_from(&outside, "10.0.1.1:9000"), SILENT);
}

#[test]
fn what_is_told_is_counted_and_reported_as_before() {
    let mut world = Host::new();
    let (a, _b) = (Namespace::workload("wa", 1), Namespace::workload("wb", 2));
    let ends = [
        End(interface("wa"), &["10.0.1.2"], &[], EVERYTHING),
        End(interface("wb"), &["10.0.2.2"], &[Rule("10.0.1.2/32", "any", Deny, 40)], &[]),
    ];
    assert!(!listing().contains("reject"), "no rules for what nobody asks for");
    put_rejecting(&mut world, &ends);
    assert!(listing().contains("reject with tcp reset"), "nft can print it");
    world.events();
    assert_eq!(tried_from(&a, "10.0.2.2:9000"), TOLD);
    let events = world.events();
    let refused: Vec<_> = events.iter().filter(|flow| flow.event == FlowEvent::Deny).collect();
    assert!(
        refused.iter().all(|flow| (flow.rule, flow.reason) == (RuleId(40), DropReason::Policy)),
        "{events:?}"
    );
    assert_eq!(refused.len(), 2, "a connection and a datagram: {events:?}");
    assert!(events.iter().all(|flow| flow.event != FlowEvent::Open), "{events:?}");
    assert_eq!(world.dataplane.stats().unwrap().drops[&DropReason::Policy], 2);
    world.put(&ends);
    assert!(!listing().contains("reject"), "nor for what nobody asks for any more");
}

#[test]
fn a_flood_is_told_within_bounds() {
    let mut world = Host::new();
    let (a, b) = (Namespace::workload("wa", 1), Namespace::workload("wb", 2));
    serve(&b, "b", 8080);
    put_rejecting(
        &mut world,
        &[
            End(
                interface("wa"),
                &["10.0.1.2"],
                &[],
                &["tcp/8080", "udp/8080"].map(|port| Rule("0.0.0.0/0", port, Allow, 20)),
            ),
            End(interface("wb"), &["10.0.2.2"], EVERYTHING, EVERYTHING),
        ],
    );
    assert_eq!(call(&a, "10.0.2.2:8080"), some("b 10.0.1.2"));
    let sent = 5000;
    let heard = {
        a.exec(move || {
            let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
            socket.connect("10.0.2.2:9000").unwrap();
            let mut heard = 0u64;
            for _ in 0..sent {
                // An error that has come meanwhile is told by the next call.
                heard += u64::from(socket.send(b"?").is_err());
            }
            std::thread::sleep(Duration::from_millis(50));
            heard
        })
    };
    let stats = world.dataplane.stats().unwrap();
    assert!(heard > 0, "{stats:?}");
    let told = sent - stats.untold_refusals;
    // 200 at once and 1000 a second, however long it took.
    assert!((200..sent / 2).contains(&told), "{told} {stats:?}");
}

#[test]
fn what_looks_like_a_refusal_opens_nothing() {
    let mut world = Host::new();
    let (a, b) = (Namespace::workload("wa", 1), Namespace::workload("wb", 2));
    serve(&b, "b", 8080);
    let ends = |both| {
        [
            End(interface("wa"), &["10.0.1.2"], &[], EVERYTHING),
            End(interface("wb"), &["10.0.2.2"], both, both),
        ]
    };
    put_rejecting(&mut world, &ends(EVERYTHING));
    assert_eq!(call(&a, "10.0.2.2:8080"), some("b 10.0.1.2"));
    // Written, since a host may say to its workloads what is not forbidden.
    put_rejecting(&mut world, &ends(&[Rule("0.0.0.0/0", "any", Deny, 40)]));
    let before = world.dataplane.stats().unwrap();
    // A reset of nothing that is known, from a workload and from its host.
    let forge = || {
        let script = "
import socket, struct
s = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
s.setsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY, 0x42756c6b)
s.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, 0x42756c6b)
tcp = struct.pack('!HHIIBBHHH', 4000, 9000, 1, 0, 0x50, 4, 0, 0, 0)
ip = struct.pack('!BBHHHBBH4s4s', 0x45, 0, 40, 0, 0, 64, 6, 0, socket.inet_aton('10.0.1.2'), socket.inet_aton('10.0.2.2'))
s.sendto(ip + tcp, ('10.0.2.2', 0))
";
        let output = std::process::Command::new("python3").args(["-c", script]).output().unwrap();
        let told = String::from_utf8_lossy(&output.stderr);
        // The host is told by its own kernel.
        assert!(output.status.success() || told.contains("PermissionError"), "{told}");
    };
    a.exec(forge);
    forge();
    std::thread::sleep(Duration::from_millis(20));
    let after = world.dataplane.stats().unwrap();
    let refused = |stats: &DataplaneStats| stats.drops.get(&DropReason::Malformed).copied().unwrap_or(0);
    assert_eq!(refused(&after) - refused(&before), 2, "{after:?}");
}
