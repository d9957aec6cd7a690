//! `test` and `lint` as people and CI systems run them: the built binary on the examples and on broken ones.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn bulkhead(directory: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_bulkhead"));
    command.args(arguments).current_dir(directory).env_remove("NO_COLOR");
    command.output().expect("the binary runs")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[track_caller]
fn ends(output: &Output, code: i32) -> (String, String) {
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    assert_eq!(output.status.code(), Some(code), "{out}\n{err}");
    (out, err)
}

/// A directory with these files.
fn directory(files: &[(&str, &str)]) -> tempfile::TempDir {
    let directory = tempfile::tempdir().expect("a directory");
    for (name, text) in files {
        let path = directory.path().join(name);
        std::fs::create_dir_all(path.parent().expect("a parent")).expect("a directory");
        std::fs::write(path, text).expect("a file");
    }
    directory
}

const WORLD: &str = "\
apiVersion: bulkhead.dev/v1
kind: Workload
metadata: {name: web.h1, labels: {role: web}}
spec: {host: h1, addresses: [10.0.0.1]}
---
apiVersion: bulkhead.dev/v1
kind: Workload
metadata: {name: db.h1, labels: {role: db}}
spec: {host: h1, addresses: [10.0.0.2]}
---
apiVersion: bulkhead.dev/v1
kind: Policy
metadata: {name: db}
spec:
  appliesTo: role == 'db'
  ingress: [{action: Allow, from: {selector: role == 'web'}, ports: [tcp/5432]}]
";

const ONE_FAILS: &str = "\
name: a <suite> & more
manifests: [world.yaml]
tests:
- {name: right, from: workload:web.h1, to: workload:db.h1, port: tcp/5432, verdict: allow, by: db}
- name: wrong & <odd>
  from: workload:web.h1
  to: workload:db.h1
  port: tcp/22
  verdict: allow
";

/// What a SARIF log must have to be one (2.1.0, sections 3.13, 3.14, 3.27, 3.28, 3.30).
fn check_sarif(log: &Value) -> &Vec<Value> {
    assert_eq!(log["version"], "2.1.0");
    let run = &log["runs"][0];
    assert!(run["tool"]["driver"]["name"].is_string());
    let rules = run["tool"]["driver"]["rules"].as_array().expect("rules");
    let results = run["results"].as_array().expect("results");
    for result in results {
        let index = usize::try_from(result["ruleIndex"].as_u64().expect("an index")).expect("small");
        assert_eq!(rules[index]["id"], result["ruleId"]);
        assert!(["error", "warning", "note"].contains(&result["level"].as_str().expect("a level")));
        assert!(!result["message"]["text"].as_str().expect("a message").is_empty());
        let place = &result["locations"][0]["physicalLocation"];
        let uri = place["artifactLocation"]["uri"].as_str().expect("a file");
        assert!(!uri.contains(' '), "{uri}");
        if let Some(region) = place.get("region") {
            assert!(region["startLine"].as_u64() >= Some(1) && region["startColumn"].as_u64() >= Some(1));
        }
    }
    results
}

fn json_file(path: &Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(path).expect("written")).expect("JSON")
}

#[test]
fn the_suites_of_the_examples_pass() {
    let (out, _) = ends(&bulkhead(&root(), &["test", "examples"]), 0);
    for suite in ["examples/applications/", "examples/kubernetes/", "examples/calico/"] {
        assert!(out.contains(suite), "{suite} was not run:\n{out}");
    }
    assert!(out.contains(" passed, 0 failed in "), "{out}");
    let answer = bulkhead(&root(), &["test", "examples/*/credit.test.yaml", "-o", "json", "--filter", "DMZ"]);
    let (out, _) = ends(&answer, 0);
    let results: Value = serde_json::from_str(&out).expect("JSON");
    assert_eq!((&results["passed"], &results["failed"]), (&1.into(), &0.into()));
}

#[test]
fn a_failed_test_ends_with_1_and_says_who_decided_and_why() {
    let directory = directory(&[("world.yaml", WORLD), ("a.test.yaml", ONE_FAILS)]);
    let files = ["--junit", "j.xml", "--sarif", "s.json"];
    let (out, _) = ends(&bulkhead(directory.path(), &[&["test"], &files[..]].concat()), 1);
    for part in [
        "FAIL  wrong & <odd>",
        "expected at a.test.yaml:9:12",
        "workload:web.h1 → workload:db.h1 on tcp/22: expected allow, found deny by application (end of tier) at ingress",
        "ingress of the destination, db.h1: deny by application (end of tier)",
        "application/db ingress[0]: no match: other port",
        "1 passed, 1 failed in ",
    ] {
        assert!(out.contains(part), "{part}:\n{out}");
    }
    // The source's side let it through and is not shown.
    assert!(!out.contains("egress of the source"), "{out}");

    let xml = std::fs::read_to_string(directory.path().join("j.xml")).expect("written");
    let xml = roxmltree::Document::parse(&xml).expect("XML");
    let suites = xml.root_element();
    assert_eq!((suites.tag_name().name(), suites.attribute("failures")), ("testsuites", Some("1")));
    let suite = suites.first_element_child().expect("a suite");
    assert_eq!(suite.attribute("name"), Some("a <suite> & more"));
    let cases: Vec<_> = suite.children().filter(|node| node.has_tag_name("testcase")).collect();
    assert_eq!(cases.len(), 2);
    assert_eq!(cases[1].attribute("name"), Some("wrong & <odd>"));
    let failure = cases[1].first_element_child().expect("a failure");
    assert_eq!(failure.tag_name().name(), "failure");
    assert!(failure.text().expect("details").contains("no match: other port"));

    let log = json_file(&directory.path().join("s.json"));
    let results = check_sarif(&log);
    assert_eq!(results.len(), 1);
    let place = &results[0]["locations"][0]["physicalLocation"];
    assert_eq!(place["artifactLocation"]["uri"], "a.test.yaml");
    assert_eq!(place["region"]["startLine"], 9);
}

#[test]
fn what_cannot_be_asked_ends_with_2() {
    let test = |body: &str| format!("manifests: [world.yaml]\ntests:\n- {body}\n");
    let cases = [
        (test("{from: workload:wbe.h1, to: workload:db.h1, port: tcp/1, verdict: deny}"), "did you mean workload:web.h1?"),
        (test("{from: workload:web.h1, to: workload:db.h1, port: tcp/1, verdit: deny}"), "t.test.yaml:3:60: tests[0]: unknown field"),
        ("manifests: [none.yaml]\ntests: [{from: 'ip:192.0.2.1', to: 'ip:192.0.2.2', port: tcp/1, verdict: deny}]\n".into(), "t.test.yaml:1:13: cannot read none.yaml"),
        ("manifests: ['n*.yaml']\ntests: [{from: 'ip:192.0.2.1', to: 'ip:192.0.2.2', port: tcp/1, verdict: deny}]\n".into(), "nothing matches this pattern"),
    ];
    for (file, message) in cases {
        let directory = directory(&[("world.yaml", WORLD), ("t.test.yaml", &file)]);
        let arguments = ["test", "t.test.yaml", "--junit", "j.xml", "--sarif", "s.json"];
        let (_, err) = ends(&bulkhead(directory.path(), &arguments), 2);
        assert!(err.contains(message), "{message}:\n{err}");
        let xml = std::fs::read_to_string(directory.path().join("j.xml")).expect("written");
        let xml = roxmltree::Document::parse(&xml).expect("XML");
        let log = json_file(&directory.path().join("s.json"));
        let results = check_sarif(&log);
        assert!(results.iter().all(|result| result["ruleId"] == "BHT002"));
        assert_eq!(xml.root_element().attribute("errors"), Some(results.len().to_string().as_str()));
    }
}

#[test]
fn no_test_at_all_is_no_success() {
    let empty = directory(&[("world.yaml", WORLD)]);
    let (_, err) = ends(&bulkhead(empty.path(), &["test"]), 2);
    assert!(err.contains("there is no test in ."), "{err}");
    let some =
        directory(&[("world.yaml", WORLD), ("sub/a.test.yml", &ONE_FAILS.replace("world", "../world"))]);
    let (_, err) = ends(&bulkhead(some.path(), &["test", "--filter", "nothing"]), 2);
    assert!(err.contains("with \"nothing\" in its name"), "{err}");
    ends(&bulkhead(some.path(), &["test", "--filter", "right"]), 0);
    ends(&bulkhead(some.path(), &["test", "nowhere"]), 2);
}

#[test]
fn fail_fast_stops_and_an_expected_author_counts() {
    let test = "\
manifests: [world.yaml]
tests:
- {name: one, from: workload:web.h1, to: workload:db.h1, port: tcp/5432, verdict: allow, by: bd}
- {name: two, from: workload:web.h1, to: workload:db.h1, port: tcp/5432, verdict: deny}
";
    let directory = directory(&[("world.yaml", WORLD), ("a.test.yaml", test)]);
    let (out, _) = ends(&bulkhead(directory.path(), &["test", "--fail-fast"]), 1);
    assert!(out.contains("0 passed, 1 failed"), "{out}");
    assert!(
        out.contains("expected allow by bd (there is no policy \"bd\"; did you mean db?), found allow by"),
        "{out}"
    );
    let (out, _) = ends(&bulkhead(directory.path(), &["test"]), 1);
    assert!(out.contains("0 passed, 2 failed"), "{out}");
}

const SUSPICIOUS: &str = "\
apiVersion: bulkhead.dev/v1
kind: Policy
metadata: {name: p}
spec:
  appliesTo: role == 'db'
  ingress:
  - action: Allow
    from: {selector: rolle == 'web'}
    ports: [tcp/1-100]
  - action: Deny
    from:
      selector: rolle == 'web' && has(zone)
    ports: [tcp/80]
";

#[test]
fn lint_finds_nothing_in_the_examples() {
    let all = ["applications", "applications/inventory", "kubernetes", "calico"];
    let files: Vec<String> = all.iter().map(|name| format!("examples/{name}")).collect();
    let arguments: Vec<&str> = files.iter().flat_map(|file| ["-f", file.as_str()]).collect();
    let (out, _) = ends(&bulkhead(&root(), &[&["lint"], &arguments[..]].concat()), 0);
    assert!(out.starts_with("0 errors, 0 warnings"), "{out}");
}

#[test]
fn findings_have_places_and_end_with_1() {
    let directory =
        directory(&[("p.yaml", SUSPICIOUS), ("w/world.yaml", WORLD), ("w/x.test.yaml", "tests: []")]);
    let lint =
        |more: &[&str]| bulkhead(directory.path(), &[&["lint", "-f", "p.yaml", "-f", "w"], more].concat());
    let (out, _) = ends(&lint(&["--sarif", "s.json"]), 1);
    for line in [
        "p.yaml:8:22: warning BH007: p: nothing has a label \"rolle\"; did you mean role?",
        "p.yaml:10:5: warning BH001: p ingress[1] is never reached: ingress[0] decides all that it matches",
        "p.yaml:12:17: warning BH007: p: nothing has a label \"rolle\"; did you mean role?",
        "0 errors, 3 warnings, 0 notes",
    ] {
        assert!(out.contains(line), "{line}:\n{out}");
    }
    let log = json_file(&directory.path().join("s.json"));
    let results = check_sarif(&log);
    let lines: Vec<_> = results.iter().map(|result| result["ruleId"].as_str().expect("a code")).collect();
    assert_eq!(lines, ["BH007", "BH001", "BH007"]);

    let (out, _) = ends(&lint(&["--allow", "BH001", "--allow", "unknown-label"]), 0);
    assert!(out.starts_with("0 errors, 0 warnings"), "{out}");
    let (out, _) = ends(&lint(&["--deny", "bh001", "-o", "json"]), 1);
    let found: Value = serde_json::from_str(&out).expect("JSON");
    assert_eq!(found["complete"], true);
    assert_eq!(found["findings"][1]["severity"], "error");
}

#[test]
fn fields_of_other_systems_have_their_own_places() {
    let policy = "\
apiVersion: projectcalico.org/v3
kind: GlobalNetworkPolicy
metadata: {name: g}
spec:
  selector: role == 'web'
  ingress:
  - action: Allow
    source:
      selector: rolle == 'web'
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: n, namespace: x}
spec:
  ingress: []
  podSelector: {matchLabels: {app: queue}}
";
    let directory = directory(&[("p.yaml", policy), ("world.yaml", WORLD)]);
    let (out, _) = ends(&bulkhead(directory.path(), &["lint", "-f", "."]), 1);
    for line in [
        "p.yaml:9:17: warning BH007: GlobalNetworkPolicy/g: ",
        "p.yaml:16:16: warning BH005: NetworkPolicy/x/n ",
    ] {
        assert!(out.contains(line), "{line}:\n{out}");
    }
}

#[test]
fn lint_of_what_cannot_be_read_ends_with_2() {
    let directory = directory(&[("p.yaml", &SUSPICIOUS.replace("ingress", "ingres"))]);
    let (_, err) = ends(&bulkhead(directory.path(), &["lint", "-f", "p.yaml"]), 2);
    assert!(err.contains("p.yaml:6:3") && err.contains("did you mean ingress?"), "{err}");
    let (_, err) = ends(&bulkhead(directory.path(), &["lint", "-f", "p.yaml", "-f", "none"]), 2);
    assert!(err.contains("cannot read none"), "{err}");
    let twice = ["lint", "-f", "p.yaml", "-f", "p.yaml"];
    std::fs::write(directory.path().join("p.yaml"), SUSPICIOUS).expect("a file");
    let (_, err) = ends(&bulkhead(directory.path(), &twice), 2);
    assert!(err.contains("Policy/p is given twice, first at p.yaml:3:18"), "{err}");
    ends(&bulkhead(directory.path(), &["lint", "-f", "p.yaml", "--allow", "BH999"]), 2);
    ends(&bulkhead(directory.path(), &["lint"]), 2);
}

#[test]
fn every_code_explains_itself() {
    let (out, _) = ends(&bulkhead(&root(), &["lint", "--list", "-o", "json"]), 0);
    let codes: Value = serde_json::from_str(&out).expect("JSON");
    for info in codes.as_array().expect("a list") {
        let code = info["code"].as_str().expect("a code");
        let (out, _) = ends(&bulkhead(&root(), &["lint", "--explain", code]), 0);
        assert!(out.contains(info["explanation"].as_str().expect("a text")), "{out}");
    }
}

/// The project's own cases for every numbered rule: of the design, of Kubernetes, of Calico.
#[test]
fn every_numbered_rule_has_its_cases_and_they_pass() {
    let output = bulkhead(&root(), &["test", "tests/policy", "-o", "json"]);
    let (out, _) = ends(&output, 0);
    for rule in ["4.1", "4.9", "4.11", "N1 ", "N10", "N18", "C1 ", "C9 C10", "C14", "C15", "A1 A2", "A4"] {
        assert!(out.contains(&format!("\"{rule}")), "{rule} has no case");
    }
    for rule in [
        "end of tier",
        "after the last one to the profiles",
        "staged",
        "notSelector",
        "named ports",
        "v4 blocks",
    ] {
        assert!(out.contains(rule), "{rule} has no case");
    }
}
