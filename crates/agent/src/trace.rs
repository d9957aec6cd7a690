//! `GET /trace`: connections of this host as they happen, one JSON value per line.

use std::convert::Infallible;
use std::sync::Arc;

use axum::body::{Body, Bytes};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Json, Response};
use bulkhead_model::flow::{FlowEnd, FlowRecord};
use bulkhead_model::ports::PortMatch;
use bulkhead_model::{RuleRef, Verdict};
use serde::Deserialize;
use serde_json::json;
use tokio::sync::broadcast;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::BroadcastStream;
use tokio_stream::wrappers::errors::BroadcastStreamRecvError;

/// Records that a watcher may be behind; then it is told how many it has missed.
const QUEUE_LEN: usize = 4096;
/// Most watchers at a time.
const WATCHERS_MAX: usize = 8;

/// Where records are told to whoever watches.
pub(crate) type Watched = broadcast::Sender<Arc<FlowRecord>>;

/// Nobody watches yet.
pub(crate) fn channel() -> Watched {
    broadcast::channel(QUEUE_LEN).0
}

/// Which connections are of interest; what is absent is no condition.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct Filter {
    /// A workload's name, with or without its host, or an address, at the end that began.
    from: Option<String>,
    /// Likewise at the other end.
    to: Option<String>,
    /// Destination port, in the form of a rule's ports.
    port: Option<PortMatch>,
    verdict: Option<Verdict>,
    /// Name of the policy that decided.
    policy: Option<String>,
}

impl Filter {
    fn matches(&self, record: &FlowRecord) -> bool {
        let Self { from, to, port, verdict, policy } = self;
        let end =
            |wanted: &Option<String>, end: &FlowEnd| wanted.as_ref().is_none_or(|text| is_end(text, end));
        let key = record.protocol.key(record.destination.port);
        let decided = |wanted: &String| match &record.enforced.rule {
            RuleRef::Rule { policy, .. } => policy == wanted,
            _ => false,
        };
        end(from, &record.source)
            && end(to, &record.destination)
            && port.as_ref().is_none_or(|port| port.matches(key, &[]))
            && verdict.is_none_or(|verdict| verdict == record.enforced.verdict)
            && policy.as_ref().is_none_or(decided)
    }
}

fn is_end(text: &str, end: &FlowEnd) -> bool {
    let workload = end.workload.as_deref().unwrap_or_default();
    let short = end.host.as_deref().and_then(|host| workload.strip_suffix(host)?.strip_suffix('.'));
    workload == text
        || short == Some(text)
        || text.parse().is_ok_and(|address: std::net::IpAddr| address == end.address)
}

/// An answer that goes on until the watcher or the agent leaves.
pub(crate) fn watch(watched: &Watched, filter: Filter) -> Response {
    if watched.receiver_count() >= WATCHERS_MAX {
        let message = format!("{WATCHERS_MAX} traces run already");
        return (StatusCode::TOO_MANY_REQUESTS, Json(json!({ "message": message }))).into_response();
    }
    if matches!(filter.port, Some(PortMatch::Named { .. })) {
        let message = "expected a port's number, like tcp/80: names have no meaning in a packet";
        return (StatusCode::BAD_REQUEST, Json(json!({ "message": message }))).into_response();
    }
    let lines = BroadcastStream::new(watched.subscribe()).filter_map(move |record| match record {
        Ok(record) => filter.matches(&record).then(|| json!(record.as_ref())),
        Err(BroadcastStreamRecvError::Lagged(missed)) => Some(json!({ "missed": missed })),
    });
    let lines = lines.map(|line| Ok::<_, Infallible>(Bytes::from(format!("{line}\n"))));
    ([(header::CONTENT_TYPE, "application/x-ndjson")], Body::from_stream(lines)).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filter_asks_for_all_that_it_names() {
        let record: FlowRecord = serde_json::from_value(json!({
            "timeMs": 1, "openedMs": 1, "event": "open", "reporter": "h1", "direction": "egress", "protocol": 6,
            "source": { "address": "10.0.0.1", "port": 40000, "workload": "web.h1", "host": "h1", "labels": {} },
            "destination": { "address": "10.0.0.2", "port": 80, "workload": null, "host": null, "labels": {} },
            "enforced": { "verdict": "allow", "rule": { "by": "rule", "tier": "t", "policy": "p", "direction": "egress", "index": 0 } },
            "audit": { "verdict": "allow", "rule": { "by": "defaultPosture" } }, "reason": "none", "revision": 1,
            "packetsForward": 1, "bytesForward": 1, "packetsReverse": 0, "bytesReverse": 0,
        }))
        .unwrap();
        let matches =
            |filter: serde_json::Value| serde_json::from_value::<Filter>(filter).unwrap().matches(&record);
        for filter in [
            json!({}),
            json!({ "from": "web" }),
            json!({ "from": "web.h1", "to": "10.0.0.2", "port": "tcp/80", "verdict": "allow", "policy": "p" }),
            json!({ "port": "tcp/1-100" }),
        ] {
            assert!(matches(filter.clone()), "{filter}");
        }
        for filter in [
            json!({ "from": "db" }),
            json!({ "to": "web" }),
            json!({ "port": "udp" }),
            json!({ "policy": "q" }),
            json!({ "verdict": "deny" }),
        ] {
            assert!(!matches(filter.clone()), "{filter}");
        }
    }
}
