//! A store in an etcd cluster, for several controllers at once.
//!
//! etcd does its own work: transactions are its transactions, revisions its revisions, watches its watches. Ours is
//! the shape of the keys, all below the store's prefix:
//!
//! | key | what |
//! |---|---|
//! | `PREFIX/objects` and the key | an object, its value as it was given |
//! | `PREFIX/epoch` | the epoch, written once by whoever comes first |
//! | `PREFIX/writers/ID/NUMBER` | what a writer did last, see [`transaction`]; under a lease, so that they go with it |
//!
//! Nothing here is answered from memory: reads are linearizable, so several controllers read each other's writes.

mod cluster;
mod leases;
mod options;
mod slots;
mod transaction;
mod watch;

use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;
use etcd_client::{Compare, CompareOp, GetOptions, KeyValue, KvClient, Txn, TxnOp, TxnOpResponse};
use tokio::sync::watch as signal;

use crate::types::{Applied, LeaseId, Revision, StoreError, Stored, Transaction};
use crate::{Store, Watch, random_id};

use cluster::{Backoff, Cluster, OPERATION_TIME_MAX};
use slots::Slots;

pub use options::EtcdOptions;
pub(crate) use watch::EtcdWatch;

/// How often a list begins anew because etcd was compacted while its pages were read.
const LIST_ATTEMPTS_MAX: usize = 5;

/// A store in an etcd cluster.
#[derive(Debug)]
pub struct Etcd {
    epoch: String,
    cluster: Arc<Cluster>,
    slots: Slots,
    page_keys: i64,
    /// Its end is the end of all watches.
    open: signal::Sender<()>,
}

impl Etcd {
    /// Connects, and makes the store if there is none below the prefix.
    ///
    /// # Errors
    /// [`StoreError::Refused`] if the options do not make sense or etcd says no, [`StoreError::Unavailable`] if no
    /// member answers.
    pub async fn open(options: &EtcdOptions) -> Result<Self, StoreError> {
        let cluster = Arc::new(Cluster::new(options)?);
        let epoch = cluster.call(|kv| claim_epoch(kv, cluster.epoch_key())).await?;
        let epoch = String::from_utf8_lossy(&epoch).into_owned();
        let (open, _) = signal::channel(());
        Ok(Self { epoch, slots: Slots::new(), page_keys: options.page_keys.max(1), cluster, open })
    }

    /// Whether there is a store below the prefix.
    pub(crate) async fn exists(options: &EtcdOptions) -> Result<bool, StoreError> {
        let cluster = Cluster::new(options)?;
        let found = cluster.call(|mut kv| {
            let key = cluster.epoch_key();
            async move { kv.get(key, Some(GetOptions::new().with_count_only())).await }
        });
        Ok(found.await?.count() > 0)
    }

    /// All pages of a list, at the revision of the first one; `None` if etcd was compacted beyond it meanwhile.
    async fn pages(&self, prefix: &str) -> Result<Option<(Vec<Stored>, Revision)>, StoreError> {
        let first = self.cluster.object_key(prefix);
        let end = cluster::after_prefix(&first);
        let mut objects = Vec::new();
        let mut from = first;
        let mut revision = None;
        loop {
            let mut options = GetOptions::new().with_range(end.clone()).with_limit(self.page_keys);
            if let Some(Revision(revision)) = revision {
                options = options.with_revision(number(revision));
            }
            let page = self.cluster.call(|mut kv| {
                let (from, options) = (from.clone(), options.clone());
                async move { kv.get(from, Some(options)).await }
            });
            let page = match page.await {
                Ok(page) => page,
                Err(StoreError::Refused { reason, .. }) if reason.contains(cluster::COMPACTED) => {
                    return Ok(None);
                }
                Err(error) => return Err(error),
            };
            let at = *revision.get_or_insert(cluster::revision_of(page.header()));
            for pair in page.kvs() {
                objects.push(self.cluster.stored(pair)?);
            }
            match page.kvs().last() {
                Some(last) if page.more() => {
                    from = last.key().to_vec();
                    from.push(0);
                }
                _ => return Ok(Some((objects, at))),
            }
        }
    }
}

/// The epoch, which is written if there is none.
async fn claim_epoch(mut kv: KvClient, key: Vec<u8>) -> Result<Vec<u8>, etcd_client::Error> {
    let mine = random_id();
    let absent = Compare::create_revision(key.clone(), CompareOp::Equal, 0);
    let request = Txn::new()
        .when([absent])
        .and_then([TxnOp::put(key.clone(), mine.clone(), None)])
        .or_else([TxnOp::get(key, None)]);
    let response = kv.txn(request).await?;
    let found = response.op_responses().into_iter().find_map(|response| match response {
        TxnOpResponse::Get(found) => found.kvs().first().map(|pair| pair.value().to_vec()),
        _ => None,
    });
    Ok(found.unwrap_or_else(|| mine.into_bytes()))
}

/// etcd's numbers are signed. A revision that is none of etcd's becomes the highest, which nothing ever has.
fn number(revision: u64) -> i64 {
    i64::try_from(revision).unwrap_or(i64::MAX)
}

impl Cluster {
    /// An object as it stands in etcd.
    fn stored(&self, pair: &KeyValue) -> Result<Stored, StoreError> {
        let key = self.key_of(pair.key()).ok_or_else(|| StoreError::Corrupt {
            path: self.name().into(),
            reason: format!("{:?} is no key of ours", String::from_utf8_lossy(pair.key())),
        })?;
        Ok(Stored {
            key: key.into(),
            value: Bytes::copy_from_slice(pair.value()),
            created: cluster::revision(pair.create_revision()),
            modified: cluster::revision(pair.mod_revision()),
            lease: (pair.lease() != 0).then(|| LeaseId(pair.lease())),
        })
    }
}

#[async_trait]
impl Store for Etcd {
    fn epoch(&self) -> &str {
        &self.epoch
    }

    async fn get(&self, key: &str) -> Result<Option<Stored>, StoreError> {
        let full = self.cluster.object_key(key);
        let found = self.cluster.call(|mut kv| {
            let full = full.clone();
            async move { kv.get(full, None).await }
        });
        found.await?.kvs().first().map(|pair| self.cluster.stored(pair)).transpose()
    }

    async fn list(&self, prefix: &str) -> Result<(Vec<Stored>, Revision), StoreError> {
        for _ in 0..LIST_ATTEMPTS_MAX {
            if let Some(whole) = self.pages(prefix).await? {
                return Ok(whole);
            }
        }
        Err(self.cluster.unavailable("it was compacted again and again while a list was read"))
    }

    async fn apply(&self, transaction: Transaction) -> Result<Applied, StoreError> {
        transaction.check()?;
        transaction::apply(&self.cluster, &self.slots, &transaction).await
    }

    async fn watch(&self, prefix: &str, from: Revision) -> Result<Watch, StoreError> {
        let deadline = Instant::now() + OPERATION_TIME_MAX;
        let mut backoff = Backoff::default();
        loop {
            match watch::connect(&self.cluster, &self.epoch, from).await {
                Ok(stream) => {
                    let closed = self.open.subscribe();
                    let cluster = Arc::clone(&self.cluster);
                    let watch = EtcdWatch::start(cluster, self.epoch.clone(), prefix, from, stream, closed);
                    return Ok(watch.into());
                }
                Err(StoreError::Unavailable { .. }) if Instant::now() < deadline => backoff.pause().await,
                Err(error) => return Err(error),
            }
        }
    }

    async fn grant(&self, ttl: Duration) -> Result<LeaseId, StoreError> {
        leases::grant(&self.cluster, ttl).await
    }

    async fn keep_alive(&self, lease: LeaseId) -> Result<(), StoreError> {
        leases::keep_alive(&self.cluster, lease).await
    }

    async fn revoke(&self, lease: LeaseId) -> Result<(), StoreError> {
        leases::revoke(&self.cluster, lease).await
    }

    async fn revision(&self) -> Result<Revision, StoreError> {
        let found = self.cluster.call(|mut kv| {
            let key = self.cluster.epoch_key();
            async move { kv.get(key, Some(GetOptions::new().with_count_only())).await }
        });
        Ok(cluster::revision_of(found.await?.header()))
    }

    /// Made by writing: of the revisions that others make outside our prefix no watch of ours hears in time.
    async fn mark(&self) -> Result<Revision, StoreError> {
        let applied = transaction::apply(&self.cluster, &self.slots, &Transaction::new()).await?;
        Ok(applied.revision)
    }
}
