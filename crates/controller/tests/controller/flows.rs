//! Flows: joined, filtered, followed, kept.

use bulkhead_controller::{Config, StoreKind};
use bulkhead_wire::proto::FlowBatch;
use hyper::Method;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

pub(crate) use crate::harness::flow_record as record;
use crate::harness::{Fixture, Lines, config};

pub(crate) async fn report(fixture: &Fixture, records: &[Value]) {
    let (sender, batches) = mpsc::channel(4);
    let records = records.iter().map(|record| record.to_string().into()).collect();
    sender.send(FlowBatch { sequence: 9, records, lost: 3, ..FlowBatch::default() }).await.unwrap();
    let mut receipts =
        fixture.client("h1").report_flows(ReceiverStream::new(batches)).await.unwrap().into_inner();
    assert_eq!(receipts.message().await.unwrap().unwrap().sequence, 9);
}

pub(crate) fn now_ms() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    u64::try_from(since.as_millis()).unwrap()
}

async fn fleet(fixture: &Fixture) {
    for (host, role, address) in [("h1", "db", "10.0.0.1"), ("h2", "web", "10.0.0.2")] {
        let mut agent = fixture.agent(host).await;
        let name = format!("{role}.{host}");
        agent.publish(true, &[(&name, host, json!({ "role": role }), address)], &[]).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn flows_are_joined_with_the_inventory_and_filtered() {
    let fixture = Fixture::new().await;
    fleet(&fixture).await;
    let now = now_ms();
    let records = [
        record(now - 600_000, "192.0.2.1", "10.0.0.1", "deny", "old"),
        record(now, "10.0.0.2", "10.0.0.1", "allow", "db"),
        record(now, "192.0.2.1", "10.0.0.1", "deny", "outside"),
    ];
    report(&fixture, &records).await;
    let policies = async |query: &str| {
        let list = fixture.get(&format!("/apis/bulkhead.dev/v1/flows?{query}")).await;
        let items = list["items"].as_array().unwrap().clone();
        let policy = |item: &Value| item["enforced"]["rule"]["policy"].as_str().unwrap().to_owned();
        items.iter().map(policy).collect::<Vec<_>>()
    };
    assert_eq!(policies("").await, ["outside", "db", "old"]);
    assert_eq!(policies("limit=1").await, ["outside"]);
    assert_eq!(policies("since=5m").await, ["outside", "db"]);
    assert_eq!(policies("verdict=deny&since=5m").await, ["outside"]);
    assert_eq!(policies("policy=db").await, ["db"]);
    assert_eq!(policies("workload=web").await, ["db"]);
    assert_eq!(policies("workload=web.h2").await, ["db"]);
    assert_eq!(policies("label=role%3Dweb").await, ["db"]);
    assert_eq!(policies("label=role%20in%20%7B'web'%7D").await, ["db"]);
    let list = fixture.get("/apis/bulkhead.dev/v1/flows?policy=db").await;
    let source = &list["items"][0]["source"];
    assert_eq!((&source["workload"], &source["host"]), (&json!("web.h2"), &json!("h2")));
    assert_eq!(source["labels"], json!({ "role": "web" }));
    let metrics = fixture.get("/metrics").await;
    let metrics = metrics.as_str().unwrap();
    assert!(metrics.contains("bulkhead_flows_received_total 3\n"), "{metrics}");
    assert!(metrics.contains("bulkhead_flows_lost_total{cause=\"agent\"} 3\n"), "{metrics}");
}

#[tokio::test(flavor = "multi_thread")]
async fn followers_get_what_they_asked_for_as_it_comes() {
    let fixture = Fixture::new().await;
    let path = "/apis/bulkhead.dev/v1/flows?follow=true&verdict=deny";
    let mut lines = Lines::of(fixture.send(Method::GET, path, String::new()).await);
    let now = now_ms();
    let allowed = record(now, "10.0.0.2", "10.0.0.1", "allow", "a");
    report(&fixture, &[allowed, record(now, "10.0.0.2", "10.0.0.1", "deny", "b")]).await;
    assert_eq!(lines.next().await["enforced"]["rule"]["policy"], json!("b"));
}

#[tokio::test(flavor = "multi_thread")]
async fn flows_are_kept_over_a_restart_within_their_bounds() {
    let directory = tempfile::tempdir().unwrap();
    let config = Config {
        store: StoreKind::Embedded,
        data_directory: directory.path().to_owned(),
        flow_records_in_memory: 4,
        flow_records_on_disk: 12,
        ..config()
    };
    let fixture = Fixture::with(config.clone()).await;
    let records: Vec<_> =
        (0..20).map(|number| record(number, "192.0.2.1", "10.0.0.1", "deny", &number.to_string())).collect();
    report(&fixture, &records).await;
    fixture.controller.shutdown().await.unwrap();

    let fixture = Fixture::with(config).await;
    report(&fixture, &[record(99, "192.0.2.1", "10.0.0.1", "deny", "new")]).await;
    let list = fixture.get("/apis/bulkhead.dev/v1/flows").await;
    let sequences: Vec<_> =
        list["items"].as_array().unwrap().iter().map(|item| item["sequence"].as_u64().unwrap()).collect();
    assert_eq!(sequences, (9..=21).rev().collect::<Vec<_>>(), "the newest 12 of before, and the new one");
}
