//! How the controller is, for people, probes and Prometheus.

use axum::Json;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use bulkhead_model::resource::API_VERSION;
use bulkhead_store::free_bytes;
use serde_json::{Value, json};

use super::confirmations::standing;
use super::input::Parameters;
use super::problem::Refusal;
use super::{Shared, elsewhere};
use crate::clock;
use crate::context::{Context, STREAMS_MAX};
use crate::metrics::Page;

/// `GET /healthz`: the process serves.
pub(super) async fn healthz() -> &'static str {
    "ok\n"
}

/// `GET /readyz`: the view has what the store has, so answers are current, and changes are taken.
pub(super) async fn readyz(State(context): Shared) -> Response {
    let stored = match context.repository.store().revision().await {
        Ok(revision) => revision.0,
        Err(error) => return (StatusCode::SERVICE_UNAVAILABLE, format!("{error}\n")).into_response(),
    };
    if let Some(error) = context.repository.store().refuses() {
        return (StatusCode::SERVICE_UNAVAILABLE, format!("{error}\n")).into_response();
    }
    if context.audit.waiting() > 0 {
        let message = "the audit log cannot be written: changes are refused\n";
        return (StatusCode::SERVICE_UNAVAILABLE, message).into_response();
    }
    let seen = context.repository.view().revision;
    if *context.shutdown.borrow() || *context.sessions.draining.borrow() {
        return (StatusCode::SERVICE_UNAVAILABLE, "stopping\n").into_response();
    }
    if stored.saturating_sub(seen) > VIEW_LAG_MAX {
        let message = format!("the view is at revision {seen}, the store at {stored}\n");
        return (StatusCode::SERVICE_UNAVAILABLE, message).into_response();
    }
    "ok\n".into_response()
}

/// Revisions that the view may be behind while it is still called current.
const VIEW_LAG_MAX: u64 = 10_000;

/// `GET /openapi.json`.
pub(super) async fn openapi() -> Response {
    ([(header::CONTENT_TYPE, "application/json")], super::OPENAPI).into_response()
}

/// `GET /apis/bulkhead.dev/v1/status`.
pub(super) async fn status(State(context): Shared, parameters: Parameters) -> Result<Json<Value>, Refusal> {
    parameters.only(&[elsewhere::LOCAL])?;
    let mut answer = own_status(&context);
    if !parameters.switch(elsewhere::LOCAL)? {
        let elsewhere::Fleet { controllers, agents, relays } = elsewhere::status(&context, &answer).await;
        answer["controllers"] = controllers.into();
        answer["agents"] = agents.into();
        answer["relays"] = relays;
    }
    Ok(Json(answer))
}

/// What this controller knows without asking.
fn own_status(context: &Context) -> Value {
    let (revision, objects, selectors) = {
        let view = context.repository.view();
        (view.revision, view.len(), view.members.selectors())
    };
    json!({
        "apiVersion": API_VERSION,
        "kind": "Status",
        "controller": {
            "name": context.config.name,
            "version": env!("CARGO_PKG_VERSION"),
            "startedAt": clock::rfc3339(context.started_ms),
            "epoch": context.repository.store().epoch(),
            "revision": revision,
            "objects": objects,
            "selectors": selectors,
            "flowsInMemory": context.flows.in_memory(),
        },
        "confirmations": context.repository.confirmations().iter().map(standing).collect::<Vec<_>>(),
        "relays": relays(context),
        "agents": context.sessions.registry.report(),
    })
}

/// The relays that there may be.
fn relays(context: &Context) -> Vec<Value> {
    let all = context.grants.relays().into_iter();
    let shown = all.map(|relay| {
        let mut shown = json!({
            "name": relay.name,
            "hosts": relay.hosts,
            "since": clock::rfc3339(relay.since_ms),
            "by": relay.by,
            "connected": false,
        });
        if let Some((agents_at, version)) = context.sessions.registry.relay(&relay.name) {
            shown["connected"] = json!(true);
            shown["agentsAt"] = json!(agents_at);
            shown["version"] = json!(version);
        }
        shown
    });
    shown.collect()
}

/// `GET /metrics`.
pub(super) async fn metrics(State(context): Shared) -> Response {
    let mut page = Page::default();
    repository_metrics(&mut page, &context);
    agent_metrics(&mut page, &context);
    flow_metrics(&mut page, &context);
    page.doors(&context.doors, &context.metrics);
    let requests = &context.metrics;
    page.counter("api_requests_total", "Requests by operators.", requests.requests.value());
    let failed = requests.requests_failed.value();
    page.counter("api_requests_failed_total", "Requests answered with a server error.", failed);
    let refused = [
        ("unauthenticated", requests.requests_unauthenticated.value()),
        ("forbidden", requests.requests_forbidden.value()),
        ("rate", requests.requests_too_many.value()),
    ];
    page.family("api_requests_refused_total", "Requests refused at the gate.", "counter", "cause", refused);
    let lost = requests.audit_lost.value();
    page.counter("audit_lines_lost_total", "Lines that could not be written to the audit log.", lost);
    let waiting = context.audit.waiting();
    page.gauge("audit_lines_waiting", "Lines that wait for the disk; no change begins meanwhile.", waiting);
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], page.into_text()).into_response()
}

fn repository_metrics(page: &mut Page, context: &Context) {
    let view = context.repository.view();
    page.gauge("revision", "Newest revision of the repository.", view.revision);
    page.gauge("objects", "Objects in the repository.", view.len());
    page.gauge("selectors", "Selectors that agents have subscribed to.", view.members.selectors());
    let waiting = context.repository.store().waiting();
    page.gauge("store_queue", "Transactions that wait to be written.", waiting);
    let refuses = u8::from(context.repository.store().refuses().is_some());
    page.gauge(
        "store_refuses",
        "1 while the store takes no changes, since its disk is full or failed.",
        refuses,
    );
    if let Some(free) = free_bytes(&context.config.data_directory) {
        page.gauge("data_free_bytes", "Bytes that are free where the controller's files are.", free);
    }
    let undecodable = view.undecodable();
    page.counter("objects_undecodable_total", "Stored objects that could not be read.", undecodable);
}

fn agent_metrics(page: &mut Page, context: &Context) {
    let metrics = &context.metrics;
    let cluster = &context.cluster;
    page.gauge("controllers", "Controllers that are registered.", cluster.controllers().len());
    page.gauge("sessions_elsewhere", "Hosts that other controllers serve.", cluster.sessions_elsewhere());
    page.sessions(context.sessions.registry.connected(), metrics);
    let counters = [
        (
            "agent_sessions_moved_total",
            "Sessions ended since another controller has a newer one of that host.",
            &metrics.sessions_moved,
        ),
        ("session_writes_total", "Transactions that registered sessions.", &metrics.registrations),
        ("leases_lost_total", "Times that the controller's lease had ended.", &metrics.leases_lost),
        ("controllers_asked_total", "Questions to other controllers.", &metrics.peers_asked),
        ("controllers_silent_total", "Questions that another did not answer.", &metrics.peers_silent),
        ("hosts_joined_total", "Hosts that have joined with a token.", &metrics.hosts_joined),
        ("certificates_renewed_total", "Certificates renewed by agents.", &metrics.certificates_renewed),
        ("workloads_refused_total", "Workloads published by agents and refused.", &metrics.workloads_refused),
        ("hosts_expired_total", "Hosts whose workloads were removed.", &metrics.hosts_expired),
        ("roll_backs_total", "Changes that were rolled back.", &metrics.roll_backs),
        (
            "roll_back_objects_left_total",
            "Objects that a roll-back left as they were.",
            &metrics.roll_back_objects_left,
        ),
    ];
    for (name, help, counter) in counters {
        page.counter(name, help, counter.value());
    }
}

fn flow_metrics(page: &mut Page, context: &Context) {
    let (flows, metrics) = (&context.flows, &context.metrics);
    page.counter("flows_received_total", "Flow records received.", metrics.flows_received.value());
    let lost = [
        ("agent", metrics.flows_lost_by_agents.value()),
        ("malformed", metrics.flows_malformed.value()),
        ("disk", metrics.flows_not_on_disk.value()),
    ];
    page.family("flows_lost_total", "Flow records lost, by cause.", "counter", "cause", lost);
    let missed = metrics.flow_batches_missed.value();
    page.counter("flow_batches_missed_total", "Batches that followers read too slowly for.", missed);
    page.gauge("flows_in_memory", "Flow records in memory.", flows.in_memory());
    page.gauge("flow_disk_queue", "Batches of flow records that wait for the disk.", flows.disk_queue());
    let streams = STREAMS_MAX - context.streams.available_permits();
    page.gauge("api_streams", "Clients that watch or follow.", streams);
    page.gauge("flow_followers", "Clients that follow flows.", flows.followers());
}
