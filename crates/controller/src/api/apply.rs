//! Whole files: applied or deleted, all or nothing.

use axum::extract::State;
use axum::{Extension, Json};
use bulkhead_model::resource::API_VERSION;
use serde_json::{Value, json};

use super::Shared;
use super::change::{Ask, change};
use super::confirmations::standing;
use super::input::{self, Body, OF_CHANGES, Parameters};
use super::problem::Refusal;
use crate::access::{Caller, Permissions};
use crate::guard::NAMED_MAX;
use crate::repository::{Change, Done, Verb};

/// `POST /apis/bulkhead.dev/v1/apply`.
pub(super) async fn apply(
    State(context): Shared,
    Extension(caller): Extension<Caller>,
    Extension(permissions): Extension<Permissions>,
    parameters: Parameters,
    body: Body,
) -> Result<Json<Value>, Refusal> {
    parameters.only(&OF_CHANGES)?;
    let terms = input::terms(&context, &parameters, (&caller, &permissions), "apply")?;
    let documents = input::documents(body)?;
    let dry_run = terms.dry_run;
    let done = change(context, terms, Ask::Write(documents, Verb::Apply)).await?;
    Ok(answer("ApplyResult", &done, dry_run))
}

/// `POST /apis/bulkhead.dev/v1/delete`.
pub(super) async fn delete(
    State(context): Shared,
    Extension(caller): Extension<Caller>,
    Extension(permissions): Extension<Permissions>,
    parameters: Parameters,
    body: Body,
) -> Result<Json<Value>, Refusal> {
    parameters.only(&OF_CHANGES)?;
    let terms = input::terms(&context, &parameters, (&caller, &permissions), "delete")?;
    let keys: Vec<_> = input::documents(body)?.iter().map(|document| document.resource.key()).collect();
    let dry_run = terms.dry_run;
    Ok(answer("DeleteResult", &change(context, terms, Ask::Delete(keys, None)).await?, dry_run))
}

pub(super) fn answer(kind: &str, done: &Done, dry_run: bool) -> Json<Value> {
    let item = |Change { key, outcome, before, after }: &Change| {
        json!({
            "kind": key.kind.as_str(),
            "namespace": key.namespace,
            "name": key.name,
            "outcome": outcome.as_str(),
            "before": before.as_ref().map(|object| object.to_json()),
            "after": after.as_ref().map(|object| object.to_json()),
        })
    };
    let mut answer = json!({
        "apiVersion": API_VERSION,
        "kind": kind,
        "metadata": { "resourceVersion": done.revision.to_string() },
        "dryRun": dry_run,
        "items": done.changes.iter().map(item).collect::<Vec<_>>(),
    });
    if !done.warnings.is_empty() {
        let named = done.warnings.iter().take(NAMED_MAX);
        answer["warnings"] = named.map(|warning| json!(warning.to_string())).collect();
        answer["cutOff"] = json!(done.warnings.len());
    }
    if let Some(record) = &done.confirmation {
        answer["confirmation"] = standing(record);
    }
    Json(answer)
}
