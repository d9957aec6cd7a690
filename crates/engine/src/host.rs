//! The engine of one host: keeps a [`HostPolicy`] by the difference.
//!
//! Feed it tiers, policies, local endpoints and the members of the selectors it [wants](HostEngine::wanted),
//! in any order, then [`flush`](HostEngine::flush): the answer is what to change in the kernel. Repeat while
//! [`needs_flush`](HostEngine::needs_flush): an atom that nobody reads any more is taken out of the classes
//! only after the endpoints have left the policies that read it.
//!
//! INVARIANT: applied in the order that [`HostDelta`] documents, a delta shows every packet either the members
//! before or those after, and either the policies before or those after; never tables that disagree about
//! what a class means. If only one of the two changed, a packet thus sees the old verdict or the new one.
//!
//! A policy that reads a selector whose members are not known yet is not put into force: its endpoints keep
//! what they had, or nothing (deny all) if they are new.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use bulkhead_model::entity::matches;
use bulkhead_model::host_policy::{
    Attachment, CompiledId, CompiledPolicy, EndpointBinding, HostDelta, HostPolicy, RuleId,
};
use bulkhead_model::policy::{PolicySpec, TierSpec};
use bulkhead_model::ports::NamedPort;
use bulkhead_model::settings::SettingsSpec;
use bulkhead_model::time::Timestamp;
use bulkhead_model::{Entity, ObjectKey, Prefix, RuleRef, Selector};

use crate::classes::{ClassChanges, Classes};
use crate::selector_index::SelectorIndex;
use crate::world::predefined_tiers;

mod atoms;
mod bind;
mod choose;
mod forwarded;
mod naming;
mod not_ready;
mod own;
mod rules;
mod slots;

use atoms::Atoms;
pub use not_ready::NotReady;
use rules::RuleTable;
use slots::Slots;

/// A workload on this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LocalEndpoint {
    /// What selectors see of it.
    pub entity: Entity,
    /// Where a dataplane meets its packets.
    pub attachment: Attachment,
}

/// A member of a selector, elsewhere.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// Name of the entity.
    pub entity: Arc<str>,
    /// Its host, if it is a workload. Members on this host are ignored: the engine knows them itself.
    pub host: Option<Arc<str>>,
    /// Its addresses.
    pub prefixes: Vec<Prefix>,
    /// Ports that it gives names to.
    pub ports: Vec<NamedPort>,
}

#[derive(Debug)]
struct StoredPolicy {
    spec: PolicySpec,
    /// Unique to this content of this policy.
    version: u64,
}

#[derive(Debug, Default)]
struct AppliesTo {
    /// Sorted. Nearly always one: a set would take ten times the room.
    policies: Vec<ObjectKey>,
    locals: BTreeSet<Arc<str>>,
}

#[derive(Debug)]
struct Local {
    endpoint: LocalEndpoint,
    selected_by: BTreeSet<Selector>,
    /// What it should be bound to, per direction; `None` until a choice could be made.
    desired: [Option<CompiledId>; 2],
    /// What it is bound to.
    current: [Option<CompiledId>; 2],
    broken: Option<NotReady>,
}

/// Computes one host's tables.
#[derive(Debug)]
pub struct HostEngine {
    host: Arc<str>,
    settings: SettingsSpec,
    now: Timestamp,
    tiers: BTreeMap<String, TierSpec>,
    tiers_version: u64,
    settings_version: u64,
    policies: BTreeMap<ObjectKey, StoredPolicy>,
    /// Those that exist only at times.
    temporary: BTreeSet<ObjectKey>,
    applies: HashMap<Selector, AppliesTo>,
    /// The keys of `applies`.
    subjects: SelectorIndex<Selector>,
    locals: BTreeMap<Arc<str>, Local>,
    atoms: Atoms,
    classes: Classes,
    slots: Slots,
    rules: RuleTable,
    /// Local endpoints to be chosen for.
    dirty: BTreeSet<Arc<str>>,
    /// Those that were chosen for and are not bound to what they should be.
    unbound: BTreeSet<Arc<str>>,
    next_version: u64,
    revision: u64,
    policy: HostPolicy,
}

impl HostEngine {
    /// An engine for the host of this name.
    pub fn new(host: &str) -> Self {
        Self {
            host: host.into(),
            settings: SettingsSpec::default(),
            now: Timestamp { seconds: 0 },
            tiers: predefined_tiers(),
            tiers_version: 0,
            settings_version: 0,
            temporary: BTreeSet::new(),
            policies: BTreeMap::new(),
            applies: HashMap::new(),
            subjects: SelectorIndex::default(),
            locals: BTreeMap::new(),
            atoms: Atoms::default(),
            classes: Classes::new(),
            slots: Slots::default(),
            rules: RuleTable::default(),
            dirty: BTreeSet::new(),
            unbound: BTreeSet::new(),
            next_version: 0,
            revision: 0,
            policy: HostPolicy::default(),
        }
    }

    /// Takes over the rule ids of an earlier process, so that connections which outlived it keep their names.
    pub fn adopt_rules(&mut self, rules: &BTreeMap<RuleId, RuleRef>) {
        self.rules.adopt(rules);
    }

    /// Sets the revision that the next flush will carry.
    pub fn set_revision(&mut self, revision: u64) {
        self.revision = revision;
    }

    /// Sets what holds for everything.
    pub fn set_settings(&mut self, settings: SettingsSpec) {
        if self.settings != settings {
            self.settings = settings;
            self.settings_version += 1;
            self.dirty.extend(self.locals.keys().cloned());
        }
    }

    /// Sets what time it is: policies come into being and end by it.
    pub fn set_now(&mut self, now: Timestamp) {
        let before = std::mem::replace(&mut self.now, now);
        let turned = |stored: &StoredPolicy| stored.spec.is_valid_at(before) != stored.spec.is_valid_at(now);
        for key in &self.temporary {
            let Some(stored) = self.policies.get(key).filter(|stored| turned(stored)) else { continue };
            let applies = self.applies.get(&bind::subject_selector(key, &stored.spec));
            self.dirty.extend(applies.into_iter().flat_map(|applies| applies.locals.iter().cloned()));
        }
    }

    /// Adds, replaces or removes a tier. A predefined one falls back to its predefined form.
    pub fn set_tier(&mut self, name: &str, spec: Option<TierSpec>) {
        let spec = spec.or_else(|| predefined_tiers().remove(name));
        if self.tiers.get(name) == spec.as_ref() {
            return;
        }
        match spec {
            Some(spec) => self.tiers.insert(name.to_owned(), spec),
            None => self.tiers.remove(name),
        };
        self.tiers_version += 1;
        self.dirty.extend(self.locals.keys().cloned());
    }

    /// Adds, replaces or removes a policy.
    pub fn set_policy(&mut self, key: &ObjectKey, spec: Option<&PolicySpec>) {
        if self.policies.get(key).map(|stored| &stored.spec) == spec {
            return;
        }
        self.temporary.remove(key);
        if let Some(old) = self.policies.remove(key) {
            let selector = bind::subject_selector(key, &old.spec);
            if let Some(applies) = self.applies.get_mut(&selector) {
                applies.policies.retain(|other| other != key);
                self.dirty.extend(applies.locals.iter().cloned());
                if applies.policies.is_empty() {
                    for local in &applies.locals {
                        if let Some(local) = self.locals.get_mut(local) {
                            local.selected_by.remove(&selector);
                        }
                    }
                    self.applies.remove(&selector);
                    self.subjects.remove(&selector, &selector);
                }
            }
        }
        if let Some(spec) = spec {
            self.insert_policy(key, spec);
        }
    }

    fn insert_policy(&mut self, key: &ObjectKey, spec: &PolicySpec) {
        self.next_version += 1;
        let stored = StoredPolicy { spec: spec.clone(), version: self.next_version };
        if spec.valid_from.is_some() || spec.valid_until.is_some() {
            self.temporary.insert(key.clone());
        }
        self.policies.insert(key.clone(), stored);
        let selector = bind::subject_selector(key, spec);
        let (locals, subjects) = (&mut self.locals, &mut self.subjects);
        let applies = self.applies.entry(selector.clone()).or_insert_with(|| {
            subjects.insert(&selector, &selector);
            let mut applies = AppliesTo { policies: Vec::with_capacity(1), ..AppliesTo::default() };
            for (name, local) in locals {
                if matches(&selector, &local.endpoint.entity.labels) {
                    local.selected_by.insert(selector.clone());
                    applies.locals.insert(Arc::clone(name));
                }
            }
            applies
        });
        if let Err(at) = applies.policies.binary_search(key) {
            applies.policies.insert(at, key.clone());
        }
        self.dirty.extend(applies.locals.iter().cloned());
    }

    /// Adds, replaces or removes a local endpoint by the name of its entity.
    pub fn set_local(&mut self, name: &Arc<str>, endpoint: Option<LocalEndpoint>) {
        if self.locals.get(name).map(|local| &local.endpoint) == endpoint.as_ref() {
            return;
        }
        self.dirty.insert(Arc::clone(name));
        self.atoms.set_local(&mut self.classes, name, endpoint.as_ref().map(|endpoint| &endpoint.entity));
        let Some(endpoint) = endpoint else {
            if let Some(local) = self.locals.remove(name) {
                for selector in &local.selected_by {
                    if let Some(applies) = self.applies.get_mut(selector) {
                        applies.locals.remove(name);
                    }
                }
            }
            return;
        };
        let labels = &endpoint.entity.labels;
        let candidates = self.subjects.candidates(labels);
        let selected_by: BTreeSet<Selector> =
            candidates.into_iter().filter(|selector| matches(selector, labels)).collect();
        let before = self.locals.get(name).map(|local| local.selected_by.clone()).unwrap_or_default();
        for selector in before.union(&selected_by) {
            if let Some(applies) = self.applies.get_mut(selector) {
                if selected_by.contains(selector) {
                    applies.locals.insert(Arc::clone(name));
                } else {
                    applies.locals.remove(name);
                }
            }
        }
        match self.locals.get_mut(name) {
            Some(local) => {
                local.endpoint = endpoint;
                local.selected_by = selected_by;
            }
            None => {
                let local =
                    Local { endpoint, selected_by, desired: [None; 2], current: [None; 2], broken: None };
                self.locals.insert(Arc::clone(name), local);
            }
        }
    }

    /// The selectors whose members this host must know.
    pub fn wanted(&self) -> impl Iterator<Item = &Selector> {
        self.atoms.selectors()
    }

    /// Those among the wanted selectors whose members were never [set](HostEngine::set_members).
    pub fn waiting(&self) -> Vec<Selector> {
        self.atoms.unresolved().cloned().collect()
    }

    /// Another number whenever [`HostEngine::wanted`] or [`HostEngine::waiting`] answers something else than before.
    pub fn asks(&self) -> u64 {
        self.atoms.asks()
    }

    /// All members of a selector: what is not named is gone. Ignored if the selector is not wanted.
    pub fn set_members(&mut self, selector: &Selector, members: impl IntoIterator<Item = Member>) {
        let members = members.into_iter().filter(|member| member.host.as_ref() != Some(&self.host));
        self.atoms.set_members(&mut self.classes, selector, members);
    }

    /// Members gained, changed and lost. Ignored if the selector is not wanted or was never
    /// [set](HostEngine::set_members).
    pub fn change_members(
        &mut self,
        selector: &Selector,
        joins: impl IntoIterator<Item = Member>,
        leaves: impl IntoIterator<Item = Arc<str>>,
    ) {
        let joins = joins.into_iter().filter(|member| member.host.as_ref() != Some(&self.host));
        self.atoms.change_members(&mut self.classes, selector, joins, leaves);
    }

    /// What the host must enforce, as of the last flush.
    pub fn policy(&self) -> &HostPolicy {
        &self.policy
    }

    /// Whether another flush has something to do even without new input.
    pub fn needs_flush(&self) -> bool {
        !self.dirty.is_empty() || self.atoms.has_retired()
    }

    /// Brings the tables up to date and answers the difference.
    pub fn flush(&mut self) -> HostDelta {
        let mut delta = HostDelta { revision: self.revision, ..HostDelta::default() };
        self.choose_for_renamed_ports();
        for name in std::mem::take(&mut self.dirty) {
            self.choose(&name);
        }
        // After choosing: what is wanted again keeps its members.
        self.atoms.collect(&mut self.classes);
        let mut changes = self.classes.settle();
        self.rows_for_born_classes(&changes, &mut delta);
        delta.addresses = std::mem::take(&mut changes.addresses);
        self.enliven(&mut delta);
        // Else the endpoints use what they used.
        if !self.unbound.is_empty() {
            self.bind_endpoints(&mut delta);
            self.drop_unused(&mut delta);
        }
        self.drop_rows(&changes, &mut delta);
        delta.rules = self.rules.take_new();
        self.policy.apply(&delta);
        delta
    }

    fn rows_for_born_classes(&mut self, changes: &ClassChanges, delta: &mut HostDelta) {
        if changes.born.is_empty() {
            return;
        }
        for (id, slot) in self.slots.live_mut() {
            let default = slot.program.row(&[]);
            for class in &changes.born {
                let row = slot.program.row(self.classes.signature(*class));
                if row != default {
                    delta.rows.push((id, *class, row));
                }
            }
        }
    }

    /// Makes the tables of compiled policies that somebody waits for and whose selectors are all answered.
    fn enliven(&mut self, delta: &mut HostDelta) {
        let atoms = &self.atoms;
        for (id, slot) in self.slots.enliven(|slot| slot.atoms().all(|atom| atoms.is_resolved(atom))) {
            let default_row = slot.program.row(&[]);
            let mut rows = BTreeMap::new();
            for class in self.classes.iter() {
                let row = slot.program.row(self.classes.signature(class));
                if row != default_row {
                    rows.insert(class, row);
                }
            }
            delta.policies.push(CompiledPolicy { id, default_row, rows });
        }
    }

    /// Binds those that were chosen for to their tables, as far as these are live.
    fn bind_endpoints(&mut self, delta: &mut HostDelta) {
        for name in std::mem::take(&mut self.unbound) {
            let Some(local) = self.locals.get_mut(&name) else {
                if self.policy.endpoints.contains_key(&name) {
                    delta.endpoints.insert(name, None);
                }
                continue;
            };
            for (current, desired) in local.current.iter_mut().zip(local.desired) {
                if desired.is_some_and(|id| self.slots.is_live(id)) {
                    *current = desired;
                }
            }
            if local.current != local.desired {
                self.unbound.insert(Arc::clone(&name));
            }
            let [ingress, egress] = local.current.map(|id| id.unwrap_or(CompiledId::NONE));
            // A workload without tables is closed. A host would lose itself, and the repository with it: it is bound
            // once both directions are known.
            if local.endpoint.attachment.is_of_host() && [ingress, egress].contains(&CompiledId::NONE) {
                // No policy is for what it forwards any more.
                if local.desired == [None; 2] && self.policy.endpoints.contains_key(&name) {
                    delta.endpoints.insert(name, None);
                }
                continue;
            }
            let mut addresses: Vec<IpAddr> =
                local.endpoint.entity.prefixes.iter().map(|prefix| prefix.address()).collect();
            // Its host's addresses are not its own.
            if let Some(own) = local.endpoint.attachment.own_address() {
                addresses = vec![own];
            }
            addresses.sort_unstable();
            addresses.dedup();
            let binding =
                EndpointBinding { attachment: local.endpoint.attachment, addresses, ingress, egress };
            if self.policy.endpoints.get(&name) != Some(&binding) {
                delta.endpoints.insert(name, Some(binding));
            }
        }
    }

    /// Takes out the compiled policies that nobody is bound to any more or is to be.
    fn drop_unused(&mut self, delta: &mut HostDelta) {
        let locals = self.locals.values();
        let used: BTreeSet<CompiledId> =
            locals.flat_map(|local| local.current.into_iter().chain(local.desired)).flatten().collect();
        let unused: Vec<_> = self.slots.ids().filter(|id| !used.contains(id)).collect();
        for id in unused {
            if let Some(slot) = self.slots.remove(id) {
                self.atoms.release(slot.atoms());
                if self.policy.policies.contains_key(&id) {
                    delta.removed_policies.push(id);
                }
                // Rows for new classes stay in the delta even now: until the endpoints are switched, addresses
                // that have moved are still asked about in the old tables.
                delta.policies.retain(|compiled| compiled.id != id);
            }
        }
    }

    fn drop_rows(&mut self, changes: &ClassChanges, delta: &mut HostDelta) {
        if changes.died.is_empty() {
            return;
        }
        for (id, slot) in self.slots.values_mut() {
            if let Some(compiled) = self.policy.policies.get(&id) {
                let died = changes.died.iter().filter(|class| compiled.rows.contains_key(class));
                delta.removed_rows.extend(died.map(|class| (id, *class)));
            }
            slot.program.shrink();
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;
