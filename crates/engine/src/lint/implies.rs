//! Whether one selector implies another. "No" means "not certain".

use std::sync::Arc;

use bulkhead_model::labels::{KIND_LABEL, Labels};
use bulkhead_model::selector::{CompareOp, Expr, TypedOp};
use bulkhead_model::{ObjectKey, Selector};

/// Most comparisons of two parts of selectors: what takes longer is not certain.
const STEPS_MAX: usize = 10_000;

/// Whether every set of labels that `narrow` matches is matched by `wide`. Not for namespace selectors, in which
/// `global()` means something else.
pub(super) fn implies(narrow: &Selector, wide: &Selector) -> bool {
    narrow == wide || holds(narrow.expr(), wide.expr(), &mut 0)
}

/// The same of known entities of all kinds: a selector that does not ask for the kind means some of them only.
pub(super) fn implies_of_entities(narrow: &Selector, wide: &Selector) -> bool {
    implies(narrow, wide) && (!narrow.reads(KIND_LABEL) || wide.reads(KIND_LABEL))
}

/// Whether everything in the namespace of `narrow` (everything, if it is in none) is in that of `wide`.
pub(super) fn namespace_within(narrow: &ObjectKey, wide: &ObjectKey) -> bool {
    wide.namespace.is_none() || wide.namespace == narrow.namespace
}

fn holds(narrow: &Expr, wide: &Expr, steps: &mut usize) -> bool {
    *steps += 1;
    if *steps > STEPS_MAX {
        return false;
    }
    if narrow == wide {
        return true;
    }
    match (narrow, wide) {
        (_, Expr::All | Expr::Global) => true,
        (_, Expr::And(operands)) => operands.iter().all(|operand| holds(narrow, operand, steps)),
        (Expr::Or(operands), _) => operands.iter().all(|operand| holds(operand, wide, steps)),
        _ if atom(narrow, wide) => true,
        (Expr::And(operands), Expr::Or(_)) => {
            operands.iter().any(|operand| holds(operand, wide, steps)) || any_of(narrow, wide, steps)
        }
        (Expr::And(operands), _) => operands.iter().any(|operand| holds(operand, wide, steps)),
        (_, Expr::Or(_)) => any_of(narrow, wide, steps),
        (Expr::Not(narrow), Expr::Not(wide)) => holds(wide, narrow, steps),
        _ => false,
    }
}

fn any_of(narrow: &Expr, wide: &Expr, steps: &mut usize) -> bool {
    let Expr::Or(operands) = wide else { return false };
    operands.iter().any(|operand| holds(narrow, operand, steps))
}

/// What a condition on one label alone implies.
fn atom(narrow: &Expr, wide: &Expr) -> bool {
    // It says which values the label can have: ask them.
    if let Some((label, values)) = values_of(narrow)
        && reads_only(wide, label)
    {
        // Most selectors are of this form, and most pairs of policies are told apart here.
        if let Some((_, wide)) = values_of(wide) {
            return values.iter().all(|value| wide.contains(value));
        }
        return values.iter().all(|value| {
            let mut labels = Labels::new();
            // A value that no label can have is none that matters.
            labels.insert_any(label, value).is_err() || wide.matches(&labels)
        });
    }
    match (narrow, wide) {
        (_, Expr::Has(label)) => requires(narrow, label),
        (
            Expr::In { label, negated: true, values },
            Expr::Compare { label: other, op: CompareOp::Ne, value },
        ) => label == other && values.contains(value),
        (
            Expr::In { label, negated: true, values },
            Expr::In { label: other, negated: true, values: fewer },
        ) => label == other && fewer.iter().all(|value| values.contains(value)),
        (
            Expr::Compare { label, op: CompareOp::Ne, value },
            Expr::In { label: other, negated: true, values },
        ) => label == other && values.iter().all(|one| one == value),
        // What is absent has no value.
        (Expr::Not(absent), wide) => match &**absent {
            Expr::Has(label) => reads_only(wide, label) && wide.matches(&Labels::new()),
            _ => false,
        },
        _ => false,
    }
}

/// The only values that the label can have, where one is asked for.
fn values_of(expr: &Expr) -> Option<(&Arc<str>, &[Arc<str>])> {
    match expr {
        Expr::Compare { label, op: CompareOp::Eq, value } => Some((label, std::slice::from_ref(value))),
        Expr::In { label, negated: false, values } => Some((label, values)),
        _ => None,
    }
}

/// Whether it asks about this label and nothing else.
fn reads_only(expr: &Expr, wanted: &str) -> bool {
    match expr {
        Expr::All | Expr::Global => true,
        Expr::Has(label)
        | Expr::Compare { label, .. }
        | Expr::Typed { label, .. }
        | Expr::In { label, .. } => &**label == wanted,
        Expr::Not(operand) => reads_only(operand, wanted),
        Expr::And(operands) | Expr::Or(operands) => operands.iter().all(|one| reads_only(one, wanted)),
    }
}

/// Whether it holds only where the label is there.
fn requires(expr: &Expr, wanted: &str) -> bool {
    match expr {
        Expr::Has(label) => &**label == wanted,
        Expr::Compare { label, op, .. } => &**label == wanted && *op != CompareOp::Ne,
        Expr::Typed { label, op, .. } => &**label == wanted && *op != TypedOp::Ne,
        Expr::In { label, negated, .. } => &**label == wanted && !negated,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn certain(narrow: &str, wide: &str) -> bool {
        implies(&Selector::parse(narrow).unwrap(), &Selector::parse(wide).unwrap())
    }

    #[test]
    fn sees_what_is_plain_and_claims_nothing_else() {
        for (narrow, wide) in [
            ("a == '1'", "all()"),
            ("a == '1'", "has(a)"),
            ("a == '1'", "a != '2'"),
            ("a == '1'", "a in {'1', '2'}"),
            ("a in {'1', '2'}", "a not in {'3'}"),
            ("a == '10'", "a > 3 && a starts with '1'"),
            ("a == '1' && b == '2'", "b == '2'"),
            ("a == '1' && b == '2'", "b == '2' && has(a)"),
            ("a == '1'", "b == '1' || has(a)"),
            ("a == '1' || a == '2'", "a in {'2', '1'}"),
            ("!has(a)", "a != '1'"),
            ("!has(a)", "!(a == '1')"),
            ("a not in {'1', '2'}", "a != '1'"),
            ("a > 3", "has(a)"),
        ] {
            assert!(certain(narrow, wide), "{narrow} => {wide}");
        }
        for (narrow, wide) in [
            ("all()", "has(a)"),
            ("has(a)", "a == '1'"),
            ("a != '1'", "has(a)"),
            ("a in {'1', '3'}", "a in {'1', '2'}"),
            ("a == '1' || b == '2'", "a == '1'"),
            ("a > 3", "a > 5"),
        ] {
            assert!(!certain(narrow, wide), "{narrow} => {wide}");
        }
    }

    fn expr() -> impl Strategy<Value = String> {
        let atoms = [
            "a == '1'",
            "a != '1'",
            "a in {'1', '2'}",
            "a not in {'1', '2'}",
            "has(a)",
            "a > 1",
            "a contains '1'",
            "b == '1'",
            "b != '2'",
            "has(b)",
            "all()",
        ];
        let leaf = prop::sample::select(atoms.to_vec()).prop_map(ToOwned::to_owned);
        leaf.prop_recursive(3, 12, 3, |inner| {
            prop_oneof![
                inner.clone().prop_map(|one| format!("!({one})")),
                (inner.clone(), inner.clone()).prop_map(|(one, two)| format!("({one} && {two})")),
                (inner.clone(), inner).prop_map(|(one, two)| format!("({one} || {two})")),
            ]
        })
    }

    proptest! {
        #[test]
        fn what_is_claimed_holds_for_all_labels(narrow in expr(), wide in expr()) {
            let (narrow, wide) = (Selector::parse(&narrow).unwrap(), Selector::parse(&wide).unwrap());
            if implies(&narrow, &wide) {
                let values = [None, Some("0"), Some("1"), Some("2"), Some("3"), Some("21")];
                for (a, b) in values.iter().flat_map(|a| values.iter().map(move |b| (a, b))) {
                    let mut labels = Labels::new();
                    for (key, value) in [("a", a), ("b", b)] {
                        if let Some(value) = value {
                            labels.insert(key, value).unwrap();
                        }
                    }
                    prop_assert!(!narrow.matches(&labels) || wide.matches(&labels), "{narrow} => {wide}: {labels:?}");
                }
            }
        }
    }
}
