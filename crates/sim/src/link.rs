//! A simulated agent's connection: opens, retries, reads as fast as it can or slowly on purpose.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use bulkhead_identity::tls::{self, ClientConfig};
use bulkhead_wire::MESSAGE_BYTES_MAX;
use bulkhead_wire::proto::agent_message::Body as Out;
use bulkhead_wire::proto::distribution_client::DistributionClient;
use bulkhead_wire::proto::{AgentMessage, ControllerMessage};
use hyper_util::rt::TokioIo;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status, Streaming};

use crate::agent::{Agent, Change};

/// Messages of an agent that wait for its connection, as the real agent has them.
const OUTGOING_LEN: usize = 1024;
/// A connection that takes longer to open counts as failed: in a storm thousands wait for each other.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(30);
/// First and longest wait before the controller is tried again.
const RETRY_MIN: Duration = Duration::from_millis(100);
const RETRY_MAX: Duration = Duration::from_secs(10);
/// How long one who reads slowly leaves each message lying.
const SLOW_PAUSE: Duration = Duration::from_millis(20);

/// What happens to an agent.
#[derive(Debug, Clone)]
pub(crate) enum Command {
    /// On its host.
    Change(Change, bool),
    /// Its connection breaks.
    Break,
    /// It is to end.
    Quit,
}

enum Ended {
    Broken,
    Quit,
}

/// The channel to the controller. The one place that knows how it is secured.
async fn open(controller: &str, config: &Arc<ClientConfig>) -> Result<Channel, Status> {
    let (address, config) = (controller.to_owned(), Arc::clone(config));
    let connector = tower::service_fn(move |_uri| {
        let (address, config) = (address.clone(), Arc::clone(&config));
        async move { tls::connect_as_agent(&address, &config).await.map(TokioIo::new) }
    });
    let endpoint = Endpoint::from_static("http://controller").connect_timeout(CONNECT_TIMEOUT);
    let connected = endpoint.connect_with_connector(connector).await;
    connected.map_err(|error| Status::unavailable(format!("{error:?}")))
}

/// Lives until it is told to quit.
pub(crate) async fn live(mut agent: Agent, mut commands: mpsc::Receiver<Command>) -> Agent {
    let mut attempt = 0;
    let config = match agent.world.identity.agent(agent.host()) {
        Ok(config) => config,
        Err(error) => {
            agent.world.complain(format!("{}: {error:#}", agent.host()));
            return agent;
        }
    };
    loop {
        match converse(&mut agent, &config, &mut commands, &mut attempt).await {
            Ok(Ended::Quit) => return agent,
            Ok(Ended::Broken) => {
                agent.disconnected();
                agent.world.broken.fetch_add(1, Relaxed);
            }
            Err(status) => {
                agent.disconnected();
                if bulkhead_wire::when_to_come_back(&status).is_some() {
                    agent.world.deferred.fetch_add(1, Relaxed);
                } else {
                    agent.world.lost.fetch_add(1, Relaxed);
                }
                // A connection may fail in a storm, or be reset when too many wait to be accepted.
                let transient = matches!(
                    status.code(),
                    Code::Unavailable | Code::Unknown | Code::Cancelled | Code::Aborted
                );
                if !transient {
                    agent.world.complain(format!("{}: {status}", agent.host()));
                }
                let told = bulkhead_wire::when_to_come_back(&status);
                let wait = told.unwrap_or_else(|| retry(agent.number, attempt));
                attempt += 1;
                let wait = tokio::time::sleep(wait);
                tokio::pin!(wait);
                loop {
                    tokio::select! {
                        () = &mut wait => break,
                        command = commands.recv() => match command {
                            Some(Command::Change(change, measured)) => _ = agent.change(&change, measured),
                            Some(Command::Break) => _ = agent.world.broken.fetch_add(1, Relaxed),
                            Some(Command::Quit) | None => return agent,
                        },
                    }
                }
            }
        }
    }
}

/// Doubles up to the limit, and is another for each agent.
fn retry(agent: u32, attempt: u32) -> Duration {
    let full = RETRY_MIN.saturating_mul(1 << attempt.min(10)).min(RETRY_MAX);
    full / 2 + full / 2 * (agent.wrapping_mul(2_654_435_761).wrapping_add(attempt) % 512) / 512
}

async fn converse(
    agent: &mut Agent,
    config: &Arc<ClientConfig>,
    commands: &mut mpsc::Receiver<Command>,
    attempt: &mut u32,
) -> Result<Ended, Status> {
    let channel = open(&agent.world.controller, config).await?;
    let mut client = DistributionClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX);
    let (outgoing, messages) = mpsc::channel(OUTGOING_LEN);
    send(&outgoing, Out::Hello(agent.connected()))?;
    let mut stream = client.sync(ReceiverStream::new(messages)).await?.into_inner();
    loop {
        tokio::select! {
            message = next(&mut stream, !agent.counts) => {
                let Some(message) = message? else { return Err(Status::unavailable("the stream has ended")) };
                *attempt = 0;
                agent.world.message();
                let Some(body) = message.body else { continue };
                let answers = agent.hears(body).map_err(|error| Status::internal(format!("{error:#}")))?;
                answers.into_iter().try_for_each(|body| send(&outgoing, body))?;
            }
            () = at(agent.status_due()) => agent.status().into_iter().try_for_each(|body| send(&outgoing, body))?,
            command = commands.recv() => match command {
                Some(Command::Change(change, measured)) => {
                    let said = agent.change(&change, measured);
                    said.into_iter().try_for_each(|body| send(&outgoing, body))?;
                }
                Some(Command::Break) => return Ok(Ended::Broken),
                Some(Command::Quit) | None => return Ok(Ended::Quit),
            },
        }
    }
}

/// Completes then, or never.
async fn at(moment: Option<Instant>) {
    match moment {
        Some(moment) => tokio::time::sleep_until(moment.into()).await,
        None => std::future::pending().await,
    }
}

async fn next(
    stream: &mut Streaming<ControllerMessage>,
    slowly: bool,
) -> Result<Option<ControllerMessage>, Status> {
    if slowly {
        tokio::time::sleep(SLOW_PAUSE).await;
    }
    stream.message().await
}

/// As the real agent: a stream that takes no more is given up.
fn send(outgoing: &mpsc::Sender<AgentMessage>, body: Out) -> Result<(), Status> {
    let message = AgentMessage { body: Some(body) };
    outgoing
        .try_send(message)
        .map_err(|error| Status::resource_exhausted(format!("outgoing messages: {error}")))
}
