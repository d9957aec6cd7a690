//! `PATCH` with `application/apply-patch+yaml`: a manager says what the fields that he cares about should be, and no more.

use std::sync::Arc;

use axum::Json;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use bulkhead_model::document;
use serde_json::{Value, json};

use super::form::Form;
use super::patch::ATTEMPTS_MAX;
use super::place::Place;
use crate::api::input::{self, Body, Parameters};
use crate::api::objects::{fits, write};
use crate::api::problem::Refusal;
use crate::clock;
use crate::context::Context;
use crate::fields::{APPLIERS_MAX, By, Conflict, Operation, applied, merged};
use crate::repository::{Accounts, Terms, Verb};

/// Applies what the body says. `force` is about fields of other managers here, and never about the lock-out guard.
pub(super) async fn apply(
    context: &Arc<Context>,
    place: &Place,
    form: Form,
    parameters: &Parameters,
    terms: Terms,
    body: Body,
) -> Result<Response, Refusal> {
    let manager = parameters.required("fieldManager", "who applies")?;
    let force = parameters.switch("force")?;
    let config = config(place, body)?;
    let asked = config["metadata"]["resourceVersion"].clone();
    let key = place.key();
    let mut attempts = 0;
    loop {
        attempts += 1;
        let before = context.repository.view().get(&key).map(|object| object.resource.clone());
        let live = before.as_ref().map(bulkhead_model::Resource::to_json);
        let entries = before.as_ref().map(|before| context.repository.owners(before)).unwrap_or_default();
        let mut object = merged(live.as_ref().unwrap_or(&json!({})), &entries, &config, manager);
        object["apiVersion"] = config["apiVersion"].clone();
        let document = input::changed(place, &object)?;
        fits(&document, place)?;
        let after = document.resource.to_json();
        let time = clock::rfc3339(clock::now_ms());
        let (version, _) = place.object_type();
        let by = By { manager, api_version: version, time: &time };
        let entries =
            applied(&entries, live.as_ref(), (&config, &after), by, force).map_err(|all| conflict(&all))?;
        if entries.iter().filter(|entry| entry.operation == Operation::Apply).count() > APPLIERS_MAX {
            return Err(Refusal::bad_request(format!("{APPLIERS_MAX} managers apply {key} already")));
        }
        let terms = Terms { force: false, accounts: Accounts::Exactly(entries), ..terms.clone() };
        let verb = if live.is_some() { Verb::Replace } else { Verb::Create };
        match write(context, place, document, verb, terms).await {
            Err(refusal)
                if asked.is_null()
                    && attempts < ATTEMPTS_MAX
                    && matches!(refusal.reason, "Conflict" | "AlreadyExists" | "NotFound") => {}
            Err(refusal) => return Err(refusal),
            Ok(object) => {
                let status = if live.is_some() { StatusCode::OK } else { StatusCode::CREATED };
                return Ok((status, Json(form.object(place, object))).into_response());
            }
        }
    }
}

/// What the manager says, which is not the whole object.
fn config(place: &Place, body: Body) -> Result<Value, Refusal> {
    let text = input::text(body)?;
    let mut nodes = document::read("body", &text).map_err(|problem| Refusal::invalid(vec![problem]))?;
    let (Some(mut node), true) = (nodes.pop(), nodes.is_empty()) else {
        return Err(Refusal::bad_request("expected one object in the body"));
    };
    place.take(&mut node);
    let mut config = node.to_json();
    let (version, kind) = place.object_type();
    if config["apiVersion"] != version || config["kind"] != kind {
        return Err(Refusal::bad_request(format!(
            "expected apiVersion {version} and kind {kind} at this path"
        )));
    }
    if !config["metadata"].is_object() {
        config["metadata"] = json!({});
    }
    if config["metadata"]["name"].is_null() {
        config["metadata"]["name"] = json!(place.name());
    }
    // Whatever it is called in the path, the object is in one namespace only; the path has said in which.
    if let Some(metadata) = config["metadata"].as_object_mut() {
        metadata.remove("namespace");
        if let Some(namespace) = place.key().namespace {
            metadata.insert("namespace".into(), json!(namespace));
        }
    }
    Ok(config)
}

fn conflict(conflicts: &[Conflict]) -> Refusal {
    let describe = |one: &Conflict| {
        let Conflict { manager, api_version, .. } = one;
        format!("conflict with {manager:?} using {api_version}")
    };
    let lines: Vec<String> =
        conflicts.iter().map(|one| format!("{}: {}", describe(one), one.field)).collect();
    let plural = if conflicts.len() == 1 { "" } else { "s" };
    let message = format!("Apply failed with {} conflict{plural}: {}", conflicts.len(), lines.join("; "));
    let cause = |one: &Conflict| json!({ "reason": "FieldManagerConflict", "field": one.field, "message": describe(one) });
    Refusal::new(StatusCode::CONFLICT, "Conflict", message).because(conflicts.iter().map(cause).collect())
}
