//! What the lock-out guard costs a change, in the largest fleet that the design speaks of.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::time::Instant;

use anyhow::{anyhow, ensure};
use bulkhead_engine::{Lifeline, cuts};
use bulkhead_model::time::Timestamp;
use bulkhead_model::{Resource, document};

use crate::report::Line;
use crate::stats::median;
use crate::{Effort, fixtures, progress, small};

const AGENTS: u32 = 5_000;
const WORKLOADS: u32 = 100_000;
const POLICIES: u32 = 10_000;

/// Measures a change that concerns one workload, and one that every agent is judged for.
pub(crate) fn measure(effort: Effort) -> anyhow::Result<Vec<Line>> {
    progress("lock-out guard: 5000 agents, 100 000 workloads, 10 000 policies");
    let objects = objects()?;
    let objects: Vec<&Resource> = objects.iter().collect();
    let controller = ([10, 0, 0, 1], 9441).into();
    let lifelines: Vec<Lifeline> = (0..AGENTS)
        .map(|number| Lifeline { source: (host_address(number), 50_000).into(), destination: controller })
        .collect();
    let rounds = effort.pick(11, 3);
    let one = read(&small::policies(1)?)?;
    let every = read(
        "apiVersion: bulkhead.dev/v1\nkind: Policy\nmetadata: {name: hosts}\nspec: \
         {appliesTo: \"bulkhead.dev/kind == 'HostEndpoint'\", egress: [{action: Allow, to: {cidrs: [10.0.0.0/8]}}]}\n",
    )?;
    let shut = read(
        "apiVersion: bulkhead.dev/v1\nkind: Policy\nmetadata: {name: hosts}\nspec: \
         {appliesTo: \"bulkhead.dev/kind == 'HostEndpoint'\", egress: []}\n",
    )?;
    let mut lines = Vec::new();
    for (name, change, expected) in [
        ("a policy that concerns no agent", &one, 0),
        ("a policy of every host, all 5000 judged and kept", &every, 0),
        ("a policy of every host, all 5000 cut off", &shut, AGENTS as usize),
    ] {
        let changes = BTreeMap::from([(change[0].key(), Some(&change[0]))]);
        let mut times = Vec::new();
        for _ in 0..rounds {
            let started = Instant::now();
            let found = cuts(&objects, &changes, &lifelines, Timestamp { seconds: 0 })?;
            times.push(started.elapsed().as_secs_f64() * 1e3);
            ensure!(found.len() == expected, "{} cut off, not {expected}", found.len());
        }
        lines.push(Line::new(format!("lock-out guard, {name}"), "ms", median(&times)));
    }
    Ok(lines)
}

fn host_address(number: u32) -> std::net::Ipv4Addr {
    std::net::Ipv4Addr::from_bits(u32::from(std::net::Ipv4Addr::new(10, 1, 0, 0)) + number)
}

fn read(text: &str) -> anyhow::Result<Vec<Resource>> {
    let documents = document::parse("bench", text).map_err(|problems| anyhow!("{problems:?}"))?;
    Ok(documents.into_iter().map(|document| document.resource).collect())
}

/// Files are bounded, so there are several.
fn objects() -> anyhow::Result<Vec<Resource>> {
    let mut objects = read(&small::policies(POLICIES)?)?;
    let mut text = String::new();
    for number in 0..AGENTS {
        let address = host_address(number);
        write!(
            text,
            "---\napiVersion: bulkhead.dev/v1\nkind: Host\nmetadata: {{name: h{number}}}\n\
             spec: {{addresses: [{address}]}}\n\
             ---\napiVersion: bulkhead.dev/v1\nkind: HostEndpoint\nmetadata: {{name: h{number}, labels: {{role: \
             r{number}}}}}\nspec: {{host: h{number}, addresses: [{address}]}}\n"
        )?;
    }
    objects.extend(read(&std::mem::take(&mut text))?);
    for number in 0..WORKLOADS {
        write!(
            text,
            "---\napiVersion: bulkhead.dev/v1\nkind: Workload\nmetadata: {{name: w{number}, labels: {{role: \
             r{}}}}}\nspec: {{host: h{}, addresses: [{}]}}\n",
            number % POLICIES,
            number % AGENTS,
            fixtures::address(number),
        )?;
        if number % 20_000 == 19_999 {
            objects.extend(read(&std::mem::take(&mut text))?);
        }
    }
    Ok(objects)
}
