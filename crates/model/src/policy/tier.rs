//! Tiers: where policies stand, and what ends those that decide nothing.

use serde_json::{Map, Value as Json, json};

use super::{Order, order};
use crate::document::{Decoder, Node};

/// The tier of policies that name none.
pub const DEFAULT_TIER: &str = "application";

/// Tier of Kubernetes' cluster-wide policies that come before a namespace's own (C1).
pub const KUBERNETES_ADMIN_TIER: &str = "kubernetes-admin";
/// Tier of Kubernetes' cluster-wide policies that come after a namespace's own (C1).
pub const KUBERNETES_BASELINE_TIER: &str = "kubernetes-baseline";
/// Tier of the rules of Calico's profiles, which come after every tier of Calico.
pub const CALICO_PROFILES_TIER: &str = "calico-profiles";

/// Tiers that exist without being written (DESIGN 4.5): name, order, default action. Those of Kubernetes stand where
/// Calico has them, and end in Pass (C4).
pub const PREDEFINED_TIERS: [(&str, f64, DefaultAction); 7] = [
    ("quarantine", 0.0, DefaultAction::Deny),
    ("admin", 1_000.0, DefaultAction::Deny),
    (KUBERNETES_ADMIN_TIER, 1_000.0, DefaultAction::Pass),
    (DEFAULT_TIER, 1_000_000.0, DefaultAction::Deny),
    ("baseline", 10_000_000.0, DefaultAction::Deny),
    (KUBERNETES_BASELINE_TIER, 10_000_000.0, DefaultAction::Pass),
    (CALICO_PROFILES_TIER, f64::INFINITY, DefaultAction::Pass),
];

/// What ends a tier that applied and in which no rule decided.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum DefaultAction {
    /// The connection is refused.
    Deny,
    /// The next tier is asked.
    Pass,
}

/// `spec` of a Tier.
#[derive(Debug, Clone, PartialEq)]
pub struct TierSpec {
    /// Lower is asked first; ties by name.
    pub order: Order,
    /// What ends it.
    pub default_action: DefaultAction,
}

impl TierSpec {
    pub(crate) fn decode(decoder: &mut Decoder, node: &Node) -> Option<Self> {
        let mut fields = decoder.fields(node, "the tier")?;
        let order = fields.optional(decoder, "order", order).unwrap_or(Order::LAST);
        let default_action = fields.optional(decoder, "defaultAction", |decoder, node| {
            decoder.word(node, &[("Deny", DefaultAction::Deny), ("Pass", DefaultAction::Pass)])
        });
        fields.finish(decoder);
        Some(Self { order, default_action: default_action.unwrap_or(DefaultAction::Deny) })
    }

    pub(crate) fn to_json(&self) -> Json {
        let Self { order, default_action } = self;
        let mut spec = Map::new();
        if order.number().is_some() {
            spec.insert("order".into(), order.to_json());
        }
        let action = match default_action {
            DefaultAction::Deny => "Deny",
            DefaultAction::Pass => "Pass",
        };
        spec.insert("defaultAction".into(), json!(action));
        Json::Object(spec)
    }
}
