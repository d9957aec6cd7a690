//! Objects one by one: list, get, create, replace, delete.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use bulkhead_model::document::Document;
use bulkhead_model::entity::with_automatic_labels;
use bulkhead_model::resource::API_VERSION;
use bulkhead_model::{Entity, Kind, ObjectKey, Resource, Selector};
use serde_json::{Value, json};

use super::Shared;
use super::change::{Ask, change};
use super::input::{self, Body, OF_CHANGES, Parameters};
use super::problem::Refusal;
use crate::access::{Caller, Permissions};
use crate::context::Context;
use crate::repository::{Terms, Verb, WriteError};

/// The variables of a path.
type Variables = Path<BTreeMap<String, String>>;

fn kind(variables: &Variables) -> Result<Kind, Refusal> {
    let plural = variables.get("plural").map_or("", String::as_str);
    Kind::ALL
        .iter()
        .find(|kind| kind.plural() == plural)
        .copied()
        .ok_or_else(|| Refusal::no_such_kind(plural))
}

fn key(variables: &Variables) -> Result<ObjectKey, Refusal> {
    let kind = kind(variables)?;
    let name = variables.get("name").cloned().unwrap_or_default();
    Ok(ObjectKey { kind, namespace: variables.get("namespace").cloned(), name })
}

/// `GET …/{plural}`, also `?watch=true`.
pub(super) async fn list(
    State(context): Shared,
    variables: Variables,
    parameters: Parameters,
) -> Result<Response, Refusal> {
    parameters.only(&["labelSelector", "limit", "watch", "resourceVersion"])?;
    let from: Option<u64> = parameters.parsed("resourceVersion", "a revision")?;
    let kind = kind(&variables)?;
    let namespace = variables.get("namespace").cloned();
    let selector = selector(&parameters)?;
    if parameters.switch("watch")? {
        return super::watch::watch(&context, kind, namespace.as_deref(), selector, from).await;
    }
    let limit: usize = parameters.parsed("limit", "a whole number")?.unwrap_or(usize::MAX).max(1);
    let view = context.repository.view();
    let mut matching = view.of_kind(kind).filter(|object| {
        let resource = &object.resource;
        (namespace.is_none() || resource.metadata().namespace == namespace)
            && selector.as_ref().is_none_or(|selector| selects(selector, resource))
    });
    let items: Vec<_> = matching.by_ref().take(limit).map(|object| object.resource.to_json()).collect();
    let mut metadata = json!({ "resourceVersion": view.revision.to_string() });
    let remaining = matching.count();
    if remaining > 0 {
        metadata["remainingItemCount"] = json!(remaining);
    }
    let answer = json!({
        "apiVersion": API_VERSION,
        "kind": format!("{kind}List"),
        "metadata": metadata,
        "items": items,
    });
    drop(view);
    Ok(Json(answer).into_response())
}

fn selector(parameters: &Parameters) -> Result<Option<Selector>, Refusal> {
    let wrong = |error| Refusal::bad_request(format!("query parameter labelSelector: {error}"));
    parameters.text("labelSelector").map(|text| Selector::parse(text).map_err(wrong)).transpose()
}

/// Selectors see the automatic labels too, as they do in policies.
pub(super) fn selects(selector: &Selector, resource: &Resource) -> bool {
    if let Some(entity) = Entity::of(resource) {
        return selector.matches(&entity.labels);
    }
    let (key, metadata) = (resource.key(), resource.metadata());
    let namespace = key.namespace.as_deref();
    selector.matches(&with_automatic_labels(&metadata.labels, key.kind, namespace, &key.name, None))
}

/// `GET …/{plural}/{name}`.
pub(super) async fn get(
    State(context): Shared,
    variables: Variables,
    parameters: Parameters,
) -> Result<Json<Value>, Refusal> {
    parameters.only(&[])?;
    let key = key(&variables)?;
    let found = context.repository.view().get(&key).map(|object| object.resource.to_json());
    found.map(Json).ok_or_else(|| WriteError::NotFound(key).into())
}

/// `POST …/{plural}`.
pub(super) async fn create(
    State(context): Shared,
    Extension(caller): Extension<Caller>,
    Extension(permissions): Extension<Permissions>,
    variables: Variables,
    parameters: Parameters,
    body: Body,
) -> Result<Response, Refusal> {
    parameters.only(&OF_CHANGES)?;
    let terms = input::terms(&context, &parameters, (&caller, &permissions), "create")?;
    let kind = kind(&variables)?;
    let document = input::document(body)?;
    fits(&document, kind, variables.get("namespace"), None)?;
    let object = write(context, document, Verb::Create, terms).await?;
    Ok((StatusCode::CREATED, Json(object)).into_response())
}

/// `PUT …/{plural}/{name}`.
pub(super) async fn replace(
    State(context): Shared,
    Extension(caller): Extension<Caller>,
    Extension(permissions): Extension<Permissions>,
    variables: Variables,
    parameters: Parameters,
    body: Body,
) -> Result<Json<Value>, Refusal> {
    parameters.only(&OF_CHANGES)?;
    let terms = input::terms(&context, &parameters, (&caller, &permissions), "replace")?;
    let key = key(&variables)?;
    let document = input::document(body)?;
    fits(&document, key.kind, key.namespace.as_ref(), Some(&key.name))?;
    Ok(Json(write(context, document, Verb::Replace, terms).await?))
}

async fn write(
    context: Arc<Context>,
    document: Document,
    verb: Verb,
    terms: Terms,
) -> Result<Value, Refusal> {
    let done = change(context, terms, Ask::Write(vec![document], verb)).await?;
    let after = done.changes.into_iter().find_map(|change| change.after);
    Ok(after.map_or(Value::Null, |after| after.to_json()))
}

/// Whether an object is what its path says.
fn fits(
    document: &Document,
    kind: Kind,
    namespace: Option<&String>,
    name: Option<&String>,
) -> Result<(), Refusal> {
    let found = document.resource.key();
    let mut problems = Vec::new();
    if found.kind != kind {
        let message = format!("expected {kind} at this path, found {}", found.kind);
        problems.push(document.problem("kind", message, Some(kind.to_string())));
    }
    // POST without a namespace in the path takes the one in the body, as `apply` does.
    if found.namespace.as_ref() != namespace && (namespace.is_some() || name.is_some()) {
        let expected = namespace.map_or_else(|| "no namespace".to_owned(), |name| format!("{name:?}"));
        let message = format!("expected {expected} at this path");
        problems.push(document.problem("metadata.namespace", message, namespace.cloned()));
    }
    if let Some(name) = name
        && found.name != *name
    {
        let message = format!("expected {name:?} at this path, found {:?}", found.name);
        problems.push(document.problem("metadata.name", message, Some(name.clone())));
    }
    if problems.is_empty() { Ok(()) } else { Err(Refusal::invalid(problems)) }
}

/// `DELETE …/{plural}/{name}`.
pub(super) async fn delete(
    State(context): Shared,
    Extension(caller): Extension<Caller>,
    Extension(permissions): Extension<Permissions>,
    variables: Variables,
    parameters: Parameters,
) -> Result<Json<Value>, Refusal> {
    let [dry_run, force, confirm_within] = OF_CHANGES;
    parameters.only(&[dry_run, force, confirm_within, "resourceVersion"])?;
    let key = key(&variables)?;
    let version = parameters.text("resourceVersion").map(ToOwned::to_owned);
    let terms = input::terms(&context, &parameters, (&caller, &permissions), "delete")?;
    let done = change(context, terms, Ask::Delete(vec![key.clone()], version)).await?;
    match done.changes.into_iter().find_map(|change| change.before) {
        Some(before) => Ok(Json(before.to_json())),
        None => Err(WriteError::NotFound(key).into()),
    }
}
