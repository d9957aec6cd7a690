//! Hosts that are gone.

use std::time::{Duration, Instant};

use bulkhead_controller::Config;
use serde_json::json;

use crate::harness::{Fixture, PATIENCE, config};

async fn workloads(fixture: &Fixture) -> usize {
    let list = fixture.get("/apis/bulkhead.dev/v1/workloads").await;
    list["items"].as_array().unwrap().len()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_hosts_workloads_go_after_lease_and_grace_and_not_before() {
    let fixture = Fixture::with(Config { lease_ms: 300, grace_ms: 700, ..config() }).await;
    let mut agent = fixture.agent("h1").await;
    agent.publish(true, &[("web.h1", "h1", json!({ "role": "web" }), "10.0.0.1")], &[]).await;
    let mut reader = fixture.agent("h2").await;
    assert_eq!(reader.subscribe("role == 'web'", 0).await.joins().len(), 1);
    let left = Instant::now();
    drop(agent);
    loop {
        // An agent reports at least once per lease.
        reader.say(bulkhead_wire::proto::agent_message::Body::Status(Default::default())).await;
        if workloads(&fixture).await == 0 {
            break;
        }
        assert!(left.elapsed() < PATIENCE, "the workloads must go");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert!(left.elapsed() >= Duration::from_millis(1000), "{:?}", left.elapsed());
    assert_eq!(reader.batch().await.leaves(), ["Workload/web.h1"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_session_is_ended() {
    let fixture = Fixture::with(Config { lease_ms: 200, ..config() }).await;
    let mut agent = fixture.agent("h1").await;
    let status = agent.receive().await.unwrap_err();
    assert!(status.message().contains("nothing heard"), "{status}");
}
