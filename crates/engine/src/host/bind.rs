//! Rules as written, bound to one subject: label values filled in, peers turned into atoms.

use std::collections::BTreeMap;
use std::sync::Arc;

use bulkhead_model::labels::{KIND_LABEL, NAMESPACE_LABEL};
use bulkhead_model::policy::{Mode, Peer, PolicySpec, TierSpec};
use bulkhead_model::{Direction, Kind, ObjectKey, Prefix, RuleRef, Selector};

use super::atoms::{AtomKind, Atoms};
use super::rules::RuleTable;
use crate::classes::{AtomId, Classes};
use crate::program::{BoundPeer, BoundRule, BoundTier};

/// Where atoms and rule numbers come from.
pub(super) struct Binder<'a> {
    pub(super) atoms: &'a mut Atoms,
    pub(super) classes: &'a mut Classes,
    pub(super) rules: &'a mut RuleTable,
}

/// The subject's values of the labels that `sameLabels` reads.
type SameLabels = [(Arc<str>, Option<Arc<str>>)];

/// The tiers that apply, in order, with the rules of their policies. `policies` is in order.
pub(super) fn tiers<'a>(
    tiers: &BTreeMap<String, TierSpec>,
    policies: impl Iterator<Item = (&'a ObjectKey, &'a PolicySpec)>,
    direction: Direction,
    same: &SameLabels,
    binder: &mut Binder<'_>,
) -> Vec<BoundTier> {
    let mut bound: Vec<(&str, BoundTier)> = Vec::new();
    for (key, spec) in policies {
        let Some(tier) = tiers.get(&spec.tier) else { continue };
        if bound.last().is_none_or(|(name, _)| *name != spec.tier) {
            let default_rule = binder.rules.id(RuleRef::TierDefault { tier: spec.tier.clone() });
            let empty = BoundTier {
                default_rule,
                default_action: tier.default_action,
                enforced: false,
                rules: Vec::new(),
            };
            bound.push((&spec.tier, empty));
        }
        if let Some((_, tier)) = bound.last_mut() {
            tier.enforced |= spec.mode == Mode::Enforce;
            tier.rules.extend(binder.rules_of(key, spec, direction, same));
        }
    }
    bound.into_iter().map(|(_, tier)| tier).collect()
}

impl Binder<'_> {
    fn rules_of(
        &mut self,
        key: &ObjectKey,
        spec: &PolicySpec,
        direction: Direction,
        same: &SameLabels,
    ) -> Vec<BoundRule> {
        let rules = spec.rules(direction).unwrap_or_default();
        let mut bound = Vec::with_capacity(rules.len());
        for (index, rule) in (0..).zip(rules) {
            let peers = if rule.peers.is_empty() || rule.peers.iter().any(Peer::is_any) {
                None
            } else {
                Some(rule.peers.iter().filter_map(|peer| self.peer(key, peer, same)).collect())
            };
            let id = self.rules.id(RuleRef::Rule {
                tier: spec.tier.clone(),
                policy: key.qualified_name(),
                direction,
                index,
            });
            bound.push(BoundRule {
                id,
                action: rule.action,
                audit: spec.mode == Mode::Audit,
                log: rule.log,
                ports: rule.ports.iter().map(|ports| ports.interval()).collect(),
                peers,
            });
        }
        bound
    }

    /// `None` if no address can match: a `sameLabels` key that the subject does not have.
    fn peer(&mut self, key: &ObjectKey, peer: &Peer, same: &SameLabels) -> Option<BoundPeer> {
        let Peer { selector, not_selector, same_labels, cidrs, not_cidrs, network_sets } = peer;
        let namespace = namespace_selector(key);
        let mut bound = BoundPeer::default();
        if selector.is_some() || !same_labels.is_empty() {
            let mut parts: Vec<Selector> = namespace.iter().chain(selector).cloned().collect();
            for label in same_labels {
                let value =
                    same.iter().find(|(key, _)| **key == **label).and_then(|(_, value)| value.as_ref())?;
                parts.push(Selector::equals(label, value));
            }
            bound.all.push(self.selector(Selector::all_of(parts)));
        }
        if let Some(sets) = network_sets {
            let kind = Selector::equals(KIND_LABEL, Kind::NetworkSet.as_str());
            let parts = namespace.into_iter().chain([sets.clone(), kind]);
            bound.all.push(self.selector(Selector::all_of(parts)));
        }
        if !cidrs.is_empty() {
            bound.all.push(self.cidrs(cidrs));
        }
        if let Some(selector) = not_selector {
            bound.none.push(self.selector(selector.clone()));
        }
        if !not_cidrs.is_empty() {
            bound.none.push(self.cidrs(not_cidrs));
        }
        Some(bound)
    }

    fn selector(&mut self, selector: Selector) -> AtomId {
        self.atoms.id(self.classes, AtomKind::Selector(selector))
    }

    fn cidrs(&mut self, blocks: &[Prefix]) -> AtomId {
        let mut blocks = blocks.to_vec();
        blocks.sort_unstable();
        blocks.dedup();
        self.atoms.id(self.classes, AtomKind::Cidrs(blocks.into()))
    }
}

/// `appliesTo` as evaluated: a policy in a namespace is for endpoints in that namespace.
pub(super) fn subject_selector(key: &ObjectKey, spec: &PolicySpec) -> Selector {
    match namespace_selector(key) {
        // Shares the text and the tree.
        None => spec.applies_to.clone(),
        Some(namespace) => Selector::all_of([namespace, spec.applies_to.clone()]),
    }
}

fn namespace_selector(key: &ObjectKey) -> Option<Selector> {
    key.namespace.as_ref().map(|namespace| Selector::equals(NAMESPACE_LABEL, namespace))
}
