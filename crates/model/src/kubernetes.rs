//! Kubernetes' own objects, read as Bulkhead's: inventory (Namespace, Node, Pod) and policies (NetworkPolicy,
//! ClusterNetworkPolicy, AdminNetworkPolicy, BaselineAdminNetworkPolicy).
//!
//! Numbers in comments (N1, C7, A4 …) are those of `docs/kubernetes.md`. Policies become native ones:
//!
//! * a NetworkPolicy is a policy of its namespace in the `application` tier at order 1000 whose rules all allow. The
//!   tier's default action then is the isolation (N1), and since only Allow rules stand there, order does not
//!   matter (N2);
//! * the Admin and Baseline tiers of the cluster-wide kinds are tiers of their own around it that end in Pass (C1, C4).
//!
//! Inventory is read for what it says of identity and ignored otherwise; in policies an unknown field is a problem.

use std::collections::BTreeMap;
use std::net::IpAddr;

use crate::document::{Decoder, Node, Problem, Value};
use crate::entity::Entity;
use crate::labels::Labels;
use crate::policy::{DefaultAction, Order, PolicySpec, TierSpec};
use crate::resource::{Kind, ObjectKey};

mod cluster;
mod inventory;
mod namespaced;
mod selector;

/// Tier of cluster-wide policies that come before a namespace's own.
pub const ADMIN_TIER: &str = "kubernetes-admin";
/// Tier of cluster-wide policies that come after a namespace's own.
pub const BASELINE_TIER: &str = "kubernetes-baseline";
/// Order of a NetworkPolicy within its tier, as Calico has it.
pub const NETWORK_POLICY_ORDER: f64 = 1000.0;

/// The two tiers that cluster-wide policies need; both end in Pass.
pub fn tiers() -> [(&'static str, TierSpec); 2] {
    let spec = |order| TierSpec { order: Order::new(order), default_action: DefaultAction::Pass };
    [(ADMIN_TIER, spec(999_000.0)), (BASELINE_TIER, spec(10_000_001.0))]
}

/// Addresses of DNS names, for policies that name them.
pub type Names = BTreeMap<String, Vec<IpAddr>>;

/// What one Kubernetes object is to Bulkhead.
#[derive(Debug, Clone, PartialEq)]
pub enum Object {
    /// A namespace and its labels.
    Namespace(String, Labels),
    /// A pod with addresses of its own. Its namespace's labels are not in it yet.
    Pod(Entity),
    /// A pod on its node's network: `namespace/name` and the addresses. It is no workload (N14, C7).
    HostPod(String, Vec<IpAddr>),
    /// A node.
    Node(Entity),
    /// A policy.
    Policy(ObjectKey, PolicySpec),
}

/// Reads one object.
///
/// # Errors
/// With every problem found; also for a kind that is not known here.
pub fn read(source: &str, node: &Node, names: &Names) -> Result<Object, Vec<Problem>> {
    let mut decoder = Decoder::new(source);
    match decode(&mut decoder, node, names) {
        Some(object) if decoder.problems.is_empty() => Ok(object),
        _ => Err(decoder.problems),
    }
}

fn decode(decoder: &mut Decoder, node: &Node, names: &Names) -> Option<Object> {
    let text = |name| node.child(name).and_then(Node::as_str).unwrap_or_default();
    let version = text("apiVersion");
    let group = version.split_once('/').map_or("", |(group, _)| group);
    match (group, text("kind")) {
        ("", "Namespace") => inventory::namespace(decoder, node),
        ("", "Node") => inventory::node(decoder, node),
        ("", "Pod") => inventory::pod(decoder, node),
        ("networking.k8s.io", "NetworkPolicy") => namespaced::network_policy(decoder, node),
        ("policy.networking.k8s.io", "ClusterNetworkPolicy") => cluster::cluster(decoder, node, names),
        ("policy.networking.k8s.io", "AdminNetworkPolicy") => cluster::admin(decoder, node, names),
        ("policy.networking.k8s.io", "BaselineAdminNetworkPolicy") => cluster::baseline(decoder, node, names),
        (_, kind) => {
            decoder.problem(node, format!("the kind {kind:?} of {version:?} is not supported yet"));
            None
        }
    }
}

/// `metadata.name` and `metadata.namespace` of a policy; other metadata is not looked at.
fn metadata(decoder: &mut Decoder, node: &Node) -> Option<(String, Option<String>)> {
    let Some(metadata) = node.child("metadata") else {
        decoder.problem(node, "the field \"metadata\" is missing");
        return None;
    };
    let text = |name| metadata.child(name).and_then(Node::as_str).map(ToOwned::to_owned);
    let name = text("name");
    if name.is_none() {
        decoder.problem(metadata, "the field \"name\" is missing");
    }
    Some((name?, text("namespace")))
}

/// The key of a policy that came from a Kubernetes kind; the kind keeps it apart from native ones.
fn policy_key(kind: &str, namespace: Option<String>, name: &str) -> ObjectKey {
    ObjectKey { kind: Kind::Policy, namespace, name: format!("{kind}.{name}") }
}

/// Takes apart `spec`; the other top-level fields of a policy are checked.
fn spec<T>(
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
