//! Flow records on disk: one file (redb), written by one thread.

use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use bulkhead_model::flow::FlowRecord;
use bulkhead_store::{RESERVE_BYTES, free_bytes};
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
use tokio::sync::{mpsc, oneshot};

use super::{Batch, DISK_QUEUE_LEN, DiskQueue, Filter, Recorded};
use crate::metrics::Metrics;

const FILE_NAME: &str = "flows.redb";
const RECORDS: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("records");
/// Memory for pages: enough for the newest, which are asked for most.
const CACHE_BYTES: usize = 32 << 20;
/// Longest that a record waits to be committed.
const COMMIT_EVERY: Duration = Duration::from_secs(1);
/// Records after which a commit is due at once.
const COMMIT_RECORDS: usize = 20_000;
/// Records are not written that would leave less free than this: the repository, the audit log and its next start need what is
/// left more.
const FREE_BYTES_MIN: u64 = 4 * RESERVE_BYTES;
/// Longest that a query reads; it answers what it has found until then.
const QUERY_TIME_MAX: Duration = Duration::from_secs(5);

/// What went wrong with the file.
#[derive(Debug, thiserror::Error)]
#[error("flow records in {}: {source}", .path.display())]
pub(crate) struct FlowError {
    path: PathBuf,
    source: Box<redb::Error>,
}

/// The file; `None` while it cannot be opened again after a disk has failed.
type Slot = Arc<RwLock<Option<Arc<Database>>>>;

/// To the writing thread.
#[derive(Debug)]
pub(super) enum Order {
    Write(Batch),
    Close(oneshot::Sender<()>),
}

/// The file and the way to its writer.
#[derive(Debug)]
pub(super) struct Disk {
    path: PathBuf,
    database: Slot,
    queue: DiskQueue,
    next_sequence: u64,
    metrics: Arc<Metrics>,
}

impl Disk {
    pub(super) fn open(directory: &Path, len_max: u64, metrics: Arc<Metrics>) -> Result<Self, FlowError> {
        let path = directory.join(FILE_NAME);
        let failed = |source: redb::Error| FlowError { path: path.clone(), source: Box::new(source) };
        let (database, newest) = open_database(&path).map_err(failed)?;
        let database = Arc::new(RwLock::new(Some(Arc::new(database))));
        let (queue, orders) = mpsc::channel(DISK_QUEUE_LEN);
        let writer = Writer {
            path: path.clone(),
            database: Arc::clone(&database),
            written: true,
            orders,
            len_max: len_max.max(1),
            dropped_to: 0,
            metrics: Arc::clone(&metrics),
        };
        std::thread::Builder::new()
            .name("flow-writer".into())
            .spawn(move || writer.run())
            .map_err(|source| failed(redb::Error::Io(source)))?;
        Ok(Self { path, database, queue, next_sequence: newest + 1, metrics })
    }

    pub(super) fn next_sequence(&self) -> u64 {
        self.next_sequence
    }

    pub(super) fn queued(&self) -> usize {
        self.queue.max_capacity() - self.queue.capacity()
    }

    /// Queues a batch; never waits.
    pub(super) fn write(&self, batch: Batch) {
        let len = batch.len() as u64;
        if self.queue.try_send(Order::Write(batch)).is_err() {
            self.metrics.flows_not_on_disk.add(len);
        }
    }

    /// Records older than a sequence number that pass a filter, newest first.
    pub(super) async fn query(
        &self,
        filter: Filter,
        older_than: u64,
        limit: usize,
    ) -> Result<Vec<Recorded>, FlowError> {
        let Some(database) = opened(&self.database) else { return Ok(Vec::new()) };
        let read = tokio::task::spawn_blocking(move || read(&database, &filter, older_than, limit));
        let failed = |source| FlowError { path: self.path.clone(), source: Box::new(source) };
        match read.await {
            Ok(found) => found.map_err(failed),
            Err(error) => Err(failed(redb::Error::Corrupted(format!("reading failed: {error}")))),
        }
    }

    pub(super) async fn close(&self) {
        let (done, closed) = oneshot::channel();
        if self.queue.send(Order::Close(done)).await.is_ok() {
            // An error means that the thread is gone, and so done.
            let _ = closed.await;
        }
    }
}

fn opened(slot: &Slot) -> Option<Arc<Database>> {
    slot.read().unwrap_or_else(PoisonError::into_inner).clone()
}

fn open_database(path: &Path) -> Result<(Database, u64), redb::Error> {
    let database = Database::builder().set_cache_size(CACHE_BYTES).create(path)?;
    let transaction = database.begin_write()?;
    let newest = {
        let records = transaction.open_table(RECORDS)?;
        records.last()?.map_or(0, |(sequence, _)| sequence.value())
    };
    transaction.commit()?;
    Ok((database, newest))
}

fn read(
    database: &Database,
    filter: &Filter,
    older_than: u64,
    limit: usize,
) -> Result<Vec<Recorded>, redb::Error> {
    let started = Instant::now();
    let transaction = database.begin_read()?;
    let records = transaction.open_table(RECORDS)?;
    let mut found = Vec::new();
    for row in records.range(..older_than)?.rev() {
        let (sequence, row) = row?;
        if found.len() == limit || started.elapsed() > QUERY_TIME_MAX {
            break;
        }
        let Ok(record) = serde_json::from_slice::<FlowRecord>(row.value()) else {
            // Of an older version whose record was another.
            continue;
        };
        if filter.passes(&record) {
            found.push(Recorded { sequence: sequence.value(), record: Arc::new(record) });
        }
    }
    Ok(found)
}

struct Writer {
    path: PathBuf,
    database: Slot,
    /// Whether the last records were written: the log says when that changes.
    written: bool,
    orders: mpsc::Receiver<Order>,
    len_max: u64,
    dropped_to: u64,
    metrics: Arc<Metrics>,
}

impl Writer {
    fn run(mut self) {
        while let Some(first) = self.orders.blocking_recv() {
            let mut pending = Vec::new();
            let closing = self.collect(first, &mut pending);
            let len: u64 = pending.iter().map(|batch| batch.len() as u64).sum();
            self.write(&pending, len);
            if let Some(done) = closing {
                // Nobody may wait for it any more.
                let _ = done.send(());
                return;
            }
        }
    }

    /// Takes what is queued until a commit is due. Answers who waits for the end, if it has come.
    fn collect(&mut self, first: Order, pending: &mut Vec<Batch>) -> Option<oneshot::Sender<()>> {
        let mut order = first;
        let mut records = 0;
        let deadline = Instant::now() + COMMIT_EVERY / 2;
        loop {
            match order {
                Order::Write(batch) => {
                    records += batch.len();
                    pending.push(batch);
                }
                Order::Close(done) => return Some(done),
            }
            loop {
                if records >= COMMIT_RECORDS || Instant::now() >= deadline {
                    return None;
                }
                if let Ok(next) = self.orders.try_recv() {
                    order = next;
                    break;
                }
                // A thread of its own that collects for a while: it has nothing better to do.
                std::thread::park_timeout(COMMIT_EVERY / 50);
            }
        }
    }

    /// Writes records, or counts them.
    fn write(&mut self, pending: &[Batch], len: u64) {
        let result = match free_bytes(&self.path) {
            Some(free) if free < FREE_BYTES_MIN => Err(format!("only {free} bytes are free")),
            Some(_) | None => self.commit(pending).map_err(|error| {
                self.open_again();
                error.to_string()
            }),
        };
        match result {
            Ok(()) => self.written = true,
            Err(reason) => {
                self.metrics.flows_not_on_disk.add(len);
                if std::mem::replace(&mut self.written, false) {
                    tracing::error!(%reason, "flow records are not written");
                }
            }
        }
    }

    /// redb does nothing more with a file that could not be written once.
    fn open_again(&self) {
        let mut slot = self.database.write().unwrap_or_else(PoisonError::into_inner);
        // Locked until it is closed; if somebody still reads it, the next write tries again.
        *slot = None;
        *slot = open_database(&self.path).ok().map(|(database, _)| Arc::new(database));
    }

    fn commit(&mut self, pending: &[Batch]) -> Result<(), redb::Error> {
        let Some(newest) = pending.last().and_then(|batch| batch.last()) else { return Ok(()) };
        let oldest_kept = newest.sequence.saturating_sub(self.len_max - 1);
        let database = opened(&self.database).ok_or(redb::Error::PreviousIo)?;
        let transaction = database.begin_write()?;
        {
            let mut records = transaction.open_table(RECORDS)?;
            for Recorded { sequence, record } in pending.iter().flat_map(|batch| batch.iter()) {
                // A record is plain data, so it can always be written as JSON.
                let row = serde_json::to_vec(&**record)
                    .map_err(|error| redb::Error::Corrupted(format!("a record is no JSON: {error}")))?;
                records.insert(*sequence, row.as_slice())?;
            }
            let dropped_to = self.dropped_to;
            if dropped_to < oldest_kept {
                records.retain_in(dropped_to..oldest_kept, |_, _| false)?;
            }
        }
        transaction.commit()?;
        self.dropped_to = oldest_kept;
        Ok(())
    }
}
