//! The conversation with the controller: connects, retries with back-off, hands messages to the loop.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::time::Duration;

use bulkhead_membership::Membership;
use bulkhead_model::Facts;
use bulkhead_wire::proto::agent_message::Body;
use bulkhead_wire::proto::controller_message::Body as In;
use bulkhead_wire::proto::distribution_client::DistributionClient;
use bulkhead_wire::proto::{AgentMessage, ControllerMessage, Hello};
use bulkhead_wire::{
    MESSAGE_BYTES_MAX, PACKING, PROTOCOL, address_to_wire, is_elsewhere, unpack, when_to_come_back,
};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;

use crate::Config;
use crate::config::OUTGOING_QUEUE_LEN;
use crate::host_facts;
use crate::inputs::Input;

/// First and longest wait before the controller is tried again.
const RETRY_MIN: Duration = Duration::from_millis(100);
const RETRY_MAX: Duration = Duration::from_secs(10);

/// How far the agent's knowledge goes; what the next Hello says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Progress {
    /// Of the repository that the revisions are of; empty: none was ever reached.
    pub(crate) epoch: String,
    /// Tiers and policies are complete up to here.
    pub(crate) revision: u64,
    /// All remembered members are complete up to here; never ahead of `revision`.
    pub(crate) members: u64,
}

/// What happens on the stream.
#[derive(Debug)]
pub(crate) enum SessionEvent {
    /// The stream is open; messages go here.
    Connected(mpsc::Sender<AgentMessage>),
    /// The controller says something.
    Message(ControllerMessage),
    /// The stream is closed, or could not be opened, and will be tried again.
    Lost {
        /// Why.
        reason: String,
        /// When it will be tried again.
        retry: Duration,
    },
}

/// The task that talks to controllers.
#[derive(Debug)]
pub(crate) struct Conversation {
    /// Where to say how far the agent is.
    pub(crate) progress: watch::Sender<Progress>,
    pub(crate) membership: Arc<Membership>,
    pub(crate) task: tokio::task::JoinHandle<()>,
}

/// Starts the task.
pub(crate) fn spawn(
    config: Arc<Config>,
    membership: Arc<Membership>,
    input: mpsc::Sender<Input>,
    facts: Facts,
    progress: Progress,
) -> Conversation {
    let (progress, hello) = watch::channel(progress);
    let known_as = Arc::clone(&membership);
    let task = tokio::spawn(async move {
        let mut attempt = 0u32;
        loop {
            let place = (&*config, &*membership);
            let (reason, told) = match converse(place, &facts, &input, &hello, &mut attempt).await {
                Ok(Ended::Closed) => ("the controller closed the stream".to_owned(), None),
                Ok(Ended::GoesHome) => {
                    membership.go_home();
                    (format!("going back to {}", membership.controller()), Some(Duration::ZERO))
                }
                Err(status) => {
                    let told = when_to_come_back(&status);
                    if status.code() == tonic::Code::Unauthenticated {
                        membership.refused();
                    }
                    // Who is busy is asked again; who stops or is gone is not.
                    if told.is_some() && is_elsewhere(&status) {
                        membership.try_another();
                    }
                    (describe(&status), told)
                }
            };
            if told.is_none() {
                membership.try_another();
            }
            let retry = told.unwrap_or_else(|| back_off(&config.host, attempt));
            attempt = attempt.saturating_add(1);
            let lost = SessionEvent::Lost { reason, retry };
            if input.send(Input::Session(lost)).await.is_err() {
                return;
            }
            tokio::time::sleep(retry).await;
        }
    });
    Conversation { progress, membership: known_as, task }
}

async fn converse(
    (config, membership): (&Config, &Membership),
    facts: &Facts,
    input: &mpsc::Sender<Input>,
    hello: &watch::Receiver<Progress>,
    attempt: &mut u32,
) -> Result<Ended, tonic::Status> {
    let mut client =
        DistributionClient::new(membership.connect().await?).max_decoding_message_size(MESSAGE_BYTES_MAX);
    let (outgoing, messages) = mpsc::channel(OUTGOING_QUEUE_LEN);
    let Progress { epoch, revision, members: _ } = hello.borrow().clone();
    let hello = Hello {
        protocol: PROTOCOL,
        host: config.host.clone(),
        version: env!("CARGO_PKG_VERSION").into(),
        epoch,
        revision,
        labels: config.labels.iter().map(|(key, value)| (key.into(), value.into())).collect(),
        facts: facts.iter().map(|(key, value)| (key.into(), value.into())).collect(),
        addresses: host_facts::addresses()
            .into_iter()
            .map(|address| address_to_wire(address).into())
            .collect(),
        accepts: vec![PACKING.into()],
        ..Hello::default()
    };
    let first = AgentMessage { body: Some(Body::Hello(hello)) };
    outgoing.send(first).await.map_err(|_closed| tonic::Status::internal("stream closed"))?;
    let mut stream = client.sync(ReceiverStream::new(messages)).await?.into_inner();
    if input.send(Input::Session(SessionEvent::Connected(outgoing))).await.is_err() {
        return Ok(Ended::Closed);
    }
    let home = way_home(membership, &config.host, Duration::from_millis(config.home_after_ms));
    tokio::pin!(home);
    loop {
        let message = tokio::select! {
            message = stream.message() => message?,
            () = &mut home => return Ok(Ended::GoesHome),
        };
        let Some(mut message) = message else { return Ok(Ended::Closed) };
        *attempt = 0;
        if let Some(In::Resources(resources)) = &mut message.body {
            // What cannot be read must not count as told: the stream ends, and what is known stays.
            let packed = std::mem::take(&mut resources.packed);
            let more = if packed.is_empty() { Ok(Vec::new()) } else { unpack(&packed) };
            resources.upserts.extend(more.map_err(|error| tonic::Status::data_loss(error.to_string()))?);
        }
        if input.send(Input::Session(SessionEvent::Message(message))).await.is_err() {
            return Ok(Ended::Closed);
        }
    }
}

/// How a conversation ended that did not fail.
#[derive(Debug)]
enum Ended {
    Closed,
    /// This host's favourite controller is there again.
    GoesHome,
}

/// Completes when this host's favourite controller answers, if another is in use: looked at now and then, and each host at
/// another time, since all of a fleet may be away from it.
async fn way_home(membership: &Membership, host: &str, after: Duration) {
    if membership.is_home() {
        return std::future::pending().await;
    }
    let mut look = 0;
    loop {
        tokio::time::sleep(spread(after, host, look)).await;
        if membership.home_answers().await {
            return;
        }
        look += 1;
    }
}

/// Doubles up to the limit, then spread over half of it by host and attempt, so that a fleet that lost its
/// controller does not come back as one.
fn back_off(host: &str, attempt: u32) -> Duration {
    spread(RETRY_MIN.saturating_mul(1 << attempt.min(10)).min(RETRY_MAX), host, attempt)
}

/// Some time between half of it and all, another for each host and attempt.
fn spread(full: Duration, host: &str, attempt: u32) -> Duration {
    let mut hasher = DefaultHasher::new();
    (host, attempt).hash(&mut hasher);
    let share = hasher.finish() % 512;
    full / 2 + full / 2 * u32::try_from(share).unwrap_or(0) / 512
}

/// A status with its causes, which tonic keeps to itself.
fn describe(status: &tonic::Status) -> String {
    let mut text = status.message().to_owned();
    let mut cause = std::error::Error::source(status);
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use bulkhead_identity::tls::{self, ServerIdentity};
    use bulkhead_identity::{Authority, Identity};

    use super::*;

    #[tokio::test]
    async fn an_agent_goes_home_once_its_first_controller_answers() {
        let authority = Authority::generate("test", SystemTime::now()).unwrap();
        let issue = |identity: &Identity| {
            authority.issue(identity, Duration::from_secs(600), SystemTime::now(), &[]).unwrap()
        };
        let directory = tempfile::tempdir().unwrap();
        let free_port = || std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap();
        let config = Config {
            host: "h1".into(),
            state_directory: directory.path().into(),
            controllers: vec![free_port().to_string(), free_port().to_string()],
            ..Config::default()
        };
        let own = issue(&Identity::agent("h1").unwrap());
        own.save(&config.identity_directory(), crate::IDENTITY_FILES).unwrap();
        let membership = crate::membership::open(&config).unwrap();
        let (look, quiet) = (Duration::from_millis(10), Duration::from_millis(200));
        let home = membership.controller().to_owned();
        let at_home = tokio::time::timeout(quiet, way_home(&membership, "h1", look)).await;
        assert!(at_home.is_err(), "it is there");
        membership.try_another();
        assert!(!membership.is_home());
        let nobody = tokio::time::timeout(quiet, way_home(&membership, "h1", look)).await;
        assert!(nobody.is_err(), "nobody answers there");
        let server = ServerIdentity::new(&issue(&Identity::controller("a").unwrap())).unwrap();
        let tls = tls::server_config(&server, authority.bundle(), "h2").unwrap();
        let _incoming = tls::listen(tokio::net::TcpListener::bind(&home).await.unwrap(), tls);
        let back = tokio::time::timeout(Duration::from_secs(10), way_home(&membership, "h1", look)).await;
        assert!(back.is_ok(), "it answers");
        membership.go_home();
        assert_eq!((membership.is_home(), membership.controller()), (true, home.as_str()));
    }

    #[test]
    fn back_off_grows_is_spread_and_is_bounded() {
        let waits: Vec<_> = (0..20).map(|attempt| back_off("h", attempt)).collect();
        assert!(waits.iter().all(|wait| *wait >= RETRY_MIN / 2 && *wait <= RETRY_MAX));
        assert!(waits[19] >= RETRY_MAX / 2);
        assert_ne!(back_off("a", 12), back_off("b", 12));
    }
}
