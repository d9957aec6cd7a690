//! What a plan that does not fit is made of: pure.

use std::collections::BTreeMap;

use bulkhead_dataplane::DataplaneError;
use bulkhead_model::RuleRef;
use bulkhead_model::host_policy::{HostPolicy, RuleId};

/// The error, and for a plan that does not fit the policy that most of it comes from.
pub(super) fn explain(error: &DataplaneError, plan: &HostPolicy) -> String {
    if !matches!(error, DataplaneError::Capacity { .. }) {
        return error.to_string();
    }
    match costliest(plan) {
        Some((policy, steps, all)) => {
            format!("{error}; {policy} costs most: {steps} of the {all} steps of all rows here")
        }
        None => error.to_string(),
    }
}

/// The policy that decides the most steps of all rows, how many, and how many there are.
fn costliest(plan: &HostPolicy) -> Option<(String, usize, usize)> {
    let mut by_rule: BTreeMap<RuleId, usize> = BTreeMap::new();
    for compiled in plan.policies.values() {
        for row in compiled.rows.values().chain([&compiled.default_row]) {
            for column in row.variants().flat_map(|(_, columns)| columns.iter()) {
                *by_rule.entry(column.cell.rule).or_default() += 1;
            }
        }
    }
    let mut by_policy: BTreeMap<String, usize> = BTreeMap::new();
    for (rule, steps) in &by_rule {
        if let Some(RuleRef::Rule { tier, policy, .. }) = plan.rules.get(rule) {
            *by_policy.entry(format!("{tier}/{policy}")).or_default() += steps;
        }
    }
    let (policy, most) = by_policy.into_iter().max_by_key(|(_, steps)| *steps)?;
    Some((policy, most, by_rule.values().sum()))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use bulkhead_model::host_policy::{Cell, ClassId, Column, CompiledId, CompiledPolicy, Row};
    use bulkhead_model::{Direction, Verdict};

    use super::*;

    #[test]
    fn the_policy_that_costs_most_is_named() {
        let cell = |rule| Cell {
            verdict: Verdict::Allow,
            rule: RuleId(rule),
            audit_verdict: Verdict::Allow,
            audit_rule: RuleId(rule),
            log: false,
            reject: false,
            written: true,
        };
        let column = |first, rule| Column { first, cell: cell(rule) };
        let row =
            |steps: &[(u32, u32)]| Arc::new(Row::new(steps.iter().map(|(at, rule)| column(*at, *rule))));
        let rule = |policy: &str, index| RuleRef::Rule {
            tier: "application".into(),
            policy: policy.into(),
            direction: Direction::Ingress,
            index,
        };
        let rules = [(10, rule("small", 0)), (11, rule("large", 0)), (12, rule("large", 1))];
        let id = CompiledId(1);
        let rows = [(ClassId(1), row(&[(0, 11), (80, 12), (81, 11), (90, 10)]))].into();
        let plan = HostPolicy {
            rules: rules.map(|(id, rule)| (RuleId(id), rule)).into(),
            policies: [(id, CompiledPolicy { id, default_row: row(&[(0, 99)]), rows })].into(),
            ..HostPolicy::default()
        };
        let error = DataplaneError::Capacity { table: "steps", needed: 5, capacity: 4 };
        let text = explain(&error, &plan);
        assert!(text.ends_with("application/large costs most: 3 of the 5 steps of all rows here"), "{text}");
        let other = DataplaneError::Inconsistent("x".into());
        assert_eq!(explain(&other, &plan), other.to_string());
        assert_eq!(explain(&error, &HostPolicy::default()), error.to_string());
    }
}
