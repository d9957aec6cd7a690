//! A network namespace, a workload's interface and a dataplane, for tests as root.
#![allow(dead_code, unused_imports, reason = "every test binary uses its own part")]

pub(crate) mod world;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use bulkhead_dataplane::{Dataplane, DataplaneError};
#[allow(unused_imports, reason = "every test binary uses its own part")]
pub(crate) use bulkhead_dataplane_testing::namespace::{
    self as live, enter_new_namespace, ifindex, interface, now_ns, run,
};
pub(crate) use bulkhead_dataplane_testing::packet;
#[allow(unused_imports, reason = "every test binary uses its own part")]
pub(crate) use bulkhead_dataplane_testing::policy::{
    DEFAULT_RULE, EGRESS, INGRESS, Rule, cell, compile, policy, reject, row,
};
use bulkhead_ebpf::test_run::TestPacket;
use bulkhead_ebpf::{Capacities, EbpfDataplane};
use bulkhead_model::flow::{DropReason, RawFlow};
use bulkhead_model::verdict::Direction;
use packet::Packet;

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
