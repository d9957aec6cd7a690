//! NetworkPolicy of networking.k8s.io/v1.

use super::selector::label_selector;
use super::{NETWORK_POLICY_ORDER, items, spec};
use crate::address::Prefix;
use crate::document::{Decoder, Fields, Node, Value};
use crate::foreign::block;
use crate::kind::Kind;
use crate::labels::KIND_LABEL;
use crate::policy::{Action, LIST_MAX, Order, Peer, PolicySpec, RULES_MAX, Rule};
use crate::ports::{PortMatch, Protocol, is_port_name};
use crate::selector::Selector;
use crate::verdict::Direction;

pub(super) fn network_policy(decoder: &mut Decoder, node: &Node) -> Option<PolicySpec> {
    spec(decoder, node, |decoder, node| {
        let fields = decoder.fields(node, "the policy")?;
        network_policy_spec(decoder, node, fields)
    })
}

/// `spec` of a NetworkPolicy, from which other fields may have been taken.
pub(crate) fn network_policy_spec(
    decoder: &mut Decoder,
    node: &Node,
    mut fields: Fields<'_>,
) -> Option<PolicySpec> {
    // N6: absent is {}.
    let pods = fields.optional(decoder, "podSelector", label_selector).unwrap_or_else(Selector::all);
    let types = fields.optional(decoder, "policyTypes", |decoder, node| {
        decoder.list(node, 2, |decoder, node| {
            decoder.word(node, &[("Ingress", Direction::Ingress), ("Egress", Direction::Egress)])
        })
    });
    let ingress = fields.optional(decoder, "ingress", |decoder, node| {
        decoder.list(node, RULES_MAX, |decoder, node| rule(decoder, node, "from"))
    });
    let egress = fields.optional(decoder, "egress", |decoder, node| {
        decoder.list(node, RULES_MAX, |decoder, node| rule(decoder, node, "to"))
    });
    fields.finish(decoder);
    // N3: absent means ingress, and egress if there are rules for it.
    let types = types.filter(|types| !types.is_empty()).unwrap_or_else(|| {
        let egress = (!items(node.child("egress")).is_empty()).then_some(Direction::Egress);
        [Direction::Ingress].into_iter().chain(egress).collect()
    });
    let rules =
        |direction, rules: Option<Vec<Rule>>| types.contains(&direction).then(|| rules.unwrap_or_default());
    let applies_to = Selector::all_of([pods, Selector::equals(KIND_LABEL, Kind::Workload.as_str())]);
    Some(PolicySpec {
        order: Order::new(NETWORK_POLICY_ORDER),
        ingress: rules(Direction::Ingress, ingress),
        egress: rules(Direction::Egress, egress),
        ..PolicySpec::new(applies_to)
    })
}

fn rule(decoder: &mut Decoder, node: &Node, peers_name: &'static str) -> Option<Rule> {
    let mut fields = decoder.fields(node, "a rule")?;
    let before = decoder.problems.len();
    let peers = fields.optional(decoder, peers_name, |decoder, node| decoder.list(node, LIST_MAX, peer));
    let ports = fields.optional(decoder, "ports", |decoder, node| decoder.list(node, LIST_MAX, port));
    fields.finish(decoder);
    if decoder.problems.len() > before {
        return None;
    }
    // N5: absent or empty means any.
    Some(Rule {
        peers: peers.unwrap_or_default(),
        ports: ports.unwrap_or_default(),
        ..Rule::new(Action::Allow)
    })
}

/// N7, N11.
fn peer(decoder: &mut Decoder, node: &Node) -> Option<Peer> {
    let mut fields = decoder.fields(node, "a peer")?;
    let pods = fields.optional(decoder, "podSelector", label_selector);
    let namespaces = fields.optional(decoder, "namespaceSelector", label_selector);
    let block = fields.optional(decoder, "ipBlock", |decoder, node| {
        let mut fields = decoder.fields(node, "an ipBlock")?;
        let cidr = fields.required(decoder, "cidr", block);
        let except = fields.optional(decoder, "except", |decoder, node| match &node.value {
            Value::Sequence(items) if items.is_empty() => None,
            _ => decoder.list(node, LIST_MAX, block),
        });
        fields.finish(decoder);
        let (cidr, except): (Prefix, Vec<Prefix>) = (cidr?, except.unwrap_or_default());
        // N11
        if let Some(outside) = except.iter().find(|block| !cidr.contains(**block)) {
            decoder.problem(node, format!("{outside} cannot be excepted from {cidr}: it lies outside"));
            return None;
        }
        Some((cidr, except))
    });
    fields.finish(decoder);
    match block {
        Some(_) if pods.is_some() || namespaces.is_some() => {
            decoder.problem(node, "ipBlock stands alone: no podSelector and no namespaceSelector beside it");
            None
        }
        Some((cidr, except)) => Some(Peer { cidrs: vec![cidr], not_cidrs: except, ..Peer::default() }),
        None if pods.is_none() && namespaces.is_none() => {
            decoder.problem(node, "a peer needs podSelector, namespaceSelector or ipBlock");
            None
        }
        // Without podSelector the namespaces' pods are meant, and never anything else in them.
        None => {
            let workloads = Selector::equals(KIND_LABEL, Kind::Workload.as_str());
            let selector = Selector::all_of(pods.into_iter().chain([workloads]));
            Some(Peer { selector: Some(selector), namespace_selector: namespaces, ..Peer::default() })
        }
    }
}

pub(super) fn protocol(decoder: &mut Decoder, node: &Node) -> Option<Protocol> {
    // What a program that left the field empty writes: the default.
    if node.as_str() == Some("") {
        return Some(Protocol::TCP);
    }
    decoder.word(node, &[("TCP", Protocol::TCP), ("UDP", Protocol::UDP), ("SCTP", Protocol::SCTP)])
}

/// N8, N9, N10.
fn port(decoder: &mut Decoder, node: &Node) -> Option<PortMatch> {
    let mut fields = decoder.fields(node, "a port")?;
    let over = fields.optional(decoder, "protocol", protocol).unwrap_or(Protocol::TCP);
    let first = fields.optional(decoder, "port", |decoder, node| match &node.value {
        Value::String(name) if is_port_name(name) => Some(Err(name.clone())),
        _ => decoder.number::<u16>(node, "a port number or a port's name").map(Ok),
    });
    // The field has 32 bits; beyond the last port there is nothing to match.
    let last = fields.optional(decoder, "endPort", |decoder, node| {
        let last = decoder.number::<u32>(node, "a port number")?;
        Some(u16::try_from(last).unwrap_or(u16::MAX))
    });
    fields.finish(decoder);
    match (first, last) {
        (None, None) => Some(PortMatch::Protocol(over)),
        (Some(Err(name)), None) => Some(PortMatch::Named { protocol: Some(over), name }),
        (Some(Ok(first)), last) if last.is_none_or(|last| last >= first) => {
            Some(PortMatch::Ports { protocol: over, first, last: last.unwrap_or(first) })
        }
        _ => {
            decoder.problem(node, "endPort needs a numeric port that is not above it");
            None
        }
    }
}
