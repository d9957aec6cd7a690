//! Objects of Kubernetes and Calico: kept as they were written, with what they mean to Bulkhead.

use std::sync::Arc;

use serde_json::{Map, Value as Json, json};

use crate::address::Prefix;
use crate::document::{Decoder, Node};
use crate::kind::{Kind, Scope};
use crate::labels::Labels;
use crate::meaning::Meaning;
use crate::resource::{Metadata, NO_NAMESPACE, ObjectKey};
use crate::{calico, kubernetes};

/// The namespace of objects that must have one and name none.
pub const DEFAULT_NAMESPACE: &str = "default";

/// Fields of `metadata` that the system which an object comes from has set, and that mean nothing here.
const SET_BY_SYSTEM: [&str; 7] = [
    "uid",
    "resourceVersion",
    "generation",
    "creationTimestamp",
    "managedFields",
    "selfLink",
    "ownerReferences",
];

/// An object of another system.
#[derive(Debug, Clone, PartialEq)]
pub struct Foreign {
    /// Its kind.
    pub kind: Kind,
    /// Name and labels.
    pub metadata: Metadata,
    /// What was written, without what the other system had set.
    pub manifest: Map<String, Json>,
    /// What it stands for.
    pub meaning: Arc<Meaning>,
}

impl Foreign {
    /// The manifest as it was written, with what the repository set.
    pub(crate) fn to_json(&self) -> Json {
        let mut manifest = self.manifest.clone();
        let Metadata { namespace, resource_version, uid, generation, creation_timestamp, .. } =
            &self.metadata;
        let set = [
            ("namespace", json!(namespace)),
            ("resourceVersion", json!(resource_version)),
            ("uid", json!(uid)),
            ("generation", json!(generation)),
            ("creationTimestamp", json!(creation_timestamp)),
        ];
        if let Some(metadata) = manifest.get_mut("metadata").and_then(Json::as_object_mut) {
            for (name, value) in set.into_iter().filter(|(_, value)| !value.is_null()) {
                metadata.insert(name.into(), value);
            }
        }
        Json::Object(manifest)
    }
}

/// Reads an object whose `apiVersion` and `kind` have been read. What it means is found out at once, so that what
/// cannot be honoured is refused and not kept.
pub(crate) fn decode(decoder: &mut Decoder, node: &Node, kind: Kind) -> Option<Foreign> {
    let metadata = decode_metadata(decoder, node, kind)?;
    let key = ObjectKey { kind, namespace: metadata.namespace.clone(), name: metadata.name.clone() };
    let before = decoder.problems.len();
    let meaning = if calico::knows(kind) {
        calico::meaning(decoder, node, &key)
    } else {
        kubernetes::meaning(decoder, node, &key)
    };
    if decoder.problems.len() > before {
        return None;
    }
    let Json::Object(mut manifest) = node.to_json() else { return None };
    // The addresses of pods and nodes stand there; of anything else it is another system's business.
    if !matches!(kind, Kind::Pod | Kind::Node) {
        manifest.remove("status");
    }
    if let Some(metadata) = manifest.get_mut("metadata").and_then(Json::as_object_mut) {
        metadata.retain(|name, _| !SET_BY_SYSTEM.contains(&name.as_str()));
    }
    Some(Foreign { kind, metadata, manifest, meaning: Arc::new(meaning?) })
}

/// What Bulkhead reads of the metadata of other systems; the rest is kept and not looked at.
fn decode_metadata(decoder: &mut Decoder, node: &Node, kind: Kind) -> Option<Metadata> {
    let Some(metadata) = node.child("metadata") else {
        decoder.problem(node, "the field \"metadata\" is missing");
        return None;
    };
    let name = match metadata.child("name") {
        Some(name) => decoder.within("metadata.name", |decoder| crate::resource::foreign_name(decoder, name)),
        None => {
            decoder.within("metadata", |decoder| {
                decoder.problem(metadata, "the field \"name\" is missing");
            });
            None
        }
    };
    let namespace = match (kind.scope(), metadata.child("namespace")) {
        (Scope::Fleet, _) => None,
        (_, Some(node)) if !matches!(node.as_str(), Some("" | NO_NAMESPACE)) => {
            Some(decoder.within("metadata.namespace", |decoder| crate::resource::name(decoder, node))?)
        }
        (Scope::Namespaced, _) => Some(DEFAULT_NAMESPACE.to_owned()),
        (Scope::Either, _) => None,
    };
    let text = |name| metadata.child(name).and_then(|node: &Node| node.as_str()).map(ToOwned::to_owned);
    Some(Metadata {
        name: name?,
        namespace,
        labels: labels(node),
        annotations: std::collections::BTreeMap::new(),
        resource_version: None,
        uid: text("uid"),
        generation: metadata.child("generation").and_then(|node| node.to_json().as_u64()),
        creation_timestamp: text("creationTimestamp"),
    })
}

/// A block of addresses as other systems read it: bits beyond its length do not count.
pub(crate) fn block(decoder: &mut Decoder, node: &Node) -> Option<Prefix> {
    let text = decoder.string(node)?;
    Prefix::parse_masked(&text).map_err(|error| decoder.problem(node, error.to_string())).ok()
}

/// The labels of an object, those left out that no selector could name.
pub(crate) fn labels(node: &Node) -> Labels {
    let mapping = node.child("metadata").and_then(|metadata| metadata.child("labels"));
    let pairs = mapping.map(Node::entries).unwrap_or_default();
    let pairs = pairs.iter().filter_map(|(key, value)| Some((key.as_str()?, value.as_str()?)));
    Labels::from_foreign(pairs).0
}
