//! ClusterNetworkPolicy (v1alpha2), AdminNetworkPolicy and BaselineAdminNetworkPolicy (v1alpha1).

use super::namespaced::protocol;
use super::selector::{label_key, label_selector};
use super::spec;
use crate::document::{Decoder, Fields, Node, Value};
use crate::foreign::block;
use crate::kind::Kind;
use crate::labels::{KIND_LABEL, NAMESPACE_LABEL, NAMESPACE_LABELS_PREFIX};
use crate::policy::{
    Action, KUBERNETES_ADMIN_TIER, KUBERNETES_BASELINE_TIER, LIST_MAX, Order, Peer, PolicySpec, RULES_MAX,
    Rule, domains,
};
use crate::ports::{PortMatch, Protocol};
use crate::selector::{Expr, Selector};

pub(super) fn cluster(decoder: &mut Decoder, node: &Node) -> Option<PolicySpec> {
    policy(decoder, node, |decoder, fields| {
        fields.required(decoder, "tier", |decoder, node| {
            decoder.word(node, &[("Admin", KUBERNETES_ADMIN_TIER), ("Baseline", KUBERNETES_BASELINE_TIER)])
        })
    })
}

pub(super) fn admin(decoder: &mut Decoder, node: &Node) -> Option<PolicySpec> {
    policy(decoder, node, |_, _| Some(KUBERNETES_ADMIN_TIER))
}

pub(super) fn baseline(decoder: &mut Decoder, node: &Node) -> Option<PolicySpec> {
    policy(decoder, node, |_, _| Some(KUBERNETES_BASELINE_TIER))
}

fn policy(
    decoder: &mut Decoder,
    node: &Node,
    tier: impl FnOnce(&mut Decoder, &mut Fields<'_>) -> Option<&'static str>,
) -> Option<PolicySpec> {
    spec(decoder, node, |decoder, node| {
        let mut fields = decoder.fields(node, "the policy")?;
        let tier = tier(decoder, &mut fields);
        // C8, A2: lower first; a baseline of v1alpha1 has none.
        let priority =
            fields.optional(decoder, "priority", |decoder, node| decoder.number::<u16>(node, "0 to 1000"));
        let subject = fields.required(decoder, "subject", subject);
        let mut rules = |decoder: &mut Decoder, name, peers| {
            fields.optional(decoder, name, |decoder, node| {
                decoder.list(node, RULES_MAX, |decoder, node| rule(decoder, node, peers))
            })
        };
        let ingress = rules(decoder, "ingress", "from");
        let egress = rules(decoder, "egress", "to");
        fields.finish(decoder);
        Some(PolicySpec {
            tier: tier?.into(),
            order: Order::new(priority.unwrap_or_default().into()),
            ingress,
            egress,
            ..PolicySpec::new(subject?)
        })
    })
}

/// C7: pods of namespaces, or some of their pods; never those on the node's network.
fn subject(decoder: &mut Decoder, node: &Node) -> Option<Selector> {
    let mut fields = decoder.fields(node, "a subject with namespaces or pods")?;
    let namespaces = fields.optional(decoder, "namespaces", label_selector);
    let pods = fields.optional(decoder, "pods", |decoder, node| {
        let mut fields = decoder.fields(node, "namespaceSelector and podSelector")?;
        let namespaces = fields.optional(decoder, "namespaceSelector", label_selector);
        let pods = fields.optional(decoder, "podSelector", label_selector);
        fields.finish(decoder);
        Some((namespaces.unwrap_or_else(Selector::all), pods.unwrap_or_else(Selector::all)))
    });
    fields.finish(decoder);
    let (namespaces, pods) = match (namespaces, pods) {
        (Some(namespaces), None) => (namespaces, Selector::all()),
        (None, Some(both)) => both,
        _ => {
            decoder.problem(node, "a subject has either \"namespaces\" or \"pods\"");
            return None;
        }
    };
    Some(Selector::all_of([
        pods,
        Selector::equals(KIND_LABEL, Kind::Workload.as_str()),
        Selector::from_expr(Expr::Has(NAMESPACE_LABEL.into())),
        namespaces.with_prefix(NAMESPACE_LABELS_PREFIX),
    ]))
}

fn rule(decoder: &mut Decoder, node: &Node, peers_name: &'static str) -> Option<Rule> {
    let mut fields = decoder.fields(node, "a rule")?;
    let before = decoder.problems.len();
    fields.optional(decoder, "name", Decoder::string);
    let action = fields.required(decoder, "action", |decoder, node| {
        let words = [
            ("Accept", Action::Allow),
            ("Allow", Action::Allow),
            ("Deny", Action::Deny),
            ("Pass", Action::Pass),
        ];
        decoder.word(node, &words)
    });
    let peers = fields.required(decoder, peers_name, |decoder, node| {
        decoder.list(node, LIST_MAX, |decoder, node| peer(decoder, node, peers_name == "to"))
    });
    let protocols =
        fields.optional(decoder, "protocols", |decoder, node| decoder.list(node, LIST_MAX, protocol_match));
    let ports = fields.optional(decoder, "ports", |decoder, node| decoder.list(node, LIST_MAX, port));
    fields.finish(decoder);
    if decoder.problems.len() > before {
        return None;
    }
    let (action, peers) = (action?, peers?);
    let unknown = peers.iter().any(Option::is_none);
    let known: Vec<Peer> = peers.into_iter().flatten().collect();
    // C14: with a peer that cannot be understood, Accept matches nothing, and anything else denies all, on all ports.
    let (action, peers) = match (unknown, action) {
        (true, Action::Deny | Action::Pass) => return Some(Rule::new(Action::Deny)),
        // An empty list would mean any: nobody is said by a block that holds nobody.
        _ if unknown || known.is_empty() => (action, vec![nobody()]),
        _ => (action, known),
    };
    let ports = protocols.into_iter().chain(ports).flatten().collect();
    Some(Rule { peers, ports, ..Rule::new(action) })
}

fn nobody() -> Peer {
    Peer { selector: Some(Selector::from_expr(Expr::Not(Box::new(Expr::All)))), ..Peer::default() }
}

/// The peer that one entry stands for; `Some(None)` if none of its fields is known.
fn peer(decoder: &mut Decoder, node: &Node, egress: bool) -> Option<Option<Peer>> {
    let Value::Mapping(entries) = &node.value else {
        return decoder.expected(node, "a peer");
    };
    let [(key, value)] = entries.as_slice() else {
        decoder.problem(node, "a peer has exactly one field");
        return None;
    };
    let peer = match key.as_str().unwrap_or_default() {
        // C7: whoever calls is a pod.
        field @ ("nodes" | "networks" | "domainNames") if !egress => {
            decoder.problem(key, format!("{field} are for egress: ingress rules have namespaces or pods"));
            return None;
        }
        "namespaces" => {
            let peer = namespaced_peer(decoder, value)?;
            Peer { selector: peer.selector.or_else(|| Some(workloads())), ..peer }
        }
        "pods" => {
            let mut fields = decoder.fields(value, "namespaces and pods")?;
            let older = fields.optional(decoder, "namespaces", namespaced_peer);
            let newer = fields.optional(decoder, "namespaceSelector", label_selector);
            let pods = fields.optional(decoder, "podSelector", label_selector).unwrap_or_else(Selector::all);
            fields.finish(decoder);
            let namespaces = older.unwrap_or_else(|| Peer {
                namespace_selector: Some(newer.unwrap_or_else(Selector::all)),
                ..Peer::default()
            });
            // What the namespaces ask for stays: an empty list of labels there selects nobody.
            let parts = [pods, workloads()].into_iter().chain(namespaces.selector);
            Peer { selector: Some(Selector::all_of(parts)), ..namespaces }
        }
        "nodes" => Peer { hosts: Some(label_selector(decoder, value)?), ..Peer::default() },
        "networks" => {
            let cidrs = decoder.list(value, LIST_MAX, block)?;
            if cidrs.is_empty() {
                return decoder.expected(value, "at least one network");
            }
            Peer { cidrs, ..Peer::default() }
        }
        // C13
        "domainNames" => Peer { domains: domains(decoder, value)?, ..Peer::default() },
        _ => return Some(None),
    };
    Some(Some(peer))
}

fn workloads() -> Selector {
    Selector::equals(KIND_LABEL, Kind::Workload.as_str())
}

/// Namespaces by their labels, or (A4) by labels that they share or do not share with the subject's.
fn namespaced_peer(decoder: &mut Decoder, node: &Node) -> Option<Peer> {
    let mut fields = decoder.fields(node, "namespaces")?;
    let inherited = |decoder: &mut Decoder, node: &Node| {
        decoder.list(node, LIST_MAX, |decoder, node| {
            label_key(decoder, node).map(|key| format!("{NAMESPACE_LABELS_PREFIX}{key}"))
        })
    };
    if node.child("sameLabels").is_none()
        && node.child("notSameLabels").is_none()
        && node.child("namespaceSelector").is_none()
    {
        return Some(Peer { namespace_selector: Some(label_selector(decoder, node)?), ..Peer::default() });
    }
    let selector = fields.optional(decoder, "namespaceSelector", label_selector);
    let same = fields.optional(decoder, "sameLabels", inherited);
    let not_same = fields.optional(decoder, "notSameLabels", inherited);
    fields.finish(decoder);
    // An empty list of labels selects nobody.
    let empty = |list: &Option<Vec<String>>| list.as_ref().is_some_and(Vec::is_empty);
    if empty(&same) || empty(&not_same) {
        return Some(nobody());
    }
    Some(Peer {
        namespace_selector: Some(selector.unwrap_or_else(Selector::all)),
        same_labels: same.unwrap_or_default(),
        not_same_labels: not_same.unwrap_or_default(),
        ..Peer::default()
    })
}

/// C9, C10.
fn protocol_match(decoder: &mut Decoder, node: &Node) -> Option<PortMatch> {
    let Value::Mapping(entries) = &node.value else {
        return decoder.expected(node, "a protocol");
    };
    let [(key, value)] = entries.as_slice() else {
        decoder.problem(node, "a protocol has exactly one field");
        return None;
    };
    let protocol = match key.as_str().unwrap_or_default() {
        "tcp" => Protocol::TCP,
        "udp" => Protocol::UDP,
        "sctp" => Protocol::SCTP,
        "destinationNamedPort" => {
            let name = decoder.string(value)?;
            return Some(PortMatch::Named { protocol: None, name });
        }
        _ => return decoder.expected(key, "tcp, udp, sctp or destinationNamedPort"),
    };
    let mut fields = decoder.fields(value, "a destination port")?;
    let port = fields.optional(decoder, "destinationPort", |decoder, node| {
        let mut fields = decoder.fields(node, "number or range")?;
        let number =
            fields.optional(decoder, "number", |decoder, node| decoder.number::<u16>(node, "a port"));
        let range = fields.optional(decoder, "range", range);
        fields.finish(decoder);
        number.map(|number| (number, number)).or(range)
    });
    fields.finish(decoder);
    Some(match port {
        None => PortMatch::Protocol(protocol),
        Some((first, last)) => PortMatch::Ports { protocol, first, last },
    })
}

fn range(decoder: &mut Decoder, node: &Node) -> Option<(u16, u16)> {
    let mut fields = decoder.fields(node, "start and end")?;
    fields.optional(decoder, "protocol", |_, _| Some(()));
    let start = fields.required(decoder, "start", |decoder, node| decoder.number::<u16>(node, "a port"));
    let end = fields.required(decoder, "end", |decoder, node| decoder.number::<u16>(node, "a port"));
    fields.finish(decoder);
    let (start, end) = (start?, end?);
    if start > end {
        decoder.problem(node, "start is above end");
        return None;
    }
    Some((start, end))
}

/// A3.
fn port(decoder: &mut Decoder, node: &Node) -> Option<PortMatch> {
    let Value::Mapping(entries) = &node.value else {
        return decoder.expected(node, "a port");
    };
    let [(key, value)] = entries.as_slice() else {
        decoder.problem(node, "a port has exactly one field");
        return None;
    };
    let named = |decoder: &mut Decoder, value: &Node| match value.child("protocol") {
        Some(node) => protocol(decoder, node),
        None => Some(Protocol::TCP),
    };
    match key.as_str().unwrap_or_default() {
        "portNumber" => {
            let protocol = named(decoder, value)?;
            let mut fields = decoder.fields(value, "protocol and port")?;
            fields.optional(decoder, "protocol", |_, _| Some(()));
            let port =
                fields.required(decoder, "port", |decoder, node| decoder.number::<u16>(node, "a port"));
            fields.finish(decoder);
            port.map(|port| PortMatch::Ports { protocol, first: port, last: port })
        }
        "portRange" => {
            let protocol = named(decoder, value)?;
            range(decoder, value).map(|(first, last)| PortMatch::Ports { protocol, first, last })
        }
        "namedPort" => decoder.string(value).map(|name| PortMatch::Named { protocol: None, name }),
        _ => decoder.expected(key, "portNumber, portRange or namedPort"),
    }
}
