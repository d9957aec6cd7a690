//! Disks that are full.

use std::time::{Duration, Instant};

use bulkhead_controller::{Config, StoreKind, verify_audit};
use bulkhead_store::RESERVE_BYTES;
use bulkhead_wire::proto::FlowBatch;
use hyper::{Method, StatusCode};
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use crate::etcd_server::EtcdServer;
use crate::fleet::{CONVERGES, Fleet, V1, one_of, policy};
use crate::harness::{Fixture, Site, config, flow_record};
use crate::kills::has_all;
use crate::process::Process;
use crate::relays::relay_of;
use crate::small_disk::SmallDisk;

const DISK_BYTES: u64 = 64 << 20;

pub(crate) async fn metric(site: &Site, name: &str) -> u64 {
    let page = site.get("/metrics").await;
    let line = page.as_str().unwrap().lines().find(|line| line.starts_with(&format!("bulkhead_{name} ")));
    line.unwrap_or_else(|| panic!("no {name}")).rsplit(' ').next().unwrap().parse().unwrap()
}

/// A policy that takes room: large, and incompressible enough.
fn large(name: &str) -> String {
    let seed = bulkhead_store::random_id();
    let annotation: String = (0..800).map(|number| format!("{seed}{number}{seed}")).collect();
    policy(name).replace("}\nspec", &format!(", annotations: {{note: '{annotation}'}}}}\nspec"))
}

async fn apply(site: &Site, text: &str) -> (StatusCode, Value) {
    site.try_apply("apply", &[("p.yaml", text)]).await
}

/// Writes policies `NAME0`, … until one is refused; how many were not, and what the refusal says.
async fn write_until_refused(site: &Site, name: &str) -> (usize, StatusCode, Value) {
    for number in 0.. {
        let (status, answer) = apply(site, &large(&format!("{name}{number}"))).await;
        if status != StatusCode::OK {
            return (number, status, answer);
        }
    }
    unreachable!()
}

async fn until_ready(site: &Site) -> Duration {
    let began = Instant::now();
    loop {
        let (status, answer) = site.call(Method::GET, "/readyz", String::new()).await;
        if status == StatusCode::OK {
            return began.elapsed();
        }
        assert!(began.elapsed() < CONVERGES, "{answer}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Sends flow records of a policy of each name; whoever does gets a receipt, whatever room there is.
async fn report_flows(site: &Site, names: &[String]) {
    let record = |name: &String| flow_record(1, "192.0.2.1", "10.1.0.1", "deny", name).to_string().into();
    let (sender, batches) = mpsc::channel(4);
    let records = names.iter().map(record).collect();
    sender.send(FlowBatch { sequence: 9, records, ..FlowBatch::default() }).await.unwrap();
    let answer = site.client("h1").report_flows(ReceiverStream::new(batches)).await;
    let mut receipts = answer.unwrap().into_inner();
    assert_eq!(receipts.message().await.unwrap().unwrap().sequence, 9);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_controller_whose_disk_is_full_refuses_changes_and_serves_on() {
    let disk = SmallDisk::new(DISK_BYTES);
    let (identity, directory) = (tempfile::tempdir().unwrap(), disk.path().join("controller"));
    let config = Config {
        store: StoreKind::Embedded,
        data_directory: directory.clone(),
        identity_directory: Some(identity.path().to_owned()),
        ..config()
    };
    let mut a = Process::start(&config);
    let fleet = Fleet::start(20, &[&a.site], a.site.authority());
    fleet.converges(&a.site, &[&a.site]).await;
    assert_eq!(metric(&a.site, "store_refuses").await, 0);
    let remote = tempfile::tempdir().unwrap();
    let mut of_relay = relay_of(&a.site, &[&a.site], "r1", remote.path()).await;
    drop(Process::relay(&of_relay, &a.site));
    disk.fill(12 << 20);
    let (acknowledged, status, answer) = write_until_refused(&a.site, "p").await;
    println!("{acknowledged} changes until the disk was full");
    assert!(acknowledged > 0);
    assert_eq!(status, StatusCode::INSUFFICIENT_STORAGE, "{answer}");
    assert_eq!(answer["reason"], "InsufficientStorage", "{answer}");
    let message = answer["message"].as_str().unwrap();
    assert!(message.contains("is full: nothing was changed; make room there"), "{message}");
    // Whoever looks sees it.
    let (status, answer) = a.site.call(Method::GET, "/readyz", String::new()).await;
    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
    assert!(answer.as_str().unwrap().contains("is full"), "{answer}");
    assert_eq!(metric(&a.site, "store_refuses").await, 1);
    assert!(metric(&a.site, "data_free_bytes").await < 16 << 20);
    // What is large is refused while there may be room for what is small: somebody takes that too.
    disk.fill(RESERVE_BYTES - 1);
    let lines = verify_audit(&directory.join("audit")).unwrap();
    // Reads and sessions go on, those that begin now too, and of a host that nobody has heard of.
    has_all(&a.site, "p", acknowledged).await;
    fleet.converges(&a.site, &[&a.site]).await;
    report_flows(&a.site, &["none".into()]).await;
    let mut newcomer = a.site.agent("newcomer").await;
    let workload = [("web.newcomer", "newcomer", json!({ "role": "r0" }), "10.9.0.1")];
    let published = newcomer.publish(true, &workload, &[]);
    tokio::pin!(published);
    let waited = tokio::time::timeout(Duration::from_secs(3), published.as_mut()).await;
    assert!(waited.is_err(), "a workload cannot be stored now: {waited:?}");
    assert_eq!(apply(&a.site, &policy("small")).await.0, StatusCode::INSUFFICIENT_STORAGE);
    assert!(verify_audit(&directory.join("audit")).unwrap() > lines, "what is refused has its line");

    // Killed and started again without more room: nothing acknowledged is lost, and it serves.
    a.kill();
    let killed = Instant::now();
    let a = Process::start(&config);
    fleet.knows(&[&a.site]);
    fleet.converges(&a.site, &[&a.site]).await;
    println!("20 agents know everything {:?} after a kill -9 on a full disk", killed.elapsed());
    has_all(&a.site, "p", acknowledged).await;
    assert_eq!(apply(&a.site, &policy("small")).await.0, StatusCode::INSUFFICIENT_STORAGE);
    let mut newcomer = a.site.agent("newcomer").await;
    let published = newcomer.publish(true, &workload, &[]);
    tokio::pin!(published);
    assert!(tokio::time::timeout(Duration::from_secs(1), published.as_mut()).await.is_err());

    // What is published behind a relay waits as well, and its agents are served.
    of_relay.upstreams = vec![format!("https://{}", a.site.agents)];
    let relay = Process::relay(&of_relay, &a.site);
    let began = Instant::now();
    let mut remote = loop {
        let mut remote = relay.site.agent_at("hidden", "", 0).await;
        match remote.receive().await {
            Ok(_welcome) => break remote,
            Err(status) => assert!(began.elapsed() < CONVERGES, "{status}"),
        }
    };
    remote.batch().await;
    let workload = [("web.hidden", "hidden", json!({ "role": "r0" }), "10.9.0.2")];
    let through = remote.publish(true, &workload, &[]);
    tokio::pin!(through);
    assert!(tokio::time::timeout(Duration::from_secs(1), through.as_mut()).await.is_err());

    // And somebody takes the rest.
    disk.fill(0);
    assert_eq!(apply(&a.site, &policy("small")).await.0, StatusCode::INSUFFICIENT_STORAGE);
    has_all(&a.site, "p", acknowledged).await;

    // With room everything goes on by itself.
    disk.make_room();
    println!("it was ready {:?} after there was room", until_ready(&a.site).await);
    assert!(published.await.refused.is_empty() && through.await.refused.is_empty());
    a.site.apply(&policy("afterwards")).await;
    fleet.converges(&a.site, &[&a.site]).await;
    has_all(&a.site, "p", acknowledged).await;
    assert_eq!(metric(&a.site, "store_refuses").await, 0);
    assert_eq!(metric(&a.site, "audit_lines_lost_total").await, 0);
    verify_audit(&directory.join("audit")).unwrap();
}

/// The repository has room, in etcd, and the audit log has not: who changed what must be on record.
#[tokio::test(flavor = "multi_thread")]
async fn a_change_that_the_audit_log_has_no_room_for_is_refused() {
    let etcd = EtcdServer::cluster(1);
    let disk = SmallDisk::new(DISK_BYTES);
    let a = Fixture::with(Config { data_directory: disk.path().to_owned(), ..one_of(&etcd, "a") }).await;
    let b = Fixture::with(one_of(&etcd, "b")).await;
    a.apply(&policy("before")).await;
    disk.fill(0);
    let (status, answer) = apply(&a, &policy("p")).await;
    assert_eq!(
        (status, &answer["reason"]),
        (StatusCode::INSUFFICIENT_STORAGE, &json!("AuditLogUnavailable"))
    );
    let token = json!({ "operator": { "name": "ann", "groups": [] } }).to_string();
    let (status, answer) = a.call(Method::POST, &format!("{V1}/tokens"), token).await;
    assert_eq!(status, StatusCode::INSUFFICIENT_STORAGE, "{answer}");
    assert_eq!(a.get(&format!("{V1}/policies")).await["items"].as_array().unwrap().len(), 1);
    // A change that is refused for another reason has a line, which waits.
    let viewer = a.operator("nobody", &[]);
    let mut refused = 0;
    while metric(&a, "audit_lines_waiting").await == 0 {
        // The file's last page may hold some more.
        assert!(refused < 100, "the lines must wait");
        let path = format!("{V1}/policies/before");
        let answer = a.send_as(&viewer, Method::DELETE, &path, String::new()).await;
        assert_eq!(answer.status(), StatusCode::FORBIDDEN);
        refused += 1;
    }
    assert_eq!(a.call(Method::GET, "/readyz", String::new()).await.0, StatusCode::SERVICE_UNAVAILABLE);
    // Only this controller's disk is full.
    b.apply(&policy("elsewhere")).await;
    disk.make_room();
    a.apply(&policy("p")).await;
    assert_eq!(metric(&a, "audit_lines_waiting").await, 0);
    until_ready(&a).await;
    assert_eq!(verify_audit(&disk.path().join("audit")).unwrap(), refused + 2, "before, the refused, p");
}

/// The names of the policies of all flow records that are answered, the oldest first.
async fn reported(site: &Site) -> Vec<String> {
    let answer = site.get(&format!("{V1}/flows?limit=1000")).await;
    let names = answer["items"].as_array().unwrap().iter().rev();
    names.map(|flow| flow["enforced"]["rule"]["policy"].as_str().unwrap().to_owned()).collect()
}

async fn until_reported(site: &Site, names: &[String]) {
    let began = Instant::now();
    while reported(site).await != names {
        assert!(began.elapsed() < CONVERGES, "{:?}", reported(site).await);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// The repository has room, in etcd, and the window of flow records has not: those that are not written are counted, and
/// everything else goes on.
#[tokio::test(flavor = "multi_thread")]
async fn flow_records_that_there_is_no_room_for_are_counted() {
    const IN_MEMORY: usize = 5;
    const LOST: &str = "flows_lost_total{cause=\"disk\"}";
    let etcd = EtcdServer::cluster(1);
    let (disk, identity) = (SmallDisk::new(DISK_BYTES), tempfile::tempdir().unwrap());
    let config = Config {
        data_directory: disk.path().to_owned(),
        identity_directory: Some(identity.path().to_owned()),
        flow_records_in_memory: IN_MEMORY,
        ..one_of(&etcd, "a")
    };
    let names =
        |what: &str, count: usize| (0..count).map(|number| format!("{what}{number}")).collect::<Vec<_>>();
    let a = Fixture::with(config.clone()).await;
    let before = names("before", 20);
    report_flows(&a, &before).await;
    until_reported(&a, &before).await;
    assert_eq!(metric(&a, LOST).await, 0);

    // There is room to begin with, and not to end: the commit of what came together fails half-way. A record names its policy
    // twice, and takes a page of twice its size.
    disk.fill((16 << 20) + (512 << 10));
    let long = "x".repeat(68 << 10);
    let large: Vec<_> = (0..80).map(|number| format!("{long}{number}")).collect();
    report_flows(&a, &large).await;
    let counted = async |count: u64| {
        let began = Instant::now();
        while metric(&a, LOST).await < count {
            assert!(began.elapsed() < CONVERGES, "they must be counted");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        assert_eq!(metric(&a, LOST).await, count);
    };
    counted(80).await;
    // Nor is there now.
    disk.fill(0);
    let lost = names("lost", 7);
    report_flows(&a, &lost).await;
    counted(87).await;
    // What is in memory is answered, agents come and publish.
    let answered = reported(&a).await;
    assert_eq!(answered[answered.len() - IN_MEMORY..], lost[2..]);
    let mut agent = a.agent("h1").await;
    let published = agent.publish(true, &[("web.h1", "h1", json!({ "role": "web" }), "10.0.0.1")], &[]).await;
    assert!(published.refused.is_empty(), "{published:?}");

    // With room they are written again, without a restart, and what was there before is still there.
    disk.make_room();
    let after = names("after", 20);
    report_flows(&a, &after).await;
    let all = [before, after].concat();
    until_reported(&a, &all).await;
    counted(87).await;
    let Fixture { controller, .. } = a;
    controller.shutdown().await.unwrap();
    let again = Fixture::with(config).await;
    assert_eq!(reported(&again).await, all);
}
