//! Asking the other controllers what only they know.

use std::time::Duration;

use axum::body::Body;
use bulkhead_identity::tls;
use hyper::header::HOST;
use hyper::{Request, StatusCode};
use hyper_util::rt::TokioIo;
use serde_json::Value;

use super::ControllerRecord;
use crate::context::Context;

/// Longest that another controller may take to answer: people wait for it.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(3);
/// Longest answer that is read.
const ANSWER_BYTES_MAX: usize = 256 << 20;

/// What became of a question to another controller.
#[derive(Debug)]
pub(crate) struct Answer<T = Value> {
    /// Who was asked.
    pub(crate) of: ControllerRecord,
    /// What it said, or why it did not.
    pub(crate) said: Result<T, String>,
}

/// Asks all others at once; `path` with its query.
pub(crate) async fn ask_others(context: &Context, path: &str) -> Vec<Answer> {
    let asked = context.cluster.others().into_iter().map(|of| async move {
        let said = match tokio::time::timeout(ANSWER_TIME_MAX, ask(context, &of, path)).await {
            Ok(said) => said,
            Err(_elapsed) => Err(format!("no answer within {ANSWER_TIME_MAX:?}")),
        };
        noted(context, of, said)
    });
    futures::future::join_all(asked).await
}

/// Begins an answer that goes on, at all others at once.
pub(crate) async fn follow_others(context: &Context, path: &str) -> Vec<Answer<Body>> {
    let asked = context.cluster.others().into_iter().map(|of| async move {
        let said = match tokio::time::timeout(ANSWER_TIME_MAX, open(context, &of, path)).await {
            Ok(said) => said,
            Err(_elapsed) => Err(format!("no answer within {ANSWER_TIME_MAX:?}")),
        };
        noted(context, of, said)
    });
    futures::future::join_all(asked).await
}

fn noted<T>(context: &Context, of: ControllerRecord, said: Result<T, String>) -> Answer<T> {
    context.metrics.peers_asked.add(1);
    if let Err(reason) = &said {
        context.metrics.peers_silent.add(1);
        tracing::warn!(controller = %of.name, api = %of.api, %reason, "another controller does not answer");
    }
    Answer { of, said }
}

async fn ask(context: &Context, of: &ControllerRecord, path: &str) -> Result<Value, String> {
    let body = open(context, of, path).await?;
    let bytes = axum::body::to_bytes(body, ANSWER_BYTES_MAX).await.map_err(|error| error.to_string())?;
    serde_json::from_slice(&bytes).map_err(|error| format!("its answer cannot be read: {error}"))
}

async fn open(context: &Context, of: &ControllerRecord, path: &str) -> Result<Body, String> {
    let stream = tls::connect(&of.api, &context.trust.client())
        .await
        .map_err(|error| format!("{}: {error}", of.api))?;
    let handshake = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await;
    let (mut sender, connection) = handshake.map_err(|error| error.to_string())?;
    // Ends with the answer, or with whoever reads it.
    tokio::spawn(connection);
    let request = Request::get(path).header(HOST, "bulkhead").body(Body::empty());
    let request = request.map_err(|error| error.to_string())?;
    let response = sender.send_request(request).await.map_err(|error| error.to_string())?;
    let status = response.status();
    if status == StatusCode::OK {
        Ok(Body::new(response.into_body()))
    } else {
        Err(format!("it says {status}"))
    }
}
