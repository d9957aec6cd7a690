//! What would become of a connection, and why: the reference evaluator's answer over the current state.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use bulkhead_engine::{
    FindError, Flow, World, decide, explain_policy, explain_workload, find_end, find_endpoint, find_policy,
};
use bulkhead_model::ports::{PortKey, PortMatch, PortMatchError, Protocol, USUAL_SOURCE_PORT};
use bulkhead_model::resource::API_VERSION;
use bulkhead_model::time::Timestamp;
use serde_json::{Value, json};

use super::Shared;
use super::input::Parameters;
use super::problem::Refusal;
use crate::clock;
use crate::repository::View;

/// `GET /apis/bulkhead.dev/v1/explain` with `from`, `to` and `port`, with `workload`, or with `policy`.
pub(super) async fn explain(State(context): Shared, parameters: Parameters) -> Result<Json<Value>, Refusal> {
    parameters.only(&["from", "to", "port", "sourcePort", "workload", "policy"])?;
    let question = Question::read(&parameters)?;
    let searching = Arc::clone(&context);
    // Never closed, so an error cannot be.
    let _one_of_few = searching.searches.acquire().await.ok();
    // The evaluator is a plain walk over a copy of everything: no work for the threads that serve.
    let explained = tokio::task::spawn_blocking(move || -> Result<Json<Value>, Refusal> {
        let (world, revision) = {
            let view = context.repository.view();
            (world(&view, clock::now()), view.revision)
        };
        let mut answer = question.answer(&world)?;
        answer["apiVersion"] = API_VERSION.into();
        answer["metadata"] = json!({ "resourceVersion": revision.to_string() });
        Ok(Json(answer))
    });
    explained.await.unwrap_or_else(|error| {
        let message = format!("the evaluation failed: {error}");
        Err(Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, "InternalError", message))
    })
}

/// What is to be explained.
enum Question {
    Flow { from: String, to: String, port: String, key: PortKey, source_port: u16 },
    Workload(String),
    Policy(String),
}

impl Question {
    fn read(parameters: &Parameters) -> Result<Self, Refusal> {
        let (workload, policy) = (parameters.text("workload"), parameters.text("policy"));
        let of_flow =
            ["from", "to", "port", "sourcePort"].into_iter().find(|name| parameters.text(name).is_some());
        match (workload, policy, of_flow) {
            (Some(name), None, None) => Ok(Self::Workload(name.to_owned())),
            (None, Some(name), None) => Ok(Self::Policy(name.to_owned())),
            (None, None, _) => {
                let expected = "a workload's name, its short name or an address";
                let from = parameters.required("from", expected)?.to_owned();
                let to = parameters.required("to", expected)?.to_owned();
                let port = parameters.required("port", "like tcp/80")?.to_owned();
                let key = port_key(&port)?;
                let source_port = source_port(parameters, key)?;
                Ok(Self::Flow { from, to, port, key, source_port })
            }
            _ => Err(Refusal::bad_request("ask for a connection, a workload or a policy, one of them")),
        }
    }

    fn answer(&self, world: &World) -> Result<Value, Refusal> {
        match self {
            Self::Flow { from, to, port, key, source_port } => {
                let (source, destination) = (find_end(world, from)?, find_end(world, to)?);
                let flow = Flow { source, destination, key: *key, source_port: *source_port };
                let explanation = decide(world, &flow);
                Ok(json!({
                    "kind": "Explanation",
                    "from": flow.source,
                    "to": flow.destination,
                    "port": port,
                    "explanation": explanation,
                }))
            }
            Self::Workload(name) => {
                let explained = explain_workload(world, find_endpoint(world, name)?);
                Ok(json!({ "kind": "WorkloadExplanation", "explanation": explained }))
            }
            Self::Policy(name) => {
                let explained = explain_policy(world, find_policy(world, name)?);
                Ok(json!({ "kind": "PolicyExplanation", "explanation": explained }))
            }
        }
    }
}

impl From<FindError> for Refusal {
    fn from(error: FindError) -> Self {
        match error {
            FindError::Unknown(message) => Self::not_found(message),
            FindError::Ambiguous(message) => Self::bad_request(message),
        }
    }
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

fn world(view: &View, now: Timestamp) -> World {
    let mut world = World { now, ..World::new() };
    for (key, meaning) in view.meanings() {
        for (name, spec) in &meaning.tiers {
            world.set_tier(name, Some(spec.clone()));
        }
        world.policies.extend(meaning.policies.iter().cloned());
        world
            .entities
            .extend(view.entities_of(key).into_iter().map(|entity| (Arc::clone(&entity.name), entity)));
        if let Some(settings) = &meaning.settings {
            world.settings = settings.clone();
        }
    }
    world
}
