//! The API as clients of Kubernetes use it, where kubectl does not go.

use http_body_util::BodyExt;
use hyper::{Method, StatusCode};
use serde_json::{Value, json};

use crate::guard::{HERE, SHUT, THERE};
use crate::harness::{Fixture, Lines, POLICY};

const POLICIES: &str = "/apis/bulkhead.dev/v1/policies";
const NETWORK: &str = "/apis/networking.k8s.io/v1/namespaces/shop/networkpolicies";

impl Fixture {
    /// A request with heads, as an administrator.
    async fn ask_with(
        &self,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        body: &str,
    ) -> (StatusCode, Value) {
        let admin = self.operator("root", &["bulkhead:admins"]);
        let response = self.send_with(&admin, method, path, headers, body.to_owned()).await.unwrap();
        let status = response.status();
        let bytes = response.into_body().collect().await.unwrap().to_bytes();
        (status, serde_json::from_slice(&bytes).unwrap_or_default())
    }

    async fn policies(&self, names: &[&str]) {
        for name in names {
            self.apply(&POLICY.replace("name: db", &format!("name: {name}, labels: {{n: {name}}}"))).await;
        }
    }
}

fn names(list: &Value) -> Vec<&str> {
    let items = list["items"].as_array().unwrap().iter();
    items.map(|item| item["metadata"]["name"].as_str().unwrap()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_list_is_continued_where_its_page_ended() {
    let fixture = Fixture::new().await;
    fixture.policies(&["a", "b", "c"]).await;
    let first = fixture.get(&format!("{POLICIES}?limit=2")).await;
    assert_eq!((names(&first), &first["metadata"]["remainingItemCount"]), (vec!["a", "b"], &json!(1)));
    let token = first["metadata"]["continue"].as_str().unwrap();
    fixture.policies(&["d"]).await;
    fixture.delete("policies/b").await;
    let rest = fixture.get(&format!("{POLICIES}?limit=2&continue={token}")).await;
    assert_eq!(names(&rest), ["c", "d"]);
    assert_eq!(rest["metadata"]["resourceVersion"], first["metadata"]["resourceVersion"]);
    assert!(rest["metadata"]["continue"].is_null());
    for (query, code) in [("continue=x", 400), ("resourceVersion=1&resourceVersionMatch=Exact", 410)] {
        let (status, _) = fixture.call(Method::GET, &format!("{POLICIES}?{query}"), String::new()).await;
        assert_eq!(status.as_u16(), code, "{query}");
    }
    assert_eq!(fixture.get(&format!("{POLICIES}?limit=0")).await["items"].as_array().unwrap().len(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_begins_with_what_there_is_and_ends_in_time() {
    let fixture = Fixture::new().await;
    fixture.policies(&["a", "b"]).await;
    let query =
        "watch=true&sendInitialEvents=true&allowWatchBookmarks=true&resourceVersionMatch=NotOlderThan";
    let path = format!("{POLICIES}?{query}&fieldSelector=metadata.name%21%3Db&timeoutSeconds=1");
    let response = fixture.send(Method::GET, &path, String::new()).await;
    assert_eq!(response.headers()["content-type"], "application/json");
    let mut lines = Lines::of(response);
    let event = lines.next().await;
    assert_eq!((&event["type"], &event["object"]["metadata"]["name"]), (&json!("ADDED"), &json!("a")));
    let event = lines.next().await;
    assert_eq!((&event["type"], &event["object"]["kind"]), (&json!("BOOKMARK"), &json!("Policy")));
    assert_eq!(event["object"]["metadata"]["annotations"]["k8s.io/initial-events-end"], json!("true"));
    fixture.policies(&["b", "c"]).await;
    assert_eq!(lines.next().await["object"]["metadata"]["name"], json!("c"));
    lines.ends().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn forms_are_negotiated() {
    let fixture = Fixture::new().await;
    fixture.policies(&["a"]).await;
    let asked = |form: &str| format!("application/json;as={form};v=v1;g=meta.k8s.io,application/json");
    let (_, table) = fixture.ask_with(Method::GET, POLICIES, &[("accept", &asked("Table"))], "").await;
    assert_eq!((&table["kind"], &table["apiVersion"]), (&json!("Table"), &json!("meta.k8s.io/v1")));
    assert_eq!(table["columnDefinitions"][6]["name"], json!("Applies To"));
    assert_eq!(table["rows"][0]["cells"][1], json!("application"));
    assert_eq!(table["rows"][0]["object"]["kind"], json!("PartialObjectMetadata"));
    let path = format!("{POLICIES}/a?includeObject=Object");
    let (_, one) = fixture.ask_with(Method::GET, &path, &[("accept", &asked("Table"))], "").await;
    assert_eq!(one["rows"][0]["object"]["spec"]["tier"], json!("application"));
    let (_, list) =
        fixture.ask_with(Method::GET, POLICIES, &[("accept", &asked("PartialObjectMetadataList"))], "").await;
    assert_eq!(
        (&list["kind"], &list["items"][0]["spec"]),
        (&json!("PartialObjectMetadataList"), &json!(null))
    );
    let aggregated = "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList";
    let (_, groups) = fixture.ask_with(Method::GET, "/apis", &[("accept", aggregated)], "").await;
    assert_eq!(
        groups["items"][0]["versions"][0]["resources"][0]["responseKind"]["group"],
        json!("bulkhead.dev")
    );
    let old = fixture.get("/apis").await;
    assert_eq!(old["groups"][0]["preferredVersion"]["groupVersion"], json!("bulkhead.dev/v1"));
    for path in ["/apis/nothing.example", "/apis/networking.k8s.io/v7", "/openapi/v3/apis/a/b"] {
        let (status, _) = fixture.call(Method::GET, path, String::new()).await;
        assert_eq!(status, StatusCode::NOT_FOUND, "{path}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn deletions_have_options_and_collections_selectors() {
    let fixture = Fixture::new().await;
    fixture.policies(&["a", "b", "c"]).await;
    let ask = async |path: &str, options: Value| {
        let headers = [("content-type", "application/json")];
        fixture.ask_with(Method::DELETE, &format!("{POLICIES}{path}"), &headers, &options.to_string()).await.0
    };
    assert_eq!(ask("/a", json!({ "preconditions": { "uid": "another" } })).await, StatusCode::CONFLICT);
    assert_eq!(ask("/a", json!({ "preconditions": { "resourceVersion": "7" } })).await, StatusCode::CONFLICT);
    assert_eq!(ask("/a", json!({ "dryRun": ["All"] })).await, StatusCode::OK);
    assert_eq!(ask("?labelSelector=n+in+(a,b)", json!({ "dryRun": ["All"] })).await, StatusCode::OK);
    assert_eq!(fixture.get(POLICIES).await["items"].as_array().unwrap().len(), 3);
    let options = json!({ "kind": "DeleteOptions", "apiVersion": "v1", "propagationPolicy": "Foreground" });
    assert_eq!(ask("?labelSelector=n+in+(a,b)", options.clone()).await, StatusCode::OK);
    assert_eq!(names(&fixture.get(POLICIES).await), ["c"]);
    assert_eq!(ask("/c", options).await, StatusCode::OK);
    assert_eq!(ask("?limit=1", json!({})).await, StatusCode::BAD_REQUEST);
    // A collection with something that may not go stays whole.
    let (status, _) = fixture.call(Method::DELETE, "/apis/bulkhead.dev/v1/tiers", String::new()).await;
    assert_eq!(status, StatusCode::FORBIDDEN);
    assert_eq!(fixture.get("/apis/bulkhead.dev/v1/tiers").await["items"].as_array().unwrap().len(), 7);
}

#[tokio::test(flavor = "multi_thread")]
async fn objects_are_below_their_groups_and_in_the_namespace_of_the_path() {
    let fixture = Fixture::new().await;
    let body = json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": { "generateName": "web-", "creationTimestamp": null }, "spec": { "podSelector": {} },
    });
    let (status, made) =
        fixture.call(Method::POST, &format!("{NETWORK}?fieldManager=test"), body.to_string()).await;
    assert_eq!(status, StatusCode::CREATED, "{made}");
    let name = made["metadata"]["name"].as_str().unwrap();
    assert!(name.starts_with("web-") && name.len() == 9, "{name}");
    assert_eq!(made["metadata"]["namespace"], json!("shop"));
    assert_eq!(made["metadata"]["managedFields"][0]["manager"], json!("test"));
    let list = fixture.get(NETWORK).await;
    assert_eq!((&list["kind"], names(&list)), (&json!("NetworkPolicyList"), vec![name]));
    fixture.policies(&["a"]).await;
    let there = fixture.get("/apis/bulkhead.dev/v1/namespaces/_/policies/a").await;
    assert_eq!(there["metadata"]["namespace"], json!("_"));
    assert_eq!(fixture.get(&format!("{POLICIES}/a")).await["metadata"]["namespace"], json!(null));
    assert_eq!(names(&fixture.get("/apis/bulkhead.dev/v1/namespaces/shop/policies").await).len(), 0);
    let (status, _) = fixture.call(Method::GET, "/apis/networking.k8s.io/v1/tiers", String::new()).await;
    assert_eq!(status, StatusCode::NOT_FOUND);
    // Made once more, without a manager: who set what went with the object.
    assert_eq!(
        fixture.call(Method::DELETE, &format!("{NETWORK}/{name}"), String::new()).await.0,
        StatusCode::OK
    );
    let again = body.to_string().replace("generateName", "name").replace("web-", name);
    let (_, made) = fixture.call(Method::POST, NETWORK, again).await;
    assert!(made["metadata"]["name"] == name && made["metadata"]["managedFields"].is_null(), "{made}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_apply_of_the_server_never_forces_the_lock_out_guard_and_dry_runs_change_nothing() {
    let fixture = Fixture::new().await;
    let apply = [("content-type", "application/apply-patch+yaml")];
    let body = "apiVersion: bulkhead.dev/v1\nkind: Policy\nmetadata: {name: x}\nspec: {appliesTo: role == 'nobody', ingress: []}\n";
    let path = format!("{POLICIES}/x?fieldManager=a");
    let dry = fixture.ask_with(Method::PATCH, &format!("{path}&dryRun=All"), &apply, body).await;
    assert_eq!(dry.0, StatusCode::CREATED, "{}", dry.1);
    assert_eq!(fixture.get(POLICIES).await["items"], json!([]));
    let (status, first) = fixture.ask_with(Method::PATCH, &path, &apply, body).await;
    assert_eq!(status, StatusCode::CREATED, "{first}");
    let version = &first["metadata"]["resourceVersion"];
    let (_, again) = fixture.ask_with(Method::PATCH, &path, &apply, body).await;
    assert_eq!(again["metadata"]["resourceVersion"], *version, "nothing was changed");
    // Another manager says the same: he answers for it too, and nothing else is another.
    let (_, both) = fixture.ask_with(Method::PATCH, &path.replace("=a", "=b"), &apply, body).await;
    assert_eq!(both["metadata"]["managedFields"].as_array().unwrap().len(), 2, "{both}");
    assert_eq!(both["metadata"]["resourceVersion"], *version);
    let (status, answer) = fixture.ask_with(Method::PATCH, &format!("{POLICIES}/x"), &apply, body).await;
    assert_eq!(status, StatusCode::BAD_REQUEST, "{answer}");
    let (status, _) =
        fixture.ask_with(Method::PATCH, &path, &apply, &body.replace("name: x", "name: y")).await;
    assert_eq!(status, StatusCode::UNPROCESSABLE_ENTITY);
    let (status, _) = fixture.ask_with(Method::PATCH, &path, &[("content-type", "text/plain")], body).await;
    assert_eq!(status, StatusCode::UNSUPPORTED_MEDIA_TYPE);
    // Fields may be taken by force; somebody's connection may not be cut by it.
    fixture.apply(&format!("{HERE}---\n{THERE}")).await;
    let path = format!("{POLICIES}/shut?fieldManager=a&force=true");
    let (status, refused) = fixture.ask_with(Method::PATCH, &path, &apply, SHUT).await;
    assert_eq!((status, &refused["reason"]), (StatusCode::CONFLICT, &json!("LockOut")), "{refused}");
}
