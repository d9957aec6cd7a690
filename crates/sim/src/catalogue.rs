//! Tiers and policies, read once for all simulated agents.
//!
//! Every agent hears every policy. In a process with thousands of agents that is thousands of times the same bytes: they
//! are parsed once and shared. An agent looks up which of them may concern its own workloads, and gives its engine those.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use bulkhead_model::selector::Restriction;
use bulkhead_model::{Kind, Labels, ObjectKey, Resource, Selector};
use bulkhead_wire::proto::{self, Resources};

/// Annotation by which a change of a policy is told from the one before.
pub(crate) const CHANGE: &str = "sim/change";

/// An object as all agents hold it.
#[derive(Debug)]
pub(crate) struct Shared {
    /// Unique to this text.
    number: u64,
    pub(crate) key: ObjectKey,
    pub(crate) resource: Resource,
    /// Whom its policies are for; `None`: whatever is on the host (tiers and the like).
    subjects: Option<Vec<Selector>>,
}

impl Shared {
    /// Which change made it, if the simulation did.
    pub(crate) fn change(&self) -> Option<u64> {
        self.resource.metadata().annotations.get(CHANGE)?.parse().ok()
    }

    /// Whether it may concern a workload with these labels.
    pub(crate) fn concerns(&self, labels: &Labels) -> bool {
        match &self.subjects {
            Some(subjects) => subjects.iter().any(|subject| subject.matches(labels)),
            None => true,
        }
    }
}

/// A label with a value.
type Pair = (Arc<str>, Arc<str>);

/// Everything that an agent knew at one time.
#[derive(Debug, Default)]
pub(crate) struct Set {
    pub(crate) objects: BTreeMap<ObjectKey, Arc<Shared>>,
    /// Objects for those who have this label with this value.
    by_label: HashMap<Pair, Vec<Arc<Shared>>>,
    others: Vec<Arc<Shared>>,
}

impl Set {
    fn new(objects: Vec<Arc<Shared>>) -> Self {
        let mut set = Self::default();
        for object in objects {
            let restrictions = object.subjects.iter().flatten().map(Selector::restriction);
            let mut indexed = object.subjects.is_some();
            let mut pairs = Vec::new();
            for restriction in restrictions {
                match restriction {
                    Restriction::Nothing => {}
                    Restriction::OneOf(label, values) => {
                        pairs.extend(values.into_iter().map(|value| (Arc::clone(&label), value)));
                    }
                    Restriction::None | Restriction::Present(_) => indexed = false,
                }
            }
            if indexed {
                for pair in pairs {
                    set.by_label.entry(pair).or_default().push(Arc::clone(&object));
                }
            } else {
                set.others.push(Arc::clone(&object));
            }
            set.objects.insert(object.key.clone(), object);
        }
        set
    }

    /// Objects that may concern a workload with these labels.
    pub(crate) fn for_labels<'a>(&'a self, labels: &'a Labels) -> impl Iterator<Item = &'a Arc<Shared>> {
        let by_label =
            labels.iter().filter_map(|(label, value)| self.by_label.get(&(label.into(), value.into())));
        by_label.flatten().chain(&self.others).filter(|object| object.concerns(labels))
    }
}

/// All texts that were ever heard.
#[derive(Debug, Default)]
pub(crate) struct Catalogue {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    objects: HashMap<Box<[u8]>, Arc<Shared>>,
    packed: HashMap<Box<[u8]>, Vec<Arc<Shared>>>,
    sets: HashMap<Vec<u64>, Weak<Set>>,
    next: u64,
}

impl Catalogue {
    /// The objects of a message, in its order.
    ///
    /// # Errors
    /// If one of them cannot be read.
    pub(crate) fn read(&self, texts: &[bytes::Bytes]) -> anyhow::Result<Vec<Arc<Shared>>> {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        texts.iter().map(|text| inner.read(text)).collect()
    }

    /// The same of what is packed. What many agents are told alike is unpacked once for all of them.
    pub(crate) fn unpack(&self, packed: &bytes::Bytes) -> anyhow::Result<Vec<Arc<Shared>>> {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(objects) = inner.packed.get(&**packed) {
            return Ok(objects.clone());
        }
        let texts = bulkhead_wire::unpack(packed)?;
        let objects: Vec<_> = texts.iter().map(|text| inner.read(text)).collect::<anyhow::Result<_>>()?;
        inner.packed.insert(packed.to_vec().into(), objects.clone());
        Ok(objects)
    }

    /// These and no others, as one value for all who hold the same.
    pub(crate) fn set(&self, objects: Vec<Arc<Shared>>) -> Arc<Set> {
        let mut numbers: Vec<u64> = objects.iter().map(|object| object.number).collect();
        numbers.sort_unstable();
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(set) = inner.sets.get(&numbers).and_then(Weak::upgrade) {
            return set;
        }
        let set = Arc::new(Set::new(objects));
        inner.sets.retain(|_, set| set.strong_count() > 0);
        inner.sets.insert(numbers, Arc::downgrade(&set));
        set
    }
}

impl Inner {
    fn read(&mut self, text: &bytes::Bytes) -> anyhow::Result<Arc<Shared>> {
        if let Some(object) = self.objects.get(&**text) {
            return Ok(Arc::clone(object));
        }
        let resource = Resource::from_json_text(text)
            .map_err(|problems| anyhow::anyhow!("{}: {problems:?}", String::from_utf8_lossy(text)))?;
        let meaning = resource.meaning();
        let only_policies = meaning.tiers.is_empty()
            && meaning.entities.is_empty()
            && meaning.bequests.is_empty()
            && meaning.settings.is_none();
        let subjects = only_policies.then(|| {
            meaning.policies.iter().map(|(_, policy)| policy.applies_to.clone()).collect::<Vec<_>>()
        });
        self.next += 1;
        let object = Shared { number: self.next, key: resource.key(), subjects, resource: resource.clone() };
        let object = Arc::new(object);
        self.objects.insert(text.to_vec().into(), Arc::clone(&object));
        Ok(object)
    }
}

/// What one agent knows: what all knew at its last snapshot, and what has changed since.
#[derive(Debug, Default)]
pub(crate) struct Known {
    set: Arc<Set>,
    since: BTreeMap<ObjectKey, Option<Arc<Shared>>>,
}

impl Known {
    /// Takes in messages up to a barrier. Answers what is new and what is gone.
    pub(crate) fn take_in(
        &mut self,
        catalogue: &Catalogue,
        heard: &[Resources],
    ) -> anyhow::Result<(Vec<Arc<Shared>>, Vec<ObjectKey>)> {
        let mut new = Vec::new();
        for message in heard {
            new.extend(catalogue.read(&message.upserts)?);
            if !message.packed.is_empty() {
                new.extend(catalogue.unpack(&message.packed)?);
            }
        }
        let mut gone: Vec<ObjectKey> =
            heard.iter().flat_map(|message| &message.removes).filter_map(key).collect();
        // A controller tells everything once, at the beginning, or not at all.
        if heard.iter().any(|message| message.snapshot) {
            let before = std::mem::take(&mut self.since);
            let set = std::mem::replace(&mut self.set, catalogue.set(new.clone()));
            let known = set.objects.keys().chain(before.keys());
            gone.extend(known.filter(|key| !self.set.objects.contains_key(*key)).cloned());
            return Ok((new, gone));
        }
        self.since.extend(gone.iter().map(|key| (key.clone(), None)));
        self.since.extend(new.iter().map(|object| (object.key.clone(), Some(Arc::clone(object)))));
        Ok((new, gone))
    }

    pub(crate) fn objects(&self) -> impl Iterator<Item = &Arc<Shared>> {
        let old = self
            .set
            .objects
            .iter()
            .filter(|(key, _)| !self.since.contains_key(*key))
            .map(|(_, object)| object);
        old.chain(self.since.values().flatten())
    }

    /// Objects that may concern a workload with these labels.
    pub(crate) fn for_labels<'a>(&'a self, labels: &'a Labels) -> impl Iterator<Item = &'a Arc<Shared>> {
        let old = self.set.for_labels(labels).filter(|object| !self.since.contains_key(&object.key));
        old.chain(self.since.values().flatten().filter(|object| object.concerns(labels)))
    }
}

fn key(wire: &proto::ObjectKey) -> Option<ObjectKey> {
    let kind = Kind::parse(&wire.kind)?;
    let namespace = (!wire.namespace.is_empty()).then(|| wire.namespace.clone());
    Some(ObjectKey { kind, namespace, name: wire.name.clone() })
}
