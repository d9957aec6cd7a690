//! What operators may do, what they have done, and going back.

use std::sync::Arc;

use bulkhead_controller::{Config, StoreKind, verify_audit};
use bulkhead_identity::tls::ClientConfig;
use http_body_util::BodyExt;
use hyper::{Method, StatusCode};
use serde_json::{Value, json};

use crate::harness::{Fixture, config};

const V1: &str = "/apis/bulkhead.dev/v1";

fn policy(name: &str, tier: &str, namespace: &str) -> String {
    let namespace = if namespace.is_empty() { String::new() } else { format!(", namespace: {namespace}") };
    format!(
        "apiVersion: bulkhead.dev/v1\nkind: Policy\nmetadata: {{name: {name}{namespace}}}\n\
         spec: {{tier: {tier}, appliesTo: has(x), ingress: []}}\n---\n"
    )
}

fn binding(name: &str, spec: &str) -> String {
    format!("apiVersion: bulkhead.dev/v1\nkind: RoleBinding\nmetadata: {{name: {name}}}\nspec: {spec}\n---\n")
}

const BINDINGS: [(&str, &str); 6] = [
    ("view", "{role: Viewer, groups: [viewers]}"),
    ("view-shop", "{role: Viewer, users: [clerk], namespaces: [shop, till]}"),
    ("edit-app", "{role: Editor, groups: [app-editors], tiers: [application]}"),
    ("edit-shop", "{role: Editor, users: [shopkeeper], namespaces: [shop]}"),
    ("operate", "{role: Operator, groups: [operators]}"),
    ("rule", "{role: Admin, users: [boss]}"),
];

impl Fixture {
    async fn ask(
        &self,
        who: &Arc<ClientConfig>,
        method: Method,
        path: &str,
        body: String,
    ) -> (StatusCode, Value) {
        let response = self.send_as(who, method, &format!("{V1}/{path}"), body).await;
        let status = response.status();
        let bytes = response.into_body().collect().await.unwrap().to_bytes();
        (status, serde_json::from_slice(&bytes).unwrap_or_default())
    }

    async fn apply_as(&self, who: &Arc<ClientConfig>, text: &str) -> StatusCode {
        let body = json!({ "sources": [{ "name": "x", "text": text }] }).to_string();
        self.ask(who, Method::POST, "apply", body).await.0
    }

    async fn with_roles() -> Self {
        let fixture = Self::new().await;
        let all: String = BINDINGS.iter().map(|(name, spec)| binding(name, spec)).collect();
        fixture.apply(&all).await;
        fixture
    }
}

/// Every path and method of the document, as everybody: who may not is told 403, and nobody else is.
#[tokio::test]
async fn every_endpoint_knows_every_role() {
    let fixture = Fixture::with_roles().await;
    let callers = [
        ("none", fixture.operator("none", &["others"]), 0),
        ("viewer of namespaces", fixture.operator("clerk", &[]), 0),
        ("viewer", fixture.operator("eve", &["viewers"]), 1),
        ("editor", fixture.operator("ed", &["app-editors"]), 2),
        ("operator", fixture.operator("ola", &["operators", "viewers"]), 3),
        ("admin", fixture.operator("boss", &[]), 4),
        ("built-in admin", fixture.operator("root", &["bulkhead:admins"]), 4),
    ];
    let document = fixture.get("/openapi.json").await;
    let mut tried = 0;
    for (path, item) in document["paths"].as_object().unwrap() {
        for method in item.as_object().unwrap().keys().filter(|key| *key != "parameters") {
            let public = item["get"]["security"] == json!([]);
            let of_admins = ["/tokens", "/relays", "/certificates", "/revocations", "/backup"]
                .iter()
                .any(|part| path.contains(part));
            let least = match method.as_str() {
                _ if public || item[method]["x-bulkhead-whom"] == "known" => 0,
                _ if of_admins => 4,
                "get" => 1,
                _ => 2,
            };
            // A watch or a stream is not waited for: its head says it all.
            let plural = if path.starts_with("/api/") { "pods" } else { "policies" };
            let path = path.replace("{plural}", plural).replace("{group}/{version}", "networking.k8s.io/v1");
            let path = path.replace("{group}", "networking.k8s.io").replace("{namespace}", "shop");
            let path = path.replace(['{', '}'], "");
            let method: Method = method.to_uppercase().parse().unwrap();
            for (name, caller, has) in &callers {
                let status = fixture.send_as(caller, method.clone(), &path, String::new()).await.status();
                let refused = status == StatusCode::FORBIDDEN || status == StatusCode::UNAUTHORIZED;
                let of_his = *name == "viewer of namespaces" && path.contains("/namespaces/shop/");
                let has = if of_his { 1 } else { *has };
                assert_eq!(refused, has < least, "{method} {path} as {name}: {status}");
                tried += 1;
            }
        }
    }
    assert!(tried > 150, "{tried}");
}

#[tokio::test]
async fn editors_keep_to_their_tiers_and_namespaces() {
    let fixture = Fixture::with_roles().await;
    fixture
        .apply(
            &(policy("a", "admin", "")
                + &policy("mine", "application", "")
                + &policy("b", "application", "shop")),
        )
        .await;
    let app = fixture.operator("ed", &["app-editors"]);
    let shop = fixture.operator("shopkeeper", &[]);
    let operator = fixture.operator("ola", &["operators"]);
    let set = |namespace: &str| {
        format!(
            "apiVersion: bulkhead.dev/v1\nkind: NetworkSet\nmetadata: {{name: n{namespace}}}\nspec: {{cidrs: [10.0.0.0/8]}}\n"
        )
    };
    let tier = "apiVersion: bulkhead.dev/v1\nkind: Tier\nmetadata: {name: t}\nspec: {order: 5}\n";
    let settings = "apiVersion: bulkhead.dev/v1\nkind: Settings\nmetadata: {name: default}\nspec: {defaultPosture: Deny}\n";
    let roles = binding("more", "{role: Admin, users: [ed, ola, shopkeeper]}");
    let (ok, no) = (StatusCode::OK, StatusCode::FORBIDDEN);
    for (what, text, by_app, by_shop, by_operator) in [
        ("a policy of his tier", policy("mine", "application", ""), ok, no, ok),
        ("one of another tier", policy("new", "admin", ""), no, no, ok),
        ("one into his tier from another", policy("a", "application", ""), no, no, ok),
        ("one of his namespace", policy("c", "application", "shop"), ok, ok, ok),
        ("one of his namespace, any tier", policy("d", "admin", "shop"), no, ok, ok),
        ("one of another namespace", policy("e", "admin", "blog"), no, no, ok),
        (
            "one of his and one of another's",
            policy("f", "application", "") + &policy("g", "admin", ""),
            no,
            no,
            ok,
        ),
        ("a set of nobody's", set(""), no, no, ok),
        ("a set of his namespace", set("x, namespace: shop"), no, ok, ok),
        ("a tier", tier.to_owned(), no, no, ok),
        ("settings", settings.to_owned(), no, no, no),
        ("roles", roles, no, no, no),
    ] {
        // Each says something else, so that it is a change. The operator comes last, since what he may he does.
        for (who, caller, expected, own) in [
            ("the tier's editor", &app, by_app, "1"),
            ("the namespace's editor", &shop, by_shop, "2"),
            ("the operator", &operator, by_operator, "3"),
        ] {
            let text = text.replace("has(x)", &format!("has(x{own})")).replace("[10.", &format!("[1{own}."));
            assert_eq!(fixture.apply_as(caller, &text).await, expected, "{what}, by {who}");
        }
    }
    let (status, answer) = fixture.ask(&app, Method::DELETE, "policies/new", String::new()).await;
    assert_eq!(status, no, "{answer}");
    assert!(
        answer["message"].as_str().unwrap().contains("Policy/new may not be changed as Editor"),
        "{answer}"
    );
    assert_eq!(fixture.ask(&app, Method::DELETE, "policies/mine", String::new()).await.0, ok);
    assert_eq!(fixture.ask(&shop, Method::DELETE, "namespaces/shop/policies/c", String::new()).await.0, ok);
    // What a binding gave, its end takes.
    assert_eq!(fixture.delete("rolebindings/edit-app").await, ok);
    assert_eq!(fixture.ask(&app, Method::GET, "policies", String::new()).await.0, no);
}

#[tokio::test]
async fn viewers_of_namespaces_see_what_is_in_these_and_nothing_else() {
    let fixture = Fixture::with_roles().await;
    let (mine, other) = (policy("mine", "application", "shop"), policy("other", "application", "blog"));
    fixture.apply(&(mine.clone() + &other + &policy("all", "application", ""))).await;
    let clerk = fixture.operator("clerk", &[]);
    let (ok, no) = (StatusCode::OK, StatusCode::FORBIDDEN);
    for (path, expected) in [
        ("namespaces/shop/policies", ok),
        ("namespaces/shop/policies/mine", ok),
        ("namespaces/till/policies", ok),
        ("namespaces/blog/policies", no),
        ("namespaces/blog/policies/other", no),
        // Another way to write it is refused as well.
        ("namespaces/blo%67/policies", no),
        ("namespaces/shop%2f..%2fblog/policies", no),
        ("policies", no),
        ("policies/all", no),
        ("tiers", no),
        ("workloads", no),
        ("namespaces", no),
        ("flows", no),
        ("history", no),
        ("status", no),
    ] {
        let (status, answer) = fixture.ask(&clerk, Method::GET, path, String::new()).await;
        assert_eq!(status, expected, "{path}: {answer}");
        if status == no {
            let message = answer["message"].as_str().unwrap();
            assert!(message.contains("has the role Viewer in namespaces shop, till"), "{message}");
        }
    }
    let (_, list) = fixture.ask(&clerk, Method::GET, "namespaces/shop/policies", String::new()).await;
    let names: Vec<_> =
        list["items"].as_array().unwrap().iter().map(|item| &item["metadata"]["name"]).collect();
    assert_eq!(names, ["mine"]);
    assert_eq!(fixture.apply_as(&clerk, &mine.replace("has(x)", "has(y)")).await, no);
    // What kubectl asks before it tries.
    let may = async |verb: &str, namespace: &str| {
        let attributes =
            json!({ "verb": verb, "group": "bulkhead.dev", "resource": "policies", "namespace": namespace });
        let review = json!({ "kind": "SelfSubjectAccessReview", "apiVersion": "authorization.k8s.io/v1",
            "spec": { "resourceAttributes": attributes } });
        let path = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews";
        let response = fixture.send_as(&clerk, Method::POST, path, review.to_string()).await;
        let bytes = response.into_body().collect().await.unwrap().to_bytes();
        let answer: Value = serde_json::from_slice(&bytes).unwrap();
        answer["status"]["allowed"].as_bool().unwrap()
    };
    assert!(may("list", "shop").await && !may("list", "blog").await && !may("list", "").await);
    assert!(!may("update", "shop").await);
}

#[tokio::test]
async fn a_change_that_waits_is_settled_by_its_author_or_an_operator() {
    let fixture = Fixture::with_roles().await;
    let ed = fixture.operator("ed", &["app-editors"]);
    let other = fixture.operator("shopkeeper", &[]);
    for by in [&ed, &fixture.operator("ola", &["operators"])] {
        let body =
            json!({ "sources": [{ "name": "x", "text": policy("p", "application", "") }] }).to_string();
        let (status, answer) = fixture.ask(&ed, Method::POST, "apply?confirmWithin=1h", body).await;
        assert_eq!(status, StatusCode::OK, "{answer}");
        let path = format!("confirmations/{}/rollback", answer["confirmation"]["id"].as_str().unwrap());
        assert_eq!(fixture.ask(&other, Method::POST, &path, String::new()).await.0, StatusCode::FORBIDDEN);
        assert_eq!(fixture.ask(by, Method::POST, &path, String::new()).await.0, StatusCode::OK);
    }
}

fn spec_order(order: u32) -> String {
    format!("apiVersion: bulkhead.dev/v1\nkind: Tier\nmetadata: {{name: t}}\nspec: {{order: {order}}}\n---\n")
}

#[tokio::test]
async fn everything_that_was_changed_can_be_seen_and_undone() {
    let directory = tempfile::tempdir().unwrap();
    let config = Config {
        store: StoreKind::Embedded,
        data_directory: directory.path().into(),
        identity_directory: Some(directory.path().join("identity")),
        ..config()
    };
    let mut fixture = Fixture::with(config.clone()).await;
    let revision =
        |answer: &Value| answer["metadata"]["resourceVersion"].as_str().unwrap().parse::<u64>().unwrap();
    let first = revision(&fixture.apply(&(spec_order(5) + &policy("p", "t", ""))).await);
    let second = revision(&fixture.apply(&(spec_order(6) + &policy("q", "application", ""))).await);
    assert_eq!(fixture.delete("policies/p").await, StatusCode::OK);
    assert_eq!(fixture.delete("tiers/t").await, StatusCode::OK);
    // An agent's workloads are nobody's change.
    let mut agent = fixture.agent("h1").await;
    agent.publish(true, &[("w.h1", "h1", json!({}), "10.0.0.1")], &[]).await;

    for _ in 0..2 {
        let list = fixture.get(&format!("{V1}/history")).await;
        let items = list["items"].as_array().unwrap();
        assert_eq!(items.len(), 4, "{list}");
        assert!(items.iter().all(|item| item["by"] == "operator/root" && item["complete"] == true), "{list}");
        assert_eq!(items[3]["revision"], first);
        assert_eq!(items[3]["objects"][1], json!({ "object": "Policy/p", "outcome": "created" }));
        assert_eq!(items[0]["objects"][0], json!({ "object": "Tier/t", "outcome": "deleted" }));
        let of_p = fixture.get(&format!("{V1}/history?object=Policy/p")).await;
        assert_eq!(of_p["items"].as_array().unwrap().len(), 2);
        let older = fixture.get(&format!("{V1}/history?before={second}&limit=5")).await;
        assert_eq!(older["items"].as_array().unwrap().len(), 1);

        let diff = fixture.get(&format!("{V1}/history/diff?from={first}&to={second}")).await;
        let items = diff["items"].as_array().unwrap();
        assert_eq!(items.len(), 2, "{diff}");
        let tier = items.iter().find(|item| item["kind"] == "Tier").unwrap();
        assert_eq!(
            (&tier["before"]["spec"]["order"], &tier["after"]["spec"]["order"]),
            (&json!(5), &json!(6))
        );
        let since = fixture.get(&format!("{V1}/history/diff?from={second}")).await;
        assert!(since["items"].as_array().unwrap().iter().all(|item| item["after"].is_null()), "{since}");
        // It is all there after a restart, too.
        fixture.controller.shutdown().await.unwrap();
        fixture = Fixture::with(config.clone()).await;
    }

    let before: Value = fixture.get(&format!("{V1}/tiers")).await;
    let path = format!("{V1}/history/rollback?to={first}&dryRun=true");
    let (status, dry) = fixture.call(Method::POST, &path, String::new()).await;
    assert_eq!(status, StatusCode::OK, "{dry}");
    assert_eq!(fixture.get(&format!("{V1}/tiers")).await["items"], before["items"]);
    let (status, done) = fixture.call(Method::POST, &path.replace("&dryRun=true", ""), String::new()).await;
    assert_eq!(status, StatusCode::OK, "{done}");
    assert_eq!(dry["items"].as_array().unwrap().len(), 3);
    let order = fixture.get(&format!("{V1}/tiers/t")).await["spec"]["order"].clone();
    assert_eq!(order, json!(5));
    fixture.get(&format!("{V1}/policies/p")).await;
    assert_eq!(
        fixture.call(Method::GET, &format!("{V1}/policies/q"), String::new()).await.0,
        StatusCode::NOT_FOUND
    );
    fixture.get(&format!("{V1}/workloads/w.h1")).await;

    // A roll-back is a change, so it can be undone as well.
    let rolled = revision(&done);
    let (status, undone) =
        fixture.call(Method::POST, &format!("{V1}/history/rollback?to={}", rolled - 1), String::new()).await;
    assert_eq!(status, StatusCode::OK, "{undone}");
    fixture.get(&format!("{V1}/policies/q")).await;
    let newest = fixture.get(&format!("{V1}/history?limit=1")).await;
    assert_eq!(newest["items"][0]["verb"], "rollback");

    for (to, expected) in [(10_000_u64, "no revision 10000 yet"), (first - 1, "")] {
        let path = format!("{V1}/history/rollback?to={to}&dryRun=true");
        let (status, answer) = fixture.call(Method::POST, &path, String::new()).await;
        assert_eq!(status == StatusCode::GONE, !expected.is_empty(), "{answer}");
        assert!(answer["message"].as_str().unwrap_or_default().contains(expected), "{answer}");
    }
    fixture.apply(&policy("r", "application", "")).await;
    fixture.controller.shutdown().await.unwrap();
    let lines = verify_audit(&directory.path().join("audit")).unwrap();
    assert_eq!(lines, 7, "four changes, two roll-backs and the last policy");
}

#[tokio::test]
async fn a_roll_back_leaves_no_policy_without_its_tier() {
    let fixture = Fixture::with_roles().await;
    let at = fixture.apply(&policy("x", "application", "")).await;
    let at = at["metadata"]["resourceVersion"].as_str().unwrap().to_owned();
    fixture.apply(&spec_order(5)).await;
    let agent_like = "apiVersion: projectcalico.org/v3\nkind: GlobalNetworkPolicy\nmetadata: {name: t.gnp}\nspec: {tier: t, selector: has(x), types: [Ingress]}\n";
    fixture.apply(agent_like).await;
    // Both go together.
    let (status, answer) = fixture
        .call(Method::POST, &format!("{V1}/history/rollback?to={at}&dryRun=true"), String::new())
        .await;
    assert_eq!((status, answer["items"].as_array().unwrap().len()), (StatusCode::OK, 2), "{answer}");
    // An editor may not undo what is not his.
    let ed = fixture.operator("ed", &["app-editors"]);
    let (status, _) =
        fixture.ask(&ed, Method::POST, &format!("history/rollback?to={at}"), String::new()).await;
    assert_eq!(status, StatusCode::FORBIDDEN);
}

#[tokio::test]
async fn refused_changes_stand_in_the_audit_log_and_a_change_of_it_is_noticed() {
    let directory = tempfile::tempdir().unwrap();
    let config = Config {
        store: StoreKind::Embedded,
        data_directory: directory.path().into(),
        identity_directory: Some(directory.path().join("identity")),
        ..config()
    };
    let fixture = Fixture::with(config).await;
    fixture.apply(&binding("view", "{role: Viewer, users: [eve]}")).await;
    let eve = fixture.operator("eve", &[]);
    assert_eq!(fixture.apply_as(&eve, &policy("p", "application", "")).await, StatusCode::FORBIDDEN);
    let (status, _) = fixture.try_apply("apply", &[("x", &policy("p", "nowhere", ""))]).await;
    assert_eq!(status, StatusCode::UNPROCESSABLE_ENTITY);
    fixture.controller.shutdown().await.unwrap();
    let log = directory.path().join("audit");
    assert_eq!(verify_audit(&log).unwrap(), 3);
    let text = std::fs::read_to_string(log.join("audit.jsonl")).unwrap();
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!((&lines[1]["by"], &lines[1]["outcome"]), (&json!("operator/eve"), &json!("refused")));
    assert!(lines[2]["detail"]["why"].as_str().unwrap().contains("nowhere"), "{text}");
    assert!(lines[0]["detail"]["changes"][0]["after"]["spec"]["role"] == "Viewer", "{text}");
    std::fs::write(log.join("audit.jsonl"), text.replace("operator/eve", "operator/adam")).unwrap();
    assert!(verify_audit(&log).is_err());
}
