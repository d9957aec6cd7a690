//! `decide`, `explain -f` and `convert` as people and programs run them: the built binary, manifests, no controller.

use std::io::Write as _;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

use serde_json::{Value, json};

/// Three workloads, one policy of Bulkhead's and one of Kubernetes'.
const CLUSTER: &str = "\
apiVersion: bulkhead.dev/v1
kind: Workload
metadata: {name: web.h1, labels: {role: web}}
spec: {host: h1, addresses: [10.0.0.1, 'fd00::1']}
---
apiVersion: bulkhead.dev/v1
kind: Workload
metadata: {name: db.h2, labels: {role: db}}
spec: {host: h2, addresses: [10.0.0.2, 'fd00::2']}
---
apiVersion: bulkhead.dev/v1
kind: Policy
metadata: {name: db}
spec:
  appliesTo: role == 'db'
  ingress: [{action: Allow, from: {selector: role == 'web'}, ports: [tcp/5432]}]
---
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {env: prod}}
---
apiVersion: v1
kind: Pod
metadata: {name: api, namespace: shop, labels: {app: api}}
spec: {nodeName: h2, containers: [{name: c, ports: [{name: http, containerPort: 8080}]}]}
status: {podIP: 10.1.0.7, podIPs: [{ip: 10.1.0.7}]}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: api, namespace: shop}
spec: {podSelector: {}, ingress: [{ports: [{port: http}]}]}
";

struct Files(tempfile::TempDir);

impl Files {
    fn new() -> Self {
        let files = Self(tempfile::tempdir().expect("a directory"));
        std::fs::write(files.cluster(), CLUSTER).expect("a file");
        files
    }

    fn cluster(&self) -> PathBuf {
        self.0.path().join("cluster.yaml")
    }

    fn run(&self, arguments: &[&str], input: &str) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_bulkhead"));
        command.args(arguments).current_dir(self.0.path());
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("the binary runs");
        child.stdin.take().expect("its input").write_all(input.as_bytes()).expect("it reads");
        child.wait_with_output().expect("it ends")
    }

    /// What it prints, once it has ended with this code.
    #[track_caller]
    fn ends(&self, arguments: &[&str], code: i32) -> (String, String) {
        let output = self.run(arguments, "");
        let (out, err) = (text(&output.stdout), text(&output.stderr));
        assert_eq!(output.status.code(), Some(code), "{arguments:?}\n{out}\n{err}");
        (out, err)
    }

    /// One answer per question, in order.
    #[track_caller]
    fn batch(&self, flags: &[&str], questions: &[Value]) -> Vec<Value> {
        let input: String = questions.iter().map(|question| format!("{question}\n")).collect();
        let arguments: Vec<&str> = ["decide", "--batch"].iter().chain(flags).copied().collect();
        let output = self.run(&arguments, &input);
        let (out, err) = (text(&output.stdout), text(&output.stderr));
        assert!(output.status.success(), "{out}\n{err}");
        out.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn verdicts(answer: &Value) -> Vec<&str> {
    let results = answer["results"].as_array().expect("results");
    results.iter().map(|result| result["verdict"].as_str().expect("a verdict")).collect()
}

#[test]
fn one_connection_ends_with_its_verdict_and_names_the_rule() {
    let files = Files::new();
    let asked = |from: &'static str, to: &'static str, port: &'static str| {
        ["decide", "-f", "cluster.yaml", "--from", from, "--to", to, "--port", port]
    };
    let (out, _) = files.ends(&asked("workload:web", "workload:db.h2", "5432"), 0);
    assert!(out.contains("allow") && out.contains("ingress[0]"), "{out}");
    let (out, _) = files.ends(&asked("workload:web", "workload:db", "5433"), 1);
    assert!(out.contains("deny") && out.contains("db"), "{out}");
    files.ends(&asked("web", "10.0.0.2", "5432"), 0);
    files.ends(&asked("192.0.2.1", "shop/api", "8080"), 0);
    files.ends(&asked("ip:192.0.2.1", "pod:shop/api", "8081"), 1);
    let (_, err) = files.ends(&asked("workload:wbe", "workload:db", "1"), 2);
    assert!(err.contains("wbe"), "{err}");
    let (_, err) = files.ends(&asked("ip:192.0.2.1", "ip:2001:db8::1", "1"), 2);
    assert!(err.contains("no family of addresses in common"), "{err}");
    // Both judges agree, and either may be asked alone.
    for judge in ["--reference", "--check"] {
        let mut arguments = asked("workload:web", "workload:db", "5432").to_vec();
        arguments.push(judge);
        files.ends(&arguments, 0);
    }
}

#[test]
fn a_file_with_an_object_twice_is_refused_with_both_places() {
    let files = Files::new();
    let arguments =
        ["-f", "cluster.yaml", "-f", "cluster.yaml", "--from", "ip:1.1.1.1", "--to", "ip:1.1.1.2"];
    let arguments: Vec<&str> = ["decide"].into_iter().chain(arguments).collect();
    let (_, err) = files.ends(&arguments, 1);
    assert!(err.contains("Policy/db is given twice, first at cluster.yaml:13:18"), "{err}");
}

#[test]
fn a_batch_goes_from_state_to_state() {
    let files = Files::new();
    let namespace = json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": "n" } });
    let pod = |name: &str, address: &str| {
        json!({ "apiVersion": "v1", "kind": "Pod", "metadata": { "name": name, "namespace": "n", "labels": { "app": name } },
                "spec": { "containers": [] }, "status": { "podIPs": [{ "ip": address }] } })
    };
    let policy = |ingress: Value| {
        json!({ "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": { "name": "p", "namespace": "n" },
                "spec": { "podSelector": { "matchLabels": { "app": "b" } }, "ingress": ingress } })
    };
    let from_a = json!([{ "from": [{ "podSelector": { "matchLabels": { "app": "a" } } }] }]);
    let pods = [namespace, pod("a", "10.0.0.1"), pod("b", "10.0.0.2"), pod("c", "10.0.0.3")];
    let state = |policies: &[Value]| [&pods[..], policies].concat();
    let flows = json!([
        { "from": "pod:n/a", "to": "pod:n/b", "port": 80, "protocol": "TCP" },
        { "from": "pod:n/c", "to": "pod:n/b", "port": 80, "protocol": "UDP" },
        { "from": "ip:192.0.2.9", "to": "pod:n/b", "port": 80 },
    ]);
    let ask = |id: &str, reset: bool, manifests: Vec<Value>| json!({ "id": id, "reset": reset, "manifests": manifests, "flows": flows });
    let broken = json!({ "id": "broken", "reset": false, "flows": flows, "manifests": [
        { "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": { "name": "p", "namespace": "n" },
          "spec": { "podSelectr": {} } },
    ] });
    let external = json!({ "apiVersion": "policy.networking.k8s.io/v1alpha2", "kind": "ClusterNetworkPolicy",
        "metadata": { "name": "names" }, "spec": { "tier": "Admin", "priority": 1, "subject": { "namespaces": {} },
        "egress": [ { "action": "Accept", "to": [{ "domainNames": ["example.org"] }] },
                    { "action": "Deny", "to": [{ "networks": ["0.0.0.0/0"] }] } ] } });
    let names = json!({ "id": "names", "reset": true, "manifests": state(&[external]), "dns": { "example.org": ["192.0.2.80"] },
        "flows": [{ "from": "pod:n/a", "to": "ip:192.0.2.80", "port": 443 }, { "from": "pod:n/a", "to": "ip:192.0.2.81", "port": 443 }] });
    let questions = [
        ask("open", true, state(&[])),
        ask("isolated", false, state(&[policy(json!([]))])),
        ask("some", false, state(&[policy(from_a.clone())])),
        broken,
        // Like two applies, one after the other.
        ask("later", false, state(&[policy(json!([])), policy(from_a)])),
        ask("gone", false, state(&[])),
        names,
    ];
    for flags in [&[][..], &["--reference"], &["--check"]] {
        let answers = files.batch(flags, &questions);
        let ids: Vec<_> = answers.iter().map(|answer| answer["id"].as_str().expect("its id")).collect();
        assert_eq!(ids, ["open", "isolated", "some", "broken", "later", "gone", "names"]);
        assert_eq!(verdicts(&answers[0]), ["allow", "allow", "allow"], "{flags:?}");
        assert_eq!(verdicts(&answers[1]), ["deny", "deny", "deny"], "{flags:?}");
        assert_eq!(verdicts(&answers[2]), ["allow", "deny", "deny"], "{flags:?}");
        assert_eq!(verdicts(&answers[3]), [""; 0], "{flags:?}");
        let errors = answers[3]["errors"].to_string();
        assert!(errors.contains("manifests[0]") && errors.contains("did you mean podSelector?"), "{errors}");
        assert_eq!(verdicts(&answers[4]), ["allow", "deny", "deny"], "{flags:?}");
        assert_eq!(verdicts(&answers[5]), ["allow", "allow", "allow"], "{flags:?}");
        assert_eq!(verdicts(&answers[6]), ["allow", "deny"], "{flags:?}: {}", answers[6]);
        let decided = &answers[2]["results"][0]["ingress"];
        assert_eq!(
            (&decided["policy"], &decided["rule"]),
            (&json!("NetworkPolicy/n/p"), &json!(0)),
            "{decided}"
        );
    }
}

#[test]
fn a_line_that_is_no_question_spoils_only_itself() {
    let files = Files::new();
    let input = "{\"id\": 1\n\n{\"id\":\"b\",\"manifests\":[],\"flows\":[{\"from\":\"ip:10.0.0.1\",\"to\":\"ip:10.0.0.2\",\"port\":1}]}\n";
    let output = files.run(&["decide", "--batch"], input);
    let lines: Vec<Value> =
        text(&output.stdout).lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    assert_eq!(lines.len(), 2, "{lines:?}");
    assert_ne!(lines[0]["errors"], json!([]));
    assert_eq!(verdicts(&lines[1]), ["allow"]);
}

#[test]
fn explain_needs_no_controller() {
    let files = Files::new();
    let (out, _) = files.ends(&["explain", "policy", "db", "-f", "cluster.yaml"], 0);
    for part in ["db.h2", "web.h1", "h2"] {
        assert!(out.contains(part), "{out}");
    }
    let (out, _) = files.ends(&["explain", "workload", "db", "-f", "cluster.yaml"], 0);
    assert!(out.contains("role == \"db\"") && out.contains("application"), "{out}");
    let (_, err) = files.ends(&["explain", "policy", "dc", "-f", "cluster.yaml"], 1);
    assert!(err.contains("dc"), "{err}");
}

#[test]
fn convert_shows_others_in_the_native_language_and_means_the_same() {
    let files = Files::new();
    let (native, _) = files.ends(&["convert", "-f", "cluster.yaml"], 0);
    assert!(native.contains("bulkhead.dev/v1") && !native.contains("networking.k8s.io"), "{native}");
    std::fs::write(files.0.path().join("native.yaml"), &native).expect("a file");
    for (port, code) in [("8080", 0), ("8081", 1)] {
        let arguments =
            ["decide", "-f", "native.yaml", "--from", "ip:192.0.2.1", "--to", "ip:10.1.0.7", "--port", port];
        files.ends(&arguments, code);
    }
}
