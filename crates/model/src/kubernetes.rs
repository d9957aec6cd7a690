//! Kubernetes' own objects, read as Bulkhead's: inventory (Namespace, ServiceAccount, Node, Pod, Service,
//! EndpointSlice) and policies (NetworkPolicy, ClusterNetworkPolicy, AdminNetworkPolicy, BaselineAdminNetworkPolicy).
//!
//! Numbers in comments (N1, C7, A4 …) are those of `docs/kubernetes.md`. Policies become native ones:
//!
//! * a NetworkPolicy is a policy of its namespace in the `application` tier at order 1000 whose rules all allow. The
//!   tier's default action then is the isolation (N1), and since only Allow rules stand there, order does not
//!   matter (N2);
//! * the Admin and Baseline tiers of the cluster-wide kinds are tiers of their own around it that end in Pass (C1, C4).
//!
//! Inventory is read for what it says of identity and ignored otherwise; in policies an unknown field is a problem.

use crate::document::{Decoder, Node, Value};
use crate::kind::Kind;
use crate::meaning::Meaning;
use crate::resource::ObjectKey;

mod cluster;
mod inventory;
mod namespaced;
mod selector;

pub(crate) use namespaced::network_policy_spec;

/// Order of a NetworkPolicy within its tier, as Calico has it.
pub(crate) const NETWORK_POLICY_ORDER: f64 = 1000.0;

/// What an object of Kubernetes stands for.
pub(crate) fn meaning(decoder: &mut Decoder, node: &Node, key: &ObjectKey) -> Option<Meaning> {
    let policy = match key.kind {
        Kind::NetworkPolicy => namespaced::network_policy(decoder, node),
        Kind::ClusterNetworkPolicy => cluster::cluster(decoder, node),
        Kind::AdminNetworkPolicy => cluster::admin(decoder, node),
        Kind::BaselineAdminNetworkPolicy => cluster::baseline(decoder, node),
        _ => return inventory::meaning(node, key),
    };
    Some(Meaning { policies: vec![(key.clone(), policy?)], ..Meaning::default() })
}

/// Takes apart `spec`; the other top-level fields of a policy are checked.
pub(crate) fn spec<T>(
    decoder: &mut Decoder,
    node: &Node,
    decode: impl FnOnce(&mut Decoder, &Node) -> Option<T>,
) -> Option<T> {
    let mut fields = decoder.fields(node, "an object")?;
    for name in ["apiVersion", "kind", "metadata", "status"] {
        fields.optional(decoder, name, |_, _| Some(()));
    }
    let result = fields.required(decoder, "spec", |decoder, node| decode(decoder, node));
    fields.finish(decoder);
    result
}

/// The items of a list that may be absent; `null`, absent and `[]` are one (N4).
fn items(node: Option<&Node>) -> &[Node] {
    match node.map(|node| &node.value) {
        Some(Value::Sequence(items)) => items,
        _ => &[],
    }
}

#[cfg(test)]
mod tests;
