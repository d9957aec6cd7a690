//! From what the kernel counted to records with names, kept here and reported to the controller.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bulkhead_engine::LocalEndpoint;
use bulkhead_model::flow::{Decision, FlowEnd, FlowRecord, RawFlow};
use bulkhead_model::host_policy::{Attachment, HostPolicy, RuleId};
use bulkhead_model::{Direction, Labels, RuleRef};
use bulkhead_wire::proto::FlowBatch;
use bulkhead_wire::proto::distribution_client::DistributionClient;
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;

use crate::address_book::{AddressBook, Owner};
use crate::clock;
use crate::config::{FLOW_QUEUE_LEN, FLOW_RING_LEN};
use crate::trace;
use crate::trace::Watched;
use bulkhead_membership::Membership;

/// Most records in one batch.
const BATCH_LEN_MAX: usize = 512;
/// A batch that is not full is sent after this time.
const BATCH_WAIT: Duration = Duration::from_millis(100);
/// A batch without a receipt after this time is sent again on a new stream.
const RECEIPT_TIMEOUT: Duration = Duration::from_secs(10);
/// Wait before a failed stream is opened again.
const RETRY: Duration = Duration::from_secs(1);

/// What the records need to know besides the kernel's numbers.
pub(crate) struct Context<'a> {
    pub(crate) host: &'a str,
    pub(crate) policy: &'a HostPolicy,
    pub(crate) local: Option<&'a LocalEndpoint>,
    pub(crate) book: &'a AddressBook,
    pub(crate) clock: Clock,
}

/// Both clocks at one moment, to turn the kernel's time into everybody's.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Clock {
    monotonic_ns: u64,
    unix_ms: u64,
}

impl Clock {
    pub(crate) fn now() -> Self {
        let unix_ms = u64::try_from(clock::since_epoch().as_millis()).unwrap_or_default();
        Self { monotonic_ns: monotonic_ns(), unix_ms }
    }

    fn unix_ms(self, monotonic_ns: u64) -> u64 {
        let ago_ms = self.monotonic_ns.saturating_sub(monotonic_ns) / 1_000_000;
        self.unix_ms.saturating_sub(ago_ms)
    }
}

/// CLOCK_MONOTONIC, as the kernel programs see it.
pub(crate) fn monotonic_ns() -> u64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    let (seconds, nanoseconds) = (u64::try_from(time.tv_sec), u64::try_from(time.tv_nsec));
    seconds.unwrap_or_default() * 1_000_000_000 + nanoseconds.unwrap_or_default()
}

/// Names what the kernel counted.
pub(crate) fn record(context: &Context<'_>, raw: &RawFlow) -> FlowRecord {
    let Context { host, policy, local, book, clock } = context;
    let rule = |id: RuleId| policy.rules.get(&id).cloned().unwrap_or(RuleRef::DefaultPosture);
    let by_address = |address, port| {
        let owner = book.owner(address);
        FlowEnd {
            address,
            port,
            seen_as: None,
            workload: owner.map(|Owner { entity, .. }| display_name(entity)),
            host: owner.and_then(|owner| owner.host.as_ref().map(ToString::to_string)),
            // Labels of others are the controller's to add: it knows them as of now, this host may not.
            labels: Labels::new(),
        }
    };
    let own = match raw.key.attachment {
        // Neither end is the host's.
        Attachment::Forwarded(_) => by_address(raw.key.local, raw.key.local_port),
        _ => FlowEnd {
            address: raw.key.local,
            port: raw.key.local_port,
            workload: local.map(|local| display_name(&local.entity.name)),
            host: Some((*host).to_owned()),
            seen_as: None,
            labels: local.map(|local| local.entity.labels.clone()).unwrap_or_default(),
        },
    };
    let seen = SocketAddr::new(raw.key.peer, raw.key.peer_port);
    let really = SocketAddr::new(raw.peer, raw.peer_port);
    let peer = FlowEnd { seen_as: (seen != really).then_some(seen), ..by_address(raw.peer, raw.peer_port) };
    let (source, destination) = match raw.direction {
        Direction::Egress => (own, peer),
        Direction::Ingress => (peer, own),
    };
    FlowRecord {
        time_ms: clock.unix_ms,
        opened_ms: clock.unix_ms(raw.opened_ns),
        event: raw.event,
        reporter: (*host).to_owned(),
        direction: raw.direction,
        protocol: raw.key.protocol,
        source,
        destination,
        enforced: Decision { verdict: raw.verdict, rule: rule(raw.rule) },
        audit: Decision { verdict: raw.audit_verdict, rule: rule(raw.audit_rule) },
        reason: raw.reason,
        revision: policy.revision,
        counters: raw.counters,
    }
}

/// An entity as people know it: `Workload/web-1.host` is `web-1.host`, other kinds keep theirs.
fn display_name(entity: &str) -> String {
    let name = entity.strip_prefix("Workload/").unwrap_or(entity);
    name.split('%').next().unwrap_or(name).to_owned()
}

/// Records on their way: a ring for this host's own commands and a queue to the controller.
#[derive(Debug)]
pub(crate) struct Flows {
    ring: VecDeque<Arc<FlowRecord>>,
    queue: Option<mpsc::Sender<Arc<FlowRecord>>>,
    watched: Watched,
    lost: Arc<AtomicU64>,
    done: Option<oneshot::Receiver<()>>,
}

/// Starts the reporting task.
pub(crate) fn spawn(membership: &Arc<Membership>) -> Flows {
    let (queue, records) = mpsc::channel(FLOW_QUEUE_LEN);
    let (finished, done) = oneshot::channel();
    let lost = Arc::new(AtomicU64::new(0));
    tokio::spawn(report(Arc::clone(membership), records, Arc::clone(&lost), finished));
    Flows { ring: VecDeque::new(), queue: Some(queue), watched: trace::channel(), lost, done: Some(done) }
}

impl Flows {
    pub(crate) fn push(&mut self, record: FlowRecord) {
        let record = Arc::new(record);
        if self.ring.len() >= FLOW_RING_LEN {
            self.ring.pop_front();
        }
        self.ring.push_back(Arc::clone(&record));
        // Nobody watches, as a rule.
        let _ = self.watched.send(Arc::clone(&record));
        let sent = self.queue.as_ref().is_some_and(|queue| queue.try_send(record).is_ok());
        if !sent {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Where every record is told to whoever watches.
    pub(crate) fn watched(&self) -> Watched {
        self.watched.clone()
    }

    /// The newest records, newest last.
    pub(crate) fn recent(&self, limit: usize) -> impl Iterator<Item = &FlowRecord> {
        self.ring.iter().skip(self.ring.len().saturating_sub(limit)).map(AsRef::as_ref)
    }

    /// Records that were dropped because the queue was full and that no batch has told of yet.
    pub(crate) fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }

    /// Lets the task send what it has, for a second at most.
    pub(crate) async fn finish(&mut self) {
        self.queue = None;
        if let Some(done) = self.done.take() {
            let _ = tokio::time::timeout(Duration::from_secs(1), done).await;
        }
    }
}

async fn report(
    membership: Arc<Membership>,
    mut records: mpsc::Receiver<Arc<FlowRecord>>,
    lost: Arc<AtomicU64>,
    finished: oneshot::Sender<()>,
) {
    let mut batch = Vec::new();
    loop {
        let result = stream(&membership, &mut records, &lost, &mut batch).await;
        if result.is_ok() || records.is_closed() {
            let _ = finished.send(());
            return;
        }
        tokio::time::sleep(RETRY).await;
    }
}

/// One stream, one batch under way at a time. `Ok` when there will be no more records. A batch without a
/// receipt stays in `batch` for the next stream.
async fn stream(
    membership: &Membership,
    records: &mut mpsc::Receiver<Arc<FlowRecord>>,
    lost: &AtomicU64,
    batch: &mut Vec<Arc<FlowRecord>>,
) -> Result<(), tonic::Status> {
    let channel = membership.channel().ok_or_else(|| tonic::Status::unavailable("no controller"))?;
    let at = membership.controller().to_owned();
    let mut client = DistributionClient::new(channel);
    let (outgoing, batches) = mpsc::channel(1);
    let mut receipts = client.report_flows(ReceiverStream::new(batches)).await?.into_inner();
    let mut sequence = 0;
    loop {
        if batch.is_empty() && !collect(records, batch).await {
            return Ok(());
        }
        sequence += 1;
        let told = lost.load(Ordering::Relaxed);
        let message = FlowBatch {
            sequence,
            records: batch
                .iter()
                .filter_map(|record| serde_json::to_vec(record.as_ref()).ok())
                .map(Into::into)
                .collect(),
            lost: told,
            ..FlowBatch::default()
        };
        let closed = || tonic::Status::unavailable("stream closed");
        outgoing.send(message).await.map_err(|_closed| closed())?;
        let receipt = tokio::time::timeout(RECEIPT_TIMEOUT, receipts.message());
        receipt
            .await
            .map_err(|_elapsed| tonic::Status::deadline_exceeded("no receipt"))??
            .ok_or_else(closed)?;
        lost.fetch_sub(told, Ordering::Relaxed);
        batch.clear();
        // The controller before may serve on: records go where the session is.
        if membership.controller() != at {
            return Err(tonic::Status::unavailable("the session is with another controller"));
        }
    }
}

/// Fills a batch; `false` when there will be no more records and the batch is empty.
async fn collect(records: &mut mpsc::Receiver<Arc<FlowRecord>>, batch: &mut Vec<Arc<FlowRecord>>) -> bool {
    let Some(first) = records.recv().await else { return false };
    batch.push(first);
    let deadline = tokio::time::Instant::now() + BATCH_WAIT;
    while batch.len() < BATCH_LEN_MAX {
        match tokio::time::timeout_at(deadline, records.recv()).await {
            Ok(Some(record)) => batch.push(record),
            Ok(None) | Err(_) => break,
        }
    }
    true
}
