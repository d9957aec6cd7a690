//! The gRPC server for agents.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bulkhead_wire::MESSAGE_BYTES_MAX;
use bulkhead_wire::proto::distribution_server::{Distribution, DistributionServer};
use bulkhead_wire::proto::{AgentMessage, ControllerMessage, FlowBatch, FlowReceipt};
use futures::Stream;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status, Streaming};

use super::session;
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
        let (outgoing, messages) = mpsc::channel(OUTGOING_LEN);
        let context = Arc::clone(&self.context);
        let ends = request.remote_addr().zip(request.local_addr());
        let ends = ends.map(|(remote, local)| Ends { remote, local });
        tokio::spawn(session::run(context, ends, request.into_inner(), outgoing));
        Ok(Response::new(Box::pin(ReceiverStream::new(messages))))
    }

    async fn report_flows(
        &self,
        request: Request<Streaming<FlowBatch>>,
    ) -> Result<Response<Self::ReportFlowsStream>, Status> {
        let (outgoing, receipts) = mpsc::channel(RECEIPTS_LEN);
        let context = Arc::clone(&self.context);
        tokio::spawn(take_flows(context, request.into_inner(), outgoing));
        Ok(Response::new(Box::pin(ReceiverStream::new(receipts))))
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
    listener: TcpListener,
    context: Arc<Context>,
    mut shutdown: watch::Receiver<bool>,
) -> Result<(), tonic::transport::Error> {
    let stop = async move { stopped(&mut shutdown).await };
    let service = DistributionServer::new(Service { context })
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX);
    // Without nodelay each connection costs its agent some 28 ms (measured with tonic 0.14).
    let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
    Server::builder()
        .http2_keepalive_interval(Some(KEEPALIVE_EVERY))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIME_MAX))
        .add_service(service)
        .serve_with_incoming_shutdown(incoming, stop)
        .await
}
