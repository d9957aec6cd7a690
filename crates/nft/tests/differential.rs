//! The packet path's answers against `HostPolicy::lookup`, on random tables that no policy need ever make (what policies
//! make: `crates/dataplane-testing/tests/differential.rs`), on states reached whole and by differences: real
//! frames leave workloads' namespaces and reach them through a host that routes.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails here")]

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use bulkhead_dataplane::Dataplane;
use bulkhead_dataplane_testing::frames::{number_of, numbered, sctp_init};
use bulkhead_dataplane_testing::namespace::{enter_new_namespace, ifindex, now_ns, run};
use bulkhead_dataplane_testing::packet::{Packet, SYN};
use bulkhead_dataplane_testing::policy::cell;
use bulkhead_dataplane_testing::random::{INTERFACES, PORTS, SOURCE_PORTS, States, endpoint_address, name};
use bulkhead_dataplane_testing::stations::{Station, station, text};
use bulkhead_model::flow::{FlowEvent, RawFlow};
use bulkhead_model::host_policy::{Attachment, Cell, HostPolicy};
use bulkhead_model::ports::{PortKey, Protocol};
use bulkhead_model::verdict::{Direction, Verdict};
use bulkhead_nft::{Capacities, NftDataplane};

/// Packets in each state.
const PACKETS: u16 = 200;
/// Behind which all peers are.
const OUTSIDE: usize = INTERFACES;

/// A station, and the host's routes to it.
fn neighbour(number: usize) -> Station {
    let made = Station::new(number);
    let (via, nodad, other) = ("172.31.0.2", "nodad", text(station(number, false)));
    if number == OUTSIDE {
        run("ip addr add 172.31.0.1/24 dev d3");
        run(&format!("ip -6 addr add fddd::1/64 dev d3 {nodad}"));
        run(&format!("ip neigh add {via} lladdr {other} dev d3 nud permanent"));
        run(&format!("ip -6 neigh add fddd::2 lladdr {other} dev d3 nud permanent"));
        run(&format!("ip route add 10.0.0.0/8 via {via} dev d3"));
        run("ip -6 route add fd00::/16 via fddd::2 dev d3");
    } else {
        for v6 in [false, true] {
            let (family, address) = (if v6 { "-6" } else { "-4" }, endpoint_address(number, v6));
            run(&format!("ip {family} route add {address} dev d{number}"));
            run(&format!("ip {family} neigh add {address} lladdr {other} dev d{number} nud permanent"));
        }
    }
    made
}

/// What a packet asks.
#[derive(Debug, Clone)]
struct Question {
    interface: usize,
    direction: Direction,
    peer: IpAddr,
    key: PortKey,
    source_port: u16,
    /// Ports of a connection, as its endpoint has them.
    local_port: u16,
    peer_port: u16,
    packet: Packet,
}

struct World {
    dataplane: NftDataplane,
    states: States,
    stations: Vec<Station>,
    seen: BTreeSet<(usize, IpAddr, u16, u16, u8)>,
    echo: u16,
    packets: u32,
    passed: u32,
}

impl World {
    fn ports(&mut self, interface: usize, direction: Direction, peer: IpAddr, protocol: u8) -> (u16, u16) {
        let random = &mut self.states.random;
        loop {
            let port = PORTS[random.below(PORTS.len())].wrapping_add(random.below(2) as u16);
            let source = if random.one_in(4) {
                random.below(1 << 16) as u16
            } else {
                SOURCE_PORTS[random.below(SOURCE_PORTS.len())] + random.below(2) as u16
            };
            let (here, there) = if direction == Direction::Egress { (source, port) } else { (port, source) };
            if self.seen.insert((interface, peer, here, there, protocol)) {
                return (port, source);
            }
        }
    }

    fn question(&mut self) -> Question {
        let interface = self.states.random.below(INTERFACES);
        let direction = Direction::BOTH[self.states.random.below(2)];
        let peer = self.states.random.address();
        let own = endpoint_address(interface, peer.is_ipv6());
        let (src, dst) = if direction == Direction::Egress { (own, peer) } else { (peer, own) };
        let kind = self.states.random.below(4);
        if kind == 3 {
            self.echo = self.echo.wrapping_add(1);
            let (protocol, message) =
                if src.is_ipv4() { (Protocol::ICMP, 0x0800) } else { (Protocol::ICMPV6, 0x8000) };
            let packet = Packet::icmp(src, dst, (message >> 8) as u8, 0, self.echo);
            return Question {
                interface,
                direction,
                peer,
                key: protocol.key(message),
                source_port: 0,
                local_port: self.echo,
                peer_port: message,
                packet,
            };
        }
        let protocol = [Protocol::TCP, Protocol::UDP, Protocol::SCTP][kind];
        let (port, source_port) = self.ports(interface, direction, peer, protocol.0);
        let packet = match protocol {
            Protocol::TCP => Packet::tcp(src, source_port, dst, port, SYN),
            Protocol::UDP => Packet::udp(src, source_port, dst, port),
            _ => sctp_init(src, source_port, dst, port),
        };
        let (local_port, peer_port) =
            if direction == Direction::Egress { (source_port, port) } else { (port, source_port) };
        let key = protocol.key(port);
        Question { interface, direction, peer, key, source_port, local_port, peer_port, packet }
    }

    /// What is read back is what was put there, as far as an endpoint can reach it.
    fn compare_tables(&self, state: &HostPolicy) {
        let read = self.dataplane.read_back().unwrap();
        let expected: BTreeMap<_, _> =
            state.endpoints.values().map(|binding| (binding.attachment, binding)).collect();
        assert_eq!(read.endpoints.values().map(|b| (b.attachment, b)).collect::<BTreeMap<_, _>>(), expected);
        assert_eq!(read.addresses, state.addresses);
        let bound = expected.values().flat_map(|binding| [binding.ingress, binding.egress]);
        let bound = bound.filter_map(|id| state.policies.get(&id).map(|policy| (id, policy.clone())));
        assert_eq!(read.policies, bound.collect());
    }

    fn compare(&mut self, state: &HostPolicy) {
        self.compare_tables(state);
        let mut questions = Vec::new();
        for number in 0..PACKETS {
            let question = self.question();
            let (from, receiver) = match question.direction {
                Direction::Egress => (question.interface, OUTSIDE),
                Direction::Ingress => (OUTSIDE, question.interface),
            };
            let frame = numbered(&question.packet, station(from, false), station(from, true), number);
            self.stations[from].frames.send(&frame).unwrap();
            let Question { interface, direction, peer, key, source_port, .. } = question;
            let expected = state.lookup(&name(interface), direction, peer, key, source_port);
            let attachment = Attachment::Interface(self.states.interfaces[interface]);
            let looked_up = self.dataplane.lookup(attachment, direction, peer, key, source_port).unwrap();
            assert_eq!(looked_up, expected, "{question:?}");
            let cell = expected.unwrap_or(cell(Verdict::Deny, 1, false));
            questions.push((question, receiver, cell));
        }
        self.compare_arrivals(&questions);
        self.compare_events(&questions);
        self.packets += u32::from(PACKETS);
    }

    fn compare_arrivals(&mut self, questions: &[(Question, usize, Cell)]) {
        let allowed = |(_, _, cell): &&(Question, usize, Cell)| cell.verdict == Verdict::Allow;
        let expected = questions.iter().filter(allowed).count();
        let mut arrived: BTreeSet<(usize, u16)> = BTreeSet::new();
        let deadline = Instant::now() + Duration::from_secs(5);
        loop {
            for (number, at) in self.stations.iter().enumerate() {
                let frames = std::iter::from_fn(|| at.frames.next());
                // The kernel's own (listener reports, and what tells whoever is refused) are for others, or carry no such number.
                let ours = frames.filter(|frame| frame[..6] == station(number, false));
                let asked = ours.filter_map(|frame| {
                    let question = number_of(&frame)?;
                    let (asked, ..) = questions.get(usize::from(question))?;
                    let (protocol, end) = if asked.packet.dst.is_ipv4() { (23, 34) } else { (20, 54) };
                    if frame.get(protocol) == Some(&Protocol::TCP.0) && frame.get(end + 13)? & 4 != 0 {
                        // A reset, all of which have the number 0.
                        return None;
                    }
                    let octets: Vec<u8> = match asked.packet.dst {
                        IpAddr::V4(v4) => v4.octets().into(),
                        IpAddr::V6(v6) => v6.octets().into(),
                    };
                    (frame.get(end - octets.len()..end)? == octets).then_some((number, question))
                });
                arrived.extend(asked);
            }
            if arrived.len() >= expected || Instant::now() > deadline {
                break;
            }
        }
        for (number, (question, receiver, cell)) in questions.iter().enumerate() {
            let passed = arrived.contains(&(*receiver, number as u16));
            assert_eq!(passed, cell.verdict == Verdict::Allow, "{question:?} {cell:?}");
            self.passed += u32::from(passed);
        }
    }

    fn compare_events(&mut self, questions: &[(Question, usize, Cell)]) {
        let mut events: HashMap<_, Vec<RawFlow>> = HashMap::new();
        let mut keep = |flow: RawFlow| {
            if matches!(flow.event, FlowEvent::Open | FlowEvent::Deny) {
                let key = flow.key;
                let place = (key.attachment, key.protocol, key.peer, key.local_port, key.peer_port);
                events.entry((place, flow.direction)).or_default().push(flow);
            }
        };
        self.dataplane.poll(&mut keep).unwrap();
        for (question, _, cell) in questions {
            let Question { interface, direction, peer, local_port, peer_port, packet, .. } = question;
            let attachment = Attachment::Interface(self.states.interfaces[*interface]);
            let place = (attachment, packet.protocol, *peer, *local_port, *peer_port);
            let told = events.remove(&(place, *direction)).unwrap_or_default();
            let [event] = &told[..] else { panic!("one event about {question:?} {cell:?}: {told:?}") };
            let open = cell.verdict == Verdict::Allow;
            assert_eq!(event.event, if open { FlowEvent::Open } else { FlowEvent::Deny });
            assert_eq!((event.rule, event.verdict), (cell.rule, cell.verdict), "{question:?}");
            let audit = (event.audit_rule, event.audit_verdict);
            assert_eq!(audit, (cell.audit_rule, cell.audit_verdict), "{question:?}");
        }
        assert!(events.is_empty(), "{events:?}");
    }
}

#[test]
fn packets_fare_as_the_model_says() {
    enter_new_namespace();
    run("ip link set lo up");
    for setting in ["ipv4.ip_forward", "ipv6.conf.all.forwarding"] {
        run(&format!("sysctl -qw net.{setting}=1"));
    }
    let stations: Vec<_> = (0..=OUTSIDE).map(neighbour).collect();
    let interfaces: Vec<_> = (0..INTERFACES).map(|number| ifindex(&format!("d{number}"))).collect();
    let mut dataplane = NftDataplane::open(Capacities::default()).unwrap();
    for interface in &interfaces {
        dataplane.attach(Attachment::Interface(*interface)).unwrap();
    }
    dataplane.poll(&mut |_| ()).unwrap();
    let states = States::new(0x0b01_4ead, interfaces);
    let mut world =
        World { dataplane, states, stations, seen: BTreeSet::new(), echo: 0, packets: 0, passed: 0 };
    for round in 0..15 {
        let mut state = world.states.whole();
        if round % 5 == 4 {
            // As another process, over what the one before left.
            world.dataplane = NftDataplane::open(Capacities::default()).unwrap();
            world.dataplane.poll(&mut |_| ()).unwrap();
        }
        world.dataplane.replace(&state).unwrap();
        world.compare(&state);
        for _ in 0..4 {
            let delta = world.states.delta(&state);
            world.dataplane.apply(&delta).unwrap();
            state.apply(&delta);
            world.compare(&state);
        }
        world.dataplane.sweep(now_ns() + 10_000_000_000, &mut |_| ()).unwrap();
    }
    println!("{} packets, {} of them through, in 75 states", world.packets, world.passed);
}
