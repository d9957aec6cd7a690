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

pub(super) fn check(world: &World, found: &mut Found) {
    let mut groups: BTreeMap<(&str, Order), Vec<(&ObjectKey, &PolicySpec)>> = BTreeMap::new();
    for (key, policy) in &world.policies {
        groups.entry((&policy.tier, policy.order)).or_default().push((key, policy));
    }
    let endpoints: Vec<&Entity> = world.entities.values().filter(|entity| entity.is_endpoint()).collect();
    for ((tier, order), policies) in groups {
        for (index, (key, policy)) in policies.iter().enumerate().take(POLICIES_MAX) {
            for (other, with) in policies.iter().take(POLICIES_MAX).skip(index + 1) {
                let Some(direction) = disagree(policy, with) else { continue };
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
fn disagree(one: &PolicySpec, other: &PolicySpec) -> Option<Direction> {
    Direction::BOTH.into_iter().find(|direction| {
        let rules = |policy| deciding(policy, *direction);
        rules(one)
            .any(|rule| rules(other).any(|with| rule.action != with.action && meet_on_a_port(rule, with)))
    })
}

fn deciding(policy: &PolicySpec, direction: Direction) -> impl Iterator<Item = &Rule> {
    let rules = policy.rules(direction).unwrap_or_default();
    rules.iter().take(RULES_MAX).filter(|rule| rule.action != Action::Log)
}

fn meet_on_a_port(one: &Rule, other: &Rule) -> bool {
    let families =
        one.ip_version.is_none() || other.ip_version.is_none() || one.ip_version == other.ip_version;
    families && PortSet::of(one).meets(&PortSet::of(other))
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
