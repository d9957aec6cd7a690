//! How a controller or a relay ends: its agents are sent away, then its parts finish what is under way.

use std::time::Duration;

use tokio::task::{JoinError, JoinSet};

use crate::agents::{DRAIN_TIME_MAX, Registry};
use crate::{Error, SHUTDOWN_TIME_MAX};

/// What is added to the time over which agents are sent away, for those who go slowly.
const MARGIN: Duration = Duration::from_secs(1);
/// How often it is looked whether they have all gone.
const LOOK_EVERY: Duration = Duration::from_millis(10);

/// Waits until agents that are sent away have gone, but no longer than that takes.
pub(crate) async fn gone(registry: &Registry) {
    let gone = async {
        while registry.connected() > 0 {
            tokio::time::sleep(LOOK_EVERY).await;
        }
    };
    if tokio::time::timeout(DRAIN_TIME_MAX + MARGIN, gone).await.is_err() {
        tracing::warn!(agents = registry.connected(), "not all agents have gone elsewhere");
    }
}

/// Waits until all parts have ended, which were told to, or [`SHUTDOWN_TIME_MAX`] is over.
///
/// # Errors
/// If one of them failed.
pub(crate) async fn ended(parts: &mut JoinSet<Result<(), Error>>) -> Result<(), Error> {
    let mut result = Ok(());
    let all = async {
        while let Some(part) = parts.join_next().await {
            match part {
                Ok(Ok(())) => {}
                Ok(Err(error)) => result = Err(error),
                Err(error) => result = Err(panicked(&error)),
            }
        }
    };
    if tokio::time::timeout(SHUTDOWN_TIME_MAX, all).await.is_err() {
        tracing::warn!("not all requests were finished in time");
        parts.shutdown().await;
    }
    result
}

/// A part that did not end by itself.
pub(crate) fn panicked(error: &JoinError) -> Error {
    Error::Part { part: "server", reason: error.to_string() }
}
