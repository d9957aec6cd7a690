//! Calico's objects of `projectcalico.org/v3`, read as Bulkhead's.
//!
//! * Policies are policies of the tier of the same name; Calico's `default` is `application`, which has the same
//!   order and default action, and its fixed tiers for Kubernetes' cluster-wide policies are Bulkhead's own.
//! * Staged policies are policies in Audit mode.
//! * A profile is a policy of the tier `calico-profiles`, which comes after all others, for the endpoints that list
//!   it, one for each place in the list. Where no profile decides, Calico's endpoints refuse.
//! * Automatic labels have other names here (`projectcalico.org/namespace`, `pcns.…`): selectors are rewritten.
//!
//! What has no counterpart yet is refused by name.

use crate::document::{Decoder, Node, Value};
use crate::kind::Kind;
use crate::meaning::Meaning;
use crate::resource::ObjectKey;

mod endpoints;
mod policies;
mod rules;
mod selectors;

/// Most profiles of one endpoint.
pub const PROFILES_MAX: usize = 8;

/// Whether a kind is one of Calico's.
pub(crate) fn knows(kind: Kind) -> bool {
    kind.api_version().starts_with("projectcalico.org/")
}

/// What an object of Calico stands for.
pub(crate) fn meaning(decoder: &mut Decoder, node: &Node, key: &ObjectKey) -> Option<Meaning> {
    match key.kind {
        Kind::CalicoTier => policies::tier(decoder, node, key),
        Kind::CalicoNetworkSet | Kind::GlobalNetworkSet => endpoints::network_set(decoder, node, key),
        Kind::CalicoHostEndpoint => endpoints::host_endpoint(decoder, node, key),
        Kind::WorkloadEndpoint => endpoints::workload_endpoint(decoder, node, key),
        Kind::Profile => policies::profile(decoder, node, key),
        _ => policies::policy(decoder, node, key),
    }
}

/// A switch whose default is off, which may be written but not set.
fn only_off(decoder: &mut Decoder, node: &Node, why: &str) -> Option<()> {
    match node.value {
        Value::Bool(false) => Some(()),
        Value::Bool(true) => {
            decoder.problem(node, why);
            None
        }
        _ => decoder.expected(node, "true or false"),
    }
}
