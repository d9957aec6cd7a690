//! A host with several endpoints under one dataplane.

use std::time::Duration;

use bulkhead_dataplane::Dataplane;
pub(crate) use bulkhead_dataplane_testing::world::*;
use bulkhead_ebpf::EbpfDataplane;
use bulkhead_model::flow::RawFlow;

use super::{PinRoot, enter_new_namespace, reject, run, small};

pub(crate) struct World {
    pub(crate) dataplane: EbpfDataplane,
    root: PinRoot,
}

impl World {
    /// A host that routes, in this thread's namespace.
    pub(crate) fn new() -> Self {
        enter_new_namespace();
        run("ip link set lo up");
        run("sysctl -qw net.ipv4.ip_forward=1");
        run("sysctl -qw net.ipv6.conf.all.forwarding=1");
        let root = PinRoot::new();
        Self { dataplane: EbpfDataplane::open(root.path(), small()).unwrap(), root }
    }

    /// Whether anything is still pinned.
    pub(crate) fn root_exists(&self) -> bool {
        self.root.path().exists()
    }

    /// Another process takes over.
    pub(crate) fn reopen(&mut self) {
        self.dataplane = EbpfDataplane::open(self.root.path(), small()).unwrap();
    }

    pub(crate) fn put(&mut self, ends: &[End<'_>]) {
        self.dataplane.replace(&tables(ends)).unwrap();
        for end in ends {
            self.dataplane.attach(end.0).unwrap();
        }
    }

    /// As [`Self::put`], but whoever is refused is told.
    pub(crate) fn put_rejecting(&mut self, ends: &[End<'_>]) {
        let mut policy = tables(ends);
        reject(&mut policy);
        self.dataplane.replace(&policy).unwrap();
        for end in ends {
            self.dataplane.attach(end.0).unwrap();
        }
    }

    /// Does something while the dataplane is polled, as an agent polls it.
    pub(crate) fn polled<T: Send>(&mut self, work: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            let worker = scope.spawn(work);
            while !worker.is_finished() {
                self.dataplane.poll(&mut |_flow| ()).unwrap();
                std::thread::sleep(Duration::from_millis(1));
            }
            worker.join().unwrap()
        })
    }

    /// What has been reported since the last call.
    pub(crate) fn events(&mut self) -> Vec<RawFlow> {
        let mut events = Vec::new();
        self.dataplane.poll(&mut |flow| events.push(flow)).unwrap();
        events
    }
}
