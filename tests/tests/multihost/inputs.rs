//! Wrong files: refused with a place and a proposal, all or nothing.

use anyhow::ensure;
use bulkhead_testbed::eventually;

use crate::common::{member, start};

const GOOD: &str = "apiVersion: bulkhead.dev/v1
kind: Policy
metadata: {name: good}
spec:
  appliesTo: role == 'a'
  ingress: []
";

/// What is wrong, the file, and what the answer must contain.
const WRONG: [(&str, &str, &[&str]); 7] = [
    (
        "operator",
        "apiVersion: bulkhead.dev/v1\nkind: Policy\nmetadata: {name: bad}\nspec:\n  appliesTo: role = 'a'\n  ingress: []\n",
        &["operator.yaml:5:", "=="],
    ),
    (
        "field",
        "apiVersion: bulkhead.dev/v1\nkind: Policy\nmetadata: {name: bad}\nspec:\n  appliesTo: role == 'a'\n  ingres: []\n",
        &["field.yaml:6:3", "ingress"],
    ),
    (
        "kind",
        "apiVersion: bulkhead.dev/v1\nkind: Polcy\nmetadata: {name: bad}\nspec: {}\n",
        &["kind.yaml:2:7", "Policy"],
    ),
    (
        "port",
        "apiVersion: bulkhead.dev/v1\nkind: Policy\nmetadata: {name: bad}\nspec:\n  appliesTo: role == 'a'\n  ingress:\n  - action: Allow\n    ports: [tcp/70000]\n",
        &["port.yaml:8:13", "70000"],
    ),
    (
        "tier",
        "apiVersion: bulkhead.dev/v1\nkind: Policy\nmetadata: {name: bad}\nspec:\n  tier: aplication\n  appliesTo: role == 'a'\n  ingress: []\n",
        &["tier.yaml", "application"],
    ),
    (
        "action",
        "apiVersion: bulkhead.dev/v1\nkind: Policy\nmetadata: {name: bad}\nspec:\n  appliesTo: role == 'a'\n  ingress:\n  - action: Alow\n",
        &["action.yaml:7:13", "Allow"],
    ),
    (
        "twice",
        "apiVersion: bulkhead.dev/v1\nkind: Policy\nmetadata: {name: bad}\nspec: {appliesTo: all(), ingress: []}\n---\napiVersion: bulkhead.dev/v1\nkind: Policy\nmetadata: {name: bad}\nspec: {appliesTo: all(), ingress: []}\n",
        &["twice.yaml:", "bad"],
    ),
];

#[test]
fn wrong_files_are_refused_whole_with_place_and_proposal() {
    let bulkhead = start("bt-input", &["host-1"]);
    eventually("the host is in the repository", || {
        let hosts = bulkhead.json(&["get", "hosts"])?.to_string();
        ensure!(hosts.contains("host-1"), "{hosts}");
        Ok(())
    })
    .unwrap();
    let good = bulkhead.file("good.yaml", GOOD).unwrap().display().to_string();
    for (name, text, wanted) in WRONG {
        let file = bulkhead.file(&format!("{name}.yaml"), text).unwrap().display().to_string();
        let before = bulkhead.status().unwrap()["controller"]["revision"].clone();
        for arguments in [vec!["apply", "-f", &good, "-f", &file], vec!["apply", "-f", &file, "-f", &good]] {
            let output = bulkhead.cli(&arguments).unwrap();
            assert_eq!(output.code, 1, "{name}: {output:?}");
            for part in wanted {
                assert!(output.stderr.contains(part), "{name}: {part:?} is not in\n{}", output.stderr);
            }
        }
        let after = bulkhead.status().unwrap()["controller"]["revision"].clone();
        assert_eq!(before, after, "{name}: nothing was applied");
        let list = bulkhead.ok(&["get", "policies"]).unwrap();
        assert!(!list.contains("good") && !list.contains("bad"), "{name}: {list}");
    }
    let missing = bulkhead.cli(&["apply", "-f", "/no/such/file.yaml"]).unwrap();
    assert!(missing.code != 0 && missing.stderr.contains("/no/such/file.yaml"), "{missing:?}");
    let unreachable = bulkhead.cli(&["get", "policies", "--agent-socket", "/nowhere"]).unwrap();
    assert_eq!(unreachable.code, 0, "the agent's socket is no concern of get");
    let diff = bulkhead.cli(&["diff", "-f", &good]).unwrap();
    assert_eq!(diff.code, 1, "there is a difference: {diff:?}");
    bulkhead.ok(&["apply", "-f", &good]).unwrap();
    assert_eq!(bulkhead.cli(&["diff", "-f", &good]).unwrap().code, 0, "there is none any more");
    bulkhead.ok(&["delete", "-f", &good]).unwrap();
}

#[test]
fn wrong_registrations_are_refused_and_names_are_kept_apart() {
    let bulkhead = start("bt-names", &["host-1", "host-2"]);
    let one = member(&bulkhead, "host-1", "web", &[("role", "web")], &[80]);
    let error = bulkhead
        .on_host("host-1", &["workload", "add", "ghost", "--netns", "/run/netns/no-such-namespace"])
        .unwrap_err()
        .to_string();
    assert!(error.contains("/run/netns/no-such-namespace"), "{error}");
    for bad in [["workload", "remove", "nobody"], ["workload", "remove", "No_Name"]] {
        let error = bulkhead.on_host("host-1", &bad).unwrap_err().to_string();
        assert!(error.contains(bad[2]), "{error}");
    }
    // The same short name on another host is another workload.
    let netns = one.workload.netns.path();
    let other = bulkhead.lab.workload("host-2", "web2").unwrap();
    let path = other.netns.path().display().to_string();
    bulkhead.on_host("host-2", &["workload", "add", "web", "--netns", &path, "--label", "role=web"]).unwrap();
    eventually("both are known", || {
        let list = bulkhead.json(&["get", "workloads"])?.to_string();
        ensure!(list.contains("web.host-1") && list.contains("web.host-2"), "{list}");
        Ok(())
    })
    .unwrap();
    let output =
        bulkhead.cli(&["explain", "--from", "web", "--to", "web.host-1", "--port", "tcp/80"]).unwrap();
    assert!(output.code == 1 && output.stderr.contains("web.host-2"), "{output:?} {}", netns.display());
}
