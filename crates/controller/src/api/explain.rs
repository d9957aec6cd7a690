//! What would become of a connection, and why: the reference evaluator's answer over the current state.

use std::net::IpAddr;
use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use bulkhead_engine::{Endpoint, Flow, World, decide};
use bulkhead_model::ports::{PortKey, PortMatch, PortMatchError, Protocol, USUAL_SOURCE_PORT};
use bulkhead_model::resource::API_VERSION;
use bulkhead_model::{Kind, ObjectKey, Resource};
use serde_json::{Value, json};

use super::Shared;
use super::input::Parameters;
use super::problem::Refusal;
use crate::repository::View;

/// Most names that an ambiguous short name lists.
const CANDIDATES_MAX: usize = 10;

/// `GET /apis/bulkhead.dev/v1/explain?from=&to=&port=&sourcePort=`.
pub(super) async fn explain(State(context): Shared, parameters: Parameters) -> Result<Json<Value>, Refusal> {
    parameters.only(&["from", "to", "port", "sourcePort"])?;
    let expected = "a workload's name, its short name or an address";
    let from = parameters.required("from", expected)?.to_owned();
    let to = parameters.required("to", expected)?.to_owned();
    let port = parameters.required("port", "like tcp/80")?.to_owned();
    let key = port_key(&port)?;
    let source_port = source_port(&parameters, key)?;
    let searching = Arc::clone(&context);
    // Never closed, so an error cannot be.
    let _one_of_few = searching.searches.acquire().await.ok();
    // The evaluator is a plain walk over a copy of everything: no work for the threads that serve.
    let explained = tokio::task::spawn_blocking(move || -> Result<Json<Value>, Refusal> {
        let (world, flow, revision) = {
            let view = context.repository.view();
            let (source, destination) = (endpoint(&view, &from)?, endpoint(&view, &to)?);
            let flow = Flow { source, destination, key, source_port };
            (world(&view), flow, view.revision)
        };
        let explanation = decide(&world, &flow);
        Ok(Json(json!({
            "apiVersion": API_VERSION,
            "kind": "Explanation",
            "metadata": { "resourceVersion": revision.to_string() },
            "from": flow.source,
            "to": flow.destination,
            "port": port,
            "sourcePort": source_port,
            "explanation": explanation,
        })))
    });
    explained.await.unwrap_or_else(|error| {
        let message = format!("the evaluation failed: {error}");
        Err(Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, "InternalError", message))
    })
}

/// One port, or one message type of ICMP.
fn port_key(text: &str) -> Result<PortKey, Refusal> {
    let wrong = |error: String| Refusal::bad_request(format!("query parameter port: {error}"));
    let port: PortMatch = text.parse().map_err(|error: PortMatchError| wrong(error.to_string()))?;
    let several = match &port {
        PortMatch::Any => true,
        PortMatch::Protocol(protocol) => protocol.has_ports(),
        PortMatch::Ports { first, last, .. } => first != last,
        PortMatch::Icmp { .. } => false,
        PortMatch::Named { .. } => {
            return Err(wrong(format!("{text:?} is a name: give the number, like tcp/80")));
        }
    };
    if several {
        return Err(wrong(format!("{text:?} is more than one: name a single port, like tcp/80")));
    }
    // Only a name has no interval, and names were refused.
    Ok(port.interval().map_or(0, |(first, _)| first))
}

/// The one that is given, else [`USUAL_SOURCE_PORT`]; 0 for protocols without.
fn source_port(parameters: &Parameters, key: PortKey) -> Result<u16, Refusal> {
    let given = parameters.parsed::<u16>("sourcePort", "a port from 0 to 65535")?;
    let protocol = Protocol::of_key(key);
    match given {
        Some(_) if !protocol.has_ports() => {
            Err(Refusal::bad_request(format!("query parameter sourcePort: {protocol} has no ports")))
        }
        Some(port) => Ok(port),
        None if protocol.has_ports() => Ok(USUAL_SOURCE_PORT),
        None => Ok(0),
    }
}

fn world(view: &View) -> World {
    let mut world = World::new();
    for kind in [Kind::Tier, Kind::Policy, Kind::NetworkSet, Kind::Workload] {
        for object in view.of_kind(kind) {
            world.insert(&object.resource);
        }
    }
    world
}

/// Whom a text means: an address, a workload's full name, or its name without the host if only one has it.
fn endpoint(view: &View, text: &str) -> Result<Endpoint, Refusal> {
    if let Ok(address) = text.parse::<IpAddr>() {
        let holder = view.of_kind(Kind::Workload).find(|object| match &object.resource {
            Resource::Workload(workload) => workload.spec.addresses.contains(&address),
            _ => false,
        });
        let workload = holder.map(|object| entity_name(&object.resource));
        return Ok(Endpoint { workload, address });
    }
    let found = find(view, text)?;
    let address = match found {
        Resource::Workload(workload) => workload.spec.addresses.first().copied(),
        _ => None,
    };
    let address = address
        .ok_or_else(|| Refusal::bad_request(format!("{} has no address", found.key().qualified_name())))?;
    Ok(Endpoint { workload: Some(entity_name(found)), address })
}

fn entity_name(resource: &Resource) -> Arc<str> {
    resource.key().to_string().into()
}

fn find<'a>(view: &'a View, text: &str) -> Result<&'a Resource, Refusal> {
    let text = text.strip_prefix("Workload/").unwrap_or(text);
    let (namespace, name) = match text.split_once('/') {
        Some((namespace, name)) => (Some(namespace.to_owned()), name),
        None => (None, text),
    };
    let key = ObjectKey { kind: Kind::Workload, namespace: namespace.clone(), name: name.to_owned() };
    if let Some(object) = view.get(&key) {
        return Ok(&object.resource);
    }
    let is_short = |resource: &Resource| match resource {
        Resource::Workload(workload) => {
            let host = &workload.spec.host;
            workload.metadata.namespace == namespace
                && workload.metadata.name.strip_suffix(host.as_str()).and_then(|name| name.strip_suffix('.'))
                    == Some(name)
        }
        _ => false,
    };
    let mut candidates =
        view.of_kind(Kind::Workload).map(|object| &object.resource).filter(|resource| is_short(resource));
    match (candidates.next(), candidates.next()) {
        (Some(only), None) => Ok(only),
        (None, _) => {
            let names: Vec<_> =
                view.of_kind(Kind::Workload).map(|object| object.resource.key().qualified_name()).collect();
            let suggestion = bulkhead_model::suggest::nearest(text, names.iter().map(String::as_str))
                .map_or_else(String::new, |name| format!("; did you mean {name}?"));
            Err(Refusal::not_found(format!("there is no workload {text:?}{suggestion}")))
        }
        (Some(first), Some(second)) => {
            let names: Vec<_> = [first, second]
                .into_iter()
                .chain(candidates)
                .take(CANDIDATES_MAX)
                .map(|resource| resource.key().qualified_name())
                .collect();
            let names = names.join(", ");
            Err(Refusal::bad_request(format!("{text:?} could be any of {names}: say which")))
        }
    }
}
