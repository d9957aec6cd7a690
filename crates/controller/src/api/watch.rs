//! Changes of objects as they happen: one JSON event per line, as Kubernetes has them.

use std::sync::Arc;
use std::time::Duration;

use axum::response::Response;
use bulkhead_model::resource::API_VERSION;
use bulkhead_model::{Kind, ObjectKey, Selector};
use bulkhead_store::{Change, Commit, Revision, StoreError};
use serde_json::{Value, json};

use super::objects::selects;
use super::problem::Refusal;
use super::stream;
use crate::context::{Context, stopped};
use crate::repository::{decode_stored, object_key, store_prefix};

/// How often a watch with nothing to say names its revision, so that the client can resume from there.
const BOOKMARK_EVERY: Duration = Duration::from_secs(30);

/// Everything after a revision (default: now). The log that it reads is the store's own, so each change
/// comes once and in order, and no queue is kept for the reader.
pub(super) async fn watch(
    context: &Arc<Context>,
    kind: Kind,
    namespace: Option<&str>,
    selector: Option<Selector>,
    from: Option<u64>,
) -> Result<Response, Refusal> {
    let place = stream::place(context)?;
    let prefix = store_prefix(kind, namespace);
    let from = Revision(from.unwrap_or_else(|| context.repository.view().revision));
    let watch = context.repository.store().watch(&prefix, from).await?;
    let lines = futures::stream::unfold(
        (watch, context.shutdown.clone(), selector, false),
        |(mut watch, mut shutdown, selector, ended)| async move {
            if ended {
                return None;
            }
            let (text, ended) = tokio::select! {
                commits = watch.next() => match commits {
                    Ok(commits) => (events(&commits, selector.as_ref()), false),
                    Err(error) => (error_event(error), true),
                },
                () = tokio::time::sleep(BOOKMARK_EVERY) => (bookmark(watch.position()), false),
                () = stopped(&mut shutdown) => return None,
            };
            Some((text.into(), (watch, shutdown, selector, ended)))
        },
    );
    Ok(stream::respond(place, lines))
}

fn events(commits: &[Arc<Commit>], selector: Option<&Selector>) -> String {
    let changes = commits.iter().flat_map(|commit| commit.changes.iter().map(move |change| (commit, change)));
    changes
        .filter_map(|(commit, change)| event(change, commit.revision, selector))
        .map(|event| format!("{event}\n"))
        .collect()
}

fn event(change: &Change, revision: Revision, selector: Option<&Selector>) -> Option<Value> {
    let Some(stored) = &change.object else {
        let object = tombstone(&object_key(&change.key)?, revision);
        return Some(json!({ "type": "DELETED", "object": object }));
    };
    let resource = decode_stored(stored).ok()?;
    let is_new = stored.created == stored.modified;
    let kind = match (selector.is_none_or(|selector| selects(selector, &resource)), is_new) {
        (true, true) => "ADDED",
        (true, false) => "MODIFIED",
        // It may have matched before: a client that keeps only what matches must drop it.
        (false, false) => "DELETED",
        (false, true) => return None,
    };
    Some(json!({ "type": kind, "object": resource.to_json() }))
}

/// What is known of an object that is gone.
fn tombstone(key: &ObjectKey, revision: Revision) -> Value {
    let mut metadata = json!({ "name": key.name, "resourceVersion": revision.to_string() });
    if let Some(namespace) = &key.namespace {
        metadata["namespace"] = json!(namespace);
    }
    json!({ "apiVersion": API_VERSION, "kind": key.kind.as_str(), "metadata": metadata })
}

fn bookmark(revision: Revision) -> String {
    let metadata = json!({ "resourceVersion": revision.to_string() });
    format!("{}\n", json!({ "type": "BOOKMARK", "object": { "metadata": metadata } }))
}

fn error_event(error: StoreError) -> String {
    format!("{}\n", json!({ "type": "ERROR", "object": Refusal::from(error).status() }))
}
