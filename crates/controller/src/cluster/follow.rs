//! From the store's watch into the table, and what that means for the sessions here.

use std::sync::Arc;
use std::time::Instant;

use bulkhead_store::StoreError;
use tokio::sync::watch;
use tonic::Status;

use super::records::PREFIX;
use super::table::Event;
use crate::context::{Context, stopped};

/// Follows the store until `shutdown`. Ends early, with the error, if the store fails.
pub(crate) async fn follow(
    context: Arc<Context>,
    mut shutdown: watch::Receiver<bool>,
) -> Result<(), StoreError> {
    let cluster = &context.cluster;
    let from = *cluster.position.borrow();
    let mut watch = cluster.store.watch(PREFIX, from).await?;
    loop {
        let commits = tokio::select! {
            commits = watch.step() => commits?,
            () = stopped(&mut shutdown) => return Ok(()),
        };
        let now = Instant::now();
        let events: Vec<Event> = {
            let mut table = cluster.table_mut();
            let changes =
                commits.iter().flat_map(|commit| commit.changes.iter().map(|one| (one, commit.revision)));
            changes.filter_map(|(change, revision)| table.take_in(change, revision, now)).collect()
        };
        cluster.position.send_replace(watch.position());
        for event in events {
            heed(&context, event);
        }
    }
}

fn heed(context: &Context, event: Event) {
    let cluster = &context.cluster;
    match event {
        Event::Taken { host, controller, revision } if controller != cluster.own.name => {
            // Of two sessions the one that was registered later is the newer one.
            if let Some(session) = cluster.registrations().taken(&host, revision) {
                context.metrics.sessions_moved.add(1);
                context.sessions.registry.close_session(&host, session, moved(&host, &controller));
            }
        }
        Event::Taken { .. } => {}
        Event::Gone { host, revision } => {
            // Our lease has ended, or somebody has removed the key: nobody may take the host for gone.
            if cluster.registrations().removed(&host, revision) {
                cluster.waiting.notify_one();
            }
        }
    }
}

/// What an agent hears whose host another controller serves.
pub(super) fn moved(host: &str, controller: &str) -> Status {
    Status::aborted(format!("host {host:?} has a newer session, with controller {controller:?}"))
}
