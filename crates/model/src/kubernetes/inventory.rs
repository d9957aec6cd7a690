//! Namespaces, nodes and pods: who is there.

use std::net::IpAddr;

use super::{Object, items, metadata};
use crate::address::Prefix;
use crate::document::{Decoder, Node, Value};
use crate::entity::{Entity, port_label, with_automatic_labels};
use crate::labels::{Labels, SERVICE_ACCOUNT_LABEL};
use crate::ports::{NamedPort, Protocol};
use crate::resource::Kind;

/// Label that every namespace has (N7).
const NAME_OF_NAMESPACE: &str = "kubernetes.io/metadata.name";

pub(super) fn namespace(decoder: &mut Decoder, node: &Node) -> Option<Object> {
    let (name, _) = metadata(decoder, node)?;
    let mut labels = labels(node);
    // The API server sets it and nobody can change it.
    let _ = labels.insert(NAME_OF_NAMESPACE, &name);
    Some(Object::Namespace(name, labels))
}

pub(super) fn node(decoder: &mut Decoder, node: &Node) -> Option<Object> {
    let (name, _) = metadata(decoder, node)?;
    let listed = node.child("status").and_then(|status| status.child("addresses"));
    let addresses = items(listed).iter().filter_map(|entry| address(entry.child("address")));
    Some(Object::Node(Entity {
        name: format!("{}/{name}", Kind::Host).into(),
        labels: with_automatic_labels(&labels(node), Kind::Host, None, &name, None),
        prefixes: addresses.map(Prefix::host).collect(),
        host: None,
        ports: Vec::new(),
    }))
}

pub(super) fn pod(decoder: &mut Decoder, node: &Node) -> Option<Object> {
    let (name, namespace) = metadata(decoder, node)?;
    let namespace = namespace.unwrap_or_else(|| "default".into());
    let spec = node.child("spec");
    let status = node.child("status");
    let mut addresses: Vec<IpAddr> =
        status.and_then(|status| address(status.child("podIP"))).into_iter().collect();
    let listed = status.and_then(|status| status.child("podIPs"));
    addresses.extend(items(listed).iter().filter_map(|entry| address(entry.child("ip"))));
    addresses.sort_unstable();
    addresses.dedup();
    let on_host = spec.and_then(|spec| spec.child("hostNetwork"));
    if on_host.is_some_and(|node| node.value == Value::Bool(true)) {
        return Some(Object::HostPod(format!("{namespace}/{name}"), addresses));
    }
    let ended = status.and_then(|status| status.child("phase")).and_then(Node::as_str);
    if matches!(ended, Some("Succeeded" | "Failed")) {
        // Its addresses may be another's by now.
        addresses.clear();
    }
    let text = |name| spec.and_then(|spec| spec.child(name)).and_then(Node::as_str);
    let host = text("nodeName");
    let own = labels(node);
    let mut labels = with_automatic_labels(&own, Kind::Workload, Some(&namespace), &name, host);
    if let Some(account) = text("serviceAccountName") {
        let _ = labels.insert_any(SERVICE_ACCOUNT_LABEL, account);
    }
    let ports = ports(spec);
    for port in &ports {
        let _ = labels.insert_any(&port_label(port.protocol, &port.name), &port.port.to_string());
    }
    Some(Object::Pod(Entity {
        name: format!("{}/{namespace}/{name}", Kind::Workload).into(),
        labels,
        prefixes: addresses.into_iter().map(Prefix::host).collect(),
        host: host.map(Into::into),
        ports,
    }))
}

/// Names that the containers give to their ports.
fn ports(spec: Option<&Node>) -> Vec<NamedPort> {
    let containers = items(spec.and_then(|spec| spec.child("containers")));
    let ports = containers.iter().flat_map(|container| items(container.child("ports")));
    ports
        .filter_map(|port| {
            let name = port.child("name")?.as_str()?.to_owned();
            let Value::Number(number) = &port.child("containerPort")?.value else { return None };
            let protocol = match port.child("protocol").and_then(Node::as_str) {
                None | Some("TCP") => Protocol::TCP,
                Some("UDP") => Protocol::UDP,
                Some("SCTP") => Protocol::SCTP,
                Some(_) => return None,
            };
            Some(NamedPort { name, protocol, port: number.parse().ok()? })
        })
        .collect()
}

fn labels(node: &Node) -> Labels {
    let mapping = node.child("metadata").and_then(|metadata| metadata.child("labels"));
    let Some(Value::Mapping(entries)) = mapping.map(|mapping| &mapping.value) else { return Labels::new() };
    let pairs = entries.iter().filter_map(|(key, value)| Some((key.as_str()?, value.as_str()?)));
    Labels::from_foreign(pairs).0
}

fn address(node: Option<&Node>) -> Option<IpAddr> {
    node?.as_str()?.parse().ok()
}
