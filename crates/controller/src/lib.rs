//! The controller: keeps the repository, serves operators and agents, collects flows.
//!
//! [`start`] makes one and answers its addresses; whoever started it waits for [`Controller::failed`] and ends it.
//!
//! Tasks and threads, with what they are fed from and what happens when that is full:
//!
//! | task | fed from | when full |
//! |---|---|---|
//! | store writer (thread, one) | queue of transactions (4096) | writers wait; on a full disk changes are refused |
//! | audit log (blocking pool, one at a time) | lines of requests | the request waits; on a full disk changes are refused |
//! | feeder (one) | the store's log (100 000 changes), at its own pace | it ends, and the controller with it |
//! | etcd watches (one each for the feeder and REST watches) | etcd, 16 messages waiting | etcd keeps what comes after, until it is compacted |
//! | API connections (one each) | the client | the client waits; bodies end at 16 MiB |
//! | REST watch (one each) | the store's log, at its own pace | ERROR event 410, the client lists again |
//! | agent session (one each) | repository by wake-up, at its own pace; the agent's messages | outgoing messages (64): an agent that takes none for ten seconds is cut off and resumes by revision |
//! | flow report (one each) | the agent's batches | the agent waits for receipts |
//! | flow writer (thread, one) | queue of batches (1024) | not written, counted |
//! | flow follower (one each) | broadcast of batches (256) | misses some, counted and told |
//! | keeper of lost hosts (one) | the clock | - |
//! | follower of the other controllers (one) | the store's log, at its own pace | it ends, and the controller with it |
//! | keeper of the own lease (one) | the clock | - |
//! | registrar of sessions (one) | hosts whose session is to be written, each once | - |
//! | keeper of deadlines (one) | the clock, changes that wait for confirmation (100) | more are refused |
//!
//! At shutdown agents are first sent to the other controllers, if there are any. Then streams end, requests under way are finished within [`SHUTDOWN_TIME_MAX`], flows are written,
//! and the store is closed last.

mod access;
mod agents;
mod api;
mod audit;
mod clock;
mod cluster;
mod config;
mod confirm;
mod context;
mod fields;
mod flows;
mod guard;
mod members;
mod metrics;
#[cfg(test)]
mod modelled;
pub mod relay;
mod repository;
mod stopping;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bulkhead_identity::door::Door;
use bulkhead_identity::{Credentials, Identity};
use bulkhead_store::StoreError;
use tokio::net::{TcpListener, TcpSocket};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;

pub use access::{OidcConfig, TrustError};
pub use audit::{AuditError, verify as verify_audit};
pub use config::{Config, EtcdConfig, StoreKind};

use access::{Grants, Oidc, Trust};
use agents::Sessions;
use api::Rates;
use audit::Audit;
use cluster::{Cluster, ControllerRecord};
use context::{Context, SEARCHES_MAX, STREAMS_MAX};
use flows::Flows;
use metrics::Metrics;
use repository::Repository;

/// Longest that requests under way may take once the controller stops.
pub const SHUTDOWN_TIME_MAX: Duration = Duration::from_secs(5);

/// Why a controller did not start, or ended.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The repository cannot be opened or has failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The flow records, or what else is kept beside them, cannot be opened.
    #[error("cannot open the flow records: {0}")]
    Flows(String),
    /// An address cannot be listened on.
    #[error("cannot listen on {address} for {purpose}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// What for.
        purpose: &'static str,
        /// Why not.
        source: std::io::Error,
    },
    /// The Unix socket cannot be made.
    #[error("cannot listen on {path}")]
    Socket {
        /// Its path.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// The audit log cannot be written.
    #[error("cannot open the audit log: {0}")]
    Audit(#[from] AuditError),
    /// There is no identity that others could trust.
    #[error(transparent)]
    Identity(#[from] TrustError),
    /// Another controller of the repository has the name.
    #[error(
        "a controller named {name:?} is registered already (API at {api}, since {since}): \
         give this one another name (--name), or stop the other"
    )]
    NameTaken {
        /// The name.
        name: String,
        /// Where the other serves operators.
        api: String,
        /// Since when it has been there.
        since: String,
    },
    /// A part of the controller ended that must not.
    #[error("the {part} ended: {reason}")]
    Part {
        /// Which.
        part: &'static str,
        /// Why.
        reason: String,
    },
}

/// A running controller.
#[derive(Debug)]
pub struct Controller {
    /// Where operators are served.
    pub api: SocketAddr,
    /// Where agents are served.
    pub agents: SocketAddr,
    drain: watch::Sender<bool>,
    stop: watch::Sender<bool>,
    parts: JoinSet<Result<(), Error>>,
    context: Arc<Context>,
}

/// Opens the repository, binds both listeners and serves.
///
/// # Errors
/// If the repository, the flow records or a listener cannot be opened.
pub async fn start(config: Config) -> Result<Controller, Error> {
    let api = listen(config.listen_api, "operators")?;
    let agents = listen(config.listen_agents, "agents")?;
    let (stop, shutdown) = watch::channel(false);
    let (drain, draining) = watch::channel(false);
    let bound = |listener: &TcpListener, address| listener.local_addr().unwrap_or(address);
    let api_address = bound(&api, config.listen_api);
    let agents_address = bound(&agents, config.listen_agents);
    let trust = Trust::open(&config, &[api_address, agents_address])?;
    let (operators, operators_door) = access::operators(api, &trust)?;
    let (sessions, agents_door) = access::agents(agents, &trust)?;
    let doors = [("operators", operators_door), ("agents", agents_door)];
    let socket = config.socket.as_deref().map(|path| {
        access::unix_listener(path).map_err(|source| Error::Socket { path: path.to_owned(), source })
    });
    let socket = socket.transpose()?;
    let served = [api_address, agents_address];
    let context = Arc::new(open(config, trust, (served, doors), (draining, shutdown.clone())).await?);

    let mut parts = JoinSet::new();
    let feed = repository::feed(Arc::clone(&context.repository), shutdown.clone());
    parts.spawn(async move { feed.await.map_err(Error::Store) });
    let part = |part, result: Result<(), String>| result.map_err(|reason| Error::Part { part, reason });
    let following = access::follow(Arc::clone(&context), shutdown.clone());
    parts.spawn(async move { following.await.map_err(Error::Store) });
    let keeping = access::keep_certificate(Arc::clone(&context), shutdown.clone());
    parts.spawn(async move {
        keeping.await;
        Ok(())
    });
    let serving = api::serve(operators, socket, Arc::clone(&context), shutdown.clone());
    parts.spawn(async move { part("API", serving.await.map_err(|error| error.to_string())) });
    let serving = agents::serve(sessions, Arc::clone(&context), shutdown.clone());
    parts.spawn(async move { part("agents' server", serving.await.map_err(|error| error.to_string())) });
    let deadlines = confirm::keep_deadlines(Arc::clone(&context), shutdown.clone());
    parts.spawn(async move {
        deadlines.await;
        Ok(())
    });
    let following = cluster::follow(Arc::clone(&context), shutdown.clone());
    parts.spawn(async move { following.await.map_err(Error::Store) });
    let (own, shut) = (Arc::clone(&context), shutdown.clone());
    parts.spawn(async move {
        tokio::join!(
            cluster::keep_lease(Arc::clone(&own), shut.clone()),
            cluster::register(Arc::clone(&own), shut.clone()),
            cluster::keep_leases(own, shut),
        );
        Ok(())
    });
    tracing::info!(api = %api_address, agents = %agents_address, "controller serves");
    Ok(Controller { api: api_address, agents: agents_address, drain, stop, parts, context })
}

impl Controller {
    /// New credentials for the agent of a host, for whoever runs it in the controller's own process.
    ///
    /// # Errors
    /// If the host cannot have this name, or somebody else signs for this fleet.
    pub fn agent_credentials(&self, host: &str) -> Result<Credentials, Error> {
        let broken =
            |error: &dyn std::error::Error| Error::Part { part: "authority", reason: error.to_string() };
        let identity = Identity::agent(host).map_err(|error| broken(&error))?;
        let Some(authority) = &self.context.trust.authority else {
            let reason = "somebody else signs for this fleet: give the agent its certificate in files".into();
            return Err(Error::Part { part: "authority", reason });
        };
        let lifetime = self.context.config.certificate_lifetime();
        let issued = authority.issue(&identity, lifetime, clock::system(), &[]);
        issued.map_err(|error| broken(&error))
    }

    /// Whose certificates this controller trusts, as PEM.
    pub fn authorities(&self) -> &str {
        &self.context.trust.authorities
    }

    /// Waits until a part ends that must not.
    pub async fn failed(&mut self) -> Error {
        match self.parts.join_next().await {
            Some(Ok(Err(error))) => error,
            Some(Err(error)) => stopping::panicked(&error),
            Some(Ok(Ok(()))) | None => Error::Part { part: "server", reason: "unexpectedly".into() },
        }
    }

    /// Has agents go to the other controllers, if there are any, while everything still works.
    async fn send_agents_away(&self) {
        if self.context.cluster.others().is_empty() {
            return;
        }
        self.drain.send_replace(true);
        stopping::gone(&self.context.sessions.registry).await;
    }

    /// Stops serving, finishes what is under way, and closes the files.
    ///
    /// # Errors
    /// If a part failed.
    pub async fn shutdown(mut self) -> Result<(), Error> {
        self.send_agents_away().await;
        self.stop.send_replace(true);
        let result = stopping::ended(&mut self.parts).await;
        self.context.flows.close().await;
        self.context.cluster.close().await;
        tracing::info!("controller has stopped");
        result
    }
}

async fn open(
    config: Config,
    trust: Trust,
    (served, doors): ([SocketAddr; 2], [(&'static str, Arc<Door>); 2]),
    (draining, shutdown): (watch::Receiver<bool>, watch::Receiver<bool>),
) -> Result<Context, Error> {
    let store = config.location().open().await?;
    let grants = Grants::open(Arc::clone(&store)).await?;
    let repository = Arc::new(Repository::open(Arc::clone(&store)).await?);
    let metrics = Arc::new(Metrics::default());
    let directory = match config.store {
        StoreKind::Embedded | StoreKind::Etcd => Some(config.data_directory.as_path()),
        StoreKind::Memory => None,
    };
    if let Some(directory) = directory {
        // Nobody else makes it if the repository is in etcd.
        std::fs::create_dir_all(directory)
            .map_err(|error| Error::Flows(format!("{}: {error}", directory.display())))?;
    }
    let audit = Audit::open(directory.map(|directory| directory.join("audit")), Arc::clone(&metrics))?;
    let flows = Flows::open(
        directory,
        config.flow_records_in_memory,
        config.flow_records_on_disk,
        Arc::clone(&repository),
        Arc::clone(&metrics),
    )
    .map_err(|error| Error::Flows(error.to_string()))?;
    let started_ms = clock::now_ms();
    // After the files that nobody else can have open: what is registered with this directory is then our own.
    let instance = cluster::instance(directory)
        .map_err(|error| Error::Flows(format!("{}: {error}", config.data_directory.display())))?;
    let [api, agents] = config.advertised(served);
    let (name, version) = (config.name.clone(), env!("CARGO_PKG_VERSION").to_owned());
    let own = ControllerRecord { name, api, agents, version, since_ms: started_ms, instance };
    let cluster = Cluster::open(store, own, config.controller_lease()).await?;
    Ok(Context {
        cluster,
        repository,
        trust,
        grants,
        oidc: config.oidc.clone().map(Oidc::new),
        config,
        audit,
        rates: Rates::default(),
        doors,
        sessions: Sessions::new(Arc::clone(&metrics), draining, shutdown.clone()),
        flows,
        metrics,
        started_ms,
        streams: Arc::new(Semaphore::new(STREAMS_MAX)),
        searches: Semaphore::new(SEARCHES_MAX),
        shutdown,
    })
}

/// Connections that wait to be accepted, as far as the kernel lets us (`net.core.somaxconn`): a whole fleet may come back at
/// once, and whoever finds no place is reset or tries again after a second.
const BACKLOG: u32 = 16_384;

fn listen(address: SocketAddr, purpose: &'static str) -> Result<TcpListener, Error> {
    let bind = || {
        let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
        socket.set_reuseaddr(true)?;
        socket.bind(address)?;
        socket.listen(BACKLOG)
    };
    bind().map_err(|source| Error::Listen { address, purpose, source })
}
