//! Changes that undo themselves unless somebody confirms them.

use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::{Extension, Json};
use bulkhead_model::resource::API_VERSION;
use bulkhead_model::roles::Role;
use serde_json::{Value, json};

use super::input::Parameters;
use super::problem::Refusal;
use super::{Shared, to_the_end};
use crate::access::{Caller, Permissions};
use crate::clock;
use crate::context::Context;
use crate::repository::{Author, Confirmation, Standing, WriteError};

/// A change with a deadline, as operators see it.
pub(super) fn standing(record: &Confirmation) -> Value {
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

/// A change is kept or undone by whoever made it, or may change everything.
fn may_settle(
    context: &Context,
    id: &str,
    caller: &Caller,
    permissions: &Permissions,
) -> Result<(), Refusal> {
    let all = context.repository.confirmations();
    let Some(record) = all.iter().find(|record| record.id == id) else { return Ok(()) };
    if record.by == caller.name() || permissions.role() >= Some(Role::Operator) {
        return Ok(());
    }
    let message = format!("the change {id} is {}'s: only he, or an Operator, keeps or undoes it", record.by);
    Err(Refusal::new(StatusCode::FORBIDDEN, "Forbidden", message))
}

/// `POST /apis/bulkhead.dev/v1/confirmations/{id}/confirm`.
pub(super) async fn confirm(
    State(context): Shared,
    Path(id): Path<String>,
    Extension(caller): Extension<Caller>,
    Extension(permissions): Extension<Permissions>,
    parameters: Parameters,
) -> Result<Json<Value>, Refusal> {
    parameters.only(&[])?;
    may_settle(&context, &id, &caller, &permissions)?;
    context.audit.ready().await?;
    let confirm = async move {
        let confirmed = context.repository.confirm(&id).await?;
        context.audit.done(&caller.name(), &caller.from(), "confirm", json!({ "id": id })).await;
        Ok::<_, WriteError>(confirmed)
    };
    Ok(Json(standing(&to_the_end(confirm).await??)))
}

/// `POST /apis/bulkhead.dev/v1/confirmations/{id}/rollback`.
pub(super) async fn roll_back(
    State(context): Shared,
    Path(id): Path<String>,
    Extension(caller): Extension<Caller>,
    Extension(permissions): Extension<Permissions>,
    parameters: Parameters,
) -> Result<Json<Value>, Refusal> {
    parameters.only(&[])?;
    may_settle(&context, &id, &caller, &permissions)?;
    context.audit.ready().await?;
    let author = Author { by: caller.name(), from: caller.from(), verb: "rollback of a change" };
    let roll_back = async move { crate::confirm::roll_back(&context, &id, &author).await };
    Ok(Json(standing(&to_the_end(roll_back).await??)))
}
