//! Everything the reference evaluator may look at: plain maps, no indexes.

use std::collections::BTreeMap;
use std::sync::Arc;

use bulkhead_model::policy::{DefaultAction, Order, PREDEFINED_TIERS, PolicySpec, TierSpec};
use bulkhead_model::{Entity, Kind, ObjectKey, Resource, Verdict};

/// The state of a fleet.
#[derive(Debug, Clone)]
pub struct World {
    /// Tiers by name, the predefined ones included.
    pub tiers: BTreeMap<String, TierSpec>,
    /// Policies by key.
    pub policies: BTreeMap<ObjectKey, PolicySpec>,
    /// Workloads and network sets by name.
    pub entities: BTreeMap<Arc<str>, Entity>,
    /// What happens where no tier decided.
    pub posture: Verdict,
}

impl Default for World {
    fn default() -> Self {
        Self {
            tiers: predefined_tiers(),
            policies: BTreeMap::new(),
            entities: BTreeMap::new(),
            posture: Verdict::Allow,
        }
    }
}

/// The tiers that exist without being written.
pub(crate) fn predefined_tiers() -> BTreeMap<String, TierSpec> {
    let spec =
        |order: f64, default_action: DefaultAction| TierSpec { order: Order::new(order), default_action };
    PREDEFINED_TIERS.iter().map(|(name, order, action)| ((*name).to_owned(), spec(*order, *action))).collect()
}

impl World {
    /// A fleet in which nothing is known.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds or replaces an object.
    pub fn insert(&mut self, resource: &Resource) {
        match resource {
            Resource::Tier(tier) => {
                self.tiers.insert(tier.metadata.name.clone(), tier.spec.clone());
            }
            Resource::Policy(policy) => {
                self.policies.insert(resource.key(), policy.spec.clone());
            }
            Resource::Workload(_) | Resource::NetworkSet(_) | Resource::Host(_) => {
                if let Some(entity) = Entity::of(resource) {
                    self.entities.insert(Arc::clone(&entity.name), entity);
                }
            }
        }
    }

    /// Removes an object; a predefined tier falls back to what it was.
    pub fn remove(&mut self, key: &ObjectKey) {
        match key.kind {
            Kind::Tier => {
                self.tiers.remove(&key.name);
                if let Some(spec) = predefined_tiers().remove(&key.name) {
                    self.tiers.insert(key.name.clone(), spec);
                }
            }
            Kind::Policy => {
                self.policies.remove(key);
            }
            Kind::Workload | Kind::NetworkSet | Kind::Host => {
                self.entities.remove(key.to_string().as_str());
            }
        }
    }
}
