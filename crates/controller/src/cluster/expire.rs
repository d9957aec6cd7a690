//! The workloads of hosts that are gone: kept for the lease and a grace period, then removed.
//!
//! Every controller looks, and any of them may be the one that removes: under the precondition that still nobody has
//! registered the host. That it happened is left in a key, by which a session that was just then on its way finds out.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bulkhead_model::{Kind, ObjectKey};
use bulkhead_store::{Precondition, StoreError, Transaction};
use tokio::sync::watch;

use super::records::{expired_key, session_key};
use crate::agents::published_by;
use crate::context::{Context, stopped};

/// How often the hosts are looked at, as a part of lease and grace together.
const LOOKS_PER_LEASE: u32 = 8;
/// Shortest and longest time between two looks.
const LOOK_EVERY: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(10));
/// Workloads removed in one transaction: etcd takes 128 operations unless told otherwise.
const REMOVED_TOGETHER: usize = 100;

/// Looks after the hosts until `shutdown`.
pub(crate) async fn keep_leases(context: Arc<Context>, mut shutdown: watch::Receiver<bool>) {
    let kept = context.config.lease() + context.config.grace();
    let mut looks = tokio::time::interval((kept / LOOKS_PER_LEASE).clamp(LOOK_EVERY.0, LOOK_EVERY.1));
    looks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = looks.tick() => {}
            () = stopped(&mut shutdown) => return,
        }
        for host in gone(&context, kept) {
            expire(&context, &host).await;
        }
    }
}

/// Hosts that have had no session for longer than they are kept.
fn gone(context: &Context, kept: Duration) -> Vec<String> {
    let hosts: Vec<String> = {
        let view = context.repository.view();
        view.of_kind(Kind::Host).map(|host| host.resource.metadata().name.clone()).collect()
    };
    let now = Instant::now();
    let mut table = context.cluster.table_mut();
    let is_gone = |host: &String| {
        // Its session may wait to be registered while the store is away.
        if context.sessions.registry.is_connected(host) {
            table.is_here(host);
            return false;
        }
        table.gone_for(host, now).is_some_and(|silent| silent > kept)
    };
    hosts.into_iter().filter(is_gone).collect()
}

async fn expire(context: &Context, host: &str) {
    let gone = published_by(context, host);
    if gone.is_empty() {
        return;
    }
    for workloads in gone.chunks(REMOVED_TOGETHER) {
        match remove(context, host, workloads).await {
            Ok(()) => {}
            Err(StoreError::Conflict { .. }) => {
                tracing::info!(%host, "a host came back just before its workloads were removed");
                return;
            }
            // It is tried again at the next look.
            Err(error) => {
                tracing::error!(%host, %error, "the workloads of a lost host could not be removed");
                return;
            }
        }
    }
    context.metrics.hosts_expired.add(1);
    let workloads = gone.len();
    tracing::warn!(%host, workloads, "a host is unseen for too long: its workloads are removed");
}

async fn remove(context: &Context, host: &str, workloads: &[ObjectKey]) -> Result<(), StoreError> {
    let by = format!("{:?}", context.config.name);
    let besides = Transaction::new()
        // There is none: this changes nothing, and says that nothing must have.
        .delete(session_key(host), Precondition::Absent)
        .put(expired_key(host), by, Precondition::Any);
    context.repository.remove(workloads, besides).await
}
