//! From objects to what they mean together: entities get what they inherit from namespaces, service accounts and
//! profiles, whichever of them came first.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bulkhead_model::meaning::{Bequest, Meaning, Parent, profile_label};
use bulkhead_model::policy::{PolicySpec, TierSpec};
use bulkhead_model::settings::SettingsSpec;
use bulkhead_model::{Entity, ObjectKey, Resource};

/// Who leaves what to whom.
#[derive(Debug, Clone, Default)]
pub struct Heritage {
    /// By the object that it comes from: two kinds of Namespace may have one name.
    bequests: BTreeMap<Parent, BTreeMap<ObjectKey, Bequest>>,
    /// Objects with entities that have this parent.
    heirs: BTreeMap<Parent, BTreeSet<ObjectKey>>,
}

/// What the change of one object changes. `None`: gone.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Changes {
    /// Tiers by name. One that is gone may be predefined, and falls back to that.
    pub tiers: BTreeMap<String, Option<TierSpec>>,
    /// Policies by key.
    pub policies: BTreeMap<ObjectKey, Option<PolicySpec>>,
    /// Entities by name, with all that they inherit.
    pub entities: BTreeMap<Arc<str>, Option<Entity>>,
    /// What holds for the whole repository.
    pub settings: Option<Option<SettingsSpec>>,
}

impl Heritage {
    /// Takes in a change of one object: what it meant, what it means, and how to find what others mean.
    pub fn change<'a>(
        &mut self,
        key: &ObjectKey,
        before: Option<&Meaning>,
        after: Option<&Meaning>,
        meaning_of: impl Fn(&ObjectKey) -> Option<Cow<'a, Meaning>>,
    ) -> Changes {
        let nothing = Meaning::default();
        let (before, after) = (before.unwrap_or(&nothing), after.unwrap_or(&nothing));
        let mut changes = Changes::default();
        difference(&before.tiers, &after.tiers, &mut changes.tiers);
        difference(&before.policies, &after.policies, &mut changes.policies);
        if before.settings != after.settings {
            changes.settings = Some(after.settings.clone());
        }
        self.set_heirs(key, &before.entities, &after.entities);
        let kept: BTreeSet<&Arc<str>> = after.entities.iter().map(|entity| &entity.name).collect();
        let gone = before.entities.iter().filter(|entity| !kept.contains(&entity.name));
        changes.entities.extend(gone.map(|entity| (Arc::clone(&entity.name), None)));
        changes.entities.extend(after.entities.iter().map(|entity| self.completed(entity.clone())));
        for heir in self.set_bequests(key, &before.bequests, &after.bequests) {
            let entities = meaning_of(&heir).map(|meaning| meaning.entities.clone()).unwrap_or_default();
            changes.entities.extend(entities.into_iter().map(|entity| self.completed(entity)));
        }
        changes
    }

    fn completed(&self, mut entity: Entity) -> (Arc<str>, Option<Entity>) {
        self.complete(&mut entity);
        (Arc::clone(&entity.name), Some(entity))
    }

    /// Adds to an entity what its parents leave to it.
    pub fn complete(&self, entity: &mut Entity) {
        let (mut profiles, mut asked) = (0, true);
        for parent in &entity.parents.clone() {
            let bequests = self.bequests.get(parent);
            if let Parent::Profile(name) = parent {
                // A profile that is missing denies everything, so the rules of those after it are never asked. Labels
                // are inherited from all there are.
                let Some(profile) = bequests.and_then(|bequests| bequests.values().next()) else {
                    asked = false;
                    continue;
                };
                entity.labels.inherit(&profile.labels);
                if asked {
                    // A name that the repository took is an acceptable value.
                    let _ = entity.labels.insert_any(&profile_label(profiles), name);
                    profiles += 1;
                    entity.posture = profile.posture.or(entity.posture);
                    // One that allows everything has the last word too.
                    asked = profile.posture.is_none();
                }
                continue;
            }
            for bequest in bequests.into_iter().flat_map(BTreeMap::values) {
                entity.inherit(bequest);
            }
        }
    }

    fn set_heirs(&mut self, key: &ObjectKey, before: &[Entity], after: &[Entity]) {
        let parents = |entities: &[Entity]| -> BTreeSet<Parent> {
            entities.iter().flat_map(|entity| entity.parents.iter().cloned()).collect()
        };
        let (before, after) = (parents(before), parents(after));
        for parent in before.difference(&after) {
            if let Some(heirs) = self.heirs.get_mut(parent) {
                heirs.remove(key);
                if heirs.is_empty() {
                    self.heirs.remove(parent);
                }
            }
        }
        for parent in after {
            self.heirs.entry(parent).or_default().insert(key.clone());
        }
    }

    /// Answers the objects whose entities are others than before.
    fn set_bequests(
        &mut self,
        key: &ObjectKey,
        before: &[Bequest],
        after: &[Bequest],
    ) -> BTreeSet<ObjectKey> {
        let mut heirs = BTreeSet::new();
        let gone = before.iter().filter(|bequest| !after.contains(bequest));
        for bequest in gone {
            if let Some(bequests) = self.bequests.get_mut(&bequest.from) {
                bequests.remove(key);
                if bequests.is_empty() {
                    self.bequests.remove(&bequest.from);
                }
            }
            heirs.extend(self.heirs.get(&bequest.from).into_iter().flatten().cloned());
        }
        for bequest in after.iter().filter(|bequest| !before.contains(bequest)) {
            self.bequests.entry(bequest.from.clone()).or_default().insert(key.clone(), bequest.clone());
            heirs.extend(self.heirs.get(&bequest.from).into_iter().flatten().cloned());
        }
        heirs
    }
}

fn difference<K: Ord + Clone, V: PartialEq + Clone>(
    before: &[(K, V)],
    after: &[(K, V)],
    changes: &mut BTreeMap<K, Option<V>>,
) {
    let gone = before.iter().filter(|(key, _)| !after.iter().any(|(other, _)| other == key));
    changes.extend(gone.map(|(key, _)| (key.clone(), None)));
    let new = after.iter().filter(|pair| !before.contains(pair));
    changes.extend(new.map(|(key, value)| (key.clone(), Some(value.clone()))));
}

/// Objects, and what they mean together.
#[derive(Debug, Clone, Default)]
pub struct Assembly {
    objects: BTreeMap<ObjectKey, Resource>,
    heritage: Heritage,
}

impl Assembly {
    /// Adds, replaces or removes an object and answers what that changes.
    pub fn set(&mut self, key: &ObjectKey, object: Option<Resource>) -> Changes {
        let before = match object {
            Some(object) => self.objects.insert(key.clone(), object),
            None => self.objects.remove(key),
        };
        let before = before.as_ref().map(Resource::meaning);
        let objects = &self.objects;
        let meaning_of = |key: &ObjectKey| objects.get(key).map(Resource::meaning);
        self.heritage.change(key, before.as_deref(), meaning_of(key).as_deref(), meaning_of)
    }

    /// Who leaves what to whom.
    pub fn heritage(&self) -> &Heritage {
        &self.heritage
    }

    /// The objects.
    pub fn objects(&self) -> &BTreeMap<ObjectKey, Resource> {
        &self.objects
    }
}
