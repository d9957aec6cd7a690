//! One agent's conversation.
//!
//! The task waits for whichever comes first: a message of the agent, a wake-up since something that concerns
//! it has changed, the end of its lease, another session of the same host, shutdown. Then it tells the agent
//! everything that there is to tell, at once. Nothing is queued for an agent but the messages that are on
//! their way: whoever reads slowly gets several changes as one, and whoever reads nothing for
//! [`SEND_TIME_MAX`] is cut off and resumes later.

use std::collections::VecDeque;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::time::Duration;

use bulkhead_identity::Holder;
use bulkhead_model::entity::{ADDRESSES_MAX, HostSpec};
use bulkhead_model::resource::{Host, Metadata, Resource, is_name};
use bulkhead_model::{Facts, Labels};
use bulkhead_store::StoreError;
use bulkhead_wire::proto::agent_message::Body as Incoming;
use bulkhead_wire::proto::controller_message::Body;
use bulkhead_wire::proto::{AgentMessage, ControllerMessage, Hello, Inventory, Welcome};
use bulkhead_wire::{PACKING, PROTOCOL, address_from_wire, come_back, come_back_elsewhere, proto};
use futures::{FutureExt, StreamExt};
use prost::Message;
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tonic::{Status, Streaming};
use tracing::Instrument;

use super::inventory;
use super::pump::Pump;
use super::registry::Admission;
use crate::clock;
use crate::context::{Context, stopped};
use crate::guard::Ends;
use crate::members::{SessionId, Subscriber};

/// Longest that an agent may take to say who it is.
const HELLO_TIME_MAX: Duration = Duration::from_secs(10);
/// Longest that an agent may leave its messages lying.
const SEND_TIME_MAX: Duration = Duration::from_secs(10);
/// Shortest time for which an agent is sent away when too many are being told what they lack, and what is added to it,
/// another for each: in a second they all have been told.
const AWAY_MIN: Duration = Duration::from_millis(200);
const AWAY_SPREAD: Duration = Duration::from_millis(1000);
/// How often what a store without room has not taken is tried again.
const PUBLISHED_AGAIN_AFTER: Duration = Duration::from_secs(2);
/// Messages of an agent that wait for room; then its session ends, and it publishes everything when it comes back.
const UNPUBLISHED_MAX: usize = 64;
/// Messages of an agent that are taken in before it is answered, if they are there already.
const BURST_LEN_MAX: usize = 1024;

/// Agents of a controller that stops are sent to others over a time that is so long for each of them, and no longer than
/// this together.
const DRAIN_TIME_EACH: Duration = Duration::from_millis(2);
/// See [`DRAIN_TIME_EACH`]: 2500 agents fill it.
pub(crate) const DRAIN_TIME_MAX: Duration = Duration::from_secs(5);

type Outgoing = mpsc::Sender<Result<ControllerMessage, Status>>;

/// Holds the conversation until either side ends it.
pub(super) async fn run(
    context: Arc<Context>,
    (holder, ends): (Arc<Holder>, Ends),
    mut incoming: Streaming<AgentMessage>,
    outgoing: Outgoing,
) {
    if *context.draining.borrow() {
        // It may be gone already.
        let _ = outgoing.try_send(Err(elsewhere()));
        return;
    }
    let Ok(syncing) = Arc::clone(&context.syncing).try_acquire_owned() else {
        context.metrics.sessions_deferred.add(1);
        let deferred =
            come_back(away(context.metrics.sessions_deferred.value()), "other agents are being told first");
        // It may be gone already.
        let _ = outgoing.try_send(Err(deferred));
        return;
    };
    let (hello, admission) = match admit(&context, (&holder, ends), &mut incoming).await {
        Ok(admitted) => admitted,
        Err(status) => {
            tracing::warn!(%status, "an agent was refused");
            // It may be gone already.
            let _ = outgoing.try_send(Err(status));
            return;
        }
    };
    let host: Arc<str> = hello.host.as_str().into();
    tracing::info!(%host, version = %hello.version, session = admission.id, "agent connected");
    context.metrics.sessions_opened.add(1);
    if admission.replaced {
        context.metrics.sessions_replaced.add(1);
    }
    let Admission { id, closed, replaced: _ } = admission;
    let subscriber = Arc::new(Subscriber::new(id, Arc::clone(&host)));
    let epoch_is_ours = hello.epoch == context.repository.store().epoch();
    let known = (epoch_is_ours && hello.revision > 0).then_some(hello.revision);
    let began = {
        let mut view = context.repository.view_mut();
        view.add_session(&subscriber);
        view.revision
    };
    context.cluster.begin(&host, id, clock::now_ms(), Some(ends), began);
    let pump = Pump::new(Arc::clone(&subscriber), known, hello.accepts.iter().any(|one| one == PACKING));
    let mut session = Session {
        context,
        id,
        host,
        subscriber,
        epoch_is_ours,
        pump,
        outgoing,
        unsaid: (0, 0),
        unpublished: VecDeque::new(),
    };
    let valid = holder.not_after.duration_since(clock::system()).unwrap_or_default();
    let ended = tokio::select! {
        ended = session.converse(&hello, &mut incoming, syncing) => ended,
        () = tokio::time::sleep(valid) => Err(Status::unauthenticated("the agent's certificate has ended")),
        status = closed => Err(status.unwrap_or_else(|_gone| Status::aborted("the session was ended"))),
    };
    session.end(ended);
}

/// How long an agent that cannot be told now stays away: they come back spread over a second.
fn away(number: u64) -> Duration {
    // Steps by a number that shares no divisor with the spread.
    let spread = u64::try_from(AWAY_SPREAD.as_millis()).unwrap_or(1);
    AWAY_MIN + Duration::from_millis(number.wrapping_mul(389) % spread)
}

/// What agents hear of a controller that is about to stop.
fn elsewhere() -> Status {
    come_back_elsewhere(Duration::ZERO, "the controller stops: go to another")
}

/// When this agent is sent away, of so many that are: each has a moment of its own.
fn leaves_after(host: &str, agents: usize) -> Duration {
    let together = DRAIN_TIME_EACH.saturating_mul(u32::try_from(agents).unwrap_or(u32::MAX));
    let mut hasher = DefaultHasher::new();
    host.hash(&mut hasher);
    let share = f64::from(u16::try_from(hasher.finish() % 1024).unwrap_or(0)) / 1024.0;
    together.min(DRAIN_TIME_MAX).mul_f64(share)
}

/// Hears who the agent is, and gives it a place.
async fn admit(
    context: &Context,
    (holder, ends): (&Arc<Holder>, Ends),
    incoming: &mut Streaming<AgentMessage>,
) -> Result<(Hello, Admission), Status> {
    let first = tokio::time::timeout(HELLO_TIME_MAX, incoming.message()).await;
    let first = first.map_err(|_elapsed| Status::deadline_exceeded("no Hello"))??;
    let Some(Incoming::Hello(hello)) = first.and_then(|message| message.body) else {
        return Err(Status::invalid_argument("the first message must be Hello"));
    };
    if hello.protocol != PROTOCOL {
        return Err(Status::failed_precondition(format!(
            "this controller speaks protocol {PROTOCOL}, the agent of {:?} speaks {}",
            hello.host, hello.protocol
        )));
    }
    if !is_name(&hello.host) {
        return Err(Status::invalid_argument(format!("{:?} cannot be the name of a host", hello.host)));
    }
    if holder.identity.name() != hello.host {
        context.metrics.agents_refused.add(1);
        return Err(Status::permission_denied(format!(
            "the certificate is of {}, not of host {:?}",
            holder.identity, hello.host
        )));
    }
    let host = hello.host.as_str().into();
    let admission = context.registry.admit(&host, &hello.version, Arc::clone(holder), Some(ends))?;
    // It may have been revoked between the look at the certificate and the moment at which a revocation ends the session.
    if context.grants.is_revoked(holder) {
        context.registry.leave(&host, admission.id);
        return Err(Status::unauthenticated("the certificate is revoked"));
    }
    Ok((hello, admission))
}

struct Session {
    context: Arc<Context>,
    id: SessionId,
    host: Arc<str>,
    subscriber: Arc<Subscriber>,
    epoch_is_ours: bool,
    pump: Pump,
    outgoing: Outgoing,
    /// Messages and bytes that the registry has not been told of.
    unsaid: (u64, u64),
    /// What the store had no room for, oldest first. The agent is told everything all the same.
    unpublished: VecDeque<Publication>,
}

/// What an agent says of its host, to be stored.
#[derive(Debug)]
enum Publication {
    Host(Box<Host>),
    Inventory(Inventory),
}

impl Session {
    /// Ends well if the agent ends it.
    async fn converse(
        &mut self,
        hello: &Hello,
        incoming: &mut Streaming<AgentMessage>,
        syncing: OwnedSemaphorePermit,
    ) -> Result<(), Status> {
        self.publish_host(hello).await?;
        self.welcome().await?;
        self.tell().await?;
        drop(syncing);
        let mut shutdown = self.context.shutdown.clone();
        let mut draining = self.context.draining.clone();
        let context = Arc::clone(&self.context);
        let host = Arc::clone(&self.host);
        let sent_away = async move {
            stopped(&mut draining).await;
            tokio::time::sleep(leaves_after(&host, context.registry.connected())).await;
        };
        tokio::pin!(sent_away);
        let lease = self.context.config.lease();
        let silence = tokio::time::sleep(lease);
        tokio::pin!(silence);
        let mut again = tokio::time::interval(PUBLISHED_AGAIN_AFTER);
        again.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let message = tokio::select! {
                message = incoming.message() => message?,
                () = self.subscriber.wake.notified() => {
                    if let Some(moment) = self.context.pace.wait() {
                        tokio::time::sleep(moment).await;
                    }
                    self.tell().await?;
                    continue;
                }
                _ = again.tick(), if !self.unpublished.is_empty() => {
                    self.publish_waiting().await?;
                    self.tell().await?;
                    continue;
                }
                () = &mut silence => {
                    return Err(Status::deadline_exceeded(format!("nothing heard for {lease:?}")));
                }
                () = &mut sent_away => return Err(elsewhere()),
                () = stopped(&mut shutdown) => {
                    return Err(Status::unavailable("the controller stops"));
                }
            };
            let Some(message) = message else { return Ok(()) };
            silence.as_mut().reset(tokio::time::Instant::now() + lease);
            self.context.registry.seen(&self.host, self.id);
            self.take_in(message).await?;
            // Subscriptions come in bursts: what is there already is answered together.
            for _ in 1..BURST_LEN_MAX {
                match incoming.next().now_or_never() {
                    Some(Some(message)) => self.take_in(message?).await?,
                    Some(None) | None => break,
                }
            }
            self.tell().await?;
        }
    }

    async fn welcome(&mut self) -> Result<(), Status> {
        let welcome = Welcome {
            protocol: PROTOCOL,
            epoch: self.context.repository.store().epoch().to_owned(),
            revision: self.context.repository.view().revision,
            controller: self.context.config.name.clone(),
            heartbeat_ms: self.context.config.heartbeat_ms(),
        };
        self.send(Body::Welcome(welcome)).await
    }

    async fn publish_host(&mut self, hello: &Hello) -> Result<(), Status> {
        let labels = hello.labels.iter().map(|(key, value)| (key.as_str(), value.as_str()));
        let (labels, refused) = Labels::from_foreign(labels);
        if refused > 0 {
            tracing::warn!(host = %self.host, refused, "labels of a host cannot be used");
        }
        let facts = hello.facts.iter().map(|(key, value)| (key.as_str(), value.as_str()));
        let (facts, refused) = Facts::from_observed(facts);
        if let Some(first) = refused.first() {
            tracing::warn!(host = %self.host, refused = refused.len(), %first, "facts of a host cannot be used");
        }
        let metadata = Metadata { name: hello.host.clone(), labels, ..Metadata::default() };
        let agent_version = (!hello.version.is_empty()).then(|| hello.version.clone());
        let addresses = hello.addresses.iter().take(ADDRESSES_MAX);
        let addresses = addresses.filter_map(|bytes| address_from_wire(bytes)).collect();
        let spec = HostSpec { agent_version, facts, addresses };
        self.publish(Publication::Host(Box::new(Host { metadata, spec }))).await
    }

    /// Has it stored and answers, in turn; keeps it for later if the store has no room.
    async fn publish(&mut self, publication: Publication) -> Result<(), Status> {
        if self.unpublished.len() >= UNPUBLISHED_MAX {
            return Err(Status::resource_exhausted("the repository's disk is full"));
        }
        let first = self.unpublished.is_empty();
        self.unpublished.push_back(publication);
        if first { self.publish_waiting().await } else { Ok(()) }
    }

    async fn publish_waiting(&mut self) -> Result<(), Status> {
        while let Some(next) = self.unpublished.pop_front() {
            let stored = match &next {
                Publication::Host(host) => {
                    let host = Resource::Host(Host::clone(host));
                    self.context.repository.publish(vec![host], Vec::new()).await.map(|_applied| None)
                }
                Publication::Inventory(inventory) => {
                    let workloads = inventory.upserts.len();
                    let span = tracing::debug_span!("publish", host = %self.host, workloads);
                    inventory::take_in(&self.context, &self.host, inventory).instrument(span).await.map(Some)
                }
            };
            match stored {
                Ok(Some(ack)) => self.send(Body::InventoryAck(ack)).await?,
                Ok(None) => {}
                Err(StoreError::Full { .. }) => {
                    self.unpublished.push_front(next);
                    return Ok(());
                }
                Err(error) => return Err(unavailable(error)),
            }
        }
        Ok(())
    }

    async fn take_in(&mut self, message: AgentMessage) -> Result<(), Status> {
        match message.body {
            Some(Incoming::Subscribe(subscribe)) => {
                let known = (self.epoch_is_ours && subscribe.revision > 0).then_some(subscribe.revision);
                self.pump.subscribe(&mut self.context.repository.view_mut(), &subscribe, known)
            }
            Some(Incoming::Unsubscribe(proto::Unsubscribe { handle })) => {
                self.pump.unsubscribe(&mut self.context.repository.view_mut(), handle);
                Ok(())
            }
            Some(Incoming::Inventory(inventory)) => self.publish(Publication::Inventory(inventory)).await,
            Some(Incoming::Status(status)) => {
                self.context.registry.status(&self.host, self.id, status);
                Ok(())
            }
            Some(Incoming::Hello(_)) => Err(Status::invalid_argument("a second Hello")),
            // Of a newer agent; by the protocol's rules it can be ignored.
            None => Ok(()),
        }
    }

    /// Tells everything that there is to tell.
    async fn tell(&mut self) -> Result<(), Status> {
        let (messages, revision) = {
            let view = self.context.repository.view();
            (self.pump.messages(&view), view.revision)
        };
        if messages.is_empty() {
            return Ok(());
        }
        self.context.pace.told();
        let span = tracing::debug_span!("tell", host = %self.host, revision, messages = messages.len());
        let send = async {
            for message in messages {
                self.send(message).await?;
            }
            Ok::<_, Status>(())
        };
        send.instrument(span).await?;
        let sent = std::mem::take(&mut self.unsaid);
        self.context.registry.synced(&self.host, self.id, revision, self.pump.subscriptions(), sent);
        Ok(())
    }

    async fn send(&mut self, body: Body) -> Result<(), Status> {
        let message = ControllerMessage { body: Some(body) };
        let bytes = message.encoded_len() as u64;
        match tokio::time::timeout(SEND_TIME_MAX, self.outgoing.send(Ok(message))).await {
            Ok(Ok(())) => {
                self.context.metrics.agent_messages_sent.add(1);
                self.context.metrics.agent_bytes_sent.add(bytes);
                self.unsaid = (self.unsaid.0 + 1, self.unsaid.1 + bytes);
                Ok(())
            }
            Ok(Err(_closed)) => Err(Status::cancelled("the agent is gone")),
            Err(_elapsed) => {
                self.context.metrics.sessions_cut_off.add(1);
                Err(Status::resource_exhausted(format!(
                    "the agent has taken no message for {SEND_TIME_MAX:?}"
                )))
            }
        }
    }

    fn end(mut self, ended: Result<(), Status>) {
        self.pump.close(&mut self.context.repository.view_mut());
        self.context.registry.leave(&self.host, self.id);
        self.context.cluster.end(&self.host, self.id);
        match ended {
            Ok(()) => tracing::info!(host = %self.host, session = self.id, "agent left"),
            Err(status) => {
                tracing::info!(host = %self.host, session = self.id, reason = %status.message(), "session ended");
                // It may be gone, or not reading.
                let _ = self.outgoing.try_send(Err(status));
            }
        }
    }
}

fn unavailable(error: impl std::fmt::Display) -> Status {
    Status::unavailable(format!("the repository does not write: {error}"))
}
