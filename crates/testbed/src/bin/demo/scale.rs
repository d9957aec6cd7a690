//! More workloads: a second instance, and twenty.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use bulkhead_testbed::{
    Example, Family, HOSTS, Member, OTHER_PORT, Outcome, PROBE_WAIT, Probe, Protocol, Server, UdpStream,
    Workload, eventually, matrix, probe,
};

use crate::paint::Show;

/// Instances of the component, and of its peers.
const INSTANCES: usize = 20;
/// Where they serve.
const PORT: u16 = 7100;
/// Labels of the scaled component and of its peers.
const TELLER: [(&str, &str); 2] = [("application", "settlement"), ("role", "teller")];
const LEDGER: [(&str, &str); 2] = [("application", "settlement"), ("role", "ledger")];

pub(crate) fn new_instance(show: &mut Show, example: &Example) -> Result<Member> {
    show.scene("A second credit status, on another host: protected before its first packet");
    let bulkhead = &example.bulkhead;
    let policies = || bulkhead.get("/apis/bulkhead.dev/v1/policies").map(|list| list["items"].clone());
    let before = policies()?;
    let workload = bulkhead.lab.unjoined_workload("host-1", "credit-status-2")?;
    // Strangers send to it, and it sends to a stranger, before it even has an interface.
    let (stranger, map) = (example.workload("geo-web"), example.workload("map-db"));
    let towards = UdpStream::start(stranger, &workload, workload.v4.into(), 7001, 2000, 8)?;
    let from = UdpStream::start(&workload, map, map.v4.into(), 7002, 2000, 8)?;
    bulkhead.lab.join(&workload)?;
    let server = Server::start(&workload.netns, &[8083, OTHER_PORT])?;
    let sent = |count: u64| {
        eventually("traffic flows", || {
            ensure!(towards.so_far().sent >= count && from.so_far().sent >= count);
            Ok(())
        })
    };
    sent(600)?;
    let early = from.so_far().received + towards.so_far().received;
    let registering = Instant::now();
    bulkhead.register(&workload, &[("application", "customerRecord"), ("role", "creditStatus")])?;
    let reached = |name: &str, port: u16| -> Result<bool> {
        let target = Probe { address: workload.v4.into(), protocol: Protocol::Tcp(port) };
        Ok(probe(example.workload(name), &[target], PROBE_WAIT)? == [Outcome::Reached])
    };
    let callers = [("credit-check-eu", 8083), ("credit-check-us", 8083), ("customer-web", OTHER_PORT)];
    for (name, port) in callers {
        eventually(name, || {
            ensure!(reached(name, port)?);
            Ok(())
        })?;
    }
    let took = registering.elapsed();
    sent(towards.so_far().sent + 600)?;
    let strangers = ["order-web", "geo-check", "geo-web", "ip-map", "map-db"];
    let mut open = 0;
    for name in strangers {
        open += usize::from(reached(name, 8083)?);
    }
    let (towards, from) = (towards.finish(), from.finish());
    show.equal("packets passed before anybody knew its labels", early, 0);
    let sent = format!("leaked of {} sent to it and {} by it", towards.sent, from.sent);
    show.equal(&sent, towards.received + from.received, 0);
    let limit = Duration::from_secs(5);
    let observed = format!("{} ms", took.as_millis());
    show.figure("registered to reached from 3 right places", &observed, "below 5 s", took < limit);
    show.equal("strangers of 5 that reach it", open, 0);
    show.equal("policies edited", usize::from(policies()? != before), 0);
    Ok(Member { workload, server })
}

pub(crate) fn one_to_twenty(show: &mut Show, example: &Example) -> Result<Vec<Member>> {
    show.scene("From 1 to 20 instances against 20 peers");
    let bulkhead = &example.bulkhead;
    let start = |host: &str, name: String, labels: &[(&str, &str)]| {
        Member::start(bulkhead, host, &name, labels, &[PORT])
    };
    let ledgers = (0..INSTANCES).map(|n| start("host-2", format!("ledger-{n}"), &LEDGER));
    let ledgers = ledgers.collect::<Result<Vec<_>>>()?;
    let mut tellers = vec![start("host-1", "teller-0".into(), &TELLER)?];
    wait_reached(&tellers, &ledgers)?;
    let written =
        || -> Result<Vec<u64>> { HOSTS.iter().map(|host| bulkhead.agent(host).entries_written()).collect() };
    let (before, quiet) = (written()?, bulkhead.agent_session("host-3")?);
    let scaling = Instant::now();
    for n in 1..INSTANCES {
        tellers.push(start("host-1", format!("teller-{n}"), &TELLER)?);
    }
    wait_reached(&tellers, &ledgers)?;
    let took = scaling.elapsed();
    let after = written()?;
    let costs: Vec<u64> = before.iter().zip(&after).map(|(before, after)| after - before).collect();
    let heard = bulkhead.agent_session("host-3")?;

    show.note(&format!(
        "19 more on host-1, 20 peers on host-2, none on host-3; all {} pairs after {:.1} s.",
        INSTANCES * INSTANCES,
        took.as_secs_f64()
    ));
    show.note("Every instance has two addresses. Pairwise ACLs need 20 × 20 = 400 entries per family.");
    println!();
    let all: Vec<&Workload> = ledgers.iter().map(|member| &member.workload).collect();
    let sources: Vec<&Workload> = tellers.iter().map(|member| &member.workload).collect();
    let found = matrix(&sources, &all, Family::V4, |_| Protocol::Tcp(PORT), PROBE_WAIT)?;
    let count = found.rows.iter().flatten().filter(|cell| **cell == Some(Outcome::Reached)).count();
    show.equal("pairs that reach each other", count, INSTANCES * INSTANCES);
    let pairs = (INSTANCES * INSTANCES) as u64;
    for (host, cost) in HOSTS.iter().zip(&costs).take(2) {
        let what = format!("table entries written on {host}");
        show.figure(&what, &cost.to_string(), "below 400", (1..pairs).contains(cost));
    }
    show.equal("table entries written on host-3", costs[2], 0);
    let messages = |session: &serde_json::Value| session["messagesSent"].as_u64().unwrap_or(u64::MAX);
    show.equal("messages sent to host-3", messages(&heard) - messages(&quiet), 0);
    tellers.extend(ledgers);
    Ok(tellers)
}

/// Waits until each source reaches each destination.
fn wait_reached(from: &[Member], to: &[Member]) -> Result<()> {
    let sources: Vec<&Workload> = from.iter().map(|member| &member.workload).collect();
    let destinations: Vec<&Workload> = to.iter().map(|member| &member.workload).collect();
    eventually("all instances reach all peers", || {
        let found = matrix(&sources, &destinations, Family::V4, |_| Protocol::Tcp(PORT), PROBE_WAIT)?;
        let missing = found.rows.iter().flatten().filter(|cell| **cell != Some(Outcome::Reached)).count();
        ensure!(missing == 0, "{missing} pairs are missing");
        Ok(())
    })
}
