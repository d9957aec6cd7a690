//! Policies whose names decide who is asked first.

use std::collections::BTreeMap;

use bulkhead_model::policy::{Action, Order, PolicySpec, Rule};
use bulkhead_model::{Direction, Entity, ObjectKey};

use super::Found;
use super::codes::Code;
use super::implies::implies;
use super::ports::PortSet;
use crate::decide::selects;
use crate::world::World;

/// Most policies of one tier and order that are compared with each other.
const POLICIES_MAX: usize = 500;
/// Most rules of a policy that are compared with another's.
const RULES_MAX: usize = 200;

/// Rules of one direction that decide, with their ports.
type Deciding<'a> = Vec<(&'a Rule, PortSet<'a>)>;

pub(super) fn check(world: &World, found: &mut Found) {
    let mut groups: BTreeMap<(&str, Order), Vec<(&ObjectKey, &PolicySpec)>> = BTreeMap::new();
    for (key, policy) in &world.policies {
        groups.entry((&policy.tier, policy.order)).or_default().push((key, policy));
    }
    let endpoints: Vec<&Entity> = world.entities.values().filter(|entity| entity.is_endpoint()).collect();
    for ((tier, order), mut policies) in groups {
        policies.truncate(POLICIES_MAX);
        let rules: Vec<[Deciding<'_>; 2]> =
            policies.iter().map(|(_, policy)| Direction::BOTH.map(|of| deciding(policy, of))).collect();
        for (index, (key, policy)) in policies.iter().enumerate() {
            for (number, (other, with)) in policies.iter().enumerate().skip(index + 1) {
                let Some(direction) = disagree(&rules[index], &rules[number]) else { continue };
                if meet(&endpoints, (key, policy), (other, with)) {
                    let (name, other) = (key.policy_name(), other.policy_name());
                    let order =
                        order.number().map_or_else(|| "no order".into(), |order| format!("order {order}"));
                    let message = format!(
                        "{name} and {other} of tier {tier} both have {order} and disagree about {direction}: their names decide"
                    );
                    found.add(Code::OrderUndefined, key, "spec.order", message);
                }
            }
        }
    }
}

/// A direction in which rules of different action may meet.
fn disagree(one: &[Deciding<'_>; 2], other: &[Deciding<'_>; 2]) -> Option<Direction> {
    let pairs = Direction::BOTH.into_iter().zip(one.iter().zip(other));
    let mut disagreeing = pairs.filter(|(_, (one, other))| {
        one.iter().any(|rule| other.iter().any(|with| rule.0.action != with.0.action && may_meet(rule, with)))
    });
    disagreeing.next().map(|(direction, _)| direction)
}

fn deciding(policy: &PolicySpec, direction: Direction) -> Deciding<'_> {
    let rules = policy.rules(direction).unwrap_or_default().iter().take(RULES_MAX);
    rules.filter(|rule| rule.action != Action::Log).map(|rule| (rule, PortSet::of(rule))).collect()
}

fn may_meet((one, ports): &(&Rule, PortSet<'_>), (other, others): &(&Rule, PortSet<'_>)) -> bool {
    let families =
        one.ip_version.is_none() || other.ip_version.is_none() || one.ip_version == other.ip_version;
    families && ports.meets(others)
}

/// Whether both are for a common endpoint: one of the inventory or, without one, whatever the narrower selects.
fn meet(endpoints: &[&Entity], one: (&ObjectKey, &PolicySpec), other: (&ObjectKey, &PolicySpec)) -> bool {
    if endpoints.is_empty() {
        let namespaces = one.0.namespace == other.0.namespace;
        let (one, other) = (&one.1.applies_to, &other.1.applies_to);
        return namespaces && (implies(one, other) || implies(other, one));
    }
    endpoints.iter().any(|entity| selects(one.0, one.1, entity) && selects(other.0, other.1, entity))
}
