//! etcd's leases.

use std::time::Duration;

use crate::random_id;
use crate::types::{LeaseId, StoreError};

use super::cluster::Cluster;

use etcd_client::LeaseGrantOptions;

/// What etcd says of a lease that it does not have: "requested lease not found", or the client's shorter text.
const NOT_FOUND: &str = "lease not found";
/// What it says of one that it has already.
const EXISTS: &str = "lease already exists";

pub(super) async fn grant(cluster: &Cluster, ttl: Duration) -> Result<LeaseId, StoreError> {
    // Named by us, so that asking again after a lost answer makes no second one.
    let id = i64::from_str_radix(&random_id()[..15], 16).unwrap_or_default().max(1);
    let seconds = i64::try_from(ttl.as_secs()).unwrap_or(i64::MAX).saturating_add(1);
    // Whole seconds, up.
    let seconds = if ttl.subsec_nanos() == 0 { (seconds - 1).max(1) } else { seconds };
    let options = LeaseGrantOptions::new().with_id(id);
    let granted = cluster.ask(|client| {
        let options = options.clone();
        async move { client.lease_client().grant(seconds, Some(options)).await }
    });
    match granted.await {
        Ok(_) => Ok(LeaseId(id)),
        Err(StoreError::Refused { reason, .. }) if reason.contains(EXISTS) => Ok(LeaseId(id)),
        Err(error) => Err(error),
    }
}

pub(super) async fn keep_alive(cluster: &Cluster, lease: LeaseId) -> Result<(), StoreError> {
    let kept = cluster.ask(|client| async move { client.lease_client().keep_alive(lease.0).await });
    kept.await.map(drop).map_err(|error| gone(error, lease))
}

pub(super) async fn revoke(cluster: &Cluster, lease: LeaseId) -> Result<(), StoreError> {
    let revoked = cluster.ask(|client| async move { client.lease_client().revoke(lease.0).await });
    revoked.await.map(drop).map_err(|error| gone(error, lease))
}

/// Refuses one that has ended.
pub(super) async fn check(cluster: &Cluster, lease: LeaseId) -> Result<(), StoreError> {
    let asked = cluster.ask(|client| async move { client.lease_client().time_to_live(lease.0, None).await });
    let left = asked.await.map_err(|error| gone(error, lease))?.ttl();
    if left < 0 { Err(StoreError::NoLease(lease)) } else { Ok(()) }
}

fn gone(error: StoreError, lease: LeaseId) -> StoreError {
    match error {
        StoreError::Refused { reason, .. } if reason.contains(NOT_FOUND) => StoreError::NoLease(lease),
        other => other,
    }
}
