//! The product: its processes in a lab, and its command line.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde_json::Value;

use crate::http;
use crate::lab::{Host, Lab};
use crate::process::Process;
use crate::wait::eventually;
use crate::workload::Workload;

mod membership;
mod trouble;

/// Where the controller listens, in the fabric.
const API: &str = "10.200.0.1:7440";
const AGENTS: &str = "10.200.0.1:7441";

/// How one agent is to be started.
#[derive(Debug, Clone, Default)]
pub struct AgentOptions {
    /// Socket of a Docker engine.
    pub docker: Option<PathBuf>,
    /// Where eBPF's tables are to be pinned, if not where the lab has them.
    pub pins: Option<PathBuf>,
    /// More arguments.
    pub arguments: Vec<String>,
}

/// An agent's process and where to talk to it.
#[derive(Debug)]
pub struct Agent {
    /// Its host.
    pub host: String,
    /// Its socket.
    pub socket: PathBuf,
    options: AgentOptions,
    process: Option<Process>,
}

/// What a command answered.
#[derive(Debug, Clone)]
pub struct Output {
    /// Exit code.
    pub code: i32,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

/// A lab with the product running in it.
#[derive(Debug)]
pub struct Bulkhead {
    // Processes end before the namespaces they are in.
    controller: Option<Process>,
    agents: BTreeMap<String, Agent>,
    binary: PathBuf,
    /// More arguments for the controller, when it is started next.
    pub controller_arguments: Vec<String>,
    /// Where all this happens.
    pub lab: Lab,
}

/// The product's binary: `BULKHEAD_BIN`, or next to this executable, or in the build directory above it.
///
/// # Errors
/// If there is none; the message says what to do.
pub fn find_binary() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("BULKHEAD_BIN") {
        let path = PathBuf::from(path);
        ensure!(path.is_file(), "BULKHEAD_BIN names {}, which is no file", path.display());
        return Ok(path);
    }
    let executable = std::env::current_exe()?;
    // target/PROFILE/deps/test-…, target/PROFILE/bulkhead-demo
    for directory in executable.ancestors().skip(1).take(3) {
        for candidate in ["bulkhead", "release/bulkhead", "debug/bulkhead"] {
            let path = directory.join(candidate);
            if path.is_file() {
                return Ok(path);
            }
        }
    }
    bail!("no bulkhead binary found: run \"cargo build -p bulkhead\" first, or name one with BULKHEAD_BIN")
}

impl Bulkhead {
    /// Starts the controller and one agent per host, and waits until all agents are connected.
    ///
    /// # Errors
    /// If anything does not start; the message holds the end of its log.
    pub fn start(lab: Lab, binary: &Path, options: &BTreeMap<String, AgentOptions>) -> Result<Self> {
        let mut bulkhead = Self::without_processes(lab, binary, options);
        bulkhead.start_controller()?;
        bulkhead.start_agents()?;
        bulkhead.wait_connected()?;
        Ok(bulkhead)
    }

    /// Nothing started yet.
    pub fn without_processes(lab: Lab, binary: &Path, options: &BTreeMap<String, AgentOptions>) -> Self {
        let agents = lab.hosts.iter().map(|host| {
            let socket = lab.directory().join(format!("{}.sock", host.name));
            let options = options.get(&host.name).cloned().unwrap_or_default();
            (host.name.clone(), Agent { host: host.name.clone(), socket, options, process: None })
        });
        Self {
            controller: None,
            agents: agents.collect(),
            binary: binary.into(),
            controller_arguments: Vec::new(),
            lab,
        }
    }

    /// Starts the controller and waits until it is ready.
    ///
    /// # Errors
    /// If it does not become ready.
    pub fn start_controller(&mut self) -> Result<()> {
        let mut command = Command::new(&self.binary);
        command.args(["controller", "--listen", API, "--listen-agents", AGENTS, "--data-dir"]);
        command.arg(self.lab.directory().join("controller")).arg("--identity-dir").arg(self.identity());
        command.arg("--socket").arg(self.socket()).args(&self.controller_arguments);
        plain(&mut command);
        let log = self.lab.directory().join("controller.log");
        let mut process = Process::start(&self.lab.fabric, command, &log, &self.lab.ledger())?;
        eventually("the controller is ready", || alive(&mut process, || self.status()))?;
        self.controller = Some(process);
        Ok(())
    }

    /// All the controller has logged.
    pub fn controller_log(&self) -> String {
        self.controller.as_ref().map(Process::log).unwrap_or_default()
    }

    /// Starts the agents that do not run.
    ///
    /// # Errors
    /// If one cannot be started.
    pub fn start_agents(&mut self) -> Result<()> {
        let hosts: Vec<_> = self.agents.keys().cloned().collect();
        hosts.iter().try_for_each(|host| self.start_agent(host))
    }

    /// Starts a host's agent, if it does not run, and waits until it answers.
    ///
    /// # Errors
    /// If it cannot be started or ends at once.
    pub fn start_agent(&mut self, host: &str) -> Result<()> {
        let invited = self.invite(host, &self.state_directory(host))?;
        let mut command = self.agent_command(host);
        command.args(invited);
        let netns = &self.lab.host(host).netns;
        let log = self.lab.directory().join(format!("{host}.log"));
        let agent = self.agents.get_mut(host).with_context(|| format!("no host {host}"))?;
        if agent.process.is_some() {
            return Ok(());
        }
        let mut process = Process::start(netns, command, &log, &self.lab.ledger())?;
        eventually("the agent answers", || alive(&mut process, || http::get_unix(&agent.socket, "/status")))
            .with_context(|| process.log())?;
        agent.process = Some(process);
        Ok(())
    }

    fn agent_command(&self, host: &str) -> Command {
        let agent = &self.agents[host];
        let mut command = Command::new(&self.binary);
        command.args(["agent", "--host", host, "--controller", &format!("https://{AGENTS}")]);
        command.arg("--state-dir").arg(self.state_directory(host));
        let pins = agent.options.pins.clone().unwrap_or_else(|| self.lab.pin_directory(host));
        command.arg("--pin-dir").arg(pins);
        command.arg("--agent-socket").arg(&agent.socket);
        command.args(["--workload-interface", "wl*", "--sweep-interval-ms", "500", "--docker"]);
        match &agent.options.docker {
            Some(socket) => command.arg(socket).args(["--workload-interface", "veth*"]),
            None => command.arg("none"),
        };
        // The same tests over another dataplane.
        let chosen = agent.options.arguments.iter().any(|argument| argument == "--dataplane");
        if let Some(dataplane) = std::env::var_os("BULKHEAD_DATAPLANE").filter(|_| !chosen) {
            command.arg("--dataplane").arg(dataplane);
        }
        command.args(&agent.options.arguments);
        plain(&mut command);
        command
    }

    /// Where the fleet's certificate authority is.
    fn identity(&self) -> PathBuf {
        self.lab.directory().join("identity")
    }

    /// Where the controller is reached without the network.
    pub fn socket(&self) -> PathBuf {
        self.lab.directory().join("controller.sock")
    }

    fn state_directory(&self, host: &str) -> PathBuf {
        self.lab.directory().join(format!("{host}.state"))
    }

    /// A host's agent.
    ///
    /// # Panics
    /// If there is no such host: a mistake in the test.
    pub fn agent(&self, host: &str) -> &Agent {
        &self.agents[host]
    }

    /// What the controller's `status` says.
    ///
    /// # Errors
    /// If it does not answer.
    pub fn status(&self) -> Result<Value> {
        self.get("/apis/bulkhead.dev/v1/status")
    }

    /// GET on the controller.
    ///
    /// # Errors
    /// If it does not answer, or not with 200.
    pub fn get(&self, path: &str) -> Result<Value> {
        http::get_unix(&self.socket(), path)
    }

    /// What the controller knows of one agent.
    ///
    /// # Errors
    /// If it knows nothing or does not answer.
    pub fn agent_session(&self, host: &str) -> Result<Value> {
        let status = self.status()?;
        let agents = status["agents"].as_array().cloned().unwrap_or_default();
        let found = agents.into_iter().find(|agent| agent["host"] == host);
        found.ok_or_else(|| anyhow!("the controller does not know host {host}"))
    }

    /// Waits until every agent holds a stream to the controller.
    ///
    /// # Errors
    /// At the deadline.
    pub fn wait_connected(&self) -> Result<()> {
        self.agents.values().try_for_each(|agent| {
            eventually(&format!("the agent of {} is connected", agent.host), || {
                let status = agent.status()?;
                ensure!(status["connected"] == true, "{status}");
                Ok(())
            })
        })
    }

    /// Waits until every agent enforces the revision and has nothing to complain of.
    ///
    /// # Errors
    /// At the deadline, with what an agent says of itself.
    pub fn wait_revision(&self, revision: u64) -> Result<()> {
        self.agents.values().filter(|agent| agent.process.is_some()).try_for_each(|agent| {
            eventually(&format!("{} enforces revision {revision}", agent.host), || {
                let status = agent.status()?;
                let reached = status["revision"].as_u64() >= Some(revision);
                let complaints = status["notEnforced"].as_array().is_none_or(Vec::is_empty);
                ensure!(reached && complaints && status["programmed"] == true, "{status}");
                Ok(())
            })
        })
    }

    /// Runs a command of the product in the fabric's namespace, against the controller.
    ///
    /// # Errors
    /// If it cannot be run; not if it fails.
    pub fn cli(&self, arguments: &[&str]) -> Result<Output> {
        let mut command = Command::new(&self.binary);
        command.args(arguments).arg("--server").arg(self.server());
        plain(&mut command);
        run(&self.lab.fabric, command)
    }

    /// As [`Bulkhead::cli`], and it must succeed; answers its output.
    ///
    /// # Errors
    /// If it fails.
    pub fn ok(&self, arguments: &[&str]) -> Result<String> {
        self.cli(arguments)?.success(arguments)
    }

    /// As [`Bulkhead::ok`] with `-o json`.
    ///
    /// # Errors
    /// If it fails or gives no JSON.
    pub fn json(&self, arguments: &[&str]) -> Result<Value> {
        let all: Vec<&str> = arguments.iter().copied().chain(["-o", "json"]).collect();
        serde_json::from_str(&self.ok(&all)?).with_context(|| format!("{all:?}"))
    }

    /// Applies files or directories, and waits until every agent enforces them.
    ///
    /// # Errors
    /// If they are refused, or an agent does not follow.
    pub fn apply(&self, files: &[&Path]) -> Result<()> {
        let mut arguments = vec!["apply".to_owned()];
        for file in files {
            arguments.extend(["-f".to_owned(), file.display().to_string()]);
        }
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        self.ok(&arguments)?;
        self.wait_policies()
    }

    /// Waits until every running agent enforces the newest policy.
    ///
    /// # Errors
    /// At the deadline.
    pub fn wait_policies(&self) -> Result<()> {
        let mut newest = 0;
        for kind in ["tiers", "policies"] {
            let list = self.get(&format!("/apis/bulkhead.dev/v1/{kind}"))?;
            let items = list["items"].as_array().cloned().unwrap_or_default();
            let versions = items.iter().filter_map(|item| item["metadata"]["resourceVersion"].as_str());
            newest = versions.filter_map(|version| version.parse().ok()).fold(newest, u64::max);
        }
        self.wait_revision(newest)
    }

    /// Writes a file into the lab's directory and applies it.
    ///
    /// # Errors
    /// If it is refused, or an agent does not follow.
    pub fn apply_text(&self, name: &str, text: &str) -> Result<()> {
        self.apply(&[&self.file(name, text)?])
    }

    /// Writes a file into the lab's directory.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn file(&self, name: &str, text: &str) -> Result<PathBuf> {
        let path = self.lab.directory().join(name);
        std::fs::write(&path, text)?;
        Ok(path)
    }

    /// Registers a workload with its host's agent, or gives it other labels.
    ///
    /// # Errors
    /// If the agent refuses.
    pub fn register(&self, workload: &Workload, labels: &[(&str, &str)]) -> Result<()> {
        let netns = workload.netns.path().display().to_string();
        let mut arguments: Vec<String> =
            ["workload", "add", &workload.name, "--netns", &netns].map(Into::into).to_vec();
        for (key, value) in labels {
            arguments.extend(["--label".into(), format!("{key}={value}")]);
        }
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        self.on_host(&workload.host, &arguments)?;
        Ok(())
    }

    /// Takes a registration back.
    ///
    /// # Errors
    /// If the agent refuses.
    pub fn unregister(&self, workload: &Workload) -> Result<()> {
        self.on_host(&workload.host, &["workload", "remove", &workload.name])?;
        Ok(())
    }

    /// Runs a command of the product on a host, against its agent.
    ///
    /// # Errors
    /// If it fails.
    pub fn on_host(&self, host: &str, arguments: &[&str]) -> Result<String> {
        let mut command = Command::new(&self.binary);
        command.args(arguments).arg("--agent-socket").arg(&self.agent(host).socket);
        plain(&mut command);
        run(&self.lab.host(host).netns, command)?.success(arguments)
    }

    /// Waits until the agent of a workload's host has it in force.
    ///
    /// # Errors
    /// At the deadline.
    pub fn wait_endpoint(&self, workload: &Workload) -> Result<()> {
        let name = workload.full_name();
        eventually(&format!("{name} is in force"), || {
            let status = self.agent(&workload.host).status()?;
            let mut endpoints = status["endpoints"].as_array().into_iter().flatten();
            ensure!(endpoints.any(|endpoint| endpoint["workload"] == name.as_str()), "{status}");
            Ok(())
        })
    }

    /// The binary in use.
    pub fn binary(&self) -> &Path {
        &self.binary
    }

    /// Leaves everything running when dropped.
    pub fn keep(&mut self) {
        self.lab.keep();
        let agents = self.agents.values_mut().filter_map(|agent| agent.process.as_mut());
        agents.chain(self.controller.as_mut()).for_each(Process::keep);
    }

    /// Where the API is, as a URL.
    pub fn server(&self) -> String {
        format!("unix://{}", self.socket().display())
    }

    /// A host of the lab.
    pub fn host(&self, name: &str) -> &Host {
        self.lab.host(name)
    }
}

impl Agent {
    /// What it says of itself.
    ///
    /// # Errors
    /// If it does not answer.
    pub fn status(&self) -> Result<Value> {
        http::get_unix(&self.socket, "/status")
    }

    /// Table entries it has written since it started.
    ///
    /// # Errors
    /// If it does not answer.
    pub fn entries_written(&self) -> Result<u64> {
        self.status()?["entriesWritten"].as_u64().context("no entriesWritten")
    }

    /// All it has logged, over all its lives.
    pub fn log(&self) -> String {
        let log = self.socket.with_extension("log");
        std::fs::read_to_string(log).unwrap_or_default()
    }
}

impl Output {
    /// Its standard output, if it succeeded.
    ///
    /// # Errors
    /// With what it said, otherwise.
    pub fn success(self, arguments: &[&str]) -> Result<String> {
        let Self { code, stdout, stderr } = self;
        ensure!(code == 0, "bulkhead {} failed with {code}: {stderr}{stdout}", arguments.join(" "));
        Ok(stdout)
    }
}

/// No colour in logs and answers that programs read.
fn plain(command: &mut Command) {
    command.env("NO_COLOR", "1").env_remove("BULKHEAD_SERVER").env_remove("BULKHEAD_AGENT_SOCKET");
}

fn run(namespace: &crate::Netns, mut command: Command) -> Result<Output> {
    let output = namespace.run(|| command.output().context("cannot run bulkhead"))?;
    Ok(Output {
        code: output.status.code().unwrap_or(-1),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    })
}

/// Looks at something that a process must offer; if the process has ended, its log says why.
fn alive<T>(process: &mut Process, look: impl FnOnce() -> Result<T>) -> Result<T> {
    look().map_err(|error| match process.ended() {
        Some(status) => anyhow!("it ended with {status}:\n{}", process.log()),
        None => error,
    })
}
