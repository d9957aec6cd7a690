//! Objects of Kubernetes and Calico in the repository.

use bulkhead_wire::proto::agent_message::Body as Up;
use bulkhead_wire::proto::controller_message::Body as Down;
use bulkhead_wire::proto::{Inventory, InventoryAck};
use hyper::body::Bytes;
use hyper::{Method, StatusCode};
use serde_json::{Value, json};

use crate::harness::{Agent, Fixture};

/// A bit of everything.
const MIX: &str = "\
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {env: prod}, uid: from-elsewhere, resourceVersion: '77'}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: web, namespace: shop, annotations: {note: kept}}
spec:
  podSelector: {matchLabels: {app: web}}
  ingress: [{from: [{namespaceSelector: {matchLabels: {env: prod}}}], ports: [{port: 80}]}]
---
apiVersion: projectcalico.org/v3
kind: Tier
metadata: {name: security}
spec: {order: 200}
---
apiVersion: projectcalico.org/v3
kind: GlobalNetworkPolicy
metadata: {name: no-bad}
spec:
  tier: security
  selector: all()
  egress: [{action: Deny, destination: {selector: feed == 'bad'}}, {action: Pass}]
---
apiVersion: projectcalico.org/v3
kind: GlobalNetworkSet
metadata: {name: bad, labels: {feed: bad}}
spec: {nets: [198.51.100.0/24]}
---
apiVersion: v1
kind: Pod
metadata: {name: web-0, namespace: shop, labels: {app: web}}
spec: {nodeName: n1}
status: {podIP: 10.0.0.1}
---
apiVersion: bulkhead.dev/v1
kind: Workload
metadata: {name: batch, namespace: shop, labels: {app: batch}}
spec: {host: h9, addresses: [10.0.0.2]}
";

async fn verdict(fixture: &Fixture, query: &str) -> Value {
    let answer = fixture.get(&format!("/apis/bulkhead.dev/v1/explain?{query}")).await;
    answer["explanation"]["verdict"].clone()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mix_of_kinds_is_applied_at_once_and_means_what_it_says() {
    let fixture = Fixture::new().await;
    let answer = fixture.apply(MIX).await;
    assert_eq!(answer["items"].as_array().unwrap().len(), 7);
    assert_eq!(fixture.apply(MIX).await["items"][1]["outcome"], "unchanged");
    // As it was written: with its own group, with what Bulkhead does not look at, without another system's ids.
    let policy = fixture.get("/apis/bulkhead.dev/v1/namespaces/shop/networkpolicies/web").await;
    assert_eq!(policy["apiVersion"], "networking.k8s.io/v1");
    assert_eq!(policy["metadata"]["annotations"], json!({ "note": "kept" }));
    assert_eq!(policy["spec"]["ingress"][0]["ports"], json!([{ "port": 80 }]));
    let namespace = fixture.get("/apis/bulkhead.dev/v1/namespaces.kubernetes.io/shop").await;
    assert_ne!(namespace["metadata"]["uid"], "from-elsewhere");
    assert_ne!(namespace["metadata"]["resourceVersion"], "77");

    assert_eq!(verdict(&fixture, "from=shop/batch&to=shop/web-0&port=tcp/80").await, "allow");
    assert_eq!(verdict(&fixture, "from=shop/batch&to=shop/web-0&port=tcp/81").await, "deny");
    assert_eq!(verdict(&fixture, "from=shop/batch&to=198.51.100.7&port=tcp/443").await, "deny");
    assert_eq!(verdict(&fixture, "from=shop/batch&to=198.51.101.7&port=tcp/443").await, "allow");
    // What the namespace leaves to its workloads is looked at anew.
    fixture.apply(&MIX.replace("labels: {env: prod}, uid", "labels: {env: test}, uid")).await;
    assert_eq!(verdict(&fixture, "from=shop/batch&to=shop/web-0&port=tcp/80").await, "deny");

    let workload = fixture.get("/apis/bulkhead.dev/v1/explain?workload=shop/web-0").await;
    assert_eq!(workload["explanation"]["ingress"][0]["policies"][0]["policy"], "NetworkPolicy/shop/web");
    let policy = fixture.get("/apis/bulkhead.dev/v1/explain?policy=GlobalNetworkPolicy/no-bad").await;
    assert_eq!(policy["explanation"]["rules"][0]["peers"], json!(["GlobalNetworkSet/bad"]));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_honoured_is_refused_by_name_and_place() {
    let fixture = Fixture::new().await;
    let http = "apiVersion: projectcalico.org/v3\nkind: GlobalNetworkPolicy\nmetadata: {name: a}\nspec:\n  \
                ingress:\n  - action: Allow\n    http: {methods: [GET]}\n";
    let tier = MIX.replace("tier: security", "tier: securty");
    let twice = format!(
        "{MIX}---\napiVersion: bulkhead.dev/v1\nkind: Tier\nmetadata: {{name: security}}\nspec: {{}}\n"
    );
    // What is forwarded has no end of its own that a rule could ask about.
    let forwarded = "apiVersion: projectcalico.org/v3\nkind: GlobalNetworkPolicy\nmetadata: {name: a}\nspec:\n  \
                     applyOnForward: true\n  ingress:\n  - action: Allow\n    destination: {nets: [10.0.0.0/8]}\n";
    let pre_dnat =
        forwarded.replace("destination: {nets: [10.0.0.0/8]}", "protocol: TCP") + "  preDNAT: true\n";
    let secret = "apiVersion: v1\nkind: Secret\nmetadata: {name: a}\n";
    for (text, part) in [
        (http, "HTTP are not supported yet"),
        (forwarded, "so no rule may ask"),
        (&pre_dnat, "policies before destination translation"),
        (&tier, "there is no tier \\\"securty\\\""),
        (&twice, "already made by"),
        (secret, "expected Namespace"),
    ] {
        let (status, answer) = fixture.try_apply("apply", &[("f.yaml", text)]).await;
        assert_eq!(status, StatusCode::UNPROCESSABLE_ENTITY, "{answer}");
        assert!(answer.to_string().contains(part), "{part}: {answer}");
    }
    let one_end = forwarded.replace("destination: {nets: [10.0.0.0/8]}", "source: {nets: [10.0.0.0/8]}");
    fixture.apply(&one_end).await;
    let (status, _) = fixture.call(Method::GET, "/apis/bulkhead.dev/v1/pods", String::new()).await;
    assert_eq!(status, StatusCode::OK);
    fixture.apply(MIX).await;
    assert_eq!(
        fixture.delete("tiers.projectcalico.org/security").await,
        StatusCode::FORBIDDEN,
        "it is in use"
    );
}

async fn publish(agent: &mut Agent, name: &str, namespace: &str) -> InventoryAck {
    let workload = json!({
        "apiVersion": "bulkhead.dev/v1", "kind": "Workload",
        "metadata": { "name": name, "namespace": namespace, "labels": { "app": "web" } },
        "spec": { "host": "h2", "addresses": ["10.0.0.2"], "serviceAccount": "web" },
    });
    let upserts = vec![Bytes::from(workload.to_string())];
    agent.say(Up::Inventory(Inventory { generation: 1, upserts, ..Inventory::default() })).await;
    loop {
        if let Down::InventoryAck(ack) = agent.receive().await.unwrap() {
            return ack;
        }
    }
}

/// A subscriber hears of whoever inherits labels, and of nobody else; whichever came first.
#[tokio::test(flavor = "multi_thread")]
async fn members_follow_what_their_namespace_leaves_to_them() {
    let fixture = Fixture::new().await;
    let mut writer = fixture.agent("h2").await;
    let mut reader = fixture.agent("h1").await;
    let prod = reader.subscribe("bulkhead.dev/namespace.env == \"prod\"", 0).await;
    assert!(prod.joins().is_empty());
    assert!(publish(&mut writer, "web.h2", "shop").await.refused.is_empty());
    reader.hears_nothing().await;
    let namespace = |env: &str| {
        format!(
            "apiVersion: bulkhead.dev/v1\nkind: Namespace\nmetadata: {{name: shop, labels: {{env: {env}}}}}\n"
        )
    };
    fixture.apply(&namespace("prod")).await;
    let batch = reader.batch().await;
    assert_eq!(batch.joins(), [("Workload/shop/web.h2", "h2")]);
    // The agents of workloads in it are told as well: they complete their own.
    assert_eq!(batch.resources[0].upserts.len(), 1);
    assert_eq!(writer.batch().await.resources[0].upserts.len(), 1);
    fixture.apply(&namespace("test")).await;
    assert_eq!(reader.batch().await.leaves(), ["Workload/shop/web.h2"]);
    fixture.delete("namespaces/shop").await;
    let batch = reader.batch().await;
    assert_eq!((batch.joins(), batch.resources[0].removes[0].kind.as_str()), (vec![], "Namespace"));
    // Another namespace, another entity.
    fixture.apply(&namespace("prod").replace("shop", "lab")).await;
    assert!(reader.batch().await.joins().is_empty());
    assert!(publish(&mut writer, "web.h2", "lab").await.refused.is_empty());
    assert_eq!(reader.batch().await.joins(), [("Workload/lab/web.h2", "h2")]);
}
