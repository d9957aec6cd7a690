//! The repository: objects in the store, a [`View`] of them in memory, and the one way to change them.
//!
//! One task (the feeder) follows the store's watch and takes whatever has been committed into the view, all
//! pending commits at once. Writers wait until the view has their revision, so everybody reads their own
//! writes. Changes by operators go through one mutex, since their validation looks at other objects, and with other
//! controllers through one key of the store, under the condition that it is as the validation has seen it; what agents
//! publish does neither, and is committed beside them.

mod confirm;
mod decoded;
mod feed;
mod herald;
mod history;
mod keys;
mod log;
mod managed;
mod rollback;
mod view;
mod write;
mod written;

use std::sync::{Arc, Mutex as Lock, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Duration;

use bulkhead_model::{ObjectKey, Resource};
use bulkhead_store::{
    Applied, Op, OpKind, Precondition, Revision, Store, StoreError, Transaction, random_id,
};
use bytes::Bytes;
use tokio::sync::{Mutex, Notify, watch};

use crate::clock;
use crate::fields::Entry;

pub(crate) use confirm::{CONFIRM_WITHIN, Record as Confirmation, Standing};
pub(crate) use decoded::Decoded;
pub(crate) use feed::feed;
pub(crate) use herald::Hearers;
use history::History;
pub(crate) use history::{Author, Record};
pub(crate) use keys::prefix as store_prefix;
pub(crate) use keys::{decode as decode_stored, object_key};
pub(crate) use log::ChangeLog;
use managed::Managed;
pub(crate) use managed::{Accounts, OWN as OWN_MANAGER, shown as managed_fields};
pub(crate) use rollback::Difference;
pub(crate) use view::{Object, View, is_predefined};
pub(crate) use write::{Change, Done, Terms, Verb, WriteError};

/// Longest that a write waits for the view to catch up with it.
const CATCH_UP_MAX: Duration = Duration::from_secs(10);

/// Objects, and how they are read and changed.
#[derive(Debug)]
pub(crate) struct Repository {
    store: Arc<dyn Store>,
    view: RwLock<View>,
    revision: watch::Sender<u64>,
    history: RwLock<History>,
    managed: RwLock<Managed>,
    operator_writes: Mutex<()>,
    written: written::Written,
    confirmations: Lock<confirm::Confirmations>,
    /// Somebody else's deadline may be the next.
    pub(crate) confirmations_changed: Notify,
}

impl Repository {
    /// Reads the store. [`feed`] must be run from then on.
    pub(crate) async fn open(store: Arc<dyn Store>) -> Result<Self, StoreError> {
        let view = feed::first_view(&*store).await?;
        let revision = watch::Sender::new(view.revision);
        let confirmations = Lock::new(confirm::stored(&*store).await?);
        let history = RwLock::new(History::open(&*store).await?);
        let managed = RwLock::new(Managed::open(&*store).await?);
        Ok(Self {
            store,
            view: RwLock::new(view),
            revision,
            history,
            managed,
            operator_writes: Mutex::new(()),
            written: written::Written::default(),
            confirmations,
            confirmations_changed: Notify::new(),
        })
    }

    fn confirmations_locked(&self) -> MutexGuard<'_, confirm::Confirmations> {
        self.confirmations.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn history_read(&self) -> RwLockReadGuard<'_, History> {
        self.history.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn history_mut(&self) -> RwLockWriteGuard<'_, History> {
        self.history.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Who set which fields of an object.
    pub(crate) fn owners(&self, resource: &Resource) -> Vec<Entry> {
        self.managed.read().unwrap_or_else(PoisonError::into_inner).entries(resource)
    }

    /// The store beneath.
    pub(crate) fn store(&self) -> &Arc<dyn Store> {
        &self.store
    }

    /// The view, to be read. Not to be held over an await.
    pub(crate) fn view(&self) -> RwLockReadGuard<'_, View> {
        self.view.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// The view, to be changed.
    pub(crate) fn view_mut(&self) -> RwLockWriteGuard<'_, View> {
        self.view.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until the view has a revision. That it takes long means that the feeder is stuck, which
    /// readiness reports; the write is done all the same.
    pub(crate) async fn wait_for(&self, revision: u64) {
        let mut newest = self.revision.subscribe();
        let reached = newest.wait_for(|newest| *newest >= revision);
        if tokio::time::timeout(CATCH_UP_MAX, reached).await.is_err() {
            tracing::error!(revision, "the view does not catch up with the store");
        }
    }

    /// Writes without looking at other objects: what agents publish. One transaction.
    pub(crate) async fn publish(
        &self,
        upserts: Vec<Resource>,
        removes: Vec<ObjectKey>,
    ) -> Result<Applied, StoreError> {
        let (transaction, written) = self.publication(upserts, removes);
        if transaction.ops.is_empty() {
            return Ok(Applied { revision: Revision(self.view().revision), changed: false });
        }
        let keys: Vec<String> = written.iter().map(|(key, ..)| key.clone()).collect();
        self.written.expect(written);
        let applied = self.store.apply(transaction).await;
        if let Ok(applied) = &applied {
            self.wait_for(applied.revision.0).await;
        }
        self.written.forget(&keys);
        applied
    }

    /// Removes what agents have published, with what else is to be in the transaction.
    pub(crate) async fn remove(&self, gone: &[ObjectKey], besides: Transaction) -> Result<(), StoreError> {
        let delete = |all: Transaction, key| all.delete(keys::store_key(key), Precondition::Any);
        let applied = self.store.apply(gone.iter().fold(besides, delete)).await?;
        self.wait_for(applied.revision.0).await;
        Ok(())
    }

    /// The transaction of [`Repository::publish`], and the objects that it puts, with their keys and bytes.
    pub(crate) fn publication(
        &self,
        upserts: Vec<Resource>,
        removes: Vec<ObjectKey>,
    ) -> (Transaction, Vec<(String, Bytes, Resource)>) {
        let mut transaction = Transaction::new();
        let mut written = Vec::with_capacity(upserts.len());
        for resource in upserts {
            // Held for each alone: the feeder waits for this lock.
            let before = self.view().get(&resource.key()).cloned();
            if before.as_ref().is_some_and(|before| before.resource.says_the_same(&resource)) {
                continue;
            }
            let resource = stamp(resource, before.as_deref());
            let (key, bytes) = (keys::store_key(&resource.key()), keys::encode(&resource));
            transaction = transaction.put(key.as_str(), bytes.clone(), Precondition::Any);
            written.push((key, bytes, resource));
        }
        for key in removes {
            transaction = transaction.delete(keys::store_key(&key), Precondition::Any);
        }
        (transaction, written)
    }
}

/// Sets what the repository sets: identity from the state before or new, and the generation.
fn stamp(mut resource: Resource, before: Option<&Object>) -> Resource {
    // A predefined tier that nobody has written has no identity yet.
    let before = before.filter(|before| before.modified > 0);
    let (uid, created, generation) = match before {
        Some(before) => {
            let metadata = before.resource.metadata();
            let generation = metadata.generation.unwrap_or(1);
            let same_spec = same_spec(&before.resource, &resource);
            (
                metadata.uid.clone(),
                metadata.creation_timestamp.clone(),
                if same_spec { generation } else { generation + 1 },
            )
        }
        None => (Some(random_id()), Some(clock::rfc3339(clock::now_ms())), 1),
    };
    let metadata = resource.metadata_mut();
    metadata.resource_version = None;
    metadata.uid = uid;
    metadata.creation_timestamp = created;
    metadata.generation = Some(generation);
    resource
}

fn same_spec(before: &Resource, after: &Resource) -> bool {
    match (before, after) {
        // By far the most.
        (Resource::Workload(before), Resource::Workload(after)) => before.spec == after.spec,
        _ => before.to_json()["spec"] == after.to_json()["spec"],
    }
}

#[cfg(test)]
impl Repository {
    /// Takes in what the store has beyond the view, as the feeder would.
    pub(crate) async fn catch_up(&self) {
        let from = Revision(self.view().revision);
        let mut watch = self.store.watch(keys::PREFIX, from).await.unwrap();
        loop {
            let commits = watch.ready().unwrap();
            if commits.is_empty() {
                return;
            }
            let changes = decoded::decode(&commits, keys::decode);
            // Whoever asks for this looks at the sessions by himself.
            let _hearers = self.view_mut().commit(changes, watch.position().0, 1);
        }
    }
}

fn put_op(resource: &Resource, precondition: Precondition) -> Op {
    let key = keys::store_key(&resource.key()).into();
    Op { key, precondition, kind: OpKind::Put(keys::encode(resource)) }
}

fn delete_op(key: &ObjectKey) -> Op {
    Op { key: keys::store_key(key).into(), precondition: Precondition::Any, kind: OpKind::Delete }
}
