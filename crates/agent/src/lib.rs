//! The agent: keeps one host's kernel in step with the repository.
//!
//! ```text
//! docker, directory ──found──►┐                       ┌──► dataplane (attach, replace, apply, poll, sweep)
//! links ─────────────changes─►│  reconcile loop       │
//! controller ───────messages─►│  (owns the engine and ├──► session: subscriptions, inventory, status
//! API socket ───────requests─►│   the dataplane)      ├──► disk: what to enforce after a restart
//! ring buffer, clock ────────►┘                       └──► flows: enrich, keep, report
//! ```
//!
//! | task | reads | queue bound | when full | at shutdown |
//! |---|---|---|---|---|
//! | reconcile | all inputs | [`config::INPUT_QUEUE_LEN`] | senders wait | sweeps once, leaves the kernel as it is |
//! | session | controller stream | [`config::OUTGOING_QUEUE_LEN`] | the session ends and resumes | stream closed |
//! | renewal | the clock | none | tried again every minute | dropped |
//! | flow report | records | [`config::FLOW_QUEUE_LEN`] | record dropped and counted | waits for the last batch, a second at most |
//! | docker, directory, links | their sources | 1 answer under way | source waits | dropped |
//! | API | unix socket | axum's | connection waits | closed |
//!
//! INVARIANT: nothing in the kernel is opened because this process ends, starts, loses the controller or does
//! not understand something. Tables change only by a computed policy.

use std::sync::Arc;

use bulkhead_dataplane::Dataplane;
use bulkhead_identity::{CredentialsError, TokenError};
use tokio::sync::{mpsc, watch};

mod address_book;
mod api;
mod clock;
pub mod config;
mod disk;
mod flows;
mod host_facts;
mod hosts;
mod inputs;
mod locals;
mod membership;
mod reconcile;
mod session;
mod trace;

pub use api::{AgentReport, Programmed};
pub use config::{Config, DataplaneChoice};
pub use disk::DiskError;
pub use membership::IDENTITY_FILES;

/// Why an agent could not start or had to stop.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The state directory cannot be used.
    #[error("cannot use the state directory: {0}")]
    Disk(#[from] DiskError),
    /// The API socket cannot be opened.
    #[error("cannot open the agent's socket {path}: {source}")]
    Socket {
        /// Its path.
        path: std::path::PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// What this host is known by cannot be used.
    #[error("cannot use this host's certificate: {0}")]
    Credentials(#[from] CredentialsError),
    /// The certificate is another's.
    #[error(
        "the state directory has the certificate of {holder}, and this is the agent of host {host:?}: give it a directory \
         of its own with --state-dir, or join again under this name with --join-token"
    )]
    OtherHost {
        /// Whose it is.
        holder: String,
        /// Name of this host.
        host: String,
    },
    /// The join token is none.
    #[error(transparent)]
    Token(#[from] TokenError),
    /// Interfaces cannot be watched.
    #[error("cannot watch interfaces: {0}")]
    Links(std::io::Error),
    /// The dataplane failed in a way that no retry mends.
    #[error("the dataplane failed: {0}")]
    Dataplane(#[from] bulkhead_dataplane::DataplaneError),
}

/// What tells one run of the kernel from the next (Documentation/admin-guide/sysctl/kernel.rst, `random`).
fn boot_id() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}

/// Runs until `shutdown` turns true.
///
/// `beat` is called when what is remembered is in force, and every few seconds from then on while the agent is well.
///
/// # Errors
/// If it cannot start, or another agent took over this host's dataplane.
pub async fn run(
    config: Config,
    dataplane: Box<dyn Dataplane>,
    mut shutdown: watch::Receiver<bool>,
    beat: impl Fn() + Send,
) -> Result<(), AgentError> {
    let config = Arc::new(config);
    let (disk, remembered) = disk::open(&config.state_directory, &boot_id())?;
    let (input, inputs) = mpsc::channel(config::INPUT_QUEUE_LEN);
    let (nudge, nudged) = mpsc::channel(1);
    inputs::spawn_sources(&config, &input, nudged)?;
    let facts = host_facts::observe();
    let membership = Arc::new(membership::open(&config)?);
    let renewing = tokio::spawn(Arc::clone(&membership).keep_current());
    let progress = remembered.progress.clone();
    let flows = flows::spawn(&membership);
    let session = session::spawn(Arc::clone(&config), membership, input.clone(), facts.clone(), progress);
    let api = api::spawn(&config, input, nudge, flows.watched())?;
    let mut agent =
        reconcile::Agent::new(Arc::clone(&config), facts, dataplane, disk, remembered, session, flows);
    let result = agent.run(inputs, &mut shutdown, &beat).await;
    api.abort();
    renewing.abort();
    agent.stop().await;
    result
}
