//! A fence that the kernel keeps: an interface that is a workload's by its name is closed from the moment it appears, also
//! while no agent runs, until somebody is in charge of it.
//!
//! A table of its own beside those of a dataplane, for either kind of those. Hooks by the beginning of a name need Linux
//! 6.16 (`NFTA_DEVICE_PREFIX`: 6.17).

use std::collections::BTreeSet;
use std::io;

use bulkhead_dataplane::DataplaneError;

use crate::expression::{Expression, Meta, Register, Verdict};
use crate::kernel;
use crate::object::{Devices, Element, NETDEV, Set, Table};
use crate::schema::{self, BYTES};
use crate::skeleton;
use crate::socket::Talker;

const TABLE: Table = Table { family: NETDEV, name: "bulkhead-fence" };
/// Interfaces that somebody is or was in charge of, or that were there before the fence.
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
    /// Raises the fence for interfaces of these names (`veth*` or whole ones), or changes it to them. `open`: those that
    /// stay as they are, on top of what an earlier one let through.
    ///
    /// # Errors
    /// [`DataplaneError::Requirement`] where the kernel has no hooks by the beginning of a name.
    pub fn raise(patterns: &[String], open: BTreeSet<u32>) -> Result<Self, DataplaneError> {
        let mut talker = Talker::open().map_err(failed("open a netlink socket"))?;
        let mut claimed = open;
        claimed.extend(claimed_before(&mut talker).map_err(failed("read the fence"))?);
        let mut fence = Self { talker, patterns: patterns.to_vec(), claimed };
        fence.rebuild()?;
        Ok(fence)
    }

    /// Whether one has been raised here.
    pub fn is_there() -> Result<bool, DataplaneError> {
        // A kernel without nftables has none.
        let Ok(mut talker) = Talker::open() else { return Ok(false) };
        is_there(&mut talker).map_err(failed("look for the fence"))
    }

    /// Takes the fence away, if there is one.
    pub fn remove() -> Result<(), DataplaneError> {
        let Ok(mut talker) = Talker::open() else { return Ok(()) };
        if is_there(&mut talker).map_err(failed("look for the fence"))? {
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

fn claimed_before(talker: &mut Talker) -> io::Result<BTreeSet<u32>> {
    let number = |element: &Element| match element {
        Element::Key { key, .. } => key.get(..4)?.try_into().ok().map(u32::from_ne_bytes),
        _ => None,
    };
    Ok(kernel::elements(talker, CLAIMED)?.iter().filter_map(number).collect())
}

fn failed(context: &'static str) -> impl Fn(io::Error) -> DataplaneError {
    move |error| DataplaneError::io(context, error)
}
