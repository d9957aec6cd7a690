//! Flow records: joined with the inventory, kept, queried and followed.
//!
//! A record gets a sequence number, goes into a ring in memory (oldest out) and into the queue of the disk
//! writer (bounded at [`DISK_QUEUE_LEN`] batches; when it is full the batch is not written, and counted), and
//! to every follower (a broadcast of [`FOLLOW_QUEUE_LEN`] batches; who reads slower misses some, counted).
//! The writer commits at least once per second: a crash loses at most the last second on disk.

mod addresses;
mod disk;
mod query;

use std::collections::VecDeque;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bulkhead_model::flow::{FlowEnd, FlowRecord};
use bytes::Bytes;
use tokio::sync::{broadcast, mpsc};

use crate::metrics::Metrics;
use crate::repository::Repository;

pub(crate) use addresses::AddressHistory;
pub(crate) use disk::FlowError;
pub(crate) use query::Filter;

use disk::Disk;

/// Batches that may wait for the disk.
const DISK_QUEUE_LEN: usize = 1024;
/// Batches that a follower may lag behind.
const FOLLOW_QUEUE_LEN: usize = 256;
/// Most records that a query answers.
pub(crate) const QUERY_LEN_MAX: usize = 10_000;

/// A record with its place in the order of arrival.
#[derive(Debug, Clone)]
pub(crate) struct Recorded {
    pub(crate) sequence: u64,
    pub(crate) record: Arc<FlowRecord>,
}

/// Records that arrived together.
pub(crate) type Batch = Arc<Vec<Recorded>>;

#[derive(Debug)]
struct Ring {
    records: VecDeque<Recorded>,
    next_sequence: u64,
}

/// All flows of a controller.
#[derive(Debug)]
pub(crate) struct Flows {
    ring: Mutex<Ring>,
    ring_len_max: usize,
    followers: broadcast::Sender<Batch>,
    disk: Option<Disk>,
    repository: Arc<Repository>,
    metrics: Arc<Metrics>,
}

impl Flows {
    /// Opens the file of records, if there is to be one.
    pub(crate) fn open(
        directory: Option<&Path>,
        ring_len_max: usize,
        disk_len_max: u64,
        repository: Arc<Repository>,
        metrics: Arc<Metrics>,
    ) -> Result<Self, FlowError> {
        let disk = match directory {
            Some(directory) => Some(Disk::open(directory, disk_len_max, Arc::clone(&metrics))?),
            None => None,
        };
        let next_sequence = disk.as_ref().map_or(1, Disk::next_sequence);
        Ok(Self {
            ring: Mutex::new(Ring { records: VecDeque::new(), next_sequence }),
            ring_len_max: ring_len_max.max(1),
            followers: broadcast::Sender::new(FOLLOW_QUEUE_LEN),
            disk,
            repository,
            metrics,
        })
    }

    fn ring(&self) -> MutexGuard<'_, Ring> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes in records as agents send them.
    pub(crate) fn receive(&self, records: &[Bytes], lost_by_agent: u64) {
        self.metrics.flows_lost_by_agents.add(lost_by_agent);
        let mut parsed = Vec::with_capacity(records.len());
        for record in records {
            match serde_json::from_slice::<FlowRecord>(record) {
                Ok(record) => parsed.push(record),
                Err(error) => {
                    tracing::debug!(%error, "a flow record cannot be read");
                    self.metrics.flows_malformed.add(1);
                }
            }
        }
        self.metrics.flows_received.add(parsed.len() as u64);
        self.enrich(&mut parsed);
        self.record(parsed);
    }

    /// Says whose the addresses were, where the agent could not.
    fn enrich(&self, records: &mut [FlowRecord]) {
        let view = self.repository.view();
        for record in records {
            let at_ms = record.opened_ms;
            for end in [&mut record.source, &mut record.destination] {
                enrich_end(end, &view.addresses, at_ms);
            }
        }
    }

    fn record(&self, records: Vec<FlowRecord>) {
        if records.is_empty() {
            return;
        }
        let mut ring = self.ring();
        let mut batch = Vec::with_capacity(records.len());
        for record in records {
            let recorded = Recorded { sequence: ring.next_sequence, record: Arc::new(record) };
            ring.next_sequence += 1;
            batch.push(recorded.clone());
            ring.records.push_back(recorded);
            if ring.records.len() > self.ring_len_max {
                ring.records.pop_front();
            }
        }
        let batch = Arc::new(batch);
        // Under the lock, so that disk and followers get the batches in order. Neither call waits.
        if let Some(disk) = &self.disk {
            disk.write(Arc::clone(&batch));
        }
        // Nobody may be following.
        let _ = self.followers.send(batch);
    }

    /// The newest records that pass a filter, newest first.
    pub(crate) async fn query(&self, filter: &Filter, limit: usize) -> Result<Vec<Recorded>, FlowError> {
        let limit = limit.min(QUERY_LEN_MAX);
        let (mut found, older_than) = {
            let ring = self.ring();
            let found: Vec<_> = ring
                .records
                .iter()
                .rev()
                .filter(|one| filter.passes(&one.record))
                .take(limit)
                .cloned()
                .collect();
            (found, ring.records.front().map_or(ring.next_sequence, |oldest| oldest.sequence))
        };
        if found.len() < limit
            && let Some(disk) = &self.disk
        {
            found.extend(disk.query(filter.clone(), older_than, limit - found.len()).await?);
        }
        Ok(found)
    }

    /// All records from now on.
    pub(crate) fn follow(&self) -> broadcast::Receiver<Batch> {
        self.followers.subscribe()
    }

    /// Records in memory.
    pub(crate) fn in_memory(&self) -> usize {
        self.ring().records.len()
    }

    /// Batches that wait for the disk.
    pub(crate) fn disk_queue(&self) -> usize {
        self.disk.as_ref().map_or(0, Disk::queued)
    }

    /// Followers there are.
    pub(crate) fn followers(&self) -> usize {
        self.followers.receiver_count()
    }

    /// Writes what is queued and closes the file.
    pub(crate) async fn close(&self) {
        if let Some(disk) = &self.disk {
            disk.close().await;
        }
    }
}

fn enrich_end(end: &mut FlowEnd, addresses: &AddressHistory, at_ms: u64) {
    // An agent knows the other end's name and host, but the labels of its own workloads only.
    if end.workload.is_some() && end.host.is_some() && !end.labels.is_empty() {
        return;
    }
    let Some(holder) = addresses.holder(end.address, at_ms) else { return };
    match &end.workload {
        // The agent knows it by another name, a network set's perhaps: that stands.
        Some(known) if *known != *holder.workload => return,
        Some(_) => {}
        None => end.workload = Some(holder.workload.to_string()),
    }
    if end.host.is_none() {
        end.host = Some(holder.host.to_string());
    }
    if end.labels.is_empty() {
        end.labels = holder.labels.clone();
    }
}

/// The queue towards the disk.
type DiskQueue = mpsc::Sender<disk::Order>;
