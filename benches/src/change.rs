//! From a committed change to another verdict on the wire: a real controller with its store on disk, a real
//! agent with the eBPF dataplane, two workloads, and a probe that sends and listens all the time.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::bail;
use bulkhead_ebpf::{Capacities, EbpfDataplane};
use bulkhead_model::Verdict;
use serde_json::json;
use tokio::sync::watch;

use crate::Effort;
use crate::netns::{Namespace, host};
use crate::progress;
use crate::report::Line;
use crate::stats::percentile;

mod client;
mod probe;

use client::Client;
use probe::Probe;

/// How long a change is watched.
const WATCH_TIME: Duration = Duration::from_millis(60);
/// Longest wait for another verdict.
const CHANGE_TIME_MAX: Duration = Duration::from_secs(2);
/// Longest wait for the first tables.
const START_TIME_MAX: Duration = Duration::from_secs(20);
/// What is promised, in milliseconds.
const P99_MS_MAX: f64 = 10.0;

/// What changes.
#[derive(Debug, Clone, Copy)]
enum Subject {
    /// A rule of a policy appears or is taken away.
    Policy,
    /// A label, by which a rule selects, appears or is taken away.
    Label,
}

/// Milliseconds of one change.
#[derive(Debug, Clone, Copy)]
struct Change {
    /// From the answer to the request, which is sent once the change is committed.
    after_commit: f64,
    /// From the request.
    after_request: f64,
}

/// Measures both kinds of change.
pub(crate) fn measure(effort: Effort) -> anyhow::Result<Vec<Line>> {
    host()?.exec(move || in_namespace(effort))?
}

fn in_namespace(effort: Effort) -> anyhow::Result<Vec<Line>> {
    let web = Namespace::workload("w1", 1)?;
    let db = Namespace::workload("w2", 2)?;
    let files = tempfile::tempdir()?;
    let probe = Probe::start(&web, &db)?;
    let registrations = files.path().join("workloads");
    std::fs::create_dir(&registrations)?;
    for (name, namespace) in [("web", &web), ("db", &db)] {
        let text = format!("name: {name}\nlabels: {{role: {name}}}\nnetns: {}\n", namespace.path());
        std::fs::write(registrations.join(format!("{name}.yaml")), text)?;
    }
    // Its threads are in this thread's namespace, since they are started from here.
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(async {
        let pins = format!("/sys/fs/bpf/bulkhead-bench-{}-change", std::process::id());
        let result = with_daemons(files.path(), Path::new(&pins), &probe, effort).await;
        // The agent leaves the kernel as it is when it ends.
        use bulkhead_dataplane::Dataplane;
        EbpfDataplane::open(Path::new(&pins), Capacities::default())?.cleanup()?;
        result
    })
}

async fn with_daemons(files: &Path, pins: &Path, probe: &Probe, effort: Effort) -> anyhow::Result<Vec<Line>> {
    let loopback = ([127, 0, 0, 1], 0).into();
    let mut controller = bulkhead_controller::start(bulkhead_controller::Config {
        listen_api: loopback,
        listen_agents: loopback,
        data_directory: files.join("controller"),
        socket: Some(files.join("controller.sock")),
        ..bulkhead_controller::Config::default()
    })
    .await?;
    let credentials = controller.agent_credentials("bench")?;
    credentials.save(&files.join("agent/identity"), bulkhead_agent::IDENTITY_FILES)?;
    let dataplane = EbpfDataplane::open(pins, Capacities::default())?;
    let (stop, stopped) = watch::channel(false);
    let agent = tokio::spawn(bulkhead_agent::run(
        bulkhead_agent::Config {
            host: "bench".into(),
            controllers: vec![format!("https://{}", controller.agents)],
            state_directory: files.join("agent"),
            socket: files.join("agent.sock"),
            workload_directory: Some(files.join("workloads")),
            default_posture: Verdict::Allow,
            ..bulkhead_agent::Config::default()
        },
        Box::new(dataplane),
        stopped,
        || {},
    ));
    let (socket, changes) = (files.join("controller.sock"), effort.pick(120, 60));
    let probe = probe.clone();
    let measuring =
        tokio::task::spawn_blocking(move || measure_changes(&mut Client::new(&socket)?, &probe, changes));
    let lines = tokio::select! {
        lines = measuring => lines?,
        failed = controller.failed() => Err(failed.into()),
    };
    stop.send_replace(true);
    agent.await??;
    controller.shutdown().await?;
    lines
}

fn measure_changes(client: &mut Client, probe: &Probe, changes: usize) -> anyhow::Result<Vec<Line>> {
    let mut lines = Vec::new();
    for (subject, name) in [(Subject::Policy, "policy change"), (Subject::Label, "label change")] {
        progress(&format!("change: {changes} times a {name}"));
        for (text, passes) in [(base(), false), (subject.text(true), true)] {
            client.apply(&text)?;
            wait_until(probe, passes)?;
        }
        let measured = (0..changes)
            .map(|number| one_change(client, probe, subject, number % 2 == 1))
            .collect::<anyhow::Result<Vec<_>>>()?;
        lines.extend(subject_lines(name, &measured));
    }
    Ok(lines)
}

fn wait_until(probe: &Probe, passes: bool) -> anyhow::Result<()> {
    let started = Instant::now();
    while probe.passes()? != Some(passes) {
        if started.elapsed() > START_TIME_MAX {
            bail!("the policy is not in force after {} s", START_TIME_MAX.as_secs());
        }
    }
    Ok(())
}

fn one_change(client: &mut Client, probe: &Probe, subject: Subject, open: bool) -> anyhow::Result<Change> {
    let text = subject.text(open);
    let requested = Instant::now();
    client.apply(&text)?;
    let committed = Instant::now();
    let flipped = loop {
        std::thread::sleep(WATCH_TIME);
        match probe.flipped(requested, open)? {
            Some(flipped) => break flipped,
            None if committed.elapsed() < CHANGE_TIME_MAX => {}
            None => bail!("{subject:?}: not in force after {} ms", CHANGE_TIME_MAX.as_millis()),
        }
    };
    let millis = |from: Instant| flipped.saturating_duration_since(from).as_secs_f64() * 1e3;
    Ok(Change { after_commit: millis(committed), after_request: millis(requested) })
}

fn subject_lines(name: &str, changes: &[Change]) -> Vec<Line> {
    let commit: Vec<f64> = changes.iter().map(|change| change.after_commit).collect();
    let request: Vec<f64> = changes.iter().map(|change| change.after_request).collect();
    let mut lines: Vec<Line> = [("p50", 50.0), ("p90", 90.0), ("p99", 99.0), ("max", 100.0)]
        .map(|(label, percent)| {
            Line::new(format!("{name}, commit to wire: {label}"), "ms", percentile(&commit, percent))
                .beside("from the request", percentile(&request, percent))
        })
        .into();
    let within = lines[2].ours < P99_MS_MAX;
    lines[2] = lines[2].clone().budget("< 10 ms", within);
    lines
}

/// What both kinds of change start from: only members of `zone: open` and what `web` adds may call.
fn base() -> String {
    [policy(false), network_set(false)].join("\n---\n")
}

impl Subject {
    fn text(self, open: bool) -> String {
        match self {
            Self::Policy => policy(open),
            Self::Label => network_set(open),
        }
    }
}

fn policy(open: bool) -> String {
    let rule = |selector: &str| json!({ "action": "Allow", "from": { "selector": selector } });
    let mut rules = vec![rule("zone == 'open'")];
    rules.extend(open.then(|| rule("role == 'web'")));
    json!({
        "apiVersion": "bulkhead.dev/v1",
        "kind": "Policy",
        "metadata": { "name": "db" },
        "spec": { "appliesTo": "role == 'db'", "ingress": rules },
    })
    .to_string()
}

fn network_set(open: bool) -> String {
    json!({
        "apiVersion": "bulkhead.dev/v1",
        "kind": "NetworkSet",
        "metadata": { "name": "callers", "labels": { "zone": if open { "open" } else { "closed" } } },
        "spec": { "cidrs": ["10.0.1.0/24"] },
    })
    .to_string()
}
