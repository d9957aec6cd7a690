//! Thousands of simulated agents against a real controller.
//!
//! The controller is a process of its own, so that its memory and processor time can be told from the agents'. Each agent
//! has a connection of its own, speaks the real protocol, and has the real `Assembly` and `HostEngine`; only the kernel is
//! missing. What all agents hear alike (policies) is read once for all of them.
//!
//! Tasks: one per agent, fed from its stream and from a queue of [`COMMANDS_LEN`] (when it is full the script does without
//! that change); the script; progress. All of them end with [`run`].

mod agent;
mod catalogue;
mod churn;
mod dice;
mod fleet;
mod fleet_identity;
mod link;
mod process;
mod report;
mod rest;
mod tracker;
mod verify;
mod world;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use bulkhead_engine::{Assembly, HostEngine};
use bulkhead_model::Resource;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

pub use report::{AgentMemory, Both, Latency, Report};

use agent::Agent;
use churn::Churn;
use fleet::{Fleet, Slice};
use fleet_identity::FleetIdentity;
use link::Command;
use process::{Controller, Usage};
use rest::Rest;
use verify::Truth;
use world::World;

/// Commands that wait for one agent.
const COMMANDS_LEN: usize = 64;
/// Agents that connect at the same time at the beginning: the storm comes later.
const CONNECTING_MAX: usize = 200;
/// Longest wait until everybody knows everything.
const SYNC_TIME_MAX: Duration = Duration::from_secs(300);
/// So long nobody may hear anything before all is said to be done.
const QUIET: Duration = Duration::from_millis(500);
/// If no agent has computed anything for so long, nothing that is waited for will come.
const STUCK_TIME: Duration = Duration::from_secs(30);
/// Objects in one request.
const APPLIED_TOGETHER: usize = 2000;
/// Engines made to measure the memory of one.
const ENGINES: usize = 4;
/// How often progress is told.
const PROGRESS_EVERY: Duration = Duration::from_secs(2);
/// How often a condition is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(10);

/// Where the controller is.
#[derive(Debug, Clone)]
pub enum Target {
    /// It is started for this, from this binary, with this store.
    Start {
        /// The binary.
        binary: PathBuf,
        /// `embedded` or `memory`.
        store: String,
    },
    /// It runs already, with an empty repository.
    Running {
        /// Address of its API, `HOST:PORT`.
        server: String,
        /// Address for agents, `HOST:PORT`.
        controller: String,
        /// Directory of its certificate authority: the simulation makes every host's certificate itself.
        identity: PathBuf,
    },
}

/// What is to be simulated.
#[derive(Debug, Clone)]
pub struct Config {
    /// Hosts.
    pub agents: u32,
    /// On all of them together; rounded down to whole applications of 20.
    pub workloads: u32,
    /// In the repository.
    pub policies: u32,
    /// Workloads that start each second.
    pub activations_per_second: f64,
    /// For how long.
    pub duration: Duration,
    /// Decides what happens to whom.
    pub seed: u64,
    /// Where the controller is.
    pub target: Target,
    /// Whether progress is told on standard error.
    pub progress: bool,
}

/// Simulates until the end, or until `stop` turns true: then with what there is so far.
///
/// # Errors
/// If there is no controller, or the agents never know everything.
pub async fn run(config: Config, stop: watch::Receiver<bool>) -> anyhow::Result<Report> {
    if config.agents == 0 || config.workloads < fleet::APPLICATION_WORKLOADS {
        bail!("a fleet has at least one agent and {} workloads", fleet::APPLICATION_WORKLOADS);
    }
    let started = match &config.target {
        Target::Start { binary, store } => Some(Controller::start(binary, store).await?),
        Target::Running { .. } => None,
    };
    let (server, address, identity) = match (&config.target, &started) {
        (Target::Running { server, controller, identity }, _) => (server, controller, identity),
        (Target::Start { .. }, Some(started)) => (&started.server, &started.agents, &started.identity),
        (Target::Start { .. }, None) => bail!("there is no controller"),
    };
    let identity = FleetIdentity::open(identity)?;
    let rest = Rest::new(server, identity.administrator()?);
    let address = address.clone();
    let process = started.as_ref().map(|started| started.process);
    let simulation = Simulation::prepare(config, rest, (address, identity), process, stop).await?;
    let report = simulation.run().await;
    match started {
        Some(controller) => controller.stop().await.and(report),
        None => report,
    }
}

/// A fleet with its controller.
struct Simulation {
    config: Config,
    world: Arc<World>,
    rest: Rest,
    process: Option<u32>,
    stop: watch::Receiver<bool>,
    report: Report,
    before: Usage,
    /// Held so that what they took is not given to others.
    _engines: Vec<(Assembly, HostEngine)>,
}

impl Simulation {
    async fn prepare(
        config: Config,
        rest: Rest,
        (address, identity): (String, FleetIdentity),
        process: Option<u32>,
        stop: watch::Receiver<bool>,
    ) -> anyhow::Result<Self> {
        let fleet = Fleet::new(config.agents, config.workloads, config.policies);
        let manifests: Vec<_> = fleet.manifests().collect();
        for manifests in manifests.chunks(APPLIED_TOGETHER) {
            rest.apply(manifests).await.context("policies")?;
        }
        drop(manifests);
        let policies = rest.list("policies").await?;
        let resources = policies.iter().map(Resource::from_json).collect::<Result<Vec<_>, _>>();
        let resources = resources.map_err(|problems| anyhow::anyhow!("{problems:?}"))?;
        drop(policies);
        let (engines, mib) = engines_with(&resources);
        drop(resources);
        let report = Report {
            agents: config.agents,
            workloads: fleet.workloads(),
            policies: fleet.policies,
            activations_per_second_asked: config.activations_per_second,
            agent_rss_mib: AgentMemory { engine_with_all_policies: mib, ..AgentMemory::default() },
            ..Report::default()
        };
        let world = Arc::new(World::new(fleet, address, identity));
        let before = Usage::of(std::process::id());
        Ok(Self { config, world, rest, process, stop, report, before, _engines: engines })
    }

    fn say(&self, what: &str) {
        if self.config.progress {
            eprintln!("{what}");
        }
    }

    async fn run(mut self) -> anyhow::Result<Report> {
        let (commands, mut agents) = self.connect().await?;
        let mut churn = Churn::new(Arc::clone(&self.world), commands.clone(), self.config.seed);
        self.churn(&mut churn).await?;
        if !*self.stop.borrow() {
            self.storm(&churn).await?;
        }
        self.say("comparing every agent with the repository");
        for agent in &commands {
            // One that has ended needs not be told.
            let _ = agent.send(Command::Quit).await;
        }
        let mut ended = Vec::new();
        while let Some(agent) = agents.join_next().await {
            ended.push(agent?);
        }
        let truth = Truth::read(&self.rest).await?;
        let differences = tokio::task::spawn_blocking(move || truth.compare(&ended)).await?;
        self.report.differences.extend(self.world.complaints());
        self.report.differences.extend(differences);
        self.report.deferred = self.world.deferred.load(Relaxed);
        self.report.streams_lost = self.world.lost.load(Relaxed);
        Ok(self.report)
    }

    /// Starts all agents, and waits until they know everything.
    async fn connect(&mut self) -> anyhow::Result<(Vec<mpsc::Sender<Command>>, JoinSet<Agent>)> {
        let begun = Instant::now();
        let mut slices: BTreeMap<u32, Vec<Slice>> = BTreeMap::new();
        for slice in self.world.fleet.slices() {
            slices.entry(self.world.fleet.host_of(slice)).or_default().push(slice);
        }
        let (mut commands, mut agents) = (Vec::new(), JoinSet::new());
        for number in 0..self.config.agents {
            self.until("agents are waiting for each other", |world| {
                *world.settled.borrow() + CONNECTING_MAX > number as usize
            })
            .await?;
            if *self.stop.borrow() {
                bail!("interrupted before all agents were there");
            }
            let own = slices.remove(&number).unwrap_or_default();
            let agent = Agent::new(number, Arc::clone(&self.world), own);
            let (sender, receiver) = mpsc::channel(COMMANDS_LEN);
            commands.push(sender);
            agents.spawn(link::live(agent, receiver));
        }
        self.all_settled().await?;
        self.quiet().await?;
        self.report.first_sync_seconds = (begun.elapsed().saturating_sub(QUIET)).as_secs_f64();
        self.say(&format!(
            "{} agents know everything after {:.1} s",
            self.config.agents,
            begun.elapsed().as_secs_f64()
        ));
        Ok((commands, agents))
    }

    async fn churn(&mut self, churn: &mut Churn) -> anyhow::Result<()> {
        let usage = |process: Option<u32>| process.map(Usage::of).unwrap_or_default();
        let (controller, own) = (usage(self.process), Usage::of(std::process::id()));
        self.world.counting.store(true, Relaxed);
        let (begun, before) = (Instant::now(), churn.activations());
        let progress =
            self.config.progress.then(|| tokio::spawn(progress(Arc::clone(&self.world), self.process)));
        churn.run(self.config.activations_per_second, self.config.duration, &self.rest, &self.stop).await;
        let seconds = begun.elapsed().as_secs_f64();
        let activations = churn.activations() - before;
        let (controller_after, own_after) = (usage(self.process), Usage::of(std::process::id()));
        self.quiet().await?;
        if let Some(progress) = progress {
            progress.abort();
        }
        self.world.counting.store(false, Relaxed);
        let bytes = self.world.bytes();
        let (samples, policies) = self.world.tracker.samples();
        let report = &mut self.report;
        report.seconds = seconds;
        report.activations_per_second = ratio(activations, 1) / seconds;
        report.latency_ms = Latency::of(samples.from_stored);
        report.latency_from_publishing_ms = Latency::of(samples.from_published);
        report.policy_latency_ms = Latency::of(policies);
        report.unconcerned_bytes = bytes.unconcerned;
        report.policy_bytes_elsewhere = bytes.policies;
        report.bytes_per_concerned_agent = ratio(bytes.concerned, bytes.hearings.max(1));
        report.controller_rss_mib = controller_after.peak_mib;
        report.agent_rss_mib.simulated =
            (own_after.rss_mib - self.before.rss_mib) / f64::from(self.config.agents);
        report.cpu_seconds = Both {
            controller: controller_after.cpu_seconds - controller.cpu_seconds,
            agents: own_after.cpu_seconds - own.cpu_seconds,
        };
        Ok(())
    }

    async fn storm(&mut self, churn: &Churn) -> anyhow::Result<()> {
        self.say("all connections break at once");
        let begun = Instant::now();
        let broken = self.world.broken.load(Relaxed) + u64::from(self.config.agents);
        churn.storm().await;
        self.until("connections do not break", |world| world.broken.load(Relaxed) >= broken).await?;
        self.all_settled().await?;
        self.report.reconnect_storm_seconds = begun.elapsed().as_secs_f64();
        self.quiet().await
    }

    async fn all_settled(&self) -> anyhow::Result<()> {
        let all = self.config.agents as usize;
        self.until("not every agent knows everything", |world| *world.settled.borrow() == all).await
    }

    /// Nothing is under way any more.
    async fn quiet(&self) -> anyhow::Result<()> {
        let all = self.config.agents as usize;
        self.until("changes do not reach those whom they concern", |world| {
            let settled = *world.settled.borrow() == all;
            settled && world.quiet_for() >= QUIET && world.tracker.open() == 0
        })
        .await
    }

    async fn until(&self, otherwise: &str, holds: impl Fn(&World) -> bool) -> anyhow::Result<()> {
        let begun = Instant::now();
        while !holds(&self.world) {
            if begun.elapsed() > SYNC_TIME_MAX || self.world.quiet_for().min(begun.elapsed()) > STUCK_TIME {
                let (settled, open) = (*self.world.settled.borrow(), self.world.tracker.open());
                let (complaints, which) = (self.world.complaints(), self.world.tracker.describe());
                bail!(
                    "{otherwise}: {settled} know all, {open} changes are under way: {which}; {complaints:?}"
                );
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
        Ok(())
    }
}

/// Engines that hold all policies by themselves, as a real agent's does, and the memory of one in MiB. The first ones may
/// be put where something else has been before; what the process grew by most is the truth.
fn engines_with(resources: &[Resource]) -> (Vec<(Assembly, HostEngine)>, f64) {
    let mut engines = Vec::new();
    let mut most: f64 = 0.0;
    for _ in 0..ENGINES {
        let before = Usage::of(std::process::id()).rss_mib;
        let (mut assembly, mut engine) = (Assembly::default(), HostEngine::new("measured"));
        for resource in resources {
            let changes = assembly.set(&resource.key(), Some(resource.clone()));
            for (key, spec) in &changes.policies {
                engine.set_policy(key, spec.as_ref());
            }
        }
        engines.push((assembly, engine));
        most = most.max(Usage::of(std::process::id()).rss_mib - before);
    }
    (engines, most)
}

#[expect(clippy::cast_precision_loss, reason = "counts far below 2^52")]
fn ratio(of: u64, to: u64) -> f64 {
    of as f64 / to as f64
}

/// Tells how it goes.
async fn progress(world: Arc<World>, process: Option<u32>) {
    let begun = Instant::now();
    let mut every = tokio::time::interval(PROGRESS_EVERY);
    let (mut last, mut turns) = (world.activations.load(Relaxed), world.turns.load(Relaxed));
    every.tick().await;
    loop {
        every.tick().await;
        let (activations, now) = (world.activations.load(Relaxed), world.turns.load(Relaxed));
        let seconds = PROGRESS_EVERY.as_secs();
        let memory = process.map_or(0.0, |process| Usage::of(process).rss_mib);
        eprintln!(
            "{:>4} s: {} activations/s, {} tables computed/s, {} changes under way, controller {memory:.0} MiB",
            begun.elapsed().as_secs(),
            (activations - last) / seconds,
            (now - turns) / seconds,
            world.tracker.open(),
        );
        (last, turns) = (activations, now);
    }
}
