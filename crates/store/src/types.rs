//! Values that go into and come out of a store.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;

/// Longest key, in bytes.
pub const KEY_BYTES_MAX: usize = 1024;
/// Most operations in one transaction.
pub const TRANSACTION_OPS_MAX: usize = 200_000;
/// Most bytes (keys and values) in one transaction.
pub const TRANSACTION_BYTES_MAX: usize = 256 << 20;

/// Number of a state of the store. Each transaction that changes anything makes a higher one: the next in our own
/// stores, which begin empty at 0; in etcd some later one, since others may write there too.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Revision(pub u64);

impl fmt::Display for Revision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Name of a lease: keys that are put under it go when it ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LeaseId(pub i64);

impl fmt::Display for LeaseId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// An object as it stands in the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stored {
    /// Its key.
    pub key: Arc<str>,
    /// Its value.
    pub value: Bytes,
    /// Revision in which the key came to exist.
    pub created: Revision,
    /// Revision of the last write.
    pub modified: Revision,
    /// The lease that it goes with, if it does.
    pub lease: Option<LeaseId>,
}

/// What must be true of a key for an operation on it to be applied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Precondition {
    /// Nothing.
    Any,
    /// The key does not exist.
    Absent,
    /// The key exists.
    Present,
    /// The key exists and was last written in this revision.
    AtRevision(Revision),
}

impl Precondition {
    /// Whether it holds for a key that was last written in `modified` (`None`: does not exist).
    pub(crate) fn holds(self, modified: Option<Revision>) -> bool {
        match self {
            Self::Any => true,
            Self::Absent => modified.is_none(),
            Self::Present => modified.is_some(),
            Self::AtRevision(revision) => modified == Some(revision),
        }
    }
}

impl fmt::Display for Precondition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Any => f.write_str("anything"),
            Self::Absent => f.write_str("no such key"),
            Self::Present => f.write_str("an existing key"),
            Self::AtRevision(revision) => write!(f, "revision {revision}"),
        }
    }
}

/// What is done to a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OpKind {
    /// Creates it or replaces its value. If it was under a lease, it is no longer.
    Put(Bytes),
    /// The same under a lease, with which it goes.
    PutUnder(Bytes, LeaseId),
    /// Removes it; nothing happens if it does not exist.
    Delete,
}

/// One operation of a transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Op {
    /// On which key.
    pub key: Arc<str>,
    /// Under which condition.
    pub precondition: Precondition,
    /// What.
    pub kind: OpKind,
}

/// Operations that happen together or not at all. A key may occur once.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Transaction {
    /// The operations.
    pub ops: Vec<Op>,
}

impl Transaction {
    /// One without operations.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a write.
    #[must_use]
    pub fn put(mut self, key: impl Into<Arc<str>>, value: impl Into<Bytes>, when: Precondition) -> Self {
        self.ops.push(Op { key: key.into(), precondition: when, kind: OpKind::Put(value.into()) });
        self
    }

    /// Adds a write under a lease.
    #[must_use]
    pub fn put_under(
        mut self,
        lease: LeaseId,
        key: impl Into<Arc<str>>,
        value: impl Into<Bytes>,
        when: Precondition,
    ) -> Self {
        let kind = OpKind::PutUnder(value.into(), lease);
        self.ops.push(Op { key: key.into(), precondition: when, kind });
        self
    }

    /// Adds a removal.
    #[must_use]
    pub fn delete(mut self, key: impl Into<Arc<str>>, when: Precondition) -> Self {
        self.ops.push(Op { key: key.into(), precondition: when, kind: OpKind::Delete });
        self
    }

    /// Bytes of its keys and values.
    pub(crate) fn bytes(&self) -> usize {
        let value = |op: &Op| match &op.kind {
            OpKind::Put(value) | OpKind::PutUnder(value, _) => value.len(),
            OpKind::Delete => 0,
        };
        self.ops.iter().map(|op| op.key.len() + value(op)).sum()
    }

    /// The leases that it puts keys under.
    pub(crate) fn leases(&self) -> impl Iterator<Item = LeaseId> {
        self.ops.iter().filter_map(|op| match op.kind {
            OpKind::PutUnder(_, lease) => Some(lease),
            OpKind::Put(_) | OpKind::Delete => None,
        })
    }

    /// Refuses what no store could apply.
    pub(crate) fn check(&self) -> Result<(), StoreError> {
        if self.ops.len() > TRANSACTION_OPS_MAX {
            return Err(StoreError::TooManyOps(self.ops.len()));
        }
        let bytes = self.bytes();
        let mut keys: Vec<&str> = Vec::with_capacity(self.ops.len());
        for op in &self.ops {
            if op.key.is_empty() || op.key.len() > KEY_BYTES_MAX {
                return Err(StoreError::Key(op.key.to_string()));
            }
            keys.push(&op.key);
        }
        if bytes > TRANSACTION_BYTES_MAX {
            return Err(StoreError::TooManyBytes(bytes));
        }
        keys.sort_unstable();
        match keys.windows(2).find(|pair| pair[0] == pair[1]) {
            Some(pair) => Err(StoreError::DuplicateKey(pair[0].to_owned())),
            None => Ok(()),
        }
    }
}

/// Answer to a transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Applied {
    /// The revision that it made, or the current one if it changed nothing.
    pub revision: Revision,
    /// Whether it changed anything.
    pub changed: bool,
}

/// What became of one key in a transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// The key.
    pub key: Arc<str>,
    /// The object as of then; `None` if it was removed.
    pub object: Option<Stored>,
}

/// A transaction as watchers see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Commit {
    /// The revision that it made.
    pub revision: Revision,
    /// What it changed, in the order of its operations.
    pub changes: Vec<Change>,
}

impl Commit {
    /// The part that touches a prefix, if any does.
    pub(crate) fn part(self: &Arc<Self>, prefix: &str) -> Option<Arc<Self>> {
        let matches = |change: &&Change| change.key.starts_with(prefix);
        let count = self.changes.iter().filter(matches).count();
        if count == self.changes.len() {
            return Some(Arc::clone(self));
        }
        (count > 0).then(|| {
            let changes = self.changes.iter().filter(matches).cloned().collect();
            Arc::new(Self { revision: self.revision, changes })
        })
    }
}

/// Why a store did not do what it was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// A precondition does not hold.
    #[error("key {key:?} was expected to be at {expected}, but {}", match .found {
        Some(revision) => format!("is at revision {revision}"),
        None => "does not exist".to_owned(),
    })]
    Conflict {
        /// The key.
        key: Arc<str>,
        /// What was expected of it.
        expected: Precondition,
        /// Revision of its last write; `None` if it does not exist.
        found: Option<Revision>,
    },
    /// The log no longer holds what a watch asked for.
    #[error(
        "changes after revision {from} are no longer kept, the log begins after revision {oldest}: list again"
    )]
    Compacted {
        /// Where the watch wanted to begin.
        from: Revision,
        /// The earliest revision from which a watch can begin.
        oldest: Revision,
    },
    /// A watch asked for a revision that does not exist yet: it belongs to another store.
    #[error("revision {from} is ahead of this store, which is at {current}: list again")]
    Ahead {
        /// Where the watch wanted to begin.
        from: Revision,
        /// The store's newest revision.
        current: Revision,
    },
    /// A key that is empty or too long.
    #[error("key {0:?} must have 1 to {KEY_BYTES_MAX} bytes")]
    Key(String),
    /// Two operations on one key.
    #[error("key {0:?} occurs twice in one transaction")]
    DuplicateKey(String),
    /// Too many operations.
    #[error("a transaction may have {TRANSACTION_OPS_MAX} operations, not {0}")]
    TooManyOps(usize),
    /// Too many bytes.
    #[error("a transaction may have {TRANSACTION_BYTES_MAX} bytes, not {0}")]
    TooManyBytes(usize),
    /// A lease that was never granted, or has ended.
    #[error("there is no lease {0}: it has ended")]
    NoLease(LeaseId),
    /// Too many leases.
    #[error("there are too many leases already")]
    TooManyLeases,
    /// Another process has the store open.
    #[error("store {} is in use by another process ({holder})", .path.display())]
    Locked {
        /// Its directory.
        path: PathBuf,
        /// What the other process wrote into the lock file.
        holder: String,
    },
    /// The store's file is damaged.
    #[error("store {} is damaged: {reason}", .path.display())]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The engine failed to read or write. It answers nothing more until it is opened again.
    #[error("store {} failed: {reason}", .path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What happened.
        reason: String,
    },
    /// There is no room for what was to be written. Nothing was changed; as soon as there is room, writes are taken again.
    #[error(
        "the disk of store {} is full: nothing was changed; make room there, and it takes changes again by itself",
        .path.display()
    )]
    Full {
        /// The file.
        path: PathBuf,
    },
    /// The store's server does not answer. Nothing was changed by what was asked.
    #[error("store {store} cannot be reached: {reason}")]
    Unavailable {
        /// Which.
        store: String,
        /// What happened.
        reason: String,
    },
    /// The store's server gave no answer to a transaction. It may have been applied, and may still be: whoever
    /// writes again must read first.
    #[error("whether the change was made is unknown, since store {store} does not answer: {reason}")]
    OutcomeUnknown {
        /// Which.
        store: String,
        /// What happened.
        reason: String,
    },
    /// The store's server says no.
    #[error("store {store} refuses: {reason}")]
    Refused {
        /// Which.
        store: String,
        /// Its reason.
        reason: String,
    },
    /// A transaction is larger than the store's server takes. Nothing was changed.
    #[error(
        "store {store} takes no transaction of {found}: start etcd with a higher {flag} (default {default})"
    )]
    ServerLimit {
        /// Which.
        store: String,
        /// What was asked.
        found: String,
        /// The server's flag that raises the limit.
        flag: &'static str,
        /// The limit unless raised.
        default: &'static str,
    },
    /// The store was closed, or its writer ended after a failure that it has logged.
    #[error("the store is closed")]
    Closed,
}
