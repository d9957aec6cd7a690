//! What operators have changed: who, when, what, and what was before.
//!
//! The record of a change is written in its own transaction, so there is no change without one. It holds what each object
//! was before; what it was afterwards is what the next record of that object says it was before, or what it is now. Records
//! are compressed, and the oldest go when there are too many.

use std::collections::{BTreeMap, VecDeque};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD_NO_PAD;
use bulkhead_model::Resource;
use bulkhead_store::{Op, OpKind, Precondition, Store, StoreError, Stored, random_id};
use miniz_oxide::deflate::compress_to_vec;
use miniz_oxide::inflate::decompress_to_vec_with_limit;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::keys;
use super::write::Change;
use crate::clock;

/// Where the records are in the store, by time. No object is there.
pub(crate) const PREFIX: &str = "/bulkhead.dev/history/";
/// Changes that are remembered.
pub(crate) const RECORDS_MAX: usize = 10_000;
/// Bytes of compressed records that are remembered.
const RECORDS_BYTES_MAX: usize = 64 << 20;
/// Largest record with what was before, compressed; what is larger is remembered by names alone, and cannot be undone.
const RECORD_BYTES_MAX: usize = 4 << 20;
/// Largest record once it is unpacked; far above what a request may bring.
const UNPACKED_BYTES_MAX: usize = 256 << 20;
/// How hard it is tried to make a record small, of 10.
const LEVEL: u8 = 6;
/// Old records that one change removes at most.
const REMOVED_AT_ONCE: usize = 16;

/// What a change did to an object.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct Touched {
    /// Kind, namespace and name.
    pub(crate) object: String,
    /// `created`, `configured` or `deleted`.
    pub(crate) outcome: String,
}

/// A change, as it stands in the store.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Kept {
    at_ms: u64,
    by: String,
    from: String,
    /// What was asked for: `apply`, `rollback`, …
    verb: String,
    forced: bool,
    touched: Vec<Touched>,
    /// What was before, by key in the store, deflated and in base 64; `None`: it was too large.
    before: Option<String>,
}

/// A change without what was before.
#[derive(Debug, Clone)]
pub(crate) struct Record {
    /// The revision that it made.
    pub(crate) revision: u64,
    pub(crate) at_ms: u64,
    pub(crate) by: String,
    pub(crate) from: String,
    pub(crate) verb: String,
    pub(crate) forced: bool,
    pub(crate) touched: Vec<Touched>,
    /// Whether it is known what was before.
    pub(crate) complete: bool,
    key: String,
    bytes: usize,
}

/// Who changes something, how and from where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Author {
    pub(crate) by: String,
    pub(crate) from: String,
    pub(crate) verb: &'static str,
}

/// What objects were, by key; `None`: there was none.
pub(crate) type Before = BTreeMap<String, Option<Value>>;

/// Records by revision, oldest first, without what was before: that stays in the store.
#[derive(Debug, Default)]
pub(crate) struct History {
    records: VecDeque<Record>,
    bytes: usize,
}

impl History {
    /// Reads the store.
    pub(super) async fn open(store: &dyn Store) -> Result<Self, StoreError> {
        let mut history = Self::default();
        let mut all = store.list(PREFIX).await?.0;
        all.sort_by(|a, b| (a.modified, &a.key).cmp(&(b.modified, &b.key)));
        all.iter().for_each(|stored| history.take_in(stored));
        Ok(history)
    }

    /// Takes in a record that was written.
    pub(super) fn take_in(&mut self, stored: &Stored) {
        let kept: Kept = match serde_json::from_slice(&stored.value) {
            Ok(kept) => kept,
            Err(error) => {
                tracing::error!(key = %stored.key, %error, "a record of the history cannot be read");
                return;
            }
        };
        let Kept { at_ms, by, from, verb, forced, touched, before } = kept;
        let record = Record {
            revision: stored.modified.0,
            at_ms,
            by,
            from,
            verb,
            forced,
            touched,
            complete: before.is_some(),
            key: stored.key.to_string(),
            bytes: stored.value.len(),
        };
        // The feed begins with the revision of the first view, and what was listed after it may come once more.
        let as_new = self.records.iter().rev().take_while(|known| known.revision >= record.revision);
        if as_new.into_iter().any(|known| known.key == record.key) {
            return;
        }
        self.bytes += record.bytes;
        self.records.push_back(record);
    }

    /// Takes out a record that was removed.
    pub(super) fn forget(&mut self, key: &str) {
        if let Some(place) = self.records.iter().position(|record| record.key == key)
            && let Some(gone) = self.records.remove(place)
        {
            self.bytes = self.bytes.saturating_sub(gone.bytes);
        }
    }

    /// Oldest first.
    pub(crate) fn records(&self) -> impl DoubleEndedIterator<Item = &Record> {
        self.records.iter()
    }

    /// Records that have to go for another of this size.
    fn too_many(&self, bytes: usize) -> Vec<String> {
        let (mut count, mut total) = (self.records.len() + 1, self.bytes + bytes);
        let mut gone = Vec::new();
        for record in self.records.iter().take(REMOVED_AT_ONCE) {
            if count <= RECORDS_MAX && total <= RECORDS_BYTES_MAX {
                break;
            }
            count -= 1;
            total -= record.bytes;
            gone.push(record.key.clone());
        }
        gone
    }

    /// What a transaction has to hold besides, so that the change is remembered.
    pub(super) fn ops(&self, changes: &[Change], author: &Author, forced: bool) -> Vec<Op> {
        let changed: Vec<&Change> = changes.iter().filter(|change| change.outcome.is_change()).collect();
        let touched = changed.iter().map(|change| Touched {
            object: change.key.to_string(),
            outcome: change.outcome.as_str().to_owned(),
        });
        let before: Before = changed
            .iter()
            .map(|change| {
                let before = change.before.as_ref().filter(|before| before.metadata().uid.is_some());
                (keys::store_key(&change.key), before.map(plain))
            })
            .collect();
        let now = clock::now_ms();
        let Author { by, from, verb } = author.clone();
        let (verb, touched) = (verb.to_owned(), touched.collect());
        let kept = Kept { at_ms: now, by, from, verb, forced, touched, before: pack(&before) };
        let value = serde_json::to_vec(&kept).unwrap_or_default();
        let gone = self.too_many(value.len());
        // By time, and two at once apart.
        let key = format!("{PREFIX}{now:016}-{}", &random_id()[..8]);
        let record =
            Op { key: key.into(), precondition: Precondition::Absent, kind: OpKind::Put(value.into()) };
        let gone = gone.into_iter().map(|key| Op {
            key: key.into(),
            precondition: Precondition::Any,
            kind: OpKind::Delete,
        });
        std::iter::once(record).chain(gone).collect()
    }
}

/// What a person would write, without what the repository sets at each write.
fn plain(resource: &Resource) -> Value {
    let mut json = resource.to_json();
    if let Some(metadata) = json["metadata"].as_object_mut() {
        metadata.remove("resourceVersion");
    }
    json
}

fn pack(before: &Before) -> Option<String> {
    let text = serde_json::to_vec(before).ok()?;
    let packed = compress_to_vec(&text, LEVEL);
    (packed.len() <= RECORD_BYTES_MAX).then(|| STANDARD_NO_PAD.encode(packed))
}

fn unpack(text: &str) -> Option<Before> {
    let packed = STANDARD_NO_PAD.decode(text).ok()?;
    let unpacked = decompress_to_vec_with_limit(&packed, UNPACKED_BYTES_MAX).ok()?;
    serde_json::from_slice(&unpacked).ok()
}

impl Record {
    /// What the objects of a change were before it; `None` if that is not known.
    pub(super) async fn before(&self, store: &dyn Store) -> Result<Option<Before>, StoreError> {
        let stored = store.get(&self.key).await?;
        let kept = stored.and_then(|stored| serde_json::from_slice::<Kept>(&stored.value).ok());
        Ok(kept.and_then(|kept| unpack(&kept.before?)))
    }
}

#[cfg(test)]
mod tests {
    use bulkhead_store::Revision;

    use super::*;

    #[test]
    fn a_record_that_was_listed_and_comes_once_more_is_one_record() {
        let kept = Kept {
            at_ms: 1,
            by: "ann".into(),
            from: String::new(),
            verb: "apply".into(),
            forced: false,
            touched: Vec::new(),
            before: None,
        };
        let stored = |name: &str, revision| Stored {
            key: format!("{PREFIX}{name}").into(),
            value: serde_json::to_vec(&kept).unwrap().into(),
            created: Revision(revision),
            modified: Revision(revision),
            lease: None,
        };
        let mut history = History::default();
        for (name, revision) in [("a", 3), ("b", 5), ("a", 3), ("b", 5), ("c", 5), ("d", 6)] {
            history.take_in(&stored(name, revision));
        }
        let revisions: Vec<_> = history.records().map(|record| record.revision).collect();
        assert_eq!(revisions, [3, 5, 5, 6]);
    }
}
