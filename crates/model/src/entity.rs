//! Things with addresses: workloads, hosts and network sets, and what selectors see of them.

use std::net::IpAddr;
use std::sync::Arc;

use serde_json::{Map, Value as Json, json};

use crate::address::Prefix;
use crate::document::{Decoder, Node};
use crate::labels::{HOST_LABEL, KIND_LABEL, Labels, NAME_LABEL, NAMESPACE_LABEL};
use crate::policy::blocks;
use crate::resource::{Kind, Resource};

/// Most addresses of one workload.
pub const ADDRESSES_MAX: usize = 256;

/// `spec` of a NetworkSet.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NetworkSetSpec {
    /// Its blocks.
    pub cidrs: Vec<Prefix>,
}

/// `spec` of a Workload.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct WorkloadSpec {
    /// Name of the host that it runs on.
    pub host: String,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// Host-side interface, for people; only the host's own agent uses it.
    pub interface: Option<String>,
    /// Who found it: `docker`, `file` or `manual`.
    pub source: Option<String>,
}

/// `spec` of a Host.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HostSpec {
    /// Version of its agent.
    pub agent_version: Option<String>,
}

/// What a selector is evaluated on: labels (the automatic ones included) and the addresses they stand for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entity {
    /// `Kind/name` or `Kind/namespace/name`.
    pub name: Arc<str>,
    /// Own and automatic labels.
    pub labels: Labels,
    /// Addresses and blocks.
    pub prefixes: Vec<Prefix>,
    /// Host of a workload.
    pub host: Option<Arc<str>>,
}

impl Entity {
    /// The entity that a resource is; policies, tiers and hosts are none.
    pub fn of(resource: &Resource) -> Option<Self> {
        let (prefixes, host) = match resource {
            Resource::Workload(workload) => {
                let prefixes = workload.spec.addresses.iter().copied().map(Prefix::host).collect();
                (prefixes, Some(workload.spec.host.as_str()))
            }
            Resource::NetworkSet(set) => (set.spec.cidrs.clone(), None),
            Resource::Tier(_) | Resource::Policy(_) | Resource::Host(_) => return None,
        };
        let metadata = resource.metadata();
        Some(Self {
            name: resource.key().to_string().into(),
            labels: with_automatic_labels(
                &metadata.labels,
                resource.kind(),
                metadata.namespace.as_deref(),
                &metadata.name,
                host,
            ),
            prefixes,
            host: host.map(Into::into),
        })
    }
}

/// An object's own labels and the automatic ones.
pub fn with_automatic_labels(
    own: &Labels,
    kind: Kind,
    namespace: Option<&str>,
    name: &str,
    host: Option<&str>,
) -> Labels {
    let mut labels = own.clone();
    let automatic = [
        (KIND_LABEL, Some(kind.as_str())),
        (NAMESPACE_LABEL, namespace),
        (NAME_LABEL, Some(name)),
        (HOST_LABEL, host),
    ];
    for (key, value) in automatic {
        if let Some(value) = value {
            // Names are validated, so they are acceptable values; were one not, it is left out.
            let _ = labels.insert_any(key, value);
        }
    }
    labels
}

impl NetworkSetSpec {
    pub(crate) fn decode(decoder: &mut Decoder, node: &Node) -> Option<Self> {
        let mut fields = decoder.fields(node, "the network set")?;
        let cidrs = fields.required(decoder, "cidrs", blocks);
        fields.refuse(decoder, "domains", "this field is not supported yet");
        fields.finish(decoder);
        Some(Self { cidrs: cidrs? })
    }

    pub(crate) fn to_json(&self) -> Json {
        let Self { cidrs } = self;
        json!({ "cidrs": cidrs })
    }
}

impl WorkloadSpec {
    pub(crate) fn decode(decoder: &mut Decoder, node: &Node) -> Option<Self> {
        let mut fields = decoder.fields(node, "the workload")?;
        let host = fields.required(decoder, "host", crate::resource::name);
        let addresses = fields.optional(decoder, "addresses", |decoder, node| {
            decoder.list(node, ADDRESSES_MAX, Decoder::parsed)
        });
        let interface = fields.optional(decoder, "interface", Decoder::scalar_text);
        let source = fields.optional(decoder, "source", Decoder::string);
        fields.finish(decoder);
        Some(Self { host: host?, addresses: addresses.unwrap_or_default(), interface, source })
    }

    pub(crate) fn to_json(&self) -> Json {
        let Self { host, addresses, interface, source } = self;
        let mut spec = Map::new();
        spec.insert("host".into(), json!(host));
        spec.insert("addresses".into(), json!(addresses));
        for (name, value) in [("interface", interface), ("source", source)] {
            if let Some(value) = value {
                spec.insert(name.into(), json!(value));
            }
        }
        Json::Object(spec)
    }
}

impl HostSpec {
    pub(crate) fn decode(decoder: &mut Decoder, node: &Node) -> Option<Self> {
        let mut fields = decoder.fields(node, "the host")?;
        let agent_version = fields.optional(decoder, "agentVersion", Decoder::scalar_text);
        fields.finish(decoder);
        Some(Self { agent_version })
    }

    pub(crate) fn to_json(&self) -> Json {
        let Self { agent_version } = self;
        agent_version.as_ref().map_or_else(|| json!({}), |version| json!({ "agentVersion": version }))
    }
}
