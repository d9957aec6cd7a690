//! What is not in force, and why.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bulkhead_model::{Direction, Selector};

use super::HostEngine;

/// An endpoint whose current policy is not in force, and why.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum NotReady {
    /// The members of a selector have not arrived.
    Waiting(Selector),
    /// A policy names a tier that is not known.
    UnknownTier {
        /// The policy.
        policy: String,
        /// The tier.
        tier: String,
    },
    /// All policies for it together cut the source ports into more parts than
    /// [`bulkhead_model::policy::SOURCE_PORT_PARTS_MAX`].
    TooManySourcePorts {
        /// In rules for this direction.
        direction: Direction,
        /// Into how many.
        parts: usize,
    },
}

impl HostEngine {
    /// Endpoints whose current policy is not in force.
    pub fn not_ready(&self) -> BTreeMap<Arc<str>, Vec<NotReady>> {
        let mut result: BTreeMap<Arc<str>, Vec<NotReady>> = BTreeMap::new();
        for (name, local) in &self.locals {
            let mut reasons: BTreeSet<NotReady> = local.broken.iter().cloned().collect();
            for slot in local.desired.iter().flatten().filter_map(|id| self.slots.get(*id)) {
                let waiting = slot.atoms().filter(|atom| !self.atoms.is_resolved(*atom));
                let selectors = waiting.filter_map(|atom| self.atoms.selector(atom).cloned());
                reasons.extend(selectors.map(NotReady::Waiting));
            }
            if !reasons.is_empty() {
                result.insert(Arc::clone(name), reasons.into_iter().collect());
            }
        }
        result
    }
}
