//! A relay: a controller to the agents of a remote site, and one subscriber to a controller.
//!
//! Sessions with agents, the pump and the registry are the controller's own (`crate::agents`), told from a [`mirror`] of
//! what the relay was told instead of from the repository.
//!
//! | task | fed from | when full |
//! |---|---|---|
//! | uplink (one) | the controller; orders of the mirror, each selector once | the controller cuts off who reads nothing |
//! | agent session (one each, 10 000) | the mirror by wake-up; the agent's messages | as a controller's |
//! | lane (one for each session) | the agent's inventory and status (16 waiting) | the agent is not read |
//! | flow carrier (one for each stream) | the agent's batches (2 on their way) | the agent waits for receipts |
//! | keeper of the certificate, probes (one each) | the clock, HTTP | - |
//!
//! At shutdown agents are sent to others, then everything ends; what was not acknowledged they say again there.

mod desk;
mod lane;
mod mirror;
mod outbox;
mod probes;
mod reception;
mod uplink;

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bulkhead_identity::Identity;
use bulkhead_identity::door::Limits;
use bulkhead_identity::tls::{self, ServerIdentity, ServerSettings};
use bulkhead_membership::{Held, Membership, MembershipError, Place};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tonic::Code;

use crate::agents::{self, Sessions};
use crate::context::stopped;
use crate::{Error, listen, stopping};

use desk::Shared;

/// Name of the files of a relay's certificate and key.
pub const IDENTITY_FILES: &str = "relay";
/// What is spoken inside TLS.
const AGENTS_PROTOCOL: &str = "h2";
/// How long to wait before another attempt to join.
const JOIN_RETRY: Duration = Duration::from_secs(1);
/// How often an agent is to speak before a controller has said so: a third of a controller's default lease.
const HEARTBEAT_MS: u32 = 20_000;

/// Settings of a relay. Every field has a default; unknown fields are refused.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Config {
    /// Its name, which no other relay has; default: the host's name.
    pub name: String,
    /// Agent ports of the controllers, `https://HOST:PORT`; any of them will do.
    pub upstreams: Vec<String>,
    /// What it joins with, if it has no certificate yet: from `bulkhead token create --relay`.
    pub join_token: Option<String>,
    /// Where agents are served (gRPC over mutual TLS); default `127.0.0.1:7441`. Port 0 takes any free one.
    pub listen_agents: SocketAddr,
    /// Where it says that agents reach it, as `bulkhead status` shows it; default: where it listens.
    pub advertise_agents: Option<String>,
    /// Where `/metrics`, `/healthz` and `/readyz` are served, without TLS; default `127.0.0.1:7442`. Absent: nowhere.
    pub listen_probes: Option<SocketAddr>,
    /// Directory of its certificate; default `/var/lib/bulkhead/relay`.
    pub state_directory: PathBuf,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            name: rustix::system::uname().nodename().to_string_lossy().to_ascii_lowercase(),
            upstreams: vec!["https://127.0.0.1:7441".into()],
            join_token: None,
            listen_agents: SocketAddr::from((Ipv4Addr::LOCALHOST, 7441)),
            advertise_agents: None,
            listen_probes: Some(SocketAddr::from((Ipv4Addr::LOCALHOST, 7442))),
            state_directory: "/var/lib/bulkhead/relay".into(),
        }
    }
}

impl Config {
    /// Directory of its certificate, in files named [`IDENTITY_FILES`].
    pub fn identity_directory(&self) -> PathBuf {
        self.state_directory.join("identity")
    }
}

/// A running relay.
#[derive(Debug)]
pub struct Relay {
    /// Where agents are served.
    pub agents: SocketAddr,
    /// Where probes are, if anywhere.
    pub probes: Option<SocketAddr>,
    drain: watch::Sender<bool>,
    stop: watch::Sender<bool>,
    parts: JoinSet<Result<(), Error>>,
    shared: Arc<Shared>,
}

impl From<MembershipError> for Error {
    fn from(error: MembershipError) -> Self {
        Self::Part { part: "relay's certificate", reason: error.to_string() }
    }
}

/// Joins if that is to be done, binds, and serves. That no controller can be reached ends nothing: a relay that has a
/// certificate starts without.
///
/// # Errors
/// If it may not join, or cannot listen.
pub async fn start(config: Config) -> Result<Relay, Error> {
    let broken = |error: &dyn std::error::Error| Error::Part {
        part: "relay's certificate",
        reason: error.to_string(),
    };
    let identity = Identity::relay(&config.name).map_err(|error| broken(&error))?;
    let place = Place {
        identity,
        directory: config.identity_directory(),
        files: IDENTITY_FILES,
        token: config.join_token.clone(),
        controllers: config.upstreams.clone(),
    };
    let membership = Arc::new(Membership::open(place)?);
    let listener = listen(config.listen_agents, "agents")?;
    let probes = config.listen_probes.map(|address| listen(address, "probes")).transpose()?;
    let address = |listener: &tokio::net::TcpListener, wanted| listener.local_addr().unwrap_or(wanted);
    let agents_address = address(&listener, config.listen_agents);
    let probes_address = probes.as_ref().and_then(|listener| listener.local_addr().ok());
    if membership.has_token_of_another_authority() {
        // What it has may be of a fleet that is no more; agents are shown one authority.
        if let Err(status) = membership.connect().await {
            tracing::warn!(reason = status.message(), "the relay has not joined anew");
        }
    }
    let own = loop {
        if let Some(own) = membership.valid_credentials() {
            break own;
        }
        match membership.connect().await {
            Ok(_joined) => {}
            Err(status)
                if matches!(
                    status.code(),
                    Code::PermissionDenied | Code::Unauthenticated | Code::FailedPrecondition
                ) =>
            {
                return Err(Error::Part { part: "relay's certificate", reason: status.message().to_owned() });
            }
            Err(status) => {
                tracing::warn!(reason = status.message(), "the relay has not joined: trying again");
                membership.try_another();
                tokio::time::sleep(JOIN_RETRY).await;
            }
        }
    };
    // Before it is used: what is taken up from here on is heard of.
    let mut changes = membership.changes();
    let server = ServerIdentity::new(&own).map_err(|error| broken(&error))?;
    let config_of_tls =
        tls::server_config(&server, &own.authorities, AGENTS_PROTOCOL).map_err(|error| broken(&error))?;
    let advertised = config.advertise_agents.unwrap_or_else(|| agents_address.to_string());
    let (stop, shutdown) = watch::channel(false);
    let (drain, draining) = watch::channel(false);
    let (sessions, door) =
        tls::listen_within(listener, Arc::clone(&config_of_tls), "agents", Limits::default());
    let shared = Arc::new_cyclic(|this| Shared {
        this: this.clone(),
        name: config.name.clone(),
        agents_at: advertised.clone(),
        sessions: Sessions::new(Arc::default(), draining, shutdown.clone()),
        counters: desk::Counters::default(),
        door,
        mirror: std::sync::RwLock::default(),
        membership: Arc::clone(&membership),
        line: watch::Sender::new(None),
        is_out: false.into(),
        heartbeat_ms: HEARTBEAT_MS.into(),
        lanes: std::sync::Mutex::default(),
        kept_out: std::sync::Mutex::default(),
        refused: std::sync::Mutex::default(),
    });
    let mut parts = JoinSet::new();
    let part = |part, result: Result<(), String>| result.map_err(|reason| Error::Part { part, reason });
    let serving = agents::serve(sessions, Arc::clone(&shared), shutdown.clone());
    parts.spawn(async move { part("agents' server", serving.await.map_err(|error| error.to_string())) });
    let (own, mut shut) = (Arc::clone(&shared), shutdown.clone());
    parts.spawn(async move {
        uplink::run(own, shut.clone()).await;
        stopped(&mut shut).await;
        Ok(())
    });
    let mut shut = shutdown.clone();
    parts.spawn(async move {
        tokio::select! {
            () = Arc::clone(&membership).keep_current() => {}
            () = show_current(&mut changes, &server, &config_of_tls) => {}
            () = stopped(&mut shut) => {}
        }
        Ok(())
    });
    if let Some(probes) = probes {
        let serving = probes::serve(probes, Arc::clone(&shared), shutdown);
        parts.spawn(async move { part("probes", serving.await.map_err(|error| error.to_string())) });
    }
    tracing::info!(name = config.name, agents = advertised, "relay serves");
    Ok(Relay { agents: agents_address, probes: probes_address, drain, stop, parts, shared })
}

/// Shows agents a renewed certificate, and lets them in by the authorities that it came with.
async fn show_current(
    changes: &mut watch::Receiver<Option<Held>>,
    server: &ServerIdentity,
    settings: &ServerSettings,
) {
    while changes.changed().await.is_ok() {
        let held = changes.borrow_and_update().clone();
        let Some(Held { credentials: now, .. }) = held else { continue };
        if let Err(error) = settings.trust(&now.authorities).and_then(|()| server.replace(&now)) {
            tracing::error!(%error, "the relay's new certificate cannot be used");
        }
    }
}

impl Relay {
    /// Waits until a part ends that must not.
    pub async fn failed(&mut self) -> Error {
        match self.parts.join_next().await {
            Some(Ok(Err(error))) => error,
            Some(Err(error)) => stopping::panicked(&error),
            Some(Ok(Ok(()))) | None => Error::Part { part: "relay", reason: "unexpectedly".into() },
        }
    }

    /// Sends the agents elsewhere, and stops serving.
    ///
    /// # Errors
    /// If a part failed.
    pub async fn shutdown(mut self) -> Result<(), Error> {
        self.drain.send_replace(true);
        stopping::gone(&self.shared.sessions.registry).await;
        self.stop.send_replace(true);
        let result = stopping::ended(&mut self.parts).await;
        tracing::info!("relay has stopped");
        result
    }
}
