//! Small kinds: what holds for the whole repository, namespaces, and tables of names.

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde_json::{Map, Value as Json, json};

use crate::document::{Decoder, Node, Value};
use crate::policy::{LIST_MAX, ports};
use crate::ports::PortMatch;
use crate::verdict::{Direction, Verdict};

/// The only name that a Settings object can have.
pub const SETTINGS_NAME: &str = "default";
/// Longest DNS name, in characters (RFC 1035 section 2.3.4, without the final dot).
pub const DOMAIN_LEN_MAX: usize = 253;

/// `spec` of Settings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SettingsSpec {
    /// What happens to connections of endpoints for which no tier decided (DESIGN 4.4).
    pub default_posture: Verdict,
    /// Ports of host endpoints that no policy can close (DESIGN 4.11), towards the host and from it.
    pub fail_safe: FailSafe,
}

/// Ports of host endpoints that no policy can close.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FailSafe {
    /// Towards the host.
    pub ingress: Vec<PortMatch>,
    /// From the host.
    pub egress: Vec<PortMatch>,
}

impl Default for FailSafe {
    /// Calico's lists (felix `FailsafeInboundHostPorts`, `FailsafeOutboundHostPorts`), and Bulkhead's own two ports.
    fn default() -> Self {
        let read = |list: &str| list.split(' ').filter_map(|port| port.parse().ok()).collect();
        Self {
            ingress: read(
                "tcp/22 udp/68 tcp/179 tcp/2379 tcp/2380 tcp/5473 tcp/6443 tcp/6666 tcp/6667 tcp/7440 tcp/7441",
            ),
            egress: read(
                "udp/53 udp/67 tcp/179 tcp/2379 tcp/2380 tcp/5473 tcp/6443 tcp/6666 tcp/6667 tcp/7440 tcp/7441",
            ),
        }
    }
}

impl FailSafe {
    /// Those of one direction.
    pub fn ports(&self, direction: Direction) -> &[PortMatch] {
        match direction {
            Direction::Ingress => &self.ingress,
            Direction::Egress => &self.egress,
        }
    }
}

impl Default for SettingsSpec {
    fn default() -> Self {
        Self { default_posture: Verdict::Allow, fail_safe: FailSafe::default() }
    }
}

/// `spec` of a Namespace.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NamespaceSpec {
    /// What happens to connections of workloads in it for which no tier decided; absent: as the repository has it.
    pub default_posture: Option<Verdict>,
}

/// `spec` of a NameTable.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NameTableSpec {
    /// Addresses by DNS name: lower case, without the final dot.
    pub names: BTreeMap<String, Vec<IpAddr>>,
}

/// `Allow` or `Deny`.
pub(crate) fn posture(decoder: &mut Decoder, node: &Node) -> Option<Verdict> {
    decoder.word(node, &[("Allow", Verdict::Allow), ("Deny", Verdict::Deny)])
}

/// As [`posture`] reads it.
pub(crate) fn posture_word(posture: Verdict) -> &'static str {
    match posture {
        Verdict::Allow => "Allow",
        Verdict::Deny => "Deny",
    }
}

/// A DNS name in its one spelling, if it is one; `*.` may stand before it if `pattern`.
pub fn domain(text: &str, pattern: bool) -> Option<String> {
    let lower = text.strip_suffix('.').unwrap_or(text).to_ascii_lowercase();
    let name = if pattern { lower.strip_prefix("*.").unwrap_or(&lower) } else { &lower };
    let label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'))
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    (name.len() <= DOMAIN_LEN_MAX && name.split('.').all(label)).then_some(lower)
}

impl SettingsSpec {
    pub(crate) fn decode(decoder: &mut Decoder, node: &Node) -> Option<Self> {
        let mut fields = decoder.fields(node, "the settings")?;
        let default_posture = fields.optional(decoder, "defaultPosture", posture);
        let fail_safe = fields.optional(decoder, "failSafePorts", |decoder, node| {
            let mut fields = decoder.fields(node, "ingress and egress")?;
            let mut list = |decoder: &mut Decoder, name| {
                fields.optional(decoder, name, |decoder, node| {
                    let list = ports(decoder, node)?;
                    let named = list.iter().any(|port| matches!(port, PortMatch::Named { .. }));
                    if named { decoder.expected(node, "ports by number") } else { Some(list) }
                })
            };
            let (ingress, egress) = (list(decoder, "ingress"), list(decoder, "egress"));
            fields.finish(decoder);
            let default = FailSafe::default();
            Some(FailSafe {
                ingress: ingress.unwrap_or(default.ingress),
                egress: egress.unwrap_or(default.egress),
            })
        });
        fields.finish(decoder);
        let default = Self::default();
        Some(Self {
            default_posture: default_posture.unwrap_or(default.default_posture),
            fail_safe: fail_safe.unwrap_or(default.fail_safe),
        })
    }

    pub(crate) fn to_json(&self) -> Json {
        let Self { default_posture, fail_safe: FailSafe { ingress, egress } } = self;
        json!({
            "defaultPosture": posture_word(*default_posture),
            "failSafePorts": { "ingress": ingress, "egress": egress },
        })
    }
}

impl NamespaceSpec {
    pub(crate) fn decode(decoder: &mut Decoder, node: &Node) -> Option<Self> {
        let mut fields = decoder.fields(node, "the namespace")?;
        let default_posture = fields.optional(decoder, "defaultPosture", posture);
        fields.finish(decoder);
        Some(Self { default_posture })
    }

    pub(crate) fn to_json(&self) -> Json {
        let Self { default_posture } = self;
        let mut spec = Map::new();
        if let Some(posture) = default_posture {
            spec.insert("defaultPosture".into(), json!(posture_word(*posture)));
        }
        Json::Object(spec)
    }
}

impl NameTableSpec {
    pub(crate) fn decode(decoder: &mut Decoder, node: &Node) -> Option<Self> {
        let mut fields = decoder.fields(node, "the table")?;
        let names = fields.required(decoder, "names", |decoder, node| {
            let Value::Mapping(entries) = &node.value else {
                return decoder.expected(node, "a mapping of DNS names to lists of addresses");
            };
            if entries.len() > LIST_MAX {
                decoder
                    .problem(node, format!("at most {LIST_MAX} names are allowed, found {}", entries.len()));
                return None;
            }
            let mut names = BTreeMap::new();
            for (key, value) in entries {
                let text = decoder.scalar_text(key)?;
                let Some(name) = domain(&text, false) else {
                    return decoder.expected(key, "a DNS name");
                };
                let addresses = decoder
                    .within(&text, |decoder| decoder.list(value, LIST_MAX, Decoder::parsed::<IpAddr>))?;
                if names.insert(name, addresses).is_some() {
                    decoder.problem(key, format!("the name {text:?} is given twice"));
                    return None;
                }
            }
            Some(names)
        });
        fields.finish(decoder);
        Some(Self { names: names? })
    }

    pub(crate) fn to_json(&self) -> Json {
        let Self { names } = self;
        json!({ "names": names })
    }
}
