//! The document against the router and against the objects.

use std::collections::BTreeMap;

use bulkhead_model::{Kind, document};
use serde_json::{Value, json};

use super::{OPENAPI, ROUTES};

fn openapi() -> Value {
    serde_json::from_str(OPENAPI).unwrap()
}

#[test]
fn the_document_has_the_routers_paths_and_methods() {
    let described: BTreeMap<String, Vec<String>> = openapi()["paths"]
        .as_object()
        .unwrap()
        .iter()
        .map(|(path, item)| {
            let methods = item.as_object().unwrap().keys().filter(|key| *key != "parameters");
            let mut methods: Vec<_> = methods.cloned().collect();
            methods.sort();
            (path.clone(), methods)
        })
        .collect();
    let served: BTreeMap<String, Vec<String>> = ROUTES
        .iter()
        .map(|route| {
            let mut methods: Vec<_> = route.methods.iter().map(ToString::to_string).collect();
            methods.sort();
            (route.path.to_owned(), methods)
        })
        .collect();
    assert_eq!(described, served);
}

/// Every field of a value must be in its schema.
fn described(document: &Value, schema: &Value, value: &Value, path: &str) {
    if let Some(reference) = schema["$ref"].as_str() {
        let name = reference.rsplit('/').next().unwrap();
        let target = &document["components"]["schemas"][name];
        assert!(target.is_object(), "{path}: there is no schema {name}");
        return described(document, target, value, path);
    }
    if let Some(options) = schema["oneOf"].as_array() {
        let fits = |option: &&Value| value.is_array() == (option["type"] == "array");
        return described(document, options.iter().find(fits).unwrap(), value, path);
    }
    match value {
        Value::Object(fields) => {
            for (name, field) in fields {
                let inner = &schema["properties"][name];
                let any = &schema["additionalProperties"];
                let inner = if inner.is_object() { inner } else { any };
                assert!(
                    inner.is_object() || schema.get("properties").is_none(),
                    "{path}.{name} is not described"
                );
                described(document, inner, field, &format!("{path}.{name}"));
            }
        }
        Value::Array(items) => {
            for item in items {
                described(document, &schema["items"], item, &format!("{path}[]"));
            }
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

#[test]
fn every_field_of_every_kind_is_described() {
    let document = openapi();
    let metadata = "metadata: {name: a.h, labels: {x: y}, annotations: {x: y}, uid: u, generation: 1, \
                    resourceVersion: '1', creationTimestamp: '2026-01-01T00:00:00Z'}";
    let specs = [
        (Kind::Settings, "{defaultPosture: Deny, failSafePorts: {ingress: [tcp/22], egress: [udp/53]}}"),
        (Kind::Tier, "{order: 5, defaultAction: Pass}"),
        (Kind::Namespace, "{defaultPosture: Deny}"),
        (Kind::NameTable, "{names: {example.org: [192.0.2.1]}}"),
        (
            Kind::Policy,
            "{tier: admin, order: 1, mode: Audit, validFrom: 2026-01-01T00:00:00Z, validUntil: 2027-01-01T00:00:00Z, applyOnForward: false, \
             appliesTo: all(), ingress: [{action: Deny, reject: true, from: {selector: all(), notSelector: has(x), \
             namespaceSelector: has(y), serviceAccounts: [a], sameLabels: [x], notSameLabels: [y], \
             cidrs: [10.0.0.0/8], notCidrs: [10.0.0.0/9], networkSets: has(y), hosts: all(), services: [a/b]}, \
             ports: [tcp/1], notPorts: udp, sourcePorts: [53, 1-9], notSourcePorts: 7, ipVersion: 4, endpoint: \
             {selector: has(a), notSelector: has(b), cidrs: [10.0.0.0/8], notCidrs: [10.0.0.0/9]}, log: true}], \
             egress: [{action: Pass, to: [{cidrs: [::/0]}, {selector: all()}, {domains: [example.org]}]}]}",
        ),
        (Kind::NetworkSet, "{cidrs: [10.0.0.0/8]}"),
        (
            Kind::HostEndpoint,
            "{host: h, interface: eth0, addresses: [10.0.0.1], ports: [{name: http, port: 80}], defaultPosture: Deny}",
        ),
        (
            Kind::Workload,
            "{host: h, addresses: [10.0.0.1], interface: eth0, source: manual, ports: [{name: http, port: 80}], \
             serviceAccount: x, facts: {host.kernel: '6.1'}}",
        ),
        (Kind::RoleBinding, "{role: Editor, users: [a], groups: [b], tiers: [c], namespaces: [d]}"),
        (Kind::Host, "{agentVersion: '1', addresses: [10.0.0.1], facts: {host.kernel: '6.1'}}"),
    ];
    assert_eq!(specs.len(), Kind::ALL.iter().filter(|kind| kind.is_own()).count());
    for (kind, spec) in specs {
        let metadata =
            if kind == Kind::Settings { metadata.replace("a.h", "default") } else { metadata.to_owned() };
        let text = format!("apiVersion: bulkhead.dev/v1\nkind: {kind}\n{metadata}\nspec: {spec}\n");
        let resource = document::parse("test", &text).unwrap().remove(0).resource;
        let schema = &document["components"]["schemas"][kind.as_str()];
        assert!(schema.is_object(), "there is no schema {kind}");
        described(&document, schema, &resource.to_json(), kind.as_str());
    }
}

#[test]
fn every_field_of_a_flow_is_described() {
    let end =
        json!({ "address": "10.0.0.1", "port": 1, "workload": "a.h", "host": "h", "labels": { "x": "y" } });
    let decision = json!({
        "verdict": "allow",
        "rule": { "by": "rule", "tier": "t", "policy": "p", "direction": "egress", "index": 0 },
    });
    let record: bulkhead_model::flow::FlowRecord = serde_json::from_value(json!({
        "timeMs": 1, "openedMs": 1, "event": "open", "reporter": "h", "direction": "egress", "protocol": 6,
        "source": end, "destination": end, "enforced": decision, "audit": decision, "reason": "none",
        "revision": 1, "packetsForward": 1, "bytesForward": 1, "packetsReverse": 1, "bytesReverse": 1,
    }))
    .unwrap();
    let document = openapi();
    described(&document, &document["components"]["schemas"]["Flow"], &json!(record), "Flow");
}
