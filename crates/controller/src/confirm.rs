//! The keeper of deadlines: undoes what nobody has confirmed in time.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::json;
use tokio::sync::watch;

use crate::context::{Context, stopped};
use crate::repository::{Author, Confirmation, WriteError};

/// How long to wait after a roll-back that failed.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// Watches the deadlines until `shutdown`. One that passed while no controller ran is met at once.
pub(crate) async fn keep_deadlines(context: Arc<Context>, mut shutdown: watch::Receiver<bool>) {
    let mut not_before = Instant::now();
    loop {
        let next = context.repository.next_deadline();
        let due = async {
            match &next {
                Some((deadline, _)) => tokio::time::sleep_until((*deadline).max(not_before).into()).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = due => {}
            () = context.repository.confirmations_changed.notified() => continue,
            () = stopped(&mut shutdown) => return,
        }
        let Some((_, id)) = next else { continue };
        let nobody = Author {
            by: "controller".into(),
            from: context.config.name.clone(),
            verb: "rollback, unconfirmed",
        };
        match roll_back(&context, &id, &nobody).await {
            // Somebody was quicker.
            Ok(_) | Err(WriteError::NoConfirmation(_) | WriteError::AlreadyRolledBack { .. }) => {}
            Err(error) => {
                tracing::error!(%id, %error, "a change that nobody has confirmed could not be undone");
                not_before = Instant::now() + RETRY_AFTER;
            }
        }
    }
}

/// Undoes a change and says so, loudly where it could not wholly be.
pub(crate) async fn roll_back(
    context: &Context,
    id: &str,
    author: &Author,
) -> Result<Confirmation, WriteError> {
    let record = context.repository.roll_back(id, author).await?;
    context.metrics.roll_backs.add(1);
    context.metrics.roll_back_objects_left.add(record.left_alone.len() as u64);
    let objects = record.objects.len() - record.left_alone.len();
    tracing::warn!(%id, by = %record.by, objects, undone_by = %author.by, "a change was rolled back");
    let detail = json!({ "id": id, "objects": record.objects, "leftAlone": record.left_alone });
    context.audit.done(&author.by, &author.from, author.verb, detail).await;
    for left in &record.left_alone {
        tracing::error!(%id, object = %left.object, reason = %left.reason, "a roll-back left an object as it is");
    }
    Ok(record)
}
