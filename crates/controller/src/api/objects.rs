//! Objects one by one: list, get, create, replace, delete.

use std::sync::Arc;

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use bulkhead_model::ObjectKey;
use bulkhead_model::document::Document;
use serde_json::{Value, json};

use super::Shared;
use super::change::{Ask, change};
use super::input::{self, Body, DeleteOptions, OF_CHANGES, OF_CLIENTS, OF_WRITES, Parameters};
use super::kubernetes::form::Form;
use super::kubernetes::place::{Lies, Place};
use super::kubernetes::selection::{OF_SELECTIONS, Selection};
use super::problem::Refusal;
use super::watch::{self, OF_WATCHES, watch};
use crate::access::{Caller, Permissions};
use crate::context::Context;
use crate::repository::{Terms, Verb, WriteError};

/// Query parameters of deletions. How what depends on an object is deleted is Kubernetes' business: here nothing does.
const OF_DELETIONS: [&str; 4] =
    ["resourceVersion", "propagationPolicy", "gracePeriodSeconds", "orphanDependents"];

/// What is of no use here is refused all the same if it is none.
fn check_dependents(parameters: &Parameters) -> Result<(), Refusal> {
    parameters.switch("orphanDependents")?;
    parameters.parsed::<u64>("gracePeriodSeconds", "a whole number").map(drop)
}

/// Where the next page of a list begins.
#[derive(serde::Serialize, serde::Deserialize)]
struct Continue {
    /// Revision of the first page. A watch from there brings whatever the later pages have not shown as it was then.
    revision: u64,
    namespace: Option<String>,
    name: String,
}

impl Continue {
    fn read(place: &Place, text: &str) -> Result<(u64, ObjectKey), Refusal> {
        let bytes = URL_SAFE_NO_PAD.decode(text).ok();
        let read: Option<Self> = bytes.and_then(|bytes| serde_json::from_slice(&bytes).ok());
        let Self { revision, namespace, name } = read
            .ok_or_else(|| Refusal::bad_request("query parameter continue: not from one of our answers"))?;
        Ok((revision, ObjectKey { kind: place.kind, namespace, name }))
    }

    fn write(revision: u64, last: ObjectKey) -> String {
        let token = Self { revision, namespace: last.namespace, name: last.name };
        URL_SAFE_NO_PAD.encode(serde_json::to_vec(&token).unwrap_or_default())
    }
}

/// `GET …/{plural}`, also `?watch=true`.
pub(super) async fn list(
    State(context): Shared,
    place: Place,
    form: Form,
    parameters: Parameters,
) -> Result<Response, Refusal> {
    let own = ["limit", "continue", "watch", "resourceVersion", "resourceVersionMatch", "includeObject"];
    parameters.only(&[&OF_SELECTIONS[..], &OF_WATCHES, &OF_CLIENTS, &own].concat())?;
    let selection = Selection::of(&place, &parameters)?;
    if parameters.switch("watch")? {
        return watch(&context, place, form, selection, &parameters).await;
    }
    // Of no use here, and refused all the same if they are none.
    watch::asked(&parameters)?;
    let limit: usize = parameters.parsed("limit", "a whole number")?.unwrap_or_default();
    // Clients of Kubernetes say 0 for no limit.
    let limit = if limit == 0 { usize::MAX } else { limit };
    let start = parameters.text("continue").map(|text| Continue::read(&place, text)).transpose()?;
    let view = context.repository.view();
    let wanted: Option<u64> = parameters.parsed("resourceVersion", "a revision")?;
    if parameters.text("resourceVersionMatch") == Some("Exact") && wanted != Some(view.revision) {
        return Err(Refusal::expired(format!("only the newest revision, {}, can be listed", view.revision)));
    }
    let (revision, after) = start.map_or((view.revision, None), |(first, key)| (first, Some(key)));
    let mut matching =
        view.of_kind_after(place.kind, after.as_ref()).filter(|object| selection.has(&object.resource));
    let mut last = None;
    let items: Vec<_> = matching
        .by_ref()
        .take(limit)
        .map(|object| {
            last = Some(object);
            place.shown(&context.repository, &object.resource)
        })
        .collect();
    let mut metadata = json!({ "resourceVersion": revision.to_string() });
    let remaining = matching.count();
    if remaining > 0 {
        metadata["remainingItemCount"] = json!(remaining);
        metadata["continue"] = json!(last.map(|last| Continue::write(revision, last.resource.key())));
    }
    let answer = form.list(&place, &items, &metadata);
    drop(view);
    Ok(Json(answer).into_response())
}

/// `GET …/{plural}/{name}`.
pub(super) async fn get(
    State(context): Shared,
    place: Place,
    form: Form,
    parameters: Parameters,
) -> Result<Json<Value>, Refusal> {
    parameters.only(&[&OF_CLIENTS[..], &["resourceVersion", "includeObject"]].concat())?;
    if place.is_no_namespace() {
        return Ok(Json(form.object(&place, place.no_namespace())));
    }
    Ok(Json(form.object(&place, found(&context, &place)?)))
}

/// The object at a place, as clients see it.
pub(crate) fn found(context: &Context, place: &Place) -> Result<Value, Refusal> {
    let key = place.key();
    let found =
        context.repository.view().get(&key).map(|object| place.shown(&context.repository, &object.resource));
    found.ok_or_else(|| WriteError::NotFound(key).into())
}

/// `POST …/{plural}`.
pub(super) async fn create(
    State(context): Shared,
    Extension(caller): Extension<Caller>,
    Extension(permissions): Extension<Permissions>,
    place: Place,
    form: Form,
    parameters: Parameters,
    body: Body,
) -> Result<Response, Refusal> {
    parameters.only(&OF_WRITES)?;
    let terms = input::terms(&context, &parameters, (&caller, &permissions), "create")?;
    let document = input::document(&place, body)?;
    fits(&document, &place)?;
    let object = write(&context, &place, document, Verb::Create, terms).await?;
    Ok((StatusCode::CREATED, Json(form.object(&place, object))).into_response())
}

/// `PUT …/{plural}/{name}`.
pub(super) async fn replace(
    State(context): Shared,
    Extension(caller): Extension<Caller>,
    Extension(permissions): Extension<Permissions>,
    place: Place,
    form: Form,
    parameters: Parameters,
    body: Body,
) -> Result<Json<Value>, Refusal> {
    parameters.only(&OF_WRITES)?;
    let terms = input::terms(&context, &parameters, (&caller, &permissions), "replace")?;
    let document = input::document(&place, body)?;
    fits(&document, &place)?;
    let object = write(&context, &place, document, Verb::Replace, terms).await?;
    Ok(Json(form.object(&place, object)))
}

/// Writes one object and answers what became of it.
pub(super) async fn write(
    context: &Arc<Context>,
    place: &Place,
    document: Document,
    verb: Verb,
    terms: Terms,
) -> Result<Value, Refusal> {
    let done = change(Arc::clone(context), terms, Ask::Write(vec![document], verb)).await?;
    let after = done.changes.into_iter().find_map(|change| change.after);
    Ok(after.map_or(Value::Null, |after| place.shown(&context.repository, &after)))
}

/// Whether an object is what its path says.
pub(super) fn fits(document: &Document, place: &Place) -> Result<(), Refusal> {
    let found = document.resource.key();
    let (kind, name) = (place.kind, place.name());
    let mut problems = Vec::new();
    if found.kind != kind {
        let message = format!("expected {kind} at this path, found {}", found.kind);
        problems.push(document.problem("kind", message, Some(kind.to_string())));
    }
    // POST without a namespace in the path takes the one in the body, as `apply` does.
    let namespace = place.namespace.as_ref().and_then(Lies::namespace);
    if found.namespace.as_deref() != namespace && (place.namespace.is_some() || name.is_some()) {
        let expected = namespace.map_or_else(|| "no namespace".to_owned(), |name| format!("{name:?}"));
        let message = format!("expected {expected} at this path");
        problems.push(document.problem("metadata.namespace", message, namespace.map(ToOwned::to_owned)));
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
    place: Place,
    parameters: Parameters,
    body: Body,
) -> Result<Json<Value>, Refusal> {
    parameters.only(&[&OF_CHANGES[..], &OF_CLIENTS, &OF_DELETIONS].concat())?;
    check_dependents(&parameters)?;
    let options = input::delete_options(body)?;
    let version = parameters.text("resourceVersion").map(ToOwned::to_owned);
    let version = version.or_else(|| options.resource_version().map(ToOwned::to_owned));
    let terms = input::terms(&context, &parameters, (&caller, &permissions), "delete")?;
    let terms = Terms { dry_run: terms.dry_run || options.is_dry_run(), ..terms };
    let key = place.key();
    options.check(&key, context.repository.view().get(&key).map(|object| &object.resource))?;
    let done = change(Arc::clone(&context), terms, Ask::Delete(vec![key.clone()], version)).await?;
    match done.changes.into_iter().find_map(|change| change.before) {
        Some(before) => Ok(Json(place.shown(&context.repository, &before))),
        None => Err(WriteError::NotFound(key).into()),
    }
}

/// `DELETE …/{plural}`: all that the selectors choose, or none.
pub(super) async fn delete_all(
    State(context): Shared,
    Extension(caller): Extension<Caller>,
    Extension(permissions): Extension<Permissions>,
    place: Place,
    parameters: Parameters,
    body: Body,
) -> Result<Json<Value>, Refusal> {
    // A page of what is to be deleted would be a surprise: limit is not taken.
    parameters.only(&[&OF_CHANGES[..], &OF_CLIENTS, &OF_DELETIONS, &OF_SELECTIONS].concat())?;
    check_dependents(&parameters)?;
    let options: DeleteOptions = input::delete_options(body)?;
    let selection = Selection::of(&place, &parameters)?;
    let terms = input::terms(&context, &parameters, (&caller, &permissions), "delete")?;
    let terms = Terms { dry_run: terms.dry_run || options.is_dry_run(), ..terms };
    let keys: Vec<ObjectKey> = {
        let view = context.repository.view();
        let chosen = view.of_kind(place.kind).filter(|object| selection.has(&object.resource));
        chosen.map(|object| object.resource.key()).collect()
    };
    let done = change(Arc::clone(&context), terms, Ask::Delete(keys, None)).await?;
    let metadata = json!({ "resourceVersion": done.revision.to_string() });
    let gone = done.changes.into_iter().filter_map(|change| change.before);
    let gone: Vec<_> = gone.map(|before| place.shown(&context.repository, &before)).collect();
    let (version, kind) = place.list_type();
    Ok(Json(json!({ "apiVersion": version, "kind": kind, "metadata": metadata, "items": gone })))
}
