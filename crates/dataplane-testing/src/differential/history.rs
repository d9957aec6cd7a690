//! The state that a history has reached, as an agent knows it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bulkhead_engine::Fleet;
use bulkhead_model::labels::HOST_LABEL;
use bulkhead_model::time::Timestamp;
use bulkhead_model::{ObjectKey, Resource};

use super::case::{Case, read};
use super::world::SLOTS;
use crate::machine::Machine;

/// The host under test.
pub(super) const HOST: &str = "here";

/// Objects and time.
#[derive(Debug, Clone, Default)]
pub(super) struct State {
    pub(super) objects: BTreeMap<ObjectKey, Resource>,
    pub(super) now: u64,
}

impl State {
    /// The state after each step.
    ///
    /// # Errors
    /// If an object is refused, or the objects together would be.
    pub(super) fn all(case: &Case) -> Result<Vec<Self>, String> {
        let mut states = Vec::new();
        let mut state = Self::default();
        for step in &case.steps {
            state.now = step.now.unwrap_or(state.now);
            for value in &step.set {
                let resource = read(value)?;
                state.objects.insert(resource.key(), resource);
            }
            for name in &step.remove {
                let key = state.objects.keys().find(|key| named(key) == *name).cloned();
                state.objects.remove(&key.ok_or_else(|| format!("there is no {name}"))?);
            }
            state.check()?;
            states.push(state.clone());
        }
        Ok(states)
    }

    /// What a repository would refuse, and what a host cannot have.
    fn check(&self) -> Result<(), String> {
        let machine = self.machine(&[0; SLOTS], &mut BTreeMap::new())?;
        let world = machine.fleet().world();
        if let Some((key, policy)) = world.policies.iter().find(|(_, p)| !world.tiers.contains_key(&p.tier)) {
            return Err(format!("{key}: there is no tier {:?}", policy.tier));
        }
        let mut taken = BTreeSet::new();
        for entity in world.entities.values().filter(|entity| entity.is_endpoint()) {
            if let Some(twice) = entity.prefixes.iter().find(|prefix| !taken.insert(**prefix)) {
                return Err(format!("{}: {twice} is another's too", entity.name));
            }
        }
        Ok(())
    }

    /// A machine that has never known anything else. Workloads keep the slots that they have been given.
    ///
    /// # Errors
    /// If there are more workloads than slots.
    pub(super) fn machine(
        &self,
        interfaces: &[u32],
        slots: &mut BTreeMap<Arc<str>, usize>,
    ) -> Result<Machine, String> {
        let mut machine = Machine::new(Fleet::of_host(HOST));
        self.bring(&mut machine, interfaces, slots)?;
        Ok(machine)
    }

    /// Brings a machine to this state, by the difference.
    ///
    /// # Errors
    /// If there are more workloads than slots.
    pub(super) fn bring(
        &self,
        machine: &mut Machine,
        interfaces: &[u32],
        slots: &mut BTreeMap<Arc<str>, usize>,
    ) -> Result<(), String> {
        for resource in self.objects.values() {
            for entity in &resource.meaning().entities {
                if !entity.is_endpoint() || entity.labels.get(HOST_LABEL) != Some(HOST) {
                    continue;
                }
                let next = slots.len();
                let slot = *slots.entry(Arc::clone(&entity.name)).or_insert(next);
                let interface = interfaces.get(slot).ok_or_else(|| format!("more than {SLOTS} workloads"))?;
                machine.place(&entity.name, *interface);
            }
        }
        machine.set_now(Timestamp { seconds: self.now });
        machine.set(self.objects.clone());
        Ok(())
    }
}

/// How a case names an object.
pub(super) fn named(key: &ObjectKey) -> String {
    let namespace = key.namespace.as_ref().map_or_else(String::new, |namespace| format!("{namespace}/"));
    format!("{}/{namespace}{}", key.kind.as_str(), key.name)
}
