//! Who matches what: for each selector that somebody asked for, the entities that match it, kept by the
//! difference.
//!
//! Labels are interned: a selector is evaluated once per distinct label set and not per workload, so twenty
//! replicas are one evaluation. The automatic labels that differ from workload to workload (name and host)
//! would defeat that; they are kept out of the interned sets, and the few selectors that read them are
//! evaluated per entity.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use bulkhead_model::entity::{matches, matches_by};
use bulkhead_model::labels::{HOST_LABEL, NAME_LABEL};
use bulkhead_model::ports::NamedPort;
use bulkhead_model::selector::Restriction;
use bulkhead_model::{Entity, Labels, Prefix, Selector};

use crate::few::Few;
use crate::selector_index::SelectorIndex;

/// A selector in a [`MemberIndex`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SelectorId(pub u32);

/// One selector gained, lost or changed one member.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemberChange {
    /// Whose members.
    pub selector: SelectorId,
    /// Name of the entity.
    pub entity: Arc<str>,
    /// What became of it.
    pub change: Change,
}

/// What became of a member.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// It matches now, or its addresses changed.
    Join {
        /// Its addresses.
        prefixes: Arc<[Prefix]>,
        /// Its host, if it is a workload.
        host: Option<Arc<str>>,
        /// Ports that it gives names to.
        ports: Arc<[NamedPort]>,
    },
    /// It matches no more, or is gone.
    Leave,
}

/// A member of a selector.
#[derive(Debug, Clone, Copy)]
pub struct MemberRef<'a> {
    /// Name of the entity.
    pub entity: &'a Arc<str>,
    /// Its addresses.
    pub prefixes: &'a Arc<[Prefix]>,
    /// Its host, if it is a workload.
    pub host: Option<&'a Arc<str>>,
    /// Ports that it gives names to.
    pub ports: &'a Arc<[NamedPort]>,
}

type LabelSetId = u32;

#[derive(Debug)]
struct LabelSet {
    labels: Arc<Labels>,
    /// Shared selectors that match.
    matched: Few<SelectorId>,
    entities: Few<Arc<str>>,
}

/// The labels of an entity that are not part of its set: those that nobody shares.
#[derive(Debug)]
struct OwnLabels {
    name: Option<Arc<str>>,
    host: Option<Arc<str>>,
}

impl OwnLabels {
    fn of(entity: &Entity) -> Self {
        let host = entity.labels.get(HOST_LABEL);
        let same = entity.host.as_ref().filter(|known| Some(&***known) == host);
        Self {
            name: entity.labels.get(NAME_LABEL).map(Into::into),
            host: same.cloned().or_else(|| host.map(Into::into)),
        }
    }

    /// Whether a selector holds for these together with those of the set.
    fn match_with(&self, shared: &Labels, selector: &Selector) -> bool {
        matches_by(selector, |key| match key {
            NAME_LABEL => self.name.as_deref(),
            HOST_LABEL => self.host.as_deref(),
            _ => shared.get(key),
        })
    }
}

#[derive(Debug)]
struct Known {
    own: OwnLabels,
    prefixes: Arc<[Prefix]>,
    host: Option<Arc<str>>,
    ports: Arc<[NamedPort]>,
    set: LabelSetId,
    /// Selectors that read this entity's own labels, and match.
    matched_alone: BTreeSet<SelectorId>,
}

#[derive(Debug)]
struct Subscribed {
    selector: Selector,
    uses: u32,
    alone: bool,
    /// Label sets that match (shared selectors only).
    sets: HashSet<LabelSetId>,
    /// Entities that match (selectors evaluated per entity only).
    entities: BTreeSet<Arc<str>>,
}

/// Entities and selectors, each found from the other.
#[derive(Debug, Default)]
pub struct MemberIndex {
    entities: HashMap<Arc<str>, Known>,
    sets: HashMap<LabelSetId, LabelSet>,
    set_by_labels: HashMap<Arc<Labels>, LabelSetId>,
    /// Label sets by value, of keys by which a selector ever looked for them. Most keys of most labels are never
    /// asked for, and cost nothing here.
    sets_by_label: HashMap<Arc<str>, HashMap<Arc<str>, Few<LabelSetId>>>,
    selectors: BTreeMap<SelectorId, Subscribed>,
    selector_ids: HashMap<Selector, SelectorId>,
    shared: SelectorIndex<SelectorId>,
    alone: SelectorIndex<SelectorId>,
    next_set: LabelSetId,
    next_selector: u32,
}

impl MemberIndex {
    /// Knows nobody.
    pub fn new() -> Self {
        Self::default()
    }

    /// Number of entities known.
    pub fn entities(&self) -> usize {
        self.entities.len()
    }

    /// Number of distinct label sets among them.
    pub fn label_sets(&self) -> usize {
        self.sets.len()
    }

    /// Asks for a selector's members; asking again for the same one counts up.
    pub fn subscribe(&mut self, selector: &Selector) -> SelectorId {
        if let Some(id) = self.selector_ids.get(selector) {
            if let Some(subscribed) = self.selectors.get_mut(id) {
                subscribed.uses += 1;
            }
            return *id;
        }
        let id = SelectorId(self.next_selector);
        self.next_selector += 1;
        let alone = reads_own_labels(selector);
        let mut subscribed = Subscribed {
            selector: selector.clone(),
            uses: 1,
            alone,
            sets: HashSet::new(),
            entities: BTreeSet::new(),
        };
        if alone {
            self.alone.insert(&id, selector);
            for (name, known) in &mut self.entities {
                let Some(set) = self.sets.get(&known.set) else { continue };
                if known.own.match_with(&set.labels, selector) {
                    known.matched_alone.insert(id);
                    subscribed.entities.insert(Arc::clone(name));
                }
            }
        } else {
            self.shared.insert(&id, selector);
            for set_id in self.candidate_sets(selector) {
                if let Some(set) = self.sets.get_mut(&set_id)
                    && matches(selector, &set.labels)
                {
                    set.matched.insert(id);
                    subscribed.sets.insert(set_id);
                }
            }
        }
        self.selectors.insert(id, subscribed);
        self.selector_ids.insert(selector.clone(), id);
        id
    }

    /// Takes back one [`MemberIndex::subscribe`].
    pub fn unsubscribe(&mut self, id: SelectorId) {
        let Some(subscribed) = self.selectors.get_mut(&id) else { return };
        subscribed.uses -= 1;
        if subscribed.uses > 0 {
            return;
        }
        let Some(subscribed) = self.selectors.remove(&id) else { return };
        self.selector_ids.remove(&subscribed.selector);
        if subscribed.alone {
            self.alone.remove(&id, &subscribed.selector);
        } else {
            self.shared.remove(&id, &subscribed.selector);
        }
        for set in &subscribed.sets {
            if let Some(set) = self.sets.get_mut(set) {
                set.matched.remove(&id);
            }
        }
        for entity in &subscribed.entities {
            if let Some(known) = self.entities.get_mut(entity) {
                known.matched_alone.remove(&id);
            }
        }
    }

    /// The text of a selector that was asked for.
    pub fn selector(&self, id: SelectorId) -> Option<&Selector> {
        self.selectors.get(&id).map(|subscribed| &subscribed.selector)
    }

    /// The current members of a selector.
    pub fn members(&self, id: SelectorId) -> impl Iterator<Item = MemberRef<'_>> {
        let subscribed = self.selectors.get(&id);
        let shared = subscribed
            .into_iter()
            .flat_map(|subscribed| &subscribed.sets)
            .filter_map(|set| self.sets.get(set))
            .flat_map(|set| set.entities.iter());
        let alone = subscribed.into_iter().flat_map(|subscribed| &subscribed.entities);
        shared.chain(alone).filter_map(|entity| {
            let known = self.entities.get(entity)?;
            let (prefixes, host, ports) = (&known.prefixes, known.host.as_ref(), &known.ports);
            Some(MemberRef { entity, prefixes, host, ports })
        })
    }

    /// An entity that is known, as the members of a selector are, and whether it is one of them now.
    pub fn standing(&self, id: SelectorId, name: &str) -> Option<(MemberRef<'_>, bool)> {
        let (entity, known) = self.entities.get_key_value(name)?;
        let shared = self.sets.get(&known.set).is_some_and(|set| set.matched.iter().any(|one| *one == id));
        let (prefixes, host, ports) = (&known.prefixes, known.host.as_ref(), &known.ports);
        let is_member = shared || known.matched_alone.contains(&id);
        Some((MemberRef { entity, prefixes, host, ports }, is_member))
    }

    /// The hosts that those are on whom a selector selects now; `None` if it must be asked about each entity alone.
    pub fn hosts_of(&mut self, selector: &Selector) -> Option<BTreeSet<Arc<str>>> {
        if reads_own_labels(selector) {
            return None;
        }
        let sets = self.candidate_sets(selector);
        let sets = sets.iter().filter_map(|set| self.sets.get(set));
        let selected = sets.filter(|set| matches(selector, &set.labels)).flat_map(|set| set.entities.iter());
        let hosts = selected.filter_map(|name| self.entities.get(name)?.own.host.clone());
        Some(hosts.collect())
    }

    /// Adds or replaces an entity and answers what that means to every selector asked for.
    pub fn upsert(&mut self, entity: &Entity) -> Vec<MemberChange> {
        let name = &entity.name;
        let same_set = self.entities.get(name).map(|known| known.set).filter(|set| {
            let own = [NAME_LABEL, HOST_LABEL];
            self.sets.get(set).is_some_and(|set| set.labels.are_those_without(&entity.labels, &own))
        });
        let set = same_set.unwrap_or_else(|| self.intern(&entity.labels));
        let matched_alone: BTreeSet<_> = self
            .alone
            .candidates(&entity.labels)
            .into_iter()
            .filter(|id| self.selectors.get(id).is_some_and(|s| matches(&s.selector, &entity.labels)))
            .collect();
        let known = Known {
            own: OwnLabels::of(entity),
            prefixes: entity.prefixes.as_slice().into(),
            host: entity.host.clone(),
            // Of nothing there is one for all.
            ports: if entity.ports.is_empty() { Arc::default() } else { entity.ports.as_slice().into() },
            set,
            matched_alone,
        };
        let moved = self.entities.get(name).is_none_or(|old| {
            (&old.prefixes, &old.host, &old.ports) != (&known.prefixes, &known.host, &known.ports)
        });
        if let Some(old) = self.entities.get_mut(name)
            && old.set == set
            && old.matched_alone == known.matched_alone
        {
            // Matched by the same as before.
            *old = known;
            return if moved { self.joins(name) } else { Vec::new() };
        }
        let before = self.matched(name);
        if let Some(old) = self.entities.get(name) {
            let old_set = old.set;
            if old_set != set {
                self.leave_set(old_set, name);
            }
        }
        if let Some(set) = self.sets.get_mut(&set) {
            set.entities.insert(Arc::clone(name));
        }
        let join = Change::Join {
            prefixes: Arc::clone(&known.prefixes),
            host: known.host.clone(),
            ports: Arc::clone(&known.ports),
        };
        for id in &known.matched_alone {
            if let Some(subscribed) = self.selectors.get_mut(id) {
                subscribed.entities.insert(Arc::clone(name));
            }
        }
        self.entities.insert(Arc::clone(name), known);
        let after = self.matched(name);
        let mut changes = Vec::new();
        for selector in before.difference(&after) {
            if let Some(subscribed) = self.selectors.get_mut(selector) {
                subscribed.entities.remove(name);
            }
            changes.push(MemberChange {
                selector: *selector,
                entity: Arc::clone(name),
                change: Change::Leave,
            });
        }
        for selector in &after {
            if moved || !before.contains(selector) {
                changes.push(MemberChange {
                    selector: *selector,
                    entity: Arc::clone(name),
                    change: join.clone(),
                });
            }
        }
        changes
    }

    /// Removes an entity and answers what that means to every selector asked for.
    pub fn remove(&mut self, name: &str) -> Vec<MemberChange> {
        let matched = self.matched(name);
        let Some((name, known)) = self.entities.remove_entry(name) else { return Vec::new() };
        self.leave_set(known.set, &name);
        matched
            .into_iter()
            .map(|selector| {
                if let Some(subscribed) = self.selectors.get_mut(&selector) {
                    subscribed.entities.remove(&name);
                }
                MemberChange { selector, entity: Arc::clone(&name), change: Change::Leave }
            })
            .collect()
    }

    /// A member's new addresses, for all selectors that it matches.
    fn joins(&self, name: &Arc<str>) -> Vec<MemberChange> {
        let Some(known) = self.entities.get(name) else { return Vec::new() };
        let shared = self.sets.get(&known.set).into_iter().flat_map(|set| set.matched.iter());
        let join = |selector: &SelectorId| MemberChange {
            selector: *selector,
            entity: Arc::clone(name),
            change: Change::Join {
                prefixes: Arc::clone(&known.prefixes),
                host: known.host.clone(),
                ports: Arc::clone(&known.ports),
            },
        };
        shared.chain(&known.matched_alone).map(join).collect()
    }

    fn matched(&self, name: &str) -> BTreeSet<SelectorId> {
        let Some(known) = self.entities.get(name) else { return BTreeSet::new() };
        let shared = self.sets.get(&known.set).into_iter().flat_map(|set| set.matched.iter());
        shared.chain(&known.matched_alone).copied().collect()
    }

    fn intern(&mut self, labels: &Labels) -> LabelSetId {
        let shared = labels.without(&[NAME_LABEL, HOST_LABEL]);
        if let Some(id) = self.set_by_labels.get(&shared) {
            return *id;
        }
        let id = self.next_set;
        self.next_set += 1;
        let matched: Few<_> = self
            .shared
            .candidates(&shared)
            .into_iter()
            .filter(|id| self.selectors.get(id).is_some_and(|s| matches(&s.selector, &shared)))
            .collect();
        for selector in matched.iter() {
            if let Some(subscribed) = self.selectors.get_mut(selector) {
                subscribed.sets.insert(id);
            }
        }
        for (key, value) in shared.iter() {
            if let Some(by_value) = self.sets_by_label.get_mut(key) {
                add_by_value(by_value, value, id);
            }
        }
        let labels = Arc::new(shared);
        self.set_by_labels.insert(Arc::clone(&labels), id);
        self.sets.insert(id, LabelSet { labels, matched, entities: Few::None });
        id
    }

    fn leave_set(&mut self, id: LabelSetId, name: &str) {
        let Some(set) = self.sets.get_mut(&id) else { return };
        set.entities.remove(name);
        if !set.entities.is_empty() {
            return;
        }
        let Some(set) = self.sets.remove(&id) else { return };
        self.set_by_labels.remove(&set.labels);
        for selector in set.matched.iter() {
            if let Some(subscribed) = self.selectors.get_mut(selector) {
                subscribed.sets.remove(&id);
            }
        }
        for (key, value) in set.labels.iter() {
            let Some(by_value) = self.sets_by_label.get_mut(key) else { continue };
            if let Some(sets) = by_value.get_mut(value) {
                sets.remove(&id);
                if sets.is_empty() {
                    by_value.remove(value);
                }
            }
        }
    }

    /// Label sets by the value of a key. The first who asks makes the index; the last set that leaves it empties it.
    fn by_value(&mut self, key: &Arc<str>) -> &HashMap<Arc<str>, Few<LabelSetId>> {
        let sets = &self.sets;
        self.sets_by_label.entry(Arc::clone(key)).or_insert_with(|| {
            let mut by_value = HashMap::new();
            for (id, set) in sets {
                if let Some(value) = set.labels.get(key) {
                    add_by_value(&mut by_value, value, *id);
                }
            }
            by_value
        })
    }

    /// Label sets that may match a selector; the others cannot.
    fn candidate_sets(&mut self, selector: &Selector) -> Vec<LabelSetId> {
        match selector.restriction() {
            Restriction::Nothing => Vec::new(),
            Restriction::None => self.sets.keys().copied().collect(),
            Restriction::Present(key) => self.by_value(&key).values().flat_map(Few::iter).copied().collect(),
            Restriction::OneOf(key, values) => {
                let by_value = self.by_value(&key);
                values.iter().filter_map(|value| by_value.get(value)).flat_map(Few::iter).copied().collect()
            }
        }
    }
}

fn add_by_value(by_value: &mut HashMap<Arc<str>, Few<LabelSetId>>, value: &str, id: LabelSetId) {
    match by_value.get_mut(value) {
        Some(sets) => sets.insert(id),
        None => {
            by_value.insert(value.into(), Few::One(id));
        }
    }
}

fn reads_own_labels(selector: &Selector) -> bool {
    selector.reads(NAME_LABEL) || selector.reads(HOST_LABEL)
}

#[cfg(test)]
mod tests;
