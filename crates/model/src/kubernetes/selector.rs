//! Label selectors of Kubernetes as Bulkhead's (N6).

use std::sync::Arc;

use crate::document::{Decoder, Node, Value};
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
            let (label, value) = (decoder.scalar_text(key)?.into(), decoder.scalar_text(value)?.into());
            Some(Expr::Compare { label, op: CompareOp::Eq, value })
        })
        .collect()
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
    let label: Option<Arc<str>> = fields.required(decoder, "key", Decoder::string).map(Into::into);
    let operator = fields.required(decoder, "operator", |decoder, node| {
        let words = [
            ("In", Operator::In),
            ("NotIn", Operator::NotIn),
            ("Exists", Operator::Exists),
            ("DoesNotExist", Operator::DoesNotExist),
        ];
        decoder.word(node, &words)
    });
    let values = fields.optional(decoder, "values", |decoder, node| {
        decoder.list(node, LIST_MAX, |decoder, node| decoder.scalar_text(node).map(Arc::<str>::from))
    });
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
