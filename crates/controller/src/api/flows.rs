//! Flows, as they were and as they come.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use bulkhead_model::labels::is_label_key;
use bulkhead_model::resource::API_VERSION;
use bulkhead_model::{Selector, Verdict};
use futures::StreamExt;
use serde_json::{Value, json};
use tokio::sync::broadcast::error::RecvError;

use super::input::{Parameters, duration_ms};
use super::problem::Refusal;
use super::stream;
use super::{Shared, elsewhere};
use crate::clock;
use crate::context::{Context, stopped};
use crate::flows::{Filter, Recorded};

/// Records that a query answers if it does not say.
const LIMIT_DEFAULT: usize = 100;

/// `GET /apis/bulkhead.dev/v1/flows`.
pub(super) async fn flows(State(context): Shared, parameters: Parameters) -> Result<Response, Refusal> {
    parameters.only(&[
        "limit",
        "since",
        "workload",
        "label",
        "verdict",
        "policy",
        "follow",
        elsewhere::LOCAL,
    ])?;
    let alone = parameters.switch(elsewhere::LOCAL)?;
    let filter = filter(&parameters)?;
    if parameters.switch("follow")? {
        return follow(context, filter, (!alone).then(|| parameters.query(elsewhere::LOCAL))).await;
    }
    let limit = parameters.parsed("limit", "a whole number")?.unwrap_or(LIMIT_DEFAULT);
    // Never closed, so an error cannot be.
    let _one_of_few = context.searches.acquire().await.ok();
    let records = context.flows.query(&filter, limit).await?;
    let items: Vec<Value> = records.iter().map(|one| item(one, &context)).collect();
    let (items, unanswered) = if alone {
        (items, Vec::new())
    } else {
        elsewhere::flows(&context, items, &parameters.query(elsewhere::LOCAL), limit).await
    };
    let mut answer = json!({ "apiVersion": API_VERSION, "kind": "FlowList", "metadata": {}, "items": items });
    if !unanswered.is_empty() {
        answer["unanswered"] = unanswered.into();
    }
    Ok(Json(answer).into_response())
}

/// The record with its place in the order of arrival at this controller.
fn item(recorded: &Recorded, context: &Context) -> Value {
    let mut value = json!(*recorded.record);
    value["sequence"] = json!(recorded.sequence);
    value["controller"] = json!(context.config.name);
    value
}

fn filter(parameters: &Parameters) -> Result<Filter, Refusal> {
    let verdict = match parameters.text("verdict") {
        None => None,
        Some("allow") => Some(Verdict::Allow),
        Some("deny") => Some(Verdict::Deny),
        Some(other) => {
            let message = format!("query parameter verdict: expected allow or deny, found {other:?}");
            return Err(Refusal::bad_request(message));
        }
    };
    Ok(Filter {
        since_ms: parameters.text("since").map(|text| since(text, clock::now_ms())).transpose()?,
        workload: parameters.text("workload").map(Into::into),
        label: parameters.text("label").map(label).transpose()?,
        verdict,
        policy: parameters.text("policy").map(Into::into),
    })
}

/// A selector, or `key=value`, which people type first and which is no selector.
fn label(text: &str) -> Result<Selector, Refusal> {
    match text.split_once('=') {
        Some((key, value)) if is_label_key(key) && !value.starts_with('=') => {
            Ok(Selector::equals(key, value))
        }
        _ => Selector::parse(text)
            .map_err(|error| Refusal::bad_request(format!("query parameter label: {error}"))),
    }
}

/// Milliseconds since the Unix epoch, or a duration before now like `90s`, `5m`, `2h` or `7d`.
fn since(text: &str, now_ms: u64) -> Result<u64, Refusal> {
    let ago = duration_ms(text).map(|ms| now_ms.saturating_sub(ms));
    ago.or_else(|| text.parse().ok()).ok_or_else(|| {
        Refusal::bad_request(format!(
            "query parameter since: expected milliseconds since 1970 or a duration like 5m, found {text:?}"
        ))
    })
}

/// Ours as they come, and with a query those of the other controllers.
async fn follow(context: Arc<Context>, filter: Filter, query: Option<String>) -> Result<Response, Refusal> {
    let place = stream::place(&context)?;
    let others = match query {
        Some(query) => elsewhere::follow(Arc::clone(&context), &query).await.boxed(),
        None => futures::stream::empty().boxed(),
    };
    let mut stop = context.shutdown.clone();
    let others = others.take_until(async move { stopped(&mut stop).await });
    let batches = context.flows.follow();
    let lines = futures::stream::unfold((batches, context, filter), |(mut batches, context, filter)| async {
        let mut shutdown = context.shutdown.clone();
        loop {
            let batch = tokio::select! {
                batch = batches.recv() => batch,
                () = stopped(&mut shutdown) => return None,
            };
            let text = match batch {
                Ok(batch) => batch
                    .iter()
                    .filter(|recorded| filter.passes(&recorded.record))
                    .map(|recorded| format!("{}\n", item(recorded, &context)))
                    .collect::<String>(),
                Err(RecvError::Lagged(missed)) => {
                    context.metrics.flow_batches_missed.add(missed);
                    format!("{}\n", json!({ "missedBatches": missed }))
                }
                Err(RecvError::Closed) => return None,
            };
            if !text.is_empty() {
                return Some((text.into(), (batches, context, filter)));
            }
        }
    });
    Ok(stream::respond(place, futures::stream::select(lines, others)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn since_is_a_time_or_a_duration() {
        assert_eq!(since("5m", 1_000_000).unwrap(), 700_000);
        assert_eq!(since("12345", 1_000_000).unwrap(), 12_345);
        assert!(since("yesterday", 0).is_err());
    }

    #[test]
    fn a_label_is_an_equality_or_a_selector() {
        assert_eq!(label("role=web").unwrap(), Selector::equals("role", "web"));
        assert_eq!(label("role == 'web'").unwrap(), Selector::equals("role", "web"));
        assert!(label("role ==").is_err());
    }
}
