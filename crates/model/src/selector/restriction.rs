//! What every match of a selector must have: the handle by which indexes find selectors and endpoints.

use std::sync::Arc;

use super::{CompareOp, Expr, TypedOp};

/// A necessary condition on one label.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Restriction {
    /// No such condition is known.
    None,
    /// Nothing can match.
    Nothing,
    /// The label must be present.
    Present(Arc<str>),
    /// The label must have one of these values (sorted).
    OneOf(Arc<str>, Vec<Arc<str>>),
}

impl Restriction {
    /// Smaller is better for an index.
    fn cost(&self) -> usize {
        match self {
            Self::Nothing => 0,
            Self::OneOf(_, values) => values.len(),
            Self::Present(_) => 1 << 16,
            Self::None => usize::MAX,
        }
    }

    fn label(&self) -> Option<&Arc<str>> {
        match self {
            Self::Present(label) | Self::OneOf(label, _) => Some(label),
            Self::None | Self::Nothing => None,
        }
    }

    /// What holds if this or `other` does.
    fn or(self, other: Self) -> Self {
        match (self, other) {
            (Self::Nothing, other) | (other, Self::Nothing) => other,
            (Self::OneOf(label, mut values), Self::OneOf(other, more)) if label == other => {
                values.extend(more);
                values.sort();
                values.dedup();
                Self::OneOf(label, values)
            }
            (one, other) => match (one.label(), other.label()) {
                (Some(label), Some(same)) if label == same => Self::Present(Arc::clone(label)),
                _ => Self::None,
            },
        }
    }
}

pub(super) fn of(expr: &Expr) -> Restriction {
    match expr {
        Expr::All | Expr::Global | Expr::Not(_) => Restriction::None,
        Expr::Has(label) => Restriction::Present(Arc::clone(label)),
        Expr::Compare { label, op, value } => match op {
            CompareOp::Eq => Restriction::OneOf(Arc::clone(label), vec![Arc::clone(value)]),
            CompareOp::Ne => Restriction::None,
            CompareOp::Contains | CompareOp::StartsWith | CompareOp::EndsWith => {
                Restriction::Present(Arc::clone(label))
            }
        },
        // Numbers and versions have more texts than one, so equality names no values either.
        Expr::Typed { op: TypedOp::Ne, .. } => Restriction::None,
        Expr::Typed { label, .. } => Restriction::Present(Arc::clone(label)),
        Expr::In { negated: true, .. } => Restriction::None,
        Expr::In { values, .. } if values.is_empty() => Restriction::Nothing,
        Expr::In { label, values, .. } => Restriction::OneOf(Arc::clone(label), values.clone()),
        Expr::And(operands) => {
            operands.iter().map(of).min_by_key(Restriction::cost).unwrap_or(Restriction::None)
        }
        Expr::Or(operands) => operands.iter().map(of).reduce(Restriction::or).unwrap_or(Restriction::Nothing),
    }
}
