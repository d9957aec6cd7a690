//! Policy speaks of who is really reached, whatever the host makes of addresses on the way.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails here")]

mod common;

use std::net::{SocketAddr, UdpSocket};
use std::time::Duration;

use bulkhead_dataplane::Dataplane;
use bulkhead_model::flow::FlowEvent;
use bulkhead_model::ports::Protocol;
use bulkhead_model::verdict::Verdict::{Allow, Deny};
use common::live::Namespace;
use common::world::{EVERYTHING, End, World, ask, call, opened, serve, some, tcp, udp};
use common::{Rule, interface, run};

const SERVICE: &str = "10.96.0.1:80";

/// How the host rewrites: kube-proxy's two modes of today.
#[derive(Debug, Clone, Copy)]
enum Rewriting {
    Iptables,
    Nftables,
}

impl Rewriting {
    const BOTH: [Self; 2] = [Self::Iptables, Self::Nftables];

    /// `from` (address:port) becomes `to`, for routed packets and those of the host itself.
    fn destination(self, from: &str, to: &str) {
        let from: SocketAddr = from.parse().unwrap();
        let (address, port) = (from.ip(), from.port());
        let v6 = from.is_ipv6();
        for protocol in ["tcp", "udp"] {
            match self {
                Self::Iptables => {
                    let tool = if v6 { "ip6tables" } else { "iptables" };
                    for chain in ["PREROUTING", "OUTPUT"] {
                        run(&format!(
                            "{tool} -t nat -A {chain} -d {address} -p {protocol} --dport {port} -j DNAT --to {to}"
                        ));
                    }
                }
                Self::Nftables => {
                    let family = if v6 { "ip6" } else { "ip" };
                    for (chain, hook) in [("pre", "prerouting"), ("out", "output")] {
                        run(&format!("nft add table {family} proxy"));
                        run(&format!(
                            "nft add chain {family} proxy {chain} {{ type nat hook {hook} priority -100 ; }}"
                        ));
                        run(&format!(
                            "nft add rule {family} proxy {chain} {family} daddr {address} {protocol} dport {port} dnat to {to}"
                        ));
                    }
                }
            }
        }
    }

    /// What goes to `to` appears to come from the host.
    fn masquerade(self, to: &str) {
        let v6 = to.contains(':');
        match self {
            Self::Iptables => {
                let tool = if v6 { "ip6tables" } else { "iptables" };
                run(&format!("{tool} -t nat -A POSTROUTING -d {to} -j MASQUERADE"));
            }
            Self::Nftables => {
                let family = if v6 { "ip6" } else { "ip" };
                run(&format!("nft add table {family} proxy"));
                run(&format!(
                    "nft add chain {family} proxy post {{ type nat hook postrouting priority 100 ; }}"
                ));
                run(&format!("nft add rule {family} proxy post {family} daddr {to} masquerade"));
            }
        }
    }
}

#[test]
fn a_service_is_judged_as_the_backend_behind_it() {
    for rewriting in Rewriting::BOTH {
        std::thread::spawn(move || {
            let mut world = World::new();
            let (a, b, c) =
                (Namespace::workload("wa", 1), Namespace::workload("wb", 2), Namespace::workload("wc", 3));
            serve(&b, "b", 8080);
            serve(&c, "c", 8080);
            rewriting.destination(SERVICE, "10.0.2.2:8080");
            rewriting.destination("10.96.0.2:80", "10.0.3.2:8080");
            let to_b =
                [Rule("10.0.2.2/32", "tcp/8080", Allow, 20), Rule("10.0.2.2/32", "udp/8080", Allow, 21)];
            let from_a = [Rule("10.0.1.2/32", "any", Allow, 22)];
            let ends = |egress| {
                [
                    End(interface("wa"), &["10.0.1.2"], &[], egress),
                    End(interface("wb"), &["10.0.2.2"], &from_a, &[]),
                    End(interface("wc"), &["10.0.3.2"], &from_a, &[]),
                ]
            };
            world.put(&ends(&to_b));
            // Nothing says that the service's address may be reached, only its backend.
            assert_eq!(call(&a, SERVICE), some("b 10.0.1.2"), "{rewriting:?}");
            assert_eq!(call(&a, "10.96.0.2:80"), None, "{rewriting:?}");
            let events = world.events();
            let calls = opened(&events, interface("wa"));
            assert_eq!(calls[0], ("10.0.2.2:8080".into(), SERVICE.into(), 21));
            assert_eq!(calls[1], ("10.0.2.2:8080".into(), SERVICE.into(), 20));
            let denied: Vec<_> = events.iter().filter(|flow| flow.event == FlowEvent::Deny).collect();
            assert!(denied.iter().all(|flow| flow.peer.to_string() == "10.0.3.2" && flow.peer_port == 8080));
            assert!(denied.iter().all(|flow| flow.key.peer.to_string() == "10.96.0.2" && flow.rule.0 == 99));
            assert_eq!(denied.len(), 2, "{denied:?}");

            // Everything is allowed but one backend: its service is no way around that.
            let but_c = [Rule("10.0.3.2/32", "any", Deny, 23), Rule("0.0.0.0/0", "any", Allow, 24)];
            world.put(&ends(&but_c));
            assert_eq!(call(&a, SERVICE), some("b 10.0.1.2"), "{rewriting:?}");
            assert_eq!(call(&a, "10.96.0.2:80"), None, "{rewriting:?}");
            assert_eq!(call(&a, "10.0.3.2:8080"), None, "{rewriting:?}");
        })
        .join()
        .unwrap();
    }
}

#[test]
fn masquerading_hides_nobody_from_policy() {
    for rewriting in Rewriting::BOTH {
        std::thread::spawn(move || {
            let mut world = World::new();
            let (a, b, c) =
                (Namespace::workload("wa", 1), Namespace::workload("wb", 2), Namespace::workload("wc", 3));
            serve(&b, "b", 8080);
            rewriting.destination(SERVICE, "10.0.2.2:8080");
            rewriting.masquerade("10.0.2.2");
            let from_a = [Rule("10.0.1.2/32", "any", Allow, 22)];
            world.put(&[
                End(interface("wa"), &["10.0.1.2"], &[], EVERYTHING),
                End(interface("wb"), &["10.0.2.2"], &from_a, EVERYTHING),
                End(interface("wc"), &["10.0.3.2"], &[], EVERYTHING),
            ]);
            // b believes that its host calls, and policy knows better.
            assert_eq!(call(&a, SERVICE), some("b 10.0.2.1"), "{rewriting:?}");
            assert_eq!(call(&c, SERVICE), None, "{rewriting:?}");
            let events = world.events();
            let at_b = opened(&events, interface("wb"));
            assert_eq!(at_b.len(), 2);
            assert!(at_b.iter().all(|(real, seen, rule)| {
                real.starts_with("10.0.1.2:") && seen.starts_with("10.0.2.1:") && *rule == 22
            }));
            let denied: Vec<_> = events.iter().filter(|flow| flow.event == FlowEvent::Deny).collect();
            assert!(denied.iter().all(|flow| flow.peer.to_string() == "10.0.3.2"), "{denied:?}");
            // A workload that calls itself through its service.
            assert_eq!(call(&b, SERVICE), some("b 10.0.2.1"), "{rewriting:?}");
        })
        .join()
        .unwrap();
    }
}

#[test]
fn services_of_ipv6_are_too() {
    for rewriting in Rewriting::BOTH {
        std::thread::spawn(move || {
            let mut world = World::new();
            let (a, b) = (Namespace::workload("wa", 1), Namespace::workload("wb", 2));
            for (name, at, number) in [("wa", &a, 1), ("wb", &b, 2)] {
                run(&format!("ip addr add fd00:{number}::1/64 dev {name} nodad"));
                at.exec(move || {
                    run(&format!("ip addr add fd00:{number}::2/64 dev {name}p nodad"));
                    run(&format!("ip route add default via fd00:{number}::1"));
                });
            }
            serve(&b, "b", 8080);
            rewriting.destination("[fd00:96::1]:80", "[fd00:2::2]:8080");
            rewriting.destination("[fd00:96::2]:80", "[fd00:2::2]:8081");
            rewriting.masquerade("fd00:2::2");
            world.put(&[
                End(
                    interface("wa"),
                    &["fd00:1::2"],
                    &[],
                    &[
                        Rule("fd00:2::2/128", "tcp/8080", Allow, 20),
                        Rule("fd00:2::2/128", "udp/8080", Allow, 21),
                    ],
                ),
                End(interface("wb"), &["fd00:2::2"], &[Rule("fd00:1::2/128", "any", Allow, 22)], &[]),
            ]);
            assert_eq!(call(&a, "[fd00:96::1]:80"), some("b fd00:2::1"), "{rewriting:?}");
            assert_eq!(call(&a, "[fd00:96::2]:80"), None, "{rewriting:?}");
        })
        .join()
        .unwrap();
    }
}

#[test]
fn what_is_redirected_to_the_host_is_judged_as_the_host() {
    let mut world = World::new();
    let a = Namespace::workload("wa", 1);
    // The host itself answers, in this thread's namespace.
    for protocol in ["udp", "tcp"] {
        run(&format!("iptables -t nat -A PREROUTING -d 10.96.0.1 -p {protocol} -j DNAT --to 10.0.1.1:9000"));
        run(&format!("iptables -t nat -A PREROUTING -d 10.96.0.2 -p {protocol} -j REDIRECT --to-ports 9001"));
    }
    for (name, port) in [("nine", 9000), ("one", 9001)] {
        let datagrams = UdpSocket::bind(("0.0.0.0", port)).unwrap();
        std::thread::spawn(move || {
            let mut buffer = [0; 64];
            while let Ok((_, from)) = datagrams.recv_from(&mut buffer) {
                let _ = datagrams.send_to(name.as_bytes(), from);
            }
        });
    }
    let rules = [Rule("10.0.1.1/32", "udp/9000", Allow, 20), Rule("10.96.0.0/16", "any", Allow, 21)];
    world.put(&[End(interface("wa"), &["10.0.1.2"], &[], &rules)]);
    assert_eq!(udp(&a, "10.96.0.1:80"), some("nine"));
    assert_eq!(udp(&a, "10.0.1.1:9000"), some("nine"));
    assert_eq!(udp(&a, "10.96.0.2:80"), None);
    assert_eq!(udp(&a, "10.0.1.1:9001"), None);
    assert_eq!(
        opened(&world.events(), interface("wa"))[0],
        ("10.0.1.1:9000".into(), "10.96.0.1:80".into(), 20)
    );
}

/// Two containers behind a bridge, as Docker has them, and a workload elsewhere on the host.
fn bridged() -> (World, Namespace, Namespace, Namespace) {
    let world = World::new();
    run("ip link add br0 type bridge");
    run("ip addr add 10.0.9.1/24 dev br0");
    run("ip link set br0 up");
    let container = |name: &'static str, number: u8| {
        let namespace = Namespace::new();
        run(&format!("ip link add {name} type veth peer name {name}p"));
        run(&format!("ip link set {name}p netns {}", namespace.tid));
        run(&format!("ip link set {name} master br0 up"));
        run(&format!("bridge link set dev {name} hairpin on"));
        namespace.exec(move || {
            run("ip link set lo up");
            run(&format!("ip addr add 10.0.9.{number}/24 dev {name}p"));
            run(&format!("ip link set {name}p up"));
            run("ip route add default via 10.0.9.1");
        });
        namespace
    };
    let (a, b) = (container("wa", 2), container("wb", 3));
    let c = Namespace::workload("wc", 3);
    (world, a, b, c)
}

#[test]
fn published_ports_of_bridged_containers() {
    for filtered in [false, true] {
        std::thread::spawn(move || {
            let (mut world, a, b, c) = bridged();
            // As Docker and Kubernetes have it, what is bridged meets netfilter, too (and is hidden by the rule below).
            run(&format!("sysctl -qw net.bridge.bridge-nf-call-iptables={}", u8::from(filtered)));
            let direct_answer = some(if filtered { "b 10.0.9.1" } else { "b 10.0.9.2" });
            serve(&b, "b", 8080);
            serve(&c, "c", 8080);
            let rewriting = Rewriting::Iptables;
            rewriting.destination("10.0.9.1:80", "10.0.9.3:8080");
            rewriting.destination("10.0.9.1:81", "10.0.3.2:8080");
            rewriting.masquerade("10.0.9.3");
            let to_b = [Rule("10.0.9.3/32", "any", Allow, 20)];
            let from_a = [Rule("10.0.9.2/32", "any", Allow, 22)];
            world.put(&[
                End(interface("wa"), &["10.0.9.2"], &[], &to_b),
                End(interface("wb"), &["10.0.9.3"], &from_a, &to_b),
                End(interface("wc"), &["10.0.3.2"], EVERYTHING, EVERYTHING),
            ]);
            // Each other directly, the way of the bridge; counted once, wherever it is looked at.
            assert_eq!(udp(&a, "10.0.9.3:8080"), direct_answer, "{filtered}");
            let mut direct = Vec::new();
            world.dataplane.sweep(common::now_ns(), &mut |flow| direct.push(flow)).unwrap();
            // Neighbours announce themselves, too.
            direct.retain(|flow| flow.key.protocol == Protocol::UDP);
            assert_eq!(direct.len(), 2);
            for flow in direct {
                assert_eq!(
                    (flow.counters.packets_forward, flow.counters.packets_reverse),
                    (1, 1),
                    "{flow:?}"
                );
            }
            assert_eq!(tcp(&a, "10.0.9.3:8080"), direct_answer, "{filtered}");
            // By the host's address, hairpin included.
            assert_eq!(call(&a, "10.0.9.1:80"), some("b 10.0.9.1"), "{filtered}");
            assert_eq!(call(&b, "10.0.9.1:80"), some("b 10.0.9.1"), "{filtered}");
            assert_eq!(call(&a, "10.0.9.1:81"), None, "{filtered}");
            assert_eq!(call(&a, "10.0.3.2:8080"), None, "{filtered}");
            // c may call whom it likes, and b lets nobody in but a.
            assert_eq!(call(&c, "10.0.3.1:8080"), None);
            assert_eq!(call(&c, "10.0.9.1:80"), None, "{filtered}");
            // Where somebody else's filter forgets what the exit has said, addresses tell.
            run("tc qdisc add dev br0 clsact");
            run("tc filter add dev br0 ingress protocol all u32 match u32 0 0 flowid 1:2");
            assert_eq!(call(&a, "10.0.9.1:80"), some("b 10.0.9.1"), "{filtered}");
            assert_eq!(call(&a, "10.0.9.1:81"), None, "{filtered}");
        })
        .join()
        .unwrap();
    }
}

#[test]
fn a_foreign_hardware_address_is_no_way_around() {
    let (mut world, a, _b, c) = bridged();
    serve(&c, "c", 8080);
    Rewriting::Iptables.destination("10.96.0.1:80", "10.0.3.2:8080");
    let but_c = [Rule("10.0.3.2/32", "any", Deny, 20), Rule("0.0.0.0/0", "any", Allow, 21)];
    world.put(&[
        End(interface("wa"), &["10.0.9.2"], &[], &but_c),
        End(interface("wb"), &["10.0.9.3"], &[], &[]),
        End(interface("wc"), &["10.0.3.2"], EVERYTHING, EVERYTHING),
    ]);
    // The bridge takes frames for its ports' own addresses in as well as those for its own.
    let port = std::fs::read_to_string("/sys/class/net/wb/address").unwrap_or_else(|_| {
        let output = std::process::Command::new("ip").args(["-o", "link", "show", "wb"]).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        text.split("link/ether ").nth(1).unwrap().split(' ').next().unwrap().to_owned()
    });
    let port = port.trim().to_owned();
    a.exec(move || run(&format!("ip neigh replace 10.0.9.1 lladdr {port} dev wap nud permanent")));
    for _ in 0..3 {
        assert_eq!(call(&a, "10.96.0.1:80"), None);
    }
    assert_eq!(call(&a, "10.0.3.2:8080"), None);
}

#[test]
fn a_service_that_changes_its_backend_is_judged_again() {
    let mut world = World::new();
    let (a, b, c) =
        (Namespace::workload("wa", 1), Namespace::workload("wb", 2), Namespace::workload("wc", 3));
    serve(&b, "b", 8080);
    serve(&c, "c", 8080);
    run("sysctl -qw net.netfilter.nf_conntrack_udp_timeout=1");
    run("sysctl -qw net.netfilter.nf_conntrack_udp_timeout_stream=1");
    Rewriting::Iptables.destination(SERVICE, "10.0.2.2:8080");
    let to_b = [Rule("10.0.2.2/32", "any", Allow, 20)];
    world.put(&[
        End(interface("wa"), &["10.0.1.2"], &[], &to_b),
        End(interface("wb"), &["10.0.2.2"], EVERYTHING, &[]),
        End(interface("wc"), &["10.0.3.2"], EVERYTHING, &[]),
    ]);
    let socket = a.exec(|| UdpSocket::bind("0.0.0.0:4000").unwrap());
    let to: SocketAddr = SERVICE.parse().unwrap();
    assert_eq!(ask(&socket, to), some("b 10.0.1.2"));
    run("iptables -t nat -F PREROUTING");
    Rewriting::Iptables.destination(SERVICE, "10.0.3.2:8080");
    // The same ports, long after the kernel has forgotten and long before the dataplane does.
    std::thread::sleep(Duration::from_millis(2500));
    assert_eq!(ask(&socket, to), None);
    assert_eq!(ask(&socket, to), None);
    let denied: Vec<_> = world.events().into_iter().filter(|flow| flow.event == FlowEvent::Deny).collect();
    assert_eq!(denied[0].peer.to_string(), "10.0.3.2");
}
