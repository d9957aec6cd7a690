//! Agents behind a relay, and what it may and may not do.

use std::path::Path;
use std::time::{Duration, SystemTime};

use bulkhead_controller::relay::{self, Relay};
use bulkhead_controller::{Config, StoreKind};
use bulkhead_identity::{Authority, Credentials, Identity, JoinToken, Key, tls};
use bulkhead_wire::proto::agent_message::Body as Up;
use bulkhead_wire::proto::controller_message::Body as Down;
use bulkhead_wire::proto::{
    AgentMessage, AgentStatus, EnrollRequest, FlowBatch, Hello, Relayed, RenewRequest,
};
use bulkhead_wire::{is_elsewhere, proto};
use hyper::Method;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status};

use crate::flows::{now_ms, record};
use crate::harness::{Fixture, PATIENCE, POLICY, Site, config, credentials};
use crate::identity::own;

const V1: &str = "/apis/bulkhead.dev/v1";

/// A relay, and its agents' way to it.
struct Remote {
    relay: Relay,
    site: Site,
    directory: TempDir,
}

fn relay_config(fixture: &Site, directory: &Path, token: Option<String>) -> relay::Config {
    relay::Config {
        name: "site1".into(),
        upstreams: vec![format!("https://{}", fixture.agents)],
        join_token: token,
        listen_agents: ([127, 0, 0, 1], 0).into(),
        listen_probes: Some(([127, 0, 0, 1], 0).into()),
        state_directory: directory.into(),
        ..relay::Config::default()
    }
}

async fn relay_token(fixture: &Fixture, hosts: &[&str]) -> String {
    let (_, made) = fixture.token(json!({ "relay": "site1", "hosts": hosts })).await;
    made["token"].as_str().unwrap().to_owned()
}

/// A relay for these hosts, which has reached its controller.
async fn remote(fixture: &Fixture, hosts: &[&str]) -> Remote {
    let token = relay_token(fixture, hosts).await;
    let directory = tempfile::tempdir().unwrap();
    let relay = relay::start(relay_config(fixture, directory.path(), Some(token))).await.unwrap();
    let site = fixture.behind(relay.agents);
    let remote = Remote { relay, site, directory };
    remote.reads("/readyz", "ok").await;
    remote
}

impl Remote {
    async fn get(&self, path: &str) -> String {
        let mut stream = tokio::net::TcpStream::connect(self.relay.probes.unwrap()).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nHost: relay\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    /// Waits until an answer has a text.
    async fn reads(&self, path: &str, text: &str) {
        let mut answer = String::new();
        let waiting = async {
            loop {
                answer = self.get(path).await;
                if answer.contains(text) {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        assert!(tokio::time::timeout(PATIENCE, waiting).await.is_ok(), "{text} is not in {answer}");
    }

    async fn metric(&self, name: &str) -> u64 {
        let page = self.get("/metrics").await;
        let line = page.lines().find_map(|line| line.strip_prefix(&format!("bulkhead_{name} ")));
        line.unwrap_or_else(|| panic!("{name} is not in {page}")).parse().unwrap()
    }

    async fn is_connected(&self) {
        self.reads("/metrics", "bulkhead_relay_upstream_connected 1\n").await;
    }

    async fn is_alone(&self) {
        self.reads("/metrics", "bulkhead_relay_upstream_connected 0\n").await;
    }
}

/// What the status says of a host.
async fn agent_of(fixture: &Fixture, host: &str) -> Value {
    let status = fixture.get(&format!("{V1}/status")).await;
    let agents = status["agents"].as_array().unwrap();
    agents.iter().find(|agent| agent["host"] == host).cloned().unwrap_or(Value::Null)
}

async fn eventually<F: Future<Output = bool>>(what: &str, holds: impl Fn() -> F) {
    let waiting = async {
        while !holds().await {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    assert!(tokio::time::timeout(PATIENCE, waiting).await.is_ok(), "{what}");
}

/// The names of all objects told.
fn objects(resources: &[proto::Resources]) -> Vec<String> {
    let all = resources.iter().flat_map(|part| &part.upserts);
    all.map(|json| {
        let object: Value = serde_json::from_slice(json).unwrap();
        format!("{}/{}", object["kind"].as_str().unwrap(), object["metadata"]["name"].as_str().unwrap())
    })
    .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn agents_behind_a_relay_hear_and_are_heard_as_if_there_were_none() {
    let fixture = Fixture::new().await;
    fixture.apply(POLICY).await;
    let remote = remote(&fixture, &["s1-*"]).await;
    let mut near = fixture.agent("h1").await;
    near.publish(true, &[("web.h1", "h1", json!({ "role": "web" }), "10.0.0.1")], &[]).await;
    let mut far = remote.site.agent_at("s1-a", "", 0).await;
    let welcome = far.welcomed().await;
    assert_eq!(welcome.controller, "relay/site1");
    let batch = far.batch().await;
    assert_eq!(objects(&batch.resources), ["Policy/db"]);
    let ack = far.publish(true, &[("web.s1-a", "s1-a", json!({ "role": "web" }), "10.0.1.1")], &[]).await;
    assert_eq!((ack.generation, ack.refused.len()), (7, 0));
    let stored = fixture.get(&format!("{V1}/workloads/web.s1-a")).await;
    assert_eq!(stored["spec"]["host"], "s1-a", "what is acknowledged is stored");
    // Its own are left out, also of what changes; others of the same site are not.
    let batch = far.subscribe("role == 'web'", 0).await;
    assert_eq!(batch.joins(), [("Workload/web.h1", "h1")]);
    let mut beside = remote.site.agent("s1-b").await;
    let batch = beside.subscribe("role == 'web'", 0).await;
    assert_eq!(batch.joins(), [("Workload/web.h1", "h1"), ("Workload/web.s1-a", "s1-a")]);
    let batch = near.subscribe("role == 'web'", 0).await;
    assert_eq!(batch.joins(), [("Workload/web.s1-a", "s1-a")]);
    beside.publish(true, &[("web.s1-b", "s1-b", json!({ "role": "web" }), "10.0.1.2")], &[]).await;
    for agent in [&mut near, &mut far] {
        assert_eq!(agent.batch().await.joins(), [("Workload/web.s1-b", "s1-b")]);
    }
    beside.hears_nothing().await;
    beside.publish(true, &[], &[]).await;
    for agent in [&mut near, &mut far] {
        assert_eq!(agent.batch().await.leaves(), ["Workload/web.s1-b"]);
    }
    beside.hears_nothing().await;
    // What is refused above is refused here, and says why.
    let ack = far.publish(false, &[("web.x", "x", json!({}), "10.0.1.9")], &[]).await;
    assert!(ack.refused[0].reason.contains("on host \"x\""), "{ack:?}");

    far.say(Up::Status(AgentStatus { revision: 3, endpoints: 4, ..AgentStatus::default() })).await;
    eventually("its status arrives", async || agent_of(&fixture, "s1-a").await["endpoints"] == 4).await;
    let shown = agent_of(&fixture, "s1-a").await;
    assert!(shown["sentRevision"].as_u64().unwrap() > 3 && shown["subscriptions"] == 1, "{shown}");
    assert_eq!((&shown["relay"], &shown["connected"]), (&json!("site1"), &json!(true)));
    let status = fixture.get(&format!("{V1}/status")).await;
    assert_eq!(status["relays"][0]["connected"], true, "{status}");
    assert_eq!(status["relays"][0]["hosts"], json!(["s1-*"]));
    assert_eq!(status["relays"][0]["agentsAt"], remote.relay.agents.to_string());
    assert!(status["agents"].as_array().unwrap().iter().all(|agent| agent["host"] != "relay/site1"));
    drop(far);
    eventually("its end is heard", async || agent_of(&fixture, "s1-a").await["connected"] == false).await;
    remote.relay.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_for_one_host_reaches_it_alone() {
    let endpoint = |host: &str, address: &str| {
        format!(
            "apiVersion: bulkhead.dev/v1\nkind: HostEndpoint\nmetadata: {{name: ep-{host}}}\n\
             spec: {{host: {host}, addresses: [{address}]}}\n"
        )
    };
    let fixture = Fixture::new().await;
    let remote = remote(&fixture, &["s1-*"]).await;
    fixture.apply(&endpoint("s1-a", "10.0.1.1")).await;
    fixture.apply(&endpoint("other", "10.0.2.1")).await;
    let mut a = remote.site.agent_at("s1-a", "", 0).await;
    a.welcomed().await;
    let mut heard = objects(&a.batch().await.resources);
    while heard.is_empty() {
        heard = objects(&a.batch().await.resources);
    }
    assert_eq!(heard, ["HostEndpoint/ep-s1-a"]);
    let mut b = remote.site.agent("s1-b").await;
    fixture.apply(&endpoint("s1-b", "10.0.1.2")).await;
    assert_eq!(objects(&b.batch().await.resources), ["HostEndpoint/ep-s1-b"]);
    a.hears_nothing().await;
    // It moves: one hears it, the other that it is gone.
    fixture.apply(&endpoint("s1-b", "10.0.1.2").replace("host: s1-b", "host: s1-a")).await;
    assert_eq!(b.batch().await.resources[0].removes[0].name, "ep-s1-b");
    assert_eq!(objects(&a.batch().await.resources), ["HostEndpoint/ep-s1-b"]);
    // With other hosts it hears of theirs, though nothing of them has changed.
    relay_token(&fixture, &["s1-*", "other"]).await;
    remote.is_connected().await;
    let heard = async || {
        let mut other = remote.site.agent_at("other", "", 0).await;
        match other.receive().await {
            Ok(Down::Welcome(_)) => objects(&other.batch().await.resources) == ["HostEndpoint/ep-other"],
            _ => false,
        }
    };
    eventually("the new host's", heard).await;
}

/// The way upstream carries a change once, whoever wants to hear of it.
#[tokio::test(flavor = "multi_thread")]
async fn interests_of_a_site_are_one_subscription() {
    const AGENTS: usize = 40;
    const CHANGES: usize = 25;
    let fixture = Fixture::new().await;
    let remote = remote(&fixture, &["s1-*"]).await;
    let mut writer = fixture.agent("h0").await;
    let (mut direct, mut behind) = (Vec::new(), Vec::new());
    for number in 0..AGENTS {
        let mut one = fixture.agent(&format!("d-{number}")).await;
        one.subscribe("role == 'web'", 0).await;
        direct.push(one);
        let mut one = remote.site.agent(&format!("s1-{number}")).await;
        one.subscribe("role == 'web'", 0).await;
        behind.push(one);
    }
    assert_eq!(remote.metric("selectors").await, 1);
    let told = async || {
        let status = fixture.get(&format!("{V1}/status")).await;
        let agents = status["agents"].as_array().unwrap().clone();
        let direct = agents.iter().filter(|agent| agent["host"].as_str().unwrap().starts_with("d-"));
        direct.fold((0, 0), |(messages, bytes), agent| {
            (messages + agent["messagesSent"].as_u64().unwrap(), bytes + agent["bytesSent"].as_u64().unwrap())
        })
    };
    let up = async || {
        (
            remote.metric("relay_upstream_messages_total").await,
            remote.metric("relay_upstream_bytes_total").await,
        )
    };
    let (direct_before, up_before) = (told().await, up().await);
    for change in 0..CHANGES {
        let name = format!("web{change}.h0");
        writer.publish(false, &[(&name, "h0", json!({ "role": "web" }), "10.0.0.9")], &[]).await;
        let entity = format!("Workload/{name}");
        for agent in direct.iter_mut().chain(&mut behind) {
            assert_eq!(agent.batch().await.joins(), [(entity.as_str(), "h0")]);
        }
    }
    eventually("all is counted", async || told().await.0 - direct_before.0 >= (2 * AGENTS * CHANGES) as u64)
        .await;
    let (direct_after, up_after) = (told().await, up().await);
    let direct = (direct_after.0 - direct_before.0, direct_after.1 - direct_before.1);
    let up = (up_after.0 - up_before.0, up_after.1 - up_before.1);
    println!(
        "{AGENTS} agents, {CHANGES} changes: {direct:?} messages and bytes directly, {up:?} to the relay"
    );
    assert!(up.0 as usize <= 2 * CHANGES, "Members and Synced for each change: {up:?}");
    assert!(up.1 * (AGENTS as u64) <= direct.1 * 11 / 10, "{up:?} {direct:?}");
    // A change that concerns nobody of the site does not come at all.
    let before = remote.metric("relay_upstream_messages_total").await;
    writer.publish(false, &[("db.h0", "h0", json!({ "role": "db" }), "10.0.0.8")], &[]).await;
    behind[0].hears_nothing().await;
    assert_eq!(remote.metric("relay_upstream_messages_total").await, before);
}

/// A fixture whose controller can be stopped and started again where it was.
async fn restartable() -> (Config, TempDir) {
    let directory = tempfile::tempdir().unwrap();
    // Not where other tests connect from: their ports would be taken while nobody listens.
    let free = || std::net::TcpListener::bind(("127.0.77.1", 0)).unwrap().local_addr().unwrap();
    let config = Config {
        store: StoreKind::Embedded,
        data_directory: directory.path().join("data"),
        identity_directory: Some(directory.path().join("identity")),
        listen_agents: free(),
        ..config()
    };
    (config, directory)
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_controller_a_relay_serves_what_it_knows_and_loses_nothing() {
    let (config, _directory) = restartable().await;
    let fixture = Fixture::with(config.clone()).await;
    fixture.apply(POLICY).await;
    let remote = remote(&fixture, &["s1-*"]).await;
    let web = |name: &'static str, host: &'static str, address: &'static str| {
        (name, host, json!({ "role": "web" }), address)
    };
    let mut a = remote.site.agent("s1-a").await;
    a.publish(true, &[web("web.s1-a", "s1-a", "10.0.1.1")], &[]).await;
    let mut b = remote.site.agent_at("s1-b", "", 0).await;
    let epoch = b.welcomed().await.epoch;
    b.batch().await;
    let revision = b.subscribe("role == 'web'", 0).await.revision;
    fixture.controller.shutdown().await.unwrap();
    remote.is_alone().await;
    remote.reads("/readyz", "ok").await;

    // Who comes back resumes, and who is new hears what was known; nothing is missing.
    drop(b);
    let mut b = remote.site.agent_at("s1-b", &epoch, revision).await;
    b.welcomed().await;
    assert!(b.batch().await.resources.is_empty(), "nothing has changed");
    let batch = b.subscribe("role == 'web'", revision).await;
    assert!(!batch.members[0].snapshot && batch.leaves().is_empty(), "{batch:?}");
    let mut c = remote.site.agent_at("s1-c", "", 0).await;
    c.welcomed().await;
    assert_eq!(objects(&c.batch().await.resources), ["Policy/db"]);
    assert_eq!(c.subscribe("role == 'web'", 0).await.joins(), [("Workload/web.s1-a", "s1-a")]);
    // Nobody can say who is selected by what was not asked for before; it is answered when somebody can.
    c.ask(9, "role == 'cache'").await;
    c.hears_nothing().await;
    // What is published now is acknowledged when it is stored, and not before.
    let said = proto::Inventory {
        generation: 21,
        complete: false,
        upserts: vec![workload("web2.s1-a", "s1-a", "10.0.1.2")],
        removes: Vec::new(),
    };
    a.say(Up::Inventory(said)).await;
    a.hears_nothing().await;
    // One that knows more than the relay is sent to somebody else.
    let mut ahead = remote.site.agent_at("s1-d", &epoch, revision + 100).await;
    let refused = ahead.receive().await.unwrap_err();
    assert!(is_elsewhere(&refused), "{refused:?}");
    let refused = remote.site.client("s1-a").renew(RenewRequest::default()).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable);

    let fixture = Fixture::with(config).await;
    remote.is_connected().await;
    let mut ack = a.receive().await.unwrap();
    while !matches!(&ack, Down::InventoryAck(_)) {
        ack = a.receive().await.unwrap();
    }
    let Down::InventoryAck(ack) = ack else { panic!() };
    assert_eq!((ack.generation, ack.refused.len()), (21, 0));
    fixture.get(&format!("{V1}/workloads/web2.s1-a")).await;
    fixture.get(&format!("{V1}/workloads/web.s1-a")).await;
    let batch = b.batch().await;
    assert_eq!(batch.joins(), [("Workload/web2.s1-a", "s1-a")], "the difference alone");
    assert!(!batch.members[0].snapshot && batch.resources.is_empty());
    // The other's answers come, the one that was owed with them.
    let mut answered = c.batch().await;
    while !answered.members.iter().any(|members| members.handle == 9) {
        answered = c.batch().await;
    }
}

fn workload(name: &str, host: &str, address: &str) -> hyper::body::Bytes {
    json!({
        "apiVersion": "bulkhead.dev/v1",
        "kind": "Workload",
        "metadata": { "name": name, "labels": { "role": "web" } },
        "spec": { "host": host, "addresses": [address] },
    })
    .to_string()
    .into()
}

/// A host whose workloads expired while the relay was cut off is published again, though its agent never noticed.
#[tokio::test(flavor = "multi_thread")]
async fn a_site_that_had_expired_is_published_again() {
    let (config, _directory) = restartable().await;
    let config = Config { lease_ms: 500, grace_ms: 200, ..config };
    let fixture = Fixture::with(config.clone()).await;
    let remote = remote(&fixture, &["s1-*"]).await;
    let mut a = remote.site.agent("s1-a").await;
    a.publish(true, &[("web.s1-a", "s1-a", json!({ "role": "web" }), "10.0.1.1")], &[]).await;
    fixture.controller.shutdown().await.unwrap();
    remote.is_alone().await;
    // Another agent port: the relay does not find it.
    let elsewhere = Config { listen_agents: ([127, 0, 0, 1], 0).into(), ..config.clone() };
    let fixture = Fixture::with(elsewhere).await;
    let beats = tokio::spawn(async move {
        loop {
            a.say(Up::Status(AgentStatus::default())).await;
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    });
    let workloads = async || fixture.get(&format!("{V1}/workloads")).await["items"].as_array().unwrap().len();
    eventually("it expires", async || workloads().await == 0).await;
    fixture.controller.shutdown().await.unwrap();
    let fixture = Fixture::with(config).await;
    let there =
        async || fixture.get(&format!("{V1}/workloads")).await["items"].as_array().unwrap().len() == 1;
    eventually("it is there again", there).await;
    beats.abort();
}

/// What holds for an agent that dies holds for those of a relay that does, unless they are served elsewhere.
#[tokio::test(flavor = "multi_thread")]
async fn hosts_of_a_relay_that_is_gone_are_kept_for_the_grace() {
    let fixture = Fixture::with(Config { lease_ms: 600, grace_ms: 400, ..config() }).await;
    let remote = remote(&fixture, &["s1-*"]).await;
    let mut a = remote.site.agent("s1-a").await;
    a.publish(true, &[("web.s1-a", "s1-a", json!({ "role": "web" }), "10.0.1.1")], &[]).await;
    let mut b = remote.site.agent("s1-b").await;
    b.publish(true, &[("web.s1-b", "s1-b", json!({ "role": "web" }), "10.0.1.2")], &[]).await;
    let names = async || {
        let list = fixture.get(&format!("{V1}/workloads")).await;
        let items = list["items"].as_array().unwrap().iter();
        items.map(|one| one["metadata"]["name"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    // An agent that says nothing loses its session here as it would at a controller.
    let began = std::time::Instant::now();
    remote.relay.shutdown().await.unwrap();
    let b = fixture.agent("s1-b").await;
    let beats = tokio::spawn(async move {
        loop {
            b.say(Up::Status(AgentStatus::default())).await;
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    });
    assert_eq!(names().await.len(), 2);
    eventually("one is lost", async || names().await == ["web.s1-b"]).await;
    assert!(began.elapsed() >= Duration::from_millis(1000), "not before lease and grace");
    tokio::time::sleep(Duration::from_millis(1200)).await;
    assert_eq!(names().await, ["web.s1-b"], "the other is served elsewhere");
    beats.abort();
}

/// The controllers have another bundle: a relay hears of it when it renews its certificate, and lets agents in by it.
#[tokio::test(flavor = "multi_thread")]
async fn a_changed_bundle_of_the_controllers_reaches_a_running_relay() {
    let (config, _directory) = restartable().await;
    let config = Config { certificate_lifetime_s: 8, ..config };
    let fixture = Fixture::with(config.clone()).await;
    let remote = remote(&fixture, &["s1-*"]).await;
    let mut a = remote.site.agent("s1-a").await;
    let new = Authority::generate("new", SystemTime::now()).unwrap();
    let of_new = credentials(&new, &Identity::agent("s1-b").unwrap());
    let comes_in = async || {
        let hello = Hello { host: "s1-b".into(), ..Hello::default() };
        ends(&remote.site, &of_new, hello).await.is_none()
    };
    assert!(!comes_in().await);
    fixture.controller.shutdown().await.unwrap();
    let path = config.identity_directory().join("ca.crt");
    std::fs::write(&path, std::fs::read_to_string(&path).unwrap() + new.bundle()).unwrap();
    let _fixture = Fixture::with(config).await;
    eventually("its certificate is good now", comes_in).await;
    a.hears_nothing().await;
}

/// The same with what somebody puts into the relay's directory.
#[tokio::test(flavor = "multi_thread")]
async fn other_files_of_a_relays_certificate_are_taken_up() {
    let (config, _directory) = restartable().await;
    let [old, new] = ["old", "new"].map(|name| Authority::generate(name, SystemTime::now()).unwrap());
    let both = format!("{}{}", old.bundle(), new.bundle());
    old.save(&config.identity_directory()).unwrap();
    std::fs::write(config.identity_directory().join("ca.crt"), &both).unwrap();
    // So that it is looked every three seconds, and renewed after thirty.
    let fixture = Fixture::with(Config { certificate_lifetime_s: 60, ..config }).await;
    let remote = remote(&fixture, &["s1-*"]).await;
    let mut a = remote.site.agent("s1-a").await;
    let of_new = credentials(&new, &Identity::agent("s1-b").unwrap());
    let comes_in = async || {
        let hello = Hello { host: "s1-b".into(), ..Hello::default() };
        ends(&remote.site, &of_new, hello).await.is_none()
    };
    assert!(comes_in().await);
    let files = remote.directory.path().join("identity");
    std::fs::write(files.join("ca.crt"), old.bundle()).unwrap();
    eventually("one authority is gone", async || !comes_in().await).await;
    // What is no bundle, and a certificate whose key is another's or whose holder is, change nothing.
    std::fs::write(files.join("ca.crt"), "nothing").unwrap();
    let site1 =
        Credentials { authorities: both.clone(), ..credentials(&new, &Identity::relay("site1").unwrap()) };
    let others = Credentials { authorities: both, ..credentials(&new, &Identity::relay("site2").unwrap()) };
    for wrong in [Credentials { key: others.key.clone(), ..site1.clone() }, others] {
        wrong.save(&files, relay::IDENTITY_FILES).unwrap();
        tokio::time::sleep(Duration::from_millis(3500)).await;
        assert!(!comes_in().await);
    }
    site1.save(&files, relay::IDENTITY_FILES).unwrap();
    eventually("both are there", comes_in).await;
    // It shows its new certificate, which only the new authority vouches for.
    let by_new = tls::client_config(new.bundle(), Some(&of_new), "h2").unwrap();
    tls::connect_as_agent(&remote.relay.agents.to_string(), &by_new).await.unwrap();
    a.hears_nothing().await;
}

/// A relay that starts anew knows nothing until its controller has told it; its agents are told everything once.
#[tokio::test(flavor = "multi_thread")]
async fn agents_come_back_to_a_relay_that_was_restarted() {
    let fixture = Fixture::new().await;
    fixture.apply(POLICY).await;
    let remote = remote(&fixture, &["s1-*"]).await;
    let mut writer = fixture.agent("h1").await;
    writer.publish(true, &[("web.h1", "h1", json!({ "role": "web" }), "10.0.0.1")], &[]).await;
    let mut far = remote.site.agent_at("s1-a", "", 0).await;
    let epoch = far.welcomed().await.epoch;
    far.batch().await;
    let revision = far.subscribe("role == 'web'", 0).await.revision;
    let Remote { relay, directory, .. } = remote;
    relay.shutdown().await.unwrap();
    assert!(is_elsewhere(&far.receive().await.unwrap_err()), "agents are sent away first");
    // It has its certificate, and needs no token.
    writer.publish(true, &[("web2.h1", "h1", json!({ "role": "web" }), "10.0.0.2")], &[]).await;
    let relay = relay::start(relay_config(&fixture, directory.path(), None)).await.unwrap();
    let site = fixture.behind(relay.agents);
    let remote = Remote { relay, site, directory };
    remote.is_connected().await;
    remote.reads("/readyz", "ok").await;
    let mut far = remote.site.agent_at("s1-a", &epoch, revision).await;
    assert_eq!(far.welcomed().await.epoch, epoch);
    far.batch().await;
    let batch = far.subscribe("role == 'web'", revision).await;
    assert!(batch.members[0].snapshot, "{batch:?}");
    assert_eq!(batch.joins(), [("Workload/web2.h1", "h1")]);
}

/// How a session ends that begins with this Hello; `None`: it is welcome.
async fn ends(site: &Site, own: &Credentials, hello: Hello) -> Option<Status> {
    let (up, messages) = mpsc::channel(4);
    let hello = Hello { protocol: bulkhead_wire::PROTOCOL, ..hello };
    up.send(AgentMessage { body: Some(Up::Hello(hello)) }).await.unwrap();
    let mut down = match site.client_with(own).sync(ReceiverStream::new(messages)).await {
        Ok(down) => down.into_inner(),
        Err(status) => return Some(status),
    };
    down.message().await.err()
}

fn der(own: &Credentials) -> hyper::body::Bytes {
    use base64::Engine as _;
    let lines = own.certificate.lines().skip(1).take_while(|line| !line.starts_with('-'));
    base64::engine::general_purpose::STANDARD.decode(lines.collect::<String>()).unwrap().into()
}

fn for_host(host: &str, shown: &Credentials) -> Hello {
    let relayed = Some(Relayed { certificates: vec![der(shown)], ..Relayed::default() });
    Hello { host: host.into(), relayed, ..Hello::default() }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_relay_speaks_for_its_own_hosts_alone_and_an_agent_for_itself() {
    let fixture = Fixture::new().await;
    let authority = fixture.authority();
    let of = |identity: Identity| credentials(authority, &identity);
    let (site, a) = (of(Identity::relay("site1").unwrap()), of(Identity::agent("s1-a").unwrap()));
    let (other, b) = (of(Identity::agent("other").unwrap()), of(Identity::agent("s1-b").unwrap()));
    let code =
        async |own: &Credentials, hello: Hello| ends(&fixture, own, hello).await.map(|status| status.code());
    let denied = Some(Code::PermissionDenied);
    // A certificate alone is not enough: what it may do stands in the repository.
    assert_eq!(code(&site, Hello::default()).await, denied);
    assert_eq!(code(&site, for_host("s1-a", &a)).await, denied);
    relay_token(&fixture, &["s1-*"]).await;
    assert_eq!(code(&site, Hello::default()).await, None);
    assert_eq!(code(&site, for_host("s1-a", &a)).await, None);
    // A host that is not on its list, a certificate of another, one of another authority, and none.
    assert_eq!(code(&site, for_host("other", &other)).await, denied);
    assert_eq!(code(&site, for_host("s1-a", &b)).await, denied);
    let stranger = Authority::generate("x", SystemTime::now()).unwrap();
    let forged = credentials(&stranger, &Identity::agent("s1-a").unwrap());
    assert_eq!(code(&site, for_host("s1-a", &forged)).await, denied);
    assert_eq!(code(&site, Hello { host: "s1-a".into(), ..Hello::default() }).await, denied);
    assert_eq!(code(&site, for_host("s1-a", &site)).await, denied);
    // An agent is no relay.
    assert_eq!(code(&a, for_host("s1-a", &a)).await, denied);
    assert_eq!(code(&a, for_host("s1-b", &b)).await, denied);
    assert_eq!(code(&a, Hello::default()).await, Some(Code::InvalidArgument));

    let proven = |host: &str, shown: &Credentials, by: &Credentials| {
        let signing_request = Key::generate().unwrap().request().unwrap();
        let proof = by.sign(signing_request.as_bytes()).unwrap().into();
        let relayed = Some(Relayed { certificates: vec![der(shown)], ..Relayed::default() });
        RenewRequest { signing_request, host: host.into(), relayed, proof }
    };
    let renew = |host: &str, shown: &Credentials| proven(host, shown, shown);
    let renewed = async |own: &Credentials, request: RenewRequest| {
        fixture.client_with(own).renew(request).await.map(drop).map_err(|status| status.code())
    };
    assert_eq!(renewed(&site, renew("s1-a", &a)).await, Ok(()));
    let forged = proven("s1-a", &a, &site);
    assert_eq!(renewed(&site, forged).await, Err(Code::PermissionDenied), "the relay's own wish");
    assert_eq!(renewed(&site, renew("other", &other)).await, Err(Code::PermissionDenied));
    assert_eq!(renewed(&a, renew("s1-b", &b)).await, Err(Code::PermissionDenied));
    let flows = async |own: &Credentials, host: &str, shown: &Credentials| {
        let (up, batches) = mpsc::channel(1);
        let relayed = Some(Relayed { certificates: vec![der(shown)], ..Relayed::default() });
        up.send(FlowBatch { sequence: 1, host: host.into(), relayed, ..FlowBatch::default() }).await.unwrap();
        let receipts = fixture.client_with(own).report_flows(ReceiverStream::new(batches)).await;
        receipts.unwrap().into_inner().message().await.map(drop).map_err(|status| status.code())
    };
    assert_eq!(flows(&site, "s1-a", &a).await, Ok(()));
    assert_eq!(flows(&site, "other", &other).await, Err(Code::PermissionDenied));
    assert_eq!(flows(&a, "s1-b", &b).await, Err(Code::PermissionDenied));
    // In the session of a host it may not ask for what others are, and in its own not publish.
    let mut lane = fixture.session_of(&site, for_host("s1-a", &a)).await;
    lane.welcomed().await;
    lane.ask(1, "role == 'web'").await;
    assert_eq!(lane.receive().await.unwrap_err().code(), Code::InvalidArgument);
    let mut whole = fixture.session_of(&site, Hello::default()).await;
    whole.welcomed().await;
    whole.batch().await;
    whole.say(Up::Inventory(proto::Inventory::default())).await;
    assert_eq!(whole.receive().await.unwrap_err().code(), Code::InvalidArgument);
    // The API is not for relays, and a relay is no controller to operators.
    let tls = tls::client_config(authority.bundle(), Some(&site), "http/1.1").unwrap();
    for path in ["policies", "whoami", "status"] {
        let answer = fixture.send_as(&tls, Method::GET, &format!("{V1}/{path}"), String::new()).await;
        assert_eq!(answer.status(), 403, "{path}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_but_agents_takes_a_relay_for_a_controller() {
    let fixture = Fixture::new().await;
    let remote = remote(&fixture, &["s1-*"]).await;
    let address = remote.relay.agents.to_string();
    let anybody = fixture.nobody("h2");
    tls::connect_as_agent(&address, &anybody).await.unwrap();
    let refused = tls::connect(&address, &anybody).await;
    assert!(refused.unwrap_err().to_string().contains("relay \"site1\""));
    let authority = fixture.authority();
    let other = credentials(authority, &Identity::relay("site1").unwrap());
    let refused = ends(&remote.site, &other, Hello::default()).await.unwrap();
    assert_eq!(refused.code(), Code::PermissionDenied, "a relay serves no relay");
}

async fn revoke(fixture: &Fixture, holder: &str) {
    let body = json!({ "holder": holder }).to_string();
    let (status, answer) = fixture.call(Method::POST, &format!("{V1}/revocations"), body).await;
    assert_eq!(status, 201, "{answer}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_behind_a_relay_is_revoked_at_once() {
    let (config, _directory) = restartable().await;
    let fixture = Fixture::with(config).await;
    let remote = remote(&fixture, &["s1-*"]).await;
    // A certificate begins at a full second, and a revocation is of those before.
    let mut a = remote.site.agent("s1-a").await;
    let mut b = remote.site.agent("s1-b").await;
    let of_a = credentials(fixture.authority(), &Identity::agent("s1-a").unwrap());
    tokio::time::sleep(Duration::from_millis(1100)).await;
    revoke(&fixture, "agent/s1-a").await;
    a.ended().await;
    b.hears_nothing().await;
    let hello = || Hello { host: "s1-a".into(), ..Hello::default() };
    let again = ends(&remote.site, &of_a, hello()).await.unwrap();
    assert_eq!(again.code(), Code::Unauthenticated, "{again:?}");
    // Also when nobody can be asked any more, and a host that was not there at the time.
    let of_c = credentials(fixture.authority(), &Identity::agent("s1-c").unwrap());
    tokio::time::sleep(Duration::from_millis(1100)).await;
    revoke(&fixture, "agent/s1-c").await;
    revoke(&fixture, "agent/elsewhere").await;
    b.hears_nothing().await;
    fixture.controller.shutdown().await.unwrap();
    remote.is_alone().await;
    let again = ends(&remote.site, &of_a, hello()).await.unwrap();
    assert_eq!(again.code(), Code::Unauthenticated, "{again:?}");
    let never = Hello { host: "s1-c".into(), ..Hello::default() };
    let refused = ends(&remote.site, &of_c, never).await.unwrap();
    assert_eq!(refused.code(), Code::Unauthenticated, "{refused:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_relay_sends_its_agents_elsewhere_and_may_join_again() {
    let fixture = Fixture::new().await;
    let remote = remote(&fixture, &["s1-*"]).await;
    let mut a = remote.site.agent("s1-a").await;
    a.publish(true, &[("web.s1-a", "s1-a", json!({ "role": "web" }), "10.0.1.1")], &[]).await;
    tokio::time::sleep(Duration::from_millis(1100)).await;
    revoke(&fixture, "relay/site1").await;
    a.ended().await;
    eventually("its host has no session", async || agent_of(&fixture, "s1-a").await["connected"] == false)
        .await;
    remote.reads("/readyz", "no controller lets this relay in").await;
    let mut again = remote.site.agent_at("s1-a", "", 0).await;
    assert!(is_elsewhere(&again.receive().await.unwrap_err()));
    // The agent goes to a controller, where it is as welcome as ever.
    fixture.agent("s1-a").await;
    let Remote { relay, directory, .. } = remote;
    relay.shutdown().await.unwrap();
    // A token makes it a relay again, beside the certificate that is good for nothing.
    let token = relay_token(&fixture, &["s1-*"]).await;
    let relay = relay::start(relay_config(&fixture, directory.path(), Some(token))).await.unwrap();
    let site = fixture.behind(relay.agents);
    let remote = Remote { relay, site, directory };
    remote.reads("/readyz", "ok").await;
    remote.site.agent("s1-a").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_relay_is_shut_out_and_its_name_is_free() {
    let fixture = Fixture::new().await;
    let remote = remote(&fixture, &["s1-*"]).await;
    let listed = async || fixture.get(&format!("{V1}/relays")).await["items"].clone();
    let all = listed().await;
    assert_eq!((&all[0]["name"], &all[0]["hosts"]), (&json!("site1"), &json!(["s1-*"])), "{all}");
    assert!(
        all[0]["by"].as_str().unwrap().starts_with("operator/root") && all[0]["since"].is_string(),
        "{all}"
    );
    let mut a = remote.site.agent("s1-a").await;
    let (of_a, own) = (
        credentials(fixture.authority(), &Identity::agent("s1-a").unwrap()),
        Credentials::load(&remote.directory.path().join("identity"), relay::IDENTITY_FILES).unwrap().unwrap(),
    );
    // More tokens than one transaction removes; others stay.
    let mut unused = String::new();
    for _ in 0..101 {
        unused = relay_token(&fixture, &["s1-*"]).await;
    }
    fixture.token(json!({ "relay": "site2", "hosts": ["s2-*"] })).await;
    fixture.token(json!({ "host": "site1" })).await;
    remote.is_connected().await;
    let mut again = remote.site.agent_at("s1-a", "", 0).await;
    again.welcomed().await;
    a.ended().await;

    assert_eq!(fixture.delete("relays/site1").await, 200);
    again.ended().await;
    eventually("its host has no session", async || agent_of(&fixture, "s1-a").await["connected"] == false)
        .await;
    remote.reads("/readyz", "no controller lets this relay in").await;
    let behind = ends(&remote.site, &of_a, Hello { host: "s1-a".into(), ..Hello::default() }).await;
    assert!(is_elsewhere(&behind.unwrap()));
    fixture.agent("s1-a").await;
    let all = listed().await;
    assert!(all.as_array().unwrap().len() == 1 && all[0]["name"] == "site2", "{all}");
    let status = fixture.get(&format!("{V1}/status")).await;
    assert_eq!(status["relays"].as_array().unwrap().len(), 1, "{status}");
    let tokens = fixture.get(&format!("{V1}/tokens")).await["items"].clone();
    assert_eq!(tokens.as_array().unwrap().len(), 2, "{tokens}");
    for nobody in ["relays/site1", "relays/never", "relays/a%2Fb"] {
        assert_eq!(fixture.delete(nobody).await, 404, "{nobody}");
    }
    let elsewhere = tempfile::tempdir().unwrap();
    let refused = relay::start(relay_config(&fixture, elsewhere.path(), Some(unused))).await.unwrap_err();
    assert!(refused.to_string().contains("unknown, used up, or expired"), "{refused}");

    // A new one has the name, and what the former has is good for nothing beside it.
    let new = self::remote(&fixture, &["s1-*"]).await;
    let mut a = new.site.agent("s1-a").await;
    let former = ends(&fixture, &own, Hello::default()).await.unwrap();
    assert_eq!(former.code(), Code::Unauthenticated, "{former:?}");
    remote.reads("/readyz", "no controller lets this relay in").await;
    a.hears_nothing().await;
    new.reads("/readyz", "ok").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn that_a_relay_is_deleted_stands_in_the_audit_log() {
    let (config, _directory) = restartable().await;
    let audit = config.data_directory.join("audit/audit.jsonl");
    let fixture = Fixture::with(config).await;
    relay_token(&fixture, &["s1-*"]).await;
    assert_eq!(fixture.delete("relays/site1").await, 200);
    assert_eq!(fixture.delete("relays/site1").await, 404, "what is not there is not deleted");
    let text = std::fs::read_to_string(audit).unwrap();
    let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let deleted: Vec<_> = lines.filter(|line| line.to_string().contains("relay delete")).collect();
    assert!(deleted.len() == 1 && deleted[0].to_string().contains("s1-*"), "{deleted:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_relay_with_a_token_of_another_fleet_joins_that() {
    let (former, fixture) = (Fixture::new().await, Fixture::new().await);
    let Remote { relay, directory, .. } = remote(&former, &["s1-*"]).await;
    relay.shutdown().await.unwrap();
    let token = relay_token(&fixture, &["s1-*"]).await;
    let relay = relay::start(relay_config(&fixture, directory.path(), Some(token))).await.unwrap();
    let site = fixture.behind(relay.agents);
    let remote = Remote { relay, site, directory };
    remote.reads("/readyz", "ok").await;
    remote.site.agent("s1-a").await;
}

/// The same bounds as at a controller's port, see `doors.rs`.
#[tokio::test(flavor = "multi_thread")]
async fn strangers_at_a_relay_are_bounded_and_counted_there() {
    let fixture = Fixture::new().await;
    let remote = remote(&fixture, &["s1-*"]).await;
    let token = JoinToken::generate(fixture.authority().certificate());
    let nobody = || remote.site.client_over(remote.site.nobody("h2"));
    let request = |signing_request: String| EnrollRequest {
        token_id: token.id.clone(),
        token_secret: token.secret.reveal(),
        host: "s1-a".into(),
        relay: false,
        signing_request,
    };
    let refused = nobody().enroll(request("x".repeat(9 << 10))).await.unwrap_err();
    assert_eq!(refused.code(), Code::OutOfRange, "{refused}");
    let mut client = nobody();
    let waiting = async {
        loop {
            match client.enroll(request("none".into())).await.unwrap_err().code() {
                Code::InvalidArgument => {}
                Code::ResourceExhausted => return,
                // The time of a stranger is over.
                _ => client = nobody(),
            }
        }
    };
    tokio::time::timeout(4 * PATIENCE, waiting).await.expect("it must be refused");
    assert!(remote.metric("enrolls_refused_total").await > 0);
    let page = fixture.get("/metrics").await;
    assert!(page.as_str().unwrap().contains("bulkhead_enrolls_refused_total 0\n"), "the relay refuses");
    let mut open = Vec::new();
    let waiting = async {
        while remote.metric("connections_refused_total{port=\"agents\"}").await == 0 {
            for _ in 0..20 {
                let address = remote.relay.agents.to_string();
                open.push(tls::connect_as_agent(&address, &remote.site.nobody("h2")).await);
            }
        }
    };
    tokio::time::timeout(4 * PATIENCE, waiting).await.expect("there must be a bound");
    assert!(remote.metric("connections_strangers{port=\"agents\"}").await <= 64);
    let _agent = remote.site.agent("s1-a").await;
    assert_eq!(remote.metric("connections_known{port=\"agents\"}").await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_relay_may_be_given_other_hosts() {
    let fixture = Fixture::new().await;
    let remote = remote(&fixture, &["s1-*"]).await;
    let mut a = remote.site.agent("s1-a").await;
    let mut b = remote.site.agent_at("b", "", 0).await;
    assert_eq!(b.receive().await.unwrap_err().code(), Code::PermissionDenied, "not on the list");
    relay_token(&fixture, &["b"]).await;
    a.ended().await;
    eventually("the other is let in", async || {
        let mut b = remote.site.agent_at("b", "", 0).await;
        b.receive().await.is_ok()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_of_relays_are_for_relays() {
    let fixture = Fixture::new().await;
    let post = async |body: Value| {
        fixture.call(Method::POST, &format!("{V1}/tokens"), body.to_string()).await.0.as_u16()
    };
    assert_eq!(post(json!({ "relay": "site1" })).await, 400, "for which hosts?");
    assert_eq!(post(json!({ "relay": "site1", "hosts": [] })).await, 400);
    assert_eq!(post(json!({ "relay": "a/b", "hosts": ["*"] })).await, 400);
    assert_eq!(post(json!({ "hosts": ["*"] })).await, 400);
    assert_eq!(post(json!({ "relay": "site1", "hosts": ["x"], "host": "x" })).await, 400);
    let (token, made) = fixture.token(json!({ "relay": "site1", "hosts": ["x*"] })).await;
    assert_eq!((&made["for"], &made["hosts"]), (&json!("relay"), &json!(["x*"])));
    let (_, kept) = fixture.token(json!({ "relay": "site1" })).await;
    assert_eq!(kept["hosts"], json!(["x*"]), "as before");
    let key = Key::generate().unwrap();
    assert_eq!(fixture.join(&token, "site1", &key).await.unwrap_err().code(), Code::PermissionDenied);
    let (host, _) = fixture.token(json!({})).await;
    let directory = tempfile::tempdir().unwrap();
    let start = async |token: String, name: &str| {
        let config =
            relay::Config { name: name.into(), ..relay_config(&fixture, directory.path(), Some(token)) };
        relay::start(config).await.map(drop).map_err(|error| error.to_string())
    };
    assert!(start(host.to_string(), "site1").await.is_err(), "a host's token");
    let wrong = start(token.to_string(), "site2").await.unwrap_err();
    assert!(wrong.contains("for another host or relay"), "{wrong}");
    start(token.to_string(), "site1").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_and_flows_go_through_a_relay() {
    let fixture = Fixture::new().await;
    let remote = remote(&fixture, &["s1-*"]).await;
    // A machine that has a token and knows the relay only.
    let (token, _) = fixture.token(json!({})).await;
    let key = Key::generate().unwrap();
    let joined = remote.site.join(&token, "s1-a", &key).await.unwrap();
    let a = own(&key, joined);
    assert_eq!(a.holder().unwrap().identity.to_string(), "agent/s1-a");
    let (token, _) = fixture.token(json!({})).await;
    let refused = remote.site.join(&token, "other", &key).await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied, "not one of this relay's hosts");
    let next = Key::generate().unwrap();
    let signing_request = next.request().unwrap();
    let unproven = RenewRequest { signing_request: signing_request.clone(), ..RenewRequest::default() };
    let refused = remote.site.client_with(&a).renew(unproven).await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied, "a relay might have asked for itself");
    let proof = a.sign(signing_request.as_bytes()).unwrap().into();
    let request = RenewRequest { signing_request, proof, ..RenewRequest::default() };
    let renewed = remote.site.client_with(&a).renew(request).await.unwrap().into_inner();
    let a = own(&next, renewed);
    assert_eq!(a.holder().unwrap().identity.to_string(), "agent/s1-a");

    let (up, batches) = mpsc::channel(4);
    let records = vec![record(now_ms(), "10.0.0.2", "10.0.0.1", "allow", "db").to_string().into()];
    up.send(FlowBatch { sequence: 5, records, lost: 0, ..FlowBatch::default() }).await.unwrap();
    let mut receipts =
        remote.site.client_with(&a).report_flows(ReceiverStream::new(batches)).await.unwrap().into_inner();
    assert_eq!(receipts.message().await.unwrap().unwrap().sequence, 5);
    let flows = fixture.get(&format!("{V1}/flows")).await;
    assert_eq!(flows["items"].as_array().unwrap().len(), 1, "a receipt says that the controller has it");
    // What the relay has shown once it need not show again, until the host is revoked.
    up.send(FlowBatch { sequence: 6, ..FlowBatch::default() }).await.unwrap();
    assert_eq!(receipts.message().await.unwrap().unwrap().sequence, 6);
    // With its controller gone no receipt comes.
    fixture.controller.shutdown().await.unwrap();
    let late = up.send(FlowBatch { sequence: 7, ..FlowBatch::default() }).await;
    let receipt = receipts.message().await;
    assert!(late.is_err() || !matches!(receipt, Ok(Some(_))), "{receipt:?}");
}
