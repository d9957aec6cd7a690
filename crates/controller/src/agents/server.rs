//! The gRPC server for agents.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bulkhead_identity::Identity;
use bulkhead_identity::tls::{Incoming as Through, Peer};
use bulkhead_wire::proto::distribution_server::Distribution;
use bulkhead_wire::proto::{EnrollRequest, Enrollment, FlowBatch, FlowReceipt, RenewRequest};
use futures::{FutureExt, Stream, StreamExt};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::body::Body;
use tonic::codegen::http;
use tonic::transport::Server;
use tonic::{Extensions, Request, Response, Status, Streaming};

use super::desk::{Caller, Desk};
use super::gate::{Gate, Sync};
use super::session;
use super::stream::{self, Incoming};
use crate::access::AgentConnection;
use crate::clock;
use crate::context::stopped;
use crate::guard::Ends;

/// Pieces of messages that wait for an agent's connection.
const OUTGOING_LEN: usize = 64;
/// Receipts that wait for an agent's connection.
const RECEIPTS_LEN: usize = 16;
/// How often a silent connection is tried.
const KEEPALIVE_EVERY: Duration = Duration::from_secs(20);
/// How long the answer to that may take.
const KEEPALIVE_TIME_MAX: Duration = Duration::from_secs(10);

/// Most agents of a relay.
pub(crate) const RELAY_AGENTS_MAX: usize = 10_000;
/// Calls at once on one connection: an agent has a stream of each kind, and renews its certificate now and then.
const STREAMS_MAX: u32 = 16;
/// The same of a relay, which has two streams for each of its agents and passes on their requests for certificates.
const RELAY_STREAMS_MAX: u32 = 30_000;
const _: () = assert!(RELAY_STREAMS_MAX as usize >= 3 * RELAY_AGENTS_MAX);
/// Largest head of a call.
const HEADER_BYTES_MAX: u32 = 8 << 10;
/// Calls that a caller may take back before they are looked at; more end its connection.
const RESETS_MAX: usize = 32;
/// The same of a relay, all of whose agents may leave at once.
const RELAY_RESETS_MAX: usize = RELAY_AGENTS_MAX;

/// Answers calls.
pub(super) struct Service<D> {
    desk: Arc<D>,
}

type Outgoing<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[async_trait::async_trait]
impl<D: Desk> Distribution for Service<D> {
    type ReportFlowsStream = Outgoing<FlowReceipt>;

    async fn report_flows(
        &self,
        request: Request<Streaming<FlowBatch>>,
    ) -> Result<Response<Self::ReportFlowsStream>, Status> {
        let caller = self.caller(request.extensions())?;
        let (outgoing, receipts) = mpsc::channel(RECEIPTS_LEN);
        let desk = Arc::clone(&self.desk);
        tokio::spawn(async move { desk.flows(caller, (request.into_inner(), outgoing)).await });
        Ok(Response::new(Box::pin(ReceiverStream::new(receipts))))
    }

    async fn enroll(&self, request: Request<EnrollRequest>) -> Result<Response<Enrollment>, Status> {
        let peer = request.extensions().get::<Arc<Peer>>();
        let peer = peer.ok_or_else(|| Status::internal("a connection without ends"))?;
        let from = peer.remote.ip();
        let caller = if peer.holder.is_some() { self.caller(request.extensions()).ok() } else { None };
        // What a relay passes on was counted by the relay, for each address of its site: here all would be one.
        let is_relay = caller.is_some() && is_relay::<D>(peer);
        let enrolling = &self.desk.sessions().enrolling;
        if !is_relay && !enrolling.may_try(from) {
            self.desk.sessions().metrics.enrolls_too_many.add(1);
            if let Some(more) = enrolling.log.now() {
                tracing::warn!(%from, more, "an address tries to join too often");
            }
            return Err(Status::resource_exhausted(
                "too many have tried to join from this address: try again later",
            ));
        }
        self.desk.enroll(caller, request.into_inner()).await.map(Response::new)
    }

    async fn renew(&self, request: Request<RenewRequest>) -> Result<Response<Enrollment>, Status> {
        let caller = self.caller(request.extensions())?;
        self.desk.renew(caller, request.into_inner()).await.map(Response::new)
    }
}

impl<D: Desk> Sync for Service<D> {
    fn sync(&self, request: http::Request<Body>) -> http::Response<Body> {
        let caller = match self.caller(request.extensions()) {
            Ok(caller) => caller,
            Err(status) => return status.into_http(),
        };
        let (outgoing, pieces) = mpsc::channel(OUTGOING_LEN);
        tokio::spawn(session::run(Arc::clone(&self.desk), caller, Incoming::new(request), outgoing));
        stream::answer(pieces)
    }
}

impl<D: Desk> Service<D> {
    /// The agent or relay that calls, by its certificate.
    fn caller(&self, extensions: &Extensions) -> Result<Caller, Status> {
        let refused = |status: Status| {
            self.desk.sessions().metrics.agents_refused.add(1);
            status
        };
        let peer = extensions.get::<Arc<Peer>>();
        let peer = peer.ok_or_else(|| Status::internal("a connection without ends"))?;
        let ends = Ends { remote: peer.remote, local: peer.local };
        let Some(holder) = &peer.holder else {
            let message = "agents need a certificate: join with a token of bulkhead token create";
            return Err(refused(Status::unauthenticated(message)));
        };
        if !matches!(holder.identity, Identity::Agent(_) | Identity::Relay(_)) {
            return Err(refused(Status::permission_denied(format!("{} is no agent", holder.identity))));
        }
        if holder.not_after <= clock::system() {
            return Err(refused(Status::unauthenticated("the certificate has ended")));
        }
        if self.desk.revoked(holder) {
            return Err(refused(Status::unauthenticated("the certificate is revoked")));
        }
        Ok(Caller { holder: Arc::clone(holder), chain: Arc::clone(&peer.chain), ends })
    }
}

/// Serves until `shutdown`, and then until the sessions have ended.
pub(crate) async fn serve<D: Desk>(
    incoming: mpsc::Receiver<Through>,
    desk: Arc<D>,
    mut shutdown: watch::Receiver<bool>,
) -> Result<(), tonic::transport::Error> {
    let stop = async move { stopped(&mut shutdown).await };
    let stop = stop.shared();
    let gate = Gate::new(Service { desk });
    let server = |streams, resets, incoming| {
        let incoming =
            ReceiverStream::new(incoming).map(|through| Ok::<_, Infallible>(AgentConnection::from(through)));
        Server::builder()
            .http2_keepalive_interval(Some(KEEPALIVE_EVERY))
            .http2_keepalive_timeout(Some(KEEPALIVE_TIME_MAX))
            .max_concurrent_streams(streams)
            .http2_max_header_list_size(HEADER_BYTES_MAX)
            .http2_max_pending_accept_reset_streams(Some(resets))
            .add_service(gate.clone())
            .serve_with_incoming_shutdown(incoming, stop.clone())
    };
    let (agents, of_agents) = mpsc::channel(1);
    let (relays, of_relays) = mpsc::channel(1);
    tokio::spawn(part::<D>(incoming, agents, relays));
    let served = tokio::try_join!(
        server(STREAMS_MAX, RESETS_MAX, of_agents),
        server(RELAY_STREAMS_MAX, RELAY_RESETS_MAX, of_relays)
    );
    served.map(|((), ())| ())
}

/// Sends connections where their bounds are, until nobody takes them any more.
async fn part<D: Desk>(
    mut incoming: mpsc::Receiver<Through>,
    agents: mpsc::Sender<Through>,
    relays: mpsc::Sender<Through>,
) {
    loop {
        let through = tokio::select! {
            through = incoming.recv() => through,
            () = agents.closed() => return,
        };
        let Some(through) = through else { return };
        let to = if is_relay::<D>(&through.1) { &relays } else { &agents };
        if to.send(through).await.is_err() {
            return;
        }
    }
}

/// Whether this is a relay, where relays are served.
fn is_relay<D: Desk>(peer: &Peer) -> bool {
    let holder = peer.holder.as_ref();
    D::SERVES_RELAYS && holder.is_some_and(|holder| matches!(holder.identity, Identity::Relay(_)))
}
