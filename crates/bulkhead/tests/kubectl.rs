//! kubectl against the repository, as people and GitOps tools use it: the real client, the built binary, and no Kubernetes.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "kubectl/setup.rs"]
mod setup;

use std::io::{BufRead, BufReader};

use setup::Setup;

const POLICY: &str = "\
apiVersion: bulkhead.dev/v1
kind: Policy
metadata: {name: db, labels: {team: shop}}
spec:
  tier: application
  appliesTo: role == \"db\"
  ingress:
  - action: Allow
    from: {selector: role == \"web\"}
    ports: [tcp/5432]
";

const FOREIGN: &str = "\
apiVersion: v1
kind: Namespace
metadata: {name: shop}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: web, namespace: shop}
spec: {podSelector: {matchLabels: {app: web}}, policyTypes: [Ingress]}
---
apiVersion: projectcalico.org/v3
kind: NetworkPolicy
metadata: {name: web, namespace: shop}
spec: {selector: app == 'web', types: [Ingress], ingress: [{action: Allow}]}
---
apiVersion: projectcalico.org/v3
kind: GlobalNetworkPolicy
metadata: {name: all}
spec: {selector: all(), types: [Egress], egress: [{action: Allow}]}
";

#[test]
fn what_kubectl_writes_bulkhead_shows_and_the_other_way_round() {
    let setup = Setup::new();
    let versions = setup.kubectl(&["api-versions"]);
    assert!(versions.contains("bulkhead.dev/v1") && versions.contains("networking.k8s.io/v1"), "{versions}");
    let resources = setup.kubectl(&["api-resources"]);
    for line in ["policies", "tiers", "networkpolicies", "globalnetworkpolicies", "adminnetworkpolicies"] {
        assert!(resources.lines().any(|found| found.starts_with(line)), "{line}: {resources}");
    }
    setup.file("policy.yaml", POLICY);
    assert_eq!(setup.kubectl(&["apply", "-f", "policy.yaml"]), "policy.bulkhead.dev/db created\n");
    assert_eq!(setup.kubectl(&["apply", "-f", "policy.yaml"]), "policy.bulkhead.dev/db unchanged\n");
    let both = [setup.bulkhead(&["get", "policies"]), setup.kubectl(&["get", "policies"])];
    for table in &both {
        let mut lines = table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "));
        assert_eq!(lines.next().unwrap(), "NAME TIER ORDER MODE INGRESS EGRESS APPLIES TO", "{table}");
        assert_eq!(lines.next().unwrap(), "db application last Enforce 1 rules - role == \"db\"", "{table}");
    }
    // Changes of kubectl are seen by bulkhead.
    setup.kubectl(&["label", "policy", "db", "env=prod"]);
    setup.kubectl(&["annotate", "policy", "db", "note=kept"]);
    setup.kubectl(&["patch", "policy", "db", "--type", "merge", "-p", r#"{"spec":{"order":5}}"#]);
    let operations =
        r#"[{"op":"test","path":"/spec/order","value":5},{"op":"add","path":"/spec/mode","value":"Audit"}]"#;
    setup.kubectl(&["patch", "policy", "db", "--type", "json", "-p", operations]);
    setup.kubectl_with(&[("KUBE_EDITOR", "sed -i s/5432/5433/")], &["edit", "policy", "db"]);
    let seen = setup.bulkhead(&["get", "policy", "db", "-o", "yaml"]);
    for part in ["env: prod", "note: kept", "order: 5", "mode: Audit", "tcp/5433"] {
        assert!(seen.contains(part), "{part}: {seen}");
    }
    assert!(!seen.contains("managedFields"), "{seen}");
    assert_eq!(setup.bulkhead(&["get", "policies", "-l", "env == 'prod'"]).lines().count(), 2);
    assert_eq!(
        setup.kubectl(&["get", "policies", "-l", "env=prod,!other", "-o", "name"]),
        "policy.bulkhead.dev/db\n"
    );
    assert_eq!(setup.kubectl(&["get", "policies", "-l", "env notin (prod)", "-o", "name"]), "");
    let chosen = setup.kubectl(&["get", "tiers", "--field-selector", "metadata.name=baseline", "-o", "name"]);
    assert_eq!(chosen, "tier.bulkhead.dev/baseline\n");
    // And the other way round, in a namespace too.
    setup.file("other.yaml", &POLICY.replace("name: db", "name: other, namespace: shop"));
    setup.bulkhead(&["apply", "-f", "other.yaml"]);
    let name =
        setup.kubectl(&["get", "policy", "other", "-n", "shop", "-o", "jsonpath={.metadata.namespace}"]);
    assert_eq!(name, "shop");
    let shop = setup.bulkhead(&["get", "policies", "-n", "shop"]);
    assert!(shop.lines().count() == 2 && shop.contains("shop/other"), "{shop}");
    let one = setup.bulkhead(&["get", "policy", "other", "-n", "shop", "-o", "json"]);
    assert_eq!(one, setup.bulkhead(&["get", "policy", "shop/other", "-o", "json"]));
    let all = setup.kubectl(&["get", "policies", "-A", "--chunk-size=1", "-o", "name"]);
    assert_eq!(all, "policy.bulkhead.dev/db\npolicy.bulkhead.dev/other\n", "two pages");
    let explained = setup.kubectl(&["explain", "policy.spec.ingress.action"]);
    assert!(explained.contains("Pass asks the next tier"), "{explained}");
    // What one shows the other takes.
    let shown = setup.kubectl(&["get", "policy", "db", "-o", "yaml"]);
    setup.file("shown.yaml", &shown);
    assert!(setup.bulkhead(&["apply", "-f", "shown.yaml"]).contains("unchanged"));
    assert_eq!(setup.kubectl(&["delete", "policy", "db"]).trim(), "policy.bulkhead.dev \"db\" deleted");
    assert!(setup.bulkhead(&["get", "policies"]).lines().all(|line| !line.starts_with("db")));
}

#[test]
fn objects_of_kubernetes_and_calico_are_below_their_own_groups() {
    let setup = Setup::new();
    setup.file("foreign.yaml", FOREIGN);
    let applied = setup.kubectl(&["apply", "-f", "foreign.yaml"]);
    assert_eq!(applied.matches(" created").count(), 4, "{applied}");
    assert_eq!(setup.kubectl(&["apply", "-f", "foreign.yaml"]).matches(" unchanged").count(), 4);
    assert!(setup.bulkhead(&["get", "networkpolicies"]).contains("shop/web"));
    assert!(setup.bulkhead(&["get", "networkpolicies.projectcalico.org"]).contains("shop/web"));
    let of = |resource: &str| {
        setup.kubectl(&["get", resource, "-n", "shop", "-o", "jsonpath={.items[*].apiVersion}"])
    };
    assert_eq!(of("networkpolicies"), "networking.k8s.io/v1");
    assert_eq!(of("networkpolicies.v3.projectcalico.org"), "projectcalico.org/v3");
    assert_eq!(of("networkpolicies.v1.crd.projectcalico.org"), "crd.projectcalico.org/v1");
    assert!(setup.kubectl(&["get", "ns"]).contains("shop"));
    // Clients that know a kind by heart merge strategically.
    let change = r#"{"spec":{"policyTypes":["Ingress","Egress"]}}"#;
    setup.kubectl(&["patch", "networkpolicy", "web", "-n", "shop", "-p", change]);
    setup.file("changed.yaml", &FOREIGN.replace("app: web}", "app: shop}"));
    setup.kubectl(&["apply", "-f", "changed.yaml"]);
    let seen = setup.bulkhead(&["get", "networkpolicy", "shop/web", "-o", "json"]);
    assert!(seen.contains(r#""app": "shop""#) && !seen.contains("Egress"), "{seen}");
    let gone = setup.kubectl(&["delete", "-f", "foreign.yaml"]);
    assert_eq!(gone.matches(" deleted").count(), 4, "{gone}");
    assert_eq!(setup.bulkhead(&["get", "networkpolicies"]), "no networkpolicies\n");
}

#[test]
fn what_is_wrong_is_said_with_its_place_and_the_nearest_right_word() {
    let setup = Setup::new();
    setup.file("tier.yaml", &POLICY.replace("tier: application", "tier: aplication"));
    let message = setup.kubectl_fails(1, &["apply", "-f", "tier.yaml"]);
    assert!(
        message.contains("spec.tier: there is no tier \"aplication\"; did you mean application?"),
        "{message}"
    );
    setup.file("field.yaml", &POLICY.replace("tier: application", "tire: application"));
    for validate in ["--validate=true", "--validate=false"] {
        let message = setup.kubectl_fails(1, &["apply", validate, "-f", "field.yaml"]);
        assert!(message.contains("unknown field \"tire\""), "{message}");
    }
    let message = setup.kubectl_fails(1, &["get", "policy", "nobody"]);
    assert!(message.contains("(NotFound)") && message.contains("Policy/nobody"), "{message}");
    setup.file("policy.yaml", POLICY);
    setup.kubectl(&["create", "-f", "policy.yaml"]);
    let message = setup.kubectl_fails(1, &["create", "-f", "policy.yaml"]);
    assert!(message.contains("(AlreadyExists)"), "{message}");
    let message = setup.kubectl_fails(1, &["patch", "policy", "db", "-p", "{}"]);
    assert!(message.contains("merge-patch+json") && message.contains("--type merge"), "{message}");
    let stale = r#"{"metadata":{"resourceVersion":"1"},"spec":{"order":9}}"#;
    setup.kubectl(&["label", "policy", "db", "a=b"]);
    let message = setup.kubectl_fails(1, &["patch", "policy", "db", "--type", "merge", "-p", stale]);
    assert!(message.contains("somebody else has changed it"), "{message}");
    let message = setup.kubectl_fails(1, &["delete", "tier", "baseline"]);
    assert!(message.contains("predefined"), "{message}");
}

#[test]
fn a_directory_is_kept_in_step_as_gitops_tools_do_it() {
    let setup = Setup::new();
    setup.file(
        "app/kustomization.yaml",
        "namespace: shop\ncommonLabels: {app: shop}\nresources: [a.yaml, b.yaml]\n",
    );
    setup.file("app/a.yaml", &POLICY.replace("name: db", "name: a"));
    setup.file("app/b.yaml", &POLICY.replace("name: db", "name: b"));
    assert!(setup.kubectl_fails(1, &["diff", "-k", "app"]).is_empty(), "a difference is no error");
    setup.kubectl(&["apply", "-k", "app", "--dry-run=server"]);
    assert_eq!(setup.bulkhead(&["get", "policies"]), "no policies\n");
    let prune = setup.prune_flag();
    let apply = ["apply", "-k", "app", "--prune", "-l", "app=shop", prune, "bulkhead.dev/v1/Policy"];
    assert_eq!(setup.kubectl(&apply).matches(" created").count(), 2);
    setup.kubectl(&["diff", "-k", "app"]);
    setup.file("app/kustomization.yaml", "namespace: shop\ncommonLabels: {app: shop}\nresources: [a.yaml]\n");
    let applied = setup.kubectl(&apply);
    assert!(applied.contains("policy.bulkhead.dev/b pruned"), "{applied}");
    let left = setup.bulkhead(&["get", "policies"]);
    assert!(left.contains("shop/a") && !left.contains("shop/b"), "{left}");
    // Drift is seen, and goes.
    setup.kubectl(&[
        "patch",
        "policy",
        "a",
        "-n",
        "shop",
        "--type",
        "merge",
        "-p",
        r#"{"spec":{"mode":"Audit"}}"#,
    ]);
    let drifted =
        setup.kubectl(&["apply", "-k", "app", "--server-side", "--force-conflicts", "--dry-run=server"]);
    assert!(drifted.contains("serverside-applied"), "{drifted}");
    setup.file(
        "app/a.yaml",
        &POLICY.replace("name: db", "name: a").replace("tier:", "mode: Enforce\n  tier:"),
    );
    setup.kubectl(&["apply", "-k", "app"]);
    assert!(setup.bulkhead(&["get", "policies"]).contains("Enforce"));
}

#[test]
fn server_side_apply_knows_who_set_what() {
    let setup = Setup::new();
    let part = |spec: &str| {
        format!("apiVersion: bulkhead.dev/v1\nkind: Policy\nmetadata: {{name: db}}\nspec: {{{spec}}}\n")
    };
    setup.file("base.yaml", &part("appliesTo: role == 'db', ingress: [], order: 5"));
    let apply = |file: &'static str, manager: &'static str| {
        vec!["apply", "--server-side", "--field-manager", manager, "-f", file]
    };
    setup.kubectl(&apply("base.yaml", "team"));
    // Another one adds a field, and may not change those of the first.
    setup.file("mode.yaml", &part("mode: Audit"));
    setup.kubectl(&apply("mode.yaml", "security"));
    setup.file("order.yaml", &part("mode: Audit, order: 7"));
    let message = setup.kubectl_fails(1, &apply("order.yaml", "security"));
    assert!(message.contains("conflict with \"team\"") && message.contains(".spec.order"), "{message}");
    setup.kubectl(&[apply("order.yaml", "security"), vec!["--force-conflicts"]].concat());
    // The first does not say it any more, so it is not taken from the second; what nobody says goes.
    setup.file("base.yaml", &part("appliesTo: role == 'db', ingress: []"));
    setup.kubectl(&apply("base.yaml", "team"));
    setup.file("order.yaml", &part("order: 7"));
    setup.kubectl(&apply("order.yaml", "security"));
    let seen = setup.bulkhead(&["get", "policy", "db", "-o", "yaml"]);
    assert!(seen.contains("order: 7") && !seen.contains("Audit"), "{seen}");
    let raw = setup.kubectl(&["get", "--raw", "/apis/bulkhead.dev/v1/policies/db"]);
    for part in
        [r#""manager":"team""#, r#""manager":"security""#, r#""f:order":{}"#, r#""operation":"Apply""#]
    {
        assert!(raw.contains(part), "{part}: {raw}");
    }
    // Who changes a field with bulkhead owns it from then on.
    setup.file("whole.yaml", &part("appliesTo: role == 'db', ingress: [], order: 8"));
    setup.bulkhead(&["apply", "-f", "whole.yaml"]);
    let message = setup.kubectl_fails(1, &apply("order.yaml", "security"));
    assert!(message.contains("conflict with \"bulkhead\""), "{message}");
    // From the apply of clients to that of the server, and on.
    setup.file("moved.yaml", POLICY.replace("name: db", "name: moved").as_str());
    setup.kubectl(&["apply", "-f", "moved.yaml"]);
    setup.kubectl(&["apply", "--server-side", "--force-conflicts", "-f", "moved.yaml"]);
    setup.file("moved.yaml", &POLICY.replace("name: db", "name: moved").replace("5432", "5433"));
    let diff = setup.kubectl_output(&[], &["diff", "--server-side", "--force-conflicts", "-f", "moved.yaml"]);
    let text = String::from_utf8_lossy(&diff.stdout).into_owned();
    assert!(diff.status.code() == Some(1) && text.contains("+    - tcp/5433"), "{text}");
    setup.kubectl(&["apply", "--server-side", "--force-conflicts", "-f", "moved.yaml"]);
    assert!(setup.bulkhead(&["get", "policy", "moved", "-o", "yaml"]).contains("tcp/5433"));
    setup.kubectl(&["delete", "policies", "--all"]);
    assert_eq!(setup.bulkhead(&["get", "policies"]), "no policies\n");
}

#[test]
fn a_watch_shows_what_bulkhead_changes() {
    let setup = Setup::new();
    setup.file("policy.yaml", POLICY);
    setup.bulkhead(&["apply", "-f", "policy.yaml"]);
    let mut watch = setup.spawn(&["get", "policies", "--watch", "--output-watch-events", "--no-headers"]);
    let mut lines = BufReader::new(watch.0.stdout.take().unwrap()).lines();
    let mut next = || lines.next().unwrap().unwrap();
    let first = next();
    assert!(first.starts_with("ADDED") && first.contains("db"), "{first}");
    setup.file("policy.yaml", &POLICY.replace("tier:", "mode: Audit\n  tier:"));
    setup.bulkhead(&["apply", "-f", "policy.yaml"]);
    let line = next();
    assert!(line.starts_with("MODIFIED") && line.contains("Audit"), "{line}");
    setup.bulkhead(&["delete", "policy", "db"]);
    let line = next();
    assert!(line.starts_with("DELETED") && line.contains("db"), "{line}");
}

#[test]
fn roles_hold_whatever_asks() {
    let setup = Setup::new();
    setup.file(
        "roles.yaml",
        "apiVersion: bulkhead.dev/v1\nkind: RoleBinding\nmetadata: {name: view}\nspec: {role: Viewer, users: [eve]}\n---\n\
         apiVersion: bulkhead.dev/v1\nkind: RoleBinding\nmetadata: {name: shop}\n\
         spec: {role: Editor, users: [ed], namespaces: [shop]}\n",
    );
    setup.kubectl(&["apply", "-f", "roles.yaml"]);
    setup.file("policy.yaml", POLICY);
    setup.kubectl(&["apply", "-f", "policy.yaml"]);
    setup.file("review.json", r#"{"apiVersion":"authentication.k8s.io/v1","kind":"SelfSubjectReview"}"#);
    let who = ["create", "--raw", "/apis/authentication.k8s.io/v1/selfsubjectreviews", "-f", "review.json"];
    let me = setup.kubectl(&who);
    assert!(me.contains("operator/ann") && me.contains("bulkhead:admins"), "{me}");
    assert_eq!(setup.kubectl(&["auth", "can-i", "*", "*"]).trim(), "yes");

    setup.file("changed.yaml", &POLICY.replace("5432", "5433"));
    let ci = setup.token_kubeconfig("ci", "bulkhead:admins");
    assert!(setup.kubectl_as(&ci, &who).contains("operator/ci"));
    let eve = setup.kubeconfig("eve", &[]);
    assert!(setup.kubectl_as(&eve, &["get", "policies"]).contains("db"));
    assert_eq!(setup.kubectl_as(&eve, &["auth", "can-i", "list", "tiers.bulkhead.dev"]).trim(), "yes");
    let no = setup.kubectl_output(&[("KUBECONFIG", &eve)], &["auth", "can-i", "create", "policies"]);
    assert_eq!((no.status.code(), no.stdout.starts_with(b"no")), (Some(1), true));
    for refused in [
        &["label", "policy", "db", "x=y"][..],
        &["delete", "policy", "db"],
        &["apply", "-f", "changed.yaml"],
        &["apply", "--server-side", "-f", "policy.yaml"],
    ] {
        let output = setup.kubectl_output(&[("KUBECONFIG", &eve)], refused);
        let message = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && message.contains("role Viewer"), "{refused:?}: {message}");
    }
    let ed = setup.kubeconfig("ed", &[]);
    assert_eq!(setup.kubectl_as(&ed, &["auth", "can-i", "create", "policies", "-n", "shop"]).trim(), "yes");
    let no =
        setup.kubectl_output(&[("KUBECONFIG", &ed)], &["auth", "can-i", "create", "policies", "-n", "blog"]);
    assert_eq!(no.status.code(), Some(1));
    setup.file("shop.yaml", &POLICY.replace("name: db", "name: db, namespace: shop"));
    setup.kubectl_as(&ed, &["apply", "-f", "shop.yaml"]);
    let output =
        setup.kubectl_output(&[("KUBECONFIG", &ed)], &["apply", "--server-side", "-f", "policy.yaml"]);
    assert!(String::from_utf8_lossy(&output.stderr).contains("may not be changed as Editor"));
}

/// Every command that the documentation shows, one after another.
#[test]
fn what_the_documentation_says_works() {
    let setup = Setup::new();
    let text = include_str!("../../../docs/kubernetes.md");
    let section = text.split("\n## Using kubectl and GitOps tools\n").nth(1).unwrap();
    let section = section.split("\n## ").next().unwrap();
    let blocks: Vec<&str> =
        section.split("```sh\n").skip(1).filter_map(|rest| rest.split("```").next()).collect();
    assert!(blocks.len() >= 3, "has the check gone blind?");
    setup.script(&blocks.concat());
}
