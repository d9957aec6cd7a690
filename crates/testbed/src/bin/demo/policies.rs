//! What policies do: matrices, a relabelled workload, and who was refused.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use bulkhead_testbed::{Example, Family, Outcome, PingPong, Protocol, eventually, expected};
use serde_json::Value;

use crate::paint::Show;

/// A cut must be felt within this time, half a second of which is the silence that tells it.
const CUT_TIME: Duration = Duration::from_secs(5);

pub(crate) fn without(show: &mut Show, example: &Example) -> Result<()> {
    show.scene("No policy: everybody reaches everybody");
    let observed = example.observe(Family::V4, |component| Protocol::Tcp(component.port))?;
    show.matrices(example, &observed, |_, _| true);
    Ok(())
}

pub(crate) fn with(show: &mut Show, example: &Example) -> Result<()> {
    show.scene("Policies: inside an application all, between them three, and the DMZ never");
    let directory = Example::policies()?;
    let applying = Instant::now();
    let said = example.bulkhead.ok(&["apply", "-f", &directory.display().to_string()])?;
    show.quote("bulkhead apply -f examples/applications", &said);
    example.bulkhead.wait_policies()?;
    show.note(&format!("In force on all hosts after {} ms.", applying.elapsed().as_millis()));
    println!();
    example.wait_expected().ok();
    let observed = example.observe(Family::V4, |component| Protocol::Tcp(component.port))?;
    show.matrices(example, &observed, expected);
    let v6 = example.observe(Family::V6, |component| Protocol::Tcp(component.port))?;
    let cells = v6.rows.iter().flatten().flatten().count();
    show.equal("the same over IPv6", cells - example.differences(&v6, expected).len(), cells);
    Ok(())
}

pub(crate) fn relabel(show: &mut Show, example: &Example) -> Result<()> {
    show.scene("A label taken away ends a live connection");
    let (check, map) = (example.workload("credit-check-eu"), example.workload("ip-map"));
    let live = PingPong::start(check, SocketAddr::new(map.v4.into(), 8084))?;
    eventually("the connection lives", || {
        ensure!(live.round_trips() >= 500);
        Ok(())
    })?;
    let before = live.round_trips();
    show.note("credit-check-eu has talked to ip-map since it carries region=eu. Now it becomes region=us.");
    println!();
    let relabelled = Instant::now();
    let labels = |region| [("application", "orderInput"), ("role", "creditCheck"), ("region", region)];
    example.bulkhead.register(check, &labels("us"))?;
    let cut = eventually("the connection is cut", || {
        ensure!(live.has_stalled());
        Ok(())
    });
    let took = live.last_answer().saturating_duration_since(relabelled);
    show.figure("round trips on the connection before", &before.to_string(), "at least 500", before >= 500);
    let observed = if cut.is_ok() { format!("{} ms", took.as_millis()) } else { "never".into() };
    let limit = format!("below {} s", CUT_TIME.as_secs());
    show.figure("last answer after the change", &observed, &limit, cut.is_ok() && took < CUT_TIME);
    drop(live);
    example.bulkhead.register(check, &labels("eu"))?;
    let back = example.wait_expected();
    show.equal("with region=eu again as before", if back.is_ok() { "yes" } else { "no" }, "yes");
    Ok(())
}

pub(crate) fn refused(show: &mut Show, example: &Example) -> Result<()> {
    show.scene("Who was refused last, by which rule");
    // Until the last reports of the scene before have come in, and these are the newest.
    let observed = eventually("the newest records are of this scene", || {
        let observed = example.observe(Family::V4, |component| Protocol::Tcp(component.port))?;
        let newest = items(&example.bulkhead.json(&["flows", "--verdict", "deny", "--limit", "10"])?);
        ensure!(newest.iter().all(|record| record["protocol"] == 6));
        Ok(observed)
    })?;
    let refused = observed.rows.iter().flatten().filter(|cell| **cell == Some(Outcome::Silent)).count();
    show.note(&format!("Everybody has just tried to reach everybody; {refused} pairs were refused."));
    println!();
    let said = example.bulkhead.ok(&["flows", "--verdict", "deny", "--limit", "10"])?;
    show.quote("bulkhead flows --verdict deny --limit 10", &said);
    // The same question for the pairs that one rule of the zones tier refused, with labels and all.
    let by_rule = ["flows", "--verdict", "deny", "--policy", "dmz-to-restricted", "--limit", "3"];
    let answer = example.bulkhead.json(&by_rule)?;
    let records: Vec<Value> = answer["items"].as_array().or(answer.as_array()).cloned().unwrap_or_default();
    for record in &records {
        for end in ["source", "destination"] {
            let labels = record[end]["labels"].as_object().into_iter().flatten();
            let labels: Vec<String> = labels
                .filter(|(key, _)| !key.contains('/'))
                .map(|(key, value)| format!("{key}={}", value.as_str().unwrap_or("?")))
                .collect();
            let name = record[end]["workload"].as_str().unwrap_or("?");
            println!(
                "   {:>11} {name:<22} {}",
                if end == "source" { "from" } else { "to" },
                labels.join(" ")
            );
        }
        let rule = &record["enforced"]["rule"];
        println!(
            "   {:>11} tier {}, policy {}, {} rule {}\n",
            "refused by",
            rule["tier"].as_str().unwrap_or("?"),
            rule["policy"].as_str().unwrap_or("?"),
            rule["direction"].as_str().unwrap_or("?"),
            rule["index"]
        );
    }
    let complete = records.iter().filter(|record| is_complete(record)).count();
    show.equal("records with names, labels, tier, policy, rule", complete, 3);
    Ok(())
}

fn items(answer: &Value) -> Vec<Value> {
    answer["items"].as_array().or(answer.as_array()).cloned().unwrap_or_default()
}

fn is_complete(record: &Value) -> bool {
    let rule = &record["enforced"]["rule"];
    let named = |end: &str| record[end]["workload"].is_string() && record[end]["host"].is_string();
    named("source")
        && named("destination")
        && record["source"]["labels"]["zone"] == "dmz"
        && record["destination"]["labels"]["zone"] == "restricted"
        && rule["tier"] == "zones"
        && rule["policy"] == "dmz-to-restricted"
        && rule["index"] == 0
}
