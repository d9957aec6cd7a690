//! Namespaces, service accounts, nodes, pods and the backends of services: who is there.

use std::net::IpAddr;

use super::items;
use crate::address::Prefix;
use crate::document::{Node, Value};
use crate::entity::Entity;
use crate::foreign::labels;
use crate::kind::Kind;
use crate::labels::SERVICE_LABEL;
use crate::meaning::{Bequest, Meaning};
use crate::ports::{NamedPort, Protocol};
use crate::resource::ObjectKey;

/// Label that every namespace has (N7).
const NAME_OF_NAMESPACE: &str = "kubernetes.io/metadata.name";
/// Label that names the service of an EndpointSlice.
const NAME_OF_SERVICE: &str = "kubernetes.io/service-name";

/// What a piece of inventory stands for. A Service alone stands for nothing: its EndpointSlices have the addresses.
pub(super) fn meaning(node: &Node, key: &ObjectKey) -> Option<Meaning> {
    let mut meaning = Meaning::default();
    match key.kind {
        Kind::KubernetesNamespace => {
            let mut labels = labels(node);
            // The API server sets it and nobody can change it.
            let _ = labels.insert(NAME_OF_NAMESPACE, &key.name);
            meaning.bequests.push(Bequest::of_namespace(&key.name, &labels, None));
            meaning.bequests.push(Bequest::of_namespace_profile(&key.name));
        }
        Kind::ServiceAccount => {
            let namespace = key.namespace.as_deref().unwrap_or_default();
            meaning.bequests.push(Bequest::of_service_account(namespace, &key.name, &labels(node)));
            meaning.bequests.push(Bequest::of_service_account_profile(namespace, &key.name));
        }
        Kind::Node => meaning.entities.push(self::node(node, key)),
        Kind::Pod => meaning.entities.push(pod(node, key)),
        Kind::EndpointSlice => meaning.entities.extend(backends(node, key)),
        _ => {}
    }
    Some(meaning)
}

fn node(node: &Node, key: &ObjectKey) -> Entity {
    let listed = node.child("status").and_then(|status| status.child("addresses"));
    let addresses = items(listed).iter().filter_map(|entry| address(entry.child("address")));
    Entity {
        prefixes: addresses.map(Prefix::host).collect(),
        ..Entity::new(key, Kind::Host, &labels(node), None)
    }
}

fn pod(node: &Node, key: &ObjectKey) -> Entity {
    let spec = node.child("spec");
    let status = node.child("status");
    let mut addresses: Vec<IpAddr> =
        status.and_then(|status| address(status.child("podIP"))).into_iter().collect();
    let listed = status.and_then(|status| status.child("podIPs"));
    addresses.extend(items(listed).iter().filter_map(|entry| address(entry.child("ip"))));
    addresses.sort_unstable();
    addresses.dedup();
    let text = |name| spec.and_then(|spec| spec.child(name)).and_then(Node::as_str);
    let on_host = spec.and_then(|spec| spec.child("hostNetwork"));
    let on_host = on_host.is_some_and(|node| node.value == Value::Bool(true));
    let ended = status.and_then(|status| status.child("phase")).and_then(Node::as_str);
    if !on_host && matches!(ended, Some("Succeeded" | "Failed")) {
        // Its addresses may be another's by now.
        addresses.clear();
    }
    // On its node's network it is no workload (N14, C7): its address is the node's.
    let kind = if on_host { Kind::Pod } else { Kind::Workload };
    let mut own = labels(node);
    // As Calico labels it.
    let _ = own.insert("projectcalico.org/orchestrator", "k8s");
    let mut entity = Entity::new(key, kind, &own, text("nodeName"));
    entity.prefixes = addresses.into_iter().map(Prefix::host).collect();
    entity.set_service_account(text("serviceAccountName").or(Some("default")));
    entity.set_ports(ports(spec));
    entity
}

/// The addresses and ports behind a service. A port is named by its number, as no rule can name one: rules mean these
/// by the service and not by the port.
fn backends(node: &Node, key: &ObjectKey) -> Option<Entity> {
    let own = labels(node);
    let service = own.get(NAME_OF_SERVICE)?.to_owned();
    let mut entity = Entity::new(key, Kind::EndpointSlice, &own, None);
    let _ = entity.labels.insert_any(SERVICE_LABEL, &service);
    let ready = |endpoint: &&Node| {
        let ready = endpoint.child("conditions").and_then(|conditions| conditions.child("ready"));
        ready.is_none_or(|ready| ready.value != Value::Bool(false))
    };
    let endpoints = items(node.child("endpoints")).iter().filter(ready);
    let addresses = endpoints.flat_map(|endpoint| items(endpoint.child("addresses")));
    entity.prefixes = addresses.filter_map(|text| address(Some(text))).map(Prefix::host).collect();
    let ports = items(node.child("ports")).iter().filter_map(|port| {
        let port =
            NamedPort { name: String::new(), protocol: protocol(port)?, port: number(port.child("port"))? };
        Some(NamedPort { name: port.port.to_string(), ..port })
    });
    entity.set_ports(ports.collect());
    Some(entity)
}

fn protocol(port: &Node) -> Option<Protocol> {
    match port.child("protocol").and_then(Node::as_str) {
        None | Some("TCP") => Some(Protocol::TCP),
        Some("UDP") => Some(Protocol::UDP),
        Some("SCTP") => Some(Protocol::SCTP),
        Some(_) => None,
    }
}

fn number(node: Option<&Node>) -> Option<u16> {
    let Value::Number(number) = &node?.value else { return None };
    number.parse().ok()
}

/// Names that the containers give to their ports.
fn ports(spec: Option<&Node>) -> Vec<NamedPort> {
    let containers = items(spec.and_then(|spec| spec.child("containers")));
    // A restartable init container (a sidecar) serves as well.
    let sidecars = items(spec.and_then(|spec| spec.child("initContainers")));
    let ports = containers.iter().chain(sidecars).flat_map(|container| items(container.child("ports")));
    ports
        .filter_map(|port| {
            let name = port.child("name")?.as_str()?.to_owned();
            Some(NamedPort { name, protocol: protocol(port)?, port: number(port.child("containerPort"))? })
        })
        .collect()
}

fn address(node: Option<&Node>) -> Option<IpAddr> {
    node?.as_str()?.parse().ok()
}
