//! Leases of the stores in this process: which there are, and a thread that ends them when their time is over.
//!
//! An ended lease is first taken out of the table and then ended in the state, by whoever writes there. A transaction is
//! checked against the table under the same lock, or in the same thread, as it is applied. So none can put a key under a
//! lease behind its end: it is refused, or its keys go with the others.

use std::collections::HashMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::random_id;
use crate::types::{LeaseId, StoreError};

/// Leases at once: one per controller is usual.
const LEASES_MAX: usize = 10_000;
/// Longest and shortest life of a lease without being kept alive.
const TTL: (Duration, Duration) = (Duration::from_millis(10), Duration::from_secs(30 * 24 * 3600));

/// The leases of a store.
#[derive(Debug, Default)]
pub(crate) struct Leases {
    table: Arc<Table>,
    keeper: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Debug, Default)]
struct Table {
    inner: Mutex<Inner>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Inner {
    leases: HashMap<LeaseId, Lease>,
    closed: bool,
}

#[derive(Debug)]
struct Lease {
    ttl: Duration,
    ends: Instant,
}

impl Table {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Leases {
    /// Makes one. `end` is called, in a thread of its own, with each lease whose time is over.
    pub(crate) fn grant(
        &self,
        ttl: Duration,
        end: impl Fn(LeaseId) + Send + 'static,
    ) -> Result<LeaseId, StoreError> {
        let ttl = ttl.clamp(TTL.0, TTL.1);
        let lease = {
            let mut inner = self.table.lock();
            if inner.leases.len() >= LEASES_MAX {
                return Err(StoreError::TooManyLeases);
            }
            // Random, so that one of an earlier process is not taken for ours.
            let lease = LeaseId(i64::from_str_radix(&random_id()[..15], 16).unwrap_or_default());
            inner.leases.insert(lease, Lease { ttl, ends: Instant::now() + ttl });
            lease
        };
        self.table.changed.notify_all();
        let mut keeper = self.keeper.lock().unwrap_or_else(PoisonError::into_inner);
        if keeper.is_none() {
            let table = Arc::clone(&self.table);
            let thread = std::thread::Builder::new().name("store-leases".into());
            let failed = |source: std::io::Error| StoreError::Io {
                path: "the thread of its leases".into(),
                reason: source.to_string(),
            };
            *keeper = Some(thread.spawn(move || table.keep(end)).map_err(failed)?);
        }
        Ok(lease)
    }

    /// Begins its time anew.
    pub(crate) fn keep_alive(&self, lease: LeaseId) -> Result<(), StoreError> {
        let mut inner = self.table.lock();
        let known = inner.leases.get_mut(&lease).ok_or(StoreError::NoLease(lease))?;
        known.ends = Instant::now() + known.ttl;
        Ok(())
    }

    /// Takes it out; its keys are the caller's to remove.
    pub(crate) fn remove(&self, lease: LeaseId) -> Result<(), StoreError> {
        self.table.lock().leases.remove(&lease).map(drop).ok_or(StoreError::NoLease(lease))
    }

    pub(crate) fn is_known(&self, lease: LeaseId) -> bool {
        self.table.lock().leases.contains_key(&lease)
    }

    /// Ends the thread, and with it everything that it was given.
    pub(crate) fn close(&self) {
        self.table.lock().closed = true;
        self.table.changed.notify_all();
        let keeper = self.keeper.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(keeper) = keeper
            && keeper.join().is_err()
        {
            tracing::error!("the thread of the store's leases panicked");
        }
    }
}

impl Table {
    fn keep(&self, end: impl Fn(LeaseId)) {
        let mut inner = self.lock();
        while !inner.closed {
            let now = Instant::now();
            let next = inner.leases.iter().min_by_key(|(_, lease)| lease.ends);
            match next.map(|(lease, Lease { ends, .. })| (*lease, *ends)) {
                None => inner = self.changed.wait(inner).unwrap_or_else(PoisonError::into_inner),
                Some((lease, ends)) if ends <= now => {
                    inner.leases.remove(&lease);
                    drop(inner);
                    end(lease);
                    inner = self.lock();
                }
                Some((_, ends)) => {
                    let waited = self.changed.wait_timeout(inner, ends - now);
                    inner = waited.unwrap_or_else(PoisonError::into_inner).0;
                }
            }
        }
    }
}
