//! Everything the reference evaluator may look at: plain maps, no indexes.

use std::collections::BTreeMap;
use std::sync::Arc;

use bulkhead_model::policy::{DefaultAction, Order, PREDEFINED_TIERS, PolicySpec, TierSpec};
use bulkhead_model::settings::SettingsSpec;
use bulkhead_model::time::Timestamp;
use bulkhead_model::{Entity, ObjectKey};

use crate::assembly::Changes;

/// The state of a fleet.
#[derive(Debug, Clone)]
pub struct World {
    /// Tiers by name, the predefined ones included.
    pub tiers: BTreeMap<String, TierSpec>,
    /// Policies by key.
    pub policies: BTreeMap<ObjectKey, PolicySpec>,
    /// Things with addresses by name, with all that they inherit.
    pub entities: BTreeMap<Arc<str>, Entity>,
    /// What holds for everything.
    pub settings: SettingsSpec,
    /// What time it is, for policies that exist only at times.
    pub now: Timestamp,
}

impl Default for World {
    fn default() -> Self {
        Self {
            tiers: predefined_tiers(),
            policies: BTreeMap::new(),
            entities: BTreeMap::new(),
            settings: SettingsSpec::default(),
            now: Timestamp { seconds: 0 },
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

    /// Takes in what has changed.
    pub fn change(&mut self, changes: &Changes) {
        for (name, spec) in &changes.tiers {
            self.set_tier(name, spec.clone());
        }
        for (key, spec) in &changes.policies {
            match spec {
                Some(spec) => self.policies.insert(key.clone(), spec.clone()),
                None => self.policies.remove(key),
            };
        }
        for (name, entity) in &changes.entities {
            match entity {
                Some(entity) => self.entities.insert(Arc::clone(name), entity.clone()),
                None => self.entities.remove(name),
            };
        }
        if let Some(settings) = &changes.settings {
            self.settings = settings.clone().unwrap_or_default();
        }
    }

    /// Adds, replaces or removes a tier; a predefined one falls back to what it was.
    pub fn set_tier(&mut self, name: &str, spec: Option<TierSpec>) {
        match spec.or_else(|| predefined_tiers().remove(name)) {
            Some(spec) => self.tiers.insert(name.to_owned(), spec),
            None => self.tiers.remove(name),
        };
    }
}
