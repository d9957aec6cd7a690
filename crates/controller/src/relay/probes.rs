//! How a relay is, for probes and Prometheus: plain HTTP, without secrets.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use tokio::net::TcpListener;
use tokio::sync::watch;

use super::desk::Shared;
use crate::agents::{RELAY_AGENTS_MAX, RELAY_SUBSCRIPTIONS_MAX};
use crate::context::stopped;
use crate::metrics::Page;

/// Serves until `shutdown`.
pub(super) async fn serve(
    listener: TcpListener,
    shared: Arc<Shared>,
    mut shutdown: watch::Receiver<bool>,
) -> std::io::Result<()> {
    let router = Router::new()
        .route("/healthz", get(async || "ok\n"))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .with_state(shared);
    let stop = async move { stopped(&mut shutdown).await };
    axum::serve(listener, router).with_graceful_shutdown(stop).await
}

/// Ready is who can tell agents something, also if no controller is there: then it is what was known last.
async fn readyz(State(shared): State<Arc<Shared>>) -> Response {
    let why = if *shared.sessions.shutdown.borrow() || *shared.sessions.draining.borrow() {
        "stopping\n"
    } else if shared.is_out.load(Ordering::Relaxed) {
        "no controller lets this relay in\n"
    } else if !shared.mirror().is_ready() {
        "no controller has been reached yet\n"
    } else {
        return "ok\n".into_response();
    };
    (StatusCode::SERVICE_UNAVAILABLE, why).into_response()
}

async fn metrics(State(shared): State<Arc<Shared>>) -> Response {
    let mut page = Page::default();
    let (metrics, counters) = (&shared.sessions.metrics, &shared.counters);
    let (revision, connected, selectors, unreadable) = {
        let mirror = shared.mirror();
        (mirror.revision(), mirror.is_connected(), mirror.selectors(), mirror.unreadable)
    };
    page.gauge("revision", "Revision of the repository up to which all is known.", revision);
    page.gauge("relay_upstream_connected", "1 while a controller is connected.", u8::from(connected));
    page.gauge("selectors", "Selectors subscribed to upstream, each once for the site.", selectors);
    page.gauge("selectors_max", "Most that there may be.", RELAY_SUBSCRIPTIONS_MAX);
    page.sessions(shared.sessions.registry.connected(), metrics);
    page.gauge("agents_max", "Most that there may be.", RELAY_AGENTS_MAX);
    page.gauge("relay_lanes", "Hosts that have a way upstream or wait for one.", shared.lanes());
    let all = [
        ("relay_upstream_messages_total", "Messages from controllers.", &counters.upstream_messages),
        ("relay_upstream_bytes_total", "Bytes of messages from controllers.", &counters.upstream_bytes),
        ("relay_upstream_lost_total", "Times that no controller was there.", &counters.upstream_lost),
        ("relay_flow_batches_total", "Batches of flow records carried up.", &counters.flow_batches),
    ];
    for (name, help, counter) in all {
        page.counter(name, help, counter.value());
    }
    page.doors(&[("agents", Arc::clone(&shared.door))], metrics);
    page.counter("objects_undecodable_total", "Objects told that could not be read.", unreadable);
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], page.into_text()).into_response()
}
