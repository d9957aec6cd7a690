//! REST.

use bulkhead_controller::Config;
use hyper::{Method, StatusCode};
use serde_json::{Value, json};

use crate::harness::{Fixture, Lines, POLICY, in_memory_and_etcd};

in_memory_and_etcd!(
    objects_are_created_read_replaced_and_deleted,
    apply_says_what_it_did_in_one_revision,
    a_watch_resumes_where_it_was_told_to,
);

const POLICIES: &str = "/apis/bulkhead.dev/v1/policies";
const TIER: &str = "apiVersion: bulkhead.dev/v1\nkind: Tier\nmetadata: {name: mine}\nspec: {order: 5}\n";

/// The revision that an object, or an answer, names.
fn version(object: &Value) -> u64 {
    object["metadata"]["resourceVersion"].as_str().unwrap().parse().unwrap()
}

async fn objects_are_created_read_replaced_and_deleted(config: Config) {
    let fixture = Fixture::with(config).await;
    let (status, created) = fixture.call(Method::POST, POLICIES, POLICY.into()).await;
    assert_eq!(status, StatusCode::CREATED, "{created}");
    let metadata = &created["metadata"];
    assert_eq!(metadata["generation"], json!(1));
    assert!(metadata["uid"].is_string() && metadata["creationTimestamp"].is_string());

    let (status, again) = fixture.call(Method::POST, POLICIES, POLICY.into()).await;
    assert_eq!((status, &again["reason"]), (StatusCode::CONFLICT, &json!("AlreadyExists")));

    let path = format!("{POLICIES}/db");
    let mut changed = fixture.get(&path).await;
    changed["spec"]["order"] = json!(7);
    let (status, replaced) = fixture.call(Method::PUT, &path, changed.to_string()).await;
    assert_eq!(status, StatusCode::OK, "{replaced}");
    assert_eq!(replaced["metadata"]["generation"], json!(2));
    assert_eq!(replaced["metadata"]["uid"], created["metadata"]["uid"]);
    let (first, second) = (version(&created), version(&replaced));
    assert!(second > first);

    changed["spec"]["order"] = json!(8);
    let (status, conflict) = fixture.call(Method::PUT, &path, changed.to_string()).await;
    assert_eq!((status, &conflict["reason"]), (StatusCode::CONFLICT, &json!("Conflict")));
    let message = format!("at resourceVersion {second}, not {first}");
    assert!(conflict["message"].as_str().unwrap().contains(&message), "{conflict}");

    assert_eq!(fixture.delete("policies/db").await, StatusCode::OK);
    assert_eq!(fixture.delete("policies/db").await, StatusCode::NOT_FOUND);
    let (status, absent) = fixture.call(Method::PUT, &path, POLICY.into()).await;
    assert_eq!(status, StatusCode::NOT_FOUND, "{absent}");
    fixture.controller.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn lists_have_versions_selectors_limits_and_namespaces() {
    let fixture = Fixture::new().await;
    for (name, extra) in [("a", "labels: {x: '1'}"), ("b", "labels: {x: '2'}"), ("c", "namespace: shop")] {
        fixture.apply(&POLICY.replace("name: db", &format!("name: {name}, {extra}"))).await;
    }
    let names = |list: Value| -> Vec<String> {
        let items = list["items"].as_array().unwrap().clone();
        items.iter().map(|item| item["metadata"]["name"].as_str().unwrap().to_owned()).collect()
    };
    let list = fixture.get(POLICIES).await;
    assert_eq!((&list["kind"], &list["metadata"]["resourceVersion"]), (&json!("PolicyList"), &json!("4")));
    assert_eq!(names(list), ["a", "b", "c"]);
    assert_eq!(names(fixture.get(&format!("{POLICIES}?labelSelector=x%20%3D%3D%20'2'")).await), ["b"]);
    let limited = fixture.get(&format!("{POLICIES}?limit=1")).await;
    assert_eq!(limited["metadata"]["remainingItemCount"], json!(2));
    assert_eq!(names(fixture.get("/apis/bulkhead.dev/v1/namespaces/shop/policies").await), ["c"]);
    fixture.get("/apis/bulkhead.dev/v1/namespaces/shop/policies/c").await;
    assert_eq!(names(fixture.get("/apis/bulkhead.dev/v1/tiers").await).len(), 7);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_is_refused_with_reasons() {
    let fixture = Fixture::new().await;
    for (path, code, part) in [
        ("/apis/bulkhead.dev/v1/polices", 404, "did you mean policies?"),
        ("/apis/bulkhead.dev/v1/policies?lableSelector=x", 400, "did you mean labelSelector?"),
        ("/apis/bulkhead.dev/v1/policies?labelSelector=x+%3D%3D+%27", 400, "labelSelector"),
        ("/apis/bulkhead.dev/v1/policies/none", 404, "there is no Policy/none"),
        ("/apis/bulkhead.dev/v1/flows?verdict=maybe", 400, "expected allow or deny"),
        ("/nowhere", 404, "there is nothing at /nowhere"),
    ] {
        let (status, answer) = fixture.call(Method::GET, path, String::new()).await;
        assert_eq!((status.as_u16(), &answer["kind"]), (code, &json!("Status")), "{path}: {answer}");
        assert!(answer["message"].as_str().unwrap().contains(part), "{path}: {answer}");
    }
    let (status, answer) = fixture.call(Method::PATCH, POLICIES, String::new()).await;
    assert_eq!((status.as_u16(), &answer["reason"]), (405, &json!("MethodNotAllowed")));
    let (status, answer) = fixture.call(Method::POST, POLICIES, TIER.into()).await;
    assert_eq!((status.as_u16(), &answer["details"]["causes"][0]["field"]), (422, &json!("kind")));
    let (status, _) = fixture.call(Method::POST, POLICIES, " ".repeat((16 << 20) + 1)).await;
    assert_eq!(status, StatusCode::PAYLOAD_TOO_LARGE);
}

#[tokio::test(flavor = "multi_thread")]
async fn apply_is_all_or_nothing_and_names_every_place() {
    let fixture = Fixture::new().await;
    let wrong_tier = POLICY.replace("appliesTo", "tier: aplication\n  appliesTo");
    let sources = [("good.yaml", POLICY), ("bad.yaml", &*wrong_tier.replace("name: db", "name: other"))];
    let (status, answer) = fixture.try_apply("apply", &sources).await;
    assert_eq!((status.as_u16(), &answer["reason"]), (422, &json!("Invalid")));
    let cause = &answer["details"]["causes"][0];
    assert_eq!(cause["source"], json!("bad.yaml"));
    assert_eq!((&cause["line"], &cause["column"]), (&json!(5), &json!(9)), "{cause}");
    assert_eq!((&cause["field"], &cause["suggestion"]), (&json!("spec.tier"), &json!("application")));
    assert_eq!(fixture.get(POLICIES).await["items"], json!([]));

    let (status, answer) = fixture.try_apply("apply", &[("a.yaml", POLICY), ("b.yaml", POLICY)]).await;
    assert_eq!(status.as_u16(), 422);
    let cause = &answer["details"]["causes"][0];
    assert_eq!((&cause["source"], &cause["line"]), (&json!("b.yaml"), &json!(3)));
    assert!(cause["message"].as_str().unwrap().contains("first at a.yaml:3:"), "{cause}");
}

async fn apply_says_what_it_did_in_one_revision(config: Config) {
    let fixture = Fixture::with(config).await;
    let both = format!("{TIER}---\n{}", POLICY.replace("appliesTo", "tier: mine\n  appliesTo"));
    let outcomes = |answer: &Value| -> Vec<String> {
        let items = answer["items"].as_array().unwrap();
        items.iter().map(|item| item["outcome"].as_str().unwrap().to_owned()).collect()
    };
    let (_, dry) = fixture
        .call(
            Method::POST,
            "/apis/bulkhead.dev/v1/apply?dryRun=true",
            json!({ "sources": [{ "name": "f", "text": both }] }).to_string(),
        )
        .await;
    assert_eq!(outcomes(&dry), ["created", "created"]);
    let before = version(&dry);
    let first = fixture.apply(&both).await;
    assert_eq!(outcomes(&first), ["created", "created"]);
    assert!(version(&first) > before);
    for item in first["items"].as_array().unwrap() {
        assert_eq!(version(&item["after"]), version(&first));
    }
    assert_eq!(outcomes(&fixture.apply(&both).await), ["unchanged", "unchanged"]);
    let second = fixture.apply(&both.replace("order: 5", "order: 6")).await;
    assert_eq!(outcomes(&second), ["configured", "unchanged"]);
    assert_eq!(second["items"][0]["before"]["spec"]["order"], json!(5));
    assert_eq!(second["items"][0]["after"]["spec"]["order"], json!(6));

    assert_eq!(fixture.delete("tiers/mine").await, StatusCode::FORBIDDEN, "it is in use");
    assert_eq!(fixture.delete("tiers/admin").await, StatusCode::FORBIDDEN, "it is predefined");
    let (status, gone) = fixture.try_apply("delete", &[("f", &both)]).await;
    assert_eq!((status.as_u16(), outcomes(&gone)), (200, vec!["deleted".into(), "deleted".into()]));
    let (_, gone) = fixture.try_apply("delete", &[("f", &both)]).await;
    assert_eq!(outcomes(&gone), ["notFound", "notFound"]);
}

async fn a_watch_resumes_where_it_was_told_to(config: Config) {
    let fixture = Fixture::with(config).await;
    let first = version(&fixture.apply(POLICY).await);
    let second = version(&fixture.apply(&POLICY.replace("5432", "5433")).await);
    let path = format!("{POLICIES}?watch=true&resourceVersion={first}");
    let mut lines = Lines::of(fixture.send(Method::GET, &path, String::new()).await);
    let event = lines.next().await;
    assert_eq!((&event["type"], version(&event["object"])), (&json!("MODIFIED"), second));
    fixture.apply(TIER).await;
    fixture.apply(&POLICY.replace("name: db", "name: other")).await;
    let event = lines.next().await;
    assert_eq!((&event["type"], &event["object"]["metadata"]["name"]), (&json!("ADDED"), &json!("other")));
    fixture.delete("policies/db").await;
    let event = lines.next().await;
    assert_eq!((&event["type"], &event["object"]["metadata"]["name"]), (&json!("DELETED"), &json!("db")));
    let path = format!("{POLICIES}?watch=true&resourceVersion={}", second + 99);
    let (status, gone) = fixture.call(Method::GET, &path, String::new()).await;
    assert_eq!((status.as_u16(), &gone["reason"]), (410, &json!("Expired")));
    // A client that watches does not hold up the end.
    let started = std::time::Instant::now();
    fixture.controller.shutdown().await.unwrap();
    assert!(started.elapsed() < std::time::Duration::from_secs(3), "{:?}", started.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn explain_judges_both_ends_by_short_name_or_address() {
    let fixture = Fixture::new().await;
    fixture.apply(POLICY).await;
    for (name, host, role, address) in [
        ("db.h1", "h1", "db", "10.0.0.1"),
        ("web.h2", "h2", "web", "10.0.0.2"),
        ("web.h3", "h3", "x", "10.0.0.3"),
    ] {
        fixture
            .apply(&format!(
                "apiVersion: bulkhead.dev/v1\nkind: Workload\nmetadata: {{name: {name}, labels: {{role: {role}}}}}\n\
                 spec: {{host: {host}, addresses: [{address}]}}\n"
            ))
            .await;
    }
    let verdict = async |query: &str| {
        let answer = fixture.get(&format!("/apis/bulkhead.dev/v1/explain?{query}")).await;
        answer["explanation"]["verdict"].as_str().unwrap().to_owned()
    };
    assert_eq!(verdict("from=web.h2&to=db&port=tcp/5432").await, "allow");
    assert_eq!(verdict("from=10.0.0.2&to=10.0.0.1&port=tcp/5432").await, "allow");
    assert_eq!(verdict("from=web.h2&to=db&port=tcp/80").await, "deny");
    assert_eq!(verdict("from=192.0.2.1&to=db&port=tcp/5432").await, "deny");
    fixture
        .apply(
            "apiVersion: bulkhead.dev/v1\nkind: Policy\nmetadata: {name: no-low-ports}\n\
             spec: {tier: admin, appliesTo: role == 'db', ingress: [{action: Deny, sourcePorts: 0-1023}, {action: Pass}]}\n",
        )
        .await;
    assert_eq!(verdict("from=web.h2&to=db&port=tcp/5432").await, "allow", "an ephemeral port is meant");
    assert_eq!(verdict("from=web.h2&to=db&port=tcp/5432&sourcePort=1024").await, "allow");
    assert_eq!(verdict("from=web.h2&to=db&port=tcp/5432&sourcePort=1023").await, "deny");
    for (query, part) in [
        ("from=web&to=db&port=tcp/80", "web.h2, web.h3"),
        ("from=wbe.h2&to=db&port=tcp/80", "did you mean web.h2?"),
        ("from=db&to=db&port=tcp", "single port"),
        ("from=db&to=db", "port is missing"),
        ("from=db&to=db&port=tcp/80&sourcePort=70000", "0 to 65535"),
        ("from=db&to=db&port=icmp/8&sourcePort=53", "icmp has no ports"),
    ] {
        let path = format!("/apis/bulkhead.dev/v1/explain?{query}");
        let (status, answer) = fixture.call(Method::GET, &path, String::new()).await;
        assert!(status.is_client_error() && answer["message"].as_str().unwrap().contains(part), "{answer}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn probes_metrics_and_document_are_there() {
    let fixture = Fixture::new().await;
    assert_eq!(fixture.get("/healthz").await, json!("ok\n"));
    assert_eq!(fixture.get("/readyz").await, json!("ok\n"));
    fixture.apply(POLICY).await;
    let metrics = fixture.get("/metrics").await;
    let metrics = metrics.as_str().unwrap();
    assert!(metrics.contains("\nbulkhead_revision 2\n"), "{metrics}");
    assert!(metrics.contains("bulkhead_flows_lost_total{cause=\"agent\"} 0"), "{metrics}");
    assert_eq!(fixture.get("/openapi.json").await["openapi"], json!("3.1.0"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_predefined_tier_can_be_changed_but_not_deleted() {
    let fixture = Fixture::new().await;
    let baseline = fixture.get("/apis/bulkhead.dev/v1/tiers/baseline").await;
    assert_eq!(baseline["metadata"], json!({ "name": "baseline" }), "nobody has written it");
    let changed =
        TIER.replace("mine", "baseline").replace("order: 5", "order: 10000000, defaultAction: Pass");
    let answer = fixture.apply(&changed).await;
    assert_eq!(answer["items"][0]["outcome"], json!("configured"));
    let baseline = fixture.get("/apis/bulkhead.dev/v1/tiers/baseline").await;
    assert_eq!(baseline["spec"]["defaultAction"], json!("Pass"));
    assert_eq!(fixture.delete("tiers/baseline").await, StatusCode::FORBIDDEN);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_gives_its_place_back() {
    let fixture = Fixture::new().await;
    fixture.apply(POLICY).await;
    let path = format!("{POLICIES}?watch=true&resourceVersion=0");
    let mut lines = Lines::of(fixture.send(Method::GET, &path, String::new()).await);
    assert_eq!(lines.next().await["type"], json!("ADDED"));
    let streams = async |count: usize| {
        let metrics = fixture.get("/metrics").await;
        metrics.as_str().unwrap().contains(&format!("\nbulkhead_api_streams {count}\n"))
    };
    assert!(streams(1).await);
    drop(lines);
    let deadline = std::time::Instant::now() + crate::harness::PATIENCE;
    while !streams(0).await {
        assert!(std::time::Instant::now() < deadline, "the place must be given back");
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
}
