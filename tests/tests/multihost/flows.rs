//! Flow records: who, where, which labels, and which rule decided, from both ends.

use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, ensure};
use bulkhead_testbed::{Example, Outcome, Protocol, eventually};

use crate::common::{example, outcome};
use serde_json::Value;

fn records(example: &Example, arguments: &[&str]) -> Vec<Value> {
    let all: Vec<&str> = ["flows", "--limit", "1000"].iter().chain(arguments).copied().collect();
    let answer = example.bulkhead.json(&all).unwrap();
    let items = answer["items"].as_array().cloned();
    items.or_else(|| answer.as_array().cloned()).unwrap_or_default()
}

/// The record of one end, once it has arrived.
fn record(example: &Example, from: &str, to: &str, port: u16, direction: &str, verdict: &str) -> Value {
    eventually(&format!("{from} → {to} {direction} {verdict} is on record"), || {
        let found = records(example, &["--verdict", verdict]).into_iter().find(|record| {
            record["source"]["workload"] == from
                && record["destination"]["workload"] == to
                && record["destination"]["port"] == port
                && record["direction"] == direction
        });
        found.with_context(|| format!("{:#?}", records(example, &["--workload", from])))
    })
    .unwrap()
}

#[test]
fn records_name_both_ends_and_the_rule_that_decided() {
    let example = example("bt-flows");
    example.apply().unwrap();
    example.wait_expected().unwrap();
    let of = |name: &str| example.workload(name);
    assert_eq!(outcome(of("credit-check-eu"), of("credit-status"), Protocol::Tcp(8083)), Outcome::Reached);
    assert_eq!(outcome(of("geo-web"), of("map-db"), Protocol::Tcp(5432)), Outcome::Silent);
    assert_eq!(outcome(of("order-web"), of("credit-status"), Protocol::Tcp(8083)), Outcome::Silent);

    let (caller, service) = ("credit-check-eu.host-1", "credit-status.host-3");
    let ends = [("egress", "host-1", "credit-check"), ("ingress", "host-3", "credit-status")];
    for (direction, reporter, policy) in ends {
        let record = record(&example, caller, service, 8083, direction, "allow");
        assert_eq!(record["reporter"], reporter, "{record}");
        assert_eq!(record["source"]["host"], "host-1", "{record}");
        assert_eq!(record["destination"]["host"], "host-3", "{record}");
        let own = if direction == "egress" { "source" } else { "destination" };
        let role = if direction == "egress" { "creditCheck" } else { "creditStatus" };
        assert_eq!(record[own]["labels"]["role"], role, "{record}");
        let rule = record["enforced"]["rule"].to_string();
        assert!(rule.contains(policy) && rule.contains("application"), "{rule}");
        assert_eq!(record["protocol"].to_string().trim_matches('"').to_lowercase().replace("tcp", "6"), "6");
    }
    // The controller knows both ends' labels, whoever reported.
    let both = record(&example, caller, service, 8083, "egress", "allow");
    assert_eq!(both["destination"]["labels"]["role"], "creditStatus", "{both}");

    // The tier that refuses at the destination, though the application allows it at the source.
    let refused = record(&example, "geo-web.host-3", "map-db.host-2", 5432, "ingress", "deny");
    let rule = refused["enforced"]["rule"].to_string();
    assert!(rule.contains("zones") && rule.contains("dmz-to-restricted"), "{rule}");
    assert_eq!(refused["source"]["labels"]["zone"], "dmz", "{refused}");
    assert_eq!(refused["destination"]["labels"]["zone"], "restricted", "{refused}");
    assert_eq!(refused["reason"], "policy", "{refused}");

    // The end of a tier: no rule, but the tier is named.
    let refused = record(&example, "order-web.host-1", service, 8083, "egress", "deny");
    assert!(refused["enforced"]["rule"].to_string().contains("application"), "{refused}");

    filters_narrow_down(&example, caller);
}

fn filters_narrow_down(example: &Example, caller: &str) {
    let all = records(example, &[]).len();
    for filter in [["--policy", "dmz-to-restricted"], ["--label", "zone=dmz"], ["--workload", caller]] {
        let some = records(example, &filter);
        assert!(!some.is_empty() && some.len() < all, "{filter:?}: {} of {all}", some.len());
    }
    let local = example.bulkhead.on_host("host-3", &["flows", "--local"]).unwrap();
    assert!(local.contains("credit-status"), "{local}");
    let table = example.bulkhead.ok(&["flows", "--verdict", "deny"]).unwrap();
    assert!(table.contains("dmz-to-restricted"), "{table}");
    eventually("no record was lost", || {
        let status = example.bulkhead.agent("host-1").status()?;
        ensure!(status["flowRecordsLost"] == 0, "{status}");
        Ok(())
    })
    .unwrap();
}

#[test]
fn a_trace_follows_what_it_was_asked_for() {
    let example = example("bt-trace");
    example.apply().unwrap();
    example.wait_expected().unwrap();
    let of = |name: &str| example.workload(name);
    let filters =
        ["--from", "geo-web", "--to", "map-db", "--verdict", "deny", "--policy", "dmz-to-restricted"];
    let arguments: Vec<&str> = ["trace", "--count", "2", "-o", "json"].into_iter().chain(filters).collect();
    let ended = AtomicBool::new(false);
    let traced = std::thread::scope(|scope| {
        let trace = scope.spawn(|| {
            let traced = example.bulkhead.on_host("host-2", &arguments);
            ended.store(true, Ordering::SeqCst);
            traced
        });
        eventually("two connections were traced", || {
            assert_eq!(
                outcome(of("credit-check-eu"), of("credit-status"), Protocol::Tcp(8083)),
                Outcome::Reached
            );
            assert_eq!(outcome(of("geo-web"), of("map-db"), Protocol::Tcp(5432)), Outcome::Silent);
            ensure!(ended.load(Ordering::SeqCst), "the trace goes on");
            Ok(())
        })
        .unwrap();
        trace.join().unwrap().unwrap()
    });
    let records: Vec<Value> = traced.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(records.len(), 2, "{traced}");
    for record in records {
        assert_eq!(record["source"]["workload"], "geo-web.host-3", "{record}");
        assert_eq!(record["destination"]["workload"], "map-db.host-2", "{record}");
        assert_eq!(record["enforced"]["verdict"], "deny", "{record}");
    }
}
