//! Who set which fields of which object, beside the objects: agents, history and `diff` have no use for it.
//!
//! Only objects that a client with a field manager has written have a record. It is kept current by every later change, in the
//! transaction of the change.

use std::collections::BTreeMap;
use std::sync::Arc;

use bulkhead_model::{ObjectKey, Resource};
use bulkhead_store::{Op, OpKind, Precondition, Store, StoreError, Stored};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::keys;
use super::write::{Change, Terms, WriteError};
use crate::clock;
use crate::fields::{By, Entry, updated};

/// Where the records are in the store. No object is there.
pub(super) const PREFIX: &str = "/bulkhead.dev/managed/";
/// Who changes objects by `bulkhead` itself.
pub(crate) const OWN: &str = "bulkhead";

/// How a request accounts for fields.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Accounts {
    /// Whoever changes a field owns it.
    Changed {
        manager: String,
        /// Whether objects that have no record get one.
        begins: bool,
    },
    /// Exactly these: of an apply.
    Exactly(Vec<Entry>),
}

/// A record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Kept {
    /// Of the object; a record of another object of that name means nothing.
    uid: String,
    entries: Vec<Entry>,
}

/// All records, by the object's key in the store.
#[derive(Debug, Default)]
pub(super) struct Managed(BTreeMap<String, Arc<Kept>>);

impl Managed {
    /// Reads the store.
    pub(super) async fn open(store: &dyn Store) -> Result<Self, StoreError> {
        let mut managed = Self::default();
        store.list(PREFIX).await?.0.iter().for_each(|stored| managed.take_in(&stored.key, Some(stored)));
        Ok(managed)
    }

    /// Takes in what has become of a record.
    pub(super) fn take_in(&mut self, key: &str, stored: Option<&Stored>) {
        let Some(object) = key.strip_prefix(PREFIX) else { return };
        match stored.map(|stored| serde_json::from_slice::<Kept>(&stored.value)) {
            Some(Ok(kept)) => drop(self.0.insert(object.to_owned(), Arc::new(kept))),
            None => drop(self.0.remove(object)),
            Some(Err(error)) => {
                tracing::error!(%key, %error, "who set which fields cannot be read: nobody, then");
                self.0.remove(object);
            }
        }
    }

    fn of(&self, key: &ObjectKey, uid: Option<&String>) -> Option<&Kept> {
        let kept = self.0.get(&place(key))?;
        (Some(&kept.uid) == uid).then_some(&**kept)
    }

    /// Who owns what of an object.
    pub(super) fn entries(&self, resource: &Resource) -> Vec<Entry> {
        let kept = self.of(&resource.key(), resource.metadata().uid.as_ref());
        kept.map(|kept| kept.entries.clone()).unwrap_or_default()
    }

    /// What has to be written with these changes. Who may not change an object may not own its fields either.
    pub(super) fn ops(&self, changes: &[Change], terms: &Terms) -> Result<Vec<Op>, WriteError> {
        let mut ops = Vec::new();
        for change in changes {
            let record = self.0.get(&place(&change.key));
            let Some(after) = &change.after else {
                if record.is_some() && change.outcome.is_change() {
                    let key = format!("{PREFIX}{}", place(&change.key)).into();
                    ops.push(Op { key, precondition: Precondition::Any, kind: OpKind::Delete });
                }
                continue;
            };
            let Some(kept) = self.next(change, after, terms) else { continue };
            if record.is_some_and(|record| **record == kept) {
                continue;
            }
            let allowed = terms.permissions.may_change(&change.key, change.before.as_ref(), Some(after));
            allowed.map_err(WriteError::NotAllowed)?;
            let key = format!("{PREFIX}{}", place(&change.key)).into();
            let value = serde_json::to_vec(&kept).unwrap_or_default().into();
            ops.push(Op { key, precondition: Precondition::Any, kind: OpKind::Put(value) });
        }
        Ok(ops)
    }

    /// The record after a change; `None`: there is none to be kept.
    fn next(&self, change: &Change, after: &Resource, terms: &Terms) -> Option<Kept> {
        let uid = after.metadata().uid.clone()?;
        let (manager, begins) = match &terms.accounts {
            Accounts::Exactly(entries) => return Some(Kept { uid, entries: entries.clone() }),
            Accounts::Changed { manager, begins } => (manager, *begins),
        };
        let kept = self.of(&change.key, Some(&uid));
        if !change.outcome.is_change() || (kept.is_none() && !begins) {
            return None;
        }
        let before = change.before.as_ref().map_or_else(|| json!({}), Resource::to_json);
        let after = after.to_json();
        let time = clock::rfc3339(clock::now_ms());
        let version = after["apiVersion"].as_str().unwrap_or_default().to_owned();
        let by = By { manager, api_version: &version, time: &time };
        let entries = updated(kept.map_or(&[], |kept| &kept.entries), &before, &after, by);
        Some(Kept { uid, entries })
    }
}

/// `managedFields` as Kubernetes has them; `None` if there are none.
pub(crate) fn shown(entries: &[Entry]) -> Option<Value> {
    (!entries.is_empty()).then(|| json!(entries))
}

/// Where the record of an object is, below [`PREFIX`].
fn place(key: &ObjectKey) -> String {
    let key = keys::store_key(key);
    key.strip_prefix(keys::PREFIX).unwrap_or(&key).to_owned()
}
