//! Changes of objects as they happen: one JSON event per line, as Kubernetes has them.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Bytes;
use axum::response::Response;
use bulkhead_model::resource::NO_NAMESPACE;
use bulkhead_model::{ObjectKey, Resource};
use bulkhead_store::{Change, Commit, Revision, StoreError, Watch};
use futures::StreamExt;
use serde_json::{Value, json};
use tokio::time::Instant;

use super::input::Parameters;
use super::kubernetes::form::Form;
use super::kubernetes::place::{Lies, Place};
use super::kubernetes::selection::Selection;
use super::problem::Refusal;
use super::stream;
use crate::context::{Context, stopped};
use crate::repository::{Repository, decode_stored, object_key, store_prefix};

/// Query parameters of watches only.
pub(super) const OF_WATCHES: [&str; 3] = ["allowWatchBookmarks", "sendInitialEvents", "timeoutSeconds"];
/// How often a watch with nothing to say names its revision, if the client allows, so that it can resume from there.
const BOOKMARK_EVERY: Duration = Duration::from_secs(30);
/// Longest that a watch lasts: whoever does not say how long has it for as long as he likes.
const TIMEOUT_MAX: Duration = Duration::from_secs(365 * 24 * 3600);

/// What a client watches.
struct Watched {
    repository: Arc<Repository>,
    place: Place,
    form: Form,
    selection: Selection,
    bookmarks: bool,
}

/// Whether bookmarks are wanted, and all that there is first; and for how many seconds.
pub(super) fn asked(parameters: &Parameters) -> Result<(bool, bool, Option<u64>), Refusal> {
    let bookmarks = parameters.switch("allowWatchBookmarks")?;
    let initial = parameters.switch("sendInitialEvents")?;
    Ok((bookmarks, initial, parameters.parsed("timeoutSeconds", "a whole number")?))
}

/// Everything after a revision; without one, or from 0 on, all that there is and everything after that. The log that it reads
/// is the store's own, so each change comes once and in order, and no queue is kept for the reader.
pub(super) async fn watch(
    context: &Arc<Context>,
    place: Place,
    form: Form,
    selection: Selection,
    parameters: &Parameters,
) -> Result<Response, Refusal> {
    let held = stream::place(context)?;
    let from: Option<u64> = parameters.parsed("resourceVersion", "a revision")?;
    let (bookmarks, initial, seconds) = asked(parameters)?;
    let timeout = seconds.filter(|seconds| *seconds > 0).map_or(TIMEOUT_MAX, Duration::from_secs);
    let ends_at = Instant::now() + timeout.min(TIMEOUT_MAX);
    let namespace = selection.namespace().map(|lies| match lies {
        Lies::Outside => NO_NAMESPACE,
        Lies::In(name) => name,
    });
    let prefix = store_prefix(place.kind, namespace);
    let repository = Arc::clone(&context.repository);
    let watched = Watched { repository, place, form, selection, bookmarks };
    let (first, from) = match from.filter(|from| *from > 0 && !initial) {
        Some(from) => (String::new(), from),
        None => watched.everything(context, initial),
    };
    let watch = context.repository.store().watch(&prefix, Revision(from)).await?;
    let state = (watched, watch, context.shutdown.clone(), false);
    let later = futures::stream::unfold(state, move |(watched, mut watch, mut shutdown, ended)| async move {
        if ended {
            return None;
        }
        let (text, ended) = tokio::select! {
            () = stopped(&mut shutdown) => return None,
            () = tokio::time::sleep_until(ends_at) => return None,
            next = watched.next(&mut watch) => next,
        };
        Some((Bytes::from(text), (watched, watch, shutdown, ended)))
    });
    let lines = futures::stream::iter((!first.is_empty()).then(|| Bytes::from(first))).chain(later);
    Ok(stream::respond_as("application/json", held, lines))
}

impl Watched {
    /// What comes next, and whether it is the end.
    async fn next(&self, watch: &mut Watch) -> (String, bool) {
        tokio::select! {
            commits = watch.next() => match commits {
                Ok(commits) => (self.events(&commits), false),
                Err(error) => (error_event(error), true),
            },
            () = tokio::time::sleep(BOOKMARK_EVERY), if self.bookmarks => {
                (self.bookmark(watch.position().0, &json!({})), false)
            }
        }
    }

    /// All that there is now, as if it were new, and the revision of that.
    fn everything(&self, context: &Context, told: bool) -> (String, u64) {
        let view = context.repository.view();
        let chosen = view.of_kind(self.place.kind).filter(|object| self.selection.has(&object.resource));
        let mut text: String = chosen.map(|object| line("ADDED", &self.object(&object.resource))).collect();
        if told {
            let annotations = json!({ "annotations": { "k8s.io/initial-events-end": "true" } });
            text.push_str(&self.bookmark(view.revision, &annotations));
        }
        (text, view.revision)
    }

    fn object(&self, resource: &Resource) -> Value {
        self.form.object(&self.place, self.place.shown(&self.repository, resource))
    }

    fn events(&self, commits: &[Arc<Commit>]) -> String {
        let changes =
            commits.iter().flat_map(|commit| commit.changes.iter().map(move |change| (commit, change)));
        changes.filter_map(|(commit, change)| self.event(change, commit.revision)).collect()
    }

    fn event(&self, change: &Change, revision: Revision) -> Option<String> {
        let key = object_key(&change.key)?;
        if !self.selection.has_key(&key) {
            return None;
        }
        let Some(stored) = &change.object else {
            let gone = self.form.object(&self.place, self.tombstone(&key, revision));
            return Some(line("DELETED", &gone));
        };
        let resource = decode_stored(stored).ok()?;
        let is_new = stored.created == stored.modified;
        let kind = match (self.selection.has(&resource), is_new) {
            (true, true) => "ADDED",
            (true, false) => "MODIFIED",
            // It may have matched before: a client that keeps only what matches must drop it.
            (false, false) => "DELETED",
            (false, true) => return None,
        };
        Some(line(kind, &self.object(&resource)))
    }

    /// What is known of an object that is gone.
    fn tombstone(&self, key: &ObjectKey, revision: Revision) -> Value {
        let mut metadata = json!({ "name": key.name, "resourceVersion": revision.to_string() });
        if let Some(namespace) = &key.namespace {
            metadata["namespace"] = json!(namespace);
        }
        let (version, kind) = self.place.object_type();
        let mut object = json!({ "apiVersion": version, "kind": kind, "metadata": metadata });
        self.place.show(&mut object);
        object
    }

    fn bookmark(&self, revision: u64, more: &Value) -> String {
        let mut metadata = more.clone();
        metadata["resourceVersion"] = json!(revision.to_string());
        line("BOOKMARK", &self.form.bookmark(&self.place, &metadata))
    }
}

fn line(kind: &str, object: &Value) -> String {
    format!("{}\n", json!({ "type": kind, "object": object }))
}

fn error_event(error: StoreError) -> String {
    line("ERROR", &Refusal::from(error).status())
}
