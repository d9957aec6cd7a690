//! The small parts: selectors, files, the reference evaluator.

use std::fmt::Write;
use std::hint::black_box;
use std::sync::Arc;
use std::time::Instant;

use anyhow::anyhow;
use bulkhead_engine::{Assembly, Endpoint, Flow, World, decide};
use bulkhead_model::ports::{Protocol, USUAL_SOURCE_PORT};
use bulkhead_model::{Labels, Selector, document};

use crate::report::Line;
use crate::stats::median;
use crate::{Effort, fixtures, progress};

const SELECTORS: [(&str, &str); 4] = [
    ("one condition", "role == 'web'"),
    ("three conditions", "role == 'web' && env in {'prod', 'staging'} && !has(quarantine)"),
    ("Calico's BenchmarkParse", "! (a == \"b\"&&! c != \"d\") || !(a == \"b\" && !c != \"d\")"),
    (
        "twelve conditions",
        "(role in {'web', 'api', 'batch'} && env != 'dev' || role starts with 'w' && !has(quarantine)) \
         && (team == 'b' || team contains 'x' || tier in {'1', '2', '3'}) && !(app == 'mail' && env == 'test') \
         && has(app) && app not in {'a', 'b', 'c', 'd'} && tier ends with '2'",
    ),
];

/// Measures all of them.
pub(crate) fn measure(effort: Effort) -> anyhow::Result<Vec<Line>> {
    progress("selectors, files, reference evaluator");
    let rounds = effort.pick(11, 5);
    let mut labels = Labels::new();
    for (key, value) in [("role", "web"), ("env", "prod"), ("app", "shop"), ("team", "a"), ("tier", "2")] {
        labels.insert(key, value)?;
    }
    let mut lines = Vec::new();
    for (name, text) in SELECTORS {
        let selector = fixtures::selector(text)?;
        let parse = nanos(rounds, 20_000, || drop(black_box(Selector::parse(black_box(text)))));
        let matching = nanos(rounds, 200_000, || {
            black_box(selector.matches(black_box(&labels)));
        });
        lines.push(Line::new(format!("selector, {name}: parse"), "1/s", 1e9 / parse));
        lines.push(Line::new(format!("selector, {name}: match"), "ns", matching));
    }
    let text = policies(1_000)?;
    let yaml = nanos(rounds.min(5), 1, || drop(black_box(document::parse("bench", black_box(&text)))));
    let (world, flow) = world(1_000)?;
    let decided = nanos(rounds, 200, || drop(black_box(decide(black_box(&world), black_box(&flow)))));
    lines.extend([
        Line::new("1000 policies of two rules from YAML", "ms", yaml / 1e6),
        Line::new("reference evaluator over 1000 policies, with its trace", "1/s", 1e9 / decided),
    ]);
    Ok(lines)
}

fn nanos(rounds: usize, repeat: u32, mut act: impl FnMut()) -> f64 {
    let mut round = || {
        let started = Instant::now();
        (0..repeat).for_each(|_| act());
        started.elapsed().as_secs_f64() * 1e9 / f64::from(repeat)
    };
    let values: Vec<f64> = (0..rounds).map(|_| round()).collect();
    median(&values)
}

/// Policies of two rules each, as somebody would write them.
pub(crate) fn policies(count: u32) -> anyhow::Result<String> {
    let mut text = String::new();
    for number in 0..count {
        write!(
            text,
            "---\napiVersion: bulkhead.dev/v1\nkind: Policy\nmetadata:\n  name: p{number}\nspec:\n  \
             appliesTo: role == 'r{number}'\n  ingress:\n  - action: Allow\n    from:\n      \
             selector: role == 'r{}' && env == 'prod'\n    ports: [tcp/443, tcp/8000-8100]\n  \
             - action: Deny\n    from:\n      cidrs: [10.0.0.0/8]\n",
            number + 1
        )?;
    }
    Ok(text)
}

/// Policies of which two concern the flow, and its two ends.
fn world(policies_len: u32) -> anyhow::Result<(World, Flow)> {
    let mut world = World::new();
    let mut assembly = Assembly::default();
    let problems = |problems: Vec<bulkhead_model::Problem>| anyhow!("{problems:?}");
    for document in document::parse("bench", &policies(policies_len)?).map_err(problems)? {
        let key = document.resource.key();
        world.change(&assembly.set(&key, Some(document.resource)));
    }
    let host: Arc<str> = "h".into();
    let mut end = |role: &str, number| -> anyhow::Result<Endpoint> {
        let ip = fixtures::address(number);
        let entity = fixtures::workload(role, &host, &[("role", role), ("env", "prod")], ip)?;
        let name = Arc::clone(&entity.name);
        world.entities.insert(Arc::clone(&name), entity);
        Ok(Endpoint { workload: Some(name), address: ip.into() })
    };
    let (source, destination) = (end("r1", 1)?, end("r0", 0)?);
    let flow = Flow { source, destination, key: Protocol::TCP.key(443), source_port: USUAL_SOURCE_PORT };
    Ok((world, flow))
}
