//! Keys by which transactions are told apart, see [`super::transaction`]. A slot is used by one transaction at a time.

use std::time::{Duration, Instant};

use tokio::sync::{Mutex, Semaphore, SemaphorePermit};

use crate::types::{LeaseId, StoreError};

use super::cluster::Cluster;
use super::leases;

/// Transactions under way at once; others wait.
const SLOTS_MAX: usize = 64;
/// How long what a writer did last stays in etcd after the writer is gone.
const WRITER_TTL: Duration = Duration::from_secs(3600);
/// A writer takes a new name after this, so that a slot never ends while a transaction uses it.
const WRITER_AGE_MAX: Duration = Duration::from_secs(1800);

/// The slots of one store in this process.
#[derive(Debug)]
pub(super) struct Slots {
    under_way: Semaphore,
    pool: Mutex<Pool>,
}

#[derive(Debug, Default)]
struct Pool {
    /// The lease that the slots are under, which is the writer's name, and when it was granted.
    writer: Option<(i64, Instant)>,
    free: Vec<Place>,
    next: u64,
}

/// A slot's key, and the revision of its last write as its only user knows it: 0 if there was none.
#[derive(Debug, Clone)]
pub(super) struct Place {
    pub(super) key: Vec<u8>,
    pub(super) writer: i64,
    pub(super) modified: i64,
}

/// A slot in use. One that is not given back is not used again: what became of it is unknown.
#[derive(Debug)]
pub(super) struct Slot<'a> {
    pub(super) place: Place,
    _under_way: SemaphorePermit<'a>,
}

impl Slots {
    pub(super) fn new() -> Self {
        Self { under_way: Semaphore::new(SLOTS_MAX), pool: Mutex::default() }
    }

    pub(super) async fn take(&self, cluster: &Cluster) -> Result<Slot<'_>, StoreError> {
        let under_way = self.under_way.acquire().await.map_err(|_closed| StoreError::Closed)?;
        let mut pool = self.pool.lock().await;
        let writer = match pool.writer {
            Some((writer, since)) if since.elapsed() < WRITER_AGE_MAX => writer,
            _ => {
                let since = Instant::now();
                let LeaseId(writer) = leases::grant(cluster, WRITER_TTL).await?;
                *pool = Pool { writer: Some((writer, since)), ..Pool::default() };
                writer
            }
        };
        let place = pool.free.pop().unwrap_or_else(|| {
            pool.next += 1;
            Place { key: cluster.writer_key(writer, pool.next), writer, modified: 0 }
        });
        Ok(Slot { place, _under_way: under_way })
    }

    /// Gives a slot back whose state is known.
    pub(super) async fn give_back(&self, slot: Slot<'_>) {
        let mut pool = self.pool.lock().await;
        if pool.writer.is_some_and(|(writer, _)| writer == slot.place.writer) {
            pool.free.push(slot.place);
        }
    }

    /// Notes that a writer's lease is gone; the next transaction takes a new name.
    pub(super) async fn forget(&self, writer: i64) {
        let mut pool = self.pool.lock().await;
        if pool.writer.is_some_and(|(known, _)| known == writer) {
            *pool = Pool::default();
        }
    }
}
