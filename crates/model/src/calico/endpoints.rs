//! Endpoints and network sets of Calico.

use std::net::IpAddr;

use super::PROFILES_MAX;
use crate::address::Prefix;
use crate::document::{Decoder, Fields, Node};
use crate::entity::{ADDRESSES_MAX, Entity};
use crate::foreign::{block, labels};
use crate::kind::Kind;
use crate::kubernetes;
use crate::labels::Labels;
use crate::meaning::{Meaning, Parent};
use crate::policy::LIST_MAX;
use crate::ports::{NamedPort, Protocol, is_port_name};
use crate::resource::ObjectKey;
use crate::verdict::Verdict;

/// The profile that needs no object and allows everything.
const ALLOW_PROFILE: &str = "projectcalico-default-allow";

pub(super) fn network_set(decoder: &mut Decoder, node: &Node, key: &ObjectKey) -> Option<Meaning> {
    let nets = kubernetes::spec(decoder, node, |decoder, node| {
        let mut fields = decoder.fields(node, "the network set")?;
        let nets = fields.optional(decoder, "nets", |decoder, node| decoder.list(node, LIST_MAX, block));
        let why = "domains of network sets are not supported yet: name them in the rule's domains";
        fields.refuse(decoder, "allowedEgressDomains", why);
        fields.finish(decoder);
        Some(nets.unwrap_or_default())
    })?;
    let own = with_own_labels(labels(node), key);
    let entity = Entity { prefixes: nets, ..Entity::new(key, Kind::NetworkSet, &own, None) };
    Some(one(entity))
}

pub(super) fn host_endpoint(decoder: &mut Decoder, node: &Node, key: &ObjectKey) -> Option<Meaning> {
    let own = labels(node);
    let entity = kubernetes::spec(decoder, node, |decoder, node| {
        let mut fields = decoder.fields(node, "the host endpoint")?;
        let host = fields.optional(decoder, "node", Decoder::scalar_text);
        fields.optional(decoder, "interfaceName", Decoder::scalar_text);
        let addresses = fields.optional(decoder, "expectedIPs", |decoder, node| {
            decoder.list(node, ADDRESSES_MAX, Decoder::parsed::<IpAddr>)
        });
        let profiles = fields.optional(decoder, "profiles", profiles);
        let ports = fields.optional(decoder, "ports", ports);
        fields.finish(decoder);
        let mut entity = Entity::new(key, Kind::HostEndpoint, &own, host.as_deref());
        entity.prefixes = addresses.unwrap_or_default().into_iter().map(Prefix::host).collect();
        entity.set_ports(ports.unwrap_or_default());
        set_profiles(&mut entity, profiles.unwrap_or_default());
        Some(entity)
    })?;
    Some(one(entity))
}

pub(super) fn workload_endpoint(decoder: &mut Decoder, node: &Node, key: &ObjectKey) -> Option<Meaning> {
    let own = labels(node);
    let entity = kubernetes::spec(decoder, node, |decoder, node| {
        let mut fields = decoder.fields(node, "the workload endpoint")?;
        let host = fields.optional(decoder, "node", Decoder::scalar_text);
        let orchestrator = fields.optional(decoder, "orchestrator", Decoder::scalar_text);
        let account = fields.optional(decoder, "serviceAccountName", Decoder::scalar_text);
        let networks = fields
            .optional(decoder, "ipNetworks", |decoder, node| decoder.list(node, ADDRESSES_MAX, network));
        let profiles = fields.optional(decoder, "profiles", profiles);
        let ports = fields.optional(decoder, "ports", ports);
        ignore_plumbing(decoder, &mut fields);
        fields.finish(decoder);
        let mut own = own.clone();
        if let Some(orchestrator) = orchestrator {
            let _ = own.insert("projectcalico.org/orchestrator", &orchestrator);
        }
        let mut entity = Entity::new(key, Kind::Workload, &own, host.as_deref());
        entity.prefixes = networks.unwrap_or_default();
        entity.set_service_account(account.as_deref());
        entity.set_ports(ports.unwrap_or_default());
        set_profiles(&mut entity, profiles.unwrap_or_default());
        Some(entity)
    })?;
    Some(one(entity))
}

fn one(entity: Entity) -> Meaning {
    Meaning { entities: vec![entity], ..Meaning::default() }
}

/// How the endpoint is wired; no policy asks for it.
fn ignore_plumbing(decoder: &mut Decoder, fields: &mut Fields<'_>) {
    for name in [
        "workload",
        "pod",
        "endpoint",
        "containerID",
        "interfaceName",
        "mac",
        "ipNATs",
        "ipv4Gateway",
        "ipv6Gateway",
        "allowSpoofedSourcePrefixes",
        "qosControls",
    ] {
        fields.optional(decoder, name, |_, _| Some(()));
    }
}

/// The labels that Calico gives to network sets by itself.
fn with_own_labels(mut labels: Labels, key: &ObjectKey) -> Labels {
    let _ = labels.insert_any("projectcalico.org/name", &key.name);
    let _ = labels.insert_any("projectcalico.org/kind", key.kind.manifest_kind());
    labels
}

/// Where no tier decided, profiles do, and where they do not, the connection is refused.
fn set_profiles(entity: &mut Entity, profiles: Vec<String>) {
    let allows_at = profiles.iter().position(|name| name == ALLOW_PROFILE);
    entity.posture = Some(if allows_at.is_some() { Verdict::Allow } else { Verdict::Deny });
    let asked = profiles.into_iter().take(allows_at.unwrap_or(usize::MAX));
    entity.parents.extend(asked.map(Parent::Profile));
}

fn profiles(decoder: &mut Decoder, node: &Node) -> Option<Vec<String>> {
    decoder.list(node, PROFILES_MAX, crate::resource::foreign_name)
}

/// A block that is one address, or an address alone.
fn network(decoder: &mut Decoder, node: &Node) -> Option<Prefix> {
    let text = decoder.string(node)?;
    let parsed = text.parse::<Prefix>().ok().or_else(|| text.parse::<IpAddr>().ok().map(Prefix::host));
    parsed.or_else(|| decoder.expected(node, "an address, like 10.0.0.1/32"))
}

fn ports(decoder: &mut Decoder, node: &Node) -> Option<Vec<NamedPort>> {
    decoder
        .list(node, LIST_MAX, |decoder, node| {
            let mut fields = decoder.fields(node, "a named port")?;
            let name = fields.optional(decoder, "name", Decoder::scalar_text);
            let protocol = fields.required(decoder, "protocol", |decoder, node| {
                let text = decoder.scalar_text(node)?;
                let known = Protocol::NAMES.iter().find(|(name, _)| name.eq_ignore_ascii_case(&text));
                let known = known.map(|(_, protocol)| *protocol).filter(|protocol| protocol.has_ports());
                known.or_else(|| decoder.expected(node, "TCP, UDP, SCTP or UDPLite"))
            });
            let port = fields.required(decoder, "port", |decoder, node| {
                decoder.number::<u16>(node, "a port from 1 to 65535").filter(|port| *port > 0)
            });
            for name in ["hostPort", "hostIP"] {
                fields.optional(decoder, name, |_, _| Some(()));
            }
            fields.finish(decoder);
            let name = name.unwrap_or_default();
            if !name.is_empty() && !is_port_name(&name) {
                return decoder.expected(node, "the name of a port");
            }
            Some(NamedPort { name, protocol: protocol?, port: port? })
        })
        .map(|ports| ports.into_iter().filter(|port| !port.name.is_empty()).collect())
}
