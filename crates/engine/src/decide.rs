//! The reference evaluator: walks tiers, policies and rules as they were written and remembers every step.
//!
//! Short and obvious on purpose. Nothing here is shared with the compiler, so that the two check each other.
//! Numbers in comments are those of the design's semantics.

use std::net::IpAddr;
use std::sync::Arc;

use bulkhead_model::entity::matches;
use bulkhead_model::labels::{
    DOMAIN_LABEL, HOST_LABEL, KIND_LABEL, NAMESPACE_LABEL, NAMESPACE_LABELS_PREFIX, SERVICE_ACCOUNT_LABEL,
    SERVICE_LABEL,
};
use bulkhead_model::policy::{
    Action, DefaultAction, Mode, Order, Own, Peer, PolicySpec, Rule, ServiceName, SourcePorts,
};
use bulkhead_model::ports::{PortKey, PortMatch, PortRange, Protocol};
use bulkhead_model::{
    Builtin, Direction, Entity, Kind, Labels, ObjectKey, Prefix, RuleRef, Selector, Verdict,
};

use crate::judgement::{Endpoint, Explanation, Flow, Judgement, Outcome, Step};
use crate::own_host::{is_host_at, unless_own_host};
use crate::world::World;

/// Judges a new connection at both ends (4.1).
pub fn decide(world: &World, flow: &Flow) -> Explanation {
    let ours = |end: &Endpoint| {
        let entity = end.workload.as_ref().and_then(|name| world.entities.get(name));
        entity.filter(|entity| entity.is_endpoint())
    };
    let (source, destination) = (ours(&flow.source), ours(&flow.destination));
    let ask = |entity, direction, peer| judge(world, entity, direction, peer, flow.key, flow.source_port);
    let (egress, ingress) = match (source, destination) {
        // 4.10: a workload may always reach itself.
        (Some(source), Some(destination)) if source.name == destination.name => {
            (Some(own_traffic(source)), Some(own_traffic(destination)))
        }
        _ => (
            source.map(|entity| ask(entity, Direction::Egress, flow.destination.address)),
            destination.map(|entity| {
                let judged = ask(entity, Direction::Ingress, flow.source.address);
                let own = entity.labels.get(HOST_LABEL).is_some_and(|host| {
                    world.entities.values().any(|other| is_host_at(other, host, flow.source.address))
                });
                unless_own_host(entity, own, judged)
            }),
        ),
    };
    Explanation::of(egress, ingress)
}

/// Judges a new connection between one of our endpoints and an address, in one direction.
pub fn judge(
    world: &World,
    endpoint: &Entity,
    direction: Direction,
    peer: IpAddr,
    key: PortKey,
    source_port: u16,
) -> Judgement {
    Query { world, endpoint, direction, peer, key, source_port, forwarded: false }.judge()
}

/// Judges a new connection that a host forwards through the interface of one of its endpoints: `peer` is who sends it,
/// where it comes in (ingress), or whom it is for, where it goes out (egress). It passes where no policy is for that.
pub fn judge_forwarded(
    world: &World,
    endpoint: &Entity,
    direction: Direction,
    peer: IpAddr,
    key: PortKey,
    source_port: u16,
) -> Judgement {
    Query { world, endpoint, direction, peer, key, source_port, forwarded: true }.judge()
}

fn own_traffic(endpoint: &Entity) -> Judgement {
    let rule = RuleRef::Builtin { builtin: Builtin::SelfTraffic };
    Judgement {
        workload: Arc::clone(&endpoint.name),
        verdict: Verdict::Allow,
        rule: rule.clone(),
        audit_verdict: Verdict::Allow,
        audit_rule: rule,
        log: false,
        reject: false,
        trace: Vec::new(),
    }
}

/// Whether a policy is for an endpoint (4.2).
pub(crate) fn selects(key: &ObjectKey, policy: &PolicySpec, endpoint: &Entity) -> bool {
    in_namespace(key, endpoint) && matches(&policy.applies_to, &endpoint.labels)
}

/// Whether the peers of a rule match an address of an entity, at an endpoint of the rule's policy.
pub(crate) fn matched_by(
    world: &World,
    policy: &ObjectKey,
    rule: &Rule,
    endpoint: &Entity,
    direction: Direction,
    other: &Entity,
) -> bool {
    let mut addresses = other.prefixes.iter().map(|prefix| prefix.address());
    addresses.any(|peer| {
        // Of services one port is enough: any that the other end serves on.
        let mut keys = other.ports.iter().map(|port| port.key()).chain([0]);
        keys.any(|key| {
            let query = Query { world, endpoint, direction, peer, key, source_port: 0, forwarded: false };
            rule.peers.iter().any(|one| query.peer(policy, one))
        })
    })
}

struct Query<'a> {
    world: &'a World,
    endpoint: &'a Entity,
    direction: Direction,
    peer: IpAddr,
    key: PortKey,
    source_port: u16,
    forwarded: bool,
}

/// Where a walk through the rules ended.
struct Decided {
    verdict: Verdict,
    rule: RuleRef,
    log: bool,
    reject: bool,
}

impl Query<'_> {
    fn judge(&self) -> Judgement {
        let mut trace = Vec::new();
        let enforced = self.walk(false, &mut Vec::new());
        // 4.9: as if every Audit policy were Enforce. Its trace holds all that the first walk saw and more.
        let audit = self.walk(true, &mut trace);
        Judgement {
            workload: Arc::clone(&self.endpoint.name),
            verdict: enforced.verdict,
            rule: enforced.rule,
            audit_verdict: audit.verdict,
            audit_rule: audit.rule,
            log: enforced.log || audit.log,
            reject: enforced.reject,
            trace,
        }
    }

    fn walk(&self, with_audit: bool, trace: &mut Vec<Step>) -> Decided {
        let decided = |verdict, rule, log| Decided { verdict, rule, log, reject: false };
        // 4.11: no policy locks anybody out of a host.
        let fail_safe = self.world.settings.fail_safe.ports(self.direction);
        let has_fail_safe = self.endpoint.is_host_endpoint() && !self.forwarded;
        if has_fail_safe && fail_safe.iter().any(|ports| ports.matches(self.key, &[])) {
            return decided(Verdict::Allow, RuleRef::Builtin { builtin: Builtin::FailSafe }, false);
        }
        let mut log = false;
        let mut tiers: Vec<_> = self.world.tiers.iter().collect();
        tiers.sort_by_key(|(name, spec)| (spec.order, (*name).clone()));
        'tiers: for (tier, spec) in tiers {
            let policies = self.policies_of(tier, with_audit);
            // 4.3: a tier with no policy for this endpoint and direction is skipped.
            if policies.is_empty() {
                continue;
            }
            for (key, policy) in policies {
                for (index, rule) in policy.rules(self.direction).unwrap_or_default().iter().enumerate() {
                    let author = RuleRef::Rule {
                        tier: tier.clone(),
                        policy: key.policy_name(),
                        direction: self.direction,
                        index: u32::try_from(index).unwrap_or(u32::MAX),
                    };
                    let outcome = self.outcome(key, rule);
                    trace.push(Step { rule: author.clone(), audit: policy.mode == Mode::Audit, outcome });
                    // 4.2: first Allow or Deny decides, Pass goes to the next tier, Log continues.
                    match outcome {
                        Outcome::Allow => return decided(Verdict::Allow, author, log || rule.log),
                        Outcome::Deny => {
                            let refused = decided(Verdict::Deny, author, log || rule.log);
                            return Decided { reject: rule.reject, ..refused };
                        }
                        Outcome::Pass => continue 'tiers,
                        Outcome::Log => log = true,
                        Outcome::OtherEndpoint
                        | Outcome::OtherPeer
                        | Outcome::OtherPort
                        | Outcome::OtherSourcePort => {}
                    }
                }
            }
            let author = RuleRef::TierDefault { tier: tier.clone() };
            let outcome = match spec.default_action {
                DefaultAction::Deny => Outcome::Deny,
                DefaultAction::Pass => Outcome::Pass,
            };
            trace.push(Step { rule: author.clone(), audit: false, outcome });
            if spec.default_action == DefaultAction::Deny {
                return decided(Verdict::Deny, author, log);
            }
        }
        // 4.4
        let posture = match self.forwarded {
            true => Verdict::Allow,
            false => self.endpoint.posture.unwrap_or(self.world.settings.default_posture),
        };
        decided(posture, RuleRef::DefaultPosture, log)
    }

    /// 4.2: the policies of a tier that select the endpoint and speak of this direction, in order.
    fn policies_of(&self, tier: &str, with_audit: bool) -> Vec<(&ObjectKey, &PolicySpec)> {
        let mut policies: Vec<_> = self
            .world
            .policies
            .iter()
            .filter(|(_, policy)| policy.tier == tier)
            .filter(|(_, policy)| policy.apply_on_forward || !self.forwarded)
            .filter(|(_, policy)| with_audit || policy.mode == Mode::Enforce)
            .filter(|(_, policy)| policy.is_valid_at(self.world.now))
            .filter(|(_, policy)| policy.rules(self.direction).is_some())
            .filter(|(key, policy)| selects(key, policy, self.endpoint))
            .collect();
        policies.sort_by_key(|(key, policy)| -> (Order, &ObjectKey) { (policy.order, key) });
        policies
    }

    fn outcome(&self, policy: &ObjectKey, rule: &Rule) -> Outcome {
        if !self.own(rule) {
            return Outcome::OtherEndpoint;
        }
        let family = rule.ip_version.is_none_or(|version| version.block().contains_address(self.peer));
        let peer_matches = rule.peers.is_empty() || rule.peers.iter().any(|peer| self.peer(policy, peer));
        if !peer_matches || !family {
            return Outcome::OtherPeer;
        }
        let port = |ports: &[PortMatch]| ports.iter().any(|ports| self.port(ports));
        if (!rule.ports.is_empty() && !port(&rule.ports)) || port(&rule.not_ports) {
            return Outcome::OtherPort;
        }
        if !self.source_port(rule) {
            return Outcome::OtherSourcePort;
        }
        match rule.action {
            Action::Allow => Outcome::Allow,
            Action::Deny => Outcome::Deny,
            Action::Pass => Outcome::Pass,
            Action::Log => Outcome::Log,
        }
    }

    /// What a rule asks of the endpoint itself. Its address is not known here, only that it has the peer's family: if
    /// it has several of that family, all must fit, and to be refused one is enough.
    fn own(&self, rule: &Rule) -> bool {
        let Some(Own { selector, not_selector, cidrs, not_cidrs }) = rule.own.as_deref() else { return true };
        let labels = &self.endpoint.labels;
        let selected = selector.as_ref().is_none_or(|selector| matches(selector, labels))
            && !not_selector.as_ref().is_some_and(|selector| matches(selector, labels));
        let of_family = self.endpoint.prefixes.iter().map(|prefix| prefix.address());
        let mut of_family = of_family.filter(|own| own.is_ipv4() == self.peer.is_ipv4());
        let fits = |own: IpAddr| {
            let in_block = |blocks: &[Prefix]| blocks.iter().any(|block| block.contains_address(own));
            (cidrs.is_empty() || in_block(cidrs)) && !in_block(not_cidrs)
        };
        let addressed = cidrs.is_empty() && not_cidrs.is_empty()
            || if rule.action == Action::Deny { of_family.any(fits) } else { of_family.all(fits) };
        selected && addressed
    }

    /// A rule that asks for the source port never matches what has none.
    fn source_port(&self, rule: &Rule) -> bool {
        let Some(SourcePorts { wanted, excluded }) = rule.source_ports.as_deref() else { return true };
        let among = |ranges: &[PortRange]| ranges.iter().any(|range| range.contains(self.source_port));
        Protocol::of_key(self.key).has_ports() && (wanted.is_empty() || among(wanted)) && !among(excluded)
    }

    /// Named ports are those of the destination: the endpoint itself, or whoever has the other end's address.
    fn port(&self, ports: &PortMatch) -> bool {
        match self.direction {
            Direction::Ingress => ports.matches(self.key, &self.endpoint.ports),
            Direction::Egress => {
                ports.matches(self.key, &[])
                    || self
                        .peer_entities()
                        .filter(|entity| is_selected_by_default(entity))
                        .any(|entity| ports.matches(self.key, &entity.ports))
            }
        }
    }

    /// All criteria that are given must hold.
    fn peer(&self, policy: &ObjectKey, peer: &Peer) -> bool {
        let Peer {
            selector,
            not_selector,
            namespace_selector,
            service_accounts,
            same_labels,
            not_same_labels,
            cidrs,
            not_cidrs,
            network_sets,
            hosts,
            domains,
            services,
        } = peer;
        let known = |condition: &dyn Fn(&Entity) -> bool| self.peer_entities().any(condition);
        let asks_of_workload = selector.is_some()
            || namespace_selector.is_some()
            || !service_accounts.is_empty()
            || !same_labels.is_empty()
            || !not_same_labels.is_empty();
        let selected = !asks_of_workload
            || known(&|entity| {
                self.namespace(policy, namespace_selector.as_ref(), entity)
                    && selector.as_ref().is_none_or(|selector| matches(selector, &entity.labels))
                    && account(service_accounts, entity)
                    && self.same(same_labels, entity)
                    && (not_same_labels.is_empty() || self.not_same(not_same_labels, entity))
                    && (is_selected_by_default(entity)
                        || selector.as_ref().is_some_and(|selector| selector.reads(KIND_LABEL)))
            });
        let in_set = network_sets.as_ref().is_none_or(|sets| {
            known(&|entity| {
                kind(entity) == Some(Kind::NetworkSet.as_str())
                    && in_namespace(policy, entity)
                    && sets.matches(&entity.labels)
            })
        });
        let on_host = hosts.as_ref().is_none_or(|hosts| {
            known(&|entity| kind(entity) == Some(Kind::Host.as_str()) && hosts.matches(&entity.labels))
        });
        let named = domains.is_empty()
            || known(&|entity| {
                let name = entity.labels.get(DOMAIN_LABEL);
                name.is_some_and(|name| domains.iter().any(|pattern| is_name_of(pattern, name)))
            });
        let serves = services.is_empty()
            || known(&|entity| services.iter().any(|service| self.serves(policy, service, entity)));
        let excluded =
            not_selector.as_ref().is_some_and(|selector| known(&|entity| matches(selector, &entity.labels)));
        let in_block = |blocks: &[Prefix]| blocks.iter().any(|block| block.contains_address(self.peer));
        let addressed = (cidrs.is_empty() || in_block(cidrs)) && !in_block(not_cidrs);
        selected && in_set && on_host && named && serves && !excluded && addressed
    }

    /// A backend of a service; for egress on the port that it serves on.
    fn serves(&self, policy: &ObjectKey, service: &ServiceName, entity: &Entity) -> bool {
        let namespace = service.namespace.as_deref().or(policy.namespace.as_deref());
        entity.labels.get(SERVICE_LABEL) == Some(&service.name)
            && entity.labels.get(NAMESPACE_LABEL) == namespace
            && (self.direction == Direction::Ingress
                || entity.ports.iter().any(|port| port.key() == self.key))
    }

    /// In a namespace that the peer asks for; else in the policy's own, if it has one.
    fn namespace(&self, policy: &ObjectKey, selector: Option<&Selector>, entity: &Entity) -> bool {
        match selector {
            None => in_namespace(policy, entity),
            Some(selector) => {
                let mut labels = Labels::new();
                for (key, value) in entity.labels.iter() {
                    if let Some(key) = key.strip_prefix(NAMESPACE_LABELS_PREFIX) {
                        // It was a label before it was inherited.
                        let _ = labels.insert_any(key, value);
                    }
                }
                if entity.labels.get(NAMESPACE_LABEL).is_some() {
                    selector.holds_in_namespace(&labels)
                } else {
                    selector.holds_outside_namespaces()
                }
            }
        }
    }

    fn same(&self, keys: &[String], entity: &Entity) -> bool {
        keys.iter().all(|key| {
            let own = self.endpoint.labels.get(key);
            own.is_some() && entity.labels.get(key) == own
        })
    }

    /// Has all of these labels, as the endpoint has, and differs in at least one.
    fn not_same(&self, keys: &[String], entity: &Entity) -> bool {
        let both = |key: &String| self.endpoint.labels.get(key).is_some() && entity.labels.get(key).is_some();
        keys.iter().all(both)
            && keys.iter().any(|key| self.endpoint.labels.get(key) != entity.labels.get(key))
    }

    /// 4.6: every known entity that has the other end's address.
    fn peer_entities(&self) -> impl Iterator<Item = &Entity> {
        self.world
            .entities
            .values()
            .filter(|entity| entity.prefixes.iter().any(|prefix| prefix.contains_address(self.peer)))
    }
}

pub(crate) fn kind(entity: &Entity) -> Option<&str> {
    entity.labels.get(KIND_LABEL)
}

/// What a selector means that does not ask for the kind: endpoints and network sets.
pub(crate) fn is_selected_by_default(entity: &Entity) -> bool {
    let kinds = [Kind::Workload, Kind::HostEndpoint, Kind::NetworkSet];
    kind(entity).is_none_or(|kind| kinds.iter().any(|one| one.as_str() == kind))
}

/// `*.` stands for one label or more, and not for the name after it.
pub(crate) fn is_name_of(pattern: &str, name: &str) -> bool {
    match pattern.strip_prefix("*.") {
        Some(parent) => name.strip_suffix(parent).is_some_and(|rest| rest.len() > 1 && rest.ends_with('.')),
        None => pattern == name,
    }
}

pub(crate) fn account(accounts: &[String], entity: &Entity) -> bool {
    accounts.is_empty()
        || entity.labels.get(SERVICE_ACCOUNT_LABEL).is_some_and(|own| accounts.iter().any(|one| one == own))
}

/// A policy in a namespace speaks only of entities in that namespace.
pub(crate) fn in_namespace(policy: &ObjectKey, entity: &Entity) -> bool {
    policy.namespace.is_none() || entity.labels.get(NAMESPACE_LABEL) == policy.namespace.as_deref()
}
