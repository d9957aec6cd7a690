//! One agent's conversation.
//!
//! The task waits for whichever comes first: a message of the agent, a wake-up since something that concerns
//! it has changed, the end of its lease, another session of the same host, shutdown. Then it tells the agent
//! everything that there is to tell, at once. Nothing is queued for an agent but the messages that are on
//! their way: whoever reads slowly gets several changes as one, and whoever reads nothing for
//! [`SEND_TIME_MAX`] is cut off and resumes later.

use std::collections::{HashSet, VecDeque};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::time::Duration;

use bulkhead_wire::proto::agent_message::Body as Said;
use bulkhead_wire::proto::controller_message::Body;
use bulkhead_wire::proto::{AgentMessage, Hello, Welcome};
use bulkhead_wire::{PACKING, PROTOCOL, come_back, come_back_elsewhere, proto};
use bytes::Bytes;
use futures::{FutureExt, StreamExt};
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tonic::Status;
use tracing::Instrument;

use super::desk::{Begin, Caller, Desk, Part, Publication, Published, Speaker};
use super::messages::Message;
use super::pump::Pump;
use super::registry::Admission;
use super::source::Source;
use super::stream::{Encode, Incoming, Pieces};
use crate::access::{Revocation, Revoked};
use crate::clock;
use crate::context::stopped;
use crate::members::{Audience, SessionId, Subscriber};

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

/// Acknowledgements that wait for an agent, of those that come later than at once.
const ACKS_LEN: usize = 64;

/// Agents of a controller that stops are sent to others over a time that is so long for each of them, and no longer than
/// this together.
const DRAIN_TIME_EACH: Duration = Duration::from_millis(2);
/// See [`DRAIN_TIME_EACH`]: 2500 agents fill it.
pub(crate) const DRAIN_TIME_MAX: Duration = Duration::from_secs(5);

type Outgoing = mpsc::Sender<Result<Bytes, Status>>;

/// Holds the conversation until either side ends it.
pub(super) async fn run<D: Desk>(desk: Arc<D>, caller: Caller, mut incoming: Incoming, outgoing: Outgoing) {
    if *desk.sessions().draining.borrow() {
        // It may be gone already.
        let _ = outgoing.try_send(Err(elsewhere()));
        return;
    }
    let Ok(syncing) = Arc::clone(&desk.sessions().syncing).try_acquire_owned() else {
        desk.sessions().metrics.sessions_deferred.add(1);
        let deferred = come_back(
            away(desk.sessions().metrics.sessions_deferred.value()),
            "other agents are being told first",
        );
        // It may be gone already.
        let _ = outgoing.try_send(Err(deferred));
        return;
    };
    let (hello, speaker, admission) = match admit(&*desk, &caller, &mut incoming).await {
        Ok(admitted) => admitted,
        Err(status) => {
            tracing::warn!(%status, "an agent was refused");
            // It may be gone already.
            let _ = outgoing.try_send(Err(status));
            return;
        }
    };
    let host = Arc::clone(&speaker.key);
    tracing::info!(%host, version = %hello.version, session = admission.id, "agent connected");
    desk.sessions().metrics.sessions_opened.add(1);
    if admission.replaced {
        desk.sessions().metrics.sessions_replaced.add(1);
    }
    let Admission { id, closed, replaced: _ } = admission;
    let epoch_is_ours = hello.epoch == desk.epoch();
    let known = (epoch_is_ours && hello.revision > 0).then_some(hello.revision);
    let unpacks = hello.accepts.iter().any(|one| one == PACKING);
    let (audience, known) = match &speaker.part {
        Part::Agent => (Some(Audience::Host(Arc::clone(&host))), known),
        Part::Relay { hosts, changed } => {
            (Some(Audience::Relay(hosts.clone())), known.filter(|_known| !changed))
        }
        Part::Lane => (None, None),
    };
    let subscriber = audience.map(|audience| Arc::new(Subscriber::of(id, audience)));
    let began = {
        let mut source = desk.source_mut();
        if let Some(subscriber) = &subscriber {
            source.view_mut().add_session(subscriber);
        }
        source.view().revision
    };
    let told = subscriber
        .map(|subscriber| Told { pump: Pump::new(Arc::clone(&subscriber), known, unpacks), subscriber });
    let valid = std::iter::once(&speaker.holder).chain(&speaker.via).map(|holder| holder.not_after).min();
    let valid = valid.and_then(|until| until.duration_since(clock::system()).ok()).unwrap_or_default();
    let mut session = Session {
        desk,
        id,
        host,
        epoch_is_ours,
        told,
        kept_out: HashSet::new(),
        outgoing,
        unsaid: (0, 0),
        unpublished: VecDeque::new(),
    };
    let ended = tokio::select! {
        ended = session.converse((&hello, &speaker, &caller, began), &mut incoming, syncing) => ended,
        () = tokio::time::sleep(valid) => Err(Status::unauthenticated("the agent's certificate has ended")),
        status = closed => Err(status.unwrap_or_else(|_gone| Status::aborted("the session was ended"))),
    };
    session.end(&speaker, ended);
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
async fn admit<D: Desk>(
    desk: &D,
    caller: &Caller,
    incoming: &mut Incoming,
) -> Result<(Hello, Speaker, Admission), Status> {
    let first = tokio::time::timeout(HELLO_TIME_MAX, incoming.message()).await;
    let first = first.map_err(|_elapsed| Status::deadline_exceeded("no Hello"))??;
    let Some(Said::Hello(hello)) = first.and_then(|message| message.body) else {
        return Err(Status::invalid_argument("the first message must be Hello"));
    };
    if hello.protocol != PROTOCOL {
        return Err(Status::failed_precondition(format!(
            "protocol {PROTOCOL} is spoken here, and {} by the agent of {:?}",
            hello.protocol, hello.host
        )));
    }
    let speaker = desk.speaker(caller, &hello)?;
    let admission = desk.sessions().registry.admit(&speaker, &hello)?;
    // It may have been revoked between the look at the certificate and the moment at which a revocation ends the session.
    if std::iter::once(&speaker.holder).chain(&speaker.via).any(|holder| desk.revoked(holder)) {
        desk.sessions().registry.leave(&speaker.key, admission.id);
        return Err(Status::unauthenticated("the certificate is revoked"));
    }
    Ok((hello, speaker, admission))
}

/// Completes when there may be something to tell, or never.
async fn wake(subscriber: Option<&Subscriber>) {
    match subscriber {
        Some(subscriber) => subscriber.wake.notified().await,
        None => std::future::pending().await,
    }
}

/// Somebody who is told what there is.
struct Told {
    subscriber: Arc<Subscriber>,
    pump: Pump,
}

struct Session<D> {
    desk: Arc<D>,
    id: SessionId,
    /// Or whoever it is else: its key in the registry.
    host: Arc<str>,
    epoch_is_ours: bool,
    /// `None`: a host behind a relay, which tells it.
    told: Option<Told>,
    /// What a relay has been told not to let in, with the moment before which.
    kept_out: HashSet<(Revoked, u64)>,
    outgoing: Outgoing,
    /// Messages and bytes that the registry has not been told of.
    unsaid: (u64, u64),
    /// What the store had no room for, oldest first. The agent is told everything all the same.
    unpublished: VecDeque<Publication>,
}

impl<D: Desk> Session<D> {
    /// Ends well if the agent ends it.
    async fn converse(
        &mut self,
        (hello, speaker, caller, began): (&Hello, &Speaker, &Caller, u64),
        incoming: &mut Incoming,
        syncing: OwnedSemaphorePermit,
    ) -> Result<(), Status> {
        let (acks, mut later) = mpsc::channel(ACKS_LEN);
        let begin = Begin { id: self.id, speaker, caller, hello, began, acks: &acks };
        if let Some(first) = self.desk.begin(begin).await? {
            self.publish(first).await?;
        }
        self.welcome().await?;
        self.tell().await?;
        drop(syncing);
        let mut shutdown = self.desk.sessions().shutdown.clone();
        let mut draining = self.desk.sessions().draining.clone();
        let desk = Arc::clone(&self.desk);
        let host = Arc::clone(&self.host);
        let sent_away = async move {
            stopped(&mut draining).await;
            tokio::time::sleep(leaves_after(&host, desk.sessions().registry.connected())).await;
        };
        tokio::pin!(sent_away);
        let lease = self.desk.lease();
        let woken = self.told.as_ref().map(|told| Arc::clone(&told.subscriber));
        let silence = tokio::time::sleep(lease);
        tokio::pin!(silence);
        let mut again = tokio::time::interval(PUBLISHED_AGAIN_AFTER);
        again.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let message = tokio::select! {
                message = incoming.message() => message?,
                () = wake(woken.as_deref()) => {
                    if let Some(moment) = self.desk.sessions().pace.wait() {
                        tokio::time::sleep(moment).await;
                    }
                    self.tell().await?;
                    continue;
                }
                Some(ack) = later.recv() => {
                    self.send(Body::InventoryAck(ack)).await?;
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
            self.desk.sessions().registry.seen(&self.host, self.id);
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
            epoch: self.desk.epoch(),
            revision: self.desk.source().view().revision,
            controller: self.desk.name(),
            heartbeat_ms: self.desk.heartbeat_ms(),
        };
        self.send(Body::Welcome(welcome)).await
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
            match self.desk.publish(&self.host, self.id, next).await? {
                Published::Acknowledged(ack) => self.send(Body::InventoryAck(ack)).await?,
                Published::Silently => {}
                Published::NoRoom(next) => {
                    self.unpublished.push_front(next);
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    async fn take_in(&mut self, message: AgentMessage) -> Result<(), Status> {
        match message.body {
            Some(Said::Subscribe(subscribe)) => {
                let told = self.told.as_mut().ok_or_else(|| {
                    Status::invalid_argument("a relay subscribes once for all hosts, in its own session")
                })?;
                let known = (self.epoch_is_ours && subscribe.revision > 0).then_some(subscribe.revision);
                told.pump.subscribe(&mut *self.desk.source_mut(), &subscribe, known)
            }
            Some(Said::Unsubscribe(proto::Unsubscribe { handle })) => {
                if let Some(told) = &mut self.told {
                    told.pump.unsubscribe(&mut *self.desk.source_mut(), handle);
                }
                Ok(())
            }
            Some(Said::Inventory(_)) if self.is_relay() => {
                Err(Status::invalid_argument("a relay publishes for its hosts, in a session of each"))
            }
            Some(Said::Inventory(inventory)) => self.publish(Publication::Inventory(inventory)).await,
            Some(Said::Status(status)) => {
                self.desk.status(&self.host, self.id, status).await;
                Ok(())
            }
            Some(Said::Hello(_)) => Err(Status::invalid_argument("a second Hello")),
            // Of a newer agent; by the protocol's rules it can be ignored.
            None => Ok(()),
        }
    }

    fn is_relay(&self) -> bool {
        self.told.as_ref().is_some_and(|told| matches!(told.subscriber.audience, Audience::Relay(_)))
    }

    /// Tells a relay whom it must not let in.
    async fn keep_out(&mut self) -> Result<(), Status> {
        let Some(Audience::Relay(hosts)) = self.told.as_ref().map(|told| &told.subscriber.audience) else {
            return Ok(());
        };
        let all = self.desk.revocations(hosts, &mut self.kept_out);
        if all.is_empty() {
            return Ok(());
        }
        let revocation = |one: Revocation| {
            let (serial, host) = match one.of {
                Revoked::Serial(serial) => (serial, String::new()),
                Revoked::Holder(holder) => {
                    (String::new(), holder.strip_prefix("agent/").unwrap_or_default().to_owned())
                }
            };
            proto::Revocation { serial, host, since_ms: one.since_ms }
        };
        let revocations = all.into_iter().map(revocation).collect();
        self.send(Body::Revocations(proto::Revocations { revocations })).await
    }

    /// Tells everything that there is to tell.
    async fn tell(&mut self) -> Result<(), Status> {
        self.keep_out().await?;
        let Some(told) = &mut self.told else { return Ok(()) };
        let (messages, revision) = {
            let source = self.desk.source();
            (told.pump.messages(&*source), source.view().revision)
        };
        let subscriptions = told.pump.subscriptions();
        if messages.is_empty() {
            return Ok(());
        }
        self.desk.sessions().pace.told();
        let span = tracing::debug_span!("tell", host = %self.host, revision, messages = messages.len());
        self.send_all(&messages).instrument(span).await?;
        let sent = std::mem::take(&mut self.unsaid);
        self.desk.sessions().registry.synced(&self.host, self.id, revision, subscriptions, sent);
        Ok(())
    }

    async fn send(&mut self, body: Body) -> Result<(), Status> {
        self.send_all(&[body.into()]).await
    }

    async fn send_all(&mut self, messages: &[Message]) -> Result<(), Status> {
        for piece in Pieces::of(messages) {
            match tokio::time::timeout(SEND_TIME_MAX, self.outgoing.send(Ok(piece))).await {
                Ok(Ok(())) => {}
                Ok(Err(_closed)) => return Err(Status::cancelled("the agent is gone")),
                Err(_elapsed) => {
                    self.desk.sessions().metrics.sessions_cut_off.add(1);
                    return Err(Status::resource_exhausted(format!(
                        "the agent has taken no message for {SEND_TIME_MAX:?}"
                    )));
                }
            }
        }
        let (count, bytes) =
            (messages.len() as u64, messages.iter().map(|one| one.bytes() as u64).sum::<u64>());
        self.desk.sessions().metrics.agent_messages_sent.add(count);
        self.desk.sessions().metrics.agent_bytes_sent.add(bytes);
        self.unsaid = (self.unsaid.0 + count, self.unsaid.1 + bytes);
        Ok(())
    }

    fn end(mut self, speaker: &Speaker, ended: Result<(), Status>) {
        if let Some(told) = &mut self.told {
            told.pump.close(&mut *self.desk.source_mut());
        }
        self.desk.sessions().registry.leave(&self.host, self.id);
        self.desk.end(speaker, self.id);
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
