//! The agent's own socket: HTTP and JSON over a Unix socket that only root can open.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;

use axum::Router;
use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Json, Response};
use axum::routing::{delete, get};
use bulkhead_discover::NotManaged;
use bulkhead_model::host_policy::Attachment;
use bulkhead_model::ports::{PortMatch, Protocol, USUAL_SOURCE_PORT};
use bulkhead_model::registration::{self, Registration};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::net::UnixListener;
use tokio::sync::{mpsc, oneshot};

use crate::inputs::Input;
use crate::reconcile::Lookup;
use crate::trace::{self, Watched};
use crate::{AgentError, Config};

/// A question that only the reconcile loop can answer.
#[derive(Debug)]
pub(crate) enum Request {
    Status,
    Flows(usize),
    Plan,
    Dump,
    Lookup(Lookup),
}

/// One endpoint as it is in force.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Programmed {
    /// Name in the repository.
    pub workload: String,
    /// Where its packets are met.
    pub attachment: Attachment,
    /// Its labels.
    pub labels: bulkhead_model::Labels,
    /// Its addresses.
    pub addresses: Vec<std::net::IpAddr>,
    /// Whether connections towards it are judged by a policy (else all are denied).
    pub ingress: bool,
    /// Whether connections from it are.
    pub egress: bool,
}

/// What `GET /status` answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AgentReport {
    /// Name of this host.
    pub host: String,
    /// Version of the agent.
    pub version: String,
    /// The controller's address.
    pub controller: String,
    /// Whether the stream to it is open.
    pub connected: bool,
    /// Why not, if it is not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disconnected_because: Option<String>,
    /// Repository revision in force.
    pub revision: u64,
    /// Name of the dataplane.
    pub dataplane: String,
    /// Why that one, if it is not what everybody would expect.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dataplane_because: Option<String>,
    /// Whether tables are in the kernel.
    pub programmed: bool,
    /// Endpoints in force.
    pub endpoints: Vec<Programmed>,
    /// What is not enforced, and why.
    pub not_enforced: Vec<NotManaged>,
    /// Dropped packets by reason.
    pub drops: BTreeMap<String, u64>,
    /// Kernel tables: entries in use and capacity.
    pub tables: BTreeMap<String, (u64, u64)>,
    /// Entries written since the agent started.
    pub entries_written: u64,
    /// Flow records that were dropped for want of room.
    pub flow_records_lost: u64,
    /// Events that nobody read in time; the next sweep tells of the connections that are still there.
    #[serde(default)]
    pub events_lost: u64,
    /// Refused packets that are in `drops` and in no flow, for want of room.
    #[serde(default)]
    pub refusals_unrecorded: u64,
    /// Refused packets whose sender should have been told and was not.
    #[serde(default)]
    pub refusals_untold: u64,
}

#[derive(Clone)]
struct Api {
    config: Arc<Config>,
    input: mpsc::Sender<Input>,
    nudge: mpsc::Sender<()>,
    watched: Watched,
}

/// Opens the socket and serves it.
pub(crate) fn spawn(
    config: &Arc<Config>,
    input: mpsc::Sender<Input>,
    nudge: mpsc::Sender<()>,
    watched: Watched,
) -> Result<tokio::task::JoinHandle<()>, AgentError> {
    let path = &config.socket;
    let fail = |source| AgentError::Socket { path: path.clone(), source };
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).map_err(fail)?;
    }
    // A socket that nobody listens on any more is in the way; a live agent's database lock was checked before.
    match fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(fail(error)),
        _ => {}
    }
    let listener = UnixListener::bind(path).map_err(fail)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(fail)?;
    let api = Api { config: Arc::clone(config), input, nudge, watched };
    let router = Router::new()
        .route("/status", get(status))
        .route("/flows", get(flows))
        .route("/plan", get(plan))
        .route("/trace", get(follow))
        .route("/dataplane/dump", get(dump))
        .route("/dataplane/lookup", get(lookup))
        .route("/workloads", get(workloads).post(add_workload))
        .route("/workloads/{name}", delete(remove_workload))
        .with_state(api);
    Ok(tokio::spawn(async move {
        if let Err(error) = axum::serve(listener, router).await {
            tracing::error!(%error, "the agent's socket is closed");
        }
    }))
}

fn refuse(code: StatusCode, message: impl Into<String>) -> Response {
    (code, Json(json!({ "message": message.into() }))).into_response()
}

async fn ask(api: &Api, request: Request) -> Response {
    let (reply, answer) = oneshot::channel();
    if api.input.send(Input::Request(request, reply)).await.is_err() {
        return refuse(StatusCode::SERVICE_UNAVAILABLE, "the agent is stopping");
    }
    match answer.await {
        Ok(value) => Json(value).into_response(),
        Err(_) => refuse(StatusCode::SERVICE_UNAVAILABLE, "the agent is stopping"),
    }
}

async fn status(State(api): State<Api>) -> Response {
    ask(&api, Request::Status).await
}

async fn plan(State(api): State<Api>) -> Response {
    ask(&api, Request::Plan).await
}

async fn follow(State(api): State<Api>, Query(filter): Query<trace::Filter>) -> Response {
    trace::watch(&api.watched, filter)
}

async fn dump(State(api): State<Api>) -> Response {
    ask(&api, Request::Dump).await
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct LookupQuery {
    from: String,
    to: String,
    port: String,
    source_port: Option<u16>,
}

async fn lookup(State(api): State<Api>, Query(query): Query<LookupQuery>) -> Response {
    let LookupQuery { from, to, port, source_port } = query;
    let single = port.parse::<PortMatch>().ok().and_then(|port| port.single());
    let Some(key) = single else {
        return refuse(StatusCode::BAD_REQUEST, format!("port {port:?}: expected one port, like tcp/80"));
    };
    let has_ports = Protocol::of_key(key).has_ports();
    let source_port = if has_ports { source_port.unwrap_or(USUAL_SOURCE_PORT) } else { 0 };
    ask(&api, Request::Lookup(Lookup { from, to, key, source_port })).await
}

#[derive(Deserialize)]
struct FlowQuery {
    #[serde(default = "hundred")]
    limit: usize,
}

fn hundred() -> usize {
    100
}

async fn flows(State(api): State<Api>, Query(query): Query<FlowQuery>) -> Response {
    ask(&api, Request::Flows(query.limit)).await
}

async fn workloads(State(api): State<Api>) -> Response {
    match ask_registrations(&api.config).await {
        Ok(found) => Json(found).into_response(),
        Err(message) => refuse(StatusCode::INTERNAL_SERVER_ERROR, message),
    }
}

async fn ask_registrations(config: &Config) -> Result<Value, String> {
    let directory = config.registrations();
    let found = tokio::task::spawn_blocking(move || bulkhead_discover::directory::look(&directory)).await;
    let found = found.map_err(|error| error.to_string())?;
    serde_json::to_value(found).map_err(|error| error.to_string())
}

/// Registers a workload: refused if its namespace or interface is not there, kept on disk otherwise.
async fn add_workload(State(api): State<Api>, body: String) -> Response {
    let mut registrations = match registration::parse("registration", &body) {
        Ok(registrations) => registrations,
        Err(problems) => {
            let text: Vec<_> = problems.iter().map(ToString::to_string).collect();
            return refuse(StatusCode::UNPROCESSABLE_ENTITY, text.join("\n"));
        }
    };
    let (Some(registration), true) = (registrations.pop(), registrations.is_empty()) else {
        return refuse(StatusCode::UNPROCESSABLE_ENTITY, "expected one registration");
    };
    let file = api.config.registrations().join(format!("{}.json", registration.name));
    let stored = tokio::task::spawn_blocking(move || store(&file, &registration)).await;
    match stored {
        Ok(Ok(workload)) => {
            // A full channel means that a look is due anyway.
            let _ = api.nudge.try_send(());
            (StatusCode::CREATED, Json(json!(workload))).into_response()
        }
        Ok(Err(message)) => refuse(StatusCode::UNPROCESSABLE_ENTITY, message),
        Err(error) => refuse(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()),
    }
}

fn store(
    file: &std::path::Path,
    registration: &Registration,
) -> Result<bulkhead_discover::FoundWorkload, String> {
    let workload = bulkhead_discover::directory::resolve(registration).map_err(|error| error.to_string())?;
    let text = serde_json::to_string_pretty(registration).map_err(|error| error.to_string())?;
    let write = || -> std::io::Result<()> {
        if let Some(parent) = file.parent() {
            fs::create_dir_all(parent)?;
        }
        // Whole or not at all, whenever this process is killed.
        let aside = file.with_extension("new");
        fs::write(&aside, text)?;
        fs::rename(&aside, file)
    };
    write().map_err(|error| format!("cannot keep the registration: {error}"))?;
    Ok(workload)
}

async fn remove_workload(State(api): State<Api>, Path(name): Path<String>) -> Response {
    if !bulkhead_model::resource::is_name(&name) {
        return refuse(StatusCode::UNPROCESSABLE_ENTITY, format!("{name:?} is no name of a workload"));
    }
    let file = api.config.registrations().join(format!("{name}.json"));
    match fs::remove_file(&file) {
        Ok(()) => {
            let _ = api.nudge.try_send(());
            StatusCode::NO_CONTENT.into_response()
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            let message = format!("no workload {name:?} was added by hand on this host");
            refuse(StatusCode::NOT_FOUND, message)
        }
        Err(error) => refuse(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()),
    }
}
