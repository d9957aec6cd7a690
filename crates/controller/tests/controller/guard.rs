//! Changes that would lock somebody out, and changes that undo themselves.

use bulkhead_controller::{Config, StoreKind};
use hyper::{Method, StatusCode};
use serde_json::{Value, json};

use crate::harness::{Fixture, PATIENCE, config};

const CONFIRMATIONS: &str = "/apis/bulkhead.dev/v1/confirmations";

/// In these tests everybody is at 127.0.0.1, ports are random, and no fail-safe port helps.
pub(crate) const HERE: &str = "\
apiVersion: bulkhead.dev/v1
kind: HostEndpoint
metadata: {name: here, labels: {role: mgmt}}
spec: {host: h1, addresses: [127.0.0.1]}
";
pub(crate) const THERE: &str = "\
apiVersion: bulkhead.dev/v1
kind: Workload
metadata: {name: there}
spec: {host: h2, addresses: [127.0.0.1]}
";
pub(crate) const SHUT: &str = "\
apiVersion: bulkhead.dev/v1
kind: Policy
metadata: {name: shut}
spec:
  appliesTo: role == 'mgmt'
  ingress:
  - {action: Deny, from: {selector: \"bulkhead.dev/host == 'h2'\"}, ports: [tcp]}
  - {action: Allow}
";

impl Fixture {
    async fn change(&self, verb: &str, query: &str, text: &str) -> (StatusCode, Value) {
        self.try_apply(&format!("{verb}?{query}"), &[("test.yaml", text)]).await
    }

    async fn names(&self) -> Vec<String> {
        let list = self.get("/apis/bulkhead.dev/v1/policies").await;
        let items = list["items"].as_array().unwrap().iter();
        items.map(|item| item["metadata"]["name"].as_str().unwrap().to_owned()).collect()
    }

    /// The only one, once it stands so.
    async fn confirmation(&self, standing: &str) -> Value {
        let deadline = tokio::time::Instant::now() + PATIENCE;
        loop {
            let list = self.get(CONFIRMATIONS).await;
            if list["items"][0]["standing"] == standing {
                return list["items"][0].clone();
            }
            assert!(tokio::time::Instant::now() < deadline, "{list}");
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    }

    async fn post(&self, path: &str) -> (StatusCode, Value) {
        self.call(Method::POST, &format!("{CONFIRMATIONS}/{path}"), String::new()).await
    }
}

/// Two ends own the only address, so that a policy of one about the other judges every connection.
async fn fleet(config: Config) -> Fixture {
    let fixture = Fixture::with(config).await;
    fixture.apply(HERE).await;
    fixture.apply(THERE).await;
    fixture
}

#[tokio::test(flavor = "multi_thread")]
async fn what_would_cut_somebody_off_is_refused_by_name_and_forced_with_a_warning() {
    let fixture = fleet(config()).await;
    let _agent = fixture.agent("h7").await;
    let (status, refused) = fixture.change("apply", "", SHUT).await;
    assert_eq!((status, &refused["reason"]), (StatusCode::CONFLICT, &json!("LockOut")), "{refused}");
    let message = refused["message"].as_str().unwrap();
    for part in ["your own session", "the agent of h7", "shut", "ingress of HostEndpoint/here", "--force"] {
        assert!(message.contains(part), "{part}: {message}");
    }
    let cuts = refused["details"]["cuts"].as_array().unwrap();
    assert_eq!(cuts.iter().map(|cut| &cut["who"]).collect::<Vec<_>>(), ["operator", "agent"]);
    assert_eq!((&cuts[1]["host"], &cuts[1]["direction"]), (&json!("h7"), &json!("ingress")));
    assert!(cuts[1]["to"].as_str().unwrap() == fixture.controller.agents.to_string(), "{refused}");
    assert_eq!(fixture.names().await, [""; 0], "nothing changes");

    // A dry run says it and is no refusal; neither changes anything.
    let (status, dry) = fixture.change("apply", "dryRun=true", SHUT).await;
    assert_eq!((status, &dry["cutOff"]), (StatusCode::OK, &json!(2)), "{dry}");
    assert_eq!(fixture.names().await, [""; 0]);

    // One object by itself is guarded likewise.
    let path = "/apis/bulkhead.dev/v1/policies";
    let (status, refused) = fixture.call(Method::POST, path, SHUT.into()).await;
    assert_eq!((status, &refused["reason"]), (StatusCode::CONFLICT, &json!("LockOut")), "{refused}");

    let (status, forced) = fixture.change("apply", "force=true", SHUT).await;
    assert_eq!((status, &forced["cutOff"]), (StatusCode::OK, &json!(2)), "{forced}");
    assert!(forced["warnings"][0].as_str().unwrap().contains("your own session"), "{forced}");
    assert_eq!(fixture.names().await, ["shut"]);

    // Who is cut already cannot be cut again, and what frees him is no question.
    fixture.apply(&SHUT.replace("metadata: {name: shut}", "metadata: {name: shut, labels: {x: y}}")).await;
    assert_eq!(fixture.delete("policies/shut").await, StatusCode::OK);
}

#[tokio::test(flavor = "multi_thread")]
async fn labels_settings_and_deletions_are_judged_as_policies_are() {
    let fixture = fleet(config()).await;
    let unconcerned = SHUT.replace("'mgmt'", "'other'");
    fixture.apply(&unconcerned).await;
    // The endpoint gets the label that the policy waits for.
    let (_, refused) = fixture.change("apply", "", &HERE.replace("mgmt", "other")).await;
    assert_eq!(refused["reason"], "LockOut", "{refused}");
    // Nothing allows but the posture, which goes.
    let settings = "apiVersion: bulkhead.dev/v1\nkind: Settings\nmetadata: {name: default}\n\
                    spec: {defaultPosture: Deny}\n";
    let (_, refused) = fixture.change("apply", "", settings).await;
    assert_eq!(refused["reason"], "LockOut", "{refused}");
    // An exception stands before a prohibition; the exception goes.
    let open = "apiVersion: bulkhead.dev/v1\nkind: Policy\nmetadata: {name: open}\n\
                spec: {tier: admin, appliesTo: all(), ingress: [{action: Allow}], egress: [{action: Allow}]}\n";
    fixture.apply(open).await;
    fixture.apply(SHUT).await;
    let (_, refused) = fixture.change("delete", "", open).await;
    assert_eq!(refused["reason"], "LockOut", "{refused}");
    let path = "/apis/bulkhead.dev/v1/policies/open";
    let (status, refused) = fixture.call(Method::DELETE, path, String::new()).await;
    assert_eq!((status, &refused["reason"]), (StatusCode::CONFLICT, &json!("LockOut")), "{refused}");
    let (status, _) = fixture.call(Method::DELETE, &format!("{path}?force=true"), String::new()).await;
    assert_eq!(status, StatusCode::OK);
}

#[tokio::test(flavor = "multi_thread")]
async fn unconfirmed_changes_undo_themselves_and_confirmed_ones_stay() {
    let fixture = Fixture::new().await;
    let two = format!("{SHUT}---\n{}", SHUT.replace("name: shut", "name: second"));
    fixture.apply(SHUT).await;
    let before = fixture.get("/apis/bulkhead.dev/v1/policies/shut").await;
    let changed = two.replace("'mgmt'", "'other'");
    let (status, answer) = fixture.change("apply", "confirmWithin=1s", &changed).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    assert_eq!(answer["confirmation"]["objects"], json!(["Policy/shut", "Policy/second"]));
    assert_eq!(fixture.names().await, ["second", "shut"]);
    let rolled_back = fixture.confirmation("rolledBack").await;
    assert_eq!(rolled_back["leftAlone"], json!([]));
    assert_eq!(fixture.names().await, ["shut"], "what was made is gone");
    let after = fixture.get("/apis/bulkhead.dev/v1/policies/shut").await;
    assert_eq!((&after["spec"], &after["metadata"]["uid"]), (&before["spec"], &before["metadata"]["uid"]));
    let id = rolled_back["id"].as_str().unwrap();
    let (status, late) = fixture.post(&format!("{id}/confirm")).await;
    assert_eq!((status, &late["reason"]), (StatusCode::CONFLICT, &json!("RolledBack")), "{late}");

    let (_, answer) = fixture.change("delete", "confirmWithin=1h", SHUT).await;
    let id = answer["confirmation"]["id"].as_str().unwrap().to_owned();
    assert_eq!(fixture.names().await, [""; 0]);
    // The same object cannot wait twice.
    let (status, second) = fixture.change("apply", "confirmWithin=1h", SHUT).await;
    assert_eq!((status, &second["reason"]), (StatusCode::CONFLICT, &json!("ConfirmationPending")));
    assert!(second["message"].as_str().unwrap().contains(&id), "{second}");
    let (status, _) = fixture.post(&format!("{id}/rollback")).await;
    assert_eq!(status, StatusCode::OK);
    assert_eq!(fixture.names().await, ["shut"]);

    let (_, answer) = fixture.change("delete", "confirmWithin=1s", SHUT).await;
    let id = answer["confirmation"]["id"].as_str().unwrap().to_owned();
    assert_eq!(fixture.post(&format!("{id}/confirm")).await.0, StatusCode::OK);
    assert_eq!(fixture.post(&format!("{id}/confirm")).await.0, StatusCode::NOT_FOUND);
    tokio::time::sleep(std::time::Duration::from_millis(1300)).await;
    assert_eq!(fixture.names().await, [""; 0], "kept beyond its deadline");
    for wrong in ["confirmWithin=2", "confirmWithin=2d", "confirmWithin=10ms", "confirmwithin=2m"] {
        assert_eq!(fixture.change("apply", wrong, SHUT).await.0, StatusCode::BAD_REQUEST, "{wrong}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_somebody_else_has_touched_since_is_left_alone_and_reported() {
    let fixture = Fixture::new().await;
    let tier = "apiVersion: bulkhead.dev/v1\nkind: Tier\nmetadata: {name: mine}\nspec: {order: 5}\n";
    let named = |name: &str| SHUT.replace("name: shut", &format!("name: {name}"));
    fixture.apply(&named("changed")).await;
    fixture.apply(&named("gone")).await;
    fixture.apply(&named("plain")).await;
    let all = ["changed", "gone", "plain"].map(|name| named(name).replace("'mgmt'", "'a'")).join("---\n");
    let text = format!("{tier}---\n{all}");
    let (_, answer) = fixture.change("apply", "confirmWithin=1h", &text).await;
    let id = answer["confirmation"]["id"].as_str().unwrap();
    fixture.apply(&named("changed").replace("'mgmt'", "'b'")).await;
    fixture.apply(&named("user").replace("spec:", "spec:\n  tier: mine")).await;
    assert_eq!(fixture.delete("policies/gone").await, StatusCode::OK);
    let (status, answer) = fixture.post(&format!("{id}/rollback")).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    let left = answer["leftAlone"].as_array().unwrap();
    let reason = |object: &str| {
        let one =
            left.iter().find(|one| one["object"] == object).unwrap_or_else(|| panic!("{object}: {answer}"));
        one["reason"].as_str().unwrap().to_owned()
    };
    assert_eq!(left.len(), 3, "{answer}");
    assert!(reason("Policy/changed").contains("somebody has changed it since"));
    assert!(reason("Policy/gone").contains("somebody has deleted it since"));
    assert!(reason("Tier/mine").contains("Policy/user"));
    let spec = |name: &str| {
        let path = format!("/apis/bulkhead.dev/v1/policies/{name}");
        let fixture = &fixture;
        async move { fixture.get(&path).await["spec"]["appliesTo"].as_str().unwrap().to_owned() }
    };
    assert!(spec("changed").await.contains('b'));
    assert!(spec("plain").await.contains("mgmt"));
    assert_eq!(fixture.names().await, ["changed", "plain", "user"]);
    let metrics = fixture.call(Method::GET, "/metrics", String::new()).await.1;
    assert!(metrics.as_str().unwrap().contains("bulkhead_roll_back_objects_left_total 3"), "{metrics}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deadline_holds_over_a_restart_of_the_controller() {
    let directory = tempfile::tempdir().unwrap();
    let config =
        Config { store: StoreKind::Embedded, data_directory: directory.path().to_owned(), ..config() };
    let fixture = fleet(config.clone()).await;
    let (status, answer) = fixture.change("apply", "force=true&confirmWithin=2s", SHUT).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    let other = SHUT.replace("name: shut", "name: later").replace("'mgmt'", "'x'");
    let (_, later) = fixture.change("apply", "confirmWithin=1h", &other).await;
    fixture.controller.shutdown().await.unwrap();

    let fixture = Fixture::with(config.clone()).await;
    let standing = fixture.get(CONFIRMATIONS).await;
    assert_eq!(standing["items"].as_array().unwrap().len(), 2, "{standing}");
    fixture.confirmation("rolledBack").await;
    assert_eq!(fixture.names().await, ["later"]);
    fixture.controller.shutdown().await.unwrap();

    // And one that passes while nothing runs is met at the start.
    let fixture = Fixture::with(config.clone()).await;
    let (_, answer) = fixture.change("apply", "force=true&confirmWithin=1s", SHUT).await;
    assert!(answer["confirmation"]["id"].is_string(), "{answer}");
    fixture.controller.shutdown().await.unwrap();
    tokio::time::sleep(std::time::Duration::from_millis(1100)).await;
    let fixture = Fixture::with(config).await;
    let deadline = tokio::time::Instant::now() + PATIENCE;
    while fixture.names().await != ["later"] {
        assert!(tokio::time::Instant::now() < deadline, "not rolled back");
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    let id = later["confirmation"]["id"].as_str().unwrap();
    assert_eq!(fixture.post(&format!("{id}/confirm")).await.0, StatusCode::OK);
}
