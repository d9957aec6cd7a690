//! Two workloads on a host that routes, and a dataplane, for tests as root.
#![allow(dead_code, reason = "every test binary uses its own part")]

use std::collections::BTreeSet;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::process::Command;

use bulkhead_dataplane::Dataplane;
use bulkhead_dataplane_testing::namespace::{Namespace, enter_new_namespace, ifindex, run};
use bulkhead_dataplane_testing::world::{End, tables};
use bulkhead_model::flow::RawFlow;
use bulkhead_model::host_policy::Attachment;
use bulkhead_nft::{Capacities, NftDataplane};

/// Two workloads `wa` (10.0.1.2) and `wb` (10.0.2.2) on a host that routes.
pub(crate) struct World {
    pub(crate) a: Namespace,
    pub(crate) b: Namespace,
    pub(crate) dataplane: NftDataplane,
}

impl World {
    pub(crate) fn new() -> Self {
        enter_new_namespace();
        Self::here()
    }

    /// In the namespace of this thread.
    pub(crate) fn here() -> Self {
        run("ip link set lo up");
        run("sysctl -qw net.ipv4.ip_forward=1");
        let (a, b) = (Namespace::workload("wa", 1), Namespace::workload("wb", 2));
        let mut dataplane = NftDataplane::open(Capacities::default()).unwrap();
        dataplane.attach(Attachment::Interface(ifindex("wa"))).unwrap();
        dataplane.attach(Attachment::Interface(ifindex("wb"))).unwrap();
        assert_eq!(dataplane.attached().unwrap().len(), BTreeSet::from([1, 2]).len());
        Self { a, b, dataplane }
    }
}

/// A host that routes, with whatever endpoints.
pub(crate) struct Host {
    pub(crate) dataplane: NftDataplane,
    events: Vec<RawFlow>,
}

impl Host {
    pub(crate) fn new() -> Self {
        enter_new_namespace();
        run("ip link set lo up");
        run("sysctl -qw net.ipv4.ip_forward=1");
        run("sysctl -qw net.ipv6.conf.all.forwarding=1");
        let dataplane = NftDataplane::open(Capacities::default()).unwrap();
        let mut host = Self { dataplane, events: Vec::new() };
        host.listen();
        host
    }

    /// Another process takes over.
    pub(crate) fn reopen(&mut self) {
        self.dataplane = NftDataplane::open(Capacities::default()).unwrap();
        self.listen();
    }

    /// Refused packets are told once somebody listens.
    fn listen(&mut self) {
        self.dataplane.poll(&mut |flow| self.events.push(flow)).unwrap();
    }

    pub(crate) fn put(&mut self, ends: &[End<'_>]) {
        self.dataplane.replace(&tables(ends)).unwrap();
        for end in ends {
            self.dataplane.attach(end.0).unwrap();
        }
        self.listen();
    }

    /// What has been reported since the last call.
    pub(crate) fn events(&mut self) -> Vec<RawFlow> {
        let mut events = std::mem::take(&mut self.events);
        self.dataplane.poll(&mut |flow| events.push(flow)).unwrap();
        events
    }
}

/// What `nft` prints of everything.
pub(crate) fn listing() -> String {
    let output = Command::new("nft").args(["list", "ruleset"]).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// Whether there is something to read.
pub(crate) fn is_readable(fd: BorrowedFd<'_>) -> bool {
    let mut poll = libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    #[expect(unsafe_code, reason = "system call without a safe wrapper")]
    // SAFETY: one structure, which outlives the call.
    let ready = unsafe { libc::poll(&raw mut poll, 1, 1000) };
    ready == 1
}
