//! From one store into another while the first is in use: a copy, and then every change since.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use crate::backup::{Backup, BackupError, Restored};
use crate::types::{Commit, Precondition, Revision, StoreError, Transaction};
use crate::{Store, Watch};

/// Longest wait for a watch to come to a mark that stands in the store already.
const CATCH_UP_MAX: Duration = Duration::from_secs(60);

/// One under way.
#[derive(Debug)]
pub struct Migration<'a> {
    from: &'a dyn Store,
    to: &'a dyn Store,
    watch: Watch,
    /// What the watch has answered and is not copied yet.
    pending: VecDeque<Arc<Commit>>,
    /// What the copy was.
    pub copied: Restored,
    /// Objects in it.
    pub objects: usize,
}

impl<'a> Migration<'a> {
    /// Copies everything. The target must be empty, or is made equal with `replace`.
    ///
    /// # Errors
    /// As [`Backup::restore`].
    pub async fn begin(from: &'a dyn Store, to: &'a dyn Store, replace: bool) -> Result<Self, BackupError> {
        let backup = Backup::take(from).await?;
        let watch = from.watch("", backup.revision).await?;
        let copied = backup.restore(to, replace).await?;
        let pending = VecDeque::new();
        Ok(Self { from, to, watch, pending, copied, objects: backup.objects.len() })
    }

    /// Copies the next changes, which it waits for. Cancelling this loses nothing: what was begun is done again.
    ///
    /// # Errors
    /// If either store fails, or the first has forgotten what is to be copied: then it must begin anew.
    pub async fn step(&mut self) -> Result<(), StoreError> {
        if self.pending.is_empty() {
            let commits = self.watch.step().await?;
            self.pending.extend(commits);
        }
        self.copy_pending().await
    }

    /// Copies what there is by now, and answers the revision of the first store up to which the second is complete.
    ///
    /// # Errors
    /// As [`Migration::step`].
    pub async fn finish(mut self) -> Result<Revision, StoreError> {
        self.copy_pending().await?;
        let mark = self.from.mark().await?;
        let commits = tokio::time::timeout(CATCH_UP_MAX, self.watch.until(mark)).await;
        let commits = commits.map_err(|_elapsed| StoreError::Unavailable {
            store: "that is copied".into(),
            reason: format!("its watch does not come to revision {mark}"),
        })??;
        self.pending.extend(commits);
        self.copy_pending().await?;
        Ok(mark)
    }

    async fn copy_pending(&mut self) -> Result<(), StoreError> {
        while let Some(commit) = self.pending.front() {
            self.copy(commit).await?;
            self.pending.pop_front();
        }
        Ok(())
    }

    /// One transaction for each of the first store. What is put under a lease there is nothing here.
    async fn copy(&self, commit: &Commit) -> Result<(), StoreError> {
        let transaction =
            commit.changes.iter().fold(Transaction::new(), |all, change| match &change.object {
                Some(object) if object.lease.is_none() => {
                    all.put(change.key.clone(), object.value.clone(), Precondition::Any)
                }
                _ => all.delete(change.key.clone(), Precondition::Any),
            });
        self.to.apply(transaction).await.map(drop)
    }
}
