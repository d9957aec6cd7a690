//! What objects were at a revision, and going back there.

use std::collections::{BTreeMap, BTreeSet};

use bulkhead_model::{ObjectKey, Resource};
use bulkhead_store::{Precondition, Revision, Transaction};
use serde_json::Value;

use super::history::{Before, Record};
use super::write::{Change, Done, Outcome, Terms, WriteError};
use super::{Repository, View, delete_op, keys, put_op, stamp};

/// An object at two revisions.
#[derive(Debug)]
pub(crate) struct Difference {
    pub(crate) key: ObjectKey,
    pub(crate) before: Option<Value>,
    pub(crate) after: Option<Value>,
}

impl Repository {
    /// The newest changes first: at most `limit`, of one object if it is named, older than a revision if one is given.
    pub(crate) fn history(&self, limit: usize, object: Option<&str>, before: Option<u64>) -> Vec<Record> {
        let history = self.history_read();
        let about = |record: &&Record| {
            object.is_none_or(|object| record.touched.iter().any(|touched| touched.object == object))
        };
        let older = |record: &&Record| before.is_none_or(|before| record.revision < before);
        history.records().rev().filter(about).filter(older).take(limit).cloned().collect()
    }

    /// What the objects that operators have changed since a revision were then.
    async fn states_at(&self, revision: u64) -> Result<Before, WriteError> {
        let since: Vec<Record> = {
            let history = self.history_read();
            if let Some(oldest) = history.records().next()
                && revision + 1 < oldest.revision
            {
                return Err(WriteError::NoHistory(format!(
                    "the history begins with revision {}: what was at {revision} is not known",
                    oldest.revision
                )));
            }
            history.records().filter(|record| record.revision > revision).cloned().collect()
        };
        // Each change has a revision of its own: records that share one were written here together, as a copy.
        if let Some(copied) = since.windows(2).find(|two| two[0].revision == two[1].revision) {
            return Err(WriteError::NoHistory(format!(
                "what was changed before revision {} came here as a copy of another repository: its revisions were others",
                copied[0].revision
            )));
        }
        let newest = self.view().revision;
        if revision > newest {
            return Err(WriteError::NoHistory(format!(
                "there is no revision {revision} yet, the newest is {newest}"
            )));
        }
        let mut states = Before::new();
        // The first change after the revision says what was there.
        for record in since.iter().rev() {
            let before = record.before(&*self.store).await?.ok_or_else(|| {
                WriteError::NoHistory(format!(
                    "the change at revision {} was too large to be remembered: what was before is not known",
                    record.revision
                ))
            })?;
            states.extend(before);
        }
        Ok(states)
    }

    /// What operators have changed from one revision to another (`None`: now).
    pub(crate) async fn differences(
        &self,
        from: u64,
        to: Option<u64>,
    ) -> Result<Vec<Difference>, WriteError> {
        let before = self.states_at(from).await?;
        let after = match to {
            Some(to) => self.states_at(to).await?,
            None => Before::new(),
        };
        let view = self.view();
        let differences = before.into_iter().filter_map(|(store_key, before)| {
            let key = keys::object_key(&store_key)?;
            let now = || {
                let object = view.get(&key).filter(|object| object.modified > 0);
                object.map(|object| without_version(object.resource.to_json()))
            };
            let after = after.get(&store_key).cloned().unwrap_or_else(now);
            let spoken = |value: &Option<Value>| value.as_ref().map(says);
            (spoken(&before) != spoken(&after)).then_some(Difference { key, before, after })
        });
        Ok(differences.collect())
    }

    /// Makes the objects that operators have changed since a revision what they were then, as one change.
    pub(crate) async fn roll_back_to(&self, revision: u64, terms: &Terms) -> Result<Done, WriteError> {
        let _one_at_a_time = self.operator_writes.lock().await;
        self.planned(|seen| async move {
            let states = self.states_at(revision).await?;
            let (changes, transaction) = {
                let view = self.view();
                let planned = plan(&view, &states)?;
                check_tiers(&view, &planned.0)?;
                planned
            };
            self.carry_out(changes, transaction, seen, terms).await
        })
        .await
    }
}

fn without_version(mut json: Value) -> Value {
    if let Some(metadata) = json["metadata"].as_object_mut() {
        metadata.remove("resourceVersion");
    }
    json
}

/// What a person has said, without what the repository set.
fn says(json: &Value) -> Value {
    let mut said = json.clone();
    if let Some(metadata) = said["metadata"].as_object_mut() {
        metadata.retain(|field, _| {
            !["resourceVersion", "uid", "generation", "creationTimestamp"].contains(&field.as_str())
        });
    }
    said
}

fn plan(view: &View, states: &Before) -> Result<(Vec<Change>, Transaction), WriteError> {
    let (mut changes, mut transaction) = (Vec::new(), Transaction::new());
    for (store_key, wanted) in states {
        let Some(key) = keys::object_key(store_key) else {
            return Err(WriteError::NoHistory(format!("{store_key} is of a kind that is not known here")));
        };
        let current = view.get(&key).filter(|object| object.modified > 0);
        let wanted = wanted.as_ref().map(Resource::from_json).transpose().map_err(WriteError::Invalid)?;
        match (wanted, current) {
            (None, None) => {}
            (None, Some(current)) => {
                transaction.ops.push(delete_op(&key));
                let before = Some(current.resource.clone());
                changes.push(Change { key, outcome: Outcome::Deleted, before, after: None });
            }
            (Some(wanted), Some(current)) if current.resource.says_the_same(&wanted) => {}
            (Some(wanted), current) => {
                let after = stamp(wanted, current.map(|object| &**object));
                let unchanged = current.map_or(Precondition::Absent, |current| {
                    Precondition::AtRevision(Revision(current.modified))
                });
                transaction.ops.push(put_op(&after, unchanged));
                let outcome = if current.is_some() { Outcome::Configured } else { Outcome::Created };
                let before = current.map(|object| object.resource.clone());
                changes.push(Change { key, outcome, before, after: Some(after) });
            }
        }
    }
    Ok((changes, transaction))
}

/// Every policy must have its tier afterwards, those that nobody touched too.
fn check_tiers(view: &View, changes: &[Change]) -> Result<(), WriteError> {
    let touched: BTreeMap<&ObjectKey, Option<&Resource>> =
        changes.iter().map(|change| (&change.key, change.after.as_ref())).collect();
    let staying =
        view.objects().map(|object| &object.resource).filter(|object| !touched.contains_key(&object.key()));
    let after: Vec<&Resource> = staying.chain(touched.values().copied().flatten()).collect();
    let predefined = bulkhead_model::policy::PREDEFINED_TIERS.iter().map(|(name, ..)| *name);
    let made: BTreeSet<&str> =
        after.iter().flat_map(|object| object.tiers_made()).chain(predefined).collect();
    for object in &after {
        if let Some(tier) = object.tiers_used().find(|tier| !made.contains(tier)) {
            let message = format!("{} is in the tier {tier:?}, which would be gone", object.key());
            return Err(WriteError::Forbidden(message));
        }
    }
    Ok(())
}
