//! Rules as written, bound to one subject: label values filled in, peers turned into atoms.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bulkhead_model::entity::port_label;
use bulkhead_model::host_policy::RuleId;
use bulkhead_model::labels::{DOMAIN_LABEL, KIND_LABEL, NAMESPACE_LABEL, SERVICE_ACCOUNT_LABEL};
use bulkhead_model::policy::{
    Action, DefaultAction, IpVersion, Mode, Own, Peer, PolicySpec, Rule, SourcePorts, TierSpec,
};
use bulkhead_model::ports::{NamedPort, PortKey, PortMatch, PortRange, Protocol};
use bulkhead_model::selector::{CompareOp, Expr};
use bulkhead_model::{Direction, Kind, ObjectKey, Prefix, RuleRef, Selector, Verdict};

use super::atoms::{AtomKind, Atoms};
use super::naming::Naming;
use super::own::Families;
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

/// Ports, and what the other end must and must not match besides for them to count.
#[derive(Debug, Clone)]
struct PortCase {
    ports: Vec<(PortKey, PortKey)>,
    all: Option<AtomId>,
    none: Vec<AtomId>,
}

/// What of an endpoint its compiled policies depend on, besides the policies themselves.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Subject {
    pub(super) direction: Direction,
    /// Its values of the labels that `sameLabels` and `notSameLabels` read.
    pub(super) labels: Vec<(Arc<str>, Option<Arc<str>>)>,
    /// What the names in use mean: for ingress at the endpoint itself, for egress at any of its peers.
    pub(super) named: BTreeMap<Naming, BTreeSet<NamedPort>>,
    /// Where the rules that ask something of the endpoint itself count.
    pub(super) own: BTreeMap<(Own, bool), Families>,
    /// What happens where no tier decides.
    pub(super) posture: Verdict,
    /// Whether it has fail-safe ports.
    pub(super) fail_safe: bool,
}

impl Subject {
    fn label(&self, key: &str) -> Option<&Arc<str>> {
        self.labels.iter().find(|(known, _)| **known == *key).and_then(|(_, value)| value.as_ref())
    }

    fn families(&self, rule: &Rule) -> Families {
        let everywhere = Families { v4: true, v6: true };
        let Some(own) = rule.own.as_deref() else { return everywhere };
        self.own.get(&(own.clone(), rule.action == Action::Deny)).copied().unwrap_or_default()
    }

    fn meanings(&self, naming: &Naming) -> impl Iterator<Item = &NamedPort> {
        self.named.get(naming).into_iter().flatten()
    }

    fn meanings_of_port(&self, ports: &PortMatch) -> impl Iterator<Item = &NamedPort> {
        let named = matches!(ports, PortMatch::Named { .. });
        let meanings = named.then(|| self.named.get(&Naming::Port(ports.clone()))).flatten();
        meanings.into_iter().flatten()
    }
}

/// The tier before all others of an endpoint with ports that no policy can close.
pub(super) fn fail_safe(id: RuleId, ports: &[PortMatch]) -> BoundTier {
    let rule = BoundRule {
        id,
        action: Action::Allow,
        audit: false,
        log: false,
        reject: false,
        ports: ports.iter().filter_map(PortMatch::interval).collect(),
        source_ports: None,
        peers: None,
    };
    BoundTier { default_rule: id, default_action: DefaultAction::Pass, enforced: true, rules: vec![rule] }
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
            let id = self.rules.id(RuleRef::Rule {
                tier: spec.tier.clone(),
                policy: key.policy_name(),
                direction: subject.direction,
                index,
            });
            let own = subject.families(rule);
            let version = match (own.v4, own.v6) {
                (true, true) => None,
                (true, false) => Some(IpVersion::V4),
                (false, true) => Some(IpVersion::V6),
                (false, false) => continue,
            };
            let families: Vec<AtomId> = [rule.ip_version, version]
                .into_iter()
                .flatten()
                .map(|version| self.cidrs(&[version.block()]))
                .collect();
            for (only, peers) in self.peer_groups(key, rule, subject) {
                for case in &cases {
                    let ports = match only {
                        None => case.ports.clone(),
                        Some(key) => Intervals::exactly(&case.ports).within(key, key),
                    };
                    if ports.is_empty() {
                        continue;
                    }
                    let all: Vec<AtomId> = families.iter().copied().chain(case.all).collect();
                    bound.push(BoundRule {
                        id,
                        action: rule.action,
                        audit: spec.mode == Mode::Audit,
                        log: rule.log,
                        reject: rule.reject,
                        ports,
                        source_ports: source_ports.clone(),
                        peers: and(peers.clone(), &all, &case.none),
                    });
                }
            }
        }
        bound
    }

    /// The peers of a rule, grouped by the one port that they count for: backends of services for egress. `None` for
    /// the peers means any address.
    fn peer_groups(
        &mut self,
        key: &ObjectKey,
        rule: &Rule,
        subject: &Subject,
    ) -> Vec<(Option<PortKey>, Option<Vec<BoundPeer>>)> {
        if rule.peers.is_empty() || rule.peers.iter().any(Peer::is_any) {
            return vec![(None, None)];
        }
        let mut groups: BTreeMap<Option<PortKey>, Vec<BoundPeer>> = BTreeMap::new();
        for peer in &rule.peers {
            let Some(bound) = self.peer(key, peer, subject) else { continue };
            if peer.services.is_empty() {
                groups.entry(None).or_default().push(bound);
                continue;
            }
            for service in &peer.services {
                let naming = Naming::service(key, service);
                let backends = naming.selectors();
                if subject.direction == Direction::Ingress {
                    let mut bound = bound.clone();
                    bound.all.extend(backends.into_iter().map(|selector| self.selector(selector)));
                    groups.entry(None).or_default().push(bound);
                    continue;
                }
                for port in subject.meanings(&naming) {
                    let label = port_label(port.protocol, &port.name);
                    let number = Selector::equals(&label, &port.port.to_string());
                    let serving = Selector::all_of(backends.iter().cloned().chain([number]));
                    let mut bound = bound.clone();
                    bound.all.push(self.selector(serving));
                    groups.entry(Some(port.key())).or_default().push(bound);
                }
            }
        }
        groups.into_iter().map(|(port, peers)| (port, Some(peers))).collect()
    }

    /// The ports of a rule, and for each meaning of a name at the other end what that end must or must not be. Cases
    /// in which nothing can match are left out.
    fn port_cases(&mut self, rule: &Rule, subject: &Subject) -> Vec<PortCase> {
        let egress = subject.direction == Direction::Egress;
        let mut excluded: Vec<(PortKey, PortKey)> =
            rule.not_ports.iter().filter_map(PortMatch::interval).collect();
        let mut wanted: Vec<(PortKey, PortKey)> = rule.ports.iter().filter_map(PortMatch::interval).collect();
        if !egress {
            let own = |ports| subject.meanings_of_port(ports).map(|port| (port.key(), port.key()));
            wanted.extend(rule.ports.iter().flat_map(own));
            excluded.extend(rule.not_ports.iter().flat_map(own));
        }
        let mut cases = Vec::new();
        let mut push = |wanted: &[(PortKey, PortKey)], all| {
            let mut set = Intervals::of(wanted);
            for (first, last) in &excluded {
                set.take(*first, *last);
            }
            let ports =
                if rule.source_ports.is_some() { with_source_ports(&set) } else { set.iter().collect() };
            cases.push(PortCase { ports, all, none: Vec::new() });
        };
        if rule.ports.is_empty() || !wanted.is_empty() {
            push(&wanted, None);
        }
        if egress {
            for port in rule.ports.iter().flat_map(|ports| subject.meanings_of_port(ports)) {
                let atom = self.port_atom(port);
                push(&[(port.key(), port.key())], Some(atom));
            }
            for port in rule.not_ports.iter().flat_map(|ports| subject.meanings_of_port(ports)) {
                let atom = self.port_atom(port);
                cases = cases.iter().flat_map(|case| without_port(case, port.key(), atom)).collect();
            }
        }
        cases.retain(|case| !case.ports.is_empty());
        cases
    }

    /// Who gives a port this name, protocol and number.
    fn port_atom(&mut self, port: &NamedPort) -> AtomId {
        let label = port_label(port.protocol, &port.name);
        self.selector(Selector::equals(&label, &port.port.to_string()))
    }

    /// `None` if no address can match: a `sameLabels` key that the subject does not have.
    fn peer(&mut self, key: &ObjectKey, peer: &Peer, subject: &Subject) -> Option<BoundPeer> {
        let mut bound = BoundPeer::default();
        let parts = workload_parts(key, peer, subject)?;
        let Peer { not_selector, cidrs, not_cidrs, network_sets, hosts, domains, .. } = peer;
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
        if !domains.is_empty() {
            bound.all.push(self.selector(named(domains)));
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
        parts.push(namespaces.of_namespaces());
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

/// Whoever has one of these DNS names.
fn named(domains: &[String]) -> Selector {
    let label: Arc<str> = DOMAIN_LABEL.into();
    let exact = domains.iter().filter(|name| !name.starts_with("*.")).map(|name| name.as_str().into());
    let mut values: Vec<Arc<str>> = exact.collect();
    values.sort();
    values.dedup();
    let mut any: Vec<Expr> = Vec::new();
    if !values.is_empty() {
        any.push(Expr::In { label: Arc::clone(&label), negated: false, values });
    }
    for parent in domains.iter().filter_map(|name| name.strip_prefix('*')) {
        let (label, value) = (Arc::clone(&label), parent.into());
        any.push(Expr::Compare { label, op: CompareOp::EndsWith, value });
    }
    let any = if any.len() == 1 { any.swap_remove(0) } else { Expr::Or(any) };
    Selector::all_of([of_kind(Kind::NameTable), Selector::from_expr(any)])
}

/// The case without one port of whoever matches `atom`: the port apart, for everybody else.
fn without_port(case: &PortCase, port: PortKey, atom: AtomId) -> [PortCase; 2] {
    let mut rest = Intervals::exactly(&case.ports);
    let ports = rest.take(port, port);
    let none = case.none.iter().copied().chain([atom]).collect();
    [PortCase { ports: rest.iter().collect(), ..case.clone() }, PortCase { ports, none, all: case.all }]
}

/// The same peers, each with more conditions; any address becomes a peer with those alone.
fn and(peers: Option<Vec<BoundPeer>>, all: &[AtomId], none: &[AtomId]) -> Option<Vec<BoundPeer>> {
    if all.is_empty() && none.is_empty() {
        return peers;
    }
    let mut peers = peers.unwrap_or_else(|| vec![BoundPeer::default()]);
    for peer in &mut peers {
        peer.all.extend(all);
        peer.none.extend(none);
    }
    Some(peers)
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
