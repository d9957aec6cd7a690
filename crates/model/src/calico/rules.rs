//! Rules of Calico's policies and profiles.

use super::only_off;
use super::selectors::{of_endpoints, of_namespaces, of_service_accounts};
use crate::address::Prefix;
use crate::document::{Decoder, Node, Value};
use crate::foreign::block;
use crate::labels::SERVICE_ACCOUNT_LABEL;
use crate::policy::{Action, IpVersion, LIST_MAX, Own, Peer, Rule, ServiceName, SourcePorts, domains};
use crate::ports::{PortMatch, PortRange, Protocol, is_port_name};
use crate::selector::{Expr, Selector};
use crate::verdict::Direction;

/// One end of a connection as a rule describes it (`EntityRule`).
#[derive(Debug, Default)]
struct End {
    selector: Option<Selector>,
    not_selector: Option<Selector>,
    namespaces: Option<Selector>,
    accounts: Vec<Selector>,
    nets: Vec<Prefix>,
    not_nets: Vec<Prefix>,
    ports: Vec<Port>,
    not_ports: Vec<Port>,
    services: Vec<ServiceName>,
    domains: Vec<String>,
}

#[derive(Debug, Clone)]
enum Port {
    Range(u16, u16),
    Named(String),
}

/// A rule of a policy in a namespace, or of one in none.
pub(super) fn rule(
    decoder: &mut Decoder,
    node: &Node,
    direction: Direction,
    namespaced: bool,
) -> Option<Rule> {
    let mut fields = decoder.fields(node, "a rule")?;
    let before = decoder.problems.len();
    let action = fields.required(decoder, "action", |decoder, node| {
        let words =
            [("Allow", Action::Allow), ("Deny", Action::Deny), ("Pass", Action::Pass), ("Log", Action::Log)];
        decoder.word(node, &words)
    });
    let version = fields.optional(decoder, "ipVersion", |decoder, node| {
        match decoder.number::<u8>(node, "4 or 6")? {
            4 => Some(IpVersion::V4),
            6 => Some(IpVersion::V6),
            _ => decoder.expected(node, "4 or 6"),
        }
    });
    let over = fields.optional(decoder, "protocol", protocol);
    let not_over = fields.optional(decoder, "notProtocol", protocol);
    let icmp = fields.optional(decoder, "icmp", |decoder, node| message(decoder, node, over));
    let not_icmp = fields.optional(decoder, "notICMP", |decoder, node| message(decoder, node, over));
    let source = fields.optional(decoder, "source", end).unwrap_or_default();
    let destination = fields.optional(decoder, "destination", end).unwrap_or_default();
    fields.optional(decoder, "metadata", |_, _| Some(()));
    fields.refuse(decoder, "http", "matches on HTTP are not supported yet");
    fields.finish(decoder);
    let (peer, own) = match direction {
        Direction::Ingress => (&source, &destination),
        Direction::Egress => (&destination, &source),
    };
    if !own.services.is_empty() || !own.domains.is_empty() {
        let side = if direction == Direction::Ingress { "destination" } else { "source" };
        decoder.problem(
            node,
            format!("{direction} rules have services and domains of the other end, not of the {side}"),
        );
    }
    if direction == Direction::Ingress && !peer.domains.is_empty() {
        decoder.problem(node, "domains are for egress: whoever calls has an address and no name");
    }
    let source_ports = SourcePorts {
        wanted: numbers(decoder, node, &source.ports),
        excluded: numbers(decoder, node, &source.not_ports),
    };
    let protocol_of_ports = |decoder: &mut Decoder, ports: &[Port]| match over {
        _ if ports.is_empty() => None,
        Some(over) if over.has_ports() => Some(over),
        _ => {
            decoder.expected(node, "a protocol with ports (TCP, UDP, SCTP, UDPLite) in a rule that has ports")
        }
    };
    let with_ports = protocol_of_ports(decoder, &destination.ports);
    let with_not_ports = protocol_of_ports(decoder, &destination.not_ports);
    protocol_of_ports(decoder, &source.ports);
    protocol_of_ports(decoder, &source.not_ports);
    if decoder.problems.len() > before {
        return None;
    }
    let mut ports: Vec<PortMatch> = match (with_ports, icmp, over) {
        (Some(over), ..) => destination.ports.iter().map(|port| port.over(over)).collect(),
        (None, Some(icmp), _) => vec![icmp],
        (None, None, Some(over)) => vec![PortMatch::Protocol(over)],
        (None, None, None) => Vec::new(),
    };
    ports.sort();
    let mut not_ports: Vec<PortMatch> = with_not_ports
        .map_or_else(Vec::new, |over| destination.not_ports.iter().map(|port| port.over(over)).collect());
    not_ports.extend(not_over.map(PortMatch::Protocol));
    not_ports.extend(not_icmp);
    let version = version.or(match over {
        Some(Protocol::ICMP) => Some(IpVersion::V4),
        Some(Protocol::ICMPV6) => Some(IpVersion::V6),
        _ => None,
    });
    let peers = peer.as_peer(namespaced);
    Some(Rule {
        peers: if peers.is_any() { Vec::new() } else { vec![peers] },
        ports,
        not_ports,
        source_ports: (source_ports != SourcePorts::default()).then(|| Box::new(source_ports)),
        ip_version: version,
        own: Some(own.as_own()).filter(|own| *own != Own::default()).map(Box::new),
        ..Rule::new(action?)
    })
}

impl End {
    /// All that is asked of one entity. A namespace selector is part of it, so that it means what Calico means by it.
    fn joined(&self) -> Option<Selector> {
        let parts = self.namespaces.iter().chain(&self.selector).chain(&self.accounts);
        let parts: Vec<Selector> = parts.cloned().collect();
        (!parts.is_empty()).then(|| Selector::all_of(parts))
    }

    fn as_peer(&self, namespaced: bool) -> Peer {
        // Any selector, notSelector too, confines a rule of a namespaced policy to the known of its namespace (Calico
        // 3.30, libcalico-go updateprocessors, GetEntityRuleSelector).
        let confined = namespaced && self.not_selector.is_some();
        // With a namespace selector a peer is not confined to the policy's own namespace.
        let everywhere = Expr::Or(vec![Expr::All, Expr::Global]);
        Peer {
            selector: self.joined().or_else(|| confined.then(Selector::all)),
            not_selector: self.not_selector.clone(),
            namespace_selector: self.namespaces.as_ref().map(|_| Selector::from_expr(everywhere)),
            cidrs: self.nets.clone(),
            not_cidrs: self.not_nets.clone(),
            services: self.services.clone(),
            domains: self.domains.clone(),
            ..Peer::default()
        }
    }

    fn as_own(&self) -> Own {
        Own {
            selector: self.joined(),
            not_selector: self.not_selector.clone(),
            cidrs: self.nets.clone(),
            not_cidrs: self.not_nets.clone(),
        }
    }
}

impl Port {
    fn over(&self, protocol: Protocol) -> PortMatch {
        match self {
            Self::Range(first, last) => PortMatch::Ports { protocol, first: *first, last: *last },
            Self::Named(name) => PortMatch::Named { protocol: Some(protocol), name: name.clone() },
        }
    }
}

fn end(decoder: &mut Decoder, node: &Node) -> Option<End> {
    let mut fields = decoder.fields(node, "one end of a connection")?;
    let list = |decoder: &mut Decoder, node: &Node| decoder.list(node, LIST_MAX, block);
    let ports = |decoder: &mut Decoder, node: &Node| decoder.list(node, LIST_MAX, port);
    let end = End {
        selector: fields.optional(decoder, "selector", of_endpoints),
        not_selector: fields.optional(decoder, "notSelector", of_endpoints),
        namespaces: fields.optional(decoder, "namespaceSelector", of_namespaces),
        accounts: fields.optional(decoder, "serviceAccounts", accounts).unwrap_or_default(),
        nets: fields.optional(decoder, "nets", list).unwrap_or_default(),
        not_nets: fields.optional(decoder, "notNets", list).unwrap_or_default(),
        ports: fields.optional(decoder, "ports", ports).unwrap_or_default(),
        not_ports: fields.optional(decoder, "notPorts", ports).unwrap_or_default(),
        services: fields.optional(decoder, "services", service).into_iter().collect(),
        domains: fields
            .optional(decoder, "domains", |decoder, node| match &node.value {
                Value::Sequence(items) if items.is_empty() => None,
                _ => domains(decoder, node),
            })
            .unwrap_or_default(),
    };
    fields.finish(decoder);
    let others = end.joined().is_some() || end.not_selector.is_some();
    let addressed = !end.nets.is_empty() || !end.not_nets.is_empty() || !end.ports.is_empty();
    if !end.services.is_empty() && (others || addressed || !end.not_ports.is_empty()) {
        decoder.problem(node, "services stand alone: no selectors, nets or ports beside them");
        return None;
    }
    Some(end)
}

fn accounts(decoder: &mut Decoder, node: &Node) -> Option<Vec<Selector>> {
    let mut fields = decoder.fields(node, "names and selector of service accounts")?;
    let names = fields
        .optional(decoder, "names", |decoder, node| decoder.list(node, LIST_MAX, crate::resource::name));
    let selector = fields.optional(decoder, "selector", of_service_accounts);
    fields.finish(decoder);
    let named = names.filter(|names| !names.is_empty()).map(|mut names| {
        names.sort();
        names.dedup();
        let values = names.iter().map(|name| name.as_str().into()).collect();
        Selector::from_expr(Expr::In { label: SERVICE_ACCOUNT_LABEL.into(), negated: false, values })
    });
    Some(named.into_iter().chain(selector).collect())
}

fn service(decoder: &mut Decoder, node: &Node) -> Option<ServiceName> {
    let mut fields = decoder.fields(node, "name and namespace of a service")?;
    let name = fields.required(decoder, "name", crate::resource::name);
    let namespace = fields.optional(decoder, "namespace", crate::resource::name);
    fields.finish(decoder);
    Some(ServiceName { namespace, name: name? })
}

/// A number, a range `1024:2048`, or a name.
fn port(decoder: &mut Decoder, node: &Node) -> Option<Port> {
    let text = decoder.scalar_text(node)?;
    let (first, last) = text.split_once(':').unwrap_or((&text, &text));
    match (first.parse::<u16>(), last.parse::<u16>()) {
        (Ok(first), Ok(last)) if first <= last => Some(Port::Range(first, last)),
        (Err(_), _) if is_port_name(&text) => Some(Port::Named(text)),
        _ => decoder.expected(node, "a port, a range like 1024:2048, or a port's name"),
    }
}

/// Source ports, which have numbers only here: whoever calls gives its ports no names.
fn numbers(decoder: &mut Decoder, node: &Node, ports: &[Port]) -> Vec<PortRange> {
    let mut ranges = Vec::new();
    for port in ports {
        match port {
            Port::Range(first, last) => ranges.push(PortRange { first: *first, last: *last }),
            Port::Named(name) => {
                decoder.problem(node, format!("source ports by name ({name:?}) are not supported"))
            }
        }
    }
    ranges
}

fn protocol(decoder: &mut Decoder, node: &Node) -> Option<Protocol> {
    let text = decoder.scalar_text(node)?;
    let named =
        Protocol::NAMES.iter().find(|(name, _)| name.eq_ignore_ascii_case(&text)).map(|(_, one)| *one);
    let numbered = || text.parse::<u8>().ok().filter(|number| *number > 0).map(Protocol);
    named
        .or_else(numbered)
        .or_else(|| decoder.expected(node, "TCP, UDP, ICMP, ICMPv6, SCTP, UDPLite or a number from 1 to 255"))
}

fn message(decoder: &mut Decoder, node: &Node, over: Option<Protocol>) -> Option<PortMatch> {
    let mut fields = decoder.fields(node, "type and code of a message")?;
    let kind = fields.optional(decoder, "type", |decoder, node| decoder.number::<u8>(node, "0 to 255"));
    let code = fields.optional(decoder, "code", |decoder, node| decoder.number::<u8>(node, "0 to 255"));
    fields.finish(decoder);
    let Some(protocol) = over.filter(|over| over.is_icmp()) else {
        return decoder.expected(node, "the protocol ICMP or ICMPv6 beside it");
    };
    match (kind, code) {
        (Some(kind), code) => Some(PortMatch::Icmp { protocol, kind, code }),
        (None, None) => Some(PortMatch::Protocol(protocol)),
        (None, Some(_)) => decoder.expected(node, "a type with the code"),
    }
}

/// `doNotTrack` and the like, whose meaning other parts of the system would have to keep.
pub(super) fn refuse_untracked(decoder: &mut Decoder, fields: &mut crate::document::Fields<'_>) {
    for (name, why) in [
        ("doNotTrack", "policies before connection tracking are not supported"),
        ("preDNAT", "policies before destination translation are not supported"),
    ] {
        fields.optional(decoder, name, |decoder, node| only_off(decoder, node, why));
    }
}
