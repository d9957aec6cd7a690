//! A history of objects and the connections that are tried in it, as data.

use std::fmt;
use std::net::IpAddr;
use std::path::Path;

use bulkhead_model::host_policy::HostPolicy;
use bulkhead_model::ports::{PortKey, Protocol};
use bulkhead_model::{Resource, document};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// A history.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Case {
    /// What it is about.
    pub why: String,
    /// What happens, in order. The first step's state is put into force whole, the others' by the difference.
    pub steps: Vec<Step>,
}

/// What changes, and what is tried then.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Step {
    /// Another process takes over what the one before has left, and puts the state into force whole.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub restart: bool,
    /// What time it is from now on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub now: Option<u64>,
    /// Objects that are new or other than before.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub set: Vec<Value>,
    /// Objects that are gone: kind, then namespace if any, then name.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub remove: Vec<String>,
    /// New connections.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub flows: Vec<Question>,
}

/// A new connection. An end is a workload if one of this host has the address, else it is somewhere outside.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Question {
    /// Who begins.
    pub from: IpAddr,
    /// Who is called.
    pub to: IpAddr,
    /// Protocol number.
    pub protocol: Protocol,
    /// Destination port; of ICMP, type and code.
    #[serde(default)]
    pub port: u16,
    /// 0 for protocols without.
    #[serde(default)]
    pub source_port: u16,
    /// What the reference must say: whoever writes a case by hand says what is right.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expect: Option<Expected>,
}

/// What is right.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Expected {
    /// What the sender's policy says and by which rule, if the sender is one of ours.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub egress: Option<String>,
    /// Likewise the receiver's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ingress: Option<String>,
}

impl Question {
    /// Protocol and port.
    pub fn key(&self) -> PortKey {
        self.protocol.key(self.port)
    }

    /// Whether a packet of one would be a packet of the other, or a reply in it. Each echo has an identifier of its own.
    pub(super) fn is_same_connection(&self, other: &Self) -> bool {
        let ports = (self.source_port, self.port);
        let same = (self.from, self.to, ports) == (other.from, other.to, (other.source_port, other.port));
        let reply = (self.to, self.from, ports) == (other.from, other.to, (other.port, other.source_port));
        self.protocol == other.protocol && !self.protocol.is_icmp() && (same || reply)
    }
}

impl fmt::Display for Question {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { from, to, protocol, port, source_port, .. } = self;
        write!(f, "{protocol} {from} port {source_port} -> {to} port {port}")
    }
}

/// The endpoint that has an address.
pub(super) fn holder(policy: &HostPolicy, address: IpAddr) -> Option<&std::sync::Arc<str>> {
    policy.endpoints.iter().find(|(_, binding)| binding.addresses.contains(&address)).map(|(name, _)| name)
}

/// An object of a case.
///
/// # Errors
/// With what is wrong with it.
pub(super) fn read(value: &Value) -> Result<Resource, String> {
    document::from_value("case", value).map_err(|problems| format!("{value}: {problems:?}"))
}

impl Case {
    /// From its file.
    ///
    /// # Panics
    /// If it is none.
    pub fn load(path: &Path) -> Self {
        let text = std::fs::read_to_string(path).unwrap();
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    }

    /// As a file: an object or connection per line.
    pub fn text(&self) -> String {
        let list = |name: &str, items: Vec<String>| {
            (!items.is_empty()).then(|| format!("{}: [\n    {}]", Value::from(name), items.join(",\n    ")))
        };
        let json = |item: &dyn Fn() -> Result<String, serde_json::Error>| item().expect("always possible");
        let step = |step: &Step| {
            let Step { restart, now, set, remove, flows } = step;
            let parts = [
                restart.then(|| "\"restart\": true".to_owned()),
                now.map(|now| format!("\"now\": {now}")),
                list("set", set.iter().map(ToString::to_string).collect()),
                list("remove", remove.iter().map(|name| Value::from(name.as_str()).to_string()).collect()),
                list("flows", flows.iter().map(|flow| json(&|| serde_json::to_string(flow))).collect()),
            ];
            format!("  {{{}}}", parts.into_iter().flatten().collect::<Vec<_>>().join(",\n   "))
        };
        let steps: Vec<_> = self.steps.iter().map(step).collect();
        format!("{{\"why\": {},\n \"steps\": [\n{}]}}\n", Value::from(self.why.as_str()), steps.join(",\n"))
    }

    /// Connections that are tried.
    pub fn flows(&self) -> usize {
        self.steps.iter().map(|step| step.flows.len()).sum()
    }

    /// Objects that are set, and those that are removed.
    pub fn changes(&self) -> usize {
        self.steps.iter().map(|step| step.set.len() + step.remove.len()).sum()
    }
}
