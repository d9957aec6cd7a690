//! What came out.

use std::fmt::Write as _;
use std::time::Duration;

use serde::Serialize;

/// Percentiles of durations, in milliseconds.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct Latency {
    /// Half took at most so long.
    pub p50: f64,
    /// 90 of 100.
    pub p90: f64,
    /// 99 of 100.
    pub p99: f64,
    /// The slowest.
    pub max: f64,
    /// How many there were.
    pub samples: usize,
}

impl Latency {
    pub(crate) fn of(mut samples: Vec<Duration>) -> Self {
        samples.sort_unstable();
        let at = |percent: usize| {
            let rank = (samples.len() * percent).div_ceil(100).saturating_sub(1);
            samples.get(rank).map_or(0.0, |duration| duration.as_secs_f64() * 1e3)
        };
        Self { p50: at(50), p90: at(90), p99: at(99), max: at(100), samples: samples.len() }
    }
}

/// A number for the controller and one for all agents together.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct Both {
    /// The controller's; 0 if it was not started by the simulation.
    pub controller: f64,
    /// Of the process of all simulated agents.
    pub agents: f64,
}

/// Memory of an agent.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct AgentMemory {
    /// Growth of the simulating process, by the number of its agents.
    pub simulated: f64,
    /// What one engine takes that holds all policies by itself.
    pub engine_with_all_policies: f64,
}

/// Everything that a simulation says at its end.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Report {
    /// Agents, workloads and policies.
    pub agents: u32,
    /// Started at the beginning.
    pub workloads: u32,
    /// In the repository.
    pub policies: u32,
    /// How long there was churn, seconds.
    pub seconds: f64,
    /// From the repository's acknowledgement to the last concerned agent's tables.
    pub latency_ms: Latency,
    /// The same from the moment in which the publishing agent sent it.
    pub latency_from_publishing_ms: Latency,
    /// A change of a policy, from the answer to the operator to the last concerned agent's tables.
    pub policy_latency_ms: Latency,
    /// Starts of workloads that were asked for.
    pub activations_per_second_asked: f64,
    /// Starts that the repository has acknowledged.
    pub activations_per_second: f64,
    /// Bytes about workloads that came to agents which did not ask for them.
    pub unconcerned_bytes: u64,
    /// Bytes for an agent that something concerned, on the average of all such times.
    pub bytes_per_concerned_agent: f64,
    /// Bytes of changed policies that came to agents where they select nobody.
    pub policy_bytes_elsewhere: u64,
    /// Most that was resident.
    pub controller_rss_mib: f64,
    /// Per agent.
    pub agent_rss_mib: AgentMemory,
    /// During the churn.
    pub cpu_seconds: Both,
    /// From the first connection until every agent knew everything, seconds.
    pub first_sync_seconds: f64,
    /// From all connections breaking at once until every agent knew everything again, seconds.
    pub reconnect_storm_seconds: f64,
    /// Streams that ended without being told to.
    pub streams_lost: u64,
    /// Times that an agent was told to come back later, since others were told first.
    pub deferred: u64,
    /// What differs from the repository, and what else must not be. Empty: all is well.
    pub differences: Vec<String>,
}

impl Report {
    /// For eyes.
    pub fn table(&self) -> String {
        let latency = |latency: &Latency| {
            format!(
                "p50 {:.1}  p90 {:.1}  p99 {:.1}  max {:.1}  ({} changes)",
                latency.p50, latency.p90, latency.p99, latency.max, latency.samples
            )
        };
        let rows = [
            (
                "fleet",
                format!("{} agents, {} workloads, {} policies", self.agents, self.workloads, self.policies),
            ),
            ("first sync", format!("{:.1} s", self.first_sync_seconds)),
            ("latency, ms", latency(&self.latency_ms)),
            ("  from publishing, ms", latency(&self.latency_from_publishing_ms)),
            ("  of policies, ms", latency(&self.policy_latency_ms)),
            (
                "activations/s",
                format!(
                    "{:.0} of {:.0} asked for",
                    self.activations_per_second, self.activations_per_second_asked
                ),
            ),
            ("unconcerned bytes", self.unconcerned_bytes.to_string()),
            ("bytes per concerned agent", format!("{:.0}", self.bytes_per_concerned_agent)),
            ("policies where they select nobody", format!("{} bytes", self.policy_bytes_elsewhere)),
            ("controller memory", format!("{:.0} MiB", self.controller_rss_mib)),
            (
                "agent memory",
                format!(
                    "{:.2} MiB simulated, {:.1} MiB an engine with all policies",
                    self.agent_rss_mib.simulated, self.agent_rss_mib.engine_with_all_policies
                ),
            ),
            (
                "processor time",
                format!(
                    "{:.1} s controller, {:.1} s agents, in {:.1} s",
                    self.cpu_seconds.controller, self.cpu_seconds.agents, self.seconds
                ),
            ),
            ("all reconnect at once", format!("{:.1} s", self.reconnect_storm_seconds)),
            ("streams lost", format!("{}; told to come back later: {}", self.streams_lost, self.deferred)),
            (
                "state",
                match self.differences.len() {
                    0 => "every agent has what the repository has".into(),
                    count => format!("{count} differences"),
                },
            ),
        ];
        let mut page = String::new();
        for (name, value) in rows {
            let _ = writeln!(page, "{name:<35} {value}");
        }
        for difference in &self.differences {
            let _ = writeln!(page, "  {difference}");
        }
        page
    }
}
