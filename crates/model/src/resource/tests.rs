use crate::document::{Problem, parse};

use super::*;

const POLICY: &str = "\
apiVersion: bulkhead.dev/v1
kind: Policy
metadata: {name: credit-status}
spec:
  order: 100
  appliesTo: role == 'creditStatus'
  ingress:
  - action: Allow
    from: {selector: role == 'creditCheck'}
    ports: [tcp/5432, icmp/8]
  - action: Deny
    from: [{cidrs: [10.0.0.0/8], notSelector: has(x)}, {sameLabels: [application]}]
";

fn problems(text: &str) -> Vec<Problem> {
    parse("file.yaml", text).expect_err(text)
}

fn only_problem(text: &str) -> Problem {
    let mut problems = problems(text);
    assert_eq!(problems.len(), 1, "{problems:?}");
    problems.remove(0)
}

#[test]
fn a_policy_survives_yaml_to_value_to_json_to_value() {
    let documents = parse("file.yaml", POLICY).unwrap();
    let resource = &documents[0].resource;
    let Resource::Policy(policy) = resource else { panic!("{resource:?}") };
    assert_eq!(policy.spec.tier, "application");
    assert_eq!(policy.spec.ingress.as_ref().unwrap()[1].peers.len(), 2);
    assert!(policy.spec.egress.is_none());
    let json = resource.to_json();
    assert_eq!(&Resource::from_json(&json).unwrap(), resource);
    assert_eq!(&parse("again.json", &json.to_string()).unwrap()[0].resource, resource);
    assert_eq!(
        documents[0].position_of("spec.ingress[1].from"),
        crate::document::Position { line: 12, column: 11 }
    );
}

#[test]
fn a_typo_in_a_selector_is_found_at_its_place() {
    let problem = only_problem(&POLICY.replace("role == 'creditStatus'", "role = 'creditStatus'"));
    assert_eq!((problem.line, problem.column, problem.path.as_str()), (6, 19, "spec.appliesTo"));
    assert_eq!(problem.suggestion.as_deref(), Some("=="));
    assert_eq!(
        problem.to_string(),
        "file.yaml:6:19: spec.appliesTo: in the selector \"role = 'creditStatus'\": expected ==, !=, <, <=, >, >=, \
         in, not in, contains, starts with or ends with, found '='; did you mean ==?"
    );
}

#[test]
fn unknown_fields_get_the_nearest_right_word() {
    let problem = only_problem(
        &POLICY.replace("appliesTo:", "aplliesTo:").replace("spec:\n", "spec:\n  appliesTo: all()\n"),
    );
    assert_eq!((problem.line, problem.column), (7, 3));
    assert_eq!(problem.suggestion.as_deref(), Some("appliesTo"));
    let problem = only_problem(&POLICY.replace("kind: Policy", "kind: Polcy"));
    assert_eq!((problem.line, problem.suggestion.as_deref()), (2, Some("Policy")));
    let problem = only_problem(&POLICY.replace("Allow", "allow"));
    assert_eq!(problem.suggestion.as_deref(), Some("Allow"));
}

#[test]
fn a_port_of_70000_is_refused_with_what_was_expected() {
    let problem = only_problem(&POLICY.replace("5432", "70000"));
    assert_eq!((problem.line, problem.column, problem.path.as_str()), (10, 13, "spec.ingress[0].ports[0]"));
    assert!(problem.message.contains("1 to 65535"), "{problem}");
}

#[test]
fn all_problems_of_a_text_are_reported_at_once() {
    let text = POLICY
        .replace("5432", "70000")
        .replace("10.0.0.0/8", "10.0.0.1/8")
        .replace("order: 100", "order: first");
    assert_eq!(problems(&text).len(), 3);
}

#[test]
fn what_is_not_supported_yet_is_refused_by_name_and_never_dropped() {
    for field in ["http: {}", "tls: {}"] {
        let problem =
            only_problem(&POLICY.replace("  - action: Allow", &format!("  - {field}\n    action: Allow")));
        assert!(problem.message.contains("not supported yet"), "{problem}");
    }
    let problem = only_problem(&POLICY.replace("cidrs: [10.0.0.0/8]", "domains: [example.org]"));
    assert!(problem.message.contains("domains are for egress"), "{problem}");
}

#[test]
fn only_a_rule_that_denies_can_reject() {
    let rejects =
        |action: &str| POLICY.replace("action: Allow", &format!("action: {action}\n    reject: true"));
    let resource = &parse("f", &rejects("Deny")).unwrap()[0].resource;
    let json = resource.to_json();
    assert_eq!(json["spec"]["ingress"][0]["reject"], true);
    assert_eq!(&Resource::from_json(&json).unwrap(), resource);
    let problem = only_problem(&rejects("Allow"));
    assert!(problem.message.contains("action: Deny"), "{problem}");
    assert_eq!(problem.path, "spec.ingress[0].reject");
}

#[test]
fn source_ports_survive_and_mistakes_in_them_are_found_at_their_place() {
    let with =
        |field: &str| POLICY.replace("    ports: [tcp/5432", &format!("    {field}\n    ports: [tcp/5432"));
    let text = with("sourcePorts: [53, 1024-65535]\n    notSourcePorts: 5000-5010");
    let resource = &parse("f", &text).unwrap()[0].resource;
    let Resource::Policy(policy) = resource else { panic!("{resource:?}") };
    let rule = &policy.spec.ingress.as_ref().unwrap()[0];
    let asked = rule.source_ports.as_ref().unwrap();
    assert_eq!(format!("{:?} {:?}", asked.wanted, asked.excluded), "[53, 1024-65535] [5000-5010]");
    let json = resource.to_json();
    assert_eq!(json["spec"]["ingress"][0]["sourcePorts"], serde_json::json!([53, "1024-65535"]));
    assert_eq!(&Resource::from_json(&json).unwrap(), resource);

    let problem = only_problem(&with("sourcePorts: [53, 70000]"));
    let place = (problem.line, problem.column, problem.path.as_str());
    assert_eq!(place, (10, 23, "spec.ingress[0].sourcePorts[1]"));
    assert!(problem.message.contains("0 to 65535"), "{problem}");
    assert!(only_problem(&with("notSourcePorts: tcp/53")).message.contains("no protocol"));
    assert!(only_problem(&with("sourcePorts: []")).message.contains("at least one"));
    let many: Vec<_> = (0..256).map(|port| port.to_string()).collect();
    only_problem(&with(&format!("sourcePorts: [{}]", many.join(", "))));

    let icmp = with("sourcePorts: 53").replace("tcp/5432, icmp/8", "icmp/8, '47'");
    let problem = only_problem(&icmp);
    assert_eq!((problem.line, problem.path.as_str()), (10, "spec.ingress[0].sourcePorts"));
    assert!(problem.message.contains("never match"), "{problem}");
}

#[test]
fn rules_that_tell_too_many_source_ports_apart_are_refused() {
    let rule = |base: u32| {
        let ports: Vec<_> = (0..250u32).map(|port| (base + 2 * port).to_string()).collect();
        format!("  - {{action: Deny, sourcePorts: [{}]}}\n", ports.join(", "))
    };
    let text = format!("{POLICY}{}{}", rule(1), rule(1001));
    assert!(parse("f", &text).is_ok());
    let problem = only_problem(&format!("{text}{}", rule(2001)));
    assert_eq!((problem.line, problem.path.as_str()), (8, "spec.ingress"));
    assert!(problem.message.contains("1024"), "{problem}");
}

#[test]
fn ambiguous_emptiness_is_refused() {
    for (from, to) in [
        ("{selector: role == 'creditCheck'}", "{}"),
        ("{selector: role == 'creditCheck'}", "[]"),
        ("{selector: role == 'creditCheck'}", "{cidrs: []}"),
        ("{selector: role == 'creditCheck'}", "{any: true, selector: all()}"),
    ] {
        only_problem(&POLICY.replace(from, to));
    }
    assert!(parse("f", &POLICY.replace("{selector: role == 'creditCheck'}", "{any: true}")).is_ok());
    let problem = only_problem(POLICY.split("  ingress:").next().unwrap());
    assert!(problem.message.contains("needs \"ingress\", \"egress\""));
}

#[test]
fn duplicate_fields_broken_yaml_and_aliases_are_refused() {
    assert!(only_problem(&format!("{POLICY}  order: 7\n")).message.contains("given twice"));
    assert!(only_problem("a: [1, 2").message.contains("not valid YAML"));
    assert!(only_problem("a: &x 1\nb: *x\n").message.contains("aliases"));
    assert!(only_problem(&"[".repeat(100)).message.contains("nested deeper"));
    assert!(only_problem("- 1").message.contains("expected an object"));
}

#[test]
fn names_labels_and_versions_are_checked() {
    let problem = only_problem(&POLICY.replace("{name: credit-status}", "{name: Credit_Status}"));
    assert_eq!(problem.suggestion.as_deref(), Some("credit-status"));
    let problem =
        only_problem(&POLICY.replace("{name: credit-status}", "{name: a, labels: {bulkhead.dev/kind: x}}"));
    assert!(problem.message.contains("reserved"));
    let problem = only_problem(&POLICY.replace("bulkhead.dev/v1", "v1"));
    assert_eq!(problem.message, "Policy is a kind of bulkhead.dev/v1, not of \"v1\"");
    let problem = only_problem(&POLICY.replace("bulkhead.dev/v1", "bulkhead.dev/v2"));
    assert_eq!(problem.suggestion.as_deref(), Some("bulkhead.dev/v1"));
}

#[test]
fn lists_and_several_documents_are_unfolded() {
    let tier = "apiVersion: bulkhead.dev/v1\nkind: Tier\nmetadata: {name: t}\nspec: {order: 5.5}\n";
    let documents = parse("f", &format!("---\n{POLICY}---\n{tier}---\n")).unwrap();
    assert_eq!(documents.len(), 2);
    let list = serde_json::json!({"kind": "List", "items": [documents[0].resource.to_json()]});
    assert_eq!(parse("f", &list.to_string()).unwrap().len(), 1);
    assert!(parse("f", "").unwrap().is_empty());
    // Of one kind, as an API server answers: its items leave out what the list says.
    let pods = "apiVersion: v1\nkind: PodList\nmetadata: {}\nitems:\n- metadata: {name: a}\n- {apiVersion: v1, kind: Pod, metadata: {name: b}}\n";
    let kinds: Vec<_> = parse("f", pods).unwrap().iter().map(|document| document.resource.kind()).collect();
    assert_eq!(kinds, [Kind::Pod, Kind::Pod]);
    assert!(parse("f", "apiVersion: v1\nkind: List\nitems: []\n").unwrap().is_empty());
    assert_eq!(parse("f", "kind: List\nitems: [{metadata: {name: a}}]\n").unwrap_err().len(), 2);
}

#[test]
fn label_values_keep_their_text() {
    let text = "apiVersion: bulkhead.dev/v1\nkind: Workload\nmetadata: {name: a.h, labels: {v: 1.10, t: true}}\nspec: {host: h, addresses: [10.0.0.1, '2001:db8::1']}\n";
    let resource = parse("f", text).unwrap().remove(0).resource;
    assert_eq!(resource.metadata().labels.to_string(), "t=true,v=1.10");
    let entity = crate::entity::Entity::of(&resource).unwrap();
    assert_eq!(&*entity.name, "Workload/a.h");
    assert_eq!(entity.labels.get("bulkhead.dev/host"), Some("h"));
}

#[test]
fn kinds_are_found_under_any_spelling() {
    for text in ["Policy", "policies", "pol", "POLICY"] {
        assert_eq!(Kind::parse(text), Some(Kind::Policy));
    }
    assert_eq!(Kind::parse("secret"), None);
}

#[test]
fn a_comparison_that_does_not_fit_the_facts_type_is_refused_at_its_place() {
    let applies_to = |selector: &str| POLICY.replace("role == 'creditStatus'", selector);
    for (selector, column, suggestion) in [
        ("host.kernel > 5", 28, Some("version('5')")),
        ("role == 'a' && vuln.critical > version('1')", 45, Some("1")),
        ("host.kernal >= version('5')", 14, Some("host.kernel")),
        ("os.id == 5", 23, Some("'5'")),
        ("os.id > version('5')", 22, None),
    ] {
        let problem = only_problem(&applies_to(selector));
        assert_eq!((problem.line, problem.column), (6, column), "{selector}: {problem}");
        assert_eq!(problem.suggestion.as_deref(), suggestion, "{selector}");
    }
    for fine in
        ["host.kernel >= version('5.10')", "vuln.critical > 0", "team.size > 5", "host.kernel == '5.10'"]
    {
        parse("file.yaml", &applies_to(fine)).unwrap();
    }
}

const HOST: &str = "\
apiVersion: bulkhead.dev/v1
kind: Host
metadata: {name: h1, labels: {host.kernel: '9.9', zone: a}}
spec:
  facts: {host.kernel: 5.10.0-21-amd64, vuln.critical: 2.0, 'seen': yes, container.privileged: true}
";

#[test]
fn facts_are_read_kept_and_selected_on_before_labels() {
    let resource = parse("file.yaml", HOST).unwrap().remove(0).resource;
    assert_eq!(Resource::from_json(&resource.to_json()).unwrap(), resource);
    let labels = crate::Entity::of(&resource).unwrap().labels;
    for (text, expected) in [
        ("host.kernel >= version('5.10')", true),
        ("host.kernel == '9.9'", false),
        ("zone == 'a'", true),
        ("vuln.critical == 2", true),
        ("vuln.critical == '2'", true),
        ("vuln.high > 0", false),
        ("container.privileged == 'true'", true),
        ("seen == 'yes'", true),
    ] {
        assert_eq!(crate::Selector::parse(text).unwrap().matches(&labels), expected, "{text}");
    }
}

#[test]
fn facts_that_are_not_of_their_type_are_refused_at_their_place() {
    for (right, wrong, column, message, suggestion) in [
        ("2.0", "few", 56, "the fact vuln.critical is a number, and \"few\" is not", None),
        (
            "5.10.0-21-amd64",
            "5.10",
            24,
            "a version stands in quotes: as a number, 5.10 loses its zeros",
            Some("'5.10'"),
        ),
        ("5.10.0-21-amd64", "new", 24, "the fact host.kernel is a version, and \"new\" is not", None),
        (
            "privileged: true",
            "privileged: 1",
            0,
            "the fact container.privileged is true or false, and \"1\" is not",
            None,
        ),
        ("5.10.0-21-amd64", "[]", 24, "expected a text, found a list", None),
    ] {
        let problem = only_problem(&HOST.replace(right, wrong));
        assert_eq!(problem.message, message);
        assert_eq!(problem.suggestion.as_deref(), suggestion);
        if column > 0 {
            assert_eq!((problem.line, problem.column), (5, column), "{problem}");
        }
    }
    let twice = HOST.replace("'seen'", "vuln.critical");
    assert_eq!(only_problem(&twice).message, "\"vuln.critical\" is given twice");
}

/// Quadratic, this would take minutes.
#[test]
fn long_mappings_are_read_in_time() {
    let many = |prefix: &str| (0..100_000).map(|n| format!("{prefix}k{n}: v\n")).collect::<String>();
    let started = std::time::Instant::now();
    let unknown = problems(&format!("{}{}", POLICY, many("")));
    assert_eq!(unknown.len(), crate::document::PROBLEMS_MAX);
    let annotations =
        POLICY.replace("{name: credit-status}", &format!("\n  name: a\n  annotations:\n{}", many("    ")));
    parse("file.yaml", &annotations).unwrap();
    assert!(started.elapsed() < std::time::Duration::from_secs(60), "{:?}", started.elapsed());
}
