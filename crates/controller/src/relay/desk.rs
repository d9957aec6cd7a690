//! The relay as whom agents speak with: it tells them what it was told, and carries up what they say.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard, Weak};
use std::time::Duration;

use bulkhead_identity::door::Door;
use bulkhead_identity::{Holder, Identity};
use bulkhead_membership::Membership;
use bulkhead_model::resource::is_name;
use bulkhead_wire::proto;
use bulkhead_wire::proto::distribution_client::DistributionClient;
use bulkhead_wire::proto::{AgentStatus, EnrollRequest, Enrollment, Hello, Relayed, RenewRequest};
use bulkhead_wire::{MESSAGE_BYTES_MAX, come_back_elsewhere};
use tokio::sync::{mpsc, oneshot, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;
use tonic::transport::Channel;

use super::lane::{self, INPUTS_LEN, Input, Whose};
use super::mirror::Mirror;
use crate::access::{HostPatterns, REVOCATIONS_MAX, Revocation, Revoked};
use crate::agents::{
    Begin, Caller, Desk, FlowStreams, Part, Publication, Published, RELAY_AGENTS_MAX, Sessions, Speaker,
};
use crate::context::stopped;
use crate::members::SessionId;
use crate::metrics::Counter;

/// Most certificates that are remembered as refused.
const REFUSED_MAX: usize = 10_000;
/// How long an agent stays away from a relay that knows nothing yet.
const NOT_READY_AWAY: Duration = Duration::from_millis(500);
/// How long one stays away from a relay that is full.
const FULL_AWAY: Duration = Duration::from_secs(5);
/// Longest that an agent waits for the controller's word on it; then what is known here decides.
const ADMISSION_TIME_MAX: Duration = Duration::from_secs(10);
/// Longest that an answer about a certificate may take.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(15);
/// Batches of one agent that are on their way.
const BATCHES_LEN: usize = 2;

/// A connection to a controller over which the relay's own session is open.
#[derive(Debug, Clone)]
pub(super) struct Line {
    pub(super) channel: Channel,
}

/// What a relay counts besides what a controller does.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) upstream_messages: Counter,
    pub(super) upstream_bytes: Counter,
    pub(super) upstream_lost: Counter,
    pub(super) flow_batches: Counter,
}

/// What everything in a relay shares.
#[derive(Debug)]
pub(super) struct Shared {
    /// Itself, for the tasks that it starts.
    pub(super) this: Weak<Self>,
    pub(super) name: String,
    /// Where agents reach it, as it says.
    pub(super) agents_at: String,
    pub(super) sessions: Sessions,
    pub(super) counters: Counters,
    /// Who stands at the agents' door.
    pub(super) door: Arc<Door>,
    pub(super) mirror: RwLock<Mirror>,
    pub(super) membership: Arc<Membership>,
    pub(super) line: watch::Sender<Option<Line>>,
    /// Whether the controller has refused the relay itself.
    pub(super) is_out: AtomicBool,
    pub(super) heartbeat_ms: AtomicU32,
    pub(super) lanes: Mutex<HashMap<Arc<str>, Lane>>,
    /// What controllers have said is not to be let in.
    pub(super) kept_out: Mutex<HashMap<Revoked, Revocation>>,
    /// Serials that the controller has refused, the newest last.
    pub(super) refused: Mutex<VecDeque<String>>,
}

/// A host's session, and where what it says goes up.
type Lane = (SessionId, mpsc::Sender<Input>);

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    pub(super) fn mirror(&self) -> RwLockReadGuard<'_, Mirror> {
        self.mirror.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn mirror_mut(&self) -> RwLockWriteGuard<'_, Mirror> {
        self.mirror.write().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn lanes(&self) -> usize {
        lock(&self.lanes).len()
    }

    /// While no controller can be asked, whoever has this is not let in.
    pub(super) fn remember_refused(&self, serial: &str) {
        let mut refused = lock(&self.refused);
        if !refused.iter().any(|known| known == serial) {
            refused.push_back(serial.to_owned());
        }
        if refused.len() > REFUSED_MAX {
            refused.pop_front();
        }
    }

    /// The controller says who is not to be let in. Sessions that they have end.
    pub(super) fn keep_out(&self, told: proto::Revocations) {
        {
            let mut kept_out = lock(&self.kept_out);
            for proto::Revocation { serial, host, since_ms } in told.revocations {
                let of = if serial.is_empty() {
                    Revoked::Holder(Identity::Agent(host).to_string())
                } else {
                    Revoked::Serial(serial)
                };
                let one = Revocation { of: of.clone(), since_ms, by: String::new(), reason: String::new() };
                // As many as there may be at a controller.
                if kept_out.len() < REVOCATIONS_MAX || kept_out.contains_key(&of) {
                    kept_out.insert(of, one);
                }
            }
        }
        let revoked = |holder: &Holder| self.revoked(holder);
        self.sessions.registry.close_where(revoked, || Status::unauthenticated("the certificate is revoked"));
    }

    pub(super) fn forget_refused(&self, serial: &str) {
        lock(&self.refused).retain(|known| known != serial);
    }

    fn channel(&self) -> Result<Channel, Status> {
        let line = self.line.borrow();
        let line =
            line.as_ref().ok_or_else(|| Status::unavailable("this relay reaches no controller now"))?;
        Ok(line.channel.clone())
    }

    fn client(&self) -> Result<DistributionClient<Channel>, Status> {
        let client = DistributionClient::new(self.channel()?);
        Ok(client.max_encoding_message_size(MESSAGE_BYTES_MAX).max_decoding_message_size(MESSAGE_BYTES_MAX))
    }

    /// `None`: the host has another session by now.
    fn lane(&self, host: &Arc<str>, id: SessionId) -> Option<mpsc::Sender<Input>> {
        let lanes = lock(&self.lanes);
        lanes.get(host).filter(|(session, _)| *session == id).map(|(_, lane)| lane.clone())
    }
}

fn relayed(caller: &Caller) -> Relayed {
    Relayed {
        certificates: caller.chain.iter().cloned().map(Into::into).collect(),
        remote: caller.ends.remote.to_string(),
        local: caller.ends.local.to_string(),
    }
}

#[async_trait::async_trait]
impl Desk for Shared {
    type Source = Mirror;
    const SERVES_RELAYS: bool = false;

    fn source(&self) -> RwLockReadGuard<'_, Mirror> {
        self.mirror()
    }

    fn source_mut(&self) -> RwLockWriteGuard<'_, Mirror> {
        self.mirror_mut()
    }

    fn sessions(&self) -> &Sessions {
        &self.sessions
    }

    fn epoch(&self) -> String {
        self.mirror().epoch().to_owned()
    }

    fn name(&self) -> String {
        format!("relay/{}", self.name)
    }

    fn lease(&self) -> Duration {
        Duration::from_millis(self.heartbeat_ms.load(Ordering::Relaxed).into()) * 3
    }

    fn heartbeat_ms(&self) -> u32 {
        self.heartbeat_ms.load(Ordering::Relaxed)
    }

    fn revoked(&self, holder: &Holder) -> bool {
        let of = [Revoked::Serial(holder.serial.clone()), Revoked::Holder(holder.identity.to_string())];
        let kept_out = lock(&self.kept_out);
        if of.iter().filter_map(|of| kept_out.get(of)).any(|one| one.covers(holder)) {
            return true;
        }
        drop(kept_out);
        // With a controller there, its word on each session counts, and not what it said before.
        self.line.borrow().is_none() && lock(&self.refused).contains(&holder.serial)
    }

    fn revocations(&self, _hosts: &HostPatterns, _told: &mut HashSet<(Revoked, u64)>) -> Vec<Revocation> {
        // It serves no relays.
        Vec::new()
    }

    fn speaker(&self, caller: &Caller, hello: &Hello) -> Result<Speaker, Status> {
        let holder = &caller.holder;
        let Identity::Agent(host) = &holder.identity else {
            self.sessions.metrics.agents_refused.add(1);
            return Err(Status::permission_denied(format!("a relay serves agents, not {}", holder.identity)));
        };
        if hello.relayed.is_some() || *host != hello.host || !is_name(host) {
            self.sessions.metrics.agents_refused.add(1);
            return Err(Status::permission_denied(format!(
                "the certificate is of {}, not of host {:?}",
                holder.identity, hello.host
            )));
        }
        if self.is_out.load(Ordering::Relaxed) {
            return Err(come_back_elsewhere(
                NOT_READY_AWAY,
                "this relay may not serve any more: go to another",
            ));
        }
        let (ready, connected, behind) = {
            let mirror = self.mirror();
            let behind = mirror.epoch() == hello.epoch && hello.revision > mirror.revision();
            (mirror.is_ready(), mirror.is_connected(), behind)
        };
        if !ready {
            return Err(come_back_elsewhere(NOT_READY_AWAY, "this relay has not reached a controller yet"));
        }
        // It would be told of the past, and nobody knows for how long.
        if behind && !connected {
            return Err(come_back_elsewhere(
                NOT_READY_AWAY,
                "this relay reaches no controller, and knows less",
            ));
        }
        if self.sessions.registry.connected() >= RELAY_AGENTS_MAX
            && !self.sessions.registry.is_connected(host)
        {
            return Err(come_back_elsewhere(FULL_AWAY, "this relay serves as many agents as it may"));
        }
        let (holder, ends) = (Arc::clone(holder), Some(caller.ends));
        Ok(Speaker { part: Part::Agent, key: host.as_str().into(), holder, via: None, ends })
    }

    async fn begin(&self, begin: Begin<'_>) -> Result<Option<Publication>, Status> {
        let Begin { id, speaker, caller, hello, acks, .. } = begin;
        let (inputs, waiting) = mpsc::channel(INPUTS_LEN);
        let (admitted, admission) = oneshot::channel();
        // What the agent knows is told by this relay.
        let hello = Hello {
            epoch: String::new(),
            revision: 0,
            accepts: Vec::new(),
            relayed: Some(relayed(caller)),
            ..hello.clone()
        };
        let whose = Whose {
            host: Arc::clone(&speaker.key),
            session: id,
            serial: speaker.holder.serial.clone(),
            hello,
            acks: acks.clone(),
            admitted: Some(admitted),
        };
        lock(&self.lanes).insert(Arc::clone(&speaker.key), (id, inputs));
        let this = self.this.upgrade().ok_or_else(|| Status::unavailable("the relay stops"))?;
        tokio::spawn(lane::run(this, whose, waiting));
        match tokio::time::timeout(ADMISSION_TIME_MAX, admission).await {
            Ok(Ok(result)) => result.map(|()| None),
            Ok(Err(_ended)) => Err(Status::unavailable("the relay stops")),
            Err(_elapsed) => Ok(None),
        }
    }

    fn end(&self, speaker: &Speaker, id: SessionId) {
        let mut lanes = lock(&self.lanes);
        if lanes.get(&speaker.key).is_some_and(|(session, _)| *session == id) {
            lanes.remove(&speaker.key);
        }
    }

    async fn publish(
        &self,
        host: &Arc<str>,
        id: SessionId,
        publication: Publication,
    ) -> Result<Published, Status> {
        // What the host is, its lane says in its first message.
        let Publication::Inventory(inventory) = publication else { return Ok(Published::Silently) };
        let lane = self.lane(host, id).ok_or_else(|| Status::aborted("the session was ended"))?;
        let sent = lane.send(Input::Inventory(inventory)).await;
        sent.map_err(|_closed| Status::aborted("the controller ended the session of this host"))?;
        Ok(Published::Silently)
    }

    async fn status(&self, host: &Arc<str>, id: SessionId, status: AgentStatus) {
        self.sessions.registry.status(host, id, status.clone());
        if let Some(lane) = self.lane(host, id) {
            let status = AgentStatus { told: self.sessions.registry.told(host, id), ..status };
            // Closed: the session is about to end.
            let _ = lane.send(Input::Status(status)).await;
        }
    }

    async fn enroll(&self, _caller: Option<Caller>, request: EnrollRequest) -> Result<Enrollment, Status> {
        if request.relay {
            return Err(Status::permission_denied("a relay joins at a controller"));
        }
        let mut client = self.client()?;
        let answer = tokio::time::timeout(ANSWER_TIME_MAX, client.enroll(request)).await;
        Ok(answer.map_err(|_elapsed| Status::deadline_exceeded("no answer"))??.into_inner())
    }

    async fn renew(&self, caller: Caller, request: RenewRequest) -> Result<Enrollment, Status> {
        let host = agent_of(&caller)?;
        let request = RenewRequest { host, relayed: Some(relayed(&caller)), ..request };
        let mut client = self.client()?;
        let answer = tokio::time::timeout(ANSWER_TIME_MAX, client.renew(request)).await;
        Ok(answer.map_err(|_elapsed| Status::deadline_exceeded("no answer"))??.into_inner())
    }

    async fn flows(&self, caller: Caller, (mut batches, receipts): FlowStreams) {
        let carry = async {
            let host = agent_of(&caller)?;
            let mut client = self.client()?;
            let (up, waiting) = mpsc::channel(BATCHES_LEN);
            let mut answers = client.report_flows(ReceiverStream::new(waiting)).await?.into_inner();
            let (mut shutdown, mut shown) = (self.sessions.shutdown.clone(), Some(relayed(&caller)));
            loop {
                tokio::select! {
                    batch = batches.message() => {
                        let Some(mut batch) = batch? else { return Ok(()) };
                        batch.host.clone_from(&host);
                        // Once for the stream.
                        batch.relayed = shown.take();
                        self.counters.flow_batches.add(1);
                        // Full: the agent waits.
                        up.send(batch).await.map_err(|_closed| Status::unavailable("stream closed"))?;
                    }
                    receipt = answers.message() => {
                        let Some(receipt) = receipt? else { return Ok(()) };
                        if receipts.send(Ok(receipt)).await.is_err() {
                            return Ok(());
                        }
                    }
                    () = stopped(&mut shutdown) => return Err(Status::unavailable("the relay stops")),
                }
            }
        };
        let ended: Result<(), Status> = carry.await;
        if let Err(status) = ended {
            // The agent may be gone already.
            let _ = receipts.try_send(Err(status));
        }
    }
}

fn agent_of(caller: &Caller) -> Result<String, Status> {
    match &caller.holder.identity {
        Identity::Agent(host) => Ok(host.clone()),
        other => Err(Status::permission_denied(format!("a relay serves agents, not {other}"))),
    }
}
