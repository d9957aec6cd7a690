//! Coming back: the difference if there is one to be had, everything otherwise.

use bulkhead_controller::{Config, StoreKind};
use serde_json::json;

use crate::etcd_server::EtcdServer;
use crate::harness::{Agent, Fixture, PATIENCE, POLICY, config, etcd_config, in_memory_and_etcd};

in_memory_and_etcd!(
    who_comes_back_hears_the_difference_only,
    another_epoch_or_a_revision_to_come_gets_everything,
);

/// A fleet with one web workload on h2, read by h1 as of the answered epoch and revision.
async fn fleet(fixture: &Fixture) -> (Agent, Agent, String, u64) {
    fixture.apply(POLICY).await;
    let mut writer = fixture.agent("h2").await;
    writer.publish(true, &[("web.h2", "h2", json!({ "role": "web" }), "10.0.0.2")], &[]).await;
    let mut reader = fixture.agent_at("h1", "", 0).await;
    let epoch = reader.welcomed().await.epoch;
    reader.batch().await;
    let batch = reader.subscribe("role == 'web'", 0).await;
    assert_eq!(batch.joins().len(), 1);
    (writer, reader, epoch, batch.revision)
}

async fn who_comes_back_hears_the_difference_only(config: Config) {
    let fixture = Fixture::with(config).await;
    let (mut writer, reader, epoch, revision) = fleet(&fixture).await;
    drop(reader);
    let mut reader = fixture.agent_at("h1", &epoch, revision).await;
    reader.welcomed().await;
    let batch = reader.batch().await;
    assert!(batch.resources.is_empty(), "nothing has changed: {batch:?}");
    let batch = reader.subscribe("role == 'web'", revision).await;
    assert!(!batch.members[0].snapshot && batch.joins().is_empty() && batch.leaves().is_empty());
    drop(reader);

    writer.publish(false, &[("web2.h2", "h2", json!({ "role": "web" }), "10.0.0.3")], &["web.h2"]).await;
    fixture.apply(&POLICY.replace("name: db", "name: other")).await;
    let mut reader = fixture.agent_at("h1", &epoch, revision).await;
    reader.welcomed().await;
    let batch = reader.batch().await;
    assert_eq!((batch.resources[0].snapshot, batch.resources[0].upserts.len()), (false, 1));
    let batch = reader.subscribe("role == 'web'", revision).await;
    assert!(!batch.members[0].snapshot);
    assert_eq!((batch.joins(), batch.leaves()), (vec![("Workload/web2.h2", "h2")], vec!["Workload/web.h2"]));
}

async fn another_epoch_or_a_revision_to_come_gets_everything(config: Config) {
    let fixture = Fixture::with(config).await;
    let (_writer, _reader, epoch, revision) = fleet(&fixture).await;
    for (epoch, revision) in [("other", revision), (epoch.as_str(), revision + 100)] {
        let mut agent = fixture.agent_at("h3", epoch, revision).await;
        agent.welcomed().await;
        assert!(agent.batch().await.resources[0].snapshot);
        let batch = agent.subscribe("role == 'web'", revision).await;
        assert!(batch.members[0].snapshot && batch.joins().len() == 1);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn agents_resume_over_a_restart_with_a_file() {
    let directory = tempfile::tempdir().unwrap();
    let data_directory = directory.path().to_owned();
    agents_resume_over_a_restart(Config { store: StoreKind::Embedded, data_directory, ..config() }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn agents_resume_over_a_restart_with_etcd() {
    let etcd = EtcdServer::start();
    agents_resume_over_a_restart(etcd_config(&etcd)).await;
}

async fn agents_resume_over_a_restart(config: Config) {
    let fixture = Fixture::with(config.clone()).await;
    let (mut writer, mut reader, epoch, revision) = fleet(&fixture).await;
    writer.publish(false, &[("web3.h2", "h2", json!({ "role": "web" }), "10.0.0.4")], &[]).await;
    reader.batch().await;
    fixture.controller.shutdown().await.unwrap();
    assert!(reader.receive().await.is_err(), "the session ends with the controller");

    let fixture = Fixture::with(config).await;
    let mut reader = fixture.agent_at("h1", &epoch, revision).await;
    assert_eq!(reader.welcomed().await.epoch, epoch);
    assert!(reader.batch().await.resources.is_empty(), "nothing has changed");
    let batch = reader.subscribe("role == 'web'", revision).await;
    assert!(!batch.members[0].snapshot);
    assert_eq!(batch.joins(), [("Workload/web3.h2", "h2")]);
    assert_eq!(fixture.get("/apis/bulkhead.dev/v1/policies").await["items"].as_array().unwrap().len(), 1);
}

/// Without its etcd a controller serves what it knows, and goes on by itself when it is back.
#[tokio::test(flavor = "multi_thread")]
async fn a_controller_outlives_its_etcd() {
    let mut etcd = EtcdServer::start();
    let fixture = Fixture::with(etcd_config(&etcd)).await;
    let (mut writer, reader, epoch, revision) = fleet(&fixture).await;
    etcd.kill();
    let policies = fixture.get("/apis/bulkhead.dev/v1/policies").await;
    assert_eq!(policies["items"].as_array().unwrap().len(), 1);
    // An agent whose host is known, and as it was, needs nothing to be written.
    drop(reader);
    let mut reader = fixture.agent_at("h1", &epoch, revision).await;
    reader.welcomed().await;
    assert!(reader.batch().await.resources.is_empty(), "nothing has changed");
    reader.subscribe("role == 'web'", revision).await;
    // What is written meanwhile waits for it.
    let other = POLICY.replace("name: db", "name: other");
    let (applied, ()) = tokio::join!(fixture.apply(&other), async { etcd.restart() });
    assert_eq!(applied["items"][0]["outcome"], json!("created"));
    for agent in [&mut reader, &mut writer] {
        assert_eq!(agent.batch().await.resources[0].upserts.len(), 1);
    }
    let entry = ("web3.h2", "h2", json!({ "role": "web" }), "10.0.0.4");
    writer.publish(false, &[entry], &[]).await;
    assert_eq!(reader.batch().await.joins(), [("Workload/web3.h2", "h2")]);
    assert_eq!(fixture.get("/readyz").await, json!("ok\n"));
}

/// Answers with [`TOLD`] members each: more than the queue, the connection's window (2 MiB) and the buffers of both ends hold.
const UNREAD: u32 = 5000;
const TOLD: u32 = 50;

#[tokio::test(flavor = "multi_thread")]
async fn who_reads_nothing_is_cut_off_and_resumes() {
    let fixture = Fixture::new().await;
    let (mut writer, mut reader, epoch, revision) = fleet(&fixture).await;
    let names: Vec<String> = (0..TOLD).map(|number| format!("many-{number}.h2")).collect();
    let many: Vec<_> =
        names.iter().map(|name| (name.as_str(), "h2", json!({ "role": "many" }), "10.0.1.1")).collect();
    writer.publish(false, &many, &[]).await;
    for number in 0..UNREAD {
        reader.ask(number + 100, &format!("role in {{'many', 'nobody-{number}'}}")).await;
    }
    let cut_off = async {
        loop {
            let (_, page) = fixture.call(hyper::Method::GET, "/metrics", String::new()).await;
            if page.as_str().unwrap().contains("agent_sessions_cut_off_total 1") {
                break;
            }
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(PATIENCE * 3, cut_off).await.expect("it must be cut off");
    reader.ended().await;

    writer.publish(false, &[("web4.h2", "h2", json!({ "role": "web" }), "10.0.0.5")], &[]).await;
    drop(reader);
    let mut reader = fixture.agent_at("h1", &epoch, revision).await;
    reader.welcomed().await;
    assert!(reader.batch().await.resources.is_empty(), "nothing has changed");
    let batch = reader.subscribe("role == 'web'", revision).await;
    // Of the fifty that never concerned it, it hears nothing: all members are told instead, since they are fewer.
    assert!(batch.joins().contains(&("Workload/web4.h2", "h2")) && batch.leaves().is_empty(), "{batch:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_is_packed_for_those_who_can_read_it() {
    let fixture = Fixture::new().await;
    fixture.apply(POLICY).await;
    let mut plain = fixture.agent_at("h1", "", 0).await;
    plain.welcomed().await;
    let plain: Vec<_> = plain.batch().await.resources;
    assert!(plain.iter().all(|part| part.packed.is_empty()));
    let mut packing = fixture.agent_that_unpacks("h2").await;
    packing.welcomed().await;
    let packed = packing.batch().await.resources;
    assert!(packed[0].snapshot && packed.iter().all(|part| part.upserts.is_empty()));
    let parts = packed.iter().filter(|part| !part.packed.is_empty());
    let unpacked: Vec<_> = parts.flat_map(|part| bulkhead_wire::unpack(&part.packed).unwrap()).collect();
    assert_eq!(unpacked, plain.into_iter().flat_map(|part| part.upserts).collect::<Vec<_>>());
}
