//! What every engine here keeps in memory: the objects and the log of what changed. Watches walk the one
//! shared log at their own pace, so a slow watcher costs no queue, and falls off its end if it is too slow.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::ops::Bound;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use bytes::Bytes;
use tokio::sync::watch;

use crate::Watch;
use crate::leases::Leases;
use crate::types::{
    Change, Commit, LeaseId, OpKind, Precondition, Revision, StoreError, Stored, Transaction,
};

/// Objects and log.
#[derive(Debug)]
pub(crate) struct State {
    objects: BTreeMap<Arc<str>, Stored>,
    /// The keys under each lease.
    leased: HashMap<LeaseId, BTreeSet<Arc<str>>>,
    /// INVARIANT: the revisions are contiguous, from `compacted + 1` to `revision`.
    log: VecDeque<Arc<Commit>>,
    log_changes: usize,
    log_changes_max: usize,
    compacted: Revision,
    revision: Revision,
}

impl State {
    pub(crate) fn new(log_changes_max: usize) -> Self {
        Self {
            objects: BTreeMap::new(),
            leased: HashMap::new(),
            log: VecDeque::new(),
            log_changes: 0,
            log_changes_max,
            compacted: Revision(0),
            revision: Revision(0),
        }
    }

    /// As read back from a file; `log` must end at `revision`.
    pub(crate) fn restore(
        objects: impl IntoIterator<Item = Stored>,
        log: impl IntoIterator<Item = Commit>,
        revision: Revision,
        log_changes_max: usize,
    ) -> Self {
        let mut state = Self::new(log_changes_max);
        state.objects = objects.into_iter().map(|object| (Arc::clone(&object.key), object)).collect();
        state.log = log.into_iter().map(Arc::new).collect();
        state.log_changes = state.log.iter().map(|commit| commit.changes.len()).sum();
        state.revision = revision;
        state.compacted = state.log.front().map_or(revision, |first| Revision(first.revision.0 - 1));
        state
    }

    pub(crate) fn revision(&self) -> Revision {
        self.revision
    }

    /// The revision after which the log begins.
    pub(crate) fn compacted(&self) -> Revision {
        self.compacted
    }

    pub(crate) fn get(&self, key: &str) -> Option<&Stored> {
        self.objects.get(key)
    }

    pub(crate) fn list(&self, prefix: &str) -> Vec<Stored> {
        self.objects
            .range::<str, _>((Bound::Included(prefix), Bound::Unbounded))
            .take_while(|(key, _)| key.starts_with(prefix))
            .map(|(_, object)| object.clone())
            .collect()
    }

    /// Takes in a commit and answers the revisions that fell off the log's end, if any did.
    pub(crate) fn commit(&mut self, commit: Commit) -> Option<std::ops::RangeInclusive<u64>> {
        debug_assert_eq!(commit.revision.0, self.revision.0 + 1, "revisions are contiguous");
        for change in &commit.changes {
            let before = match &change.object {
                Some(object) => self.objects.insert(Arc::clone(&change.key), object.clone()),
                None => self.objects.remove(&change.key),
            };
            if let Some(lease) = before.and_then(|before| before.lease)
                && let Some(keys) = self.leased.get_mut(&lease)
            {
                keys.remove(&change.key);
                if keys.is_empty() {
                    self.leased.remove(&lease);
                }
            }
            if let Some(lease) = change.object.as_ref().and_then(|object| object.lease) {
                self.leased.entry(lease).or_default().insert(Arc::clone(&change.key));
            }
        }
        self.revision = commit.revision;
        self.log_changes += commit.changes.len();
        self.log.push_back(Arc::new(commit));
        self.trim()
    }

    /// What is to be done when a lease has ended.
    pub(crate) fn removal(&self, lease: LeaseId) -> Transaction {
        let keys = self.leased.get(&lease).into_iter().flatten();
        keys.fold(Transaction::new(), |all, key| all.delete(Arc::clone(key), Precondition::Any))
    }

    fn trim(&mut self) -> Option<std::ops::RangeInclusive<u64>> {
        let first = self.compacted.0 + 1;
        while self.log_changes > self.log_changes_max
            && let Some(oldest) = self.log.pop_front()
        {
            self.log_changes -= oldest.changes.len();
            self.compacted = oldest.revision;
        }
        (first <= self.compacted.0).then_some(first..=self.compacted.0)
    }

    fn check_watchable(&self, from: Revision) -> Result<(), StoreError> {
        if from > self.revision {
            return Err(StoreError::Ahead { from, current: self.revision });
        }
        if from < self.compacted {
            return Err(StoreError::Compacted { from, oldest: self.compacted });
        }
        Ok(())
    }

    /// Commits after `from`, at most `limit`.
    fn after(&self, from: Revision, limit: usize) -> Result<Vec<Arc<Commit>>, StoreError> {
        self.check_watchable(from)?;
        let skip = usize::try_from(from.0 - self.compacted.0).unwrap_or(usize::MAX);
        Ok(self.log.iter().skip(skip).take(limit).cloned().collect())
    }
}

/// Transactions that are decided but not yet in the [`State`]: what a later one of the same group must see.
#[derive(Debug, Default)]
pub(crate) struct Pending {
    keys: HashMap<Arc<str>, Option<(Revision, Revision)>>,
}

impl Pending {
    /// (created, modified) of a key as the next transaction sees it.
    fn stamps(&self, state: &State, key: &str) -> Option<(Revision, Revision)> {
        match self.keys.get(key) {
            Some(stamps) => *stamps,
            None => state.get(key).map(|object| (object.created, object.modified)),
        }
    }

    /// Decides a transaction as revision `next`. `Ok(None)` if it changes nothing.
    pub(crate) fn decide(
        &mut self,
        state: &State,
        leases: &Leases,
        transaction: &Transaction,
        next: Revision,
    ) -> Result<Option<Commit>, StoreError> {
        if let Some(lease) = transaction.leases().find(|lease| !leases.is_known(*lease)) {
            return Err(StoreError::NoLease(lease));
        }
        for op in &transaction.ops {
            let found = self.stamps(state, &op.key).map(|(_, modified)| modified);
            if !op.precondition.holds(found) {
                return Err(StoreError::Conflict {
                    key: Arc::clone(&op.key),
                    expected: op.precondition,
                    found,
                });
            }
        }
        let mut changes = Vec::with_capacity(transaction.ops.len());
        for op in &transaction.ops {
            let stamps = self.stamps(state, &op.key);
            let put = |value: &Bytes, lease| Stored {
                key: Arc::clone(&op.key),
                value: value.clone(),
                created: stamps.map_or(next, |(created, _)| created),
                modified: next,
                lease,
            };
            let object = match &op.kind {
                OpKind::Put(value) => Some(put(value, None)),
                OpKind::PutUnder(value, lease) => Some(put(value, Some(*lease))),
                OpKind::Delete if stamps.is_some() => None,
                OpKind::Delete => continue,
            };
            self.keys
                .insert(Arc::clone(&op.key), object.as_ref().map(|object| (object.created, object.modified)));
            changes.push(Change { key: Arc::clone(&op.key), object });
        }
        Ok((!changes.is_empty()).then_some(Commit { revision: next, changes }))
    }
}

/// The state as readers, watchers and one writer share it.
#[derive(Debug)]
pub(crate) struct Shared {
    state: RwLock<State>,
    pub(crate) leases: Leases,
    newest: watch::Sender<Revision>,
}

impl Shared {
    pub(crate) fn new(state: State) -> Self {
        let newest = watch::Sender::new(state.revision());
        Self { state: RwLock::new(state), leases: Leases::default(), newest }
    }

    /// The guards are never held across anything that can panic half-way through a change, so a poisoned
    /// lock still guards a whole state.
    pub(crate) fn read(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn write(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wakes the watchers; to be called after every commit, with the state's lock released.
    pub(crate) fn announce(&self) {
        let revision = self.read().revision();
        self.newest.send_replace(revision);
    }

    pub(crate) fn watch(self: &Arc<Self>, prefix: &str, from: Revision) -> Result<Watch, StoreError> {
        let newest = self.newest.subscribe();
        self.read().check_watchable(from)?;
        Ok(LogWatch { shared: Arc::downgrade(self), newest, prefix: prefix.into(), position: from }.into())
    }
}

/// Commits that one look into the log may take out, so that a reader far behind does not hold the lock long.
const WATCH_STEP_COMMITS: usize = 256;

/// A walk along the log. What its methods do is said at [`Watch`].
#[derive(Debug)]
pub(crate) struct LogWatch {
    // Weak: a watcher must not keep a closed store alive.
    shared: std::sync::Weak<Shared>,
    newest: watch::Receiver<Revision>,
    prefix: Arc<str>,
    position: Revision,
}

impl LogWatch {
    pub(crate) fn position(&self) -> Revision {
        self.position
    }

    /// Waits until there is more in the log than when it was last looked at.
    pub(crate) async fn more(&mut self) -> Result<(), StoreError> {
        self.newest.changed().await.map_err(|_closed| StoreError::Closed)
    }

    pub(crate) fn ready(&mut self) -> Result<Vec<Arc<Commit>>, StoreError> {
        let shared = self.shared.upgrade().ok_or(StoreError::Closed)?;
        self.newest.borrow_and_update();
        loop {
            let step = shared.read().after(self.position, WATCH_STEP_COMMITS)?;
            let Some(last) = step.last() else { return Ok(Vec::new()) };
            self.position = last.revision;
            let found: Vec<_> = step.iter().filter_map(|commit| commit.part(&self.prefix)).collect();
            if !found.is_empty() {
                return Ok(found);
            }
        }
    }
}
