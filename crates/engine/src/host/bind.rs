//! Rules as written, bound to one subject: label values filled in, peers turned into atoms.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bulkhead_model::entity::port_label;
use bulkhead_model::labels::{KIND_LABEL, NAMESPACE_LABEL, NAMESPACE_LABELS_PREFIX, SERVICE_ACCOUNT_LABEL};
use bulkhead_model::policy::{Mode, Peer, PolicySpec, Rule, SourcePorts, TierSpec};
use bulkhead_model::ports::{NamedPort, PortKey, PortMatch, PortRange, Protocol};
use bulkhead_model::selector::{CompareOp, Expr};
use bulkhead_model::{Direction, Kind, ObjectKey, Prefix, RuleRef, Selector};

use super::atoms::{AtomKind, Atoms};
use super::rules::RuleTable;
use crate::classes::{AtomId, Classes};
use crate::intervals::Intervals;
use crate::program::{BoundPeer, BoundRule, BoundTier};

/// Where atoms and rule numbers come from.
pub(super) struct Binder<'a> {
    pub(super) atoms: &'a mut Atoms,
    pub(super) classes: &'a mut Classes,
    pub(super) rules: &'a mut RuleTable,
}

/// Ports, and what the other end must match besides for them to count.
type PortCase = (Vec<(PortKey, PortKey)>, Option<AtomId>);

/// What of an endpoint its compiled policies depend on, besides the policies themselves.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Subject {
    pub(super) direction: Direction,
    /// Its values of the labels that `sameLabels` and `notSameLabels` read.
    pub(super) labels: Vec<(Arc<str>, Option<Arc<str>>)>,
    /// What the named ports in use mean: for ingress at the endpoint itself, for egress at any of its peers.
    pub(super) named: BTreeMap<PortMatch, BTreeSet<NamedPort>>,
}

impl Subject {
    fn label(&self, key: &str) -> Option<&Arc<str>> {
        self.labels.iter().find(|(known, _)| **known == *key).and_then(|(_, value)| value.as_ref())
    }

    fn meanings(&self, ports: &PortMatch) -> impl Iterator<Item = &NamedPort> {
        self.named.get(ports).into_iter().flatten()
    }
}

/// Every named port that rules ask for.
pub(super) fn named_ports<'a>(rules: impl Iterator<Item = &'a Rule>) -> BTreeSet<PortMatch> {
    rules
        .flat_map(|rule| rule.ports.iter().chain(&rule.not_ports))
        .filter(|ports| matches!(ports, PortMatch::Named { .. }))
        .cloned()
        .collect()
}

/// The selectors of everybody who names a port so: one for each protocol that it can have.
pub(super) fn named_selectors(ports: &PortMatch) -> Vec<Selector> {
    let PortMatch::Named { protocol, name } = ports else { return Vec::new() };
    let all = Protocol::NAMES.into_iter().map(|(_, protocol)| protocol).filter(|one| one.has_ports());
    let protocols: Vec<Protocol> = protocol.map_or_else(|| all.collect(), |one| vec![one]);
    let has = |protocol| Selector::from_expr(Expr::Has(port_label(protocol, name).into()));
    protocols.into_iter().map(has).collect()
}

/// The tiers that apply, in order, with the rules of their policies. `policies` is in order.
pub(super) fn tiers<'a>(
    tiers: &BTreeMap<String, TierSpec>,
    policies: impl Iterator<Item = (&'a ObjectKey, &'a PolicySpec)>,
    subject: &Subject,
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
            tier.rules.extend(binder.rules_of(key, spec, subject));
        }
    }
    bound.into_iter().map(|(_, tier)| tier).collect()
}

impl Binder<'_> {
    fn rules_of(&mut self, key: &ObjectKey, spec: &PolicySpec, subject: &Subject) -> Vec<BoundRule> {
        let rules = spec.rules(subject.direction).unwrap_or_default();
        let mut bound = Vec::with_capacity(rules.len());
        for (index, rule) in (0..).zip(rules) {
            let cases = self.port_cases(rule, subject);
            let source_ports = rule.source_ports.as_deref().map(source_ports);
            if cases.is_empty() || source_ports.as_ref().is_some_and(|ports| ports.is_empty()) {
                continue;
            }
            let mut peers = if rule.peers.is_empty() || rule.peers.iter().any(Peer::is_any) {
                None
            } else {
                Some(rule.peers.iter().filter_map(|peer| self.peer(key, peer, subject)).collect())
            };
            if let Some(version) = rule.ip_version {
                let family = self.cidrs(&[version.block()]);
                peers = Some(and(peers, family));
            }
            let id = self.rules.id(RuleRef::Rule {
                tier: spec.tier.clone(),
                policy: key.qualified_name(),
                direction: subject.direction,
                index,
            });
            for (ports, atom) in cases {
                bound.push(BoundRule {
                    id,
                    action: rule.action,
                    audit: spec.mode == Mode::Audit,
                    log: rule.log,
                    ports,
                    source_ports: source_ports.clone(),
                    peers: atom.map_or_else(|| peers.clone(), |atom| Some(and(peers.clone(), atom))),
                });
            }
        }
        bound
    }

    /// The ports of a rule, and for each meaning of a name at the other end what that end must be. Cases in which
    /// nothing can match are left out.
    fn port_cases(&mut self, rule: &Rule, subject: &Subject) -> Vec<PortCase> {
        let egress = subject.direction == Direction::Egress;
        let mut excluded: Vec<(PortKey, PortKey)> =
            rule.not_ports.iter().filter_map(PortMatch::interval).collect();
        let mut wanted: Vec<(PortKey, PortKey)> = rule.ports.iter().filter_map(PortMatch::interval).collect();
        if !egress {
            let own = |ports| subject.meanings(ports).map(|port| (port.key(), port.key()));
            wanted.extend(rule.ports.iter().flat_map(own));
            excluded.extend(rule.not_ports.iter().flat_map(own));
        }
        let without_excluded = |wanted: &[(PortKey, PortKey)]| {
            let mut set = Intervals::of(wanted);
            for (first, last) in &excluded {
                set.take(*first, *last);
            }
            if rule.source_ports.is_some() { with_source_ports(&set) } else { set.iter().collect() }
        };
        let mut cases = Vec::new();
        if rule.ports.is_empty() || !wanted.is_empty() {
            cases.push((without_excluded(&wanted), None));
        }
        if egress {
            for port in rule.ports.iter().flat_map(|ports| subject.meanings(ports)) {
                let label = port_label(port.protocol, &port.name);
                let atom = self.selector(Selector::equals(&label, &port.port.to_string()));
                cases.push((without_excluded(&[(port.key(), port.key())]), Some(atom)));
            }
        }
        cases.retain(|(ports, _)| !ports.is_empty());
        cases
    }

    /// `None` if no address can match: a `sameLabels` key that the subject does not have.
    fn peer(&mut self, key: &ObjectKey, peer: &Peer, subject: &Subject) -> Option<BoundPeer> {
        let mut bound = BoundPeer::default();
        let parts = workload_parts(key, peer, subject)?;
        let Peer { not_selector, cidrs, not_cidrs, network_sets, hosts, .. } = peer;
        if !parts.is_empty() {
            bound.all.push(self.selector(Selector::all_of(parts)));
        }
        if let Some(sets) = network_sets {
            let parts = namespace_selector(key).into_iter().chain([sets.clone(), of_kind(Kind::NetworkSet)]);
            bound.all.push(self.selector(Selector::all_of(parts)));
        }
        if let Some(hosts) = hosts {
            bound.all.push(self.selector(Selector::all_of([hosts.clone(), of_kind(Kind::Host)])));
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

/// The source ports that a rule asks for, as intervals.
fn source_ports(asked: &SourcePorts) -> Arc<[(u16, u16)]> {
    let interval = |range: &PortRange| (PortKey::from(range.first), PortKey::from(range.last));
    let every = [PortRange { first: 0, last: u16::MAX }];
    let wanted = if asked.wanted.is_empty() { &every } else { asked.wanted.as_slice() };
    let mut set = Intervals::of(&wanted.iter().map(interval).collect::<Vec<_>>());
    for (first, last) in asked.excluded.iter().map(interval) {
        set.take(first, last);
    }
    let port = |port| u16::try_from(port).unwrap_or(u16::MAX);
    set.iter().map(|(first, last)| (port(first), port(last))).collect()
}

/// What of these port keys is of protocols that have source ports.
fn with_source_ports(keys: &Intervals) -> Vec<(PortKey, PortKey)> {
    let protocols = Protocol::NAMES.into_iter().map(|(_, protocol)| protocol).filter(|one| one.has_ports());
    protocols.flat_map(|protocol| keys.within(protocol.key(0), protocol.key(u16::MAX))).collect()
}

/// Everything that a peer asks of one and the same workload; `None` if nobody can fulfil it, empty if it asks nothing.
fn workload_parts(key: &ObjectKey, peer: &Peer, subject: &Subject) -> Option<Vec<Selector>> {
    let Peer { selector, namespace_selector, service_accounts, same_labels, not_same_labels, .. } = peer;
    let mut parts: Vec<Selector> = Vec::new();
    if let Some(namespaces) = namespace_selector {
        parts.push(Selector::from_expr(Expr::Has(NAMESPACE_LABEL.into())));
        parts.push(namespaces.with_prefix(NAMESPACE_LABELS_PREFIX));
    }
    parts.extend(selector.clone());
    if !service_accounts.is_empty() {
        let mut values: Vec<Arc<str>> =
            service_accounts.iter().map(|account| account.as_str().into()).collect();
        values.sort();
        values.dedup();
        let label = SERVICE_ACCOUNT_LABEL.into();
        parts.push(Selector::from_expr(Expr::In { label, negated: false, values }));
    }
    for label in same_labels {
        parts.push(Selector::equals(label, subject.label(label)?));
    }
    if !not_same_labels.is_empty() {
        let mut differing = Vec::new();
        for label in not_same_labels {
            parts.push(Selector::from_expr(Expr::Has(label.as_str().into())));
            let value = Arc::clone(subject.label(label)?);
            differing.push(Expr::Compare { label: label.as_str().into(), op: CompareOp::Ne, value });
        }
        let any = if differing.len() == 1 { differing.swap_remove(0) } else { Expr::Or(differing) };
        parts.push(Selector::from_expr(any));
    }
    if !parts.is_empty() && namespace_selector.is_none() {
        parts.extend(self::namespace_selector(key));
    }
    Some(parts)
}

fn of_kind(kind: Kind) -> Selector {
    Selector::equals(KIND_LABEL, kind.as_str())
}

/// The same peers, each with one more condition; any address becomes a peer with that condition alone.
fn and(peers: Option<Vec<BoundPeer>>, atom: AtomId) -> Vec<BoundPeer> {
    let mut peers = peers.unwrap_or_else(|| vec![BoundPeer::default()]);
    for peer in &mut peers {
        peer.all.push(atom);
    }
    peers
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
