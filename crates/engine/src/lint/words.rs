//! The labels and values that selectors and peers speak of.

use std::sync::Arc;

use bulkhead_model::policy::Peer;
use bulkhead_model::selector::{CompareOp, Expr};

/// Every label that a selector reads, with the values that it is compared with as a whole.
pub(super) fn compared(expr: &Expr) -> Vec<(&str, &[Arc<str>])> {
    match expr {
        Expr::All | Expr::Global => Vec::new(),
        Expr::Has(label) | Expr::Typed { label, .. } => vec![(label, &[])],
        Expr::Compare { label, op: CompareOp::Eq | CompareOp::Ne, value } => {
            vec![(label, std::slice::from_ref(value))]
        }
        Expr::Compare { label, .. } => vec![(label, &[])],
        Expr::In { label, values, .. } => vec![(label, values)],
        Expr::Not(operand) => compared(operand),
        Expr::And(operands) | Expr::Or(operands) => operands.iter().flat_map(compared).collect(),
    }
}

/// The labels that the other end must have in any case.
pub(super) fn labels_of(peer: &Peer) -> impl Iterator<Item = &str> {
    peer.same_labels.iter().chain(&peer.not_same_labels).map(String::as_str)
}
