//! Label selectors of Kubernetes as Bulkhead's (N6).

use std::sync::Arc;

use crate::document::{Decoder, Node, Value};
use crate::labels::is_label_key;
use crate::policy::LIST_MAX;
use crate::selector::{CompareOp, Expr, Selector};

/// `matchLabels` and `matchExpressions`, all of which must hold; `{}` matches everything.
pub(super) fn label_selector(decoder: &mut Decoder, node: &Node) -> Option<Selector> {
    let mut fields = decoder.fields(node, "a label selector")?;
    let labels = fields.optional(decoder, "matchLabels", match_labels).unwrap_or_default();
    let expressions = fields
        .optional(decoder, "matchExpressions", |decoder, node| decoder.list(node, LIST_MAX, expression));
    fields.finish(decoder);
    let parts = labels.into_iter().chain(expressions.unwrap_or_default());
    Some(Selector::all_of(parts.map(Selector::from_expr)))
}

fn match_labels(decoder: &mut Decoder, node: &Node) -> Option<Vec<Expr>> {
    let Value::Mapping(entries) = &node.value else {
        return decoder.expected(node, "a mapping of labels");
    };
    entries
        .iter()
        .map(|(key, value)| {
            let (label, value) = (label_key(decoder, key), label_value(decoder, value));
            Some(Expr::Compare { label: label?, op: CompareOp::Eq, value: value? })
        })
        .collect()
}

/// A key that a selector's text can name; Kubernetes' own are all such.
pub(super) fn label_key(decoder: &mut Decoder, node: &Node) -> Option<Arc<str>> {
    let key = decoder.scalar_text(node)?;
    if is_label_key(&key) { Some(key.into()) } else { decoder.expected(node, "a label key") }
}

/// A value that a selector's text can name; Kubernetes' own are all such.
fn label_value(decoder: &mut Decoder, node: &Node) -> Option<Arc<str>> {
    let value = decoder.scalar_text(node)?;
    let nameable = !(value.contains('"') && value.contains('\''));
    if nameable {
        Some(value.into())
    } else {
        decoder.expected(node, "a value with one kind of quote at most")
    }
}

fn expression(decoder: &mut Decoder, node: &Node) -> Option<Expr> {
    #[derive(Clone, Copy)]
    enum Operator {
        In,
        NotIn,
        Exists,
        DoesNotExist,
    }
    let mut fields = decoder.fields(node, "an expression with key, operator and values")?;
    let label = fields.required(decoder, "key", label_key);
    let operator = fields.required(decoder, "operator", |decoder, node| {
        let words = [
            ("In", Operator::In),
            ("NotIn", Operator::NotIn),
            ("Exists", Operator::Exists),
            ("DoesNotExist", Operator::DoesNotExist),
        ];
        decoder.word(node, &words)
    });
    let values =
        fields.optional(decoder, "values", |decoder, node| decoder.list(node, LIST_MAX, label_value));
    fields.finish(decoder);
    let label = label?;
    let mut values = values.unwrap_or_default();
    values.sort();
    values.dedup();
    let negated = matches!(operator, Some(Operator::NotIn));
    Some(match operator? {
        Operator::In | Operator::NotIn => Expr::In { label, negated, values },
        Operator::Exists => Expr::Has(label),
        Operator::DoesNotExist => Expr::Not(Box::new(Expr::Has(label))),
    })
}
