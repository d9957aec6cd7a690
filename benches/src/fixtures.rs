//! Policies and workloads to measure with.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::ops::Range;
use std::sync::Arc;

use anyhow::anyhow;
use bulkhead_model::entity::with_automatic_labels;
use bulkhead_model::host_policy::{
    Attachment, Cell, ClassId, Column, CompiledId, CompiledPolicy, EndpointBinding, HostPolicy, Row, RuleId,
};
use bulkhead_model::labels::NAMESPACE_LABELS_PREFIX;
use bulkhead_model::policy::{Action, Peer, PolicySpec, Rule};
use bulkhead_model::ports::Protocol;
use bulkhead_model::verdict::FIRST_FREE_RULE_ID;
use bulkhead_model::{Entity, Kind, Labels, ObjectKey, Prefix, Selector, Verdict};

/// The only compiled policy of [`rules_per_peer`].
const COMPILED: CompiledId = CompiledId(1);

/// The `number`-th address from 10.64.0.0 on.
pub(crate) fn address(number: u32) -> Ipv4Addr {
    Ipv4Addr::from_bits(u32::from(Ipv4Addr::new(10, 64, 0, 0)) + number)
}

/// [`rules_per_peer`] of TCP.
pub(crate) fn one_rule_per_peer(
    peers: u32,
    endpoints: &[(u32, Ipv4Addr)],
    ports: (u16, u16),
) -> anyhow::Result<HostPolicy> {
    rules_per_peer(peers, endpoints, Protocol::TCP, ports)
}

/// A host policy under which each of `peers` addresses has a class, a row and a rule of its own that lets
/// it speak these ports of a protocol with every endpoint; everything else is refused. The endpoints themselves are the
/// last of the peers.
pub(crate) fn rules_per_peer(
    peers: u32,
    endpoints: &[(u32, Ipv4Addr)],
    protocol: Protocol,
    ports: (u16, u16),
) -> anyhow::Result<HostPolicy> {
    let real = u32::try_from(endpoints.len())?;
    let fillers = peers.checked_sub(real).ok_or_else(|| anyhow!("too few peers"))?;
    let addresses = (0..fillers).map(address).chain(endpoints.iter().map(|(_, address)| *address));
    let refused = cell(Verdict::Deny, 0);
    let row = |number| {
        let (first, last) = (protocol.key(ports.0), protocol.key(ports.1));
        let steps = [(0, refused), (first, cell(Verdict::Allow, number)), (last + 1, refused)];
        Arc::new(Row::new(steps.map(|(first, cell)| Column { first, cell })))
    };
    let compiled = CompiledPolicy {
        id: COMPILED,
        default_row: Arc::new(Row::uniform(refused)),
        rows: (1..=peers).map(|number| (ClassId(number), row(number))).collect(),
    };
    let bindings = endpoints.iter().map(|(ifindex, address)| {
        let binding = EndpointBinding {
            attachment: Attachment::Interface(*ifindex),
            addresses: vec![(*address).into()],
            ingress: COMPILED,
            egress: COMPILED,
        };
        (Arc::from(address.to_string()), binding)
    });
    Ok(HostPolicy {
        revision: 1,
        addresses: addresses.map(|ip| Prefix::host(IpAddr::V4(ip))).zip((1..).map(ClassId)).collect(),
        policies: BTreeMap::from([(COMPILED, compiled)]),
        endpoints: bindings.collect(),
        rules: BTreeMap::new(),
    })
}

fn cell(verdict: Verdict, rule: u32) -> Cell {
    let rule = RuleId(FIRST_FREE_RULE_ID + rule);
    Cell { verdict, rule, audit_verdict: verdict, audit_rule: rule, log: false, reject: false, written: true }
}

/// Reads a selector.
pub(crate) fn selector(text: &str) -> anyhow::Result<Selector> {
    Selector::parse(text).map_err(|error| anyhow!("{text}: {error}"))
}

/// Key of a policy.
pub(crate) fn policy_key(name: &str) -> ObjectKey {
    ObjectKey { kind: Kind::Policy, namespace: None, name: name.into() }
}

/// A policy that lets the members of each of `from` call, and nobody else.
pub(crate) fn allow_from(applies_to: Selector, from: &[Selector]) -> PolicySpec {
    let rule = |selector: &Selector| Rule {
        peers: vec![Peer { selector: Some(selector.clone()), ..Peer::default() }],
        ..Rule::new(Action::Allow)
    };
    PolicySpec { ingress: Some(from.iter().map(rule).collect()), ..PolicySpec::new(applies_to) }
}

/// A workload as selectors see it.
pub(crate) fn workload(
    name: &str,
    host: &Arc<str>,
    labels: &[(&str, &str)],
    ip: Ipv4Addr,
) -> anyhow::Result<Entity> {
    let mut own = Labels::new();
    for (key, value) in labels {
        own.insert(key, value)?;
    }
    Ok(Entity {
        name: format!("Workload/{name}").into(),
        labels: with_automatic_labels(&own, Kind::Workload, None, name, Some(host)),
        prefixes: vec![Prefix::host(IpAddr::V4(ip))],
        host: Some(Arc::clone(host)),
        ..Entity::default()
    })
}

/// A workload in a namespace, from whose labels it inherits.
pub(crate) fn pod(
    namespace: &str,
    name: &str,
    host: &Arc<str>,
    labels: &[(String, String)],
    inherited: &[(String, String)],
    ip: Ipv4Addr,
) -> anyhow::Result<Entity> {
    let mut own = Labels::new();
    for (key, value) in labels {
        own.insert(key, value)?;
    }
    for (key, value) in inherited {
        own.insert_any(&format!("{NAMESPACE_LABELS_PREFIX}{key}"), value)?;
    }
    Ok(Entity {
        name: format!("Workload/{namespace}/{name}").into(),
        labels: with_automatic_labels(&own, Kind::Workload, Some(namespace), name, Some(host)),
        prefixes: vec![Prefix::host(IpAddr::V4(ip))],
        host: Some(Arc::clone(host)),
        ..Entity::default()
    })
}

/// A network set with a label that is its name.
pub(crate) fn network_set(name: &str, addresses: Range<u32>) -> anyhow::Result<Entity> {
    let mut own = Labels::new();
    own.insert("network-set-name", name)?;
    Ok(Entity {
        name: format!("NetworkSet/{name}").into(),
        labels: with_automatic_labels(&own, Kind::NetworkSet, None, name, None),
        prefixes: addresses.map(|number| Prefix::host(IpAddr::V4(address(number)))).collect(),
        ..Entity::default()
    })
}
