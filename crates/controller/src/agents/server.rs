//! The gRPC server for agents.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bulkhead_identity::tls::{Incoming, Peer};
use bulkhead_identity::{Holder, Identity};
use bulkhead_wire::proto::distribution_server::Distribution;
use bulkhead_wire::proto::{
    AgentMessage, ControllerMessage, EnrollRequest, Enrollment, FlowBatch, FlowReceipt, RenewRequest,
};
use futures::{Stream, StreamExt};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Server;
use tonic::{Request, Response, Status, Streaming};

use super::gate::Gate;
use super::session;
use crate::access::{self, AgentConnection, EnrollmentError};
use crate::clock;
use crate::context::{Context, stopped};
use crate::guard::Ends;

/// Messages that wait for an agent's connection.
const OUTGOING_LEN: usize = 64;
/// Receipts that wait for an agent's connection.
const RECEIPTS_LEN: usize = 16;
/// How often a silent connection is tried.
const KEEPALIVE_EVERY: Duration = Duration::from_secs(20);
/// How long the answer to that may take.
const KEEPALIVE_TIME_MAX: Duration = Duration::from_secs(10);

/// Calls at once on one connection: an agent has a stream of each kind, and renews its certificate now and then.
const STREAMS_MAX: u32 = 16;
/// Largest head of a call.
const HEADER_BYTES_MAX: u32 = 8 << 10;
/// Calls that a caller may take back before they are looked at; more end its connection.
const RESETS_MAX: usize = 32;

struct Service {
    context: Arc<Context>,
}

type Outgoing<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[async_trait::async_trait]
impl Distribution for Service {
    type SyncStream = Outgoing<ControllerMessage>;
    type ReportFlowsStream = Outgoing<FlowReceipt>;

    async fn sync(
        &self,
        request: Request<Streaming<AgentMessage>>,
    ) -> Result<Response<Self::SyncStream>, Status> {
        let of = self.agent(&request)?;
        let (outgoing, messages) = mpsc::channel(OUTGOING_LEN);
        let context = Arc::clone(&self.context);
        tokio::spawn(session::run(context, of, request.into_inner(), outgoing));
        Ok(Response::new(Box::pin(ReceiverStream::new(messages))))
    }

    async fn report_flows(
        &self,
        request: Request<Streaming<FlowBatch>>,
    ) -> Result<Response<Self::ReportFlowsStream>, Status> {
        self.agent(&request)?;
        let (outgoing, receipts) = mpsc::channel(RECEIPTS_LEN);
        let context = Arc::clone(&self.context);
        tokio::spawn(take_flows(context, request.into_inner(), outgoing));
        Ok(Response::new(Box::pin(ReceiverStream::new(receipts))))
    }

    async fn enroll(&self, request: Request<EnrollRequest>) -> Result<Response<Enrollment>, Status> {
        let peer = request.extensions().get::<Arc<Peer>>();
        let from = peer.ok_or_else(|| Status::internal("a connection without ends"))?.remote.ip();
        if !self.context.enrolling.may_try(from) {
            self.context.metrics.enrolls_too_many.add(1);
            if let Some(more) = self.context.enrolling.log.now() {
                tracing::warn!(%from, more, "an address tries to join too often");
            }
            return Err(Status::resource_exhausted(
                "too many have tried to join from this address: try again later",
            ));
        }
        let enrolled = access::enroll(&self.context, request.get_ref()).await;
        enrolled.map(Response::new).map_err(|error| self.refused(&error))
    }

    async fn renew(&self, request: Request<RenewRequest>) -> Result<Response<Enrollment>, Status> {
        let (holder, _) = self.agent(&request)?;
        let renewed = access::renew(&self.context, &holder, &request.get_ref().signing_request).await;
        renewed.map(Response::new).map_err(|error| self.refused(&error))
    }
}

impl Service {
    /// The agent that calls, by its certificate.
    fn agent<T>(&self, request: &Request<T>) -> Result<(Arc<Holder>, Ends), Status> {
        let refused = |status: Status| {
            self.context.metrics.agents_refused.add(1);
            status
        };
        let peer = request.extensions().get::<Arc<Peer>>();
        let peer = peer.ok_or_else(|| Status::internal("a connection without ends"))?;
        let ends = Ends { remote: peer.remote, local: peer.local };
        let Some(holder) = &peer.holder else {
            let message = "agents need a certificate: join with a token of bulkhead token create";
            return Err(refused(Status::unauthenticated(message)));
        };
        if !matches!(holder.identity, Identity::Agent(_)) {
            return Err(refused(Status::permission_denied(format!("{} is no agent", holder.identity))));
        }
        if holder.not_after <= clock::system() {
            return Err(refused(Status::unauthenticated("the certificate has ended")));
        }
        if self.context.grants.is_revoked(holder) {
            return Err(refused(Status::unauthenticated("the certificate is revoked")));
        }
        Ok((Arc::clone(holder), ends))
    }

    fn refused(&self, error: &EnrollmentError) -> Status {
        self.context.metrics.agents_refused.add(1);
        if let Some(more) = self.context.enrolling.log.now() {
            tracing::warn!(%error, more, "no certificate was given");
        }
        let message = error.to_string();
        match error {
            EnrollmentError::NotGranted(_) => Status::permission_denied(message),
            EnrollmentError::NotOurs => Status::failed_precondition(message),
            EnrollmentError::Host(_) | EnrollmentError::Name(_) | EnrollmentError::Authority(_) => {
                Status::invalid_argument(message)
            }
            EnrollmentError::Store(_) => Status::unavailable(message),
        }
    }
}

/// Takes in batches until the agent ends the stream or the controller stops.
async fn take_flows(
    context: Arc<Context>,
    mut batches: Streaming<FlowBatch>,
    receipts: mpsc::Sender<Result<FlowReceipt, Status>>,
) {
    let mut shutdown = context.shutdown.clone();
    loop {
        let batch = tokio::select! {
            batch = batches.message() => batch,
            () = stopped(&mut shutdown) => {
                // The agent may be gone already.
                let _ = receipts.try_send(Err(Status::unavailable("the controller stops")));
                return;
            }
        };
        let Ok(Some(FlowBatch { sequence, records, lost })) = batch else { return };
        context.flows.receive(&records, lost);
        if receipts.send(Ok(FlowReceipt { sequence })).await.is_err() {
            return;
        }
    }
}

/// Serves until `shutdown`, and then until the sessions have ended.
pub(crate) async fn serve(
    incoming: mpsc::Receiver<Incoming>,
    context: Arc<Context>,
    mut shutdown: watch::Receiver<bool>,
) -> Result<(), tonic::transport::Error> {
    let stop = async move { stopped(&mut shutdown).await };
    let incoming =
        ReceiverStream::new(incoming).map(|through| Ok::<_, Infallible>(AgentConnection::from(through)));
    Server::builder()
        .http2_keepalive_interval(Some(KEEPALIVE_EVERY))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIME_MAX))
        .max_concurrent_streams(STREAMS_MAX)
        .http2_max_header_list_size(HEADER_BYTES_MAX)
        .http2_max_pending_accept_reset_streams(Some(RESETS_MAX))
        .add_service(Gate::new(Service { context }))
        .serve_with_incoming_shutdown(incoming, stop)
        .await
}
