//! Selectors of Calico in terms of Bulkhead's automatic labels.

use std::sync::Arc;

use crate::document::{Decoder, Node};
use crate::labels::{
    NAMESPACE_LABEL, NAMESPACE_LABELS_PREFIX, SERVICE_ACCOUNT_LABEL, SERVICE_ACCOUNT_LABELS_PREFIX,
};
use crate::policy::selector;
use crate::selector::{Expr, Selector};

/// A selector over endpoints and network sets; an empty text is none.
pub(super) fn of_endpoints(decoder: &mut Decoder, node: &Node) -> Option<Selector> {
    written(decoder, node).map(|selector| selector.map_labels(endpoint_label, &Expr::Global))
}

/// A selector over namespaces, asked of what is in them. As in Calico, what is in no namespace has none of their
/// labels, and `global()` means just that.
pub(super) fn of_namespaces(decoder: &mut Decoder, node: &Node) -> Option<Selector> {
    let selector = written(decoder, node)?;
    let inside = Expr::Has(NAMESPACE_LABEL.into());
    if *selector.expr() == Expr::All {
        return Some(Selector::from_expr(inside));
    }
    let outside = Expr::Not(Box::new(inside));
    let label = |label: &str| match label {
        "projectcalico.org/name" | "kubernetes.io/metadata.name" => NAMESPACE_LABEL.into(),
        _ => prefixed(NAMESPACE_LABELS_PREFIX, label),
    };
    Some(selector.map_labels(label, &outside))
}

/// A selector over service accounts, asked of what runs under them.
pub(super) fn of_service_accounts(decoder: &mut Decoder, node: &Node) -> Option<Selector> {
    let selector = written(decoder, node)?;
    if *selector.expr() == Expr::All {
        return Some(Selector::from_expr(Expr::Has(SERVICE_ACCOUNT_LABEL.into())));
    }
    let label = |label: &str| match label {
        "projectcalico.org/name" => SERVICE_ACCOUNT_LABEL.into(),
        _ => prefixed(SERVICE_ACCOUNT_LABELS_PREFIX, label),
    };
    Some(selector.map_labels(label, &Expr::Global))
}

fn written(decoder: &mut Decoder, node: &Node) -> Option<Selector> {
    // Programs write fields out that people leave out.
    if node.as_str().is_some_and(|text| text.trim().is_empty()) {
        return None;
    }
    selector(decoder, node)
}

fn endpoint_label(label: &str) -> Arc<str> {
    match label {
        "projectcalico.org/namespace" => NAMESPACE_LABEL.into(),
        "projectcalico.org/serviceaccount" => SERVICE_ACCOUNT_LABEL.into(),
        _ => match (label.strip_prefix("pcns."), label.strip_prefix("pcsa.")) {
            (Some("projectcalico.org/name" | "kubernetes.io/metadata.name"), _) => NAMESPACE_LABEL.into(),
            (Some(key), _) => prefixed(NAMESPACE_LABELS_PREFIX, key),
            (_, Some("projectcalico.org/name")) => SERVICE_ACCOUNT_LABEL.into(),
            (_, Some(key)) => prefixed(SERVICE_ACCOUNT_LABELS_PREFIX, key),
            (None, None) => label.into(),
        },
    }
}

fn prefixed(prefix: &str, label: &str) -> Arc<str> {
    format!("{prefix}{label}").into()
}
