//! The programs' answers against `HostPolicy::lookup`, on random tables that no policy need ever make (what policies make:
//! `crates/dataplane-testing/tests/differential.rs`), in states reached whole and by differences.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails here")]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use bulkhead_dataplane::Dataplane;
use bulkhead_dataplane_testing::random::{INTERFACES, PORTS, SOURCE_PORTS, States, endpoint_address, name};
use bulkhead_model::host_policy::{Attachment, HostPolicy};
use bulkhead_model::ports::Protocol;
use bulkhead_model::verdict::{Direction, Verdict};
use common::packet::{Packet, SYN};
use common::{Bench, ifindex, run};

struct World {
    bench: Bench,
    states: States,
    /// Connections since the last sweep: interface, peer, port here, port there.
    seen: BTreeSet<(usize, IpAddr, u16, u16)>,
    echo: u16,
    packets: u32,
}

impl World {
    /// What is read back is what was put there, as far as an endpoint can reach it.
    fn compare_tables(&self, state: &HostPolicy) {
        let read = self.bench.dataplane.read_back().unwrap();
        let expected: BTreeMap<_, _> =
            state.endpoints.values().map(|binding| (binding.attachment, binding)).collect();
        assert_eq!(read.endpoints.values().map(|b| (b.attachment, b)).collect::<BTreeMap<_, _>>(), expected);
        if !expected.is_empty() {
            assert_eq!(read.addresses, state.addresses);
        }
        let bound = expected.values().flat_map(|binding| [binding.ingress, binding.egress]);
        let bound = bound.filter_map(|id| state.policies.get(&id).map(|policy| (id, policy.clone())));
        assert_eq!(read.policies, bound.collect());
    }

    fn compare(&mut self, state: &HostPolicy, flows: usize) {
        self.compare_tables(state);
        for _ in 0..flows {
            self.compare_one(state);
        }
    }

    /// Destination and source port, at borders of what rows tell apart, of a connection that is not there yet.
    fn ports(&mut self, interface: usize, direction: Direction, peer: IpAddr) -> (u16, u16) {
        loop {
            let port =
                PORTS[self.states.random.below(PORTS.len())].wrapping_add(self.states.random.below(2) as u16);
            // Some from anywhere, lest those at borders run out.
            let source = if self.states.random.one_in(4) {
                self.states.random.below(1 << 16) as u16
            } else {
                SOURCE_PORTS[self.states.random.below(SOURCE_PORTS.len())]
                    + self.states.random.below(2) as u16
            };
            let (here, there) = if direction == Direction::Egress { (source, port) } else { (port, source) };
            if self.seen.insert((interface, peer, here, there)) {
                return (port, source);
            }
        }
    }

    fn compare_one(&mut self, state: &HostPolicy) {
        let interface = self.states.random.below(INTERFACES);
        let direction = Direction::BOTH[self.states.random.below(2)];
        let peer = self.states.random.address();
        let own = endpoint_address(interface, peer.is_ipv6());
        let (src, dst) = if direction == Direction::Egress { (own, peer) } else { (peer, own) };
        let (port, source_port) = self.ports(interface, direction, peer);
        let (packet, key, source_port) = match self.states.random.below(4) {
            0 => (Packet::tcp(src, source_port, dst, port, SYN), Protocol::TCP.key(port), source_port),
            1 => (Packet::udp(src, source_port, dst, port), Protocol::UDP.key(port), source_port),
            2 => {
                let mut packet = Packet::udp(src, source_port, dst, port);
                packet.protocol = Protocol::SCTP;
                packet.l4.resize(12, 0);
                (packet, Protocol::SCTP.key(port), source_port)
            }
            _ => {
                self.echo = self.echo.wrapping_add(1);
                let (kind, key) = if src.is_ipv4() {
                    (8, Protocol::ICMP.key(0x0800))
                } else {
                    (128, Protocol::ICMPV6.key(0x8000))
                };
                (Packet::icmp(src, dst, kind, 0, self.echo), key, 0)
            }
        };
        let expected = state.lookup(&name(interface), direction, peer, key, source_port);
        let looked_up = self
            .bench
            .dataplane
            .lookup(
                Attachment::Interface(self.states.interfaces[interface]),
                direction,
                peer,
                key,
                source_port,
            )
            .unwrap();
        let question = format!("{direction} {peer} {key:#x} from {source_port}");
        assert_eq!(looked_up, expected, "{question}");
        self.bench.ifindex = self.states.interfaces[interface];
        let passed =
            if direction == Direction::Egress { self.bench.from(&packet) } else { self.bench.to(&packet) };
        let events = self.bench.events();
        let [event] = &events[..] else { panic!("one event about {packet:?}: {events:?}") };
        let cell = expected.unwrap_or(common::cell(Verdict::Deny, 1, false));
        assert_eq!(passed, cell.verdict == Verdict::Allow, "{question}");
        assert_eq!((event.rule, event.verdict, event.direction), (cell.rule, cell.verdict, direction));
        assert_eq!((event.audit_rule, event.audit_verdict), (cell.audit_rule, cell.audit_verdict));
        self.packets += 1;
    }
}

#[test]
fn the_kernel_answers_what_the_model_answers() {
    let bench = Bench::with(bulkhead_ebpf::Capacities { denials: 65_536, conns: 65_536, ..common::small() });
    let interfaces = (0..INTERFACES)
        .map(|number| {
            run(&format!("ip link add d{number} type veth peer name p{number}"));
            ifindex(&format!("d{number}"))
        })
        .collect();
    let states = States::new(0x0b01_4ead, interfaces);
    let mut world = World { bench, states, seen: BTreeSet::new(), echo: 0, packets: 0 };
    for _ in 0..30 {
        let mut state = world.states.whole();
        world.bench.dataplane.replace(&state).unwrap();
        world.compare(&state, 60);
        for _ in 0..5 {
            let delta = world.states.delta(&state);
            world.bench.dataplane.apply(&delta).unwrap();
            state.apply(&delta);
            world.compare(&state, 60);
        }
        world.seen.clear();
        world.bench.dataplane.sweep(common::now_ns() + 400_000_000_000, &mut |_flow| ()).unwrap();
    }
    println!("{} packets in 180 states", world.packets);
}
