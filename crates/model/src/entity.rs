//! Things with addresses: workloads, hosts and network sets, and what selectors see of them.

use std::net::IpAddr;
use std::sync::Arc;

use serde_json::{Map, Value as Json, json};

use crate::address::Prefix;
use crate::document::{Decoder, Node};
use crate::facts::Facts;
use crate::labels::{
    HOST_LABEL, KIND_LABEL, Labels, NAME_LABEL, NAMESPACE_LABEL, NAMESPACE_LABELS_PREFIX, PORT_LABELS_PREFIX,
    SERVICE_ACCOUNT_LABEL,
};
use crate::policy::{LIST_MAX, blocks};
use crate::ports::{NamedPort, Protocol, is_port_name};
use crate::resource::{Kind, Resource};
use crate::selector::Selector;

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
    /// Ports that it gives names to.
    pub ports: Vec<NamedPort>,
    /// Its service account.
    pub service_account: Option<String>,
    /// What was observed about it and the host that it runs on.
    pub facts: Facts,
}

/// `spec` of a Host.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HostSpec {
    /// Version of its agent.
    pub agent_version: Option<String>,
    /// Its own addresses.
    pub addresses: Vec<IpAddr>,
    /// What was observed about it.
    pub facts: Facts,
}

/// What a selector is evaluated on: labels (facts and the automatic ones included) and the addresses they stand for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entity {
    /// `Kind/name` or `Kind/namespace/name`.
    pub name: Arc<str>,
    /// Own labels, facts and automatic labels.
    pub labels: Labels,
    /// Addresses and blocks.
    pub prefixes: Vec<Prefix>,
    /// Host of a workload.
    pub host: Option<Arc<str>>,
    /// Ports that a workload gives names to.
    pub ports: Vec<NamedPort>,
}

impl Entity {
    /// The entity that a resource is; policies and tiers are none. The labels of its namespace are not known here: see
    /// [`Entity::inherit`].
    pub fn of(resource: &Resource) -> Option<Self> {
        let hosts = |addresses: &[IpAddr]| addresses.iter().copied().map(Prefix::host).collect();
        let nothing = WorkloadSpec::default();
        let (prefixes, workload, facts) = match resource {
            Resource::Workload(workload) => {
                (hosts(&workload.spec.addresses), &workload.spec, &workload.spec.facts)
            }
            Resource::NetworkSet(set) => (set.spec.cidrs.clone(), &nothing, &nothing.facts),
            Resource::Host(host) => (hosts(&host.spec.addresses), &nothing, &host.spec.facts),
            Resource::Tier(_) | Resource::Policy(_) => return None,
        };
        let host = Some(workload.host.as_str()).filter(|host| !host.is_empty());
        let metadata = resource.metadata();
        let mut labels = with_automatic_labels(
            &facts.over(&metadata.labels),
            resource.kind(),
            metadata.namespace.as_deref(),
            &metadata.name,
            host,
        );
        if let Some(account) = &workload.service_account {
            // A validated name is an acceptable value.
            let _ = labels.insert_any(SERVICE_ACCOUNT_LABEL, account);
        }
        for port in &workload.ports {
            let _ = labels.insert_any(&port_label(port.protocol, &port.name), &port.port.to_string());
        }
        Some(Self {
            name: resource.key().to_string().into(),
            labels,
            prefixes,
            host: host.map(Into::into),
            ports: workload.ports.clone(),
        })
    }

    /// Adds the labels of its namespace, each under [`NAMESPACE_LABELS_PREFIX`].
    pub fn inherit(&mut self, namespace: &Labels) {
        for (key, value) in namespace.iter() {
            // A key that is too long with the prefix cannot be selected on; it is left out.
            let _ = self.labels.insert_any(&format!("{NAMESPACE_LABELS_PREFIX}{key}"), value);
        }
    }
}

/// Whether a selector holds for labels that carry the automatic ones. Hosts are matched only by selectors that ask
/// about `bulkhead.dev/kind`: "every workload" does not mean the machines they run on.
pub fn matches(selector: &Selector, labels: &Labels) -> bool {
    let host = labels.get(KIND_LABEL) == Some(Kind::Host.as_str());
    (!host || selector.reads(KIND_LABEL)) && selector.matches(labels)
}

/// The automatic label that tells the number of a named port.
pub fn port_label(protocol: Protocol, name: &str) -> String {
    format!("{PORT_LABELS_PREFIX}{protocol}.{name}")
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
        let ports =
            fields.optional(decoder, "ports", |decoder, node| decoder.list(node, LIST_MAX, named_port));
        let service_account = fields.optional(decoder, "serviceAccount", crate::resource::name);
        let facts = fields.optional(decoder, "facts", Facts::decode);
        fields.finish(decoder);
        Some(Self {
            host: host?,
            addresses: addresses.unwrap_or_default(),
            interface,
            source,
            ports: ports.unwrap_or_default(),
            service_account,
            facts: facts.unwrap_or_default(),
        })
    }

    pub(crate) fn to_json(&self) -> Json {
        let Self { host, addresses, interface, source, ports, service_account, facts } = self;
        let mut spec = Map::new();
        spec.insert("host".into(), json!(host));
        spec.insert("addresses".into(), json!(addresses));
        if !ports.is_empty() {
            let port = |port: &NamedPort| json!({ "name": port.name, "protocol": port.protocol.to_string(), "port": port.port });
            spec.insert("ports".into(), ports.iter().map(port).collect());
        }
        for (name, value) in
            [("interface", interface), ("source", source), ("serviceAccount", service_account)]
        {
            if let Some(value) = value {
                spec.insert(name.into(), json!(value));
            }
        }
        if !facts.is_empty() {
            spec.insert("facts".into(), facts.to_json());
        }
        Json::Object(spec)
    }
}

impl HostSpec {
    pub(crate) fn decode(decoder: &mut Decoder, node: &Node) -> Option<Self> {
        let mut fields = decoder.fields(node, "the host")?;
        let agent_version = fields.optional(decoder, "agentVersion", Decoder::scalar_text);
        let addresses = fields.optional(decoder, "addresses", |decoder, node| {
            decoder.list(node, ADDRESSES_MAX, Decoder::parsed)
        });
        let facts = fields.optional(decoder, "facts", Facts::decode);
        fields.finish(decoder);
        Some(Self {
            agent_version,
            addresses: addresses.unwrap_or_default(),
            facts: facts.unwrap_or_default(),
        })
    }

    pub(crate) fn to_json(&self) -> Json {
        let Self { agent_version, addresses, facts } = self;
        let mut spec = Map::new();
        if let Some(version) = agent_version {
            spec.insert("agentVersion".into(), json!(version));
        }
        if !addresses.is_empty() {
            spec.insert("addresses".into(), json!(addresses));
        }
        if !facts.is_empty() {
            spec.insert("facts".into(), facts.to_json());
        }
        Json::Object(spec)
    }
}

fn named_port(decoder: &mut Decoder, node: &Node) -> Option<NamedPort> {
    let mut fields = decoder.fields(node, "a named port")?;
    let name = fields.required(decoder, "name", |decoder, node| {
        let name = decoder.scalar_text(node)?;
        if is_port_name(&name) { Some(name) } else { decoder.expected(node, "the name of a port") }
    });
    let protocol = fields.optional(decoder, "protocol", |decoder, node| {
        let words = Protocol::NAMES.map(|(word, protocol)| (word, protocol));
        decoder.word(node, &words).filter(|protocol| protocol.has_ports())
    });
    let port = fields.required(decoder, "port", |decoder, node| {
        decoder.number::<u16>(node, "a port from 1 to 65535").filter(|port| *port > 0)
    });
    fields.finish(decoder);
    Some(NamedPort { name: name?, protocol: protocol.unwrap_or(Protocol::TCP), port: port? })
}
