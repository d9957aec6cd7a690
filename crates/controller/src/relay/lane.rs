//! A host's way upstream: a session in the host's name, as long as its agent has one here. What the agent publishes goes up
//! and is acknowledged when the controller has stored it.

use std::sync::Arc;
use std::time::Duration;

use bulkhead_wire::proto::agent_message::Body as Up;
use bulkhead_wire::proto::controller_message::Body as Down;
use bulkhead_wire::proto::distribution_client::DistributionClient;
use bulkhead_wire::proto::{AgentMessage, AgentStatus, Hello, Inventory, InventoryAck};
use bulkhead_wire::{MESSAGE_BYTES_MAX, when_to_come_back};
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status};

use super::desk::{Line, Shared};
use super::outbox::Outbox;
use crate::members::SessionId;

/// Messages of the agent that wait for its lane; more are not read.
pub(super) const INPUTS_LEN: usize = 16;
/// Messages on their way upstream.
const OUTGOING_LEN: usize = 4;
/// How long to wait before a lane that broke is opened again while the connection stands.
const RETRY: Duration = Duration::from_millis(500);

/// What an agent says that goes up.
#[derive(Debug)]
pub(super) enum Input {
    Inventory(Inventory),
    Status(AgentStatus),
}

/// Whose lane it is.
#[derive(Debug)]
pub(super) struct Whose {
    pub(super) host: Arc<str>,
    pub(super) session: SessionId,
    pub(super) serial: String,
    /// As it goes up.
    pub(super) hello: Hello,
    pub(super) acks: mpsc::Sender<InventoryAck>,
    /// Whether the controller has let it in, told once.
    pub(super) admitted: Option<oneshot::Sender<Result<(), Status>>>,
}

/// Why a lane is not open any more.
enum End {
    /// The agent has left.
    Left,
    /// The controller does not want this session.
    Refused(Status),
    /// It may work again after a time.
    Lost(Duration),
}

/// What is to go up.
#[derive(Default)]
struct Load {
    outbox: Outbox,
    status: Option<AgentStatus>,
    status_due: bool,
}

impl Load {
    fn take_in(&mut self, input: Input) -> Result<(), Status> {
        match input {
            Input::Inventory(inventory) => {
                self.outbox.take_in(inventory).map_err(|error| Status::resource_exhausted(error.to_string()))
            }
            Input::Status(status) => {
                self.status = Some(status);
                self.status_due = true;
                Ok(())
            }
        }
    }

    fn next(&mut self) -> Option<Up> {
        if let Some(inventory) = self.outbox.next() {
            return Some(Up::Inventory(inventory));
        }
        std::mem::take(&mut self.status_due).then(|| self.status.clone().map(Up::Status)).flatten()
    }
}

/// Carries until the agent leaves, or may not be here.
pub(super) async fn run(shared: Arc<Shared>, mut whose: Whose, mut inputs: mpsc::Receiver<Input>) {
    let mut load = Load::default();
    let mut lines = shared.line.subscribe();
    let refused = loop {
        let line = lines.borrow_and_update().clone();
        let end = match line {
            Some(line) => {
                let lost = async {
                    // A dropped sender is the relay's end.
                    let _ = lines.changed().await;
                };
                tokio::select! {
                    end = converse(&shared, &mut whose, &line, &mut load, &mut inputs) => end,
                    () = lost => End::Lost(Duration::ZERO),
                }
            }
            None => {
                // There is nobody to ask: what is known here decides.
                admit(&mut whose, Ok(()));
                End::Lost(Duration::MAX)
            }
        };
        let wait = match end {
            End::Left => return,
            End::Refused(status) => break status,
            End::Lost(wait) => wait,
        };
        let again = tokio::time::sleep(wait.min(Duration::from_secs(3600)));
        tokio::pin!(again);
        let refused = loop {
            tokio::select! {
                () = &mut again => break None,
                _ = lines.changed() => break None,
                input = inputs.recv() => {
                    let Some(input) = input else { return };
                    if let Err(status) = load.take_in(input) {
                        break Some(status);
                    }
                }
            }
        };
        if let Some(status) = refused {
            break status;
        }
    };
    if refused.code() == Code::Unauthenticated {
        shared.remember_refused(&whose.serial);
    }
    admit(&mut whose, Err(refused.clone()));
    shared.sessions.registry.close_session(&whose.host, whose.session, refused);
}

fn admit(whose: &mut Whose, result: Result<(), Status>) {
    if let Some(admitted) = whose.admitted.take() {
        // The session may have ended meanwhile.
        let _ = admitted.send(result);
    }
}

fn ended(status: Status) -> End {
    match status.code() {
        // Revoked, not of this relay's hosts, or served elsewhere by now: the agent is to hear it.
        Code::Unauthenticated
        | Code::PermissionDenied
        | Code::Aborted
        | Code::InvalidArgument
        | Code::FailedPrecondition => End::Refused(status),
        _ => End::Lost(when_to_come_back(&status).unwrap_or(RETRY)),
    }
}

async fn converse(
    shared: &Shared,
    whose: &mut Whose,
    line: &Line,
    load: &mut Load,
    inputs: &mut mpsc::Receiver<Input>,
) -> End {
    let mut client =
        DistributionClient::new(line.channel.clone()).max_encoding_message_size(MESSAGE_BYTES_MAX);
    let (outgoing, messages) = mpsc::channel(OUTGOING_LEN);
    let first = AgentMessage { body: Some(Up::Hello(whose.hello.clone())) };
    if outgoing.send(first).await.is_err() {
        return End::Lost(RETRY);
    }
    let mut stream = match client.sync(ReceiverStream::new(messages)).await {
        Ok(stream) => stream.into_inner(),
        Err(status) => return ended(status),
    };
    let mut open = false;
    let mut next = None;
    loop {
        if open && next.is_none() {
            next = load.next();
        }
        tokio::select! {
            message = stream.message() => match message {
                Ok(Some(message)) => match message.body {
                    Some(Down::Welcome(_)) => {
                        open = true;
                        shared.forget_refused(&whose.serial);
                        admit(whose, Ok(()));
                        load.outbox.begin_anew();
                        load.status_due = load.status.is_some();
                    }
                    Some(Down::InventoryAck(ack)) => {
                        for ack in load.outbox.acknowledged(&ack) {
                            if whose.acks.send(ack).await.is_err() {
                                return End::Left;
                            }
                        }
                    }
                    _ => {}
                },
                Ok(None) => return End::Lost(RETRY),
                Err(status) => return ended(status),
            },
            input = inputs.recv() => {
                let Some(input) = input else { return End::Left };
                if let Err(status) = load.take_in(input) {
                    return End::Refused(status);
                }
            }
            permit = outgoing.reserve(), if next.is_some() => {
                let Ok(permit) = permit else { return End::Lost(RETRY) };
                if let Some(body) = next.take() {
                    permit.send(AgentMessage { body: Some(body) });
                }
            }
        }
    }
}
