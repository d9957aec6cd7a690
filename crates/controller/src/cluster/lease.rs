//! This controller's lease, and its key: what tells the others that it is there.

use std::path::Path;
use std::sync::{Arc, Mutex, RwLock};
use std::time::{Duration, Instant};

use bulkhead_store::{Change, LeaseId, Precondition, Store, StoreError, Transaction, random_id};
use tokio::sync::{Mutex as AsyncMutex, Notify, watch};

use super::Cluster;
use super::records::{ControllerRecord, PREFIX, controller_key, encode};
use super::table::Table;
use crate::Error;
use crate::clock;
use crate::context::{Context, stopped};

/// How often the lease is kept alive while it lasts: two may be lost.
const KEPT_PER_TTL: u32 = 3;
/// How many leases' time a controller waits at its start for one of the same name to end. etcd counts in whole seconds, up.
const WAITED_LEASES: u32 = 2;
/// How often it looks meanwhile.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// Longest that a controller which ends waits for its lease to be given back; else it ends by itself.
const GIVEN_BACK_WITHIN: Duration = Duration::from_secs(2);
/// File in the data directory that tells this controller from another of the same name.
const INSTANCE_FILE: &str = "instance";

/// Which data directory this is; a random name where nothing is kept.
pub(crate) fn instance(directory: Option<&Path>) -> std::io::Result<String> {
    let Some(directory) = directory else { return Ok(random_id()) };
    let path = directory.join(INSTANCE_FILE);
    match std::fs::read_to_string(&path) {
        Ok(text) if !text.trim().is_empty() => return Ok(text.trim().to_owned()),
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
        Ok(_) | Err(_) => {}
    }
    let instance = random_id();
    std::fs::write(&path, &instance)?;
    Ok(instance)
}

impl Cluster {
    /// Takes the controller's name, and reads who else is there. [`super::follow`], [`super::keep_lease`] and
    /// [`super::register`] must be run from then on.
    pub(crate) async fn open(
        store: Arc<dyn Store>,
        own: ControllerRecord,
        ttl: Duration,
    ) -> Result<Self, Error> {
        let lease = claim(&*store, &own, ttl).await?;
        let (all, revision) = store.list(PREFIX).await?;
        let (mut table, now) = (Table::default(), Instant::now());
        for stored in all {
            let modified = stored.modified;
            table.take_in(&Change { key: Arc::clone(&stored.key), object: Some(stored) }, modified, now);
        }
        Ok(Self {
            store,
            own,
            ttl,
            lease: Mutex::new(lease),
            replacing: AsyncMutex::new(()),
            table: RwLock::new(table),
            position: watch::Sender::new(revision),
            registrations: Mutex::default(),
            waiting: Notify::new(),
        })
    }

    /// Takes another lease in place of one that was lost, and has everything written again under it.
    pub(super) async fn replace_lease(&self, lost: LeaseId) -> Result<(), StoreError> {
        let _one_at_a_time = self.replacing.lock().await;
        if self.lease() != lost {
            return Ok(());
        }
        let lease = self.store.grant(self.ttl).await?;
        let key = controller_key(&self.own.name);
        let there = self.store.get(&key).await?;
        let ours = there.as_ref().is_none_or(|stored| read(&stored.value).instance == self.own.instance);
        if ours {
            let when = there.map_or(Precondition::Absent, |stored| Precondition::AtRevision(stored.modified));
            self.store.apply(Transaction::new().put_under(lease, key, encode(&self.own), when)).await?;
        } else {
            tracing::error!(
                name = %self.own.name,
                "another controller has taken this one's name while it had lost the store: stop one of them"
            );
        }
        *self.lease.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = lease;
        self.registrations().all_lost();
        self.waiting.notify_one();
        tracing::warn!("the controller's lease had ended: its sessions are registered again");
        Ok(())
    }

    /// Gives up everything under the lease, so that the others need not wait for its end.
    pub(crate) async fn close(&self) {
        // The store may be away; then the lease ends by itself.
        if let Ok(Err(error)) = tokio::time::timeout(GIVEN_BACK_WITHIN, self.store.revoke(self.lease())).await
        {
            tracing::debug!(%error, "the controller's lease was not given back");
        }
    }
}

fn read(value: &[u8]) -> ControllerRecord {
    let none = String::new;
    serde_json::from_slice(value).unwrap_or_else(|_unreadable| ControllerRecord {
        name: none(),
        api: none(),
        agents: none(),
        version: none(),
        since_ms: 0,
        instance: none(),
    })
}

/// A lease with the controller's key under it.
async fn claim(store: &dyn Store, own: &ControllerRecord, ttl: Duration) -> Result<LeaseId, Error> {
    let key = controller_key(&own.name);
    let deadline = Instant::now() + ttl * WAITED_LEASES;
    let mut waiting = false;
    loop {
        let lease = store.grant(ttl).await?;
        let claim = Transaction::new().put_under(lease, key.as_str(), encode(own), Precondition::Absent);
        match store.apply(claim).await {
            Ok(_) => return Ok(lease),
            Err(StoreError::Conflict { .. }) => {}
            Err(error) => return Err(error.into()),
        }
        // It would end by itself.
        let _ = store.revoke(lease).await;
        loop {
            let Some(there) = store.get(&key).await? else { break };
            let other = read(&there.value);
            if other.instance == own.instance {
                // Our own, from before we were killed: nobody else can have the data directory open.
                match there.lease {
                    Some(lease) => match store.revoke(lease).await {
                        Ok(()) | Err(StoreError::NoLease(_)) => {}
                        Err(error) => return Err(error.into()),
                    },
                    None => {
                        let gone = Transaction::new().delete(key.as_str(), Precondition::Any);
                        store.apply(gone).await?;
                    }
                }
            } else if Instant::now() >= deadline {
                let since = clock::rfc3339(other.since_ms);
                return Err(Error::NameTaken { name: own.name.clone(), api: other.api, since });
            } else if !std::mem::replace(&mut waiting, true) {
                tracing::warn!(
                    name = %own.name, api = %other.api,
                    "a controller of this name is registered: waiting for its lease to end, if it is dead"
                );
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }
}

/// Keeps the lease alive until `shutdown`.
pub(crate) async fn keep_lease(context: Arc<Context>, mut shutdown: watch::Receiver<bool>) {
    let cluster = &context.cluster;
    let mut kept = Instant::now();
    loop {
        tokio::select! {
            () = tokio::time::sleep(cluster.ttl / KEPT_PER_TTL) => {}
            () = stopped(&mut shutdown) => return,
        }
        let lease = cluster.lease();
        let answer = tokio::select! {
            answer = cluster.store.keep_alive(lease) => answer,
            () = stopped(&mut shutdown) => return,
        };
        let answer = match answer {
            Err(StoreError::NoLease(_)) => {
                context.metrics.leases_lost.add(1);
                cluster.replace_lease(lease).await
            }
            answer => answer,
        };
        match answer {
            Ok(()) => kept = Instant::now(),
            Err(error) => {
                let since = kept.elapsed();
                tracing::warn!(%error, ?since, "the controller's lease cannot be kept alive: trying again");
            }
        }
    }
}
