//! A store in one file of a directory, for a single controller.
//!
//! All objects are kept in memory, which the fleet's size allows; the file (redb) makes them last. One thread
//! writes: it takes all transactions that wait in its queue (bounded at [`WRITE_QUEUE_LEN`]; callers wait when
//! it is full), writes them in one durable file transaction, and only then shows them to readers and answers
//! the callers. So a hundred writers at once pay for one fsync, and nothing that anybody has seen can be lost.
//! When the store is dropped, the thread finishes its queue, marks the file as cleanly closed and ends.
//!
//! Files: `store.redb`, and `store.lock`, which is locked while the store is open and names its holder. A lock
//! file that names one when nobody holds the lock tells of an unclean stop: the file is then checked page by
//! page before use.

//! Leases live as long as the process: nobody can have kept one alive while no process had the store open, and whoever
//! comes back is told [`StoreError::NoLease`]. So the keys that an earlier process had under leases are removed at once when
//! the store is opened, in one change that watches see like any other.

mod codec;
#[cfg(test)]
mod crashes;
mod file;
mod guarded;
mod levelling;
mod room;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::{mpsc, oneshot};

use crate::state::{Pending, Shared};
use crate::types::{Applied, Change, Commit, LeaseId, OpKind, Revision, StoreError, Stored, Transaction};
use crate::{LOG_CHANGES_MAX, Store, Watch};

use file::{Lock, StoreFile};
use guarded::{Guarded, Leaves};
pub use room::{RESERVE_BYTES, free_bytes, is_full};

/// Transactions that may wait for the writer.
pub(crate) const WRITE_QUEUE_LEN: usize = 4096;
/// Transactions that the writer commits together at most, so that the first of a group does not wait for ever.
const GROUP_LEN_MAX: usize = 4096;
/// Operations after which a group is full.
const GROUP_OPS_MAX: usize = 50_000;

/// How to open an [`Embedded`] store.
#[derive(Debug, Clone)]
pub struct EmbeddedOptions {
    /// Directory of its files; made if it does not exist.
    pub directory: PathBuf,
    /// Changes that are remembered for watches.
    pub log_changes_max: usize,
    /// Bytes of the file system that changes leave free: a change that would leave less is refused with
    /// [`StoreError::Full`]. 0: it is not looked beforehand.
    pub reserve_bytes: u64,
}

impl EmbeddedOptions {
    /// With the defaults.
    pub fn new(directory: impl Into<PathBuf>) -> Self {
        Self { directory: directory.into(), log_changes_max: LOG_CHANGES_MAX, reserve_bytes: RESERVE_BYTES }
    }
}

/// A store in one file.
#[derive(Debug)]
pub struct Embedded {
    epoch: String,
    shared: Arc<Shared>,
    queue: Option<mpsc::Sender<Job>>,
    writer: Option<JoinHandle<()>>,
    refuses: Refuses,
}

/// Why the writer takes no changes at the moment.
type Refuses = Arc<Mutex<Option<StoreError>>>;

/// What the writer is asked to do.
#[derive(Debug)]
enum Job {
    Apply(Waiting),
    /// Remove the keys of a lease that has ended.
    End(LeaseId, oneshot::Sender<Result<Applied, StoreError>>),
    /// Look whether changes can be taken again.
    Look,
}

/// A transaction with the caller who waits for it.
#[derive(Debug)]
struct Waiting {
    transaction: Transaction,
    answer: oneshot::Sender<Result<Applied, StoreError>>,
}

impl Embedded {
    /// Opens the store in a directory, or makes one. Reads all of it, so it belongs on a blocking thread.
    ///
    /// # Errors
    /// [`StoreError::Locked`] if another process has it open, [`StoreError::Corrupt`] if its file is damaged,
    /// [`StoreError::Io`] if it cannot be read or made.
    pub fn open(directory: impl AsRef<Path>) -> Result<Self, StoreError> {
        Self::open_with(&EmbeddedOptions::new(directory.as_ref()))
    }

    /// As [`Embedded::open`], with options.
    ///
    /// # Errors
    /// As [`Embedded::open`].
    pub fn open_with(options: &EmbeddedOptions) -> Result<Self, StoreError> {
        let lock = Lock::take(&options.directory)?;
        let path = options.directory.join(file::FILE_NAME);
        let (mut file, loaded) = StoreFile::open(&path, lock.unclean_stop(), options.log_changes_max)?;
        let (epoch, mut state) = (loaded.epoch, loaded.state);
        if !loaded.orphans.is_empty() {
            let changes = loaded.orphans.into_iter().map(|key| Change { key, object: None }).collect();
            let commit = Commit { revision: Revision(state.revision().0 + 1), changes };
            file.write(std::slice::from_ref(&commit), &state)?;
            if let Some(dropped) = state.commit(commit) {
                file.forget(dropped);
            }
        }
        let shared = Arc::new(Shared::new(state));
        let (queue, waiting) = mpsc::channel(WRITE_QUEUE_LEN);
        let file = Guarded::new(file, &path, options, Arc::clone(&shared));
        let refuses = Refuses::default();
        let writer = Writer {
            file,
            lock,
            shared: Arc::clone(&shared),
            waiting,
            next: None,
            refuses: Arc::clone(&refuses),
            ended: Vec::new(),
        };
        let thread = std::thread::Builder::new()
            .name("store-writer".into())
            .spawn(move || writer.run())
            .map_err(|source| StoreError::Io { path, reason: source.to_string() })?;
        Ok(Self { epoch, shared, queue: Some(queue), writer: Some(thread), refuses })
    }
}

impl Embedded {
    /// Whether there is a store in a directory.
    pub(crate) fn exists(directory: &Path) -> bool {
        directory.join(file::FILE_NAME).exists()
    }

    /// Makes the file of a store that nobody has open as small as it can be: room of what was deleted is used again, but
    /// stays in the file until then. The number of bytes before and after.
    ///
    /// # Errors
    /// As [`Embedded::open`].
    pub fn compact(directory: impl AsRef<Path>) -> Result<(u64, u64), StoreError> {
        let directory = directory.as_ref();
        let path = directory.join(file::FILE_NAME);
        if !path.exists() {
            return Err(StoreError::Io { path, reason: "there is no such store".into() });
        }
        let mut lock = Lock::take(directory)?;
        let (mut file, _) = StoreFile::open(&path, lock.unclean_stop(), LOG_CHANGES_MAX)?;
        let size = || {
            let found = std::fs::metadata(&path).map(|metadata| metadata.len());
            found.map_err(|error| StoreError::Io { path: path.clone(), reason: error.to_string() })
        };
        let before = size()?;
        file.compact()?;
        // It becomes smaller only now.
        file.close()?;
        lock.mark_clean();
        Ok((before, size()?))
    }

    /// Has the writer do something, and waits for its answer.
    async fn ask(
        &self,
        job: impl FnOnce(oneshot::Sender<Result<Applied, StoreError>>) -> Job,
    ) -> Result<Applied, StoreError> {
        let (answer, answered) = oneshot::channel();
        let queue = self.queue.as_ref().ok_or(StoreError::Closed)?;
        queue.send(job(answer)).await.map_err(|_ended| StoreError::Closed)?;
        answered.await.map_err(|_ended| StoreError::Closed)?
    }
}

impl Drop for Embedded {
    fn drop(&mut self) {
        // Before the queue: the thread of the leases may be about to write into it.
        self.shared.leases.close();
        self.queue = None;
        // Waits for one last commit, so that whoever opens the directory next finds it unlocked.
        if let Some(writer) = self.writer.take()
            && writer.join().is_err()
        {
            tracing::error!("the store's writer panicked");
        }
    }
}

#[async_trait]
impl Store for Embedded {
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
        self.ask(|answer| Job::Apply(Waiting { transaction, answer })).await
    }

    async fn grant(&self, ttl: Duration) -> Result<LeaseId, StoreError> {
        let queue = self.queue.as_ref().ok_or(StoreError::Closed)?.downgrade();
        self.shared.leases.grant(ttl, move |lease| {
            // The queue is gone only when the store is, and the keys are removed when it is opened again.
            if let Some(queue) = queue.upgrade() {
                let (answer, _) = oneshot::channel();
                let _closed = queue.blocking_send(Job::End(lease, answer));
            }
        })
    }

    async fn keep_alive(&self, lease: LeaseId) -> Result<(), StoreError> {
        // Whoever has a lease comes by often enough to notice that there is room again, also when nobody writes.
        if self.refuses().is_some()
            && let Some(queue) = &self.queue
        {
            // Full: then the writer looks anyway.
            let _ = queue.try_send(Job::Look);
        }
        self.shared.leases.keep_alive(lease)
    }

    async fn revoke(&self, lease: LeaseId) -> Result<(), StoreError> {
        self.shared.leases.remove(lease)?;
        self.ask(|answer| Job::End(lease, answer)).await.map(drop)
    }

    async fn watch(&self, prefix: &str, from: Revision) -> Result<Watch, StoreError> {
        self.shared.watch(prefix, from)
    }

    async fn revision(&self) -> Result<Revision, StoreError> {
        if self.queue.as_ref().is_none_or(mpsc::Sender::is_closed) {
            return Err(StoreError::Closed);
        }
        Ok(self.shared.read().revision())
    }

    fn refuses(&self) -> Option<StoreError> {
        if self.queue.as_ref().is_none_or(mpsc::Sender::is_closed) {
            return Some(StoreError::Closed);
        }
        self.refuses.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn waiting(&self) -> usize {
        self.queue.as_ref().map_or(0, |queue| queue.max_capacity() - queue.capacity())
    }
}

/// The writing thread.
struct Writer {
    file: Guarded,
    lock: Lock,
    shared: Arc<Shared>,
    waiting: mpsc::Receiver<Job>,
    /// What ended a group, and is next.
    next: Option<Job>,
    refuses: Refuses,
    /// Leases that have ended while their keys could not be removed.
    ended: Vec<LeaseId>,
}

impl Writer {
    fn run(mut self) {
        while let Some(job) = self.next.take().or_else(|| self.waiting.blocking_recv()) {
            let (group, lease) = match job {
                Job::Apply(first) => (self.collect(first), None),
                // Alone, since its keys are those that the state has once all before it is done.
                Job::End(lease, answer) => (vec![self.removal(lease, answer)], Some(lease)),
                Job::Look => (Vec::new(), None),
            };
            if !self.done(group, lease) {
                return;
            }
            for lease in self.owed() {
                let (answer, _) = oneshot::channel();
                let group = vec![self.removal(lease, answer)];
                if !self.done(group, Some(lease)) {
                    return;
                }
            }
        }
        match self.file.close() {
            Ok(()) => self.lock.mark_clean(),
            Err(error) => tracing::error!(%error, "the store's file did not close cleanly"),
        }
    }

    fn removal(&self, lease: LeaseId, answer: oneshot::Sender<Result<Applied, StoreError>>) -> Waiting {
        Waiting { transaction: self.shared.read().removal(lease), answer }
    }

    /// Leases whose keys can be removed now.
    fn owed(&mut self) -> Vec<LeaseId> {
        if self.refuses.lock().unwrap_or_else(PoisonError::into_inner).is_some() {
            return Vec::new();
        }
        std::mem::take(&mut self.ended)
    }

    /// Commits a group, which may be the end of a lease. Answers whether the store can go on.
    fn done(&mut self, group: Vec<Waiting>, lease: Option<LeaseId>) -> bool {
        match self.commit(group) {
            Ok(()) => true,
            Err(StoreError::Full { .. } | StoreError::OutcomeUnknown { .. }) => {
                self.ended.extend(lease);
                true
            }
            Err(error) => {
                // The file's state is unknown now; only opening it again tells. Callers get Closed.
                tracing::error!(%error, "the store cannot write and stops");
                false
            }
        }
    }

    /// Keeps and logs whether changes are taken.
    fn note(&self, refuses: Option<&StoreError>) {
        let mut known = self.refuses.lock().unwrap_or_else(PoisonError::into_inner);
        match (&*known, refuses) {
            (None, Some(error)) => tracing::error!(%error, "the store takes no changes"),
            (Some(_), None) => tracing::warn!("the store takes changes again"),
            _ => {}
        }
        *known = refuses.cloned();
    }

    /// Tells a whole group of callers, once everybody else can know it too.
    fn refuse(
        &self,
        group: impl IntoIterator<Item = oneshot::Sender<Result<Applied, StoreError>>>,
        error: &StoreError,
    ) {
        self.note(Some(error));
        for answer in group {
            // A caller that no longer waits has nobody to tell.
            answer.send(Err(error.clone())).ok();
        }
    }

    fn collect(&mut self, first: Waiting) -> Vec<Waiting> {
        let mut ops = first.transaction.ops.len();
        let mut group = vec![first];
        while group.len() < GROUP_LEN_MAX
            && ops < GROUP_OPS_MAX
            && let Ok(next) = self.waiting.try_recv()
        {
            match next {
                Job::Apply(next) => {
                    ops += next.transaction.ops.len();
                    group.push(next);
                }
                end @ (Job::End(..) | Job::Look) => {
                    self.next = Some(end);
                    break;
                }
            }
        }
        group
    }

    fn commit(&mut self, group: Vec<Waiting>) -> Result<(), StoreError> {
        // First, since it may bring changes to light that this group must see.
        let is_small =
            |waiting: &Waiting| waiting.transaction.ops.iter().all(|op| !matches!(op.kind, OpKind::Put(_)));
        let small = !group.is_empty() && group.iter().all(is_small);
        let leaves = if small { Leaves::Part } else { Leaves::Reserve };
        if let Err(error) = self.file.mend(leaves) {
            self.refuse(group.into_iter().map(|waiting| waiting.answer), &error);
            return Err(error);
        }
        let mut commits: Vec<Commit> = Vec::new();
        let mut answers = Vec::with_capacity(group.len());
        {
            let state = self.shared.read();
            let mut pending = Pending::default();
            for Waiting { transaction, answer } in group {
                let next = Revision(state.revision().0 + 1 + commits.len() as u64);
                let result =
                    pending.decide(&state, &self.shared.leases, &transaction, next).map(
                        |commit| match commit {
                            Some(commit) => {
                                commits.push(commit);
                                Applied { revision: next, changed: true }
                            }
                            None => Applied { revision: Revision(next.0 - 1), changed: false },
                        },
                    );
                answers.push((answer, result));
            }
        }
        if let Err(error) = self.file.write(commits, leaves) {
            self.refuse(answers.into_iter().map(|(answer, _)| answer), &error);
            return Err(error);
        }
        if leaves == Leaves::Reserve {
            self.note(None);
        }
        // Only now, conflicts too: they may tell of a transaction of this same group.
        for (answer, result) in answers {
            answer.send(result).ok();
        }
        Ok(())
    }
}
