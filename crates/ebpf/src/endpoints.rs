//! Which endpoint is bound to what: the switches. Endpoints go by the number under which the programs know them
//! ([`subject_of`]).

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bulkhead_dataplane::{DataplaneError, TableUse};
use bulkhead_model::host_policy::{Attachment, EndpointBinding, HostDelta, HostPolicy};

use crate::bank::Tally;
use crate::capacities::{Capacities, fits};
use crate::extent::Extents;
use crate::layout::{Addr, BANKS, BindingWord, EndpointAddrKey, attachment_of, subject_of};
use crate::loader::Loaded;
use crate::mapping::Mapping;
use crate::sys::Table;

/// What each touched interface is to be bound to; `None`: nothing, so deny all.
pub(crate) type Targets<'a> = BTreeMap<u32, Option<(Arc<str>, &'a EndpointBinding)>>;

#[derive(Debug, Default)]
struct Bound {
    slot: u32,
    /// `None` for what an earlier process bound.
    name: Option<Arc<str>>,
    addresses: BTreeSet<IpAddr>,
}

/// The maps `endpoints`, `bindings`, `endpoint_addrs` and `owners`, and the mirror of their contents.
#[derive(Debug)]
pub(crate) struct Endpoints {
    slots: Table<u32, u32>,
    words: Mapping<u64>,
    addrs: Table<EndpointAddrKey, u32>,
    owners: Table<Addr, u32>,
    /// Who uses each address; the first is its owner in the kernel.
    users: BTreeMap<IpAddr, BTreeSet<u32>>,
    bound: BTreeMap<u32, Bound>,
    by_name: BTreeMap<Arc<str>, u32>,
    free: Extents,
    limbo: Vec<u32>,
    address_count: u64,
    capacities: Capacities,
    /// Something was deleted since the last grace period.
    unsettled: bool,
}

impl Endpoints {
    /// Opens the maps and reads what an earlier process left.
    pub(crate) fn open(loaded: &Loaded, capacities: &Capacities) -> Result<Self, DataplaneError> {
        let bindings = loaded.table::<u32, u64>("bindings")?;
        let words = Mapping::new(bindings.fd(), capacities.endpoints)
            .map_err(|error| DataplaneError::io("map the bindings into memory", error))?;
        let mut endpoints = Self {
            slots: loaded.table("endpoints")?,
            words,
            addrs: loaded.table("endpoint_addrs")?,
            owners: loaded.table("owners")?,
            users: BTreeMap::new(),
            bound: BTreeMap::new(),
            by_name: BTreeMap::new(),
            free: Extents::new(0),
            limbo: Vec::new(),
            address_count: 0,
            capacities: *capacities,
            unsettled: false,
        };
        endpoints.read_back().map_err(|error| DataplaneError::io("read the bindings in force", error))?;
        Ok(endpoints)
    }

    fn read_back(&mut self) -> io::Result<()> {
        for (subject, slot) in self.slots.entries()? {
            self.bound.insert(subject, Bound { slot, ..Bound::default() });
        }
        for (key, _) in self.addrs.entries()? {
            self.address_count += 1;
            match self.bound.get_mut(&key.subject) {
                Some(bound) => {
                    bound.addresses.insert(key.addr.address());
                    self.users.entry(key.addr.address()).or_default().insert(key.subject);
                }
                // Its process died between the addresses and the switch.
                None => {
                    self.addrs.delete(&key)?;
                    self.address_count -= 1;
                }
            }
        }
        for (address, _) in self.owners.entries()? {
            self.publish_owner(address.address())?;
        }
        for address in self.users.keys().copied().collect::<Vec<_>>() {
            self.publish_owner(address)?;
        }
        let taken: BTreeSet<u32> = self.bound.values().map(|bound| bound.slot).collect();
        self.free = Extents::with_taken(self.capacities.endpoints, &taken);
        Ok(())
    }

    /// A bank that no binding names.
    pub(crate) fn free_bank(&self) -> Option<u32> {
        let used: BTreeSet<u32> = self
            .bound
            .values()
            .filter_map(|bound| BindingWord::decode(self.words.word(bound.slot).load(Ordering::Relaxed)))
            .map(|binding| binding.bank)
            .collect();
        (0..BANKS).find(|bank| !used.contains(bank))
    }

    /// Targets of a replacement: what is not in the policy loses its binding.
    pub(crate) fn targets_of_policy<'a>(
        &self,
        policy: &'a HostPolicy,
    ) -> Result<Targets<'a>, DataplaneError> {
        let mut targets: Targets<'a> = self.bound.keys().map(|subject| (*subject, None)).collect();
        for (name, binding) in &policy.endpoints {
            set_target(&mut targets, name, binding)?;
        }
        Ok(targets)
    }

    /// Targets of a delta. An interface may change hands within one.
    pub(crate) fn targets_of_delta<'a>(&self, delta: &'a HostDelta) -> Result<Targets<'a>, DataplaneError> {
        let mut targets = Targets::new();
        for name in delta.endpoints.keys() {
            if let Some(subject) = self.by_name.get(name) {
                targets.insert(*subject, None);
            }
        }
        for (name, binding) in &delta.endpoints {
            let Some(binding) = binding else { continue };
            let holder =
                self.bound.get(&subject_of(binding.attachment)).and_then(|bound| bound.name.as_ref());
            if let Some(holder) = holder.filter(|holder| !delta.endpoints.contains_key(*holder)) {
                return Err(shared(subject_of(binding.attachment), name, holder));
            }
            set_target(&mut targets, name, binding)?;
        }
        Ok(targets)
    }

    /// Refuses targets that do not fit, before anything is written.
    pub(crate) fn check(&self, targets: &Targets<'_>) -> Result<(), DataplaneError> {
        let (mut interfaces, mut addresses) = (self.bound.len() as u64, self.address_count);
        for (subject, target) in targets {
            let Some((_, binding)) = target else { continue };
            let max = BindingWord::MAX_ID;
            if binding.ingress.0 > max || binding.egress.0 > max {
                return Err(DataplaneError::Inconsistent(format!("a compiled policy id is above {max}")));
            }
            let bound = self.bound.get(subject);
            interfaces += u64::from(bound.is_none());
            let new = |address: &&IpAddr| bound.is_none_or(|bound| !bound.addresses.contains(*address));
            addresses += binding.addresses.iter().filter(new).count() as u64;
        }
        fits("endpoints", interfaces, self.capacities.endpoints)?;
        fits("endpoint_addrs", addresses, self.capacities.endpoint_addrs)
    }

    /// Switches every target to the tables in `bank`, one store each.
    pub(crate) fn switch(
        &mut self,
        targets: &Targets<'_>,
        bank: u32,
        tally: &mut Tally,
    ) -> Result<(), DataplaneError> {
        for (subject, target) in targets {
            let result = match target {
                Some((name, binding)) => self.bind(*subject, name, binding, bank, tally),
                None => self.unbind(*subject, tally),
            };
            result.map_err(|error| DataplaneError::io(format!("bind {}", attachment_of(*subject)), error))?;
        }
        Ok(())
    }

    fn bind(
        &mut self,
        subject: u32,
        name: &Arc<str>,
        binding: &EndpointBinding,
        bank: u32,
        tally: &mut Tally,
    ) -> io::Result<()> {
        let wanted: BTreeSet<IpAddr> = binding.addresses.iter().copied().collect();
        let known = self.bound.get(&subject);
        let slot = known.map(|bound| bound.slot);
        let before = known.map(|bound| bound.addresses.clone()).unwrap_or_default();
        for address in wanted.difference(&before) {
            self.add_address(subject, *address)?;
            tally.written += 1;
        }
        let word = BindingWord { ingress: binding.ingress, egress: binding.egress, bank }.encode();
        let slot = match slot {
            Some(slot) => slot,
            None => self.new_slot(subject)?,
        };
        self.words.word(slot).store(word, Ordering::Release);
        tally.written += 1;
        for address in before.difference(&wanted) {
            self.remove_address(subject, *address)?;
            tally.deleted += 1;
            self.unsettled = true;
        }
        self.by_name.insert(Arc::clone(name), subject);
        let old = self.bound.insert(subject, Bound { slot, name: Some(Arc::clone(name)), addresses: wanted });
        if let Some(old) = old.and_then(|old| old.name).filter(|old| old != name) {
            self.forget_name(&old, subject);
        }
        Ok(())
    }

    fn add_address(&mut self, subject: u32, address: IpAddr) -> io::Result<()> {
        self.addrs.put(&EndpointAddrKey { subject, addr: address.into() }, &1)?;
        self.address_count += 1;
        self.users.entry(address).or_default().insert(subject);
        self.publish_owner(address)
    }

    fn remove_address(&mut self, subject: u32, address: IpAddr) -> io::Result<()> {
        self.addrs.delete(&EndpointAddrKey { subject, addr: address.into() })?;
        self.address_count -= 1;
        if let Some(users) = self.users.get_mut(&address) {
            users.remove(&subject);
            if users.is_empty() {
                self.users.remove(&address);
            }
        }
        self.publish_owner(address)
    }

    fn publish_owner(&self, address: IpAddr) -> io::Result<()> {
        match self.users.get(&address).and_then(BTreeSet::first) {
            Some(owner) => self.owners.put(&address.into(), owner),
            None => self.owners.delete(&address.into()).map(drop),
        }
    }

    /// How many are of a kind.
    pub(crate) fn count(&self, of: fn(Attachment) -> bool) -> u32 {
        let counted = self.bound.keys().filter(|subject| of(attachment_of(**subject)));
        u32::try_from(counted.count()).unwrap_or(u32::MAX)
    }

    fn new_slot(&mut self, subject: u32) -> io::Result<u32> {
        let slot = self.free.allocate(1).ok_or_else(|| io::Error::from_raw_os_error(libc::E2BIG))?;
        self.words.word(slot).store(0, Ordering::Release);
        self.slots.put(&subject, &slot)?;
        self.bound.insert(subject, Bound { slot, ..Bound::default() });
        Ok(slot)
    }

    fn unbind(&mut self, subject: u32, tally: &mut Tally) -> io::Result<()> {
        let Some(bound) = self.bound.remove(&subject) else { return Ok(()) };
        self.words.word(bound.slot).store(0, Ordering::Release);
        self.slots.delete(&subject)?;
        for address in &bound.addresses {
            self.remove_address(subject, *address)?;
        }
        self.limbo.push(bound.slot);
        self.unsettled = true;
        tally.deleted += 1 + bound.addresses.len() as u64;
        if let Some(name) = bound.name {
            self.forget_name(&name, subject);
        }
        Ok(())
    }

    /// A name may have moved on to another interface already.
    fn forget_name(&mut self, name: &Arc<str>, subject: u32) {
        if self.by_name.get(name) == Some(&subject) {
            self.by_name.remove(name);
        }
    }

    pub(crate) fn is_unsettled(&self) -> bool {
        self.unsettled
    }

    /// A grace period has passed since the last removal.
    pub(crate) fn settle(&mut self) {
        for slot in self.limbo.drain(..) {
            self.free.release(slot, 1);
        }
        self.unsettled = false;
    }

    /// Interfaces with a binding, and the addresses that each may use, sorted.
    pub(crate) fn addresses_in_force(&self) -> io::Result<BTreeMap<u32, Vec<IpAddr>>> {
        let slots = self.slots.entries()?;
        let mut addresses: BTreeMap<u32, Vec<IpAddr>> =
            slots.into_iter().map(|(subject, _)| (subject, Vec::new())).collect();
        for (key, _) in self.addrs.entries()? {
            addresses.entry(key.subject).or_default().push(key.addr.address());
        }
        addresses.values_mut().for_each(|list| list.sort_unstable());
        Ok(addresses)
    }

    /// The binding that programs see.
    pub(crate) fn binding(&self, subject: u32) -> io::Result<Option<BindingWord>> {
        let slot = self.slots.get(&subject)?.filter(|slot| *slot < self.capacities.endpoints);
        Ok(slot.and_then(|slot| BindingWord::decode(self.words.word(slot).load(Ordering::Acquire))))
    }

    pub(crate) fn usage(&self) -> [TableUse; 2] {
        let entry = |table, used, capacity| TableUse { table, used, capacity: u64::from(capacity) };
        [
            entry("endpoints", self.bound.len() as u64, self.capacities.endpoints),
            entry("endpoint_addrs", self.address_count, self.capacities.endpoint_addrs),
        ]
    }
}

fn set_target<'a>(
    targets: &mut Targets<'a>,
    name: &Arc<str>,
    binding: &'a EndpointBinding,
) -> Result<(), DataplaneError> {
    match targets.insert(subject_of(binding.attachment), Some((Arc::clone(name), binding))) {
        Some(Some((other, _))) => Err(shared(subject_of(binding.attachment), name, &other)),
        Some(None) | None => Ok(()),
    }
}

fn shared(subject: u32, one: &str, other: &str) -> DataplaneError {
    DataplaneError::Inconsistent(format!("{one} and {other} are both on {}", attachment_of(subject)))
}
