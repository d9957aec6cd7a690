//! Changes that undo themselves unless somebody confirms them.

use axum::Json;
use axum::extract::{Path, State};
use bulkhead_model::resource::API_VERSION;
use serde_json::{Value, json};

use super::input::Parameters;
use super::problem::Refusal;
use super::{Shared, to_the_end};
use crate::clock;
use crate::repository::{Record, Standing};

/// A change with a deadline, as operators see it.
pub(super) fn standing(record: &Record) -> Value {
    let mut seen = json!({
        "id": record.id,
        "standing": record.standing,
        "by": record.by,
        "madeAt": clock::rfc3339(record.made_ms),
        "deadline": clock::rfc3339(record.deadline_ms),
        "objects": record.objects,
    });
    if record.standing == Standing::RolledBack {
        seen["rolledBackAt"] = clock::rfc3339(record.ended_ms).into();
        seen["leftAlone"] = json!(record.left_alone);
    }
    seen
}

/// `GET /apis/bulkhead.dev/v1/confirmations`.
pub(super) async fn list(State(context): Shared, parameters: Parameters) -> Result<Json<Value>, Refusal> {
    parameters.only(&[])?;
    let mut all = context.repository.confirmations();
    all.sort_by(|a, b| (a.deadline_ms, &a.id).cmp(&(b.deadline_ms, &b.id)));
    let items: Vec<_> = all.iter().map(standing).collect();
    Ok(Json(json!({ "apiVersion": API_VERSION, "kind": "ConfirmationList", "items": items })))
}

/// `POST /apis/bulkhead.dev/v1/confirmations/{id}/confirm`.
pub(super) async fn confirm(
    State(context): Shared,
    Path(id): Path<String>,
    parameters: Parameters,
) -> Result<Json<Value>, Refusal> {
    parameters.only(&[])?;
    let confirm = async move { context.repository.confirm(&id).await };
    Ok(Json(standing(&to_the_end(confirm).await??)))
}

/// `POST /apis/bulkhead.dev/v1/confirmations/{id}/rollback`.
pub(super) async fn roll_back(
    State(context): Shared,
    Path(id): Path<String>,
    parameters: Parameters,
) -> Result<Json<Value>, Refusal> {
    parameters.only(&[])?;
    let roll_back = async move { crate::confirm::roll_back(&context, &id, "an operator asks for it").await };
    Ok(Json(standing(&to_the_end(roll_back).await??)))
}
