//! Single packets through the real programs: what passes, who decided, what is told.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails here")]

mod common;

use bulkhead_dataplane::Dataplane;
use bulkhead_model::flow::{DropReason, FlowEvent};
use bulkhead_model::host_policy::{HostDelta, HostPolicy, RuleId};
use bulkhead_model::ports::Protocol;
use bulkhead_model::verdict::Verdict::{self, Allow, Deny};
use common::packet::{ACK, FIN, Packet, RST, SYN, arp};
use common::{Bench, DEFAULT_RULE, Rule, now_ns, policy, small};
use std::net::IpAddr;

/// One family's cast.
#[derive(Clone, Copy)]
struct Cast {
    own: IpAddr,
    friend: IpAddr,
    stranger: IpAddr,
    all: &'static str,
    friends: &'static str,
    echo: &'static str,
    echo_type: u8,
    reply_type: u8,
}

fn families() -> [Cast; 2] {
    let ip = |text: &str| text.parse().unwrap();
    [
        Cast {
            own: ip("10.0.0.2"),
            friend: ip("10.0.1.7"),
            stranger: ip("192.0.2.9"),
            all: "0.0.0.0/0",
            friends: "10.0.1.0/24",
            echo: "icmp/8",
            echo_type: 8,
            reply_type: 0,
        },
        Cast {
            own: ip("fd00::2"),
            friend: ip("fd00:1::7"),
            stranger: ip("2001:db8::9"),
            all: "::/0",
            friends: "fd00:1::/64",
            echo: "icmpv6/128",
            echo_type: 128,
            reply_type: 129,
        },
    ]
}

/// Runs a story in each family, each in a bench of its own.
fn story(tell: impl Fn(&mut Bench, Cast)) {
    for cast in families() {
        tell(&mut Bench::new(), cast);
    }
}

/// Friends may call tcp/80, udp/53 and echo; the workload may call friends on tcp/443 and udp/53.
fn usual(bench: &Bench, cast: Cast) -> HostPolicy {
    usual_with(bench, cast, Deny)
}

fn usual_with(bench: &Bench, cast: Cast, default: Verdict) -> HostPolicy {
    let ingress = [
        Rule(cast.friends, "tcp/80", Allow, 20),
        Rule(cast.friends, "udp/53", Allow, 21),
        Rule(cast.friends, cast.echo, Allow, 22),
        Rule(cast.friends, "tcp/8000-8100", Deny, 23),
    ];
    let egress = [Rule(cast.friends, "tcp/443", Allow, 30), Rule(cast.friends, "udp/53", Allow, 31)];
    policy(bench.ifindex, &[cast.own], &ingress, &egress, default)
}

#[test]
fn without_tables_everything_is_dropped() {
    story(|bench, cast| {
        assert!(!bench.to(&Packet::tcp(cast.friend, 1000, cast.own, 80, SYN)));
        assert!(!bench.from(&Packet::tcp(cast.own, 1000, cast.friend, 443, SYN)));
        assert!(!bench.run(bulkhead_model::Direction::Egress, 0, &arp("10.0.0.2".parse().unwrap())));
        assert_eq!(bench.drops(DropReason::Unprogrammed), 3);
        let events = bench.events();
        assert_eq!(events.len(), 2);
        assert!(
            events.iter().all(|event| event.rule == RuleId(1) && event.reason == DropReason::Unprogrammed)
        );
    });
}

#[test]
fn a_tcp_connection_from_open_to_close() {
    story(|bench, cast| {
        bench.dataplane.replace(&usual(bench, cast)).unwrap();
        let out = |flags| Packet::tcp(cast.own, 4000, cast.friend, 443, flags);
        let back = |flags| Packet::tcp(cast.friend, 443, cast.own, 4000, flags);
        assert!(bench.from(&out(SYN)));
        assert!(bench.from(&out(SYN)), "retransmitted");
        assert!(bench.to(&back(SYN | ACK)));
        assert!(bench.from(&out(ACK)));
        let open = bench.events();
        assert_eq!(open.len(), 1, "{open:?}");
        assert_eq!((open[0].event, open[0].rule), (FlowEvent::Open, RuleId(30)));
        assert_eq!(open[0].key.peer_port, 443);
        assert!(bench.from(&out(FIN | ACK)));
        assert!(bench.to(&back(FIN | ACK)));
        assert!(bench.from(&out(ACK)), "the last acknowledgement");
        let close = bench.events();
        assert_eq!(close.len(), 1);
        assert_eq!(close[0].event, FlowEvent::Close);
        assert_eq!((close[0].counters.packets_forward, close[0].counters.packets_reverse), (4, 2));
    });
}

#[test]
fn a_reset_closes() {
    story(|bench, cast| {
        bench.dataplane.replace(&usual(bench, cast)).unwrap();
        assert!(bench.from(&Packet::tcp(cast.own, 4000, cast.friend, 443, SYN)));
        assert!(bench.to(&Packet::tcp(cast.friend, 443, cast.own, 4000, RST | ACK)));
        let kinds: Vec<_> = bench.events().into_iter().map(|event| event.event).collect();
        assert_eq!(kinds, [FlowEvent::Open, FlowEvent::Close]);
    });
}

#[test]
fn refused_connections_are_told_once_and_counted_exactly() {
    story(|bench, cast| {
        bench.dataplane.replace(&usual(bench, cast)).unwrap();
        for _ in 0..7 {
            assert!(!bench.to(&Packet::tcp(cast.stranger, 1000, cast.own, 80, SYN)));
            assert!(!bench.to(&Packet::tcp(cast.friend, 1000, cast.own, 8042, SYN)));
        }
        let events = bench.events();
        let rules: Vec<_> = events.iter().map(|event| (event.event, event.rule.0)).collect();
        assert_eq!(rules, [(FlowEvent::Deny, DEFAULT_RULE), (FlowEvent::Deny, 23)]);
        assert_eq!(bench.drops(DropReason::Policy), 14);
        let mut swept = Vec::new();
        bench.dataplane.sweep(now_ns(), &mut |flow| swept.push(flow)).unwrap();
        assert_eq!(swept.iter().map(|flow| flow.counters.packets_forward).collect::<Vec<_>>(), [6, 6]);
        swept.clear();
        bench.dataplane.sweep(now_ns() + 10_000_000_000, &mut |flow| swept.push(flow)).unwrap();
        assert_eq!(swept, [], "nothing new, and the entries are gone");
    });
}

#[test]
fn a_syn_is_always_judged_as_new() {
    story(|bench, cast| {
        bench.dataplane.replace(&usual(bench, cast)).unwrap();
        assert!(bench.from(&Packet::tcp(cast.own, 4000, cast.friend, 443, SYN)));
        assert!(!bench.to(&Packet::tcp(cast.friend, 443, cast.own, 4000, SYN)), "called back");
        assert!(bench.to(&Packet::tcp(cast.friend, 443, cast.own, 4000, SYN | ACK)), "entry untouched");
    });
}

#[test]
fn an_evicted_connection_goes_on_in_either_orientation() {
    story(|bench, cast| {
        bench.dataplane.replace(&usual(bench, cast)).unwrap();
        assert!(bench.to(&Packet::tcp(cast.friend, 443, cast.own, 4000, ACK)), "reply of our call");
        assert!(bench.from(&Packet::tcp(cast.own, 80, cast.friend, 5000, ACK)), "our reply");
        let directions: Vec<_> = bench.events().iter().map(|event| event.rule.0).collect();
        assert_eq!(directions, [30, 20]);
        assert!(
            !bench.to(&Packet::tcp(cast.friend, 80, cast.own, 4001, SYN | ACK)),
            "no such call is allowed"
        );
        assert!(
            !bench.to(&Packet::tcp(cast.friend, 6000, cast.own, 80, SYN | ACK)),
            "a SYN+ACK only replies"
        );
        assert!(bench.from(&Packet::tcp(cast.own, 80, cast.friend, 6001, SYN | ACK)));
    });
}

#[test]
fn udp_replies_pass_until_the_entry_expires() {
    story(|bench, cast| {
        bench.dataplane.replace(&usual(bench, cast)).unwrap();
        assert!(!bench.to(&Packet::udp(cast.friend, 53, cast.own, 5000)), "unasked");
        assert!(bench.from(&Packet::udp(cast.own, 5000, cast.friend, 53)));
        assert!(bench.to(&Packet::udp(cast.friend, 53, cast.own, 5000)));
        let mut swept = Vec::new();
        let later = now_ns() + 181_000_000_000;
        let stats = bench.dataplane.sweep(later, &mut |flow| swept.push(flow)).unwrap();
        assert_eq!((stats.closed, stats.connections), (1, 0));
        let close = swept.iter().find(|flow| flow.event == FlowEvent::Close).unwrap();
        assert_eq!((close.counters.packets_forward, close.counters.packets_reverse), (1, 1));
        assert!(!bench.to(&Packet::udp(cast.friend, 53, cast.own, 5000)));
    });
}

#[test]
fn echo_replies_need_a_request_that_is_allowed() {
    story(|bench, cast| {
        bench.dataplane.replace(&usual(bench, cast)).unwrap();
        assert!(!bench.from(&Packet::icmp(cast.own, cast.friend, cast.echo_type, 0, 7)));
        assert!(!bench.to(&Packet::icmp(cast.friend, cast.own, cast.reply_type, 0, 7)));
        assert!(bench.to(&Packet::icmp(cast.friend, cast.own, cast.echo_type, 0, 8)));
        assert!(bench.from(&Packet::icmp(cast.own, cast.friend, cast.reply_type, 0, 8)));
        assert!(bench.from(&Packet::icmp(cast.own, cast.friend, cast.reply_type, 0, 9)), "evicted request");
        assert!(!bench.from(&Packet::icmp(cast.own, cast.stranger, cast.reply_type, 0, 8)));
    });
}

#[test]
fn icmp_errors_pass_with_the_connection_that_they_quote() {
    story(|bench, cast| {
        bench.dataplane.replace(&usual(bench, cast)).unwrap();
        let call = Packet::tcp(cast.own, 4000, cast.friend, 443, SYN);
        assert!(bench.to(&Packet::unreachable(cast.stranger, cast.own, &call)), "allowed, if unknown");
        assert!(bench.from(&call));
        assert!(bench.to(&Packet::unreachable(cast.stranger, cast.own, &call)), "from a router on the way");
        let other = Packet::tcp(cast.own, 4000, cast.stranger, 443, SYN);
        assert!(!bench.to(&Packet::unreachable(cast.stranger, cast.own, &other)));
        let foreign = Packet::tcp(cast.stranger, 4000, cast.friend, 443, SYN);
        assert!(!bench.to(&Packet::unreachable(cast.stranger, cast.own, &foreign)));
        let query = Packet::udp(cast.friend, 999, cast.own, 53);
        assert!(bench.to(&query));
        assert!(bench.from(&Packet::unreachable(cast.own, cast.friend, &query)), "port unreachable");
        assert_eq!(bench.events().iter().filter(|event| event.event == FlowEvent::Open).count(), 2);
    });
}

#[test]
fn a_workload_uses_its_own_addresses_only() {
    story(|bench, cast| {
        bench.dataplane.replace(&usual_with(bench, cast, Allow)).unwrap();
        assert!(!bench.from(&Packet::udp(cast.stranger, 1, cast.friend, 53)));
        let events = bench.events();
        assert_eq!((events[0].rule, events[0].reason), (RuleId(6), DropReason::Spoofed));
        assert_eq!(bench.drops(DropReason::Spoofed), 1);
        // Not even after somebody has sent to that address through the workload's interface.
        assert!(bench.to(&Packet::udp(cast.friend, 53, cast.stranger, 1)));
        assert!(!bench.from(&Packet::udp(cast.stranger, 1, cast.friend, 53)));
    });
}

#[test]
fn the_host_reaches_its_workloads_unless_a_written_rule_forbids_it() {
    story(|bench, cast| {
        bench.dataplane.replace(&usual(bench, cast)).unwrap();
        assert!(bench.host(&Packet::tcp(cast.stranger, 1000, cast.own, 9, SYN)));
        assert_eq!(bench.events()[0].rule, RuleId(3));
        assert!(bench.from(&Packet::tcp(cast.own, 9, cast.stranger, 1000, SYN | ACK)));
        assert!(!bench.host(&Packet::tcp(cast.friend, 1000, cast.own, 8042, SYN)), "written");
        assert!(!bench.to(&Packet::tcp(cast.stranger, 1001, cast.own, 9, SYN)), "not from the host");
        // Judged again, it is still the host's connection.
        bench.dataplane.replace(&usual(bench, cast)).unwrap();
        assert!(bench.from(&Packet::tcp(cast.own, 9, cast.stranger, 1000, ACK)));
        assert!(bench.events().iter().all(|event| event.event != FlowEvent::Change));
    });
}

#[test]
fn a_workload_reaches_itself() {
    story(|bench, cast| {
        let other: IpAddr = if cast.own.is_ipv4() { "10.0.0.3" } else { "fd00::3" }.parse().unwrap();
        bench.dataplane.replace(&policy(bench.ifindex, &[cast.own, other], &[], &[], Deny)).unwrap();
        assert!(bench.from(&Packet::udp(cast.own, 1, other, 2)));
        assert_eq!(bench.events()[0].rule, RuleId(2));
    });
}

#[test]
fn fragments_follow_their_first() {
    story(|bench, cast| {
        bench.dataplane.replace(&usual(bench, cast)).unwrap();
        let mut first = Packet::udp(cast.own, 5000, cast.friend, 53);
        first.fragment = Some((77, 0, true));
        let mut later = Packet::new(cast.own, cast.friend, Protocol::UDP, vec![0; 16]);
        later.fragment = Some((77, 16, false));
        assert!(!bench.from(&later));
        assert_eq!(bench.drops(DropReason::FragmentWithoutFirst), 1);
        assert!(bench.from(&first));
        assert!(bench.from(&later));
        // Of a refused datagram: refused.
        let mut denied = Packet::udp(cast.own, 5000, cast.friend, 54);
        denied.fragment = Some((78, 0, true));
        later.fragment = Some((78, 16, false));
        assert!(!bench.from(&denied));
        assert!(!bench.from(&later));
        assert_eq!(bench.drops(DropReason::Policy), 2);
    });
}

#[test]
fn malformed_and_unknown_packets_are_counted() {
    story(|bench, cast| {
        bench.dataplane.replace(&usual_with(bench, cast, Allow)).unwrap();
        let mut frame = Packet::tcp(cast.own, 1, cast.friend, 2, SYN).frame();
        frame.truncate(frame.len() - 8);
        assert!(!bench.run(bulkhead_model::Direction::Egress, 0, &frame));
        assert_eq!(bench.drops(DropReason::Malformed), 1);
        frame[12..14].copy_from_slice(&[0x88, 0xcc]);
        assert!(!bench.run(bulkhead_model::Direction::Egress, 0, &frame));
        assert_eq!(bench.drops(DropReason::UnknownEthertype), 1);
        let mut tagged = Packet::tcp(cast.own, 1, cast.friend, 443, SYN);
        tagged.vlans = 1;
        assert!(bench.from(&tagged));
    });
}

#[test]
fn arp_discovery_and_dhcp_work_and_make_no_flows() {
    story(|bench, cast| {
        bench.dataplane.replace(&usual(bench, cast)).unwrap();
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        if cast.own.is_ipv4() {
            for (sender, passes) in [("10.0.0.2", true), ("0.0.0.0", true), ("10.0.0.9", false)] {
                let frame = arp(sender.parse().unwrap());
                assert_eq!(bench.run(bulkhead_model::Direction::Egress, 0, &frame), passes, "{sender}");
                assert!(bench.run(bulkhead_model::Direction::Ingress, 1, &frame));
            }
            assert!(bench.from(&Packet::udp(ip("0.0.0.0"), 68, ip("255.255.255.255"), 67)));
            assert!(bench.to(&Packet::udp(cast.stranger, 67, cast.own, 68)));
            assert!(!bench.from(&Packet::udp(cast.own, 67, cast.stranger, 68)), "no server");
        } else {
            let mut discovery = Packet::icmp(ip("fe80::2"), ip("ff02::1"), 135, 0, 0);
            assert!(!bench.from(&discovery), "has been routed");
            discovery.hop_limit = 255;
            assert!(bench.from(&discovery));
            discovery.src = ip("::");
            assert!(bench.from(&discovery));
            discovery.src = cast.stranger;
            assert!(!bench.from(&discovery), "spoofed");
            assert!(bench.from(&Packet::udp(ip("fe80::2"), 546, ip("ff02::1:2"), 547)));
            assert!(bench.to(&Packet::udp(ip("fe80::1"), 547, ip("fe80::2"), 546)));
        }
        assert!(bench.events().iter().all(|event| event.event == FlowEvent::Deny));
    });
}

#[test]
fn a_revoked_connection_is_cut_though_the_other_direction_is_allowed() {
    story(|bench, cast| {
        let with = |bench: &Bench, verdict| {
            let ingress = [Rule(cast.all, "tcp/80", verdict, 40)];
            policy(bench.ifindex, &[cast.own], &ingress, &[Rule(cast.all, "any", Allow, 41)], Deny)
        };
        let there = |flags| Packet::tcp(cast.friend, 4000, cast.own, 80, flags);
        let back = |flags| Packet::tcp(cast.own, 80, cast.friend, 4000, flags);
        bench.dataplane.replace(&with(bench, Allow)).unwrap();
        assert!(bench.to(&there(SYN)) && bench.from(&back(SYN | ACK)) && bench.to(&there(ACK)));
        bench.dataplane.replace(&with(bench, Allow)).unwrap();
        assert!(bench.to(&there(ACK)));
        bench.events();
        bench.dataplane.replace(&with(bench, Deny)).unwrap();
        for _ in 0..3 {
            assert!(!bench.to(&there(ACK)));
            assert!(!bench.from(&back(ACK)));
        }
        let events = bench.events();
        assert_eq!(events.len(), 1, "{events:?}");
        assert_eq!((events[0].event, events[0].verdict), (FlowEvent::Change, Deny));
        assert_eq!(events[0].reason, DropReason::Revoked);
        assert_eq!(bench.drops(DropReason::Revoked), 6);
        bench.dataplane.replace(&with(bench, Allow)).unwrap();
        assert!(bench.to(&there(ACK)), "allowed again");
        assert_eq!(bench.events()[0].verdict, Allow);
    });
}

#[test]
fn a_difference_adds_moves_and_removes() {
    story(|bench, cast| {
        let before = usual(bench, cast);
        bench.dataplane.replace(&before).unwrap();
        let call = Packet::tcp(cast.stranger, 1000, cast.own, 80, SYN);
        assert!(!bench.to(&call));
        let friends = before.addresses[&cast.friends.parse().unwrap()];
        let stranger = bulkhead_model::Prefix::host(cast.stranger);
        let mut delta = HostDelta { revision: 2, ..HostDelta::default() };
        delta.addresses.insert(stranger, Some(friends));
        let applied = bench.dataplane.apply(&delta).unwrap();
        assert_eq!((applied.entries_written, applied.entries_deleted), (1, 0));
        assert!(bench.to(&call));
        delta.addresses.insert(stranger, None);
        assert_eq!(bench.dataplane.apply(&delta).unwrap().entries_deleted, 1);
        assert!(!bench.to(&call));
        delta.addresses.clear();
        delta.endpoints.insert("w".into(), None);
        bench.dataplane.apply(&delta).unwrap();
        assert!(!bench.to(&Packet::tcp(cast.friend, 1000, cast.own, 80, SYN)));
        assert_eq!(bench.drops(DropReason::Unprogrammed), 1);
    });
}

#[test]
fn a_plan_that_does_not_fit_is_refused_whole() {
    let cast = families()[0];
    let mut bench = Bench::with(bulkhead_ebpf::Capacities { steps: 17, ..small() });
    bench.dataplane.replace(&usual(&bench, cast)).unwrap();
    let used = bench.dataplane.stats().unwrap().tables;
    let mut delta = HostDelta { revision: 2, ..HostDelta::default() };
    let mut more = usual(&bench, cast).policies[&common::INGRESS].clone();
    more.id = bulkhead_model::host_policy::CompiledId(9);
    more.default_row = common::row(
        &[
            ("tcp/1".parse().unwrap(), common::cell(Allow, 50, true)),
            ("tcp/9".parse().unwrap(), common::cell(Allow, 51, true)),
        ],
        common::cell(Deny, 52, false),
    );
    delta.policies.push(more);
    let error = bench.dataplane.apply(&delta).unwrap_err();
    assert!(matches!(error, bulkhead_dataplane::DataplaneError::Capacity { table: "steps", .. }), "{error}");
    assert_eq!(bench.dataplane.stats().unwrap().tables, used);
    assert!(bench.to(&Packet::tcp(cast.friend, 1000, cast.own, 80, SYN)));
}

#[test]
fn the_later_agent_fences_off_the_earlier() {
    let cast = families()[0];
    let mut bench = Bench::new();
    bench.dataplane.replace(&usual(&bench, cast)).unwrap();
    let later = bulkhead_ebpf::EbpfDataplane::open(bench.root.path(), small()).unwrap();
    let error = bench.dataplane.replace(&usual(&bench, cast)).unwrap_err();
    assert!(matches!(error, bulkhead_dataplane::DataplaneError::Fenced { current: 2, own: 1 }));
    bench.dataplane = later;
    assert!(bench.to(&Packet::tcp(cast.friend, 1000, cast.own, 80, SYN)), "still in force");
    bench.dataplane.replace(&usual(&bench, cast)).unwrap();
    assert!(bench.to(&Packet::tcp(cast.friend, 1001, cast.own, 80, SYN)));
}

#[test]
fn when_denials_overflow_drops_are_still_counted() {
    let cast = families()[0];
    let mut bench = Bench::with(bulkhead_ebpf::Capacities { denials: 16, ..small() });
    bench.dataplane.replace(&usual(&bench, cast)).unwrap();
    for port in 1..=100 {
        assert!(!bench.to(&Packet::udp(cast.stranger, port, cast.own, 9)));
    }
    let stats = bench.dataplane.stats().unwrap();
    assert_eq!(stats.drops[&DropReason::Policy], 100);
    assert_eq!(stats.unrecorded_denials, 84);
}
