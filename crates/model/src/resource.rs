//! The objects that people write and the repository keeps: `apiVersion: bulkhead.dev/v1`.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::{Value as Json, json};

use crate::document::{Decoder, Fields, Node, Problem, Value};
use crate::entity::{HostSpec, NetworkSetSpec, WorkloadSpec};
use crate::labels::{LABELS_MAX, Labels};
use crate::policy::{PolicySpec, TierSpec};
use crate::suggest::nearest;

/// API group and version of every resource.
pub const API_VERSION: &str = "bulkhead.dev/v1";
/// Longest name of an object or a namespace.
pub const NAME_LEN_MAX: usize = 253;

/// The kinds of resources.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Kind {
    /// Ordered group of policies.
    Tier,
    /// Rules bound to endpoints by a selector.
    Policy,
    /// Labelled list of address blocks outside the fleet.
    NetworkSet,
    /// Anything with addresses and labels that runs on a host. Written by agents.
    Workload,
    /// A machine with an agent. Written by the controller.
    Host,
}

impl Kind {
    /// All kinds, in the order in which they are applied.
    pub const ALL: [Self; 5] = [Self::Tier, Self::NetworkSet, Self::Policy, Self::Host, Self::Workload];

    /// As in `kind:`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Tier => "Tier",
            Self::Policy => "Policy",
            Self::NetworkSet => "NetworkSet",
            Self::Workload => "Workload",
            Self::Host => "Host",
        }
    }

    /// As in URLs.
    pub fn plural(self) -> &'static str {
        match self {
            Self::Tier => "tiers",
            Self::Policy => "policies",
            Self::NetworkSet => "networksets",
            Self::Workload => "workloads",
            Self::Host => "hosts",
        }
    }

    /// Short forms for the command line.
    pub fn short(self) -> &'static [&'static str] {
        match self {
            Self::Tier => &[],
            Self::Policy => &["pol"],
            Self::NetworkSet => &["netset", "ns"],
            Self::Workload => &["wl"],
            Self::Host => &[],
        }
    }

    /// From any spelling: kind, singular, plural or short form, in any case.
    pub fn parse(text: &str) -> Option<Self> {
        let lower = text.to_ascii_lowercase();
        Self::ALL.into_iter().find(|kind| {
            lower == kind.as_str().to_ascii_lowercase()
                || lower == kind.plural()
                || kind.short().contains(&lower.as_str())
        })
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What names an object.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ObjectKey {
    /// Kind.
    pub kind: Kind,
    /// Namespace, if it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    /// Name, unique within kind and namespace.
    pub name: String,
}

impl ObjectKey {
    /// `namespace/name`, or just the name.
    pub fn qualified_name(&self) -> String {
        match &self.namespace {
            Some(namespace) => format!("{namespace}/{}", self.name),
            None => self.name.clone(),
        }
    }
}

impl fmt::Display for ObjectKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.kind, self.qualified_name())
    }
}

/// What every object carries.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Metadata {
    /// Name.
    pub name: String,
    /// Namespace, if it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    /// Labels.
    #[serde(default, skip_serializing_if = "Labels::is_empty")]
    pub labels: Labels,
    /// Free texts that nothing selects on.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
    /// Set by the repository: the revision that last changed it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resource_version: Option<String>,
    /// Set by the repository: unique in space and time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uid: Option<String>,
    /// Set by the repository: rises with each change of `spec`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub generation: Option<u64>,
    /// Set by the repository, RFC 3339.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub creation_timestamp: Option<String>,
}

/// An object: metadata and a spec of its kind.
#[derive(Debug, Clone, PartialEq)]
pub struct Object<S> {
    /// Name and labels.
    pub metadata: Metadata,
    /// The rest.
    pub spec: S,
}

/// Ordered group of policies.
pub type Tier = Object<TierSpec>;
/// Rules bound to endpoints by a selector.
pub type Policy = Object<PolicySpec>;
/// Labelled list of address blocks outside the fleet.
pub type NetworkSet = Object<NetworkSetSpec>;
/// Anything with addresses and labels that runs on a host.
pub type Workload = Object<WorkloadSpec>;
/// A machine with an agent.
pub type Host = Object<HostSpec>;

/// Any object.
#[derive(Debug, Clone, PartialEq)]
pub enum Resource {
    /// See [`Tier`].
    Tier(Tier),
    /// See [`Policy`].
    Policy(Policy),
    /// See [`NetworkSet`].
    NetworkSet(NetworkSet),
    /// See [`Workload`].
    Workload(Workload),
    /// See [`Host`].
    Host(Host),
}

impl Resource {
    /// Its kind.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Tier(_) => Kind::Tier,
            Self::Policy(_) => Kind::Policy,
            Self::NetworkSet(_) => Kind::NetworkSet,
            Self::Workload(_) => Kind::Workload,
            Self::Host(_) => Kind::Host,
        }
    }

    /// Its metadata.
    pub fn metadata(&self) -> &Metadata {
        match self {
            Self::Tier(object) => &object.metadata,
            Self::Policy(object) => &object.metadata,
            Self::NetworkSet(object) => &object.metadata,
            Self::Workload(object) => &object.metadata,
            Self::Host(object) => &object.metadata,
        }
    }

    /// Its metadata, to be changed.
    pub fn metadata_mut(&mut self) -> &mut Metadata {
        match self {
            Self::Tier(object) => &mut object.metadata,
            Self::Policy(object) => &mut object.metadata,
            Self::NetworkSet(object) => &mut object.metadata,
            Self::Workload(object) => &mut object.metadata,
            Self::Host(object) => &mut object.metadata,
        }
    }

    /// What names it.
    pub fn key(&self) -> ObjectKey {
        let metadata = self.metadata();
        ObjectKey { kind: self.kind(), namespace: metadata.namespace.clone(), name: metadata.name.clone() }
    }

    /// The manifest form: what a person would write, plus what the repository set.
    pub fn to_json(&self) -> Json {
        let spec = match self {
            Self::Tier(object) => object.spec.to_json(),
            Self::Policy(object) => object.spec.to_json(),
            Self::NetworkSet(object) => object.spec.to_json(),
            Self::Workload(object) => object.spec.to_json(),
            Self::Host(object) => object.spec.to_json(),
        };
        json!({
            "apiVersion": API_VERSION,
            "kind": self.kind().as_str(),
            "metadata": self.metadata(),
            "spec": spec,
        })
    }

    /// Whether labels, annotations and spec say the same, whatever the repository set.
    pub fn says_the_same(&self, other: &Self) -> bool {
        let plain = |resource: &Self| {
            let mut plain = resource.clone();
            let metadata = plain.metadata_mut();
            metadata.resource_version = None;
            metadata.uid = None;
            metadata.generation = None;
            metadata.creation_timestamp = None;
            plain
        };
        plain(self) == plain(other)
    }

    /// From the manifest form.
    ///
    /// # Errors
    /// With every problem found.
    pub fn from_json(value: &Json) -> Result<Self, Vec<Problem>> {
        crate::document::from_value("object", value)
    }
}

/// Turns a node into a resource, or notes why not.
pub(crate) fn decode(decoder: &mut Decoder, node: &Node) -> Option<Resource> {
    let mut fields = decoder.fields(node, "an object with apiVersion, kind, metadata and spec")?;
    let version = fields.required(decoder, "apiVersion", |decoder, node| {
        let version = decoder.string(node)?;
        if version == API_VERSION {
            return Some(());
        }
        decoder.problem_at(
            node.position,
            format!("expected {API_VERSION:?}, found {version:?}"),
            Some(API_VERSION.into()),
        );
        None
    });
    let kind = fields.required(decoder, "kind", |decoder, node| {
        let words: Vec<_> = Kind::ALL.iter().map(|kind| (kind.as_str(), *kind)).collect();
        decoder.word(node, &words)
    });
    // Without them there is no telling which fields are right.
    let ((), kind) = (version?, kind?);
    let metadata = fields.required(decoder, "metadata", |decoder, node| decode_metadata(decoder, node, kind));
    fields.optional(decoder, "status", |_, _| Some(()));
    let resource = match kind {
        Kind::Tier => object(decoder, &mut fields, metadata, TierSpec::decode).map(Resource::Tier),
        Kind::Policy => object(decoder, &mut fields, metadata, PolicySpec::decode).map(Resource::Policy),
        Kind::NetworkSet => {
            object(decoder, &mut fields, metadata, NetworkSetSpec::decode).map(Resource::NetworkSet)
        }
        Kind::Workload => {
            object(decoder, &mut fields, metadata, WorkloadSpec::decode).map(Resource::Workload)
        }
        Kind::Host => object(decoder, &mut fields, metadata, HostSpec::decode).map(Resource::Host),
    };
    fields.finish(decoder);
    resource
}

fn object<S>(
    decoder: &mut Decoder,
    fields: &mut Fields<'_>,
    metadata: Option<Metadata>,
    decode: impl FnOnce(&mut Decoder, &Node) -> Option<S>,
) -> Option<Object<S>> {
    let spec = fields.required(decoder, "spec", decode);
    Some(Object { metadata: metadata?, spec: spec? })
}

fn decode_metadata(decoder: &mut Decoder, node: &Node, kind: Kind) -> Option<Metadata> {
    let mut fields = decoder.fields(node, "metadata")?;
    let name = fields.required(decoder, "name", name);
    let namespace = fields.optional(decoder, "namespace", |decoder, node| {
        if matches!(kind, Kind::Tier | Kind::Host) {
            decoder.problem(node, format!("a {kind} has no namespace"));
            return None;
        }
        self::name(decoder, node)
    });
    let labels = fields.optional(decoder, "labels", decode_labels).unwrap_or_default();
    let annotations = fields.optional(decoder, "annotations", decode_annotations).unwrap_or_default();
    let resource_version = fields.optional(decoder, "resourceVersion", Decoder::scalar_text);
    let uid = fields.optional(decoder, "uid", Decoder::scalar_text);
    let generation =
        fields.optional(decoder, "generation", |decoder, node| decoder.number(node, "a whole number"));
    let creation_timestamp = fields.optional(decoder, "creationTimestamp", Decoder::scalar_text);
    fields.finish(decoder);
    Some(Metadata {
        name: name?,
        namespace,
        labels,
        annotations,
        resource_version,
        uid,
        generation,
        creation_timestamp,
    })
}

/// A DNS-1123 subdomain, as Kubernetes asks for.
pub(crate) fn name(decoder: &mut Decoder, node: &Node) -> Option<String> {
    let text = decoder.scalar_text(node)?;
    if is_name(&text) {
        return Some(text);
    }
    let repaired: String = text
        .to_ascii_lowercase()
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() || c == '.' { c } else { '-' })
        .collect();
    let repaired = repaired.trim_matches(['-', '.']);
    let suggestion = is_name(repaired).then(|| repaired.to_owned());
    decoder.problem_at(
        node.position,
        format!(
            "expected a name of at most {NAME_LEN_MAX} lower-case letters, digits, '-' and '.', \
             beginning and ending with a letter or digit, found {}",
            node.describe()
        ),
        suggestion,
    );
    None
}

/// Whether a text can name an object.
pub fn is_name(text: &str) -> bool {
    let part = |part: &str| {
        !part.is_empty()
            && part.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
            && !part.starts_with('-')
            && !part.ends_with('-')
    };
    text.len() <= NAME_LEN_MAX && text.split('.').all(part)
}

pub(crate) fn decode_labels(decoder: &mut Decoder, node: &Node) -> Option<Labels> {
    let mut labels = Labels::new();
    for (key, value) in string_pairs(decoder, node)? {
        if labels.len() >= LABELS_MAX {
            decoder.problem(node, format!("at most {LABELS_MAX} labels are allowed"));
            return None;
        }
        // The automatic labels may come back from the repository's own output only as labels it made:
        // they are never stored, so a user's are refused here.
        if let Err(error) = labels.insert(&key, &value) {
            decoder.problem(node, error.to_string());
        }
    }
    Some(labels)
}

fn decode_annotations(decoder: &mut Decoder, node: &Node) -> Option<BTreeMap<String, String>> {
    Some(string_pairs(decoder, node)?.into_iter().collect())
}

fn string_pairs(decoder: &mut Decoder, node: &Node) -> Option<Vec<(String, String)>> {
    let Value::Mapping(entries) = &node.value else {
        return decoder.expected(node, "a mapping of texts to texts");
    };
    let mut pairs: Vec<(String, String)> = Vec::new();
    let mut known = BTreeSet::new();
    for (key_node, value) in entries {
        let key = decoder.scalar_text(key_node)?;
        if !known.insert(key.clone()) {
            decoder.problem(key_node, format!("{key:?} is given twice"));
            return None;
        }
        let value = decoder.within(&key, |decoder| decoder.scalar_text(value))?;
        pairs.push((key, value));
    }
    Some(pairs)
}

/// The known name nearest to a wrong one; for callers that know the names in use.
pub fn nearest_name<'a>(wrong: &str, known: impl IntoIterator<Item = &'a str>) -> Option<String> {
    nearest(wrong, known).map(Into::into)
}

#[cfg(test)]
mod tests;
