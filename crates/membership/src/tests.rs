//! Who joins when, where to, and what a time of day that jumps changes: nothing.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::atomic::AtomicU32;
use std::task::{Context, Poll};
use std::time::{Instant, SystemTime};

use bulkhead_identity::Authority;
use bulkhead_identity::tls::ServerIdentity;
use bulkhead_wire::proto::distribution_server::{Distribution, DistributionServer};
use bulkhead_wire::proto::{FlowBatch, FlowReceipt};
use tokio::io::ReadBuf;
use tokio_stream::{Pending, StreamExt, pending, wrappers::ReceiverStream};
use tonic::transport::server::Connected;
use tonic::{Request, Response, Streaming};

use super::*;
use crate::clock::jumps;

#[test]
fn a_token_is_better_than_a_certificate_that_is_refused_once_or_of_another_authority() {
    let now = SystemTime::now();
    let [authority, other] = ["one", "other"].map(|name| Authority::generate(name, now).unwrap());
    for identity in [Identity::agent("h1").unwrap(), Identity::relay("r1").unwrap()] {
        let own = authority.issue(&identity, Duration::from_secs(600), now, &[]).unwrap();
        let membership = |token: Option<&Authority>| Membership {
            identity: identity.clone(),
            directory: PathBuf::new(),
            files: "unused",
            token: token.map(|authority| JoinToken::generate(authority.certificate())),
            controllers: Vec::new(),
            in_use: AtomicUsize::new(0),
            current: watch::Sender::new(Some(Held::found(own.clone()).unwrap())),
            refused: AtomicBool::new(false),
            channel: Mutex::new(None),
        };
        let same = membership(Some(&authority));
        assert!(!same.has_better(&own) && !same.has_token_of_another_authority());
        same.refused();
        assert!(same.has_better(&own) && !same.has_better(&own), "it is tried once");
        let another = membership(Some(&other));
        assert!(another.has_better(&own) && another.has_token_of_another_authority());
        let without = membership(None);
        without.refused();
        assert!(!without.has_better(&own) && !without.has_token_of_another_authority());
    }
}

#[test]
fn hosts_spread_over_controllers() {
    let controllers = ["https://a:1/".to_owned(), "b:1".to_owned(), "c:1".to_owned()];
    let mut firsts = std::collections::BTreeMap::new();
    for number in 0..300 {
        let order = by_preference(&format!("h{number}"), &controllers);
        assert_eq!(order, by_preference(&format!("h{number}"), &controllers));
        *firsts.entry(order[0].clone()).or_insert(0) += 1;
    }
    assert_eq!(firsts.keys().collect::<Vec<_>>(), ["a:1", "b:1", "c:1"]);
    assert!(firsts.values().all(|count| *count > 60), "{firsts:?}");
}

/// A controller that renews certificates, by a clock that is right, and does nothing else.
struct Renews {
    authority: Authority,
    identity: Identity,
    life: Duration,
    renewed: Arc<AtomicU32>,
}

#[tonic::async_trait]
impl Distribution for Renews {
    type ReportFlowsStream = Pending<Result<FlowReceipt, Status>>;

    async fn report_flows(
        &self,
        _: Request<Streaming<FlowBatch>>,
    ) -> Result<Response<Self::ReportFlowsStream>, Status> {
        Ok(Response::new(pending()))
    }

    async fn enroll(&self, _: Request<EnrollRequest>) -> Result<Response<Enrollment>, Status> {
        Err(Status::permission_denied("nobody joins here"))
    }

    async fn renew(&self, request: Request<RenewRequest>) -> Result<Response<Enrollment>, Status> {
        self.renewed.fetch_add(1, Ordering::Relaxed);
        let request = request.into_inner().signing_request;
        let certificate =
            self.authority.sign(&request, &self.identity, self.life, SystemTime::now()).unwrap();
        Ok(Response::new(Enrollment { certificate, authorities: self.authority.bundle().to_owned() }))
    }
}

/// A connection as tonic wants it.
struct Through(tls::Incoming);

impl Connected for Through {
    type ConnectInfo = ();

    fn connect_info(&self) {}
}

impl AsyncRead for Through {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0.0).poll_read(context, buffer)
    }
}

impl AsyncWrite for Through {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.0.0).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0.0).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0.0).poll_shutdown(context)
    }
}

/// All of it on one thread, whose time of day the test sets.
#[tokio::test]
async fn a_certificate_is_renewed_in_its_time_however_the_time_of_day_jumps() {
    const LIFE: Duration = Duration::from_secs(5);
    let authority = Authority::generate("test", SystemTime::now()).unwrap();
    let issue = |identity: &Identity, life| authority.issue(identity, life, SystemTime::now(), &[]).unwrap();
    let identity = Identity::agent("h1").unwrap();
    let controller = issue(&Identity::controller("a").unwrap(), Duration::from_secs(600));
    let listener = tokio::net::TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let server = ServerIdentity::new(&controller).unwrap();
    let settings = tls::server_config(&server, authority.bundle(), PROTOCOL).unwrap();
    let directory = tempfile::tempdir().unwrap();
    issue(&identity, LIFE).save(directory.path(), "agent").unwrap();
    let renewed = Arc::new(AtomicU32::new(0));
    let service = Renews { authority, identity: identity.clone(), life: LIFE, renewed: Arc::clone(&renewed) };
    let incoming = ReceiverStream::new(tls::listen(listener, settings));
    let incoming = incoming.map(|one| Ok::<_, Infallible>(Through(one)));
    let serving = tonic::transport::Server::builder().add_service(DistributionServer::new(service));
    tokio::spawn(serving.serve_with_incoming(incoming));
    let (files, token) = ("agent", None);
    let place =
        Place { identity, directory: directory.path().into(), files, token, controllers: vec![address] };
    let membership = Arc::new(Membership::open(place).unwrap());
    membership.connect().await.unwrap();
    let keeping = tokio::spawn(Arc::clone(&membership).keep_current());
    let renews = async || {
        let (before, began) = (renewed.load(Ordering::Relaxed), Instant::now());
        while renewed.load(Ordering::Relaxed) == before {
            assert!(began.elapsed() < LIFE, "it must be renewed before it ends");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    renews().await;
    for hours in [5, -5, 24 * 365, -24 * 365] {
        jumps::set(hours);
        let (before, began) = (renewed.load(Ordering::Relaxed), Instant::now());
        renews().await;
        renews().await;
        let (times, took) = (renewed.load(Ordering::Relaxed) - before, began.elapsed());
        assert!(took > LIFE / 2 && times <= 3, "{hours} h: renewed {times} times in {took:?}");
        // A connection that breaks can be opened again: whether the certificate is good, the controller's clock says.
        assert!(membership.valid_credentials().is_some(), "{hours} h");
        membership.connect().await.unwrap();
    }
    keeping.abort();
    // It starts anew with a clock that is behind, and shows what it has; one that is ahead says that it has ended, until it is
    // right again.
    let reopened = |hours| {
        jumps::set(hours);
        let (identity, token) = (membership.identity.clone(), None);
        let controllers = membership.controllers.clone();
        Membership::open(Place { identity, directory: directory.path().into(), files, token, controllers })
            .unwrap()
    };
    reopened(-5).connect().await.unwrap();
    let ahead = reopened(5);
    assert!(ahead.connect().await.unwrap_err().message().contains("has ended"));
    jumps::set(0);
    ahead.connect().await.unwrap();
    // And once its life is over it is over by a clock that is right.
    tokio::time::sleep(LIFE + Duration::from_secs(1)).await;
    assert!(ahead.valid_credentials().is_none() && membership.valid_credentials().is_none());
}
