//! Whole files: applied or deleted, all or nothing.

use axum::extract::State;
use axum::{Extension, Json};
use bulkhead_model::resource::API_VERSION;
use serde_json::{Value, json};

use super::confirmations::standing;
use super::input::{self, Body, OF_CHANGES, Parameters};
use super::problem::Refusal;
use super::{Shared, to_the_end};
use crate::access::Caller;
use crate::guard::NAMED_MAX;
use crate::repository::{Change, Done, Verb};

/// `POST /apis/bulkhead.dev/v1/apply`.
pub(super) async fn apply(
    State(context): Shared,
    Extension(caller): Extension<Caller>,
    parameters: Parameters,
    body: Body,
) -> Result<Json<Value>, Refusal> {
    parameters.only(&OF_CHANGES)?;
    let terms = input::terms(&context, &parameters, &caller)?;
    let documents = input::documents(body)?;
    let dry_run = terms.dry_run;
    let write = async move { context.repository.write(&documents, Verb::Apply, &terms).await };
    Ok(answer("ApplyResult", &to_the_end(write).await??, dry_run))
}

/// `POST /apis/bulkhead.dev/v1/delete`.
pub(super) async fn delete(
    State(context): Shared,
    Extension(caller): Extension<Caller>,
    parameters: Parameters,
    body: Body,
) -> Result<Json<Value>, Refusal> {
    parameters.only(&OF_CHANGES)?;
    let terms = input::terms(&context, &parameters, &caller)?;
    let keys: Vec<_> = input::documents(body)?.iter().map(|document| document.resource.key()).collect();
    let dry_run = terms.dry_run;
    let delete = async move { context.repository.delete(&keys, None, &terms).await };
    Ok(answer("DeleteResult", &to_the_end(delete).await??, dry_run))
}

fn answer(kind: &str, done: &Done, dry_run: bool) -> Json<Value> {
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
