//! From the store's watch into the view.

use std::sync::Arc;

use bulkhead_store::{Commit, Revision, Store, StoreError};
use tokio::sync::watch;

use super::Repository;
use super::keys::PREFIX;
use super::view::{self, View};
use crate::clock;
use crate::context::stopped;

/// The view of everything that the store holds now, with as much of its log as there is.
pub(super) async fn first_view(store: &dyn Store) -> Result<View, StoreError> {
    let (begins_after, commits) = history(store).await?;
    let (objects, revision) = store.list(PREFIX).await?;
    let commits: Vec<_> = commits.into_iter().filter(|commit| commit.revision <= revision).collect();
    Ok(View::new(&objects, revision.0, &commits, begins_after))
}

/// The changes that the store still remembers, and after which revision they begin.
async fn history(store: &dyn Store) -> Result<(u64, Vec<Arc<Commit>>), StoreError> {
    let mut from = Revision(0);
    let mut watch = loop {
        match store.watch(PREFIX, from).await {
            Ok(watch) => break watch,
            Err(StoreError::Compacted { oldest, .. }) => from = oldest,
            Err(error) => return Err(error),
        }
    };
    let mut commits = Vec::new();
    loop {
        let step = watch.ready()?;
        if step.is_empty() {
            return Ok((from.0, commits));
        }
        commits.extend(step);
    }
}

/// Follows the store until `shutdown`. Ends early, with the error, if the store fails.
pub(crate) async fn feed(
    repository: Arc<Repository>,
    mut shutdown: watch::Receiver<bool>,
) -> Result<(), StoreError> {
    let from = Revision(repository.view().revision);
    let mut watch = repository.store.watch(PREFIX, from).await?;
    loop {
        let commits = tokio::select! {
            commits = watch.next() => commits?,
            () = stopped(&mut shutdown) => return Ok(()),
        };
        let newest = watch.position().0;
        let changes = view::decode(&commits, |stored| repository.written.read(stored));
        repository.view_mut().commit(changes, newest, clock::now_ms());
        repository.revision.send_replace(newest);
    }
}
