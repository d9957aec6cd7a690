//! What one packet costs, by `BPF_PROG_TEST_RUN`. The packets never reach an interface, so any root may
//! measure on a live host; caches are warm, since the same packet is repeated.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bulkhead_dataplane::{Dataplane, DataplaneError};
use bulkhead_model::Prefix;
use bulkhead_model::host_policy::{
    Attachment, Cell, ClassId, Column, CompiledId, CompiledPolicy, EndpointBinding, HostPolicy, Row, RuleId,
};
use bulkhead_model::ports::Protocol;
use bulkhead_model::verdict::{Direction, FIRST_FREE_RULE_ID, Verdict};
use libbpf_rs::{Object, ObjectBuilder, ProgramInput};

use crate::loader::{Hook, libbpf_error, named};
use crate::sys::{self, NetfilterHook};
use crate::test_run::TestPacket;
use crate::{Capacities, EbpfDataplane};

static EMPTY: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/empty.bpf.o"));

/// `NF_INET_FORWARD` of `NFPROTO_IPV4`, where `gates` links.
const FORWARD_V4: NetfilterHook = NetfilterHook { family: 2, hook: 2, priority: 99 };

/// The loopback interface, for which the kernel runs test packets in every namespace.
const LOOPBACK: u32 = 1;
const WORKLOAD: Ipv4Addr = Ipv4Addr::new(172, 16, 0, 2);
const COMPILED: CompiledId = CompiledId(1);
const SYN: u8 = 0x02;
const ACK: u8 = 0x10;
const RST: u8 = 0x04;

/// Mean times at one size of policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PacketCost {
    /// Peers, each with a class, a rule and a row of its own.
    pub peers: u32,
    /// A program that does nothing.
    pub empty: Duration,
    /// Packet of an established connection.
    pub established: Duration,
    /// Packet of no known connection that is judged and let through, without an entry being made.
    pub judged: Duration,
    /// Packet that is refused and counted.
    pub denied: Duration,
    /// First packet of a connection: judged, entry made, event sent. Timed one by one, less what timing an
    /// empty program one by one takes.
    pub opened: Duration,
    /// Putting the whole policy into force.
    pub replace: Duration,
    /// Moving one address to another class.
    pub apply: Duration,
}

/// Measures with a policy of `peers` peers, `repeat` packets each, pinned under `root` meanwhile.
pub fn packet_cost(root: &Path, peers: u32, repeat: u32) -> Result<PacketCost, DataplaneError> {
    let mut dataplane = EbpfDataplane::open(root, Capacities::default())?;
    let result = measure(&mut dataplane, peers, repeat);
    dataplane.cleanup()?;
    result
}

fn measure(dataplane: &mut EbpfDataplane, peers: u32, repeat: u32) -> Result<PacketCost, DataplaneError> {
    let replace = dataplane.replace(&policy(peers))?.duration;
    let apply = dataplane.apply(&move_one(peers))?.duration;
    let middle = peer(peers / 2);
    let run = |frame: &[u8], repeat| {
        let packet =
            TestPacket { direction: Direction::Ingress, ifindex: LOOPBACK, ingress_ifindex: 2, frame };
        dataplane.test_run(packet, repeat)
    };
    run(&tcp(middle, 40_000, 443, SYN), 1)?;
    let (_, established) = run(&tcp(middle, 40_000, 443, ACK), repeat)?;
    let (_, judged) = run(&tcp(middle, 40_001, 443, RST), repeat)?;
    let (_, denied) = run(&tcp(middle, 40_002, 444, SYN), repeat)?;
    let empty_frame = tcp(middle, 1, 443, SYN);
    let empty = run_empty(&empty_frame, repeat)?;
    let singles = 2000u16;
    let (mut opened, mut empty_singles) = (Duration::ZERO, Duration::ZERO);
    for port in 0..singles {
        opened += run(&tcp(peer(u32::from(port) % peers), 10_000 + port, 443, SYN), 1)?.1;
    }
    for _ in 0..singles / 10 {
        empty_singles += run_empty(&empty_frame, 1)?;
    }
    let opened = (opened / u32::from(singles)).saturating_sub(empty_singles / u32::from(singles / 10));
    Ok(PacketCost { peers, empty, established, judged, denied, opened, replace, apply })
}

fn load_empty() -> Result<Object, DataplaneError> {
    let loaded = ObjectBuilder::default().open_memory(EMPTY).and_then(|open| open.load());
    loaded.map_err(|error| libbpf_error("load the empty programs", &error))
}

fn run_empty(frame: &[u8], repeat: u32) -> Result<Duration, DataplaneError> {
    let object = load_empty()?;
    let input = ProgramInput { data_in: Some(frame), repeat, ..ProgramInput::default() };
    let output = named(&object, "empty")?.test_run(input);
    output.map(|output| output.duration).map_err(|error| libbpf_error("run the empty program", &error))
}

/// Programs that do nothing where those of a dataplane stand on the way between two workloads: what its hooks cost
/// whatever is done there. Gone when it is dropped.
#[derive(Debug)]
pub struct EmptyHooks {
    _links: Vec<OwnedFd>,
}

impl EmptyHooks {
    /// At both hooks of these interfaces and, if asked for, where packets are forwarded.
    pub fn attach(interfaces: &[u32], forward: bool) -> Result<Self, DataplaneError> {
        let failed = |error| DataplaneError::io("attach empty programs", error);
        let object = load_empty()?;
        let mut links = Vec::new();
        for (ifindex, hook) in interfaces.iter().flat_map(|index| Hook::BOTH.map(|hook| (*index, hook))) {
            let program = named(&object, "empty")?;
            links.push(sys::link_create(program.as_fd(), ifindex, hook.attach_type()).map_err(failed)?);
        }
        if forward {
            let program = named(&object, "empty_gate")?;
            links.push(sys::netfilter_link_create(program.as_fd(), FORWARD_V4).map_err(failed)?);
        }
        Ok(Self { _links: links })
    }
}

fn peer(number: u32) -> Ipv4Addr {
    Ipv4Addr::from_bits(u32::from(Ipv4Addr::new(10, 0, 0, 0)) + number)
}

/// Each peer may call tcp/443 and udp/53, by a rule of its own.
fn policy(peers: u32) -> HostPolicy {
    let cell = |verdict, rule| Cell {
        verdict,
        rule: RuleId(rule),
        audit_verdict: verdict,
        audit_rule: RuleId(rule),
        log: false,
        reject: false,
        written: true,
    };
    let refused = cell(Verdict::Deny, FIRST_FREE_RULE_ID);
    let row = |number: u32| {
        let allowed = cell(Verdict::Allow, FIRST_FREE_RULE_ID + 1 + number);
        let step = |first, cell| Column { first, cell };
        let (tcp, udp) = (Protocol::TCP.key(443), Protocol::UDP.key(53));
        let steps = [
            step(0, refused),
            step(tcp, allowed),
            step(tcp + 1, refused),
            step(udp, allowed),
            step(udp + 1, refused),
        ];
        Arc::new(Row::new(steps))
    };
    let addresses = (0..peers).map(|number| (Prefix::host(IpAddr::V4(peer(number))), ClassId(number + 1)));
    let compiled = CompiledPolicy {
        id: COMPILED,
        default_row: Arc::new(Row::uniform(refused)),
        rows: (0..peers).map(|number| (ClassId(number + 1), row(number))).collect(),
    };
    let binding = EndpointBinding {
        attachment: Attachment::Interface(LOOPBACK),
        addresses: vec![WORKLOAD.into()],
        ingress: COMPILED,
        egress: COMPILED,
    };
    HostPolicy {
        addresses: addresses.collect(),
        policies: BTreeMap::from([(COMPILED, compiled)]),
        endpoints: BTreeMap::from([(Arc::from("bench"), binding)]),
        ..HostPolicy::default()
    }
}

fn move_one(peers: u32) -> bulkhead_model::host_policy::HostDelta {
    let moved = (Prefix::host(IpAddr::V4(peer(peers))), Some(ClassId(1)));
    bulkhead_model::host_policy::HostDelta { addresses: BTreeMap::from([moved]), ..Default::default() }
}

fn tcp(source: Ipv4Addr, source_port: u16, port: u16, flags: u8) -> Vec<u8> {
    let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0];
    frame.extend([0x45, 0, 0, 40, 0, 0, 0, 0, 64, Protocol::TCP.0, 0, 0]);
    frame.extend(source.octets());
    frame.extend(WORKLOAD.octets());
    frame.extend(source_port.to_be_bytes());
    frame.extend(port.to_be_bytes());
    frame.extend([0; 8]);
    frame.extend([0x50, flags, 1, 0, 0, 0, 0, 0]);
    frame
}
