//! What everything in a controller shares.

use std::sync::Arc;

use bulkhead_identity::door::Door;
use tokio::sync::{Semaphore, watch};

use crate::access::{Grants, Oidc, Trust};
use crate::agents::Sessions;
use crate::api::Rates;
use crate::audit::Audit;
use crate::cluster::Cluster;
use crate::config::Config;
use crate::flows::Flows;
use crate::metrics::Metrics;
use crate::repository::Repository;

/// Most watches and followers at once; more are refused.
pub(crate) const STREAMS_MAX: usize = 4096;
/// Most evaluations and searches at once.
pub(crate) const SEARCHES_MAX: usize = 4;

/// Shared by the API, the agents' sessions and the background tasks.
#[derive(Debug)]
pub(crate) struct Context {
    pub(crate) config: Config,
    pub(crate) repository: Arc<Repository>,
    pub(crate) trust: Trust,
    pub(crate) grants: Grants,
    /// Who else may say who an operator is.
    pub(crate) oidc: Option<Oidc>,
    pub(crate) audit: Audit,
    /// How often each caller of the API has asked lately.
    pub(crate) rates: Rates,
    /// Who stands at the listeners' doors.
    pub(crate) doors: [(&'static str, Arc<Door>); 2],
    /// Agents', and what they share.
    pub(crate) sessions: Sessions,
    /// The other controllers.
    pub(crate) cluster: Cluster,
    pub(crate) flows: Flows,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) started_ms: u64,
    /// Answers that go on: each holds one until it ends.
    pub(crate) streams: Arc<Semaphore>,
    /// Evaluations and searches that take memory or a thread of their own; others wait.
    pub(crate) searches: Semaphore,
    /// Becomes true when everything is to stop.
    pub(crate) shutdown: watch::Receiver<bool>,
}

/// Completes when everything is to stop, or when whoever would say so is gone.
pub(crate) async fn stopped(shutdown: &mut watch::Receiver<bool>) {
    // The answer borrows the channel, which must not be held over other awaits.
    let _ = shutdown.wait_for(|stop| *stop).await;
}
