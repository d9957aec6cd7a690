//! The repository's stores: one trait, several engines, one [`conformance`] suite that each of them passes.
//!
//! Values are opaque bytes: a store knows keys, revisions and transactions, not policies. Every transaction
//! that changes anything makes exactly one new revision. A writer reads its own writes; a watcher sees every
//! change once, in order and whole transactions at a time, or is told that it must list again.
//!
//! * [`Memory`] keeps everything in memory, for tests and try-outs.
//! * [`Embedded`] is the same with a file beneath: what it acknowledged survives `kill -9` at any instruction.
//! * [`Etcd`] keeps everything in an etcd cluster, for several controllers at once.

mod backup;
pub mod conformance;
mod embedded;
mod etcd;
mod leases;
mod location;
mod memory;
mod migration;
mod state;
mod types;
mod watch;

use std::fmt::Debug;
use std::hash::{BuildHasher, RandomState};
use std::time::Duration;

use async_trait::async_trait;

pub use backup::{Backup, BackupError, Restored};
pub use embedded::{Embedded, EmbeddedOptions, RESERVE_BYTES, free_bytes, is_full};
pub use etcd::{Etcd, EtcdOptions};
pub use location::{ETCD_PREFIX, Location, NoLocation};
pub use memory::Memory;
pub use migration::Migration;
pub use types::{
    Applied, Change, Commit, KEY_BYTES_MAX, LeaseId, Op, OpKind, Precondition, Revision, StoreError, Stored,
    TRANSACTION_BYTES_MAX, TRANSACTION_OPS_MAX, Transaction,
};
pub use watch::Watch;

/// Changes that a store remembers, so that watches can resume: enough for hours of an ordinary fleet, and
/// bounded at some 60 MiB with objects of 600 bytes.
pub const LOG_CHANGES_MAX: usize = 100_000;

/// What the repository is kept in.
#[async_trait]
pub trait Store: Send + Sync + Debug {
    /// A random id made when the store was created. Revisions of different epochs must not be compared.
    fn epoch(&self) -> &str;

    /// The object under a key.
    ///
    /// # Errors
    /// If the engine fails.
    async fn get(&self, key: &str) -> Result<Option<Stored>, StoreError>;

    /// All objects whose keys begin with `prefix`, by key, as of the one revision that is answered with them.
    ///
    /// # Errors
    /// If the engine fails.
    async fn list(&self, prefix: &str) -> Result<(Vec<Stored>, Revision), StoreError>;

    /// Applies all operations or none. When this answers, the change is as durable as the engine promises,
    /// and visible to every reader.
    ///
    /// # Errors
    /// [`StoreError::Conflict`] if a precondition does not hold; others if the transaction is malformed or
    /// the engine fails.
    async fn apply(&self, transaction: Transaction) -> Result<Applied, StoreError>;

    /// Every change after revision `from` to keys that begin with `prefix`.
    ///
    /// # Errors
    /// [`StoreError::Compacted`] if the log no longer holds the changes after `from`.
    async fn watch(&self, prefix: &str, from: Revision) -> Result<Watch, StoreError>;

    /// The newest revision.
    ///
    /// # Errors
    /// If the engine fails, or has failed and accepts no more writes.
    async fn revision(&self) -> Result<Revision, StoreError>;

    /// A revision that includes everything up to now, and that every watch comes to. It may be made for that: the
    /// newest one of a store that others write to as well may be none that our watches hear of.
    ///
    /// # Errors
    /// As [`Store::apply`].
    async fn mark(&self) -> Result<Revision, StoreError> {
        self.revision().await
    }

    /// Makes a lease. The keys that are put under it go with it, as one ordinary change, when it ends: when it was
    /// not kept alive for `ttl`, or is revoked. An engine may give longer: etcd has whole seconds, and some at least.
    ///
    /// # Errors
    /// If the engine fails, or has too many leases.
    async fn grant(&self, ttl: Duration) -> Result<LeaseId, StoreError>;

    /// Begins a lease's time anew.
    ///
    /// # Errors
    /// [`StoreError::NoLease`] if it has ended.
    async fn keep_alive(&self, lease: LeaseId) -> Result<(), StoreError>;

    /// Ends a lease. When this answers, its keys are gone.
    ///
    /// # Errors
    /// [`StoreError::NoLease`] if it has ended already; its keys are gone soon after, if not yet.
    async fn revoke(&self, lease: LeaseId) -> Result<(), StoreError>;

    /// Why it takes no changes at the moment, as far as it knows by itself; it goes on answering reads. `None`: it does, or
    /// has not tried.
    fn refuses(&self) -> Option<StoreError> {
        None
    }

    /// Transactions that wait to be written.
    fn waiting(&self) -> usize {
        0
    }
}

/// 128 random bits as 32 hexadecimal digits, for names that must never occur twice.
///
/// The bits come from the keys that the operating system gives the standard library's hash maps. They
/// are unique, which is all that is asked of them; they are no secrets.
pub fn random_id() -> String {
    let keys = RandomState::new();
    format!("{:016x}{:016x}", keys.hash_one(0_u8), keys.hash_one(1_u8))
}
