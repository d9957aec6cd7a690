//! What can be said of one policy by itself.

use bulkhead_model::policy::{Action, CALICO_PROFILES_TIER, DefaultAction, Mode, PolicySpec, Rule};
use bulkhead_model::suggest::nearest;
use bulkhead_model::{Direction, ObjectKey};

use super::codes::Code;
use super::cover::{any_peer, matches_everything};
use super::ports::any_port;
use super::{Found, rule_path};
use crate::world::World;

pub(super) fn check(world: &World, found: &mut Found) {
    for (key, policy) in &world.policies {
        tier(world, key, policy, found);
        expired(world, key, policy, found);
        for direction in Direction::BOTH {
            let Some(rules) = policy.rules(direction) else { continue };
            open(key, policy, direction, rules, found);
            only_logs(world, key, policy, direction, found);
            redundant_deny(world, key, policy, direction, found);
        }
    }
}

fn tier(world: &World, key: &ObjectKey, policy: &PolicySpec, found: &mut Found) {
    if world.tiers.contains_key(&policy.tier) {
        return;
    }
    let near = nearest(&policy.tier, world.tiers.keys().map(String::as_str));
    let hint = near.map_or_else(String::new, |near| format!("; did you mean {near}?"));
    let message = format!("{}: there is no tier {:?}{hint}", key.policy_name(), policy.tier);
    found.add(Code::UnknownTier, key, "spec.tier", message);
}

fn expired(world: &World, key: &ObjectKey, policy: &PolicySpec, found: &mut Found) {
    if let Some(until) = policy.valid_until.filter(|until| *until <= world.now) {
        let message = format!("{} ended at {until}", key.policy_name());
        found.add(Code::Expired, key, "spec.validUntil", message);
    }
}

/// A profile that allows everything is how Calico says that its policies alone decide.
fn open(key: &ObjectKey, policy: &PolicySpec, direction: Direction, rules: &[Rule], found: &mut Found) {
    if policy.tier == CALICO_PROFILES_TIER {
        return;
    }
    for (index, rule) in rules.iter().enumerate() {
        let open = rule.action == Action::Allow && any_peer(rule) && any_port(rule) && rule.own.is_none();
        if open {
            let side = match direction {
                Direction::Ingress => "from anybody",
                Direction::Egress => "to anybody",
            };
            let message =
                format!("{} {direction}[{index}] allows every connection {side}", key.policy_name());
            found.add(Code::AllowsEverything, key, rule_path(direction, index), message);
        }
    }
}

fn ends_in_deny(world: &World, policy: &PolicySpec) -> bool {
    world.tiers.get(&policy.tier).is_some_and(|tier| tier.default_action == DefaultAction::Deny)
}

fn only_logs(world: &World, key: &ObjectKey, policy: &PolicySpec, direction: Direction, found: &mut Found) {
    let rules = policy.rules(direction).unwrap_or_default();
    let only = !rules.is_empty() && rules.iter().all(|rule| rule.action == Action::Log);
    if only && ends_in_deny(world, policy) {
        let (name, tier) = (key.policy_name(), &policy.tier);
        let message = format!(
            "{name} only logs {direction}: the end of tier {tier} refuses what no other policy allows"
        );
        found.add(Code::OnlyLogs, key, format!("spec.{direction}"), message);
    }
}

fn redundant_deny(
    world: &World,
    key: &ObjectKey,
    policy: &PolicySpec,
    direction: Direction,
    found: &mut Found,
) {
    let rules = policy.rules(direction).unwrap_or_default();
    let Some((rule, before)) = rules.split_last() else { return };
    let silent = !rule.log && !rule.reject;
    let denies = rule.action == Action::Deny && silent && matches_everything(rule);
    if !denies || policy.mode != Mode::Enforce || !ends_in_deny(world, policy) {
        return;
    }
    let last = world.policies.iter().all(|(other, spec)| {
        let after = (spec.order, other) > (policy.order, key);
        spec.tier != policy.tier || !after || spec.rules(direction).is_none()
    });
    if last {
        let (name, tier) = (key.policy_name(), &policy.tier);
        let message =
            format!("{name} {direction}[{}] denies what the end of tier {tier} denies anyway", before.len());
        found.add(Code::RedundantDeny, key, rule_path(direction, before.len()), message);
    }
}
