//! Kinds of other systems, namespaces and expiry, in force in the kernels of two hosts.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::ensure;
use bulkhead_model::time::Timestamp;
use bulkhead_testbed::{Bulkhead, Outcome, Protocol, Server, Workload, eventually};

use crate::common::{outcome, start, wait_outcome};

const PORT: u16 = 8080;
const OTHER: u16 = 8081;

/// A workload of a namespace, under a service account and with a named port, serving on both ports.
fn in_namespace(bulkhead: &Bulkhead, host: &str, name: &str, namespace: &str) -> (Workload, Server) {
    let workload = bulkhead.lab.workload(host, name).unwrap();
    let path = workload.netns.path().display().to_string();
    let label = format!("app={name}");
    let arguments = [
        "workload",
        "add",
        name,
        "--netns",
        &path,
        "--label",
        &label,
        "--namespace",
        namespace,
        "--service-account",
        "runner",
        "--named-port",
        "http=tcp/8080",
    ];
    bulkhead.on_host(host, &arguments).unwrap();
    let server = Server::start(&workload.netns, &[PORT, OTHER]).unwrap();
    let known = format!("{name}.{host}");
    eventually("the workload is published", || {
        let list = bulkhead.json(&["get", "workloads"])?.to_string();
        ensure!(list.contains(&known), "{list}");
        Ok(())
    })
    .unwrap();
    (workload, server)
}

fn namespace(name: &str, env: &str) -> String {
    format!("apiVersion: v1\nkind: Namespace\nmetadata: {{name: {name}, labels: {{env: {env}}}}}\n---\n")
}

#[test]
fn policies_of_kubernetes_and_calico_hold_in_the_kernel() {
    let bulkhead = start("bt-lang", &["host-1", "host-2"]);
    let (web, _web_server) = in_namespace(&bulkhead, "host-1", "web", "shop");
    let (db, _db_server) = in_namespace(&bulkhead, "host-2", "db", "data");
    let (other, _other_server) = in_namespace(&bulkhead, "host-1", "other", "lab");
    wait_outcome(&web, &db, Protocol::Tcp(PORT), Outcome::Reached);

    // What the namespace of the caller says decides, and its port has a name.
    let policy = "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: db, namespace: data}\n\
                  spec:\n  podSelector: {matchLabels: {app: db}}\n  ingress:\n  \
                  - {from: [{namespaceSelector: {matchLabels: {env: prod}}}], ports: [{port: http}]}\n";
    let state = format!("{}{}{policy}", namespace("shop", "prod"), namespace("lab", "test"));
    bulkhead.apply_text("cluster.yaml", &state).unwrap();
    wait_outcome(&other, &db, Protocol::Tcp(PORT), Outcome::Silent);
    wait_outcome(&web, &db, Protocol::Tcp(PORT), Outcome::Reached);
    assert_eq!(outcome(&web, &db, Protocol::Tcp(OTHER)), Outcome::Silent);
    // A label of a namespace changes on one host's workload what the other host lets in.
    bulkhead
        .apply_text("moved.yaml", &format!("{}{}", namespace("shop", "test"), namespace("lab", "prod")))
        .unwrap();
    wait_outcome(&web, &db, Protocol::Tcp(PORT), Outcome::Silent);
    wait_outcome(&other, &db, Protocol::Tcp(PORT), Outcome::Reached);

    // A tier before it, by service account and host.
    let calico = "apiVersion: projectcalico.org/v3\nkind: Tier\nmetadata: {name: first}\nspec: {order: 5}\n---\n\
                  apiVersion: projectcalico.org/v3\nkind: GlobalNetworkPolicy\nmetadata: {name: guard}\nspec:\n  \
                  tier: first\n  selector: app == 'db'\n  types: [Ingress]\n  ingress:\n  \
                  - {action: Allow, protocol: TCP, source: {serviceAccounts: {names: [runner]}}, destination: {ports: [8081]}}\n  \
                  - {action: Pass}\n";
    bulkhead.apply_text("calico.yaml", calico).unwrap();
    wait_outcome(&web, &db, Protocol::Tcp(OTHER), Outcome::Reached);
    wait_outcome(&web, &db, Protocol::Tcp(PORT), Outcome::Silent);
    let explained = bulkhead.ok(&["explain", "workload", "data/db.host-2"]).unwrap();
    assert!(
        explained.contains("GlobalNetworkPolicy/guard") && explained.contains("NetworkPolicy/data/db"),
        "{explained}"
    );
    let written = bulkhead.ok(&["get", "networkpolicies", "data/db", "-o", "yaml"]).unwrap();
    assert!(written.contains("networking.k8s.io/v1") && written.contains("port: http"), "{written}");
    // The kernel's own tables, beside what they should say.
    let status = bulkhead.on_host("host-2", &["dataplane", "status"]).unwrap();
    assert!(status.contains("what they should be"), "{status}");
    let web_address = web.v4.to_string();
    let ask = |port| {
        ["dataplane", "lookup", "--from", &web_address, "--to", "data/db", "--port", port]
            .map(ToOwned::to_owned)
    };
    for (port, verdict) in [("tcp/8081", "allow by first/GlobalNetworkPolicy/guard"), ("tcp/8080", "deny by")]
    {
        let arguments = ask(port);
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let answer = bulkhead.on_host("host-2", &arguments).unwrap();
        assert!(answer.contains(verdict), "{answer}");
    }
    bulkhead.ok(&["delete", "gnp", "guard"]).unwrap();
    wait_outcome(&web, &db, Protocol::Tcp(OTHER), Outcome::Silent);

    // The repository's posture, and the namespace's before it.
    bulkhead.ok(&["delete", "networkpolicies", "data/db"]).unwrap();
    wait_outcome(&web, &db, Protocol::Tcp(OTHER), Outcome::Reached);
    let closed = "apiVersion: bulkhead.dev/v1\nkind: Settings\nmetadata: {name: default}\nspec: {defaultPosture: Deny}\n";
    bulkhead.apply_text("closed.yaml", closed).unwrap();
    wait_outcome(&web, &db, Protocol::Tcp(OTHER), Outcome::Silent);
    let open = ["shop", "data"].map(|name| {
        format!("apiVersion: bulkhead.dev/v1\nkind: Namespace\nmetadata: {{name: {name}}}\nspec: {{defaultPosture: Allow}}\n")
    });
    bulkhead.apply_text("open.yaml", &open.join("---\n")).unwrap();
    wait_outcome(&web, &db, Protocol::Tcp(OTHER), Outcome::Reached);
    assert_eq!(outcome(&other, &db, Protocol::Tcp(OTHER)), Outcome::Silent);
}

#[test]
fn an_exception_ends_by_itself() {
    let bulkhead = start("bt-expire", &["host-1", "host-2"]);
    let (web, _web_server) = in_namespace(&bulkhead, "host-1", "web", "shop");
    let (db, _db_server) = in_namespace(&bulkhead, "host-2", "db", "shop");
    let closed = "apiVersion: bulkhead.dev/v1\nkind: Policy\nmetadata: {name: closed}\n\
                  spec: {appliesTo: app == 'db', ingress: []}\n";
    bulkhead.apply_text("closed.yaml", closed).unwrap();
    wait_outcome(&web, &db, Protocol::Tcp(PORT), Outcome::Silent);
    // Policies tell time in whole seconds.
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let until = Duration::from_secs(now.as_secs() + 8);
    let exception = format!(
        "apiVersion: bulkhead.dev/v1\nkind: Policy\nmetadata: {{name: exception}}\nspec:\n  tier: admin\n  \
         validUntil: {}\n  appliesTo: app == 'db'\n  ingress:\n  - {{action: Allow, from: {{selector: app == 'web'}}}}\n  \
         - {{action: Pass}}\n",
        Timestamp::since_epoch(until)
    );
    bulkhead.apply_text("exception.yaml", &exception).unwrap();
    wait_outcome(&web, &db, Protocol::Tcp(PORT), Outcome::Reached);
    // Nobody does anything: the clock does.
    wait_outcome(&web, &db, Protocol::Tcp(PORT), Outcome::Silent);
    assert!(SystemTime::now().duration_since(UNIX_EPOCH).unwrap() >= until, "not before its time");
}
