//! Whole files: applied or deleted, all or nothing.

use axum::Json;
use axum::extract::State;
use bulkhead_model::resource::API_VERSION;
use serde_json::{Value, json};

use super::Shared;
use super::input::{self, Body, Parameters};
use super::problem::Refusal;
use crate::repository::{Change, Verb};

/// `POST /apis/bulkhead.dev/v1/apply`.
pub(super) async fn apply(
    State(context): Shared,
    parameters: Parameters,
    body: Body,
) -> Result<Json<Value>, Refusal> {
    parameters.only(&["dryRun"])?;
    let dry_run = parameters.switch("dryRun")?;
    let documents = input::documents(body)?;
    let (changes, revision) = context.repository.write(&documents, Verb::Apply, dry_run).await?;
    Ok(answer("ApplyResult", &changes, revision, dry_run))
}

/// `POST /apis/bulkhead.dev/v1/delete`.
pub(super) async fn delete(
    State(context): Shared,
    parameters: Parameters,
    body: Body,
) -> Result<Json<Value>, Refusal> {
    parameters.only(&["dryRun"])?;
    let dry_run = parameters.switch("dryRun")?;
    let keys: Vec<_> = input::documents(body)?.iter().map(|document| document.resource.key()).collect();
    let (changes, revision) = context.repository.delete(&keys, None, dry_run).await?;
    Ok(answer("DeleteResult", &changes, revision, dry_run))
}

fn answer(kind: &str, changes: &[Change], revision: u64, dry_run: bool) -> Json<Value> {
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
    Json(json!({
        "apiVersion": API_VERSION,
        "kind": kind,
        "metadata": { "resourceVersion": revision.to_string() },
        "dryRun": dry_run,
        "items": changes.iter().map(item).collect::<Vec<_>>(),
    }))
}
