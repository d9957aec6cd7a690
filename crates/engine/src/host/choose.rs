//! Which compiled policy an endpoint should be bound to.

use std::collections::BTreeSet;
use std::sync::Arc;

use bulkhead_model::host_policy::CompiledId;
use bulkhead_model::policy::{SOURCE_PORT_PARTS_MAX, source_port_parts};
use bulkhead_model::ports::NamedPort;
use bulkhead_model::{Builtin, Direction, Entity, ObjectKey, RuleRef, Verdict};

use super::atoms::{AtomKind, Atoms};
use super::bind::{self, Subject};
use super::naming::{Naming, namings};
use super::own::own_families;
use super::slots::{Slot, SubjectKey};
use super::{HostEngine, NotReady};
use crate::program::Program;

impl HostEngine {
    /// Finds or makes the compiled policies that an endpoint should be bound to.
    pub(super) fn choose(&mut self, name: &Arc<str>) {
        self.unbound.insert(Arc::clone(name));
        let Some(local) = self.locals.get(name) else { return };
        let entity = local.endpoint.entity.clone();
        let forwarded = local.endpoint.is_forwarding();
        let keys: Vec<ObjectKey> = local
            .selected_by
            .iter()
            .filter_map(|selector| self.applies.get(selector))
            .flat_map(|applies| applies.policies.iter())
            .filter(|key| !forwarded || self.is_for_forwarded(key))
            .cloned()
            .collect();
        if forwarded && keys.is_empty() {
            // Not allowed by tables: not asked at all, and so without cost.
            if let Some(local) = self.locals.get_mut(name) {
                (local.desired, local.current, local.broken) = ([None; 2], [None; 2], None);
            }
            return;
        }
        let chosen = Direction::BOTH.map(|direction| self.slot_for(&entity, &keys, direction, forwarded));
        if let Some(local) = self.locals.get_mut(name) {
            local.broken = None;
            for (index, choice) in chosen.into_iter().enumerate() {
                match choice {
                    Ok(slot) => local.desired[index] = Some(slot),
                    // DESIGN 4.14: keep the last good tables and say so.
                    Err(reason) => local.broken = Some(reason),
                }
            }
        }
    }

    fn slot_for(
        &mut self,
        entity: &Entity,
        keys: &[ObjectKey],
        direction: Direction,
        forwarded: bool,
    ) -> Result<CompiledId, NotReady> {
        let mut applicable = Vec::new();
        for key in keys {
            let Some(stored) = self.policies.get(key) else { continue };
            if stored.spec.rules(direction).is_none() || !stored.spec.is_valid_at(self.now) {
                continue;
            }
            let Some(tier) = self.tiers.get(&stored.spec.tier) else {
                let tier = stored.spec.tier.clone();
                return Err(NotReady::UnknownTier { policy: key.policy_name(), tier });
            };
            applicable.push(((tier.order, &stored.spec.tier, stored.spec.order, key), stored));
        }
        applicable.sort_unstable_by_key(|(a, _)| *a);
        let rules =
            || applicable.iter().flat_map(|(_, stored)| stored.spec.rules(direction).unwrap_or_default());
        let parts = source_port_parts(rules());
        if parts > SOURCE_PORT_PARTS_MAX {
            return Err(NotReady::TooManySourcePorts { direction, parts });
        }
        let label_keys: BTreeSet<&str> = rules()
            .flat_map(|rule| &rule.peers)
            .flat_map(|peer| peer.same_labels.iter().chain(&peer.not_same_labels))
            .map(String::as_str)
            .collect();
        let labels = label_keys.into_iter().map(|key| (key.into(), entity.labels.get(key).map(Into::into)));
        let labels = labels.collect();
        let with_rules = applicable.iter().flat_map(|((.., key), stored)| {
            stored.spec.rules(direction).unwrap_or_default().iter().map(move |r| (*key, r))
        });
        let names: BTreeSet<Naming> = namings(with_rules, direction);
        let mut name_atoms = Vec::new();
        if direction == Direction::Egress {
            for selector in names.iter().flat_map(Naming::selectors) {
                name_atoms.push(self.atoms.id(&mut self.classes, AtomKind::Selector(selector)));
            }
        }
        let meaning = |naming: &Naming| match direction {
            Direction::Ingress => entity.ports.iter().filter(|port| naming.names(port)).cloned().collect(),
            Direction::Egress => meanings(&self.atoms, naming),
        };
        let named = names.iter().map(|naming| (naming.clone(), meaning(naming))).collect();
        let own = own_families(rules(), entity);
        let posture = match forwarded {
            true => Verdict::Allow,
            false => entity.posture.unwrap_or(self.settings.default_posture),
        };
        let fail_safe = entity.is_host_endpoint() && !forwarded;
        let subject = SubjectKey {
            subject: Subject { direction, labels, named, own, posture, fail_safe },
            settings_version: self.settings_version,
            tiers_version: self.tiers_version,
            policies: applicable.iter().map(|(_, stored)| stored.version).collect(),
        };
        if let Some(id) = self.slots.find(&subject) {
            return Ok(id);
        }
        let mut tiers = bind::tiers(
            &self.tiers,
            applicable.iter().map(|((.., key), stored)| (*key, &stored.spec)),
            &subject.subject,
            &mut bind::Binder { atoms: &mut self.atoms, classes: &mut self.classes, rules: &mut self.rules },
        );
        if subject.subject.fail_safe {
            let id = self.rules.id(RuleRef::Builtin { builtin: Builtin::FailSafe });
            tiers.insert(0, bind::fail_safe(id, self.settings.fail_safe.ports(direction)));
        }
        let program = Program::new(tiers, (posture, self.rules.id(RuleRef::DefaultPosture)));
        self.atoms.acquire(program.atoms().chain(name_atoms.iter().copied()));
        Ok(self.slots.insert(Slot::new(subject, program, name_atoms)))
    }

    /// Endpoints whose tables were made for other meanings of named ports than those of now are chosen for again.
    pub(super) fn choose_for_renamed_ports(&mut self) {
        if !self.slots.has_naming() {
            return;
        }
        for (name, local) in &self.locals {
            let stale = self.slots.naming(local.desired.into_iter().flatten()).any(|slot| {
                let mut named = slot.key.subject.named.iter();
                named.any(|(naming, known)| meanings(&self.atoms, naming) != *known)
            });
            if stale {
                self.dirty.insert(Arc::clone(name));
            }
        }
    }
}

/// What a name means at anybody who is known.
fn meanings(atoms: &Atoms, naming: &Naming) -> BTreeSet<NamedPort> {
    let selectors = naming.selectors();
    let known = selectors.iter().flat_map(|selector| atoms.ports_of_members(selector));
    known.filter(|port| naming.names(port)).cloned().collect()
}
