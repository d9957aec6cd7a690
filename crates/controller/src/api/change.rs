//! The one way in which requests change objects: to the end, and with a line in the audit log.

use std::sync::Arc;

use bulkhead_model::ObjectKey;
use bulkhead_model::document::Document;
use serde_json::{Value, json};

use super::problem::Refusal;
use super::to_the_end;
use crate::context::Context;
use crate::repository::{Done, Terms, Verb, WriteError};

/// What is asked for.
#[derive(Debug)]
pub(super) enum Ask {
    /// To write objects.
    Write(Vec<Document>, Verb),
    /// To remove objects; of one, only if it is at a version.
    Delete(Vec<ObjectKey>, Option<String>),
    /// To make everything what it was at a revision.
    RollBack(u64),
}

/// Does it, on these terms.
pub(super) async fn change(context: Arc<Context>, terms: Terms, ask: Ask) -> Result<Done, Refusal> {
    if !terms.dry_run {
        context.audit.ready().await?;
    }
    let work = async move {
        let repository = &context.repository;
        let result = match &ask {
            Ask::Write(documents, verb) => repository.write(documents, *verb, &terms).await,
            Ask::Delete(keys, version) => repository.delete(keys, version.as_deref(), &terms).await,
            Ask::RollBack(revision) => repository.roll_back_to(*revision, &terms).await,
        };
        if !terms.dry_run {
            note(&context, &terms, &ask, &result).await;
        }
        result
    };
    Ok(to_the_end(work).await??)
}

async fn note(context: &Context, terms: &Terms, ask: &Ask, result: &Result<Done, WriteError>) {
    let author = &terms.author;
    match result {
        Ok(done) => {
            let changes: Vec<Value> = done
                .changes
                .iter()
                .filter(|one| one.outcome.is_change())
                .map(|one| {
                    let json = |resource: &Option<bulkhead_model::Resource>| {
                        resource.as_ref().map(bulkhead_model::Resource::to_json)
                    };
                    json!({
                        "object": one.key.to_string(),
                        "outcome": one.outcome.as_str(),
                        "before": json(&one.before),
                        "after": json(&one.after),
                    })
                })
                .collect();
            if !changes.is_empty() {
                let forced = !done.warnings.is_empty();
                let detail = json!({ "revision": done.revision, "forced": forced, "changes": changes });
                context.audit.done(&author.by, &author.from, author.verb, detail).await;
            }
        }
        Err(error) => {
            let objects: Vec<String> = match ask {
                Ask::Write(documents, _) => {
                    documents.iter().map(|one| one.resource.key().to_string()).collect()
                }
                Ask::Delete(keys, _) => keys.iter().map(ToString::to_string).collect(),
                Ask::RollBack(revision) => vec![format!("revision {revision}")],
            };
            let why = error.to_string();
            context.audit.not_done(&author.by, &author.from, author.verb, &objects, &why).await;
        }
    }
}
