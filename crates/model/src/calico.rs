//! Calico's objects of `projectcalico.org/v3`, read as Bulkhead's.

use crate::document::{Decoder, Node};
use crate::kind::Kind;
use crate::meaning::Meaning;
use crate::resource::ObjectKey;

/// Whether a kind is one of Calico's.
pub(crate) fn knows(kind: Kind) -> bool {
    kind.api_version().starts_with("projectcalico.org/")
}

/// What an object of Calico stands for.
pub(crate) fn meaning(decoder: &mut Decoder, node: &Node, key: &ObjectKey) -> Option<Meaning> {
    decoder.problem(node, format!("the kind {} is not supported yet", key.kind));
    None
}
