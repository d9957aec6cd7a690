//! Each code once where it must and once where it must not speak, and that dead rules are dead.

use std::collections::BTreeMap;

use bulkhead_model::document::parse;
use bulkhead_model::policy::{PolicySpec, Rule};
use bulkhead_model::{Direction, RuleRef, Verdict};
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;

use super::dead::{Why, rules};
use super::*;
use crate::host::tests::{
    addresses, any_block, any_labels, any_policy, any_rule, kind_of, make_entity, policy_key, questions,
    settings,
};
use crate::{Assembly, judge};

const WORKLOADS: &str = "
---
apiVersion: bulkhead.dev/v1
kind: Workload
metadata: {name: w1, labels: {role: web, zone: internal}}
spec: {host: h1, addresses: [10.0.0.1], ports: [{name: http, port: 80}]}
---
apiVersion: bulkhead.dev/v1
kind: Workload
metadata: {name: w2, labels: {role: database, zone: internal}}
spec: {host: h1, addresses: [10.0.0.2]}
---
apiVersion: bulkhead.dev/v1
kind: NetworkSet
metadata: {name: dns, labels: {purpose: resolver}}
spec: {cidrs: [192.0.2.53/32]}
---
apiVersion: bulkhead.dev/v1
kind: NameTable
metadata: {name: names}
spec: {names: {api.example.com: [192.0.2.7]}}
";

/// A policy for `role == 'web'` unless it says otherwise.
fn policy(name: &str, rest: &str) -> String {
    let applies = if rest.contains("appliesTo") { "" } else { "appliesTo: role == 'web', " };
    let start = "\n---\napiVersion: bulkhead.dev/v1\nkind: Policy\n";
    format!("{start}metadata: {{name: {name}}}\nspec: {{{applies}{rest}}}\n")
}

fn findings(text: &str) -> Vec<Finding> {
    let mut assembly = Assembly::default();
    let mut world = World::new();
    world.now = "2026-06-01T00:00:00Z".parse().unwrap();
    for document in parse("t", text).unwrap_or_else(|problems| panic!("{problems:#?}\n{text}")) {
        let key = document.resource.key();
        world.change(&assembly.set(&key, Some(document.resource)));
    }
    let found = lint(&world, assembly.objects());
    assert!(found.complete);
    found.list
}

/// Findings of one code, as `path: message`.
fn of(code: Code, text: &str) -> Vec<String> {
    let found = findings(text).into_iter().filter(|one| one.code == code);
    found.map(|one| format!("{}: {}", one.path, one.message)).collect()
}

#[track_caller]
fn fires(code: Code, text: &str, expected: &str) {
    assert_eq!(of(code, text), [expected], "{text}");
}

#[track_caller]
fn silent(code: Code, text: &str) {
    assert_eq!(of(code, text), Vec::<String>::new(), "{text}");
}

#[test]
fn shadowed_rules() {
    let code = Code::ShadowedRule;
    let allow = |from: &str, ports: &str| format!("{{action: Allow, from: {{{from}}}, ports: [{ports}]}}");
    let list = |rules: &[String]| policy("p", &format!("ingress: [{}]", rules.join(", ")));
    let (wide, narrow) = (allow("cidrs: [10.0.0.0/8]", "tcp/1-100"), allow("cidrs: [10.1.0.0/16]", "tcp/80"));
    fires(
        code,
        &list(&[wide.clone(), narrow.clone()]),
        "spec.ingress[1]: p ingress[1] is never reached: ingress[0] decides all that it matches",
    );
    silent(code, &list(&[narrow, wide]));
    silent(
        code,
        &list(&[allow("cidrs: [10.0.0.0/8]", "tcp/1-100"), allow("cidrs: [10.1.0.0/16]", "udp/80")]),
    );
    silent(
        code,
        &list(&["{action: Log, from: {cidrs: [10.0.0.0/8]}}".into(), allow("cidrs: [10.1.0.0/16]", "tcp")]),
    );
    fires(
        code,
        &list(&[
            allow("selector: role == 'web'", "tcp/1-50"),
            allow("selector: has(role)", "tcp/51-99"),
            allow("selector: role == 'web' && zone == 'x'", "tcp/40-60"),
        ]),
        "spec.ingress[2]: p ingress[2] is never reached: ingress[0] and ingress[1] decide all that it matches",
    );
    // Who is in a set is known by addresses, and a set may hold an address that a block does not.
    silent(code, &list(&[allow("networkSets: all()", "tcp"), allow("cidrs: [192.0.2.53/32]", "tcp")]));
}

#[test]
fn shadowed_by_another_policy() {
    let code = Code::ShadowedRule;
    let first =
        |rest: &str| policy("a", &format!("order: 1, {rest} ingress: [{{action: Deny, ports: [tcp/80]}}]"));
    let second = policy("b", "order: 2, ingress: [{action: Allow, from: {any: true}, ports: [tcp/80]}]");
    let message = "spec.ingress[0]: b ingress[0] is never reached: a ingress[0] decides all that it matches";
    fires(code, &[first("appliesTo: has(role),"), second.clone()].concat(), message);
    // A tier that passes the rest, or else nothing behind it would be reached.
    let rest = policy("c", "appliesTo: has(zone), tier: admin, order: 3, ingress: [{action: Pass}]");
    fires(code, &[first("appliesTo: has(role), tier: admin,"), rest, second.clone()].concat(), message);
    // Other endpoints, other times, only watched.
    silent(code, &[first("appliesTo: role == 'web' && has(zone),"), second.clone()].concat());
    silent(code, &[first("validUntil: 2027-01-01T00:00:00Z,"), second.clone()].concat());
    silent(code, &[first("mode: Audit,"), second.clone()].concat());
    // What the first tier passes on does not come to its later rules.
    let pass = policy("0", "tier: admin, order: 0, ingress: [{action: Pass, from: {cidrs: [10.0.0.0/8]}}]");
    silent(code, &[pass, first("tier: admin,"), second].concat());
}

#[test]
fn unreachable_and_duplicate_rules() {
    let code = Code::UnreachableRule;
    fires(
        code,
        &policy("p", "ingress: [{action: Deny}, {action: Allow, ports: [tcp/1]}, {action: Log}]"),
        "spec.ingress[1]: p ingress[1] to [2] are never reached: ingress[0] decides everything",
    );
    fires(
        code,
        &policy(
            "p",
            "ingress: [{action: Deny, from: {cidrs: [0.0.0.0/0, '::/0']}}, {action: Allow, ports: [tcp/1]}]",
        ),
        "spec.ingress[1]: p ingress[1] is never reached: ingress[0] decides everything",
    );
    silent(code, &policy("p", "ingress: [{action: Deny, ipVersion: 4}, {action: Allow, ports: [tcp/1]}]"));
    silent(code, &policy("p", "ingress: [{action: Log}, {action: Allow, ports: [tcp/1]}]"));
    let admin =
        |rest: &str| policy("a", &format!("tier: admin, ingress: [{{action: Deny, ports: [tcp/1]}}{rest}]"));
    let later = policy("b", "ingress: [{action: Allow, ports: [tcp/2]}]");
    fires(
        code,
        &[admin(""), later.clone()].concat(),
        "spec.ingress[0]: b ingress[0] is never reached: a is for all of its endpoints, and its tier admin ends in Deny",
    );
    silent(code, &[admin(", {action: Pass}"), later].concat());

    let code = Code::DuplicateRule;
    let rule = "{action: Allow, from: {selector: a == '1'}}";
    let other = "{action: Allow, from: {selector: a == '2'}}";
    fires(
        code,
        &policy("p", &format!("ingress: [{rule}, {other}, {rule}]")),
        "spec.ingress[2]: p ingress[2] says the same as ingress[0]",
    );
    silent(code, &policy("p", &format!("ingress: [{rule}, {other}]")));
}

#[test]
fn tiers_and_times() {
    let code = Code::UnknownTier;
    fires(
        code,
        &policy("p", "tier: aplication, ingress: []"),
        "spec.tier: p: there is no tier \"aplication\"; did you mean application?",
    );
    silent(code, &policy("p", "tier: baseline, ingress: []"));
    let code = Code::Expired;
    fires(
        code,
        &policy("p", "validUntil: 2026-06-01T00:00:00Z, ingress: []"),
        "spec.validUntil: p ended at 2026-06-01T00:00:00Z",
    );
    silent(code, &policy("p", "validUntil: 2026-06-01T00:00:01Z, ingress: []"));
}

#[test]
fn what_is_not_in_the_inventory() {
    let with = |rest: &str| [policy("p", rest).as_str(), WORKLOADS].concat();
    let code = Code::SelectsNothing;
    fires(
        code,
        &with("appliesTo: role == 'queue', ingress: []"),
        "spec.appliesTo: p selects no endpoint of the inventory",
    );
    silent(code, &with("appliesTo: role == 'web', ingress: []"));
    silent(code, &policy("p", "appliesTo: role == 'queue', ingress: []"));

    let code = Code::PeerMatchesNothing;
    let from = |peer: &str| with(&format!("ingress: [{{action: Allow, from: {{{peer}}}}}]"));
    fires(
        code,
        &from("selector: role == 'queue'"),
        "spec.ingress[0].from[0].selector: p: nobody in the inventory matches role == \"queue\"",
    );
    fires(
        code,
        &from("selector: role == 'web', serviceAccounts: [x]"),
        "spec.ingress[0].from[0].selector: p: nobody in the inventory matches selector, serviceAccounts together",
    );
    fires(
        code,
        &from("networkSets: purpose == 'ntp'"),
        "spec.ingress[0].from[0].networkSets: p: no network set matches purpose == \"ntp\"",
    );
    silent(code, &from("networkSets: purpose == 'resolver'"));
    silent(code, &from("selector: role == 'database'"));
    silent(code, &from("notSelector: role == 'queue'"));
    silent(code, &from("hosts: all()"));
    silent(code, &policy("p", "ingress: [{action: Allow, from: {selector: role == 'queue'}}]"));

    let code = Code::UnknownDomain;
    let to = |name: &str| with(&format!("egress: [{{action: Allow, to: {{domains: [{name}]}}}}]"));
    fires(
        code,
        &to("ipa.example.com"),
        "spec.egress[0].to[0].domains: p: no address is known of ipa.example.com",
    );
    silent(code, &to("api.example.com"));
    silent(code, &to("'*.example.com'"));

    let code = Code::UnknownNamedPort;
    let port = |port: &str| with(&format!("ingress: [{{action: Allow, ports: [{port}]}}]"));
    fires(
        code,
        &port("tcp/https"),
        "spec.ingress[0].ports: p: no destination in the inventory names a port tcp/https",
    );
    silent(code, &port("tcp/http"));

    let code = Code::UnknownService;
    let service = "
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: s-1, namespace: n, labels: {kubernetes.io/service-name: s}}
endpoints: [{addresses: [10.0.0.9]}]
";
    let to = |name: &str| policy("p", &format!("egress: [{{action: Allow, to: {{services: [{name}]}}}}]"));
    fires(
        code,
        &[to("n/t").as_str(), service].concat(),
        "spec.egress[0].to[0].services: p: no EndpointSlice is of the service n/t",
    );
    silent(code, &[to("n/s").as_str(), service].concat());
    silent(code, &to("n/t"));
}

#[test]
fn near_misses_of_labels_and_values() {
    let with = |rest: &str| [policy("p", rest).as_str(), WORKLOADS].concat();
    let applies = |selector: &str| with(&format!("appliesTo: {selector}, ingress: []"));
    let code = Code::UnknownLabel;
    fires(
        code,
        &applies("rolle == 'web'"),
        "spec.appliesTo: p: nothing has a label \"rolle\"; did you mean role?",
    );
    // One mistake is told once.
    silent(Code::SelectsNothing, &applies("rolle == 'web'"));
    silent(code, &applies("role == 'web' && !has(quarantined)"));
    fires(
        code,
        &with("ingress: [{action: Allow, from: {sameLabels: [zones]}}]"),
        "spec.ingress[0].from[0].sameLabels: p: nothing has a label \"zones\"; did you mean zone?",
    );
    let code = Code::UnknownLabelValue;
    fires(
        code,
        &applies("role == 'databse'"),
        "spec.appliesTo: p: nothing has role == \"databse\"; did you mean \"database\"?",
    );
    silent(code, &applies("role == 'queue'"));
    silent(code, &applies("role == 'database2'"));
}

#[test]
fn open_logging_and_redundant_rules() {
    let code = Code::AllowsEverything;
    let message = "spec.egress[0]: p egress[0] allows every connection to anybody";
    fires(code, &policy("p", "egress: [{action: Allow}]"), message);
    fires(code, &policy("p", "egress: [{action: Allow, to: {any: true}, ports: [any]}]"), message);
    silent(code, &policy("p", "egress: [{action: Allow, ports: [tcp]}]"));
    silent(code, &policy("p", "egress: [{action: Allow, to: {cidrs: [10.0.0.0/8]}}, {action: Pass}]"));

    let code = Code::OnlyLogs;
    fires(
        code,
        &policy("p", "ingress: [{action: Log}]"),
        "spec.ingress: p only logs ingress: the end of tier application refuses what no other policy allows",
    );
    silent(code, &policy("p", "ingress: []"));
    silent(code, &policy("p", "ingress: [{action: Log}, {action: Pass}]"));

    let code = Code::RedundantDeny;
    let deny = policy("p", "order: 1, ingress: [{action: Allow, ports: [tcp/1]}, {action: Deny}]");
    fires(code, &deny, "spec.ingress[1]: p ingress[1] denies what the end of tier application denies anyway");
    silent(code, &policy("p", "ingress: [{action: Deny, log: true}]"));
    silent(code, &policy("p", "ingress: [{action: Deny, reject: true}]"));
    silent(code, &[deny, policy("q", "order: 2, ingress: []")].concat());
}

#[test]
fn equal_orders_matter_only_where_policies_disagree() {
    let code = Code::OrderUndefined;
    let one = policy("a", "order: 5, ingress: [{action: Allow, ports: [tcp/80]}]");
    let other = |action: &str, port: &str, order: &str| {
        policy("b", &format!("order: {order}, ingress: [{{action: {action}, ports: [{port}]}}]"))
    };
    fires(
        code,
        &[one.clone(), other("Deny", "tcp/1-100", "5")].concat(),
        "spec.order: a and b of tier application both have order 5 and disagree about ingress: their names decide",
    );
    silent(code, &[one.clone(), other("Allow", "tcp/1-100", "5")].concat());
    silent(code, &[one.clone(), other("Deny", "tcp/81-100", "5")].concat());
    silent(code, &[one.clone(), other("Deny", "tcp/1-100", "6")].concat());
    let elsewhere = policy("b", "order: 5, appliesTo: role == 'database', ingress: [{action: Deny}]");
    silent(code, &[&one, &elsewhere, WORKLOADS].concat());
}

#[test]
fn codes_are_numbered_and_found_by_number_and_name() {
    // 15 was retired: a number never comes to mean something else.
    let numbers = (1..).filter(|number| *number != 15);
    for (number, info) in numbers.zip(CODES) {
        assert_eq!(info.id, format!("BH{number:03}"));
        assert_eq!(Code::parse(info.id), Some(info.code));
        assert_eq!(Code::parse(info.name), Some(info.code));
        assert_eq!(info.code.info().id, info.id);
    }
    assert_eq!(Code::parse("BH999"), None);
}

/// Whether a rule is a copy of an earlier one, and which criteria are its own.
type Derived = Vec<(prop::sample::Index, Rule, [bool; 5])>;

/// Random rules alone hardly ever cover each other.
fn any_derived_policy() -> impl Strategy<Value = PolicySpec> {
    let derived = || {
        prop::collection::vec(
            (any::<prop::sample::Index>(), any_rule(), prop::array::uniform5(prop::bool::weighted(0.25))),
            0..3,
        )
    };
    (any_policy(), derived(), derived()).prop_map(|(mut policy, ingress, egress)| {
        policy.ingress = policy.ingress.map(|rules| derive(rules, ingress));
        policy.egress = policy.egress.map(|rules| derive(rules, egress));
        policy
    })
}

fn derive(mut rules: Vec<Rule>, derived: Derived) -> Vec<Rule> {
    for (index, other, own) in derived {
        let mut rule = if rules.is_empty() { other.clone() } else { index.get(&rules).clone() };
        rule.action = other.action;
        let [peers, ports, not_ports, sources, endpoint] = own;
        if peers {
            rule.peers = other.peers;
        }
        if ports {
            rule.ports = other.ports;
        }
        if not_ports {
            rule.not_ports = other.not_ports;
        }
        if sources {
            rule.source_ports = other.source_ports;
        }
        if endpoint {
            rule.own = other.own;
        }
        rules.push(rule);
    }
    rules
}

fn any_world() -> impl Strategy<Value = World> {
    let blocks = || prop::collection::vec(any_block(), 1..3);
    let others = prop::collection::vec((any_labels(), blocks()), 9);
    let locals = prop::collection::vec(
        (any_labels(), prop::collection::vec(prop::sample::select(addresses()), 1..3)),
        3,
    );
    let policies = prop::collection::vec(any_derived_policy(), 1..6);
    (policies, others, locals, any::<bool>()).prop_map(|(policies, others, locals, denies)| {
        let mut world = World::new();
        world.settings = settings(denies);
        world.now = bulkhead_model::time::Timestamp { seconds: 2 };
        let keys = (0u8..).map(policy_key);
        world.policies = keys.zip(policies).collect();
        for (number, (labels, prefixes)) in (0u8..).zip(others) {
            let name = format!("e{number}");
            let entity = make_entity(&name, kind_of(number), &labels, &prefixes, None);
            world.entities.insert(entity.name.clone(), entity);
        }
        for (number, (labels, own)) in (0u8..).zip(locals) {
            let kind =
                if number == 2 { bulkhead_model::Kind::HostEndpoint } else { bulkhead_model::Kind::Workload };
            let prefixes: Vec<_> = own.into_iter().map(bulkhead_model::Prefix::host).collect();
            let entity = make_entity(&format!("l{number}"), kind, &labels, &prefixes, Some("here"));
            world.entities.insert(entity.name.clone(), entity);
        }
        world
    })
}

/// Verdicts of every endpoint, towards every address: without numbers of rules, which move.
fn verdicts(world: &World) -> Vec<(Verdict, Option<String>, Verdict, Option<String>)> {
    let author = |rule: &RuleRef| match rule {
        RuleRef::Rule { policy, .. } => Some(policy.clone()),
        RuleRef::TierDefault { tier } => Some(format!("end of {tier}")),
        RuleRef::DefaultPosture | RuleRef::Builtin { .. } => None,
    };
    let mut verdicts = Vec::new();
    for endpoint in world.entities.values().filter(|entity| entity.is_endpoint()) {
        for direction in Direction::BOTH {
            for peer in addresses() {
                for (key, source) in questions() {
                    let judged = judge(world, endpoint, direction, peer, key, source);
                    let (rule, audit) = (author(&judged.rule), author(&judged.audit_rule));
                    verdicts.push((judged.verdict, rule, judged.audit_verdict, audit));
                }
            }
        }
    }
    verdicts
}

fn without(world: &World, policy: &ObjectKey, direction: Direction, index: usize) -> World {
    let mut world = world.clone();
    let spec = world.policies.get_mut(policy).unwrap();
    let rules = match direction {
        Direction::Ingress => spec.ingress.as_mut(),
        Direction::Egress => spec.egress.as_mut(),
    };
    rules.unwrap().remove(index);
    world
}

#[test]
fn removing_a_rule_that_is_called_dead_changes_no_verdict() {
    const DEAD_WANTED: usize = 300;
    let mut runner = TestRunner::deterministic();
    let strategy = any_world();
    let mut seen: BTreeMap<&str, usize> = BTreeMap::new();
    while seen.values().sum::<usize>() < DEAD_WANTED {
        let world = strategy.new_tree(&mut runner).unwrap().current();
        let (dead, complete) = rules(&world);
        assert!(complete);
        let before = if dead.is_empty() { Vec::new() } else { verdicts(&world) };
        for dead in dead {
            let kind = match &dead.why {
                Why::Duplicate(_) => "duplicate",
                Why::AfterEverything(_) => "after everything",
                Why::TierEnds(..) => "tier ends",
                Why::Shadowed(by) if by.iter().all(|(key, _)| *key == dead.policy) => "shadowed in its list",
                Why::Shadowed(_) => "shadowed elsewhere",
            };
            *seen.entry(kind).or_default() += 1;
            let after = verdicts(&without(&world, dead.policy, dead.direction, dead.index));
            assert_eq!(before, after, "{dead:?}\n{world:#?}");
        }
    }
    // Or else it would prove nothing.
    assert_eq!(seen.len(), 5, "{seen:?}");
    assert!(seen.values().all(|count| *count >= 3), "{seen:?}");
}
