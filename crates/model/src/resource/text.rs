//! Resources as JSON text.
//!
//! Workloads are by far the most that a repository reads and writes, thousands a second. They are read and written without a
//! document in between, which is where their time would go; whatever is unusual about one is left to the reader of documents,
//! which also says what is wrong.

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value as Json;

use super::{API_VERSION, Metadata, NO_NAMESPACE, Resource, Workload, is_name};
use crate::document::{Decoder, Node, Problem};
use crate::entity::{ADDRESSES_MAX, WorkloadSpec, named_port_from_json, named_port_to_json};
use crate::facts::Facts;
use crate::kind::Kind;
use crate::labels::{LABELS_MAX, Labels};

/// Most list items that are read here.
const LIST_LEN_MAX: usize = 64;

/// A workload as it is mostly written.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct Manifest<'a> {
    api_version: &'a str,
    kind: &'a str,
    #[serde(borrow)]
    metadata: ManifestMetadata<'a>,
    #[serde(borrow)]
    spec: ManifestSpec<'a>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct ManifestMetadata<'a> {
    name: &'a str,
    #[serde(default, deserialize_with = "present")]
    namespace: Option<&'a str>,
    #[serde(borrow, default)]
    labels: BTreeMap<&'a str, &'a str>,
    #[serde(default)]
    annotations: BTreeMap<String, String>,
    #[serde(default, deserialize_with = "present")]
    resource_version: Option<String>,
    #[serde(default, deserialize_with = "present")]
    uid: Option<String>,
    #[serde(default, deserialize_with = "present")]
    generation: Option<u64>,
    #[serde(default, deserialize_with = "present")]
    creation_timestamp: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct ManifestSpec<'a> {
    host: &'a str,
    #[serde(default)]
    addresses: Vec<IpAddr>,
    #[serde(default, deserialize_with = "present")]
    interface: Option<String>,
    #[serde(default, deserialize_with = "present")]
    source: Option<String>,
    #[serde(default)]
    ports: Vec<Json>,
    #[serde(default, deserialize_with = "present")]
    service_account: Option<String>,
    #[serde(default)]
    facts: Option<Json>,
}

/// Not `null`, of which the reader of documents knows what it means.
fn present<'de, D: Deserializer<'de>, T: Deserialize<'de>>(deserializer: D) -> Result<Option<T>, D::Error> {
    T::deserialize(deserializer).map(Some)
}

/// Larger than what is written of most workloads.
const USUAL_BYTES: usize = 512;

/// What is written of a workload.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Written<'a> {
    api_version: &'a str,
    kind: &'a str,
    metadata: &'a Metadata,
    spec: WrittenSpec<'a>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct WrittenSpec<'a> {
    addresses: &'a [IpAddr],
    #[serde(skip_serializing_if = "Option::is_none")]
    facts: Option<Json>,
    host: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    interface: Option<&'a str>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    ports: Vec<Json>,
    #[serde(skip_serializing_if = "Option::is_none")]
    service_account: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    source: Option<&'a str>,
}

/// A workload that has nothing unusual about it; `None` does not say that it is wrong.
fn usual_workload(text: &[u8]) -> Option<Workload> {
    let Manifest { api_version, kind, metadata, spec } = serde_json::from_slice(text).ok()?;
    let names = [Some(metadata.name), metadata.namespace, Some(spec.host), spec.service_account.as_deref()];
    let usual = api_version == API_VERSION
        && kind == Kind::Workload.as_str()
        && names.into_iter().flatten().all(is_name)
        && metadata.namespace != Some(NO_NAMESPACE)
        && metadata.labels.len() <= LABELS_MAX
        && spec.addresses.len() <= ADDRESSES_MAX
        && spec.ports.len() <= LIST_LEN_MAX;
    if !usual {
        return None;
    }
    let mut labels = Labels::new();
    for (key, value) in &metadata.labels {
        labels.insert(key, value).ok()?;
    }
    let facts = match &spec.facts {
        Some(facts) => usual_facts(facts)?,
        None => Facts::new(),
    };
    let ports: Result<_, _> = spec.ports.iter().map(named_port_from_json).collect();
    Some(Workload {
        metadata: Metadata {
            name: metadata.name.to_owned(),
            namespace: metadata.namespace.map(ToOwned::to_owned),
            labels,
            annotations: metadata.annotations,
            resource_version: metadata.resource_version,
            uid: metadata.uid,
            generation: metadata.generation,
            creation_timestamp: metadata.creation_timestamp,
        },
        spec: WorkloadSpec {
            host: spec.host.to_owned(),
            addresses: spec.addresses,
            interface: spec.interface,
            source: spec.source,
            ports: ports.ok()?,
            service_account: spec.service_account,
            facts,
        },
    })
}

fn usual_facts(json: &Json) -> Option<Facts> {
    let mut decoder = Decoder::new("facts");
    let facts = Facts::decode(&mut decoder, &Node::from_json(json))?;
    decoder.problems.is_empty().then_some(facts)
}

impl Resource {
    /// From JSON text that a program made, as [`Resource::from_json`].
    ///
    /// # Errors
    /// Every problem found, without positions; one if it is no JSON.
    pub fn from_json_text(text: &[u8]) -> Result<Self, Vec<Problem>> {
        if let Some(workload) = usual_workload(text) {
            return Ok(Self::Workload(workload));
        }
        match serde_json::from_slice(text) {
            Ok(json) => Self::from_json(&json),
            Err(error) => Err(vec![Problem {
                source: "object".into(),
                line: 0,
                column: 0,
                path: String::new(),
                message: format!("not JSON: {error}"),
                suggestion: None,
            }]),
        }
    }

    /// The text of [`Resource::to_json`].
    pub fn to_json_text(&self) -> String {
        let Self::Workload(Workload { metadata, spec }) = self else { return self.to_json().to_string() };
        let written = Written {
            api_version: API_VERSION,
            kind: Kind::Workload.as_str(),
            metadata,
            spec: WrittenSpec {
                addresses: &spec.addresses,
                facts: (!spec.facts.is_empty()).then(|| spec.facts.to_json()),
                host: &spec.host,
                interface: spec.interface.as_deref(),
                ports: spec.ports.iter().map(named_port_to_json).collect(),
                service_account: spec.service_account.as_deref(),
                source: spec.source.as_deref(),
            },
        };
        let mut text = Vec::with_capacity(USUAL_BYTES);
        // Nothing in it can fail to be written; a document says the same.
        match serde_json::to_writer(&mut text, &written).map(|()| String::from_utf8(text)) {
            Ok(Ok(mut text)) => {
                // It is kept for as long as the workload is.
                text.shrink_to_fit();
                text
            }
            Ok(Err(_)) | Err(_) => self.to_json().to_string(),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    /// Ordinary values, and some that are not, of each field.
    fn manifest() -> impl Strategy<Value = Json> {
        let text = || {
            prop_oneof![
                4 => prop_oneof![Just("a"), Just("web.h1"), Just("10.0.0.1"), Just("fd00::1")].prop_map(|text| json!(text)),
                1 => prop_oneof![
                    Just(json!("_")), Just(json!("A b")), Just(json!("x\ny")), Just(json!("bulkhead.dev/name")), Just(json!("")),
                    Just(json!(7)), Just(json!(true)), Just(Json::Null), Just(json!([])), Just(json!({})), Just(json!(1.5)),
                ],
            ]
        };
        let list = |item: BoxedStrategy<Json>| prop_oneof![4 => prop::collection::vec(item, 0..3).prop_map(Json::from), 1 => text()];
        let pairs = || {
            let key = prop_oneof![Just("app"), Just("os"), Just("bulkhead.dev/name"), Just("a b")];
            let pairs = prop::collection::vec((key, text()), 0..3);
            let map = pairs
                .prop_map(|pairs| pairs.into_iter().map(|(key, value)| (key.to_owned(), value)).collect());
            prop_oneof![4 => map, 1 => text()]
        };
        let port = (text(), text(), prop_oneof![Just(json!(80)), Just(json!(0)), text()]);
        let port =
            port.prop_map(|(name, protocol, port)| json!({"name": name, "protocol": protocol, "port": port}));
        let fields = |names: &'static [&'static str], values: Vec<BoxedStrategy<Json>>| {
            let values: Vec<_> = values.into_iter().map(|value| prop::option::weighted(0.6, value)).collect();
            values.prop_map(move |values| {
                let pairs = names.iter().zip(values);
                pairs.filter_map(|(name, value)| Some(((*name).to_owned(), value?))).collect::<Json>()
            })
        };
        let metadata = fields(
            &[
                "namespace",
                "labels",
                "annotations",
                "uid",
                "generation",
                "resourceVersion",
                "creationTimestamp",
                "other",
            ],
            vec![
                text().boxed(),
                pairs().boxed(),
                pairs().boxed(),
                text().boxed(),
                prop_oneof![Just(json!(3)), text()].boxed(),
                text().boxed(),
                text().boxed(),
                text().boxed(),
            ],
        );
        let spec = fields(
            &["addresses", "interface", "source", "ports", "serviceAccount", "facts"],
            vec![
                list(text().boxed()).boxed(),
                text().boxed(),
                text().boxed(),
                list(port.boxed()).boxed(),
                text().boxed(),
                pairs().boxed(),
            ],
        );
        let kind = prop_oneof![9 => Just("Workload"), 1 => Just("Host")];
        (kind, text(), text(), metadata, spec).prop_map(|(kind, name, host, mut metadata, mut spec)| {
            metadata["name"] = name;
            spec["host"] = host;
            json!({"apiVersion": API_VERSION, "kind": kind, "metadata": metadata, "spec": spec})
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4000))]
        #[test]
        fn both_readers_and_both_writers_say_the_same(manifest in manifest()) {
            let text = manifest.to_string();
            let document = Resource::from_json(&manifest);
            if let Some(workload) = usual_workload(text.as_bytes()) {
                prop_assert_eq!(Ok(&Resource::Workload(workload)), document.as_ref());
            }
            prop_assert_eq!(&Resource::from_json_text(text.as_bytes()), &document);
            if let Ok(resource) = document {
                let written = resource.to_json_text();
                prop_assert_eq!(serde_json::from_str::<Json>(&written).unwrap(), resource.to_json());
            }
        }
    }

    #[test]
    fn what_agents_publish_is_read_without_a_document() {
        let text = br#"{"apiVersion":"bulkhead.dev/v1","kind":"Workload",
            "metadata":{"name":"web.h1","namespace":"shop","labels":{"app":"web"},"annotations":{"a":"b"}},
            "spec":{"host":"h1","addresses":["10.0.0.1","fd00::1"],"interface":"veth1","source":"docker",
            "ports":[{"name":"http","protocol":"tcp","port":80}],"serviceAccount":"web","facts":{"os.kernel":"6.18"}}}"#;
        assert!(usual_workload(text).is_some());
        assert!(Resource::from_json_text(b"{").is_err());
    }
}
