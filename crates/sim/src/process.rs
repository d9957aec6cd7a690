//! The controller as a process of its own, and what processes take.

use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use serde::Serialize;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};

/// Longest that a controller may take to serve.
const START_TIME_MAX: Duration = Duration::from_secs(30);
/// Longest that it may take to end.
const STOP_TIME_MAX: Duration = Duration::from_secs(20);
/// What it is to log: where it serves, and what is wrong.
const LOG: &str = "warn,bulkhead_controller=info,bulkhead_controller::agents=error";

/// A controller that was started for the simulation.
#[derive(Debug)]
pub(crate) struct Controller {
    child: Child,
    pub(crate) process: u32,
    pub(crate) server: String,
    pub(crate) agents: String,
    /// Where its certificate authority is.
    pub(crate) identity: PathBuf,
    _directory: TempDir,
}

impl Controller {
    /// Starts this binary as a controller on free ports of the loopback interface.
    pub(crate) async fn start(binary: &PathBuf, store: &str) -> anyhow::Result<Self> {
        let directory = tempfile::tempdir()?;
        let config = directory.path().join("controller.yaml");
        let settings = json!({
            "name": "simulated", "store": store, "dataDirectory": directory.path().join("data"),
            "listenApi": "127.0.0.1:0", "listenAgents": "127.0.0.1:0", "socket": null,
        });
        std::fs::write(&config, settings.to_string())?;
        let mut child = Command::new(binary)
            .args(["controller", "--log", LOG, "--log-format", "json", "--config"])
            .arg(&config)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            // An interrupt from the terminal is for the simulation, which ends the controller after the agents.
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("cannot start {}", binary.display()))?;
        let process = child.id().context("the controller has ended")?;
        let stderr = child.stderr.take().context("no log")?;
        let mut lines = BufReader::new(stderr).lines();
        let serving = async {
            while let Some(line) = lines.next_line().await? {
                let entry: Value = serde_json::from_str(&line).unwrap_or_default();
                let fields = &entry["fields"];
                if let (Some(api), Some(agents)) = (fields["api"].as_str(), fields["agents"].as_str()) {
                    return Ok((api.to_owned(), agents.to_owned()));
                }
                eprintln!("controller: {line}");
            }
            Err(anyhow!("the controller did not start"))
        };
        let (server, agents) = tokio::time::timeout(START_TIME_MAX, serving)
            .await
            .context("the controller does not start")??;
        tokio::spawn(async move {
            while let Ok(Some(line)) = lines.next_line().await {
                eprintln!("controller: {line}");
            }
        });
        let identity = directory.path().join("data/identity");
        Ok(Self { child, process, server, agents, identity, _directory: directory })
    }

    /// Ends it.
    pub(crate) async fn stop(mut self) -> anyhow::Result<()> {
        let id = i32::try_from(self.process).ok().and_then(rustix::process::Pid::from_raw);
        if let Some(id) = id {
            // It may have ended.
            let _ = rustix::process::kill_process(id, rustix::process::Signal::TERM);
        }
        let ended = tokio::time::timeout(STOP_TIME_MAX, self.child.wait()).await;
        let ended = ended.context("the controller does not end")??;
        if !ended.success() {
            bail!("the controller ended with {ended}");
        }
        Ok(())
    }
}

/// What a process takes.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub(crate) struct Usage {
    /// Resident now, MiB.
    pub(crate) rss_mib: f64,
    /// Most that was ever resident, MiB.
    pub(crate) peak_mib: f64,
    /// Processor time so far, seconds.
    pub(crate) cpu_seconds: f64,
}

impl Usage {
    /// Of a process; zero if it has ended.
    pub(crate) fn of(process: u32) -> Self {
        let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
        let kib = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            let number = line.and_then(|line| line.split_whitespace().next()?.parse::<f64>().ok());
            number.unwrap_or_default() / 1024.0
        };
        let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
        // The name before it may have blanks. Of what follows, the 12th and 13th are user and system time
        // (proc(5)), in hundredths of a second.
        let fields = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
        let ticks = fields.split_whitespace().skip(11).take(2).filter_map(|field| field.parse::<f64>().ok());
        Self { rss_mib: kib("VmRSS:"), peak_mib: kib("VmHWM:"), cpu_seconds: ticks.sum::<f64>() / 100.0 }
    }
}
