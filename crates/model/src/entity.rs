//! Things with addresses: workloads, hosts and network sets, and what selectors see of them.

use std::net::IpAddr;
use std::sync::Arc;

use serde_json::{Map, Value as Json, json};

use crate::address::Prefix;
use crate::document::{Decoder, Node};
use crate::facts::Facts;
use crate::kind::Kind;
use crate::labels::{
    HOST_LABEL, KIND_LABEL, Labels, NAME_LABEL, NAMESPACE_LABEL, PORT_LABELS_PREFIX, SERVICE_ACCOUNT_LABEL,
};
use crate::meaning::{Bequest, Parent};
use crate::policy::{LIST_MAX, blocks};
use crate::ports::{NamedPort, Protocol, is_port_name};
use crate::resource::{ObjectKey, Resource};
use crate::selector::Selector;
use crate::verdict::Verdict;

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

/// `spec` of a HostEndpoint.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HostEndpointSpec {
    /// Name of the host.
    pub host: String,
    /// The host's interface; absent means every interface that has one of the addresses.
    pub interface: Option<String>,
    /// The host's own addresses there.
    pub addresses: Vec<IpAddr>,
    /// Ports that it gives names to.
    pub ports: Vec<NamedPort>,
    /// What happens to its connections where no tier decided; absent: what the repository has.
    pub default_posture: Option<Verdict>,
}

/// What a selector is evaluated on: labels (facts and the automatic ones included) and the addresses they stand for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entity {
    /// `Kind/name` or `Kind/namespace/name`, followed by `#PART` where an object stands for several.
    pub name: Arc<str>,
    /// Own labels, facts and automatic labels.
    pub labels: Labels,
    /// Addresses and blocks.
    pub prefixes: Vec<Prefix>,
    /// Host of a workload whose agent publishes it, and so knows it better than anybody else.
    pub host: Option<Arc<str>>,
    /// Ports that a workload gives names to.
    pub ports: Vec<NamedPort>,
    /// What happens to its connections where no tier decided; absent: what the repository has.
    pub posture: Option<Verdict>,
    /// Whom it inherits from.
    pub parents: Vec<Parent>,
}

impl Default for Entity {
    fn default() -> Self {
        Self {
            name: "".into(),
            labels: Labels::new(),
            prefixes: Vec::new(),
            host: None,
            ports: Vec::new(),
            posture: None,
            parents: Vec::new(),
        }
    }
}

impl Entity {
    /// The entity that one of Bulkhead's own resources is, before [`Entity::inherit`]; policies and the like are none.
    pub fn of(resource: &Resource) -> Option<Self> {
        let hosts = |addresses: &[IpAddr]| addresses.iter().copied().map(Prefix::host).collect();
        let nothing = Facts::new();
        let (prefixes, host, ports, account, posture, facts): (_, _, &[NamedPort], _, _, _) = match resource {
            Resource::Workload(workload) => {
                let spec = &workload.spec;
                let account = spec.service_account.as_ref();
                (hosts(&spec.addresses), Some(&spec.host), &spec.ports, account, None, &spec.facts)
            }
            Resource::HostEndpoint(endpoint) => {
                let spec = &endpoint.spec;
                (hosts(&spec.addresses), Some(&spec.host), &spec.ports, None, spec.default_posture, &nothing)
            }
            Resource::NetworkSet(set) => (set.spec.cidrs.clone(), None, &[], None, None, &nothing),
            Resource::Host(host) => (hosts(&host.spec.addresses), None, &[], None, None, &host.spec.facts),
            _ => return None,
        };
        let host = host.map(String::as_str).filter(|host| !host.is_empty());
        let metadata = resource.metadata();
        let key = resource.key();
        let mut entity = Self::new(&key, key.kind, &facts.over(&metadata.labels), host);
        if key.kind == Kind::Workload {
            entity.host = host.map(Into::into);
        }
        entity.prefixes = prefixes;
        entity.posture = posture;
        entity.set_service_account(account.map(String::as_str));
        entity.set_ports(ports.to_vec());
        Some(entity)
    }

    /// An entity with its own labels and the automatic ones, of what `kind` says: a Pod is a `Workload`. It inherits
    /// from its namespace, if it has one.
    pub fn new(key: &ObjectKey, kind: Kind, own: &Labels, host: Option<&str>) -> Self {
        let namespace = key.namespace.as_deref();
        Self {
            name: key.to_string().into(),
            labels: with_automatic_labels(own, kind, namespace, &key.name, host),
            parents: namespace.map(|name| Parent::Namespace(name.into())).into_iter().collect(),
            ..Self::default()
        }
    }

    /// Makes it run under a service account of its namespace.
    pub(crate) fn set_service_account(&mut self, account: Option<&str>) {
        let Some(account) = account else { return };
        // A validated name is an acceptable value.
        let _ = self.labels.insert_any(SERVICE_ACCOUNT_LABEL, account);
        if let Some(namespace) = self.labels.get(NAMESPACE_LABEL) {
            self.parents.push(Parent::ServiceAccount(namespace.into(), account.into()));
        }
    }

    /// Gives names to ports.
    pub(crate) fn set_ports(&mut self, ports: Vec<NamedPort>) {
        for port in &ports {
            let _ = self.labels.insert_any(&port_label(port.protocol, &port.name), &port.port.to_string());
        }
        self.ports = ports;
    }

    /// Takes over what a parent leaves to it. Its own labels win.
    pub fn inherit(&mut self, bequest: &Bequest) {
        self.labels.inherit(&bequest.labels);
        self.posture = self.posture.or(bequest.posture);
    }

    /// Whether policies can apply to it: a workload or a host endpoint.
    pub fn is_endpoint(&self) -> bool {
        let kind = self.labels.get(KIND_LABEL);
        kind == Some(Kind::Workload.as_str()) || self.is_host_endpoint()
    }

    /// Whether it is a host's own interface, which has fail-safe ports.
    pub fn is_host_endpoint(&self) -> bool {
        self.labels.get(KIND_LABEL) == Some(Kind::HostEndpoint.as_str())
    }
}

/// Kinds of entities that selectors mean without asking for the kind.
const SELECTED: [Kind; 3] = [Kind::Workload, Kind::HostEndpoint, Kind::NetworkSet];

/// Whether a selector holds for labels that carry the automatic ones. What is neither an endpoint nor a network set
/// (hosts, backends of services, DNS names) is matched only by selectors that ask about `bulkhead.dev/kind`: "every
/// workload" does not mean the machines they run on.
pub fn matches(selector: &Selector, labels: &Labels) -> bool {
    matches_by(selector, |key| labels.get(key))
}

/// The same of labels that stand in several places: `get` tells the value of each.
pub fn matches_by<'a>(selector: &Selector, get: impl Fn(&str) -> Option<&'a str>) -> bool {
    let plain = get(KIND_LABEL).is_none_or(|kind| SELECTED.iter().any(|selected| selected.as_str() == kind));
    (plain || selector.reads(KIND_LABEL)) && selector.matches_by(&get)
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
        let why = "names belong into a NameTable, and are matched by a peer's domains";
        fields.refuse(decoder, "domains", why);
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
            spec.insert("ports".into(), ports.iter().map(named_port_to_json).collect());
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

impl HostEndpointSpec {
    pub(crate) fn decode(decoder: &mut Decoder, node: &Node) -> Option<Self> {
        let mut fields = decoder.fields(node, "the host endpoint")?;
        let host = fields.required(decoder, "host", crate::resource::name);
        let interface = fields.optional(decoder, "interface", Decoder::scalar_text);
        let addresses = fields.required(decoder, "addresses", |decoder, node| {
            decoder.list(node, ADDRESSES_MAX, Decoder::parsed)
        });
        let ports =
            fields.optional(decoder, "ports", |decoder, node| decoder.list(node, LIST_MAX, named_port));
        let default_posture = fields.optional(decoder, "defaultPosture", crate::settings::posture);
        fields.finish(decoder);
        Some(Self {
            host: host?,
            interface,
            addresses: addresses?,
            ports: ports.unwrap_or_default(),
            default_posture,
        })
    }

    pub(crate) fn to_json(&self) -> Json {
        let Self { host, interface, addresses, ports, default_posture } = self;
        let mut spec = Map::new();
        spec.insert("host".into(), json!(host));
        spec.insert("addresses".into(), json!(addresses));
        if let Some(interface) = interface {
            spec.insert("interface".into(), json!(interface));
        }
        if !ports.is_empty() {
            spec.insert("ports".into(), ports.iter().map(named_port_to_json).collect());
        }
        if let Some(posture) = default_posture {
            spec.insert("defaultPosture".into(), json!(crate::settings::posture_word(*posture)));
        }
        Json::Object(spec)
    }
}

pub(crate) fn named_port_to_json(port: &NamedPort) -> Json {
    json!({ "name": port.name, "protocol": port.protocol.to_string(), "port": port.port })
}

/// From what [`named_port_to_json`] makes.
pub(crate) fn named_port_from_json(value: &Json) -> Result<NamedPort, String> {
    let mut decoder = Decoder::new("port");
    let port = named_port(&mut decoder, &Node::from_json(value));
    // A field that may be left out may be wrong all the same.
    port.filter(|_| decoder.problems.is_empty())
        .ok_or_else(|| decoder.problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))
}

pub(crate) fn named_port(decoder: &mut Decoder, node: &Node) -> Option<NamedPort> {
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
