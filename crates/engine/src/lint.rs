//! What is suspicious in policies: pure analysis of a state, with the place of every finding.
//!
//! A finding names an object and the path of a field in its manifest; the caller, who read the manifests, knows line
//! and column. Nothing is claimed that is not certain: see `dead` for how far rules are compared.

use std::collections::{BTreeMap, BTreeSet};

use bulkhead_model::{ObjectKey, Resource};

use crate::world::World;

mod codes;
mod cover;
mod dead;
mod implies;
mod inventory;
mod order;
mod policies;
mod ports;
mod unreachable;
mod words;

pub use codes::{CODES, Code, CodeInfo, Severity};

/// One thing that somebody should look at.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Finding {
    /// The object that it is about.
    pub object: ObjectKey,
    /// The field, like `spec.ingress[2].from[0].selector`; of a foreign object its parents may be all there is.
    pub path: String,
    /// What kind of finding it is.
    pub code: Code,
    /// One line with names.
    pub message: String,
}

/// What was found, and whether everything was looked at.
#[derive(Debug, Clone, Default)]
pub struct Findings {
    /// By object and path, each once.
    pub list: Vec<Finding>,
    /// Whether every rule was compared with those before it: there is a bound to that.
    pub complete: bool,
}

/// Looks at policies and what they mean to each other and to the inventory, at the world's own time.
pub fn lint(world: &World, objects: &BTreeMap<ObjectKey, Resource>) -> Findings {
    let mut found = Found::default();
    policies::check(world, &mut found);
    order::check(world, &mut found);
    inventory::check(world, objects, &mut found);
    let complete = unreachable::check(world, &mut found);
    Findings { list: found.0.into_iter().collect(), complete }
}

/// Several policies of one object say the same thing once.
#[derive(Debug, Default)]
struct Found(BTreeSet<Finding>);

impl Found {
    fn add(&mut self, code: Code, object: &ObjectKey, path: impl Into<String>, message: impl Into<String>) {
        let object = object_of(object);
        self.0.insert(Finding { object, path: path.into(), code, message: message.into() });
    }
}

/// The object that a policy comes from: some stand for several policies.
fn object_of(policy: &ObjectKey) -> ObjectKey {
    let name = policy.name.split('#').next().unwrap_or_default().to_owned();
    ObjectKey { name, ..policy.clone() }
}

/// Where a rule stands in a manifest.
fn rule_path(direction: bulkhead_model::Direction, index: usize) -> String {
    format!("spec.{direction}[{index}]")
}

#[cfg(test)]
mod tests;
