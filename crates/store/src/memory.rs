//! A store that keeps everything in memory.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;

use crate::state::{Pending, Shared, State};
use crate::types::{Applied, LeaseId, Revision, StoreError, Stored, Transaction};
use crate::{LOG_CHANGES_MAX, Store, Watch, random_id};

/// Everything in memory: nothing survives the process.
#[derive(Debug)]
pub struct Memory {
    epoch: String,
    shared: Arc<Shared>,
}

impl Default for Memory {
    fn default() -> Self {
        Self::new()
    }
}

impl Memory {
    /// An empty store.
    pub fn new() -> Self {
        Self::with_log(LOG_CHANGES_MAX)
    }

    /// An empty store that remembers this many changes.
    pub fn with_log(log_changes_max: usize) -> Self {
        Self { epoch: random_id(), shared: Arc::new(Shared::new(State::new(log_changes_max))) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        self.shared.leases.close();
    }
}

impl Shared {
    /// Applies what is made of the state.
    fn apply(&self, make: impl FnOnce(&State) -> Transaction) -> Result<Applied, StoreError> {
        let applied = {
            let mut state = self.write();
            let next = Revision(state.revision().0 + 1);
            let transaction = make(&state);
            match Pending::default().decide(&state, &self.leases, &transaction, next)? {
                Some(commit) => {
                    state.commit(commit);
                    Applied { revision: next, changed: true }
                }
                None => Applied { revision: state.revision(), changed: false },
            }
        };
        self.announce();
        Ok(applied)
    }
}

#[async_trait]
impl Store for Memory {
    fn epoch(&self) -> &str {
        &self.epoch
    }

    async fn get(&self, key: &str) -> Result<Option<Stored>, StoreError> {
        Ok(self.shared.read().get(key).cloned())
    }

    async fn list(&self, prefix: &str) -> Result<(Vec<Stored>, Revision), StoreError> {
        let state = self.shared.read();
        Ok((state.list(prefix), state.revision()))
    }

    async fn apply(&self, transaction: Transaction) -> Result<Applied, StoreError> {
        transaction.check()?;
        self.shared.apply(|_| transaction)
    }

    async fn watch(&self, prefix: &str, from: Revision) -> Result<Watch, StoreError> {
        self.shared.watch(prefix, from)
    }

    async fn grant(&self, ttl: Duration) -> Result<LeaseId, StoreError> {
        let shared = Arc::downgrade(&self.shared);
        self.shared.leases.grant(ttl, move |lease| {
            if let Some(shared) = shared.upgrade()
                && let Err(error) = shared.apply(|state| state.removal(lease))
            {
                tracing::error!(%error, %lease, "the keys of a lease could not be removed");
            }
        })
    }

    async fn keep_alive(&self, lease: LeaseId) -> Result<(), StoreError> {
        self.shared.leases.keep_alive(lease)
    }

    async fn revoke(&self, lease: LeaseId) -> Result<(), StoreError> {
        self.shared.leases.remove(lease)?;
        self.shared.apply(|state| state.removal(lease)).map(drop)
    }

    async fn revision(&self) -> Result<Revision, StoreError> {
        Ok(self.shared.read().revision())
    }
}
