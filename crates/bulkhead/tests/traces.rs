//! Traces, as a collector receives them.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeSet;
use std::process::Command;
use std::time::{Duration, Instant};

use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{
    TraceService, TraceServiceServer,
};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status};

const BINARY: &str = env!("CARGO_BIN_EXE_bulkhead");

struct Collector(mpsc::Sender<ExportTraceServiceRequest>);

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        let _ = self.0.send(request.into_inner()).await;
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collector_hears_of_requests_and_what_they_did() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let collector = format!("http://{}", listener.local_addr().unwrap());
    let (sender, mut received) = mpsc::channel(64);
    let service = TraceServiceServer::new(Collector(sender));
    let server = tonic::transport::Server::builder().add_service(service);
    tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));

    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let mut controller = Command::new(BINARY)
        .args([
            "controller",
            "--listen",
            "127.0.0.1:0",
            "--listen-agents",
            "127.0.0.1:0",
            "--otlp",
            &collector,
        ])
        .arg("--data-dir")
        .arg(path("data"))
        .arg("--socket")
        .arg(path("controller.sock"))
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    std::fs::write(
        path("tier.yaml"),
        "apiVersion: bulkhead.dev/v1\nkind: Tier\nmetadata: {name: t}\nspec: {order: 5}\n",
    )
    .unwrap();
    let server = format!("unix://{}", path("controller.sock").display());
    let apply = || {
        let file = path("tier.yaml").display().to_string();
        Command::new(BINARY).args(["apply", "--server", &server, "-f", &file]).output().unwrap()
    };
    let started = Instant::now();
    while !apply().status.success() {
        assert!(started.elapsed() < Duration::from_secs(20), "the controller does not serve");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    // What is under way is sent before it ends.
    assert!(Command::new("kill").args(["-TERM", &controller.id().to_string()]).status().unwrap().success());
    assert!(controller.wait().unwrap().success());

    let (mut names, mut parents) = (BTreeSet::new(), 0);
    while !names.contains("commit") {
        let batch = tokio::time::timeout(Duration::from_secs(10), received.recv()).await;
        let batch = batch.unwrap_or_else(|_| panic!("only {names:?} came")).unwrap();
        for spans in &batch.resource_spans {
            let service =
                spans.resource.as_ref().unwrap().attributes.iter().find(|one| one.key == "service.name");
            assert!(format!("{service:?}").contains("bulkhead-controller"), "{service:?}");
            for span in spans.scope_spans.iter().flat_map(|scope| &scope.spans) {
                names.insert(span.name.clone());
                // A change is part of the request that asked for it.
                parents += usize::from(span.name == "commit" && !span.parent_span_id.is_empty());
            }
        }
    }
    assert!(names.contains("request") && parents == 1, "{names:?}, {parents}");
}
