//! The gRPC server for agents.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bulkhead_identity::Identity;
use bulkhead_identity::tls::{Incoming, Peer};
use bulkhead_wire::MESSAGE_BYTES_MAX;
use bulkhead_wire::proto::distribution_server::{Distribution, DistributionServer};
use bulkhead_wire::proto::{
    AgentMessage, ControllerMessage, EnrollRequest, Enrollment, FlowBatch, FlowReceipt, RenewRequest,
};
use futures::{Stream, StreamExt};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Server;
use tonic::{Request, Response, Status, Streaming};

use super::desk::{Caller, Desk};
use super::session;
use crate::access::AgentConnection;
use crate::context::stopped;
use crate::guard::Ends;

/// Messages that wait for an agent's connection.
const OUTGOING_LEN: usize = 64;
/// Receipts that wait for an agent's connection.
const RECEIPTS_LEN: usize = 16;
/// How often a silent connection is tried.
const KEEPALIVE_EVERY: Duration = Duration::from_secs(20);
/// How long the answer to that may take.
const KEEPALIVE_TIME_MAX: Duration = Duration::from_secs(10);

struct Service<D> {
    desk: Arc<D>,
}

type Outgoing<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[async_trait::async_trait]
impl<D: Desk> Distribution for Service<D> {
    type SyncStream = Outgoing<ControllerMessage>;
    type ReportFlowsStream = Outgoing<FlowReceipt>;

    async fn sync(
        &self,
        request: Request<Streaming<AgentMessage>>,
    ) -> Result<Response<Self::SyncStream>, Status> {
        let caller = self.caller(&request)?;
        let (outgoing, messages) = mpsc::channel(OUTGOING_LEN);
        let desk = Arc::clone(&self.desk);
        tokio::spawn(session::run(desk, caller, request.into_inner(), outgoing));
        Ok(Response::new(Box::pin(ReceiverStream::new(messages))))
    }

    async fn report_flows(
        &self,
        request: Request<Streaming<FlowBatch>>,
    ) -> Result<Response<Self::ReportFlowsStream>, Status> {
        let caller = self.caller(&request)?;
        let (outgoing, receipts) = mpsc::channel(RECEIPTS_LEN);
        let desk = Arc::clone(&self.desk);
        tokio::spawn(async move { desk.flows(caller, (request.into_inner(), outgoing)).await });
        Ok(Response::new(Box::pin(ReceiverStream::new(receipts))))
    }

    async fn enroll(&self, request: Request<EnrollRequest>) -> Result<Response<Enrollment>, Status> {
        let has_certificate =
            request.extensions().get::<Arc<Peer>>().is_some_and(|peer| peer.holder.is_some());
        let caller = if has_certificate { self.caller(&request).ok() } else { None };
        self.desk.enroll(caller, request.into_inner()).await.map(Response::new)
    }

    async fn renew(&self, request: Request<RenewRequest>) -> Result<Response<Enrollment>, Status> {
        let caller = self.caller(&request)?;
        self.desk.renew(caller, request.into_inner()).await.map(Response::new)
    }
}

impl<D: Desk> Service<D> {
    /// The agent or relay that calls, by its certificate.
    fn caller<T>(&self, request: &Request<T>) -> Result<Caller, Status> {
        let refused = |status: Status| {
            self.desk.metrics().agents_refused.add(1);
            status
        };
        let peer = request.extensions().get::<Arc<Peer>>();
        let peer = peer.ok_or_else(|| Status::internal("a connection without ends"))?;
        let ends = Ends { remote: peer.remote, local: peer.local };
        let Some(holder) = &peer.holder else {
            let message = "agents need a certificate: join with a token of bulkhead token create";
            return Err(refused(Status::unauthenticated(message)));
        };
        if !matches!(holder.identity, Identity::Agent(_) | Identity::Relay(_)) {
            return Err(refused(Status::permission_denied(format!("{} is no agent", holder.identity))));
        }
        if holder.not_after <= SystemTime::now() {
            return Err(refused(Status::unauthenticated("the certificate has ended")));
        }
        if self.desk.revoked(holder) {
            return Err(refused(Status::unauthenticated("the certificate is revoked")));
        }
        Ok(Caller { holder: Arc::clone(holder), chain: Arc::new(peer.chain.clone()), ends })
    }
}

/// Serves until `shutdown`, and then until the sessions have ended.
pub(crate) async fn serve<D: Desk>(
    incoming: mpsc::Receiver<Incoming>,
    desk: Arc<D>,
    mut shutdown: watch::Receiver<bool>,
) -> Result<(), tonic::transport::Error> {
    let stop = async move { stopped(&mut shutdown).await };
    let service = DistributionServer::new(Service { desk })
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX);
    let incoming =
        ReceiverStream::new(incoming).map(|through| Ok::<_, Infallible>(AgentConnection::from(through)));
    Server::builder()
        .http2_keepalive_interval(Some(KEEPALIVE_EVERY))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIME_MAX))
        .add_service(service)
        .serve_with_incoming_shutdown(incoming, stop)
        .await
}
