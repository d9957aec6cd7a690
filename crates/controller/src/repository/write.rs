//! Changes by operators: validated against each other and against what there is, then one transaction.

use std::collections::{BTreeMap, BTreeSet};

use bulkhead_model::document::Document;
use bulkhead_model::resource::nearest_name;
use bulkhead_model::{Kind, ObjectKey, Problem, Resource};
use bulkhead_store::{Precondition, Revision, StoreError, Transaction};

use super::{Object, Repository, View, delete_op, is_predefined, put_op, stamp};

/// What is to be done with the objects.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verb {
    /// Create or replace.
    Apply,
    /// Create; it must not exist.
    Create,
    /// Replace; it must exist.
    Replace,
}

/// What became of an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    Created,
    Configured,
    Unchanged,
    Deleted,
    NotFound,
}

impl Outcome {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Configured => "configured",
            Self::Unchanged => "unchanged",
            Self::Deleted => "deleted",
            Self::NotFound => "notFound",
        }
    }
}

/// One object's part of an answer.
#[derive(Debug, Clone)]
pub(crate) struct Change {
    pub(crate) key: ObjectKey,
    pub(crate) outcome: Outcome,
    pub(crate) before: Option<Resource>,
    pub(crate) after: Option<Resource>,
}

/// Why nothing was changed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum WriteError {
    /// What was asked is wrong, at these places.
    #[error("{} problem(s), first: {}", .0.len(), .0.first().map(ToString::to_string).unwrap_or_default())]
    Invalid(Vec<Problem>),
    /// It exists already.
    #[error("{0} already exists")]
    AlreadyExists(ObjectKey),
    /// There is none.
    #[error("there is no {0}")]
    NotFound(ObjectKey),
    /// Somebody else changed it meanwhile.
    #[error("{key} is at resourceVersion {found}, not {expected}: somebody else has changed it")]
    Conflict { key: ObjectKey, expected: String, found: String },
    /// It may not be done.
    #[error("{0}")]
    Forbidden(String),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl Repository {
    /// Creates and replaces objects, all or none.
    pub(crate) async fn write(
        &self,
        documents: &[Document],
        verb: Verb,
        dry_run: bool,
    ) -> Result<(Vec<Change>, u64), WriteError> {
        let _one_at_a_time = self.operator_writes.lock().await;
        let (mut changes, transaction) = self.plan(documents, verb)?;
        let revision = self.commit(transaction, dry_run).await?;
        if !dry_run {
            let written = changes
                .iter_mut()
                .filter(|change| matches!(change.outcome, Outcome::Created | Outcome::Configured));
            for after in written.filter_map(|change| change.after.as_mut()) {
                after.metadata_mut().resource_version = Some(revision.to_string());
            }
        }
        Ok((changes, revision))
    }

    /// Removes objects, all or none. That one does not exist is an outcome, not an error.
    pub(crate) async fn delete(
        &self,
        keys: &[ObjectKey],
        resource_version: Option<&str>,
        dry_run: bool,
    ) -> Result<(Vec<Change>, u64), WriteError> {
        let _one_at_a_time = self.operator_writes.lock().await;
        let (changes, transaction) = {
            let view = self.view();
            check_deletable(&view, keys)?;
            plan_delete(&view, keys, resource_version)?
        };
        let revision = self.commit(transaction, dry_run).await?;
        Ok((changes, revision))
    }

    async fn commit(&self, transaction: Transaction, dry_run: bool) -> Result<u64, WriteError> {
        if dry_run || transaction.ops.is_empty() {
            return Ok(self.view().revision);
        }
        let applied = self.store.apply(transaction).await?;
        self.wait_for(applied.revision.0).await;
        Ok(applied.revision.0)
    }

    fn plan(&self, documents: &[Document], verb: Verb) -> Result<(Vec<Change>, Transaction), WriteError> {
        let view = self.view();
        let mut problems = duplicates(documents);
        problems.extend(unknown_tiers(&view, documents));
        problems.extend(tiers_made_twice(&view, documents));
        if !problems.is_empty() {
            return Err(WriteError::Invalid(problems));
        }
        let mut transaction = Transaction::new();
        let mut changes = Vec::with_capacity(documents.len());
        for document in documents {
            let resource = &document.resource;
            let key = resource.key();
            let before = view.get(&key);
            check_existence(&key, before.map(|object| &**object), verb)?;
            check_version(resource, before.map(|object| &**object))?;
            if let Some(before) = before
                && before.resource.says_the_same(resource)
            {
                let same = before.resource.clone();
                changes.push(Change {
                    key,
                    outcome: Outcome::Unchanged,
                    before: Some(same.clone()),
                    after: Some(same),
                });
                continue;
            }
            let written = before.filter(|before| before.modified > 0);
            let after = stamp(resource.clone(), before.map(|object| &**object));
            let precondition = written
                .map_or(Precondition::Absent, |written| Precondition::AtRevision(Revision(written.modified)));
            transaction.ops.push(put_op(&after, precondition));
            let outcome = if before.is_some() { Outcome::Configured } else { Outcome::Created };
            let before = before.map(|before| before.resource.clone());
            changes.push(Change { key, outcome, before, after: Some(after) });
        }
        Ok((changes, transaction))
    }
}

/// The same object twice in one request.
fn duplicates(documents: &[Document]) -> Vec<Problem> {
    let mut first: BTreeMap<ObjectKey, &Document> = BTreeMap::new();
    let mut problems = Vec::new();
    for document in documents {
        let key = document.resource.key();
        let Some(other) = first.get(&key) else {
            first.insert(key, document);
            continue;
        };
        let place = other.position_of("metadata.name");
        let message =
            format!("{key} is given twice, first at {}:{}:{}", other.source, place.line, place.column);
        problems.push(document.problem("metadata.name", message, None));
    }
    problems
}

/// Policies whose tier neither exists nor is made by the same request.
fn unknown_tiers(view: &View, documents: &[Document]) -> Vec<Problem> {
    let mut known: BTreeSet<&str> =
        view.resources().flat_map(|object| object.resource.tiers_made()).collect();
    known.extend(documents.iter().flat_map(|document| document.resource.tiers_made()));
    let unknown = |document: &Document| {
        let tier = document.resource.tiers_used().find(|tier| !known.contains(tier))?;
        let suggestion = nearest_name(tier, known.iter().copied());
        Some(document.problem("spec.tier", format!("there is no tier {tier:?}"), suggestion))
    };
    documents.iter().filter_map(unknown).collect()
}

/// Tiers that another kind of object already makes: two orders for one name.
fn tiers_made_twice(view: &View, documents: &[Document]) -> Vec<Problem> {
    let mut makers: BTreeMap<&str, BTreeSet<ObjectKey>> = BTreeMap::new();
    let known = view.resources().map(|object| &object.resource);
    for resource in known.chain(documents.iter().map(|document| &document.resource)) {
        for name in resource.tiers_made() {
            makers.entry(name).or_default().insert(resource.key());
        }
    }
    let twice = |document: &Document| {
        let name = document.resource.tiers_made().next()?;
        let key = document.resource.key();
        let other = makers.get(name)?.iter().find(|other| **other != key)?;
        let message = format!("the tier {name:?} is already made by {other}");
        Some(document.problem("metadata.name", message, None))
    };
    documents.iter().filter_map(twice).collect()
}

fn check_existence(key: &ObjectKey, before: Option<&Object>, verb: Verb) -> Result<(), WriteError> {
    match (verb, before) {
        (Verb::Create, Some(_)) => Err(WriteError::AlreadyExists(key.clone())),
        (Verb::Replace, None) => Err(WriteError::NotFound(key.clone())),
        (Verb::Apply | Verb::Create | Verb::Replace, _) => Ok(()),
    }
}

/// A `resourceVersion` in a manifest asks that nobody has changed the object since.
fn check_version(resource: &Resource, before: Option<&Object>) -> Result<(), WriteError> {
    let Some(expected) = &resource.metadata().resource_version else { return Ok(()) };
    let found = before.map_or_else(|| "none".to_owned(), |before| before.modified.to_string());
    if *expected == found {
        return Ok(());
    }
    Err(WriteError::Conflict { key: resource.key(), expected: expected.clone(), found })
}

fn check_deletable(view: &View, keys: &[ObjectKey]) -> Result<(), WriteError> {
    let gone: BTreeSet<&ObjectKey> = keys.iter().collect();
    for key in keys.iter().filter(|key| matches!(key.kind, Kind::Tier | Kind::CalicoTier)) {
        if is_predefined(key) {
            return Err(WriteError::Forbidden(format!("{key} is predefined and cannot be deleted")));
        }
        let mut users = view
            .resources()
            .filter(|user| user.resource.tiers_used().any(|tier| tier == key.name))
            .map(|user| user.resource.key())
            .filter(|user| !gone.contains(user));
        if let Some(user) = users.next() {
            let others = match users.count() {
                0 => String::new(),
                count => format!(" and {count} more"),
            };
            return Err(WriteError::Forbidden(format!("{key} is in use by {user}{others}")));
        }
    }
    Ok(())
}

fn plan_delete(
    view: &View,
    keys: &[ObjectKey],
    resource_version: Option<&str>,
) -> Result<(Vec<Change>, Transaction), WriteError> {
    let mut transaction = Transaction::new();
    let mut changes = Vec::with_capacity(keys.len());
    let mut seen = BTreeSet::new();
    for key in keys.iter().filter(|key| seen.insert(*key)) {
        let Some(before) = view.get(key) else {
            changes.push(Change { key: key.clone(), outcome: Outcome::NotFound, before: None, after: None });
            continue;
        };
        if let Some(expected) = resource_version
            && *expected != before.modified.to_string()
        {
            let found = before.modified.to_string();
            return Err(WriteError::Conflict { key: key.clone(), expected: expected.into(), found });
        }
        transaction.ops.push(delete_op(key));
        changes.push(Change {
            key: key.clone(),
            outcome: Outcome::Deleted,
            before: Some(before.resource.clone()),
            after: None,
        });
    }
    Ok((changes, transaction))
}
