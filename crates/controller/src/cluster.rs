//! Several controllers over one store: who serves whom, and which controllers there are.
//!
//! There is no leader. Each controller holds one lease of the store, and under it a key for itself and one for each host
//! whose agent it serves, so that what a dead controller had goes by itself. Everybody follows these keys into a
//! [`table`]; whatever must happen once happens under the precondition that they are still as they were seen. With a store
//! of one process the same code runs, and sees itself alone.

mod expire;
mod follow;
mod lease;
mod peers;
mod records;
mod registrar;
mod table;

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Duration;

use bulkhead_store::{LeaseId, Revision, Store};
use tokio::sync::{Mutex as AsyncMutex, Notify, watch};

use crate::guard::{Ends, Known, Who};

pub(crate) use expire::keep_leases;
pub(crate) use follow::follow;
pub(crate) use lease::{instance, keep_lease};
pub(crate) use peers::{Answer, ask_others, follow_others};
pub(crate) use records::ControllerRecord;
pub(crate) use registrar::register;

use registrar::Registrations;
use table::Table;

/// This controller's place among the others.
#[derive(Debug)]
pub(crate) struct Cluster {
    store: Arc<dyn Store>,
    /// What stands about this controller.
    own: ControllerRecord,
    ttl: Duration,
    lease: Mutex<LeaseId>,
    /// Held while a lost lease is replaced.
    replacing: AsyncMutex<()>,
    table: RwLock<Table>,
    /// Up to where the table is.
    position: watch::Sender<Revision>,
    registrations: Mutex<Registrations>,
    /// Registrations wait to be written.
    waiting: Notify,
}

impl Cluster {
    fn table(&self) -> RwLockReadGuard<'_, Table> {
        self.table.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn table_mut(&self) -> RwLockWriteGuard<'_, Table> {
        self.table.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn registrations(&self) -> MutexGuard<'_, Registrations> {
        self.registrations.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lease(&self) -> LeaseId {
        *self.lease.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What stands about this controller.
    pub(crate) fn own(&self) -> &ControllerRecord {
        &self.own
    }

    /// All controllers, by name; this one too, unless its lease is lost.
    pub(crate) fn controllers(&self) -> Vec<ControllerRecord> {
        self.table().controllers().cloned().collect()
    }

    /// The others.
    pub(crate) fn others(&self) -> Vec<ControllerRecord> {
        let all = self.controllers();
        all.into_iter().filter(|one| one.name != self.own.name).collect()
    }

    /// How many hosts each controller serves.
    pub(crate) fn served_by(&self, controller: &str) -> usize {
        self.table().served_by(controller)
    }

    /// Hosts whose agents others serve.
    pub(crate) fn sessions_elsewhere(&self) -> usize {
        self.table().served_by_others(&self.own.name).count()
    }

    /// Connections of agents that others serve, as far as they are known.
    pub(crate) fn lifelines(&self) -> Vec<Known> {
        let table = self.table();
        let ends = |text: &str| text.parse::<SocketAddr>().ok();
        let known = table.served_by_others(&self.own.name).filter_map(|(host, session)| {
            let ends = Ends { remote: ends(&session.remote)?, local: ends(&session.local)? };
            Some(Known { who: Who::Agent(Arc::clone(host)), ends })
        });
        let mut known: Vec<_> = known.collect();
        known.sort_unstable_by_key(|known| match &known.who {
            Who::Operator => None,
            Who::Agent(host) => Some(Arc::clone(host)),
        });
        known
    }
}
