//! Dead rules, in words.

use bulkhead_model::ObjectKey;

use super::codes::Code;
use super::dead::{Dead, Why, rules};
use super::{Found, object_of, rule_path};
use crate::world::World;

/// Answers whether everything was looked at.
pub(super) fn check(world: &World, found: &mut Found) -> bool {
    let (dead, complete) = rules(world);
    for group in dead.chunk_by(same_reason) {
        let Some(first) = group.first() else { continue };
        let path = rule_path(first.direction, first.index);
        let (code, message) = described(first, group.len());
        found.add(code, first.policy, path, message);
    }
    complete
}

/// Rules one after the other behind one and the same thing are told once.
fn same_reason(one: &Dead<'_>, next: &Dead<'_>) -> bool {
    let told_once = matches!(one.why, Why::AfterEverything(_) | Why::TierEnds(..));
    told_once && one.why == next.why && one.policy == next.policy && one.direction == next.direction
}

fn described(dead: &Dead<'_>, count: usize) -> (Code, String) {
    let Dead { policy, direction, index, why } = dead;
    let name = policy.policy_name();
    let these = match count {
        1 => format!("{name} {direction}[{index}] is never reached"),
        _ => format!("{name} {direction}[{index}] to [{}] are never reached", index + count - 1),
    };
    match why {
        Why::Duplicate(earlier) => (
            Code::DuplicateRule,
            format!("{name} {direction}[{index}] says the same as {direction}[{earlier}]"),
        ),
        Why::AfterEverything(earlier) => {
            (Code::UnreachableRule, format!("{these}: {direction}[{earlier}] decides everything"))
        }
        Why::TierEnds(tier, earlier) => {
            let earlier = earlier.policy_name();
            let message =
                format!("{these}: {earlier} is for all of its endpoints, and its tier {tier} ends in Deny");
            (Code::UnreachableRule, message)
        }
        Why::Shadowed(by) => {
            let by: Vec<String> = by.iter().map(|(key, number)| author(policy, key, *number, dead)).collect();
            (
                Code::ShadowedRule,
                format!("{these}: {} decide{} all that it matches", by.join(" and "), plural(&by)),
            )
        }
    }
}

fn plural(by: &[String]) -> &'static str {
    if by.len() == 1 { "s" } else { "" }
}

/// Another policy is named, and the own one is not.
fn author(policy: &ObjectKey, key: &ObjectKey, number: usize, dead: &Dead<'_>) -> String {
    let place = format!("{}[{number}]", dead.direction);
    if object_of(key) == object_of(policy) { place } else { format!("{} {place}", key.policy_name()) }
}
