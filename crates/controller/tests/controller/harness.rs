//! A controller on free ports, a REST client, and an agent made of its protocol.

use std::net::SocketAddr;
use std::ops::Deref;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bulkhead_controller::{Config, Controller, EtcdConfig, StoreKind, start};
use bulkhead_identity::tls::{self, ClientConfig};
use bulkhead_identity::{Authority, Credentials, Identity, LIFETIME};
use bulkhead_wire::proto::agent_message::Body as Up;
use bulkhead_wire::proto::controller_message::Body as Down;
use bulkhead_wire::proto::distribution_client::DistributionClient;
use bulkhead_wire::proto::{self, AgentMessage, ControllerMessage, Hello, Inventory, Subscribe};
use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Status, Streaming};

use crate::etcd_server::EtcdServer;

/// Longest wait for what must come.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);
/// How long nothing must come.
pub(crate) const QUIET: Duration = Duration::from_millis(300);

pub(crate) fn config() -> Config {
    Config {
        listen_api: ([127, 0, 0, 1], 0).into(),
        listen_agents: ([127, 0, 0, 1], 0).into(),
        store: StoreKind::Memory,
        socket: None,
        ..Config::default()
    }
}

fn operator(name: &str, groups: &[&str]) -> Identity {
    let groups: Vec<String> = groups.iter().map(ToString::to_string).collect();
    Identity::operator(name, &groups).unwrap()
}

pub(crate) fn credentials(authority: &Authority, identity: &Identity) -> Credentials {
    authority.issue(identity, LIFETIME, SystemTime::now(), &[]).unwrap()
}

fn tls_of(authority: &Authority, identity: &Identity) -> Arc<ClientConfig> {
    tls::client_config(authority.bundle(), Some(&credentials(authority, identity)), "http/1.1").unwrap()
}
/// As [`config`], with the repository in an etcd.
pub(crate) fn etcd_config(server: &EtcdServer) -> Config {
    let data_directory = server.directory().join("controller");
    let etcd = EtcdConfig { endpoints: vec![server.endpoint()], ..EtcdConfig::default() };
    Config { store: StoreKind::Etcd, etcd, data_directory, ..config() }
}

/// Runs tests that take a configuration over the store in memory, and over an etcd of their own.
macro_rules! in_memory_and_etcd {
    ($($name:ident),* $(,)?) => {
        mod in_memory {
            $(#[tokio::test(flavor = "multi_thread")]
            async fn $name() {
                super::$name(crate::harness::config()).await;
            })*
        }

        mod in_etcd {
            $(#[tokio::test(flavor = "multi_thread")]
            async fn $name() {
                let etcd = crate::etcd_server::EtcdServer::start();
                super::$name(crate::harness::etcd_config(&etcd)).await;
            })*
        }
    };
}
pub(crate) use in_memory_and_etcd;

pub(crate) struct Fixture {
    pub(crate) controller: Controller,
    site: Site,
    _identity: Option<TempDir>,
}

/// A controller as its clients know it.
pub(crate) struct Site {
    pub(crate) api: SocketAddr,
    pub(crate) agents: SocketAddr,
    authority: Arc<Authority>,
    admin: Arc<ClientConfig>,
}

impl Deref for Fixture {
    type Target = Site;

    fn deref(&self) -> &Site {
        &self.site
    }
}

impl Fixture {
    pub(crate) async fn new() -> Self {
        Self::with(config()).await
    }

    /// With an authority of its own, unless the configuration names a directory for one.
    pub(crate) async fn with(mut config: Config) -> Self {
        let own = config.identity_directory.is_none().then(|| tempfile::tempdir().unwrap());
        if let Some(own) = &own {
            config.identity_directory = Some(own.path().to_owned());
        }
        let directory = config.identity_directory();
        let controller = start(config).await.unwrap();
        let site = Site::at(controller.api, controller.agents, &directory);
        Self { controller, site, _identity: own }
    }
}

impl Site {
    /// A controller with the authority in a directory.
    pub(crate) fn at(api: SocketAddr, agents: SocketAddr, directory: &Path) -> Self {
        let authority = Authority::load(directory).unwrap().unwrap();
        let admin = tls_of(&authority, &operator("root", &["bulkhead:admins"]));
        Self { api, agents, authority: Arc::new(authority), admin }
    }

    /// The same with agents somewhere else: behind a relay.
    pub(crate) fn behind(&self, agents: SocketAddr) -> Self {
        let (authority, admin) = (Arc::clone(&self.authority), Arc::clone(&self.admin));
        Self { api: self.api, agents, authority, admin }
    }

    /// A session that begins with a Hello, by whoever has this.
    pub(crate) async fn session_of(&self, own: &Credentials, hello: Hello) -> Agent {
        let (up, messages) = mpsc::channel(64);
        let hello = Hello { protocol: bulkhead_wire::PROTOCOL, ..hello };
        let agent = Agent { up, down: None, next_handle: 0 };
        agent.say(Up::Hello(hello)).await;
        let down = self.client_with(own).sync(ReceiverStream::new(messages)).await.unwrap().into_inner();
        Agent { down: Some(down), ..agent }
    }

    /// A request by an administrator.
    pub(crate) async fn send(&self, method: Method, path: &str, body: String) -> Response<Incoming> {
        self.send_as(&self.admin, method, path, body).await
    }

    /// A request by whoever has this.
    pub(crate) async fn send_as(
        &self,
        caller: &Arc<ClientConfig>,
        method: Method,
        path: &str,
        body: String,
    ) -> Response<Incoming> {
        self.send_with(caller, method, path, &[], body).await.unwrap()
    }

    pub(crate) async fn send_with(
        &self,
        caller: &Arc<ClientConfig>,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        body: String,
    ) -> hyper::Result<Response<Incoming>> {
        let stream = tls::connect(&self.api.to_string(), caller).await.unwrap();
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        tokio::spawn(connection);
        let request = Request::builder().method(method).uri(path).header("host", "bulkhead");
        let request = headers.iter().fold(request, |request, (name, value)| request.header(*name, *value));
        let request = request.body(Full::new(Bytes::from(body))).unwrap();
        tokio::time::timeout(PATIENCE, sender.send_request(request)).await.unwrap()
    }

    /// What an operator in these groups connects with.
    pub(crate) fn operator(&self, name: &str, groups: &[&str]) -> Arc<ClientConfig> {
        tls_of(&self.authority, &operator(name, groups))
    }

    /// Somebody without a certificate.
    pub(crate) fn nobody(&self, protocol: &str) -> Arc<ClientConfig> {
        tls::client_config(self.authority.bundle(), None, protocol).unwrap()
    }

    pub(crate) fn authority(&self) -> &Authority {
        &self.authority
    }

    pub(crate) async fn call(&self, method: Method, path: &str, body: String) -> (StatusCode, Value) {
        let response = self.send(method, path, body).await;
        let status = response.status();
        let bytes = response.into_body().collect().await.unwrap().to_bytes();
        let text = String::from_utf8_lossy(&bytes);
        (status, serde_json::from_str(&text).unwrap_or_else(|_| Value::String(text.into_owned())))
    }

    pub(crate) async fn get(&self, path: &str) -> Value {
        let (status, answer) = self.call(Method::GET, path, String::new()).await;
        assert_eq!(status, StatusCode::OK, "{path}: {answer}");
        answer
    }

    /// Applies files, which must be right.
    pub(crate) async fn apply(&self, text: &str) -> Value {
        let (status, answer) = self.try_apply("apply", &[("test.yaml", text)]).await;
        assert_eq!(status, StatusCode::OK, "{answer}");
        answer
    }

    pub(crate) async fn try_apply(&self, verb: &str, sources: &[(&str, &str)]) -> (StatusCode, Value) {
        let sources: Vec<_> =
            sources.iter().map(|(name, text)| json!({ "name": name, "text": text })).collect();
        let path = format!("/apis/bulkhead.dev/v1/{verb}");
        self.call(Method::POST, &path, json!({ "sources": sources }).to_string()).await
    }

    pub(crate) async fn delete(&self, path: &str) -> StatusCode {
        self.call(Method::DELETE, &format!("/apis/bulkhead.dev/v1/{path}"), String::new()).await.0
    }

    /// As the agent of a host; if that cannot be a host's name, as some agent.
    pub(crate) fn client(&self, host: &str) -> DistributionClient<Channel> {
        let identity = Identity::agent(host).unwrap_or_else(|_| Identity::agent("some").unwrap());
        self.client_with(&credentials(&self.authority, &identity))
    }

    /// With these credentials.
    pub(crate) fn client_with(&self, own: &Credentials) -> DistributionClient<Channel> {
        self.client_over(tls::client_config(self.authority.bundle(), Some(own), "h2").unwrap())
    }

    pub(crate) fn client_over(&self, config: Arc<ClientConfig>) -> DistributionClient<Channel> {
        let address = self.agents.to_string();
        let connector = tower::service_fn(move |_uri| {
            let (address, config) = (address.clone(), Arc::clone(&config));
            async move { tls::connect_as_agent(&address, &config).await.map(TokioIo::new) }
        });
        let endpoint = Endpoint::from_static("http://controller");
        DistributionClient::new(endpoint.connect_with_connector_lazy(connector))
    }

    /// An agent that knows nothing yet, past its first barrier.
    pub(crate) async fn agent(&self, host: &str) -> Agent {
        let mut agent = self.agent_at(host, "", 0).await;
        agent.welcomed().await;
        agent.batch().await;
        agent
    }

    pub(crate) async fn agent_at(&self, host: &str, epoch: &str, revision: u64) -> Agent {
        self.agent_with(host, epoch, revision, &[]).await
    }

    /// An agent that publishes facts of its host.
    pub(crate) async fn agent_with(
        &self,
        host: &str,
        epoch: &str,
        revision: u64,
        facts: &[(&str, &str)],
    ) -> Agent {
        self.agent_accepting(host, epoch, revision, facts, &[]).await
    }

    /// An agent that knows nothing and reads packed snapshots.
    pub(crate) async fn agent_that_unpacks(&self, host: &str) -> Agent {
        self.agent_accepting(host, "", 0, &[], &[bulkhead_wire::PACKING]).await
    }

    async fn agent_accepting(
        &self,
        host: &str,
        epoch: &str,
        revision: u64,
        facts: &[(&str, &str)],
        accepts: &[&str],
    ) -> Agent {
        let (up, messages) = mpsc::channel(64);
        let hello = Hello {
            protocol: bulkhead_wire::PROTOCOL,
            host: host.into(),
            version: "0.1.0".into(),
            epoch: epoch.into(),
            revision,
            accepts: accepts.iter().map(|one| (*one).into()).collect(),
            facts: facts.iter().map(|(key, value)| ((*key).into(), (*value).into())).collect(),
            ..Hello::default()
        };
        let agent = Agent { up, down: None, next_handle: 0 };
        agent.say(Up::Hello(hello)).await;
        let down = self.client(host).sync(ReceiverStream::new(messages)).await.unwrap().into_inner();
        Agent { down: Some(down), ..agent }
    }
}

/// One line after another of an answer that goes on.
pub(crate) struct Lines {
    body: Incoming,
    text: String,
}

impl Lines {
    pub(crate) fn of(response: Response<Incoming>) -> Self {
        assert_eq!(response.status(), StatusCode::OK);
        Self { body: response.into_body(), text: String::new() }
    }

    pub(crate) async fn next(&mut self) -> Value {
        loop {
            if let Some((line, rest)) = self.text.split_once('\n') {
                let value = serde_json::from_str(line).unwrap();
                self.text = rest.to_owned();
                return value;
            }
            let frame = tokio::time::timeout(PATIENCE, self.body.frame()).await.unwrap().unwrap().unwrap();
            self.text += std::str::from_utf8(&frame.into_data().unwrap()).unwrap();
        }
    }
}

impl Lines {
    /// Nothing comes any more.
    pub(crate) async fn ends(mut self) {
        let frame = tokio::time::timeout(PATIENCE, self.body.frame()).await.unwrap();
        assert!(frame.is_none() && self.text.is_empty(), "{frame:?}");
    }
}

pub(crate) struct Agent {
    up: mpsc::Sender<AgentMessage>,
    down: Option<Streaming<ControllerMessage>>,
    next_handle: u32,
}

/// Everything up to a barrier.
#[derive(Debug, Default)]
pub(crate) struct Batch {
    pub(crate) resources: Vec<proto::Resources>,
    pub(crate) members: Vec<proto::Members>,
    pub(crate) acks: Vec<proto::InventoryAck>,
    pub(crate) revision: u64,
}

impl Batch {
    /// (entity, host) of all joins.
    pub(crate) fn joins(&self) -> Vec<(&str, &str)> {
        let joins = self.members.iter().flat_map(|members| &members.joins);
        joins.map(|member| (member.entity.as_str(), member.host.as_str())).collect()
    }

    pub(crate) fn leaves(&self) -> Vec<&str> {
        self.members.iter().flat_map(|members| members.leaves.iter().map(String::as_str)).collect()
    }
}

impl Agent {
    pub(crate) async fn say(&self, body: Up) {
        self.up.send(AgentMessage { body: Some(body) }).await.unwrap();
    }

    pub(crate) async fn receive(&mut self) -> Result<Down, Status> {
        let message = tokio::time::timeout(PATIENCE, self.down.as_mut().unwrap().message()).await;
        Ok(message.expect("a message must come")?.expect("the stream must go on").body.unwrap())
    }

    /// Reads until the stream ends, with a reason or without.
    pub(crate) async fn ended(&mut self) {
        let down = self.down.as_mut().unwrap();
        while let Ok(Some(_)) = tokio::time::timeout(PATIENCE, down.message()).await.expect("it must end") {}
    }

    pub(crate) async fn welcomed(&mut self) -> proto::Welcome {
        match self.receive().await.unwrap() {
            Down::Welcome(welcome) => welcome,
            other => panic!("{other:?}"),
        }
    }

    pub(crate) async fn batch(&mut self) -> Batch {
        let mut batch = Batch::default();
        loop {
            match self.receive().await.unwrap() {
                Down::Resources(resources) => batch.resources.push(resources),
                Down::Members(members) => batch.members.push(members),
                Down::InventoryAck(ack) => batch.acks.push(ack),
                Down::Synced(synced) => {
                    batch.revision = synced.revision;
                    return batch;
                }
                Down::Revocations(_) => {}
                Down::Welcome(welcome) => panic!("{welcome:?}"),
            }
        }
    }

    /// Nothing comes for a while.
    pub(crate) async fn hears_nothing(&mut self) {
        let message = tokio::time::timeout(QUIET, self.down.as_mut().unwrap().message()).await;
        assert!(message.is_err(), "{message:?}");
    }

    /// Subscribes without waiting for the answer.
    pub(crate) async fn ask(&self, handle: u32, selector: &str) {
        self.say(Up::Subscribe(Subscribe { handle, selector: selector.into(), revision: 0 })).await;
    }

    pub(crate) async fn subscribe(&mut self, selector: &str, revision: u64) -> Batch {
        self.next_handle += 1;
        let handle = self.next_handle;
        self.say(Up::Subscribe(Subscribe { handle, selector: selector.into(), revision })).await;
        let batch = self.batch().await;
        assert!(batch.members.iter().all(|members| members.handle == handle), "{batch:?}");
        batch
    }

    /// Publishes one workload with facts.
    pub(crate) async fn publish_observed(
        &mut self,
        name: &str,
        host: &str,
        facts: Value,
    ) -> proto::InventoryAck {
        let workload = json!({
            "apiVersion": "bulkhead.dev/v1",
            "kind": "Workload",
            "metadata": { "name": name },
            "spec": { "host": host, "addresses": ["10.0.0.9"], "facts": facts },
        });
        let upserts = vec![Bytes::from(workload.to_string())];
        self.say(Up::Inventory(Inventory { generation: 8, upserts, ..Inventory::default() })).await;
        match self.receive().await.unwrap() {
            Down::InventoryAck(ack) => ack,
            other => panic!("{other:?}"),
        }
    }

    /// Publishes workloads given as (name, host, labels as JSON, address).
    pub(crate) async fn publish(
        &mut self,
        complete: bool,
        upserts: &[(&str, &str, Value, &str)],
        removes: &[&str],
    ) -> proto::InventoryAck {
        let workload = |(name, host, labels, address): &(&str, &str, Value, &str)| {
            let workload = json!({
                "apiVersion": "bulkhead.dev/v1",
                "kind": "Workload",
                "metadata": { "name": name, "labels": labels },
                "spec": { "host": host, "addresses": [address] },
            });
            Bytes::from(workload.to_string())
        };
        self.say(Up::Inventory(Inventory {
            generation: 7,
            complete,
            upserts: upserts.iter().map(workload).collect(),
            removes: removes.iter().map(ToString::to_string).collect(),
        }))
        .await;
        match self.receive().await.unwrap() {
            Down::InventoryAck(ack) => ack,
            other => panic!("{other:?}"),
        }
    }
}

pub(crate) const POLICY: &str = "\
apiVersion: bulkhead.dev/v1
kind: Policy
metadata: {name: db}
spec:
  appliesTo: role == 'db'
  ingress:
  - action: Allow
    from: {selector: role == 'web'}
    ports: [tcp/5432]
";

impl Agent {
    /// What has come already, if anything has.
    pub(crate) async fn receive_now(&mut self) -> Option<Down> {
        let message = tokio::time::timeout(Duration::from_millis(1), self.down.as_mut().unwrap().message());
        message.await.ok()?.unwrap()?.body
    }
}

/// A flow record as an agent sends it.
pub(crate) fn flow_record(
    time_ms: u64,
    source: &str,
    destination: &str,
    verdict: &str,
    policy: &str,
) -> Value {
    let decision = json!({
        "verdict": verdict,
        "rule": { "by": "rule", "tier": "application", "policy": policy, "direction": "ingress", "index": 0 },
    });
    json!({
        "timeMs": time_ms, "openedMs": time_ms, "event": "open", "reporter": "h1",
        "direction": "ingress", "protocol": 6,
        "source": { "address": source, "port": 40000 },
        "destination": { "address": destination, "port": 5432 },
        "enforced": decision, "audit": decision, "reason": "none", "revision": 1,
        "packetsForward": 1, "bytesForward": 60, "packetsReverse": 0, "bytesReverse": 0,
    })
}
