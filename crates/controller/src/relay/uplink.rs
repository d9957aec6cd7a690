//! The relay's own session with a controller: what all its agents want to hear, asked for once.

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bulkhead_wire::proto::agent_message::Body as Up;
use bulkhead_wire::proto::controller_message::Body as Down;
use bulkhead_wire::proto::distribution_client::DistributionClient;
use bulkhead_wire::proto::{AgentMessage, AgentStatus, Hello, Welcome};
use bulkhead_wire::{
    MESSAGE_BYTES_MAX, PACKING, PROTOCOL, come_back_elsewhere, is_elsewhere, unpack, when_to_come_back,
};
use prost::Message;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::desk::{Line, Shared};
use super::reception::{Batch, Reception};
use crate::context::stopped;

/// Messages on their way to the controller.
const OUTGOING_LEN: usize = 64;
/// First and longest wait before a controller is tried again.
const RETRY_MIN: Duration = Duration::from_millis(100);
const RETRY_MAX: Duration = Duration::from_secs(10);
/// How long an attempt to open a session may take, until its Welcome.
const WELCOME_TIME_MAX: Duration = Duration::from_secs(10);
/// How often it is looked for selectors that nobody reads any more.
const LOOK_EVERY: Duration = Duration::from_secs(10);
/// How long agents of a relay that may not speak for them any more stay away, unless another is there.
const AWAY: Duration = Duration::from_secs(1);

/// Talks to controllers until `shutdown`.
pub(super) async fn run(shared: Arc<Shared>, mut shutdown: watch::Receiver<bool>) {
    let mut attempt = 0_u32;
    loop {
        let ended = tokio::select! {
            ended = converse(&shared, &mut attempt) => ended,
            () = stopped(&mut shutdown) => return,
        };
        shared.line.send_replace(None);
        shared.mirror_mut().set_connected(false);
        shared.counters.upstream_lost.add(1);
        let status = ended.err().unwrap_or_else(|| Status::unavailable("the controller closed the stream"));
        let told = when_to_come_back(&status);
        if told.is_none() || is_elsewhere(&status) {
            shared.membership.try_another();
        }
        if status.code() == tonic::Code::Unauthenticated {
            shared.membership.refused();
        }
        let is_out = matches!(status.code(), tonic::Code::Unauthenticated | tonic::Code::PermissionDenied);
        shared.is_out.store(is_out, Ordering::Relaxed);
        if is_out {
            // Whoever serves the site now: it is not this relay any more.
            let reason = "this relay may not serve any more: go to another";
            shared.sessions.registry.close_where(|_everybody| true, || come_back_elsewhere(AWAY, reason));
        }
        let doubled = RETRY_MIN.saturating_mul(1 << attempt.min(10)).min(RETRY_MAX);
        attempt = attempt.saturating_add(1);
        let retry = told.unwrap_or(doubled);
        tracing::warn!(reason = status.message(), ?retry, "no controller: agents are told what is known");
        tokio::select! {
            () = tokio::time::sleep(retry) => {}
            () = stopped(&mut shutdown) => return,
        }
    }
}

async fn converse(shared: &Arc<Shared>, attempt: &mut u32) -> Result<(), Status> {
    let channel = shared.membership.connect().await?;
    let mut client = DistributionClient::new(channel.clone())
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX);
    let (outgoing, messages) = mpsc::channel(OUTGOING_LEN);
    let (epoch, revision) = {
        let mirror = shared.mirror();
        (mirror.epoch().to_owned(), mirror.revision())
    };
    let hello = Hello {
        protocol: PROTOCOL,
        version: env!("CARGO_PKG_VERSION").into(),
        epoch: epoch.clone(),
        revision,
        accepts: vec![PACKING.into()],
        agents_at: shared.agents_at.clone(),
        ..Hello::default()
    };
    let first = AgentMessage { body: Some(Up::Hello(hello)) };
    outgoing.send(first).await.map_err(|_closed| Status::internal("stream closed"))?;
    let opening = async {
        let mut stream = client.sync(ReceiverStream::new(messages)).await?.into_inner();
        let first = stream.message().await?.and_then(|message| message.body);
        Ok::<_, Status>((stream, first))
    };
    let opened = tokio::time::timeout(WELCOME_TIME_MAX, opening).await;
    let (mut stream, first) = opened.map_err(|_elapsed| Status::deadline_exceeded("no Welcome"))??;
    let Some(Down::Welcome(welcome)) = first else {
        return Err(Status::invalid_argument("the first message must be Welcome"));
    };
    let heartbeat = check(shared, &welcome, &epoch, revision)?;
    *attempt = 0;
    shared.is_out.store(false, Ordering::Relaxed);
    let (subscriptions, mut reception) = {
        let mut mirror = shared.mirror_mut();
        mirror.set_connected(true);
        let (subscriptions, owed) = mirror.resume();
        // In another repository all is unknown, and nothing has to be waited for.
        (subscriptions, Reception::new(if welcome.epoch == epoch { owed } else { HashSet::new() }))
    };
    let mut queue: VecDeque<Up> = subscriptions.into();
    let ordered = Arc::clone(&shared.mirror().ordered);
    shared.line.send_replace(Some(Line { channel }));
    tracing::info!(controller = welcome.controller, revision = welcome.revision, "connected upstream");
    let mut beats = tokio::time::interval(heartbeat);
    let mut looks = tokio::time::interval(LOOK_EVERY);
    loop {
        tokio::select! {
            message = stream.message() => {
                let Some(message) = message? else { return Ok(()) };
                shared.counters.upstream_messages.add(1);
                shared.counters.upstream_bytes.add(message.encoded_len() as u64);
                let Some(mut body) = message.body else { continue };
                if let Down::Resources(resources) = &mut body {
                    let packed = std::mem::take(&mut resources.packed);
                    let more = if packed.is_empty() { Ok(Vec::new()) } else { unpack(&packed) };
                    resources.upserts.extend(more.map_err(|error| Status::data_loss(error.to_string()))?);
                }
                if let Down::Revocations(revocations) = body {
                    shared.keep_out(revocations);
                    continue;
                }
                if let Some((heard, revision)) = reception.hear(body) {
                    take_in(shared, &welcome.epoch, heard, revision);
                }
            }
            permit = outgoing.reserve(), if !queue.is_empty() => {
                let permit = permit.map_err(|_closed| Status::unavailable("stream closed"))?;
                if let Some(next) = queue.pop_front() {
                    permit.send(AgentMessage { body: Some(next) });
                }
            }
            () = ordered.notified() => queue.extend(shared.mirror_mut().take_orders()),
            _ = beats.tick() => {
                let revision = shared.mirror().revision();
                let status = AgentStatus { revision, dataplane: "relay".into(), ..AgentStatus::default() };
                queue.push_back(Up::Status(status));
            }
            _ = looks.tick(), if reception.is_settled() => shared.mirror_mut().forget_idle(Instant::now()),
        }
    }
}

/// Looks at what the controller says of itself; answers how often it wants to hear something.
fn check(shared: &Shared, welcome: &Welcome, epoch: &str, revision: u64) -> Result<Duration, Status> {
    if welcome.protocol != PROTOCOL {
        return Err(Status::failed_precondition(format!(
            "the controller speaks protocol {}, this relay {PROTOCOL}",
            welcome.protocol
        )));
    }
    // One that is behind catches up, or another is not: agents must not be told of the past.
    if welcome.epoch == epoch && welcome.revision < revision {
        let message = format!("the controller is at revision {}, this relay at {revision}", welcome.revision);
        return Err(come_back_elsewhere(RETRY_MIN, &message));
    }
    let heartbeat_ms = welcome.heartbeat_ms.max(10);
    shared.heartbeat_ms.store(heartbeat_ms, Ordering::Relaxed);
    Ok(Duration::from_millis(heartbeat_ms.into()))
}

fn take_in(shared: &Shared, epoch: &str, heard: Batch, revision: u64) {
    let other = shared.mirror_mut().take_in(epoch, heard, revision);
    if other {
        let reason = "the repository is another: connect again";
        shared.sessions.registry.close_where(|_everybody| true, || Status::aborted(reason));
    }
}
