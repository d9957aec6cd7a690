//! Compiled policies that endpoints are bound to, or are to be.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use bulkhead_model::Direction;
use bulkhead_model::host_policy::CompiledId;

use super::bind::Subject;
use crate::classes::AtomId;
use crate::program::Program;

/// What a compiled policy is made from: equal keys, equal tables.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct SubjectKey {
    pub(super) subject: Subject,
    pub(super) settings_version: u64,
    pub(super) tiers_version: u64,
    /// Versions of the policies that apply, in order.
    pub(super) policies: Vec<u64>,
}

#[derive(Debug)]
pub(super) struct Slot {
    pub(super) key: SubjectKey,
    pub(super) program: Program,
    /// Atoms that tell what named ports mean elsewhere; the program itself does not read them.
    pub(super) name_atoms: Vec<AtomId>,
    /// Whether its tables are part of the host policy.
    live: bool,
}

impl Slot {
    pub(super) fn new(key: SubjectKey, program: Program, name_atoms: Vec<AtomId>) -> Self {
        Self { key, program, name_atoms, live: false }
    }

    pub(super) fn atoms(&self) -> impl Iterator<Item = AtomId> {
        self.program.atoms().chain(self.name_atoms.iter().copied())
    }
}

/// All of them. What few are is listed apart: most changes are of members, and look at no endpoint.
#[derive(Debug)]
pub(super) struct Slots {
    all: BTreeMap<CompiledId, Slot>,
    by_key: HashMap<SubjectKey, CompiledId>,
    /// Those that are not live yet.
    unready: BTreeSet<CompiledId>,
    /// Those made for what named ports mean elsewhere.
    naming: BTreeSet<CompiledId>,
    next: u32,
}

impl Default for Slots {
    fn default() -> Self {
        Self {
            all: BTreeMap::new(),
            by_key: HashMap::new(),
            unready: BTreeSet::new(),
            naming: BTreeSet::new(),
            next: CompiledId::NONE.0 + 1,
        }
    }
}

impl Slots {
    pub(super) fn find(&self, key: &SubjectKey) -> Option<CompiledId> {
        self.by_key.get(key).copied()
    }

    pub(super) fn get(&self, id: CompiledId) -> Option<&Slot> {
        self.all.get(&id)
    }

    pub(super) fn insert(&mut self, slot: Slot) -> CompiledId {
        let id = CompiledId(self.next);
        self.next += 1;
        self.by_key.insert(slot.key.clone(), id);
        self.unready.insert(id);
        let subject = &slot.key.subject;
        if subject.direction == Direction::Egress && !subject.named.is_empty() {
            self.naming.insert(id);
        }
        self.all.insert(id, slot);
        id
    }

    pub(super) fn remove(&mut self, id: CompiledId) -> Option<Slot> {
        let slot = self.all.remove(&id)?;
        self.by_key.remove(&slot.key);
        self.unready.remove(&id);
        self.naming.remove(&id);
        Some(slot)
    }

    pub(super) fn ids(&self) -> impl Iterator<Item = CompiledId> {
        self.all.keys().copied()
    }

    pub(super) fn values_mut(&mut self) -> impl Iterator<Item = (CompiledId, &mut Slot)> {
        self.all.iter_mut().map(|(id, slot)| (*id, slot))
    }

    pub(super) fn live_mut(&mut self) -> impl Iterator<Item = (CompiledId, &mut Slot)> {
        self.values_mut().filter(|(_, slot)| slot.live)
    }

    pub(super) fn is_live(&self, id: CompiledId) -> bool {
        self.get(id).is_some_and(|slot| slot.live)
    }

    /// Makes those live of which this holds, and answers them.
    pub(super) fn enliven(&mut self, ready: impl Fn(&Slot) -> bool) -> Vec<(CompiledId, &mut Slot)> {
        let ready = |id: &CompiledId| self.all.get(id).is_some_and(&ready);
        let enlivened: BTreeSet<CompiledId> = self.unready.iter().copied().filter(ready).collect();
        if enlivened.is_empty() {
            return Vec::new();
        }
        self.unready.retain(|id| !enlivened.contains(id));
        let slots = self.all.iter_mut().filter(|(id, _)| enlivened.contains(id));
        slots
            .map(|(id, slot)| {
                slot.live = true;
                (*id, slot)
            })
            .collect()
    }

    /// Those among these that were made for what named ports mean elsewhere.
    pub(super) fn naming<'a>(
        &'a self,
        ids: impl IntoIterator<Item = CompiledId> + 'a,
    ) -> impl Iterator<Item = &'a Slot> + 'a {
        ids.into_iter().filter(|id| self.naming.contains(id)).filter_map(|id| self.get(id))
    }

    /// Whether there are such.
    pub(super) fn has_naming(&self) -> bool {
        !self.naming.is_empty()
    }
}
