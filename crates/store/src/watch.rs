//! What a watcher holds, whatever the store is.

use std::sync::Arc;

use crate::etcd::EtcdWatch;
use crate::state::LogWatch;
use crate::types::{Commit, Revision, StoreError};

/// The changes of a store, one after the other.
#[derive(Debug)]
pub struct Watch(Source);

#[derive(Debug)]
enum Source {
    /// A walk along the log of a store in this process.
    Log(LogWatch),
    /// What etcd sends.
    Etcd(EtcdWatch),
}

impl From<LogWatch> for Watch {
    fn from(watch: LogWatch) -> Self {
        Self(Source::Log(watch))
    }
}

impl From<EtcdWatch> for Watch {
    fn from(watch: EtcdWatch) -> Self {
        Self(Source::Etcd(watch))
    }
}

impl Watch {
    /// The revision up to which everything has been answered.
    pub fn position(&self) -> Revision {
        match &self.0 {
            Source::Log(watch) => watch.position(),
            Source::Etcd(watch) => watch.position(),
        }
    }

    /// The next commits that touch the prefix, oldest first: at least one, and as many as are there, up to
    /// a bound. Cancelling this loses nothing.
    ///
    /// # Errors
    /// [`StoreError::Compacted`] if the watcher was so slow that the log has lost its place;
    /// [`StoreError::Closed`] when the store is closed.
    pub async fn next(&mut self) -> Result<Vec<Arc<Commit>>, StoreError> {
        loop {
            let found = self.ready()?;
            if !found.is_empty() {
                return Ok(found);
            }
            self.more().await?;
        }
    }

    /// As [`Watch::next`], but answers as soon as the position has moved, be it over nothing that touches the prefix.
    ///
    /// # Errors
    /// As [`Watch::next`].
    pub async fn step(&mut self) -> Result<Vec<Arc<Commit>>, StoreError> {
        let before = self.position();
        loop {
            let found = self.ready()?;
            if !found.is_empty() || self.position() > before {
                return Ok(found);
            }
            self.more().await?;
        }
    }

    /// Everything that touches the prefix up to a revision, and perhaps some more: waits until the watch is there,
    /// so it should be one that the store has come to ([`crate::Store::mark`]).
    ///
    /// # Errors
    /// As [`Watch::next`].
    pub async fn until(&mut self, revision: Revision) -> Result<Vec<Arc<Commit>>, StoreError> {
        let mut commits = Vec::new();
        loop {
            let found = self.ready()?;
            let none = found.is_empty();
            commits.extend(found);
            if self.position() >= revision {
                return Ok(commits);
            }
            if none {
                self.more().await?;
            }
        }
    }

    /// What [`Watch::next`] would answer without waiting; empty if there is nothing.
    ///
    /// # Errors
    /// As [`Watch::next`].
    pub fn ready(&mut self) -> Result<Vec<Arc<Commit>>, StoreError> {
        match &mut self.0 {
            Source::Log(watch) => watch.ready(),
            Source::Etcd(watch) => watch.ready(),
        }
    }

    /// Waits until it is worth asking [`Watch::ready`] again. Cancelling this loses nothing.
    async fn more(&mut self) -> Result<(), StoreError> {
        match &mut self.0 {
            Source::Log(watch) => watch.more().await,
            Source::Etcd(watch) => watch.more().await,
        }
    }
}
