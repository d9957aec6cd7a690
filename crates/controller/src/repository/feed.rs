//! From the store's watch into the view.

use std::sync::{Arc, PoisonError};

use bulkhead_store::{Commit, LOG_CHANGES_MAX, Revision, Store, StoreError};
use tokio::sync::watch;

use super::herald::Herald;
use super::keys::{OPERATORS, PREFIX};
use super::view::View;
use super::{Repository, decoded, history, managed};
use crate::clock;
use crate::context::stopped;

/// The view of everything that the store holds now, with as much of its log as there is.
pub(super) async fn first_view(store: &dyn Store) -> Result<View, StoreError> {
    let (objects, revision) = store.list(PREFIX).await?;
    // Read after the list, so that no change of another controller in between is missing in it.
    let (begins_after, commits) = history(store).await?;
    let commits: Vec<_> = commits.into_iter().filter(|commit| commit.revision <= revision).collect();
    let mut view = View::new(&objects, revision.0, &commits, begins_after);
    let operators = store.get(OPERATORS).await?.map(|stored| stored.modified);
    // A later one is still to come by the watch.
    view.operators_at = operators.filter(|at| *at <= revision);
    Ok(view)
}

/// The changes that the store still remembers, and after which revision they begin.
async fn history(store: &dyn Store) -> Result<(u64, Vec<Arc<Commit>>), StoreError> {
    let now = store.mark().await?;
    // Our own stores remember no more than this, and of etcd's past, which may be long, no more is asked for.
    let mut from = Revision(now.0.saturating_sub(LOG_CHANGES_MAX as u64));
    let mut watch = loop {
        match store.watch(PREFIX, from).await {
            Ok(watch) => break watch,
            Err(StoreError::Compacted { oldest, .. }) => from = oldest,
            Err(error) => return Err(error),
        }
    };
    Ok((from.0, watch.until(now).await?))
}

/// Follows the store until `shutdown`. Ends early, with the error, if the store fails.
pub(crate) async fn feed(
    repository: Arc<Repository>,
    mut shutdown: watch::Receiver<bool>,
) -> Result<(), StoreError> {
    let from = Revision(repository.view().revision);
    // Everything of ours, so that the view moves on whatever is written.
    let mut watch = repository.store.watch(EVERYTHING, from).await?;
    let mut herald = Herald::new(std::thread::available_parallelism().map_or(1, Into::into));
    loop {
        let commits = tokio::select! {
            // Whoever has written something that the view does not show waits for its revision, too.
            commits = watch.step() => commits?,
            () = herald.pause() => {
                herald.wake_some();
                continue;
            }
            () = stopped(&mut shutdown) => return Ok(()),
        };
        let newest = watch.position().0;
        let changes = decoded::decode(&commits, |stored| repository.written.read(stored));
        remember(&repository, &commits);
        repository.take_in_confirmations(&commits);
        let hearers = {
            let mut view = repository.view_mut();
            let all = commits.iter().flat_map(|commit| &commit.changes);
            if let Some(last) = all.filter(|change| *change.key == *OPERATORS).last() {
                view.operators_at = last.object.as_ref().map(|stored| stored.modified);
            }
            view.commit(changes, newest, clock::now_ms())
        };
        herald.add(hearers);
        repository.revision.send_replace(newest);
    }
}

/// What all keys of ours begin with.
const EVERYTHING: &str = "/bulkhead.dev/";

/// Takes records of the history, and of who set what, in and out.
fn remember(repository: &Repository, commits: &[Arc<Commit>]) {
    let changes = commits.iter().flat_map(|commit| &commit.changes);
    for change in changes.clone().filter(|change| change.key.starts_with(managed::PREFIX)) {
        let mut managed = repository.managed.write().unwrap_or_else(PoisonError::into_inner);
        managed.take_in(&change.key, change.object.as_ref());
    }
    let mut records = changes.filter(|change| change.key.starts_with(history::PREFIX)).peekable();
    if records.peek().is_none() {
        return;
    }
    let mut history = repository.history_mut();
    for change in records {
        match &change.object {
            Some(stored) => history.take_in(stored),
            None => history.forget(&change.key),
        }
    }
}
