//! What operators have changed, and going back.

use axum::extract::State;
use axum::{Extension, Json};
use bulkhead_model::resource::API_VERSION;
use serde_json::{Value, json};

use super::Shared;
use super::apply::answer;
use super::change::{Ask, change};
use super::input::{self, OF_CHANGES, Parameters};
use super::problem::Refusal;
use crate::access::{Caller, Permissions};
use crate::clock;
use crate::repository::{Difference, Record as Remembered};

/// Changes in one answer unless told otherwise, and at most.
const LIMIT: usize = 50;
const LIMIT_MAX: usize = 10_000;

/// `GET /apis/bulkhead.dev/v1/history`: the newest first.
pub(super) async fn list(State(context): Shared, parameters: Parameters) -> Result<Json<Value>, Refusal> {
    parameters.only(&["limit", "object", "before"])?;
    let limit = parameters.parsed("limit", "a number")?.unwrap_or(LIMIT).min(LIMIT_MAX);
    let before = parameters.parsed("before", "a revision")?;
    let records = context.repository.history(limit, parameters.text("object"), before);
    let items: Vec<_> = records.iter().map(described).collect();
    Ok(Json(json!({ "apiVersion": API_VERSION, "kind": "HistoryList", "items": items })))
}

fn described(record: &Remembered) -> Value {
    json!({
        "revision": record.revision,
        "at": clock::rfc3339(record.at_ms),
        "by": record.by,
        "from": record.from,
        "verb": record.verb,
        "forced": record.forced,
        "complete": record.complete,
        "objects": record.touched,
    })
}

/// `GET /apis/bulkhead.dev/v1/history/diff`.
pub(super) async fn diff(State(context): Shared, parameters: Parameters) -> Result<Json<Value>, Refusal> {
    parameters.only(&["from", "to"])?;
    parameters.required("from", "a revision")?;
    let from = parameters.parsed("from", "a revision")?.unwrap_or_default();
    let to = parameters.parsed("to", "a revision")?;
    let differences = context.repository.differences(from, to).await?;
    let item = |Difference { key, before, after }: &Difference| {
        json!({
            "kind": key.kind.as_str(),
            "namespace": key.namespace,
            "name": key.name,
            "before": before,
            "after": after,
        })
    };
    let items: Vec<_> = differences.iter().map(item).collect();
    Ok(Json(json!({ "apiVersion": API_VERSION, "kind": "Differences", "items": items })))
}

/// `POST /apis/bulkhead.dev/v1/history/rollback`.
pub(super) async fn roll_back(
    State(context): Shared,
    Extension(caller): Extension<Caller>,
    Extension(permissions): Extension<Permissions>,
    parameters: Parameters,
) -> Result<Json<Value>, Refusal> {
    let [dry_run, force, confirm_within] = OF_CHANGES;
    parameters.only(&["to", dry_run, force, confirm_within])?;
    parameters.required("to", "a revision")?;
    let to = parameters.parsed("to", "a revision")?.unwrap_or_default();
    let terms = input::terms(&context, &parameters, (&caller, &permissions), "rollback")?;
    let dry_run = terms.dry_run;
    Ok(answer("RollbackResult", &change(context, terms, Ask::RollBack(to)).await?, dry_run))
}
