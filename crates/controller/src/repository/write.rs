//! Changes by operators: validated against each other and against what there is, then one transaction.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use bulkhead_model::document::Document;
use bulkhead_model::resource::nearest_name;
use bulkhead_model::{Kind, ObjectKey, Problem, Resource};
use bulkhead_store::{Op, OpKind, Precondition, Revision, StoreError, Transaction};
use tracing::Instrument;

use super::confirm::{self, Record, WAITING_MAX};
use super::history::Author;
use super::managed::Accounts;
use super::{Object, Repository, View, delete_op, is_predefined, keys, put_op, stamp};
use crate::access::Permissions;
use crate::guard::{self, Known, Warning};

/// How often a change is planned if other controllers write meanwhile: each time one of them has succeeded.
pub(super) const ATTEMPTS_MAX: usize = 16;

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
    /// Whether anything is another than before.
    pub(crate) fn is_change(self) -> bool {
        match self {
            Self::Created | Self::Configured | Self::Deleted => true,
            Self::Unchanged | Self::NotFound => false,
        }
    }

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

/// On which terms something is changed.
#[derive(Debug, Clone)]
pub(crate) struct Terms {
    /// Say what would happen, and change nothing.
    pub(crate) dry_run: bool,
    /// Whoever is cut off.
    pub(crate) force: bool,
    /// To be undone unless somebody confirms it in this time.
    pub(crate) confirm_within: Option<Duration>,
    /// Who changes it.
    pub(crate) author: Author,
    /// What he may change.
    pub(crate) permissions: Permissions,
    /// Who will have set what it changes.
    pub(crate) accounts: Accounts,
    /// Connections that it should not cut.
    pub(crate) lifelines: Vec<Known>,
}

/// What was done.
#[derive(Debug)]
pub(crate) struct Done {
    pub(crate) changes: Vec<Change>,
    pub(crate) revision: u64,
    /// Whom it cuts off.
    pub(crate) warnings: Vec<Warning>,
    /// What waits for confirmation.
    pub(crate) confirmation: Option<Record>,
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
    /// The caller may not do it.
    #[error("nothing was changed: {0}")]
    NotAllowed(String),
    /// It is not known any more what was then, or not yet.
    #[error("{0}")]
    NoHistory(String),
    /// It may not be done.
    #[error("{0}")]
    Forbidden(String),
    /// It would cut somebody off.
    #[error(
        "nothing was changed:\n{}\n--force does it all the same; with --confirm-within 2m it is undone unless confirmed",
        guard::summary(.0)
    )]
    LockOut(Vec<Warning>),
    /// Whether it would cut somebody off cannot be said.
    #[error("nothing was changed: {0}; --force does it all the same")]
    Unjudged(String),
    /// Others change the same or what it is validated against, again and again.
    #[error(
        "others have changed the repository each of {ATTEMPTS_MAX} times that this change was tried: try again"
    )]
    Overtaken,
    /// A change of the same object waits for confirmation.
    #[error("a change of {object} waits for confirmation already: confirm or roll back {id} first")]
    StillWaiting { id: String, object: String },
    /// There are too many.
    #[error("{WAITING_MAX} changes wait for confirmation already")]
    TooManyWait,
    /// There is none of this id.
    #[error("no change {0:?} waits for confirmation: it was confirmed, or never was")]
    NoConfirmation(String),
    /// It is too late.
    #[error("the change {id} was rolled back at {at}")]
    AlreadyRolledBack { id: String, at: String },
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
        terms: &Terms,
    ) -> Result<Done, WriteError> {
        let _one_at_a_time = self.operator_writes.lock().await;
        let mut done = self
            .planned(|seen| async move {
                let (changes, transaction) = self.plan(documents, verb)?;
                self.carry_out(changes, transaction, seen, terms).await
            })
            .await?;
        if !terms.dry_run {
            let revision = done.revision.to_string();
            let written = done
                .changes
                .iter_mut()
                .filter(|change| matches!(change.outcome, Outcome::Created | Outcome::Configured));
            for after in written.filter_map(|change| change.after.as_mut()) {
                after.metadata_mut().resource_version = Some(revision.clone());
            }
        }
        Ok(done)
    }

    /// Removes objects, all or none. That one does not exist is an outcome, not an error.
    pub(crate) async fn delete(
        &self,
        keys: &[ObjectKey],
        resource_version: Option<&str>,
        terms: &Terms,
    ) -> Result<Done, WriteError> {
        let _one_at_a_time = self.operator_writes.lock().await;
        self.planned(|seen| async move {
            let (changes, transaction) = {
                let view = self.view();
                check_deletable(&view, keys)?;
                plan_delete(&view, keys, resource_version)?
            };
            self.carry_out(changes, transaction, seen, terms).await
        })
        .await
    }

    /// Plans a change and carries it out, and plans it anew if another controller has written meanwhile. The plan is made
    /// after, and carried out as of, the last change by an operator that it is told of.
    pub(super) async fn planned<F: Future<Output = Result<Done, WriteError>>>(
        &self,
        plan: impl Fn(Option<Revision>) -> F,
    ) -> Result<Done, WriteError> {
        for _ in 0..ATTEMPTS_MAX {
            let seen = self.view().operators_at;
            match plan(seen).await {
                Err(WriteError::Store(StoreError::Conflict { found, .. })) => {
                    self.catch_up_with(found).await?;
                }
                done => return done,
            }
        }
        Err(WriteError::Overtaken)
    }

    /// Waits until the view shows what was in the way of a write: `found`, the revision of the key, if it is there.
    pub(super) async fn catch_up_with(&self, found: Option<Revision>) -> Result<(), StoreError> {
        let revision = match found {
            Some(revision) => revision,
            None => self.store.mark().await?,
        };
        self.wait_for(revision.0).await;
        Ok(())
    }

    /// Asks whether it is allowed and whom it cuts off, and commits.
    pub(super) async fn carry_out(
        &self,
        changes: Vec<Change>,
        mut transaction: Transaction,
        seen: Option<Revision>,
        terms: &Terms,
    ) -> Result<Done, WriteError> {
        let Terms { dry_run, force, confirm_within, author, permissions, lifelines, .. } = terms;
        for change in changes.iter().filter(|change| change.outcome.is_change()) {
            let (before, after) = (change.before.as_ref(), change.after.as_ref());
            permissions.may_change(&change.key, before, after).map_err(WriteError::NotAllowed)?;
        }
        let accounts = self.managed.read().unwrap_or_else(PoisonError::into_inner).ops(&changes, terms)?;
        if transaction.ops.is_empty() {
            // Nothing is another but who answers for it.
            let mut revision = self.view().revision;
            if !accounts.is_empty() && !dry_run {
                let ops = accounts.into_iter().chain([operators_op(seen, author)]).collect();
                revision = self.store.apply(Transaction { ops }).await?.revision.0;
                self.wait_for(revision).await;
            }
            return Ok(Done { changes, revision, warnings: Vec::new(), confirmation: None });
        }
        let warnings = match self.warnings(&changes, lifelines).await {
            Ok(warnings) => warnings,
            Err(reason) if *force || *dry_run => {
                tracing::warn!(%reason, "a change was not judged by the lock-out guard");
                Vec::new()
            }
            Err(reason) => return Err(WriteError::Unjudged(reason)),
        };
        if !warnings.is_empty() && !force && !dry_run {
            return Err(WriteError::LockOut(warnings));
        }
        let record = confirm_within.map(|within| (confirm::record(&changes, within, &author.by), within));
        if let Some((record, _)) = &record {
            self.check_can_wait(record)?;
            transaction.ops.push(confirm::put_op(record, Precondition::Absent));
        }
        if *dry_run {
            let revision = self.view().revision;
            return Ok(Done { changes, revision, warnings, confirmation: None });
        }
        for warning in &warnings {
            tracing::warn!(by = %author.by, %warning, "a change was forced");
        }
        let remembered = self.history_read().ops(&changes, author, !warnings.is_empty());
        transaction.ops.extend(remembered);
        transaction.ops.extend(accounts);
        transaction.ops.push(operators_op(seen, author));
        let span =
            tracing::debug_span!("commit", by = author.by, verb = author.verb, objects = changes.len());
        let revision = self.store.apply(transaction).instrument(span).await?.revision.0;
        self.wait_for(revision).await;
        let confirmation = record.map(|(record, _)| record);
        Ok(Done { changes, revision, warnings, confirmation })
    }

    /// Whom a change would cut off.
    async fn warnings(&self, changes: &[Change], lifelines: &[Known]) -> Result<Vec<Warning>, String> {
        if lifelines.is_empty() {
            return Ok(Vec::new());
        }
        let objects: Vec<Arc<Object>> = self.view().objects().cloned().collect();
        let changes: Vec<_> = changes
            .iter()
            .filter(|change| change.outcome.is_change())
            .map(|change| (change.key.clone(), change.after.clone()))
            .collect();
        let lifelines = lifelines.to_vec();
        let judged = tokio::task::spawn_blocking(move || guard::warnings(&objects, &changes, &lifelines));
        match judged.await {
            Ok(judged) => judged.map_err(|too_many| too_many.to_string()),
            Err(error) => Err(format!("the lock-out guard failed: {error}")),
        }
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

/// The operation by which what several controllers change is validated one after the other.
pub(super) fn operators_op(seen: Option<Revision>, author: &Author) -> Op {
    let precondition = seen.map_or(Precondition::Absent, Precondition::AtRevision);
    Op { key: keys::OPERATORS.into(), precondition, kind: OpKind::Put(author.by.clone().into_bytes().into()) }
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
