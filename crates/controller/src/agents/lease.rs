//! The workloads of hosts that are gone: kept for the lease and a grace period, then removed.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bulkhead_model::Kind;
use tokio::sync::watch;
use tonic::Status;

use super::inventory;
use crate::context::{Context, stopped};

/// How often the leases are looked at, as a part of lease and grace together.
const LOOKS_PER_LEASE: u32 = 8;
/// Shortest and longest time between two looks.
const LOOK_EVERY: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(10));

/// Looks after the leases until `shutdown`.
pub(crate) async fn keep_leases(context: Arc<Context>, mut shutdown: watch::Receiver<bool>) {
    let kept = context.config.lease() + context.config.grace();
    let started = Instant::now();
    let mut looks = tokio::time::interval((kept / LOOKS_PER_LEASE).clamp(LOOK_EVERY.0, LOOK_EVERY.1));
    loop {
        tokio::select! {
            _ = looks.tick() => {}
            () = stopped(&mut shutdown) => return,
        }
        for host in hosts(&context) {
            // Before we started, nobody could be seen.
            let silent = context.registry.silent_for(&host).unwrap_or_else(|| started.elapsed());
            if silent > kept {
                expire(&context, &host).await;
            }
        }
    }
}

/// Hosts that have, or had, an agent.
fn hosts(context: &Context) -> Vec<String> {
    let view = context.repository.view();
    view.of_kind(Kind::Host).map(|host| host.resource.metadata().name.clone()).collect()
}

async fn expire(context: &Context, host: &str) {
    let gone = inventory::published_by(context, host);
    if gone.is_empty() {
        return;
    }
    let workloads = gone.len();
    match context.repository.publish(Vec::new(), gone).await {
        Ok(_) => {
            context.metrics.hosts_expired.add(1);
            tracing::warn!(%host, workloads, "a host is unseen for too long: its workloads are removed");
        }
        // It is tried again at the next look.
        Err(error) => tracing::error!(%host, %error, "the workloads of a lost host could not be removed"),
    }
    // The agent may have come back meanwhile and found everything as it had published it, just before it
    // was removed: then it must publish again.
    let reason = "the host's workloads had expired: connect and publish again";
    context.registry.close(host, Status::aborted(reason));
}
