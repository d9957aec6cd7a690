//! A simulated fleet: a controller as a process of its own and thousands of agents in another, by `bulkhead sim`.

use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, bail};
use serde_json::Value;

use crate::report::Line;
use crate::{Effort, progress};

/// Of 30 000 pods under 30 000 policies: time to enforcement of a policy.
const CILIUM: &str = "cilium (published)";

/// Sizes of a fleet.
#[derive(Debug, Clone, Copy)]
struct Sizes {
    agents: u32,
    workloads: u32,
    policies: u32,
    activations: u32,
    seconds: u32,
}

/// What the design speaks of.
const FULL: Sizes =
    Sizes { agents: 5000, workloads: 100_000, policies: 10_000, activations: 20_000, seconds: 30 };
/// A tenth of it.
const SCALED: Sizes =
    Sizes { agents: 500, workloads: 10_000, policies: 1000, activations: 2000, seconds: 15 };
const QUICK: Sizes = Sizes { agents: 100, workloads: 2000, policies: 200, activations: 500, seconds: 5 };

/// A scaled run.
pub(crate) fn measure(effort: Effort) -> anyhow::Result<Vec<Line>> {
    run(effort.pick(SCALED, QUICK))
}

/// All of it: minutes, and some 4 GB of memory.
pub(crate) fn measure_full(_effort: Effort) -> anyhow::Result<Vec<Line>> {
    run(FULL)
}

fn run(sizes: Sizes) -> anyhow::Result<Vec<Line>> {
    let Sizes { agents, workloads, policies, activations, seconds } = sizes;
    progress(&format!("{agents} agents, {workloads} workloads, {policies} policies"));
    let beside = std::env::current_exe()?.with_file_name("bulkhead");
    let program = std::env::var_os("BULKHEAD_BIN").map_or(beside, PathBuf::from);
    let output = Command::new(&program)
        .args(["sim", "-o", "json"])
        .args(["--agents", &agents.to_string(), "--workloads", &workloads.to_string()])
        .args(["--policies", &policies.to_string(), "--duration", &format!("{seconds}s")])
        .args(["--activations-per-second", &activations.to_string()])
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("{}: build it, or set BULKHEAD_BIN", program.display()))?;
    let report: Value = serde_json::from_slice(&output.stdout).context("the simulation's answer")?;
    if !output.status.success() {
        bail!("agents ended in another state than the repository: {}", report["differences"]);
    }
    let number = |pointer: &str| report.pointer(pointer).and_then(Value::as_f64).unwrap_or_default();
    let line = |what: &str, unit: &str, pointer: &str| {
        Line::new(format!("fleet of {agents}, {workloads} workloads: {what}"), unit, number(pointer))
    };
    let at_most = |line: Line, most: f64| {
        let (within, budget) = (line.ours <= most, format!("<= {most} {}", line.unit));
        line.budget(budget, within)
    };
    let rate = line("activations", "1/s", "/activations_per_second");
    let activated = rate.ours * number("/seconds");
    let each = |what: &str, pointer: &str| {
        let what = format!("fleet of {agents}, {workloads} workloads: {what}");
        Line::new(what, "µs", number(pointer) / activated * 1e6)
    };
    let kept = rate.ours >= f64::from(activations) * 0.99;
    Ok(vec![
        line("change, commit to the last concerned agent: p50", "ms", "/latency_ms/p50").beside(CILIUM, 9.0),
        at_most(line("change, commit to the last concerned agent: p99", "ms", "/latency_ms/p99"), 250.0)
            .beside(CILIUM, 317.0),
        line("the same from publishing: p99", "ms", "/latency_from_publishing_ms/p99"),
        line("policy, answer to the last concerned agent: p99", "ms", "/policy_latency_ms/p99"),
        rate.budget(format!(">= {activations} 1/s"), kept),
        at_most(line("bytes to unconcerned agents", "B", "/unconcerned_bytes"), 0.0),
        line("bytes to a concerned agent", "B", "/bytes_per_concerned_agent"),
        at_most(line("controller's memory", "MiB", "/controller_rss_mib"), 1024.0),
        line("engine with all policies", "MiB", "/agent_rss_mib/engine_with_all_policies"),
        each("controller's processor time for an activation", "/cpu_seconds/controller"),
        each("all agents' processor time for an activation", "/cpu_seconds/agents"),
        line("first connection of all", "s", "/first_sync_seconds"),
        line("all reconnect at once", "s", "/reconnect_storm_seconds"),
    ])
}
