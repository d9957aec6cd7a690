//! A fence that the kernel keeps: an interface that is a workload's by its name is closed from the moment it appears, also
//! while no agent runs, until somebody is in charge of it.
//!
//! A table of its own beside those of a dataplane, of either kind. It stands at the interfaces themselves, so it also keeps back
//! what a bridge would carry, and every packet pays for asking (docs/benchmarks.md): whoever wants it says so. Hooks by the
//! beginning of a name need Linux 6.17 (`NFTA_DEVICE_PREFIX`).

use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;
use std::os::fd::BorrowedFd;

use bulkhead_dataplane::{Applied, Dataplane, DataplaneError, DataplaneStats, SweepStats};
use bulkhead_model::Direction;
use bulkhead_model::flow::RawFlow;
use bulkhead_model::host_policy::{Attachment, Cell, HostDelta, HostPolicy};
use bulkhead_model::ports::PortKey;

use crate::expression::{Expression, Meta, Register, Verdict};
use crate::kernel;
use crate::object::{Devices, Element, NETDEV, Set, Table};
use crate::schema::{self, BYTES};
use crate::skeleton;
use crate::socket::Talker;

const TABLE: Table = Table { family: NETDEV, name: "bulkhead-fence" };
/// Interfaces that somebody is in charge of, or that are left alone.
const CLAIMED: Set = schema::set(TABLE, "claimed", BYTES, 4);
/// Packets that it has kept back.
const KEPT_BACK: &str = "kept_back";
/// Before everybody else at an interface.
const PRIORITY: i32 = -500;
const REGISTER: Register = 0;

/// The fence of a network namespace, that of the thread that raises it.
#[derive(Debug)]
pub struct Fence {
    talker: Talker,
    patterns: Vec<String>,
    claimed: BTreeSet<u32>,
}

impl Fence {
    /// Raises the fence for interfaces of these names (`veth*` or whole ones), whatever fence there was before. `open`:
    /// those that it lets through.
    ///
    /// # Errors
    /// [`DataplaneError::Requirement`] where the kernel has no hooks by the beginning of a name.
    pub fn raise(patterns: &[String], open: BTreeSet<u32>) -> Result<Self, DataplaneError> {
        let talker = Talker::open().map_err(failed("open a netlink socket"))?;
        let mut fence = Self { talker, patterns: patterns.to_vec(), claimed: open };
        fence.rebuild()?;
        Ok(fence)
    }

    /// Whether one has been raised here.
    pub fn is_there() -> Result<bool, DataplaneError> {
        // A kernel without nftables has none.
        let Ok(mut talker) = Talker::open() else { return Ok(false) };
        Ok(is_there(&mut talker).unwrap_or(false))
    }

    /// Takes the fence away, if there is one.
    pub fn remove() -> Result<(), DataplaneError> {
        let Ok(mut talker) = Talker::open() else { return Ok(()) };
        if is_there(&mut talker).unwrap_or(false) {
            let removed = talker.transact(&[TABLE.delete()]);
            removed.map_err(|refused| failed("remove the fence")(refused.error))?;
        }
        Ok(())
    }

    /// Somebody is in charge of this interface from now on.
    pub fn open(&mut self, ifindex: u32) -> Result<(), DataplaneError> {
        if !self.claimed.insert(ifindex) {
            return Ok(());
        }
        let mut requests = Vec::new();
        CLAIMED.add(&[element(ifindex)], &mut requests);
        match self.talker.transact(&requests) {
            Ok(()) => Ok(()),
            // Somebody has flushed it.
            Err(refused) if refused.error.raw_os_error() == Some(libc::ENOENT) => self.rebuild(),
            Err(refused) => {
                self.claimed.remove(&ifindex);
                Err(failed("open the fence")(refused.error))
            }
        }
    }

    /// Raises it again if somebody else has taken it away.
    pub fn repair(&mut self) -> Result<(), DataplaneError> {
        if is_there(&mut self.talker).map_err(failed("look for the fence"))? {
            Ok(())
        } else {
            self.rebuild()
        }
    }

    /// All of it in one transaction: never half there.
    fn rebuild(&mut self) -> Result<(), DataplaneError> {
        self.claimed.retain(|ifindex| kernel::interface_name(*ifindex).is_some());
        let mut requests = vec![TABLE.create(&[]), TABLE.delete(), TABLE.create(&[])];
        requests.push(TABLE.counter(KEPT_BACK, 0));
        requests.push(CLAIMED.create(1));
        let elements: Vec<_> = self.claimed.iter().copied().map(element).collect();
        CLAIMED.add(&elements, &mut requests);
        for (name, hook, interface) in [
            ("from", skeleton::INGRESS, Meta::InputInterface),
            ("to", skeleton::EGRESS, Meta::OutputInterface),
        ] {
            requests.push(TABLE.base_chain(name, hook, PRIORITY, Devices::Matching(&self.patterns)));
            requests.push(TABLE.rule(name, &keep_back(interface)));
        }
        self.talker.transact(&requests).map_err(|refused| match refused.error.raw_os_error() {
            Some(libc::EINVAL | libc::EOPNOTSUPP | libc::ENOENT) => DataplaneError::Requirement {
                feature: "hooks by the beginning of an interface's name",
                advice:
                    "an interface that appears while no agent runs is open until one does: Linux 6.17 with \
                         CONFIG_NETFILTER_INGRESS and CONFIG_NETFILTER_EGRESS can close it"
                        .into(),
            },
            _ => failed("raise the fence")(refused.error),
        })
    }
}

fn keep_back(interface: Meta) -> [Expression; 4] {
    [
        Expression::Meta(interface, REGISTER),
        Expression::Lacks { set: CLAIMED.name, key: REGISTER },
        Expression::Count(KEPT_BACK),
        Expression::Verdict(Verdict::Drop),
    ]
}

fn element(ifindex: u32) -> Element {
    Element::Key { key: ifindex.to_ne_bytes().to_vec(), data: Vec::new() }
}

fn is_there(talker: &mut Talker) -> io::Result<bool> {
    talker.one(&TABLE.get(), |_| Some(())).map(|found| found.is_some())
}

fn failed(context: &'static str) -> impl Fn(io::Error) -> DataplaneError {
    move |error| DataplaneError::io(context, error)
}

/// A dataplane behind a fence, which is opened for each interface once that is in charge of it.
pub struct Fenced {
    inner: Box<dyn Dataplane>,
    fence: Option<Fence>,
}

impl std::fmt::Debug for Fenced {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Fenced").field("inner", &self.inner.name()).field("fence", &self.fence).finish()
    }
}

impl Fenced {
    /// No fence is raised before [`Dataplane::guard`] says for whom.
    pub fn new(inner: Box<dyn Dataplane>) -> Self {
        Self { inner, fence: None }
    }
}

impl Dataplane for Fenced {
    fn name(&self) -> &'static str {
        self.inner.name()
    }

    fn chosen_because(&self) -> Option<&str> {
        self.inner.chosen_because()
    }

    fn guard(&mut self, names: &[String], spared: &BTreeSet<u32>) -> Result<(), DataplaneError> {
        self.inner.guard(names, spared)?;
        if names.is_empty() {
            self.fence = None;
            return Fence::remove();
        }
        let mut open = spared.clone();
        open.extend(self.inner.attached()?.into_iter().filter_map(|attachment| match attachment {
            Attachment::Interface(ifindex) => Some(ifindex),
            _ => None,
        }));
        self.fence = Some(Fence::raise(names, open)?);
        Ok(())
    }

    fn attach(&mut self, attachment: Attachment) -> Result<(), DataplaneError> {
        self.inner.attach(attachment)?;
        match (attachment, &mut self.fence) {
            (Attachment::Interface(ifindex), Some(fence)) => fence.open(ifindex),
            _ => Ok(()),
        }
    }

    fn detach(&mut self, attachment: Attachment) -> Result<(), DataplaneError> {
        self.inner.detach(attachment)
    }

    fn attached(&self) -> Result<BTreeSet<Attachment>, DataplaneError> {
        self.inner.attached()
    }

    fn replace(&mut self, policy: &HostPolicy) -> Result<Applied, DataplaneError> {
        self.inner.replace(policy)
    }

    fn apply(&mut self, delta: &HostDelta) -> Result<Applied, DataplaneError> {
        self.inner.apply(delta)
    }

    fn poll(&mut self, sink: &mut dyn FnMut(RawFlow)) -> Result<(), DataplaneError> {
        self.inner.poll(sink)
    }

    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        self.inner.event_fd()
    }

    fn sweep(&mut self, now_ns: u64, sink: &mut dyn FnMut(RawFlow)) -> Result<SweepStats, DataplaneError> {
        self.fence.as_mut().map_or(Ok(()), Fence::repair)?;
        self.inner.sweep(now_ns, sink)
    }

    fn stats(&self) -> Result<DataplaneStats, DataplaneError> {
        self.inner.stats()
    }

    fn lookup(
        &self,
        attachment: Attachment,
        direction: Direction,
        peer: IpAddr,
        key: PortKey,
        source_port: u16,
    ) -> Result<Option<Cell>, DataplaneError> {
        self.inner.lookup(attachment, direction, peer, key, source_port)
    }

    fn read_back(&self) -> Result<HostPolicy, DataplaneError> {
        self.inner.read_back()
    }

    fn generation(&self) -> u64 {
        self.inner.generation()
    }

    fn cleanup(&mut self) -> Result<(), DataplaneError> {
        self.inner.cleanup()?;
        self.fence = None;
        Fence::remove()
    }
}
