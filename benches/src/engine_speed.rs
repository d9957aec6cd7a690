//! The engine at the start of a day, in shapes for which others have published numbers.
//!
//! Each runs in a process of its own, so that its peak of memory is its own. What a host is told arrives as
//! it would from the controller, member by member; what the controller does for it is timed separately.

use std::net::Ipv4Addr;
use std::process::Command;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, bail};
use bulkhead_engine::{HostEngine, LocalEndpoint, Member, MemberIndex};
use bulkhead_model::policy::PolicySpec;
use bulkhead_model::{ObjectKey, Prefix, Selector};
use serde::{Deserialize, Serialize};

use crate::report::Line;
use crate::stats::median;
use crate::{Effort, fixtures, memory, progress};

const MARKERS: u32 = 31;
const REMOTES: u32 = 250_000;
const POLICIES: u32 = 10_000;
const SNAPSHOT_LOCALS: u32 = 200;
const CUSTOMERS: u32 = 100_000;
const CUSTOMER_LOCALS: u32 = 100;
const RULES_PER_POLICY: u32 = 5;

/// What a child process measured.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
struct Outcome {
    seconds: f64,
    megabytes: f64,
    /// Addresses in the tables: a check that the work was done.
    addresses: usize,
}

/// Runs one measurement in this process and prints its outcome.
pub(crate) fn child(name: &str) -> anyhow::Result<()> {
    let outcome = match name {
        "snapshot" => snapshot()?,
        "snapshot-index" => snapshot_index()?,
        "customers" => customers()?,
        "customers-index" => customers_index()?,
        _ => bail!("there is no measurement {name:?}"),
    };
    println!("{}", serde_json::to_string(&outcome)?);
    Ok(())
}

fn in_child(name: &str) -> anyhow::Result<Outcome> {
    let program = std::env::current_exe()?;
    let output = Command::new(program).args(["--child", name]).output()?;
    if !output.status.success() {
        bail!("{name}: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    serde_json::from_slice(&output.stdout).with_context(|| format!("answer of {name}"))
}

/// Measures both shapes.
pub(crate) fn measure(effort: Effort) -> anyhow::Result<Vec<Line>> {
    let rounds = effort.pick(5, 3);
    let names = ["snapshot", "customers", "snapshot-index", "customers-index"];
    let mut outcomes = names.map(|_| Vec::new());
    for round in 0..rounds {
        progress(&format!("engine: round {} of {rounds}", round + 1));
        for (outcomes, name) in outcomes.iter_mut().zip(names) {
            outcomes.push(in_child(name)?);
        }
    }
    let [snapshot, customers, snapshot_index, customers_index] = outcomes;
    let mut lines = Vec::new();
    let shape = "start of day, 250 000 workloads, 10 000 policies, 200 local";
    lines.extend(beside_published(shape, &snapshot, (3.39, 374.5), (0.34, 75.0)));
    lines.extend(alone(&format!("{shape}: the controller's index"), &snapshot_index));
    let shape = "100 000 isolated customers, 100 local";
    lines.extend(beside_published(shape, &customers, (6.9, 402.0), (0.5, 80.0)));
    lines.extend(alone(&format!("{shape}: the controller's index"), &customers_index));
    Ok(lines)
}

fn medians(outcomes: &[Outcome]) -> (f64, f64) {
    let seconds: Vec<f64> = outcomes.iter().map(|outcome| outcome.seconds).collect();
    let megabytes: Vec<f64> = outcomes.iter().map(|outcome| outcome.megabytes).collect();
    (median(&seconds), median(&megabytes))
}

fn beside_published(
    shape: &str,
    outcomes: &[Outcome],
    published: (f64, f64),
    budget: (f64, f64),
) -> Vec<Line> {
    let (seconds, megabytes) = medians(outcomes);
    let line = |what: &str, unit, ours: f64, published: f64, budget: f64| {
        Line::new(format!("{shape}: {what}"), unit, ours)
            .beside("calico (published)", published)
            .ratio(ours / published)
            .budget(format!("<= {budget} {unit}"), ours <= budget)
    };
    vec![
        line("time", "s", seconds, published.0, budget.0),
        line("memory", "MB", megabytes, published.1, budget.1),
    ]
}

fn alone(name: &str, outcomes: &[Outcome]) -> Vec<Line> {
    let (seconds, megabytes) = medians(outcomes);
    vec![
        Line::new(format!("{name}: time"), "s", seconds),
        Line::new(format!("{name}: memory"), "MB", megabytes),
    ]
}

/// Times something from the first input to the last table.
fn timed(act: impl FnOnce() -> anyhow::Result<usize>) -> anyhow::Result<Outcome> {
    let before = memory::start()?;
    let started = Instant::now();
    let addresses = act()?;
    let seconds = started.elapsed().as_secs_f64();
    Ok(Outcome { seconds, megabytes: memory::peak()? - before, addresses })
}

fn marker(number: u32) -> anyhow::Result<Selector> {
    fixtures::selector(&format!("has(marker-{})", number % MARKERS))
}

fn snapshot_labels(number: u32) -> Vec<(String, String)> {
    let one_in = |k: u32| (format!("one-in-{k}"), format!("value-{}", number % k));
    let mut labels: Vec<_> = [10, 11, 20, 30, 40].map(one_in).into();
    labels.push((format!("marker-{}", number % MARKERS), "true".into()));
    labels
}

fn entity(
    number: u32,
    host: &Arc<str>,
    labels: &[(String, String)],
) -> anyhow::Result<bulkhead_model::Entity> {
    let labels: Vec<_> = labels.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
    fixtures::workload(&format!("w{number}"), host, &labels, fixtures::address(number))
}

fn local(number: u32, host: &Arc<str>, labels: &[(String, String)]) -> anyhow::Result<LocalEndpoint> {
    Ok(LocalEndpoint { entity: entity(number, host, labels)?, ifindex: number + 2 })
}

fn remote(number: u32, host: &Arc<str>) -> Member {
    let ip: Ipv4Addr = fixtures::address(number);
    Member {
        entity: format!("Workload/w{number}").into(),
        host: Some(Arc::clone(host)),
        prefixes: vec![Prefix::host(ip.into())],
        ports: Vec::new(),
    }
}

/// Every host's tables: policies first, then workloads, then what the engine asks for.
fn snapshot() -> anyhow::Result<Outcome> {
    let (here, elsewhere): (Arc<str>, Arc<str>) = ("here".into(), "elsewhere".into());
    let markers = (0..MARKERS).map(marker).collect::<anyhow::Result<Vec<_>>>()?;
    let at = |number: u32| markers[(number % MARKERS) as usize].clone();
    let policy = |number: u32| -> (ObjectKey, PolicySpec) {
        let from: Vec<_> = (0..RULES_PER_POLICY).map(|rule| at(number * RULES_PER_POLICY + rule)).collect();
        (fixtures::policy_key(&format!("p{number}")), fixtures::allow_from(at(number), &from))
    };
    timed(|| {
        let mut engine = HostEngine::new(&here);
        for (key, spec) in (0..POLICIES).map(policy) {
            engine.set_policy(&key, Some(&spec));
        }
        for number in REMOTES..REMOTES + SNAPSHOT_LOCALS {
            let endpoint = local(number, &here, &snapshot_labels(number))?;
            engine.set_local(&Arc::clone(&endpoint.entity.name), Some(endpoint));
        }
        program(&mut engine, |selector| {
            let wanted = markers.iter().position(|marker| marker == selector).unwrap_or(usize::MAX);
            let wanted = u32::try_from(wanted).unwrap_or(REMOTES);
            (wanted..REMOTES).step_by(MARKERS as usize).map(|number| remote(number, &elsewhere))
        });
        Ok(engine.policy().addresses.len())
    })
    .and_then(|outcome| check(outcome, REMOTES + SNAPSHOT_LOCALS))
}

/// Flushes until nothing is missing, as an agent does.
fn program<M: Iterator<Item = Member>>(engine: &mut HostEngine, members: impl Fn(&Selector) -> M) {
    loop {
        engine.flush();
        let waiting = engine.waiting();
        for selector in &waiting {
            engine.set_members(selector, members(selector));
        }
        if waiting.is_empty() && !engine.needs_flush() {
            return;
        }
    }
}

fn check(outcome: Outcome, addresses: u32) -> anyhow::Result<Outcome> {
    if outcome.addresses != addresses as usize {
        bail!("{} addresses came out where {addresses} were expected", outcome.addresses);
    }
    Ok(outcome)
}

fn snapshot_index() -> anyhow::Result<Outcome> {
    let host: Arc<str> = "elsewhere".into();
    timed(|| {
        let mut index = MemberIndex::new();
        for number in 0..MARKERS {
            index.subscribe(&marker(number)?);
        }
        for number in 0..REMOTES {
            index.upsert(&entity(number, &host, &snapshot_labels(number))?);
        }
        Ok(index.entities())
    })
    .and_then(|outcome| check(outcome, REMOTES))
}

fn customer(number: u32) -> anyhow::Result<Selector> {
    fixtures::selector(&format!("customer == '{number}'"))
}

/// Every policy is known everywhere; a host wants the members of its own customers only.
fn customers() -> anyhow::Result<Outcome> {
    let here: Arc<str> = "here".into();
    timed(|| {
        let mut engine = HostEngine::new(&here);
        for number in 0..CUSTOMERS {
            let own = customer(number)?;
            let key = fixtures::policy_key(&format!("isolate-{number}"));
            engine.set_policy(&key, Some(&fixtures::allow_from(own.clone(), &[own])));
        }
        for number in 0..CUSTOMER_LOCALS {
            let endpoint = local(number, &here, &[("customer".into(), number.to_string())])?;
            engine.set_local(&Arc::clone(&endpoint.entity.name), Some(endpoint));
        }
        program(&mut engine, |_| std::iter::empty());
        Ok(engine.policy().addresses.len())
    })
    .and_then(|outcome| check(outcome, CUSTOMER_LOCALS))
}

fn customers_index() -> anyhow::Result<Outcome> {
    let host: Arc<str> = "elsewhere".into();
    timed(|| {
        let mut index = MemberIndex::new();
        for number in 0..CUSTOMERS {
            index.upsert(&entity(number, &host, &[("customer".into(), number.to_string())])?);
        }
        for number in 0..CUSTOMER_LOCALS {
            index.subscribe(&customer(number)?);
        }
        Ok(index.entities())
    })
    .and_then(|outcome| check(outcome, CUSTOMERS))
}
