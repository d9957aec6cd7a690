//! A small fleet, simulated: that it works, not how fast.

use std::process::Command;

use serde_json::Value;

#[test]
fn a_small_fleet_ends_as_the_repository_says_and_the_unconcerned_hear_nothing() {
    let arguments =
        "sim --agents 50 --workloads 1000 --policies 100 --activations-per-second 200 --duration 5s -o json";
    let output = Command::new(env!("CARGO_BIN_EXE_bulkhead")).args(arguments.split(' ')).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    let report: Value =
        serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {said}"));
    assert_eq!(report["differences"], serde_json::json!([]), "{said}");
    assert!(output.status.success(), "{said}");
    assert_eq!(report["unconcerned_bytes"], 0);
    assert_eq!(report["streams_lost"], 0, "{said}");
    let changes = report["latency_ms"]["samples"].as_u64().unwrap();
    assert!(changes > 20, "hardly anything happened: {report}");
    assert!(
        report["controller_rss_mib"].as_f64().unwrap() > 1.0
            && report["cpu_seconds"]["agents"].as_f64().unwrap() > 0.0
    );
}

#[test]
fn an_impossible_fleet_is_refused() {
    let output =
        Command::new(env!("CARGO_BIN_EXE_bulkhead")).args(["sim", "--agents", "0"]).output().unwrap();
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("at least one agent"));
}
