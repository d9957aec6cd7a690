//! Workloads registered by hand: what `bulkhead workload add` sends and what files in the agent's watched
//! directory hold.
//!
//! ```yaml
//! name: web-1
//! labels: {application: orders, role: web}
//! netns: /run/netns/web-1      # or, instead:  interface: veth7, or  cgroup: nginx.service
//! addresses: [10.0.0.7]        # if left out: those in the namespace; with cgroup the host's; needed with interface
//! namespace: shop              # whose labels it inherits, and whose policies are for it
//! serviceAccount: web
//! ports: [{name: http, port: 8080}]
//! ```

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::document::{Decoder, Node, Problem};
use crate::entity::{ADDRESSES_MAX, named_port};
use crate::labels::Labels;
use crate::policy::LIST_MAX;
use crate::ports::NamedPort;

/// Where a registered workload is attached to the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Attachment {
    /// Path of its network namespace.
    Netns(String),
    /// Name of its host-side interface.
    Interface(String),
    /// Path of its control group in the unified hierarchy, or the name of its systemd unit.
    Cgroup(String),
}

/// What rules can ask of a workload besides its labels.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Identity {
    /// The namespace that it is in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    /// The service account that it runs under.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service_account: Option<String>,
    /// Ports that it gives names to.
    #[serde(default, skip_serializing_if = "Vec::is_empty", with = "ports_as_written")]
    pub ports: Vec<NamedPort>,
}

/// Ports as people write them: protocols by name.
mod ports_as_written {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    use super::NamedPort;
    use crate::entity::{named_port_from_json, named_port_to_json};

    pub(super) fn serialize<S: Serializer>(ports: &[NamedPort], serializer: S) -> Result<S::Ok, S::Error> {
        ports.iter().map(named_port_to_json).collect::<Vec<_>>().serialize(serializer)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Vec<NamedPort>, D::Error> {
        let values = Vec::<serde_json::Value>::deserialize(deserializer)?;
        let ports = values.iter().map(|value| named_port_from_json(value).map_err(serde::de::Error::custom));
        ports.collect()
    }
}

/// A workload registered by hand.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Registration {
    /// Its name, unique on its host.
    pub name: String,
    /// Its labels.
    #[serde(default)]
    pub labels: Labels,
    /// Where it is attached.
    #[serde(flatten)]
    pub attachment: Attachment,
    /// Its addresses; empty means those found in its namespace.
    #[serde(default)]
    pub addresses: Vec<IpAddr>,
    /// What rules can ask of it besides.
    #[serde(flatten)]
    pub identity: Identity,
}

/// Where the unified hierarchy of control groups is mounted, by the text of `/proc/self/mounts` (proc(5)).
pub fn unified_hierarchy(mounts: &str) -> Option<&str> {
    mounts.lines().find_map(|line| {
        let mut fields = line.split(' ').skip(1);
        let path = fields.next()?;
        (fields.next()? == "cgroup2").then_some(path)
    })
}

/// Reads registrations, one per document.
///
/// # Errors
/// With every problem found; then nothing of the text is to be used.
pub fn parse(source: &str, text: &str) -> Result<Vec<Registration>, Vec<Problem>> {
    let mut decoder = Decoder::new(source);
    let roots = crate::document::read(source, text).map_err(|problem| vec![problem])?;
    let registrations: Vec<_> = roots.iter().filter_map(|root| decode(&mut decoder, root)).collect();
    if decoder.problems.is_empty() { Ok(registrations) } else { Err(decoder.problems) }
}

fn decode(decoder: &mut Decoder, node: &Node) -> Option<Registration> {
    let mut fields = decoder.fields(node, "a workload with name, labels and netns, interface or cgroup")?;
    let name = fields.required(decoder, "name", crate::resource::name);
    let labels = fields.optional(decoder, "labels", crate::resource::decode_labels).unwrap_or_default();
    let netns = fields.optional(decoder, "netns", Decoder::string);
    let interface = fields.optional(decoder, "interface", Decoder::string);
    let cgroup = fields.optional(decoder, "cgroup", Decoder::string);
    let addresses = fields
        .optional(decoder, "addresses", |decoder, node| decoder.list(node, ADDRESSES_MAX, Decoder::parsed))
        .unwrap_or_default();
    let identity = Identity {
        namespace: fields.optional(decoder, "namespace", crate::resource::name),
        service_account: fields.optional(decoder, "serviceAccount", crate::resource::name),
        ports: fields
            .optional(decoder, "ports", |decoder, node| decoder.list(node, LIST_MAX, named_port))
            .unwrap_or_default(),
    };
    fields.finish(decoder);
    let attachment = match (netns, interface, cgroup) {
        (None, None, Some(cgroup)) => Attachment::Cgroup(cgroup),
        (Some(netns), None, None) => Attachment::Netns(netns),
        (None, Some(_), None) if addresses.is_empty() => {
            decoder
                .problem(node, "with \"interface\" the field \"addresses\" is needed: they cannot be seen");
            return None;
        }
        (None, Some(interface), None) => Attachment::Interface(interface),
        _ => {
            decoder.problem(node, "a workload needs one of \"netns\", \"interface\" and \"cgroup\"");
            return None;
        }
    };
    Some(Registration { name: name?, labels, attachment, addresses, identity })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_registration_names_a_namespace_or_an_interface() {
        let found = parse("f", "name: web\nlabels: {role: web}\nnetns: /run/netns/web\n").unwrap();
        assert_eq!(found[0].attachment, Attachment::Netns("/run/netns/web".into()));
        let found = parse("f", "name: web\ncgroup: nginx.service\n").unwrap();
        assert_eq!(found[0].attachment, Attachment::Cgroup("nginx.service".into()));
        for text in ["name: web\n", "name: web\nnetns: a\ninterface: b\n", "name: web\ninterface: b\n"] {
            assert_eq!(parse("f", text).unwrap_err().len(), 1, "{text}");
        }
        let problem = parse("f", "name: web\nnetns: a\nlable: {}\n").unwrap_err().remove(0);
        assert_eq!((problem.line, problem.suggestion.as_deref()), (3, Some("labels")));
    }

    #[test]
    fn a_registration_survives_json() {
        let found = parse("f", "name: web\ninterface: veth1\naddresses: [10.0.0.1]\nnamespace: shop\nserviceAccount: w\nports: [{name: http, port: 80}]\n").unwrap();
        assert_eq!(found[0].identity.namespace.as_deref(), Some("shop"));
        let text = serde_json::to_string(&found[0]).unwrap();
        assert_eq!(parse("f", &text).unwrap(), found);
    }
}
