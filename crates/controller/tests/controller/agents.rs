//! Agents: who hears what, and what they may publish.

use bulkhead_controller::Config;
use bulkhead_wire::proto::agent_message::Body as Up;
use bulkhead_wire::proto::{AgentStatus, Unsubscribe};
use serde_json::json;
use tonic::Code;

use crate::harness::{Fixture, POLICY, in_memory_and_etcd};

in_memory_and_etcd!(
    everybody_hears_policies_and_only_subscribers_hear_members,
    who_is_not_concerned_hears_nothing_at_all,
    a_second_session_of_a_host_takes_the_place_of_the_first,
);

async fn everybody_hears_policies_and_only_subscribers_hear_members(config: Config) {
    let fixture = Fixture::with(config).await;
    fixture.apply(POLICY).await;
    let mut reader = fixture.agent_at("h1", "", 0).await;
    assert_eq!(reader.welcomed().await.protocol, 1);
    let first = reader.batch().await;
    assert!(first.resources[0].snapshot);
    assert_eq!(first.resources[0].upserts.len(), 1);
    let mut writer = fixture.agent("h2").await;
    let empty = reader.subscribe("role == 'web'", 0).await;
    assert!(empty.members[0].snapshot && empty.joins().is_empty());

    let ack = writer.publish(true, &[("web.h2", "h2", json!({ "role": "web" }), "10.0.0.2")], &[]).await;
    assert_eq!((ack.generation, ack.refused), (7, vec![]));
    let batch = reader.batch().await;
    assert_eq!(batch.joins(), [("Workload/web.h2", "h2")]);
    assert!(!batch.members[0].snapshot);
    assert_eq!(batch.members[0].joins[0].prefixes[0].length, 32);
    // The publisher subscribes too, and is not told of its own.
    let own = writer.subscribe("role == 'web'", 0).await;
    assert!(own.joins().is_empty());
    writer.publish(false, &[("web2.h2", "h2", json!({ "role": "web" }), "10.0.0.3")], &["web.h2"]).await;
    let batch = reader.batch().await;
    assert_eq!((batch.joins(), batch.leaves()), (vec![("Workload/web2.h2", "h2")], vec!["Workload/web.h2"]));
    writer.hears_nothing().await;

    fixture.apply(&POLICY.replace("5432", "5433")).await;
    for agent in [&mut reader, &mut writer] {
        let batch = agent.batch().await;
        assert_eq!((batch.resources[0].snapshot, batch.resources[0].upserts.len()), (false, 1));
        assert!(batch.members.is_empty());
    }
    fixture.delete("policies/db").await;
    assert_eq!(reader.batch().await.resources[0].removes[0].name, "db");
}

#[tokio::test(flavor = "multi_thread")]
async fn facts_are_published_and_selected_on() {
    let fixture = Fixture::new().await;
    let facts = [("host.kernel", "5.10.0-21-amd64"), ("os.version", "not one"), ("rack", "7")];
    let mut writer = fixture.agent_with("h2", "", 0, &facts).await;
    writer.welcomed().await;
    writer.batch().await;
    // What is not of its type is left out; the host is there all the same.
    let host = fixture.get("/apis/bulkhead.dev/v1/hosts/h2").await;
    assert_eq!(host["spec"]["facts"], json!({ "host.kernel": "5.10.0-21-amd64", "rack": "7" }));

    let mut reader = fixture.agent("h1").await;
    let old = reader.subscribe("host.kernel < version(\"5.10.0-28\")", 0).await;
    assert!(old.joins().is_empty(), "every workload does not mean hosts: {old:?}");
    let observed = json!({ "host.kernel": "5.10.0-21-amd64", "vuln.critical": "2" });
    assert_eq!(writer.publish_observed("web.h2", "h2", observed).await.refused, []);
    assert_eq!(reader.batch().await.joins(), [("Workload/web.h2", "h2")]);
    let patched = json!({ "host.kernel": "5.10.0-28-amd64", "vuln.critical": "0" });
    assert_eq!(writer.publish_observed("web.h2", "h2", patched).await.refused, []);
    assert_eq!(reader.batch().await.leaves(), ["Workload/web.h2"]);

    let wrong = writer.publish_observed("web.h2", "h2", json!({ "vuln.critical": "few" })).await;
    assert!(wrong.refused[0].reason.contains("vuln.critical is a number"), "{wrong:?}");
    let (status, answer) =
        fixture.try_apply("apply", &[("p.yaml", &POLICY.replace("role == 'db'", "host.kernal > 5"))]).await;
    assert!(!status.is_success() && answer.to_string().contains("host.kernel"), "{answer}");
}

async fn who_is_not_concerned_hears_nothing_at_all(config: Config) {
    let fixture = Fixture::with(config).await;
    let mut other = fixture.agent("h1").await;
    other.subscribe("role == 'db'", 0).await;
    let mut writer = fixture.agent("h2").await;
    for number in 0..5 {
        let address = format!("10.0.0.{number}");
        writer.publish(false, &[("web.h2", "h2", json!({ "role": "web" }), &address)], &[]).await;
    }
    writer.publish(true, &[], &[]).await;
    other.hears_nothing().await;
    // Its own workloads are no news to it either, nor is a change that leaves its members as they were.
    other.publish(true, &[("db.h1", "h1", json!({ "role": "db" }), "10.0.0.1")], &[]).await;
    other.hears_nothing().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unsubscribed_selector_is_silent_and_out_of_force() {
    let fixture = Fixture::new().await;
    let mut agent = fixture.agent("h1").await;
    agent.subscribe("role == 'web'", 0).await;
    agent.subscribe("role == 'db'", 0).await;
    agent.say(Up::Unsubscribe(Unsubscribe { handle: 1 })).await;
    // Answered in order, so the unsubscription has been taken in.
    agent.publish(true, &[], &[]).await;
    let mut writer = fixture.agent("h2").await;
    writer.publish(false, &[("web.h2", "h2", json!({ "role": "web" }), "10.0.0.2")], &[]).await;
    agent.hears_nothing().await;
    let status = fixture.get("/apis/bulkhead.dev/v1/status").await;
    assert_eq!(status["controller"]["selectors"], json!(1));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_may_publish_only_its_own_workloads() {
    let fixture = Fixture::new().await;
    let mut agent = fixture.agent("h1").await;
    let mut other = fixture.agent("h2").await;
    other.publish(true, &[("a.h2", "h2", json!({}), "10.0.0.9")], &[]).await;
    let upserts = [
        ("ok.h1", "h1", json!({}), "10.0.0.1"),
        ("b.h2", "h2", json!({}), "10.0.0.2"),
        ("nohost", "h1", json!({}), "10.0.0.3"),
        ("bad.h1", "h1", json!({}), "10.0.0.300"),
    ];
    let ack = agent.publish(false, &upserts, &["a.h2"]).await;
    let refused: Vec<_> = ack.refused.iter().map(|one| (one.name.as_str(), one.reason.as_str())).collect();
    assert_eq!(refused.len(), 4, "{refused:?}");
    assert_eq!(refused[0], ("b.h2", "it is on host \"h2\", and this is the agent of \"h1\""));
    assert_eq!(refused[1], ("nohost", "its name must be NAME.h1"));
    assert!(refused[2].0 == "bad.h1" && refused[2].1.contains("spec.addresses"), "{refused:?}");
    assert_eq!(refused[3].0, "a.h2");
    let names = async || {
        let list = fixture.get("/apis/bulkhead.dev/v1/workloads").await;
        let items = list["items"].as_array().unwrap().clone();
        items.iter().map(|item| item["metadata"]["name"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(names().await, ["a.h2", "ok.h1"]);
    agent.publish(true, &[], &[]).await;
    assert_eq!(names().await, ["a.h2"]);
}

async fn a_second_session_of_a_host_takes_the_place_of_the_first(config: Config) {
    let fixture = Fixture::with(config).await;
    let mut first = fixture.agent("h1").await;
    let mut second = fixture.agent("h1").await;
    let status = first.receive().await.unwrap_err();
    assert_eq!(status.code(), Code::Aborted);
    assert!(status.message().contains("another session of host \"h1\""), "{status}");
    fixture.apply(POLICY).await;
    assert_eq!(second.batch().await.resources.len(), 1);
    let status = fixture.get("/apis/bulkhead.dev/v1/status").await;
    assert_eq!(status["agents"][0]["connected"], json!(true));
}

#[tokio::test(flavor = "multi_thread")]
async fn nonsense_ends_the_session_with_a_reason() {
    let fixture = Fixture::new().await;
    let mut agent = fixture.agent("h1").await;
    let subscribe = bulkhead_wire::proto::Subscribe { handle: 1, selector: "role =".into(), revision: 0 };
    agent.say(Up::Subscribe(subscribe)).await;
    assert_eq!(agent.receive().await.unwrap_err().code(), Code::InvalidArgument);
    let mut nameless = fixture.agent_at("No Host", "", 0).await;
    assert_eq!(nameless.receive().await.unwrap_err().code(), Code::InvalidArgument);
}

#[tokio::test(flavor = "multi_thread")]
async fn status_shows_what_agents_say() {
    let fixture = Fixture::new().await;
    let mut agent = fixture.agent("h1").await;
    let told = agent.subscribe("has(x)", 0).await.revision;
    let not_enforced =
        vec![bulkhead_wire::proto::NotEnforced { subject: "Policy/db".into(), reason: "too large".into() }];
    let status = AgentStatus {
        revision: told,
        endpoints: 3,
        not_enforced,
        dataplane: "ebpf".into(),
        entries: 12,
        told: None,
    };
    agent.say(Up::Status(status)).await;
    agent.publish(true, &[], &[]).await;
    let status = fixture.get("/apis/bulkhead.dev/v1/status").await;
    let agent = &status["agents"][0];
    assert_eq!(
        (&agent["host"], &agent["version"], &agent["dataplane"]),
        (&json!("h1"), &json!("0.1.0"), &json!("ebpf"))
    );
    assert_eq!((&agent["enforcedRevision"], &agent["lag"]), (&json!(told), &json!(0)), "{agent}");
    assert_eq!(
        (&agent["endpoints"], &agent["entries"], &agent["subscriptions"]),
        (&json!(3), &json!(12), &json!(1))
    );
    assert_eq!(agent["notEnforced"], json!([{ "subject": "Policy/db", "reason": "too large" }]));
    assert!(agent["bytesSent"].as_u64().unwrap() > 0);
    let revision = status["controller"]["revision"].as_u64().unwrap();
    assert!(revision >= 3, "the controller, the host and its session are there: {status}");
    assert_eq!(
        (&agent["controller"], &status["controllers"][0]["agents"]),
        (&json!("controller"), &json!(1))
    );
    assert_eq!(status["controllers"][0]["answered"], json!(true));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_large_membership_comes_whole() {
    const COUNT: usize = 10_000;
    let fixture = Fixture::new().await;
    let mut writer = fixture.agent("h2").await;
    let names: Vec<_> = (0..COUNT)
        .map(|number| (format!("w{number}.h2"), format!("10.1.{}.{}", number / 250, number % 250)))
        .collect();
    let upserts: Vec<_> = names
        .iter()
        .map(|(name, address)| (name.as_str(), "h2", json!({ "role": "web" }), address.as_str()))
        .collect();
    writer.publish(true, &upserts, &[]).await;
    let mut reader = fixture.agent("h1").await;
    let batch = reader.subscribe("role == 'web'", 0).await;
    assert_eq!(batch.joins().len(), COUNT);
    let snapshots: Vec<_> = batch.members.iter().map(|members| members.snapshot).collect();
    assert_eq!(snapshots, [true, false, false]);
    assert!(reader.receive_now().await.is_none());
}
