//! A network namespace, a workload's interface and a dataplane, for tests as root.
#![allow(dead_code, reason = "every test binary uses its own part")]

pub(crate) mod live;
pub(crate) mod packet;

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::CString;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use bulkhead_dataplane::{Dataplane, DataplaneError};
use bulkhead_ebpf::test_run::TestPacket;
use bulkhead_ebpf::{Capacities, EbpfDataplane};
use bulkhead_model::Prefix;
use bulkhead_model::flow::{DropReason, RawFlow};
use bulkhead_model::host_policy::{
    Attachment, Cell, ClassId, Column, CompiledId, CompiledPolicy, EndpointBinding, HostPolicy, Row, RuleId,
};
use bulkhead_model::ports::PortMatch;
use bulkhead_model::verdict::{Direction, Verdict};
use packet::Packet;

pub(crate) const INGRESS: CompiledId = CompiledId(1);
pub(crate) const EGRESS: CompiledId = CompiledId(2);
pub(crate) const DEFAULT_RULE: u32 = 99;

pub(crate) fn small() -> Capacities {
    Capacities {
        addresses: 4096,
        prefixes: 4096,
        rows: 16384,
        steps: 65536,
        cells: 16384,
        variants: 4096,
        endpoints: 64,
        endpoint_addrs: 256,
        conns: 8192,
        denials: 1024,
        frags: 256,
        events_bytes: 1 << 20,
    }
}

/// A rule: peers, ports, verdict and rule id. Written.
#[derive(Debug, Clone)]
pub(crate) struct Rule(pub(crate) &'static str, pub(crate) &'static str, pub(crate) Verdict, pub(crate) u32);

pub(crate) fn cell(verdict: Verdict, rule: u32, written: bool) -> Cell {
    Cell {
        verdict,
        rule: RuleId(rule),
        audit_verdict: verdict,
        audit_rule: RuleId(rule),
        log: false,
        written,
    }
}

/// A row from rules in order, the first match deciding.
pub(crate) fn row(rules: &[(PortMatch, Cell)], default: Cell) -> Arc<Row> {
    let mut starts = BTreeSet::from([0]);
    for (ports, _) in rules {
        let (first, last) = ports.interval().unwrap();
        starts.extend([first, last + 1]);
    }
    let at = |key| rules.iter().find(|(ports, _)| ports.matches(key, &[])).map_or(default, |(_, cell)| *cell);
    let inside = starts.into_iter().filter(|key| *key < bulkhead_model::ports::PORT_KEY_END);
    Arc::new(Row::new(inside.map(|first| Column { first, cell: at(first) })))
}

/// A compiled policy over `prefixes` (class n+1 is the n-th), each matched by containment.
pub(crate) fn compile(id: CompiledId, prefixes: &[Prefix], rules: &[Rule], default: Cell) -> CompiledPolicy {
    let rows = prefixes.iter().zip(1u32..).map(|(prefix, class)| {
        let matching: Vec<_> = rules
            .iter()
            .filter(|rule| rule.0.parse::<Prefix>().unwrap().contains(*prefix))
            .map(|rule| (rule.1.parse().unwrap(), cell(rule.2, rule.3, true)))
            .collect();
        (ClassId(class), row(&matching, default))
    });
    CompiledPolicy { id, default_row: Arc::new(Row::uniform(default)), rows: rows.collect() }
}

/// One endpoint "w" with two rule lists, default deny unless said otherwise.
pub(crate) fn policy(
    ifindex: u32,
    addresses: &[IpAddr],
    ingress: &[Rule],
    egress: &[Rule],
    default: Verdict,
) -> HostPolicy {
    let prefixes: BTreeSet<Prefix> =
        ingress.iter().chain(egress).map(|rule| rule.0.parse().unwrap()).collect();
    let prefixes: Vec<_> = prefixes.into_iter().collect();
    let default = cell(default, DEFAULT_RULE, false);
    let binding = EndpointBinding {
        attachment: Attachment::Interface(ifindex),
        addresses: addresses.to_vec(),
        ingress: INGRESS,
        egress: EGRESS,
    };
    HostPolicy {
        revision: 1,
        addresses: prefixes.iter().copied().zip((1..).map(ClassId)).collect(),
        policies: BTreeMap::from([
            (INGRESS, compile(INGRESS, &prefixes, ingress, default)),
            (EGRESS, compile(EGRESS, &prefixes, egress, default)),
        ]),
        endpoints: BTreeMap::from([(Arc::from("w"), binding)]),
        rules: BTreeMap::new(),
    }
}

/// Moves this thread into a namespace of its own.
pub(crate) fn enter_new_namespace() {
    #[expect(unsafe_code, reason = "system call without a safe wrapper")]
    // SAFETY: affects the calling thread only.
    let result = unsafe { libc::unshare(libc::CLONE_NEWNET) };
    assert_eq!(result, 0, "these tests need root: {}", std::io::Error::last_os_error());
}

pub(crate) fn run(command: &str) {
    let mut words = command.split_whitespace();
    let output = Command::new(words.next().unwrap()).args(words).output().unwrap();
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
}

pub(crate) fn ifindex(name: &str) -> u32 {
    let name = CString::new(name).unwrap();
    #[expect(unsafe_code, reason = "system call without a safe wrapper")]
    // SAFETY: a C string that outlives the call.
    let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
    assert_ne!(index, 0, "{name:?}");
    index
}

pub(crate) fn interface(name: &str) -> Attachment {
    Attachment::Interface(ifindex(name))
}

pub(crate) fn now_ns() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    #[expect(unsafe_code, reason = "system call without a safe wrapper")]
    // SAFETY: the struct outlives the call.
    unsafe {
        libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time);
    }
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// A pin directory of its own, removed at the end.
#[derive(Debug)]
pub(crate) struct PinRoot(pub(crate) PathBuf);

impl PinRoot {
    pub(crate) fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        Self(format!("/sys/fs/bpf/bulkhead-test-{}-{number}", std::process::id()).into())
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for PinRoot {
    fn drop(&mut self) {
        // Directories cannot be removed recursively by name only: list what is there.
        fn remove(path: &Path) {
            for entry in std::fs::read_dir(path).into_iter().flatten().flatten() {
                if entry.path().is_dir() {
                    remove(&entry.path());
                } else {
                    let _gone = std::fs::remove_file(entry.path());
                }
            }
            let _gone = std::fs::remove_dir(path);
        }
        remove(&self.0);
    }
}

/// One workload interface in a namespace of this thread.
#[derive(Debug)]
pub(crate) struct Bench {
    pub(crate) dataplane: EbpfDataplane,
    pub(crate) ifindex: u32,
    pub(crate) root: PinRoot,
}

impl Bench {
    pub(crate) fn new() -> Self {
        Self::with(small())
    }

    pub(crate) fn with(capacities: Capacities) -> Self {
        enter_new_namespace();
        run("ip link set lo up");
        run("ip link add w type veth peer name wp");
        let root = PinRoot::new();
        let dataplane = EbpfDataplane::open(root.path(), capacities).unwrap();
        Self { dataplane, ifindex: ifindex("w"), root }
    }

    pub(crate) fn reopen(&mut self) -> Result<(), DataplaneError> {
        self.dataplane = EbpfDataplane::open(self.root.path(), small())?;
        Ok(())
    }

    /// From the workload.
    pub(crate) fn from(&self, packet: &Packet) -> bool {
        self.run(Direction::Egress, 0, &packet.frame())
    }

    /// To the workload, from another interface.
    pub(crate) fn to(&self, packet: &Packet) -> bool {
        self.run(Direction::Ingress, 1, &packet.frame())
    }

    /// To the workload, from this host.
    pub(crate) fn host(&self, packet: &Packet) -> bool {
        self.run(Direction::Ingress, 0, &packet.frame())
    }

    pub(crate) fn run(&self, direction: Direction, ingress_ifindex: u32, frame: &[u8]) -> bool {
        let packet = TestPacket { direction, ifindex: self.ifindex, ingress_ifindex, frame };
        self.dataplane.test_run(packet, 1).unwrap().0
    }

    pub(crate) fn events(&mut self) -> Vec<RawFlow> {
        let mut events = Vec::new();
        self.dataplane.poll(&mut |flow| events.push(flow)).unwrap();
        events
    }

    pub(crate) fn drops(&self, reason: DropReason) -> u64 {
        self.dataplane.stats().unwrap().drops.get(&reason).copied().unwrap_or(0)
    }
}
