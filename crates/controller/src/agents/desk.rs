//! Whom agents speak with: a controller, or a relay in its place. Sessions are the same with both.

use std::collections::HashSet;
use std::sync::{Arc, RwLockReadGuard, RwLockWriteGuard};
use std::time::Duration;

use bulkhead_identity::Holder;
use bulkhead_model::resource::Host;
use bulkhead_wire::proto::{
    AgentStatus, EnrollRequest, Enrollment, FlowBatch, FlowReceipt, Hello, Inventory, InventoryAck,
    RenewRequest,
};
use tokio::sync::{Semaphore, mpsc, watch};
use tonic::{Status, Streaming};

use super::registry::Registry;
use super::source::Source;
use super::{Enrolling, Pace};
use crate::access::{HostPatterns, Revocation, Revoked};
use crate::guard::Ends;
use crate::members::SessionId;
use crate::metrics::Metrics;

/// Most agents that are told at the same time what they lack when they connect. Each takes a transaction for its host and up
/// to a snapshot of all policies: so many fill the store's groups, and their snapshots are far below a tenth of the memory.
const SYNCING_MAX: usize = 256;

/// Who calls: by his certificate, which is neither ended nor revoked.
#[derive(Debug, Clone)]
pub(crate) struct Caller {
    pub(crate) holder: Arc<Holder>,
    /// What was shown, DER, the holder's own certificate first.
    pub(crate) chain: Arc<Vec<Vec<u8>>>,
    pub(crate) ends: Ends,
}

/// For whom a session is.
#[derive(Debug, Clone)]
pub(crate) enum Part {
    /// A host's agent.
    Agent,
    /// A relay, which hears what all its agents do. It may speak for these hosts; whether that is so since after what it
    /// knows, so that it hears everything anew.
    Relay { hosts: HostPatterns, changed: bool },
    /// A host behind a relay: what it says, and nothing of what it hears.
    Lane,
}

/// Whose a session is.
#[derive(Debug, Clone)]
pub(crate) struct Speaker {
    pub(crate) part: Part,
    /// The host; for a relay's own session its identity, which is no name of a host.
    pub(crate) key: Arc<str>,
    pub(crate) holder: Arc<Holder>,
    /// The relay that speaks for the host.
    pub(crate) via: Option<Arc<Holder>>,
    /// The agent's connection, if its ends are known.
    pub(crate) ends: Option<Ends>,
}

/// A session that begins.
#[derive(Debug)]
pub(crate) struct Begin<'a> {
    pub(crate) id: SessionId,
    pub(crate) speaker: &'a Speaker,
    pub(crate) caller: &'a Caller,
    pub(crate) hello: &'a Hello,
    /// Revision of what it is told from, before that.
    pub(crate) began: u64,
    /// Where acknowledgements go that come later than at once.
    pub(crate) acks: &'a mpsc::Sender<InventoryAck>,
}

/// What an agent says of its host, to be stored.
#[derive(Debug)]
pub(crate) enum Publication {
    Host(Box<Host>),
    Inventory(Inventory),
}

/// What has become of a [`Publication`].
#[derive(Debug)]
pub(crate) enum Published {
    Acknowledged(InventoryAck),
    /// There is nothing to say, or the acknowledgement comes later.
    Silently,
    /// The store's disk is full: it is to be said again.
    NoRoom(Publication),
}

/// Batches of one agent, and where their receipts go.
pub(crate) type FlowStreams = (Streaming<FlowBatch>, mpsc::Sender<Result<FlowReceipt, Status>>);

/// What all sessions share.
#[derive(Debug)]
pub(crate) struct Sessions {
    pub(crate) registry: Registry,
    pub(crate) metrics: Arc<Metrics>,
    /// How often each address has tried to join lately.
    pub(crate) enrolling: Enrolling,
    /// Agents that are being told what they lack when they connect: each holds one until it has been told, and the others
    /// are sent away for a moment.
    pub(crate) syncing: Arc<Semaphore>,
    pub(crate) pace: Pace,
    /// Becomes true before everything stops, when agents are to go to others.
    pub(crate) draining: watch::Receiver<bool>,
    /// Becomes true when everything is to stop.
    pub(crate) shutdown: watch::Receiver<bool>,
}

impl Sessions {
    /// None yet. They are sent away, and stop, when these turn true.
    pub(crate) fn new(
        metrics: Arc<Metrics>,
        draining: watch::Receiver<bool>,
        shutdown: watch::Receiver<bool>,
    ) -> Self {
        Self {
            registry: Registry::default(),
            metrics,
            enrolling: Enrolling::default(),
            syncing: Arc::new(Semaphore::new(SYNCING_MAX)),
            pace: Pace::default(),
            draining,
            shutdown,
        }
    }
}

/// What sessions need of whoever holds them.
#[async_trait::async_trait]
pub(crate) trait Desk: Send + Sync + 'static {
    type Source: Source + Send + Sync;
    /// Whether relays may come.
    const SERVES_RELAYS: bool;

    /// What is told. Not to be held over an await.
    fn source(&self) -> RwLockReadGuard<'_, Self::Source>;
    fn source_mut(&self) -> RwLockWriteGuard<'_, Self::Source>;
    fn sessions(&self) -> &Sessions;
    /// Of what is told now.
    fn epoch(&self) -> String;
    /// As agents hear it.
    fn name(&self) -> String;
    /// How long an agent may be silent.
    fn lease(&self) -> Duration;
    /// How often an agent is to speak, in milliseconds.
    fn heartbeat_ms(&self) -> u32;
    fn revoked(&self, holder: &Holder) -> bool;
    /// Revocations that concern a relay of these hosts and are not among `told`, which they are from then on.
    fn revocations(&self, hosts: &HostPatterns, told: &mut HashSet<(Revoked, u64)>) -> Vec<Revocation>;
    /// Whose session a first message begins.
    fn speaker(&self, caller: &Caller, hello: &Hello) -> Result<Speaker, Status>;
    /// Makes a session's host known to others. Answers when the agent may be told what there is, and what is to be published
    /// before.
    async fn begin(&self, begin: Begin<'_>) -> Result<Option<Publication>, Status>;
    fn end(&self, speaker: &Speaker, id: SessionId);
    /// Takes in what a host is, or what runs on it.
    async fn publish(
        &self,
        host: &Arc<str>,
        id: SessionId,
        publication: Publication,
    ) -> Result<Published, Status>;
    /// Takes in how an agent is.
    async fn status(&self, host: &Arc<str>, id: SessionId, status: AgentStatus);
    /// `caller`: whoever passes the request on, if he has shown a certificate.
    async fn enroll(&self, caller: Option<Caller>, request: EnrollRequest) -> Result<Enrollment, Status>;
    async fn renew(&self, caller: Caller, request: RenewRequest) -> Result<Enrollment, Status>;
    /// Takes in flow records until either side ends.
    async fn flows(&self, caller: Caller, streams: FlowStreams);
}
