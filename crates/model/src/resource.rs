//! The objects that people write and the repository keeps: `apiVersion: bulkhead.dev/v1`.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::{Value as Json, json};

use crate::document::{Decoder, Fields, Node, Problem, Value};
use crate::entity::{HostEndpointSpec, HostSpec, NetworkSetSpec, WorkloadSpec};
use crate::foreign::{self, Foreign};
use crate::kind::Scope;
pub use crate::kind::{API_VERSION, Kind};
use crate::labels::{LABELS_MAX, Labels};
use crate::policy::{PolicySpec, TierSpec};
use crate::roles::RoleBindingSpec;
use crate::settings::{NameTableSpec, NamespaceSpec, SETTINGS_NAME, SettingsSpec};
use crate::suggest::nearest;

mod text;

/// Longest name of an object or a namespace.
pub const NAME_LEN_MAX: usize = 253;

/// Stands for the namespace of what is in none, wherever one must be named; never the name of one, since names have no
/// underscore. In manifests it says the same as no namespace.
pub const NO_NAMESPACE: &str = "_";

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
    /// What a policy of this key is called in verdicts: like [`ObjectKey::qualified_name`] if it is one of ours, with the
    /// kind before it if it is another system's.
    pub fn policy_name(&self) -> String {
        let name = if self.kind == Kind::Policy { self.qualified_name() } else { self.to_string() };
        // Several policies of one object bear its name.
        name.split('#').next().unwrap_or_default().to_owned()
    }

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
/// A host's own interfaces as a subject of policy.
pub type HostEndpoint = Object<HostEndpointSpec>;
/// A name space for workloads and policies.
pub type Namespace = Object<NamespaceSpec>;
/// What holds for the whole repository.
pub type Settings = Object<SettingsSpec>;
/// Addresses of DNS names.
pub type NameTable = Object<NameTableSpec>;

/// Who may do what with the repository.
pub type RoleBinding = Object<RoleBindingSpec>;

macro_rules! own_kinds {
    ($($kind:ident: $spec:ty),* $(,)?) => {
        /// Any object.
        #[derive(Debug, Clone, PartialEq)]
        pub enum Resource {
            $(
                #[doc = concat!("See [`", stringify!($kind), "`].")]
                $kind($kind),
            )*
            /// An object of Kubernetes or Calico.
            Foreign(Foreign),
        }

        impl Resource {
            /// Its kind.
            pub fn kind(&self) -> Kind {
                match self {
                    $(Self::$kind(_) => Kind::$kind,)*
                    Self::Foreign(foreign) => foreign.kind,
                }
            }

            /// Its metadata.
            pub fn metadata(&self) -> &Metadata {
                match self {
                    $(Self::$kind(object) => &object.metadata,)*
                    Self::Foreign(foreign) => &foreign.metadata,
                }
            }

            /// Its metadata, to be changed.
            pub fn metadata_mut(&mut self) -> &mut Metadata {
                match self {
                    $(Self::$kind(object) => &mut object.metadata,)*
                    Self::Foreign(foreign) => &mut foreign.metadata,
                }
            }

            /// The manifest form: what a person would write, plus what the repository set.
            pub fn to_json(&self) -> Json {
                let spec = match self {
                    $(Self::$kind(object) => object.spec.to_json(),)*
                    Self::Foreign(foreign) => return foreign.to_json(),
                };
                json!({
                    "apiVersion": API_VERSION,
                    "kind": self.kind().as_str(),
                    "metadata": self.metadata(),
                    "spec": spec,
                })
            }
        }

        fn decode_own(
            decoder: &mut Decoder,
            fields: &mut Fields<'_>,
            metadata: Option<Metadata>,
            kind: Kind,
        ) -> Option<Resource> {
            match kind {
                $(Kind::$kind => object(decoder, fields, metadata, kind, <$spec>::decode).map(Resource::$kind),)*
                _ => None,
            }
        }
    };
}

own_kinds! {
    Settings: SettingsSpec,
    Tier: TierSpec,
    Namespace: NamespaceSpec,
    NetworkSet: NetworkSetSpec,
    NameTable: NameTableSpec,
    Policy: PolicySpec,
    HostEndpoint: HostEndpointSpec,
    Host: HostSpec,
    Workload: WorkloadSpec,
    RoleBinding: RoleBindingSpec,
}

impl Resource {
    /// What names it.
    pub fn key(&self) -> ObjectKey {
        let metadata = self.metadata();
        ObjectKey { kind: self.kind(), namespace: metadata.namespace.clone(), name: metadata.name.clone() }
    }

    /// Name of the interface that a host endpoint is about, if it names one; `*` stands for all.
    pub fn host_interface(&self) -> Option<&str> {
        match self {
            Self::HostEndpoint(endpoint) => endpoint.spec.interface.as_deref(),
            Self::Foreign(foreign) if foreign.kind == Kind::CalicoHostEndpoint => {
                let name = foreign.manifest.get("spec")?.get("interfaceName")?.as_str()?;
                (!name.is_empty()).then_some(name)
            }
            _ => None,
        }
    }

    /// Whether labels, annotations and spec say the same, whatever the repository set.
    pub fn says_the_same(&self, other: &Self) -> bool {
        if let (Self::Workload(one), Self::Workload(two)) = (self, other) {
            // By far the most, and without copies.
            let (before, after) = (&one.metadata, &two.metadata);
            return one.spec == two.spec
                && (&before.name, &before.namespace) == (&after.name, &after.namespace)
                && (&before.labels, &before.annotations) == (&after.labels, &after.annotations);
        }
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
        if Kind::of_api_version(&version).next().is_some() {
            return Some(version);
        }
        let suggestion = nearest(&version, Kind::api_versions()).map(Into::into);
        let known: Vec<_> = Kind::api_versions().collect();
        let message = format!("expected one of {}, found {version:?}", known.join(", "));
        decoder.problem_at(node.position, message, suggestion);
        None
    });
    let kind = fields.required(decoder, "kind", |decoder, node| {
        let version = version.as_deref()?;
        let text = decoder.string(node)?;
        let words: Vec<_> = Kind::of_api_version(version).map(|kind| (kind.manifest_kind(), kind)).collect();
        let elsewhere: Vec<_> = Kind::ALL
            .iter()
            .filter(|kind| kind.manifest_kind() == text)
            .map(|kind| kind.api_version())
            .collect();
        let here = words.iter().any(|(word, _)| *word == text);
        if let (false, Some(first)) = (here, elsewhere.first()) {
            let message = format!("{text} is a kind of {}, not of {version:?}", elsewhere.join(" and of "));
            decoder.problem_at(node.position, message, Some(format!("apiVersion: {first}")));
            return None;
        }
        decoder.word(node, &words)
    });
    // Without it there is no telling which fields are right.
    let kind = kind?;
    if !kind.is_own() {
        return foreign::decode(decoder, node, kind).map(Resource::Foreign);
    }
    let metadata = fields.required(decoder, "metadata", |decoder, node| decode_metadata(decoder, node, kind));
    fields.optional(decoder, "status", |_, _| Some(()));
    let resource = decode_own(decoder, &mut fields, metadata, kind);
    fields.finish(decoder);
    if let Some(Resource::Policy(policy)) = &resource
        && policy.metadata.namespace.is_none()
        && let Some(service) = policy.spec.services().find(|service| service.namespace.is_none())
    {
        let message = format!(
            "the service {:?} needs its namespace, like default/{}: this policy is in none",
            service.name, service.name
        );
        decoder.problem(node.child("spec").unwrap_or(node), message);
        return None;
    }
    resource
}

fn object<S>(
    decoder: &mut Decoder,
    fields: &mut Fields<'_>,
    metadata: Option<Metadata>,
    kind: Kind,
    decode: impl FnOnce(&mut Decoder, &Node) -> Option<S>,
) -> Option<Object<S>> {
    // Where every field may be left out, so may all of them together.
    let spec = if kind == Kind::Namespace && !fields.has("spec") {
        fields.optional(decoder, "spec", |_, _| None::<S>);
        decode(decoder, &Node { position: fields.position(), value: Value::Mapping(Vec::new()) })
    } else {
        fields.required(decoder, "spec", decode)
    };
    Some(Object { metadata: metadata?, spec: spec? })
}

fn decode_metadata(decoder: &mut Decoder, node: &Node, kind: Kind) -> Option<Metadata> {
    let mut fields = decoder.fields(node, "metadata")?;
    let name = fields.required(decoder, "name", |decoder, node| {
        let name = name(decoder, node)?;
        if kind == Kind::Settings && name != SETTINGS_NAME {
            let message = format!("there is one Settings object, {SETTINGS_NAME:?}; found {name:?}");
            decoder.problem_at(node.position, message, Some(SETTINGS_NAME.into()));
            return None;
        }
        Some(name)
    });
    let namespace = fields.optional(decoder, "namespace", |decoder, node| {
        if kind.scope() == Scope::Fleet {
            decoder.problem(node, format!("a {kind} has no namespace"));
            return None;
        }
        if node.as_str() == Some(NO_NAMESPACE) {
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
    // Kept beside the objects: what somebody else read of it is not to be written back.
    fields.optional(decoder, "managedFields", |_, _| Some(()));
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

/// A name that another system has accepted: like ours, but Calico puts upper case and Kubernetes RBAC-like names
/// into some; a path or a selector must still be able to hold it.
pub(crate) fn foreign_name(decoder: &mut Decoder, node: &Node) -> Option<String> {
    let text = decoder.scalar_text(node)?;
    let fits = (1..=NAME_LEN_MAX).contains(&text.len())
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b':'));
    if fits {
        return Some(text);
    }
    decoder.expected(node, "a name of letters, digits, '-', '.' and '_'")
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
