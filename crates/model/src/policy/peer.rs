//! Descriptions of the other end.

use std::fmt;
use std::str::FromStr;

use serde_json::{Map, Value as Json, json};

use super::{LIST_MAX, PEERS_MAX, blocks, boolean, label_keys, names, non_empty, selector};
use crate::address::Prefix;
use crate::document::{Decoder, Node, Value};
use crate::resource::is_name;
use crate::selector::Selector;
use crate::settings::domain;

/// A description of the other end. All criteria that are given must hold.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Peer {
    /// A known endpoint or network set that matches.
    pub selector: Option<Selector>,
    /// Everything but known endpoints and network sets that match.
    pub not_selector: Option<Selector>,
    /// In a namespace whose labels match; joined with `selector` on one and the same workload.
    pub namespace_selector: Option<Selector>,
    /// With one of these service accounts, likewise joined with `selector`.
    pub service_accounts: Vec<String>,
    /// A known endpoint that has each of these labels with the same value as the endpoint that the policy is for.
    pub same_labels: Vec<String>,
    /// A known endpoint that has each of these labels, and at least one of them with another value.
    pub not_same_labels: Vec<String>,
    /// An address in one of these blocks.
    pub cidrs: Vec<Prefix>,
    /// An address in none of these blocks.
    pub not_cidrs: Vec<Prefix>,
    /// An address in a network set that matches.
    pub network_sets: Option<Selector>,
    /// An address of a host that matches.
    pub hosts: Option<Selector>,
    /// An address that one of these DNS names has: lower case; `*.` before a name means every name below it.
    pub domains: Vec<String>,
    /// A backend of one of these services. For egress its port is meant too.
    pub services: Vec<ServiceName>,
}

/// What a rule asks of the endpoint that it is evaluated at. All criteria that are given must hold.
///
/// An endpoint with several addresses of one family matches `cidrs` if all of them do, and for a rule that denies if
/// any of them does: which of them a packet has is not looked at.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Own {
    /// It matches this.
    pub selector: Option<Selector>,
    /// It does not match this.
    pub not_selector: Option<Selector>,
    /// Its address is in one of these blocks.
    pub cidrs: Vec<Prefix>,
    /// Its address is in none of these blocks.
    pub not_cidrs: Vec<Prefix>,
}

impl Own {
    pub(super) fn decode(decoder: &mut Decoder, node: &Node) -> Option<Self> {
        let mut fields = decoder.fields(node, "what the endpoint must be, like {selector: role == 'web'}")?;
        let own = Self {
            selector: fields.optional(decoder, "selector", selector),
            not_selector: fields.optional(decoder, "notSelector", selector),
            cidrs: fields.optional(decoder, "cidrs", blocks).unwrap_or_default(),
            not_cidrs: fields.optional(decoder, "notCidrs", blocks).unwrap_or_default(),
        };
        fields.finish(decoder);
        Some(own)
    }

    pub(super) fn to_json(&self) -> Json {
        let Self { selector, not_selector, cidrs, not_cidrs } = self;
        let mut own = Map::new();
        for (name, selector) in [("selector", selector), ("notSelector", not_selector)] {
            if let Some(selector) = selector {
                own.insert(name.into(), json!(selector));
            }
        }
        for (name, blocks) in [("cidrs", cidrs), ("notCidrs", not_cidrs)] {
            if !blocks.is_empty() {
                own.insert(name.into(), json!(blocks));
            }
        }
        Json::Object(own)
    }
}

/// The name of a service, `NAMESPACE/NAME`, or `NAME` for one in the policy's own namespace.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ServiceName {
    /// Its namespace; absent: the policy's.
    pub namespace: Option<String>,
    /// Its name there.
    pub name: String,
}

/// A text that names no service.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("expected the name of a service, NAMESPACE/NAME, found {0:?}")]
pub struct ServiceNameError(String);

impl FromStr for ServiceName {
    type Err = ServiceNameError;

    fn from_str(text: &str) -> Result<Self, ServiceNameError> {
        let (namespace, name) = match text.split_once('/') {
            Some((namespace, name)) => (Some(namespace), name),
            None => (None, text),
        };
        if !is_name(name) || namespace.is_some_and(|namespace| !is_name(namespace)) {
            return Err(ServiceNameError(text.into()));
        }
        Ok(Self { namespace: namespace.map(Into::into), name: name.into() })
    }
}

impl fmt::Display for ServiceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.namespace {
            Some(namespace) => write!(f, "{namespace}/{}", self.name),
            None => f.write_str(&self.name),
        }
    }
}

impl Peer {
    /// Whether it says nothing, and so means any address.
    pub fn is_any(&self) -> bool {
        *self == Self::default()
    }
}

impl Peer {
    fn decode(decoder: &mut Decoder, node: &Node) -> Option<Self> {
        let mut fields = decoder.fields(node, "a peer, like {selector: role == 'web'}")?;
        let before = decoder.problems.len();
        let any = fields.optional(decoder, "any", boolean);
        let peer = Self {
            selector: fields.optional(decoder, "selector", selector),
            not_selector: fields.optional(decoder, "notSelector", selector),
            namespace_selector: fields.optional(decoder, "namespaceSelector", selector),
            service_accounts: fields.optional(decoder, "serviceAccounts", names).unwrap_or_default(),
            same_labels: fields.optional(decoder, "sameLabels", label_keys).unwrap_or_default(),
            not_same_labels: fields.optional(decoder, "notSameLabels", label_keys).unwrap_or_default(),
            cidrs: fields.optional(decoder, "cidrs", blocks).unwrap_or_default(),
            not_cidrs: fields.optional(decoder, "notCidrs", blocks).unwrap_or_default(),
            network_sets: fields.optional(decoder, "networkSets", selector),
            hosts: fields.optional(decoder, "hosts", selector),
            domains: fields.optional(decoder, "domains", domains).unwrap_or_default(),
            services: fields.optional(decoder, "services", services).unwrap_or_default(),
        };
        fields.finish(decoder);
        if decoder.problems.len() > before {
            return None;
        }
        match (any, peer.is_any()) {
            (Some(true), true) | (None | Some(false), false) => Some(peer),
            (Some(true), false) => {
                decoder
                    .problem(node, "\"any: true\" stands alone: it would make the other criteria pointless");
                None
            }
            (None | Some(false), true) => {
                decoder.problem(node, "an empty peer is ambiguous: write {any: true} for every address");
                None
            }
        }
    }

    pub(super) fn to_json(&self) -> Json {
        let Self {
            selector,
            not_selector,
            namespace_selector,
            service_accounts,
            same_labels,
            not_same_labels,
            cidrs,
            not_cidrs,
            network_sets,
            hosts,
            domains,
            services,
        } = self;
        let mut peer = Map::new();
        if self.is_any() {
            peer.insert("any".into(), json!(true));
        }
        for (name, selector) in [
            ("selector", selector),
            ("notSelector", not_selector),
            ("namespaceSelector", namespace_selector),
            ("networkSets", network_sets),
            ("hosts", hosts),
        ] {
            if let Some(selector) = selector {
                peer.insert(name.into(), json!(selector));
            }
        }
        for (name, list) in [
            ("serviceAccounts", service_accounts),
            ("sameLabels", same_labels),
            ("notSameLabels", not_same_labels),
            ("domains", domains),
            ("services", &services.iter().map(ToString::to_string).collect()),
        ] {
            if !list.is_empty() {
                peer.insert(name.into(), json!(list));
            }
        }
        for (name, blocks) in [("cidrs", cidrs), ("notCidrs", not_cidrs)] {
            if !blocks.is_empty() {
                peer.insert(name.into(), json!(blocks));
            }
        }
        Json::Object(peer)
    }
}

/// DNS names, each in its one spelling.
pub(crate) fn domains(decoder: &mut Decoder, node: &Node) -> Option<Vec<String>> {
    let names = decoder.list(node, LIST_MAX, |decoder, node| {
        let text = decoder.string(node)?;
        domain(&text, true).or_else(|| {
            decoder.expected(node, "a DNS name, or one with \"*.\" before it for every name below it")
        })
    })?;
    non_empty(decoder, node, names)
}

fn services(decoder: &mut Decoder, node: &Node) -> Option<Vec<ServiceName>> {
    let services = decoder.list(node, LIST_MAX, Decoder::parsed)?;
    non_empty(decoder, node, services)
}

/// One peer or a list of them.
pub(super) fn peers(decoder: &mut Decoder, node: &Node) -> Option<Vec<Peer>> {
    match &node.value {
        Value::Sequence(items) if items.is_empty() => {
            decoder.problem(node, "an empty list of peers is ambiguous: leave it out for every address");
            None
        }
        Value::Sequence(_) => decoder.list(node, PEERS_MAX, Peer::decode),
        _ => Peer::decode(decoder, node).map(|peer| vec![peer]),
    }
}
