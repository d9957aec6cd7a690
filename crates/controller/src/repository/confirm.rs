//! Changes that undo themselves unless somebody confirms them.
//!
//! A change with a deadline leaves a record in the same transaction: what it touched, and what that was before. The
//! record is written once while it waits, so its own revision tells whether anybody has touched an object since. The
//! deadline is a time of day, so that it holds over a restart; within one life of the controller the clock of the
//! machine counts, which nobody sets. Every controller follows the records, and each of them keeps the deadlines: the record's
//! revision decides which one undoes the change.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bulkhead_model::{ObjectKey, Resource};
use bulkhead_store::{
    Commit, Op, OpKind, Precondition, Revision, Store, StoreError, Stored, Transaction, random_id,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::history::Author;
use super::write::{ATTEMPTS_MAX, Change, Outcome, WriteError, operators_op};
use super::{Repository, View, keys};
use crate::clock;

/// Most changes that wait at once.
pub(crate) const WAITING_MAX: usize = 100;
/// Longest and shortest time to confirm.
pub(crate) const CONFIRM_WITHIN: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(86_400));
/// Roll-backs that are remembered, for whoever asks what happened.
const ROLLED_BACK_MAX: usize = 20;
/// Where the records are in the store. There is no kind of that name, so no object.
const PREFIX: &str = "/bulkhead.dev/v1/confirmations/_/";

/// Where a change stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum Standing {
    /// In force until the deadline.
    Waiting,
    /// Undone.
    RolledBack,
}

/// An object that a change touched.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Touched {
    /// Where it is in the store.
    key: String,
    /// Whether the change removed it.
    deleted: bool,
    /// What it was; `None`: there was none.
    before: Option<Value>,
}

/// An object that a roll-back left as it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct LeftAlone {
    /// Which.
    pub(crate) object: String,
    /// Why.
    pub(crate) reason: String,
}

/// What is stored of a change with a deadline.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct Record {
    pub(crate) id: String,
    pub(crate) standing: Standing,
    /// The address that it came from.
    pub(crate) by: String,
    pub(crate) made_ms: u64,
    pub(crate) deadline_ms: u64,
    /// When it was undone.
    #[serde(default)]
    pub(crate) ended_ms: u64,
    /// Names of the objects.
    pub(crate) objects: Vec<String>,
    /// Empty once it is undone.
    touched: Vec<Touched>,
    #[serde(default)]
    pub(crate) left_alone: Vec<LeftAlone>,
}

/// A record and what only this process knows of it.
#[derive(Debug, Clone)]
pub(crate) struct Confirmation {
    pub(crate) record: Record,
    /// Of the transaction that wrote it, and with it the change.
    revision: u64,
    deadline: Instant,
}

/// All of them, by id.
pub(super) type Confirmations = BTreeMap<String, Confirmation>;

/// Those that the store holds.
pub(super) async fn stored(store: &dyn Store) -> Result<Confirmations, StoreError> {
    let (all, _) = store.list(PREFIX).await?;
    let now_ms = clock::now_ms();
    let left = |record: &Record| {
        // However the clock was set meanwhile, nobody waits longer than was asked for.
        let within = record.deadline_ms.saturating_sub(record.made_ms);
        record.deadline_ms.saturating_sub(now_ms).min(within)
    };
    Ok(all.iter().filter_map(|stored| read(stored, left)).collect())
}

/// A record, with the deadline that it has with so many milliseconds left.
fn read(stored: &Stored, left: impl Fn(&Record) -> u64) -> Option<(String, Confirmation)> {
    match serde_json::from_slice::<Record>(&stored.value) {
        Ok(record) => {
            let deadline = Instant::now() + Duration::from_millis(left(&record));
            Some((record.id.clone(), Confirmation { record, revision: stored.modified.0, deadline }))
        }
        Err(error) => {
            tracing::error!(key = %stored.key, %error, "a change that waits for confirmation cannot be read: it stays");
            None
        }
    }
}

/// A change that is to be confirmed, before it is made.
pub(super) fn record(changes: &[Change], within: Duration, by: &str) -> Record {
    let made_ms = clock::now_ms();
    let within_ms = u64::try_from(within.as_millis()).unwrap_or(u64::MAX);
    let touched: Vec<&Change> = changes.iter().filter(|change| change.outcome.is_change()).collect();
    Record {
        id: random_id()[..8].to_owned(),
        standing: Standing::Waiting,
        by: by.to_owned(),
        made_ms,
        deadline_ms: made_ms.saturating_add(within_ms),
        ended_ms: 0,
        objects: touched.iter().map(|change| change.key.to_string()).collect(),
        touched: touched
            .iter()
            .map(|change| Touched {
                key: keys::store_key(&change.key),
                deleted: change.outcome == Outcome::Deleted,
                before: change.before.as_ref().map(Resource::to_json),
            })
            .collect(),
        left_alone: Vec::new(),
    }
}

/// The operation that writes it.
pub(super) fn put_op(record: &Record, precondition: Precondition) -> Op {
    // A record is made of text and numbers only.
    let bytes = serde_json::to_vec(record).unwrap_or_default();
    let key = format!("{PREFIX}{}", record.id).into();
    Op { key, precondition, kind: OpKind::Put(bytes.into()) }
}

fn delete_op(id: &str, precondition: Precondition) -> Op {
    Op { key: format!("{PREFIX}{id}").into(), precondition, kind: OpKind::Delete }
}

impl Repository {
    /// All that wait, and the latest that were undone.
    pub(crate) fn confirmations(&self) -> Vec<Record> {
        self.confirmations_locked().values().map(|one| one.record.clone()).collect()
    }

    /// The first deadline of those that wait.
    pub(crate) fn next_deadline(&self) -> Option<(Instant, String)> {
        let all = self.confirmations_locked();
        let waiting = all.iter().filter(|(_, one)| one.record.standing == Standing::Waiting);
        waiting.map(|(id, one)| (one.deadline, id.clone())).min()
    }

    /// Refuses a change with a deadline that cannot wait beside those that do.
    pub(super) fn check_can_wait(&self, record: &Record) -> Result<(), WriteError> {
        let all = self.confirmations_locked();
        let waiting: Vec<_> = all.values().filter(|one| one.record.standing == Standing::Waiting).collect();
        let wanted: BTreeSet<&String> = record.objects.iter().collect();
        for one in &waiting {
            if let Some(object) = one.record.objects.iter().find(|object| wanted.contains(object)) {
                let (id, object) = (one.record.id.clone(), object.clone());
                return Err(WriteError::StillWaiting { id, object });
            }
        }
        if waiting.len() >= WAITING_MAX {
            return Err(WriteError::TooManyWait);
        }
        Ok(())
    }

    /// Takes in records that were written, by whichever controller, and removed.
    pub(super) fn take_in_confirmations(&self, commits: &[Arc<Commit>]) {
        let changes = commits.iter().flat_map(|commit| &commit.changes);
        let mut records = changes.filter(|change| change.key.starts_with(PREFIX)).peekable();
        if records.peek().is_none() {
            return;
        }
        let mut all = self.confirmations_locked();
        for change in records {
            match &change.object {
                Some(stored) => {
                    let Some((id, mut one)) = read(stored, |record| {
                        // It was written just now, whatever time that was by the clock of whoever wrote it.
                        record.deadline_ms.saturating_sub(record.made_ms)
                    }) else {
                        continue;
                    };
                    // One that was listed at the start may come once more, and its time runs already.
                    if let Some(known) = all.get(&id) {
                        one.deadline = one.deadline.min(known.deadline);
                    }
                    all.insert(id, one);
                }
                None => drop(all.remove(&change.key[PREFIX.len()..])),
            }
        }
        drop(all);
        self.confirmations_changed.notify_one();
    }

    fn waiting(&self, id: &str) -> Result<Confirmation, WriteError> {
        match self.confirmations_locked().get(id) {
            None => Err(WriteError::NoConfirmation(id.to_owned())),
            Some(one) if one.record.standing == Standing::RolledBack => Err(WriteError::AlreadyRolledBack {
                id: id.to_owned(),
                at: clock::rfc3339(one.record.ended_ms),
            }),
            Some(one) => Ok(one.clone()),
        }
    }

    /// Keeps a change.
    pub(crate) async fn confirm(&self, id: &str) -> Result<Record, WriteError> {
        let _one_at_a_time = self.operator_writes.lock().await;
        loop {
            let one = self.waiting(id)?;
            let unchanged = Precondition::AtRevision(Revision(one.revision));
            match self.store.apply(Transaction { ops: vec![delete_op(id, unchanged)] }).await {
                Ok(applied) => {
                    self.wait_for(applied.revision.0).await;
                    return Ok(one.record);
                }
                // Another controller was quicker: what it did stands there, once, so this ends.
                Err(StoreError::Conflict { found, .. }) => self.catch_up_with(found).await?,
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Undoes a change: exactly the objects that it touched, but for those that somebody else has touched since.
    pub(crate) async fn roll_back(&self, id: &str, author: &Author) -> Result<Record, WriteError> {
        let _one_at_a_time = self.operator_writes.lock().await;
        let mut attempts = 0;
        let (record, revision) = loop {
            let seen = self.view().operators_at;
            let one = self.waiting(id)?;
            // Of another controller's change the record may be known a moment before the objects.
            self.wait_for(one.revision).await;
            let (undone, left_alone) = undo(&self.view(), &one);
            let changes: Vec<Change> = undone.iter().map(|undo| undo.change.clone()).collect();
            let mut ops: Vec<Op> = undone.into_iter().map(|undo| undo.op).collect();
            if !changes.is_empty() {
                ops.extend(self.history_read().ops(&changes, author, false));
                ops.push(operators_op(seen, author));
            }
            let record = Record {
                standing: Standing::RolledBack,
                ended_ms: clock::now_ms(),
                touched: Vec::new(),
                left_alone,
                ..one.record.clone()
            };
            // Of several controllers one undoes it.
            ops.push(put_op(&record, Precondition::AtRevision(Revision(one.revision))));
            let forgotten = self.oldest_rolled_back();
            ops.extend(forgotten.map(|id| delete_op(&id, Precondition::Any)));
            match self.store.apply(Transaction { ops }).await {
                Ok(applied) => break (record, applied.revision.0),
                // An agent has published one of the objects meanwhile, or another controller was quicker.
                Err(StoreError::Conflict { found, .. }) if attempts < ATTEMPTS_MAX => {
                    attempts += 1;
                    self.catch_up_with(found).await?;
                }
                Err(error) => return Err(error.into()),
            }
        };
        self.wait_for(revision).await;
        Ok(record)
    }

    /// What has to be forgotten to remember one more.
    fn oldest_rolled_back(&self) -> Option<String> {
        let all = self.confirmations_locked();
        let done = all.values().filter(|one| one.record.standing == Standing::RolledBack);
        let done: Vec<_> = done.map(|one| (one.record.ended_ms, &one.record.id)).collect();
        if done.len() < ROLLED_BACK_MAX { None } else { done.into_iter().min().map(|(_, id)| id.clone()) }
    }
}

/// What is to be done to one object.
struct Undo {
    key: ObjectKey,
    before: Option<Resource>,
    change: Change,
    op: Op,
}

/// The operations that undo a change, and what they leave alone.
fn undo(view: &View, one: &Confirmation) -> (Vec<Undo>, Vec<LeftAlone>) {
    let (mut undone, mut left_alone) = (Vec::new(), Vec::new());
    for touched in &one.record.touched {
        match undo_one(view, touched, one.revision) {
            Ok(undo) => undone.push(undo),
            Err(left) => left_alone.push(left),
        }
    }
    // What cannot go back for its tier's sake may be what another tier cannot go for.
    while let Some((place, reason)) =
        undone.iter().enumerate().find_map(|(place, undo)| Some((place, without_tier(view, &undone, undo)?)))
    {
        let undo = undone.remove(place);
        left_alone.push(LeftAlone { object: undo.key.to_string(), reason });
    }
    (undone, left_alone)
}

fn undo_one(view: &View, touched: &Touched, revision: u64) -> Result<Undo, LeftAlone> {
    let left = |reason: String| LeftAlone { object: touched.key.clone(), reason };
    let key = keys::object_key(&touched.key).ok_or_else(|| left("its kind is not known here".into()))?;
    let left = |reason: String| LeftAlone { object: key.to_string(), reason };
    let current = view.get(&key).filter(|object| object.modified > 0);
    let precondition = match (touched.deleted, current) {
        (true, None) => Precondition::Absent,
        (true, Some(object)) => {
            return Err(left(format!("somebody made it anew, at resourceVersion {}", object.modified)));
        }
        (false, Some(object)) if object.modified == revision => Precondition::AtRevision(Revision(revision)),
        (false, Some(object)) => {
            return Err(left(format!(
                "somebody has changed it since, at resourceVersion {}",
                object.modified
            )));
        }
        (false, None) => return Err(left("somebody has deleted it since".into())),
    };
    let before = touched.before.as_ref().map(Resource::from_json).transpose();
    let mut before = before.map_err(|problems| {
        let problems: Vec<_> = problems.iter().map(ToString::to_string).collect();
        left(format!("what it was cannot be read: {}", problems.join("; ")))
    })?;
    if let Some(before) = &mut before {
        let generation = current.and_then(|current| current.resource.metadata().generation);
        let metadata = before.metadata_mut();
        metadata.resource_version = None;
        metadata.generation = generation.map(|generation| generation + 1).or(metadata.generation);
    }
    let op = match &before {
        Some(before) => super::put_op(before, precondition),
        None => Op { key: touched.key.as_str().into(), precondition, kind: OpKind::Delete },
    };
    let outcome = match (&before, current) {
        (None, _) => Outcome::Deleted,
        (Some(_), None) => Outcome::Created,
        (Some(_), Some(_)) => Outcome::Configured,
    };
    let is_now = current.map(|current| current.resource.clone());
    let change = Change { key: key.clone(), outcome, before: is_now, after: before.clone() };
    Ok(Undo { key, before, change, op })
}

/// Why one of several cannot be undone: a policy would be in no tier.
fn without_tier(view: &View, undone: &[Undo], undo: &Undo) -> Option<String> {
    let going: BTreeSet<&ObjectKey> = undone.iter().map(|undo| &undo.key).collect();
    let staying = || {
        let others = view.resources().filter(|object| !going.contains(&object.resource.key()));
        let others = others.map(|object| object.resource.clone());
        others.chain(undone.iter().filter_map(|undo| undo.before.clone()))
    };
    if let Some(before) = &undo.before {
        let mut used = before.tiers_used().peekable();
        used.peek()?;
        let made: BTreeSet<String> = staying()
            .flat_map(|object| object.tiers_made().map(ToOwned::to_owned).collect::<Vec<_>>())
            .collect();
        return used.find(|tier| !made.contains(*tier)).map(|tier| format!("its tier {tier:?} is gone"));
    }
    let gone = view.get(&undo.key)?;
    let made: BTreeSet<&str> = gone.resource.tiers_made().collect();
    if made.is_empty() {
        return None;
    }
    let user = staying().find(|object| object.tiers_used().any(|tier| made.contains(tier)));
    user.map(|user| format!("somebody has put {} into it since", user.key()))
}

#[cfg(test)]
mod tests {
    use bulkhead_store::{Memory, Transaction};

    use super::*;
    use crate::clock::jumps;

    /// While a controller runs, a deadline is of the monotonic clock. One that starts has nothing but the time of day.
    #[tokio::test]
    async fn however_the_clock_jumps_nobody_waits_longer_than_was_asked_for() {
        let store = Memory::new();
        let within = Duration::from_secs(600);
        let record = record(&[], within, "ann");
        let ops = vec![put_op(&record, Precondition::Absent)];
        store.apply(Transaction { ops }).await.unwrap();
        let left = async |hours| {
            jumps::set(hours);
            let all = stored(&store).await.unwrap();
            jumps::set(0);
            all[&record.id].deadline.saturating_duration_since(Instant::now())
        };
        for hours in [0, -1, -1000] {
            let left = left(hours).await;
            assert!(left <= within && left > within / 2, "{hours}: {left:?}");
        }
        for hours in [1, 1000] {
            assert_eq!(left(hours).await, Duration::ZERO, "{hours}: it is due at once");
        }
    }
}
