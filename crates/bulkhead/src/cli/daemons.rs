//! Controller, agent and standalone.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::{RelayCommand, StoreSettings};

#[derive(Debug, Args)]
pub(crate) struct LogArgs {
    /// What to log: error, warn, info, debug, trace, or a filter like bulkhead_agent=debug
    #[arg(long, env = "BULKHEAD_LOG", default_value = "info", value_name = "FILTER")]
    pub(crate) log: String,
    /// Form of the log
    #[arg(long, default_value = "text", value_name = "FORM")]
    pub(crate) log_format: LogFormat,
    /// Send OpenTelemetry traces to this collector (OTLP over gRPC), like http://127.0.0.1:4317
    #[arg(long, env = "OTEL_EXPORTER_OTLP_ENDPOINT", value_name = "URL")]
    pub(crate) otlp: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogFormat {
    /// One line of text per event
    Text,
    /// One JSON object per event
    Json,
}

#[derive(Debug, Args)]
pub(crate) struct ControllerArgs {
    /// Settings as YAML; flags win over it
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) settings: ControllerSettings,
    #[command(flatten)]
    pub(crate) log: LogArgs,
}

#[derive(Debug, Default, Args)]
pub(crate) struct ControllerSettings {
    /// Address of the API for operators [default: 127.0.0.1:7440]
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) listen: Option<std::net::SocketAddr>,
    /// Address for agents [default: 127.0.0.1:7441]
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) listen_agents: Option<std::net::SocketAddr>,
    /// Directory of the controller's files [default: /var/lib/bulkhead/controller]
    #[arg(long, value_name = "DIRECTORY")]
    pub(crate) data_dir: Option<PathBuf>,
    /// Where the certificate authority is [default: identity in the data directory]
    #[arg(long, value_name = "DIRECTORY")]
    pub(crate) identity_dir: Option<PathBuf>,
    /// Unix socket for operators of this machine, or "none" [default: /run/bulkhead/controller.sock]
    #[arg(long, value_name = "PATH")]
    pub(crate) socket: Option<PathBuf>,
    /// A name or address by which clients reach this controller, for its certificate; may be given several times
    #[arg(long, value_name = "NAME|ADDRESS")]
    pub(crate) known_as: Vec<String>,
    /// Name of this controller, which no other of the same repository has [default: controller]
    #[arg(long, value_name = "NAME")]
    pub(crate) name: Option<String>,
    /// Where the other controllers reach this one's API [default: where it listens, or the host's name]
    #[arg(long, value_name = "HOST:PORT")]
    pub(crate) advertise: Option<String>,
    /// Where this one says that agents reach it [default: likewise]
    #[arg(long, value_name = "HOST:PORT")]
    pub(crate) advertise_agents: Option<String>,
    #[command(flatten)]
    pub(crate) store: StoreSettings,
}

#[derive(Debug, Args)]
pub(crate) struct AgentArgs {
    /// Settings as YAML; flags win over it
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// Agent ports of the controllers; several with commas between, or given several times
    /// [default: https://127.0.0.1:7441]
    #[arg(long, env = "BULKHEAD_CONTROLLER", value_name = "URL", value_delimiter = ',')]
    pub(crate) controller: Vec<String>,
    /// What this host joins the fleet with, from "bulkhead token create"; not needed once it has joined
    #[arg(long, env = "BULKHEAD_JOIN_TOKEN", value_name = "TOKEN", hide_env_values = true)]
    pub(crate) join_token: Option<String>,
    /// File that holds the join token
    #[arg(long, value_name = "FILE", conflicts_with = "join_token")]
    pub(crate) join_token_file: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) settings: AgentSettings,
    /// Remove everything that agents left in this host's kernel, and exit. Traffic is not judged any more
    #[arg(long)]
    pub(crate) cleanup: bool,
    #[command(flatten)]
    pub(crate) log: LogArgs,
}

#[derive(Debug, Default, Args)]
pub(crate) struct AgentSettings {
    /// Name of this host, unique in the fleet [default: the host's name]
    #[arg(long, value_name = "NAME")]
    pub(crate) host: Option<String>,
    /// Where the agent remembers what to enforce [default: /var/lib/bulkhead/agent]
    #[arg(long, value_name = "DIRECTORY")]
    pub(crate) state_dir: Option<PathBuf>,
    /// Socket of the Docker engine, or "none" [default: /var/run/docker.sock if it is there]
    #[arg(long, value_name = "SOCKET")]
    pub(crate) docker: Option<PathBuf>,
    /// Directory of workload files to watch
    #[arg(long, value_name = "DIRECTORY")]
    pub(crate) workload_dir: Option<PathBuf>,
    /// Interfaces that belong to workloads, like veth*: a new one is closed until claimed
    /// [default: veth* with Docker, else none]
    #[arg(long = "workload-interface", value_name = "PATTERN")]
    pub(crate) workload_interfaces: Vec<String>,
    /// Have the kernel keep new interfaces of these names closed while no agent runs, at a cost for every packet (Linux 6.17)
    #[arg(long)]
    pub(crate) fence: bool,
    /// What happens to connections of endpoints that no policy speaks of [default: allow]
    #[arg(long, value_name = "VERDICT")]
    pub(crate) default_posture: Option<Posture>,
    /// Milliseconds between two reports of live connections [default: 5000]
    #[arg(long, value_name = "MS")]
    pub(crate) sweep_interval_ms: Option<u64>,
    /// What enforces in the kernel: eBPF, nftables, or that where eBPF is missing [default: auto]
    #[arg(long, value_name = "NAME")]
    pub(crate) dataplane: Option<DataplaneName>,
    /// Where eBPF's tables are pinned [default: /sys/fs/bpf/bulkhead/HOST]
    #[arg(long, value_name = "DIRECTORY")]
    pub(crate) pin_dir: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum DataplaneName {
    Auto,
    Ebpf,
    Nftables,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Posture {
    /// They pass
    Allow,
    /// They are refused
    Deny,
}

#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true, disable_help_subcommand = true)]
pub(crate) struct RelayArgs {
    #[command(subcommand)]
    pub(crate) command: Option<RelayCommand>,
    /// Settings as YAML; flags win over it
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// Name of this relay, which no other has [default: the host's name]
    #[arg(long, value_name = "NAME")]
    pub(crate) name: Option<String>,
    /// Agent ports of the controllers; several with commas between, or given several times
    /// [default: https://127.0.0.1:7441]
    #[arg(long, value_name = "URL", value_delimiter = ',')]
    pub(crate) upstream: Vec<String>,
    /// What it joins the fleet with, from "bulkhead token create --relay"; not needed once it has joined
    #[arg(long, env = "BULKHEAD_JOIN_TOKEN", value_name = "TOKEN", hide_env_values = true)]
    pub(crate) join_token: Option<String>,
    /// File that holds the join token
    #[arg(long, value_name = "FILE", conflicts_with = "join_token")]
    pub(crate) join_token_file: Option<PathBuf>,
    /// Address for agents [default: 127.0.0.1:7441]
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) listen_agents: Option<std::net::SocketAddr>,
    /// Where this one says that agents reach it, as the status shows it [default: where it listens]
    #[arg(long, value_name = "HOST:PORT")]
    pub(crate) advertise_agents: Option<String>,
    /// Address of /metrics, /healthz and /readyz, without TLS, or "none" [default: 127.0.0.1:7442]
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) listen_probes: Option<String>,
    /// Directory of its certificate [default: /var/lib/bulkhead/relay]
    #[arg(long, value_name = "DIRECTORY")]
    pub(crate) state_dir: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) log: LogArgs,
}

#[derive(Debug, Args)]
pub(crate) struct StandaloneArgs {
    /// Settings as YAML, with the keys controller and agent; flags win over it
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) controller: ControllerSettings,
    #[command(flatten)]
    pub(crate) agent: AgentSettings,
    #[command(flatten)]
    pub(crate) log: LogArgs,
}
