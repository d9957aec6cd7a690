//! Single packets through the real programs: what passes, who decided, what is told.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails here")]

mod common;

use std::collections::BTreeMap;
use std::sync::Arc;

use bulkhead_dataplane::{Dataplane, DataplaneError};
use bulkhead_model::flow::{DropReason, FlowEvent};
use bulkhead_model::host_policy::{CompiledId, CompiledPolicy, HostDelta, HostPolicy, Row, RuleId, Variant};
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
    more.id = CompiledId(9);
    more.default_row = common::row(
        &[
            ("tcp/1".parse().unwrap(), common::cell(Allow, 50, true)),
            ("tcp/9".parse().unwrap(), common::cell(Allow, 51, true)),
        ],
        common::cell(Deny, 52, false),
    );
    delta.policies.push(more);
    let error = bench.dataplane.apply(&delta).unwrap_err();
    assert!(matches!(error, DataplaneError::Capacity { table: "steps", .. }), "{error}");
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
    assert!(matches!(error, DataplaneError::Fenced { current: 2, own: 1 }));
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

#[test]
fn ports_are_found_behind_options_and_extension_headers() {
    let [v4, v6] = families();
    let bench = &mut Bench::new();
    bench.dataplane.replace(&usual(bench, v4)).unwrap();
    let mut frame = Packet::tcp(v4.own, 1, v4.friend, 443, SYN).frame();
    frame[14] = 0x46;
    frame[16..18].copy_from_slice(&44u16.to_be_bytes());
    frame.splice(34..34, [1, 1, 1, 0]);
    assert!(bench.run(bulkhead_model::Direction::Egress, 0, &frame));
    assert_eq!(bench.events()[0].key.peer_port, 443);

    let bench = &mut Bench::new();
    bench.dataplane.replace(&usual(bench, v6)).unwrap();
    // Hop-by-hop, authentication (of 16 bytes), then `more` destination options before TCP.
    let chain = |more: usize, port| {
        let mut l4 = vec![51, 0, 1, 4, 0, 0, 0, 0];
        l4.extend([60, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        for number in 1..=more {
            l4.extend([if number == more { 6 } else { 60 }, 0, 1, 4, 0, 0, 0, 0]);
        }
        l4.extend(Packet::tcp(v6.own, 1, v6.friend, port, SYN).l4);
        Packet::new(v6.own, v6.friend, Protocol(0), l4)
    };
    assert!(bench.from(&chain(1, 443)));
    assert_eq!(bench.events()[0].key.peer_port, 443);
    assert!(!bench.from(&chain(1, 444)));
    assert!(bench.from(&chain(6, 443)));
    assert!(!bench.from(&chain(7, 443)), "a ninth header");
    assert_eq!(bench.drops(DropReason::Malformed), 1);
}

#[test]
fn what_was_counted_between_sweeps_is_told_as_an_update() {
    story(|bench, cast| {
        bench.dataplane.replace(&usual(bench, cast)).unwrap();
        let query = Packet::udp(cast.own, 5000, cast.friend, 53);
        for _ in 0..5 {
            assert!(bench.from(&query));
        }
        let mut swept = Vec::new();
        let stats = bench.dataplane.sweep(now_ns(), &mut |flow| swept.push(flow)).unwrap();
        assert_eq!((stats.connections, stats.updated), (1, 1));
        assert_eq!((swept[0].event, swept[0].counters.packets_forward), (FlowEvent::Update, 5));
        let length = query.ip().len() as u64;
        assert_eq!(swept[0].counters.bytes_forward, 5 * length);
        bench.dataplane.sweep(now_ns() + 1_000_000_000, &mut |_flow| ()).unwrap();
        let stats = bench.dataplane.sweep(now_ns() + 2_000_000_000, &mut |_flow| ()).unwrap();
        assert_eq!(stats.updated, 0, "nothing new");
    });
}

#[test]
fn a_connection_whose_event_was_lost_is_told_by_the_sweep() {
    let cast = families()[0];
    let mut bench = Bench::with(bulkhead_ebpf::Capacities { events_bytes: 4096, ..small() });
    bench.dataplane.replace(&usual(&bench, cast)).unwrap();
    for port in 1000..1100 {
        assert!(bench.from(&Packet::udp(cast.own, port, cast.friend, 53)));
    }
    let lost = bench.dataplane.stats().unwrap().lost_events;
    assert!(lost > 0);
    let told = bench.events().iter().filter(|event| event.event == FlowEvent::Open).count() as u64;
    assert_eq!(told + lost, 100);
    let mut opened = 0;
    let mut sink = |flow: bulkhead_model::flow::RawFlow| opened += u64::from(flow.event == FlowEvent::Open);
    bench.dataplane.sweep(now_ns(), &mut sink).unwrap();
    assert_eq!(opened, lost);
}

/// The usual policy, with rows that ask for the source port: friends may call tcp/80 from 1024 on, and udp/53 from
/// 53; the workload may call tcp/443 from 40000 on.
fn from_source_ports(bench: &Bench, cast: Cast, from: u16) -> HostPolicy {
    let mut state = usual(bench, cast);
    let plain = |ingress: &[Rule], egress: &[Rule]| policy(bench.ifindex, &[], ingress, egress, Deny);
    let (http, dns, https) = (
        Rule(cast.friends, "tcp/80", Allow, 20),
        Rule(cast.friends, "udp/53", Allow, 21),
        Rule(cast.friends, "tcp/443", Allow, 30),
    );
    let parts = [
        (0, plain(&[], &[])),
        (53, plain(std::slice::from_ref(&dns), &[])),
        (54, plain(&[], &[])),
        (from, plain(std::slice::from_ref(&http), &[])),
        (40_000, plain(&[http], &[https])),
    ];
    let friends = state.class_of(cast.friend);
    for (id, compiled) in &mut state.policies {
        let variants = parts.iter().map(|(first, part)| {
            let part = &part.policies[id];
            let row = part.rows.values().next().unwrap_or(&part.default_row);
            Variant { first: *first, columns: Arc::clone(row.variants().next().unwrap().1) }
        });
        compiled.rows.insert(friends, Arc::new(Row::by_source_port(variants)));
    }
    state
}

#[test]
fn source_ports_are_those_of_whoever_began() {
    story(|bench, cast| {
        bench.dataplane.replace(&from_source_ports(bench, cast, 1024)).unwrap();
        assert!(!bench.to(&Packet::tcp(cast.friend, 1023, cast.own, 80, SYN)));
        assert!(bench.to(&Packet::tcp(cast.friend, 1024, cast.own, 80, SYN)));
        assert!(bench.from(&Packet::tcp(cast.own, 80, cast.friend, 1024, SYN | ACK)), "the reply");
        assert!(bench.to(&Packet::udp(cast.friend, 53, cast.own, 53)));
        assert!(!bench.to(&Packet::udp(cast.friend, 54, cast.own, 53)));
        assert!(!bench.from(&Packet::tcp(cast.own, 39_999, cast.friend, 443, SYN)));
        assert!(bench.from(&Packet::tcp(cast.own, 40_000, cast.friend, 443, SYN)));
        // Nobody remembers these: each is judged as if either end had begun, with that end's port as the source.
        assert!(bench.to(&Packet::tcp(cast.friend, 443, cast.own, 50_000, ACK)), "reply to our call");
        assert!(!bench.to(&Packet::tcp(cast.friend, 443, cast.own, 39_000, ACK)), "no such call is allowed");
        assert!(bench.from(&Packet::tcp(cast.own, 80, cast.friend, 2000, ACK)), "our reply");
        assert!(!bench.from(&Packet::tcp(cast.own, 80, cast.friend, 1000, ACK)), "to nobody who may call");
        let about = |sport| Packet::tcp(cast.own, sport, cast.friend, 443, SYN);
        assert!(bench.to(&Packet::unreachable(cast.stranger, cast.own, &about(41_000))));
        assert!(!bench.to(&Packet::unreachable(cast.stranger, cast.own, &about(1))));
        // No port, no rule about ports: echo was not among the parts' rules.
        assert!(!bench.to(&Packet::icmp(cast.friend, cast.own, cast.echo_type, 0, 40_000)));
        let mut part = Packet::udp(cast.friend, 53, cast.own, 53);
        part.fragment = Some((9, 0, true));
        assert!(bench.to(&part));
        part.fragment = Some((9, 16, false));
        part.l4 = vec![0; 8];
        assert!(bench.to(&part), "a later fragment has its first one's ports");
    });
}

#[test]
fn live_connections_are_judged_again_by_the_source_port_of_whoever_began() {
    story(|bench, cast| {
        bench.dataplane.replace(&from_source_ports(bench, cast, 1024)).unwrap();
        let theirs = |flags| Packet::tcp(cast.friend, 2000, cast.own, 80, flags);
        let ours = |flags| Packet::tcp(cast.own, 80, cast.friend, 2000, flags);
        let later = |flags| Packet::tcp(cast.friend, 3000, cast.own, 80, flags);
        let call = |flags| Packet::tcp(cast.own, 40_001, cast.friend, 443, flags);
        let answer = |flags| Packet::tcp(cast.friend, 443, cast.own, 40_001, flags);
        assert!(bench.to(&theirs(SYN)) && bench.from(&ours(SYN | ACK)));
        assert!(bench.to(&later(SYN)) && bench.from(&call(SYN)) && bench.to(&answer(SYN | ACK)));
        // By a difference: fresh tables under a new id, and the endpoint is bound to them.
        let next = from_source_ports(bench, cast, 2500);
        let id = |id: CompiledId| CompiledId(id.0 + 10);
        let compiled =
            next.policies.values().map(|compiled| CompiledPolicy { id: id(compiled.id), ..compiled.clone() });
        let mut binding = next.endpoints["w"].clone();
        (binding.ingress, binding.egress) = (id(binding.ingress), id(binding.egress));
        let delta = HostDelta {
            revision: 2,
            policies: compiled.collect(),
            endpoints: BTreeMap::from([(Arc::from("w"), Some(binding))]),
            removed_policies: next.policies.keys().copied().collect(),
            ..HostDelta::default()
        };
        bench.events();
        bench.dataplane.apply(&delta).unwrap();
        assert!(!bench.from(&ours(ACK)), "found by the packet of the side that was called");
        assert!(!bench.to(&theirs(ACK)));
        let events = bench.events();
        assert_eq!((events[0].event, events[0].reason), (FlowEvent::Change, DropReason::Revoked));
        assert!(bench.to(&later(ACK)), "begun from a port that is still allowed");
        assert!(bench.to(&answer(ACK)) && bench.from(&call(ACK)));
        // And by a replacement, which allows it again.
        bench.dataplane.replace(&from_source_ports(bench, cast, 2000)).unwrap();
        assert!(bench.from(&ours(ACK)));
    });
}

#[test]
fn variants_that_do_not_fit_are_refused_whole_and_used_ones_come_back() {
    let cast = families()[0];
    let mut bench = Bench::with(bulkhead_ebpf::Capacities { variants: 12, ..small() });
    let state = from_source_ports(&bench, cast, 1024);
    // Four for ingress and two for egress, equal neighbours being merged.
    bench.dataplane.replace(&state).unwrap();
    let used = |bench: &Bench, name: &str| {
        let tables = bench.dataplane.stats().unwrap().tables;
        tables.iter().find(|table| table.table == name).map(|table| table.used).unwrap()
    };
    let before = [used(&bench, "variants"), used(&bench, "steps"), used(&bench, "cells")];
    assert_eq!(before[0], 6);
    let compiled = |number: u16| {
        let policy = from_source_ports(&bench, cast, 2000 + number);
        CompiledPolicy {
            id: CompiledId(100 + u32::from(number)),
            ..policy.policies[&common::INGRESS].clone()
        }
    };
    let [first, second] = [compiled(1), compiled(2)];
    let delta = |policies| HostDelta { revision: 2, policies, ..HostDelta::default() };
    let refused = bench.dataplane.apply(&delta(vec![first.clone(), second])).unwrap_err();
    assert!(matches!(refused, DataplaneError::Capacity { table: "variants", .. }), "{refused}");
    assert_eq!([used(&bench, "variants"), used(&bench, "steps"), used(&bench, "cells")], before);
    assert!(bench.to(&Packet::tcp(cast.friend, 1024, cast.own, 80, SYN)), "the old tables are in force");
    for round in 0..3 {
        let gone = vec![first.id];
        bench.dataplane.apply(&delta(vec![first.clone()])).unwrap();
        let removal = HostDelta { revision: 3 + round, removed_policies: gone, ..HostDelta::default() };
        bench.dataplane.apply(&removal).unwrap();
    }
}
