//! The command line: help, completion and man pages are all made from this.

use std::path::PathBuf;

use bulkhead_model::time::Timestamp;
use clap::{Args, Parser, Subcommand, ValueEnum};

mod changes;
mod checks;
mod daemons;
mod fleet;
mod identities;
mod stores;

pub(crate) use changes::{
    ApplyArgs, AuditArgs, AuditCommand, ChangeArgs, ConfirmArgs, DeleteArgs, DiffArgs, HistoryArgs,
    RollbackArgs,
};
pub(crate) use checks::{LintArgs, TestArgs};
pub(crate) use daemons::{
    AgentArgs, AgentSettings, ControllerArgs, ControllerSettings, DataplaneName, LogArgs, LogFormat, Posture,
    RelayArgs, StandaloneArgs,
};
pub(crate) use fleet::{SimArgs, SimStore};
pub(crate) use identities::{
    CertificateArgs, CertificateCommand, InitArgs, KubeconfigArgs, RelayCommand, TokenArgs, TokenCommand,
};
pub(crate) use stores::{EtcdArgs, StoreArgs, StoreCommand, StoreSettings};

/// Micro-segmentation by labels: say who may talk to whom, and every host enforces it in its kernel.
#[derive(Debug, Parser)]
#[command(version, propagate_version = true, max_term_width = 100)]
#[command(after_help = "\
First steps:
  sudo bulkhead standalone &                      controller and agent on this machine
  sudo bulkhead token create                      how another machine joins
  docker run -d --label role=web --name web …     its containers are found by themselves
  bulkhead get workloads                          what was found
  bulkhead apply -f policy.yaml                   who may talk to whom
  bulkhead flows --follow                         what happens, and which rule decided

Exit codes: 0 done, 1 the answer is no (refused, not found, different), 2 wrong usage,
3 controller or agent not reachable, 4 anything else. test and lint end with 1 for what they
found in policies and with 2 for anything that kept them from looking.")]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) common: Common,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Args)]
pub(crate) struct Common {
    /// The controller's API: https://HOST:PORT, or unix:///PATH for a socket of this machine
    /// [default: what the client configuration says, else unix:///run/bulkhead/controller.sock]
    #[arg(long, global = true, env = "BULKHEAD_SERVER", value_name = "URL")]
    pub(crate) server: Option<String>,
    /// Whom to trust and who to be [default: ~/.config/bulkhead/client.yaml, else /etc/bulkhead/client.yaml]
    #[arg(long, global = true, env = "BULKHEAD_CLIENT_CONFIG", value_name = "FILE")]
    pub(crate) client_config: Option<PathBuf>,
    /// Token to show instead of a certificate; from the environment, lest others see it
    #[arg(skip = std::env::var("BULKHEAD_TOKEN").ok())]
    pub(crate) token: Option<String>,
    /// Socket of this host's agent
    #[arg(
        long,
        global = true,
        env = "BULKHEAD_AGENT_SOCKET",
        default_value = "/run/bulkhead/agent.sock",
        value_name = "PATH"
    )]
    pub(crate) agent_socket: PathBuf,
    /// Form of the answer
    #[arg(short, long, global = true, default_value = "table")]
    pub(crate) output: Format,
    /// When to use colour
    #[arg(long, global = true, default_value = "auto")]
    pub(crate) color: Colour,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// For eyes
    Table,
    /// For programs
    Json,
    /// For files
    Yaml,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Colour {
    /// On a terminal
    Auto,
    /// Always
    Always,
    /// Never
    Never,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run the central repository
    Controller(ControllerArgs),
    /// Run the agent of this host
    Agent(AgentArgs),
    /// Run a relay: a controller to the agents of a remote site, and one subscriber to the controllers; list and delete relays
    Relay(RelayArgs),
    /// Run controller and agent on one host
    Standalone(StandaloneArgs),
    /// Make the certificate authority of a new fleet
    Init(InitArgs),
    /// Make, list and delete tokens: for machines that join, and for programs that use the API
    Token(TokenArgs),
    /// Make certificates for operators and agents, and revoke them
    Certificate(CertificateArgs),
    /// Write a kubeconfig, so that kubectl and its like use this controller
    Kubeconfig(KubeconfigArgs),
    /// Show whom the controller takes you for
    Whoami,
    /// Create or change what files say; all of them or nothing
    Apply(ApplyArgs),
    /// List objects
    Get(GetArgs),
    /// Show an object and everything about it
    Describe(ObjectArgs),
    /// Delete objects
    Delete(DeleteArgs),
    /// Keep a change that was made with --confirm-within, or undo it at once
    Confirm(ConfirmArgs),
    /// Show what apply would change, or what changed between two revisions
    Diff(DiffArgs),
    /// Show what operators have changed, when and from where
    History(HistoryArgs),
    /// Go back to what held at a revision, as one change
    Rollback(RollbackArgs),
    /// Look after the audit log
    Audit(AuditArgs),
    /// Say whether a connection would pass, and why, at both ends
    Explain(ExplainArgs),
    /// Say whether connections would pass, without a controller: from manifests, of Kubernetes too
    Decide(DecideArgs),
    /// Run policy tests: files that say what must pass and what must not
    Test(TestArgs),
    /// Say what is suspicious in manifests: rules that are never reached, typing errors in labels, and more
    Lint(LintArgs),
    /// Show objects of Kubernetes and Calico as Bulkhead's own
    Convert(ConvertArgs),
    /// Show recent connections with names, labels and the rule that decided
    Flows(FlowArgs),
    /// Follow connections of this host as they happen, with the rule that decides
    Trace(TraceArgs),
    /// Show agents, revisions, and what is not enforced
    Status,
    /// Copy, restore and move the repository's store
    Store(StoreArgs),
    /// Register workloads of this host by hand
    Workload(WorkloadArgs),
    /// Print the tables that this host's agent enforces
    Plan,
    /// Look into this host's kernel tables, beside what they should say
    Dataplane(DataplaneArgs),
    /// Simulate a fleet: thousands of agents against a real controller, and what that costs
    Sim(SimArgs),
    /// Print a completion script for a shell
    Completion {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Print the manual page, or write all of them into a directory
    Man {
        /// Where to write them
        directory: Option<PathBuf>,
    },
}

#[derive(Debug, Args)]
pub(crate) struct GetArgs {
    /// tiers, policies, networksets, workloads or hosts; KIND or KIND/NAME
    pub(crate) kind: String,
    /// Name of one object
    pub(crate) name: Option<String>,
    /// Only objects in this namespace
    #[arg(short, long, value_name = "NAME")]
    pub(crate) namespace: Option<String>,
    /// Only objects with these labels, e.g. "role == 'web'"
    #[arg(short = 'l', long, value_name = "SELECTOR")]
    pub(crate) selector: Option<String>,
    /// Go on and show changes as they happen
    #[arg(short, long)]
    pub(crate) watch: bool,
}

#[derive(Debug, Args)]
pub(crate) struct ObjectArgs {
    /// tiers, policies, networksets, workloads or hosts; KIND or KIND/NAME
    pub(crate) kind: String,
    /// Name of the object
    pub(crate) name: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct ExplainArgs {
    /// What to explain, if not a connection
    #[arg(value_name = "workload|policy", requires = "name", value_parser = ["workload", "policy"])]
    pub(crate) kind: Option<String>,
    /// Its name
    pub(crate) name: Option<String>,
    /// Who begins the connection: a workload or an address
    #[arg(long, value_name = "WORKLOAD|ADDRESS", required_unless_present = "kind", conflicts_with = "kind")]
    pub(crate) from: Option<String>,
    /// Who is called: a workload or an address
    #[arg(long, value_name = "WORKLOAD|ADDRESS", required_unless_present = "kind", conflicts_with = "kind")]
    pub(crate) to: Option<String>,
    /// What is called, e.g. tcp/80, udp/53, icmp/8
    #[arg(long, value_name = "PORT", required_unless_present = "kind", conflicts_with = "kind")]
    pub(crate) port: Option<String>,
    /// The port that the connection comes from; without it, an ephemeral one (50000)
    #[arg(long, value_name = "NUMBER", conflicts_with = "kind")]
    pub(crate) source_port: Option<u16>,
    /// Explain from manifests instead of asking the controller: files, directories, or - for standard input
    #[arg(short = 'f', long, value_name = "FILE", requires = "kind")]
    pub(crate) filename: Vec<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct DecideArgs {
    /// Manifests of any kind: files, directories, or - for standard input
    #[arg(
        short = 'f',
        long,
        required_unless_present = "batch",
        conflicts_with = "batch",
        value_name = "FILE"
    )]
    pub(crate) filename: Vec<PathBuf>,
    /// Who begins: pod:NAMESPACE/NAME, workload:NAME, host:NAME, ip:ADDRESS, or a name that only one has
    #[arg(long, value_name = "END", conflicts_with = "batch")]
    pub(crate) from: Option<String>,
    /// Who is called, likewise
    #[arg(long, value_name = "END", conflicts_with = "batch")]
    pub(crate) to: Option<String>,
    /// Destination port
    #[arg(long, default_value_t = 80, conflicts_with = "batch")]
    pub(crate) port: u16,
    /// TCP, UDP, SCTP, UDPLite, ICMP, ICMPv6 or a number
    #[arg(long, default_value = "TCP", conflicts_with = "batch")]
    pub(crate) protocol: String,
    /// Port of whoever begins
    #[arg(long, value_name = "PORT", conflicts_with = "batch")]
    pub(crate) source_port: Option<u16>,
    /// An address of a DNS name
    #[arg(long, value_name = "NAME=ADDRESS", conflicts_with = "batch")]
    pub(crate) dns: Vec<String>,
    /// What time it is, for policies that exist only at times; default: now
    #[arg(long, value_name = "TIME")]
    pub(crate) at: Option<Timestamp>,
    /// Read questions as JSON lines from standard input: {"id", "reset", "manifests", "dns", "flows"}
    #[arg(long)]
    pub(crate) batch: bool,
    /// Ask the naive evaluator instead of the compiled tables
    #[arg(long, conflicts_with = "check")]
    pub(crate) reference: bool,
    /// Ask both and fail if they differ
    #[arg(long)]
    pub(crate) check: bool,
}

#[derive(Debug, Args)]
pub(crate) struct ConvertArgs {
    /// Manifests: files, directories, or - for standard input
    #[arg(short = 'f', long, required = true, value_name = "FILE")]
    pub(crate) filename: Vec<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct FlowArgs {
    /// Go on and show flows as they happen
    #[arg(short, long)]
    pub(crate) follow: bool,
    /// How many of the newest
    #[arg(long, default_value_t = 50, value_name = "COUNT")]
    pub(crate) limit: usize,
    /// Only since then: 90s, 5m, 2h or 7d ago
    #[arg(long, value_name = "TIME")]
    pub(crate) since: Option<String>,
    /// Only with this workload at either end
    #[arg(long, value_name = "NAME")]
    pub(crate) workload: Option<String>,
    /// Only with these labels at either end, e.g. role=web or "role in {'web', 'db'}"
    #[arg(short = 'l', long, value_name = "LABEL")]
    pub(crate) label: Option<String>,
    /// Only with this verdict
    #[arg(long, value_name = "allow|deny")]
    pub(crate) verdict: Option<String>,
    /// Only those that this policy decided
    #[arg(long, value_name = "NAME")]
    pub(crate) policy: Option<String>,
    /// Ask this host's agent instead of the controller
    #[arg(long, conflicts_with_all = ["follow", "since", "workload", "label", "verdict", "policy"])]
    pub(crate) local: bool,
}

#[derive(Debug, Args)]
pub(crate) struct TraceArgs {
    /// Only begun by this workload or address
    #[arg(long, value_name = "WORKLOAD|ADDRESS")]
    pub(crate) from: Option<String>,
    /// Only towards this workload or address
    #[arg(long, value_name = "WORKLOAD|ADDRESS")]
    pub(crate) to: Option<String>,
    /// Only to these ports, like tcp/443 or tcp/8000-8100
    #[arg(long, value_name = "PORT")]
    pub(crate) port: Option<String>,
    /// Only with this verdict
    #[arg(long, value_name = "allow|deny", value_parser = ["allow", "deny"])]
    pub(crate) verdict: Option<String>,
    /// Only those that this policy decides
    #[arg(long, value_name = "NAME")]
    pub(crate) policy: Option<String>,
    /// End after so many
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) count: Option<u64>,
}

#[derive(Debug, Args)]
pub(crate) struct DataplaneArgs {
    #[command(subcommand)]
    pub(crate) command: DataplaneCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum DataplaneCommand {
    /// Show how full the tables are, what was dropped, and whether the tables are what they should be
    Status,
    /// Print the tables as the kernel holds them, and where they are others than they should be
    Dump,
    /// Ask the kernel's tables about one connection
    Lookup {
        /// Who begins: a workload of this host, a peer known here, or an address
        #[arg(long, value_name = "WORKLOAD|ADDRESS")]
        from: String,
        /// Who is called, likewise
        #[arg(long, value_name = "WORKLOAD|ADDRESS")]
        to: String,
        /// What is called, e.g. tcp/80
        #[arg(long, value_name = "PORT")]
        port: String,
        /// Port of whoever begins; without it, an ephemeral one (50000)
        #[arg(long, value_name = "NUMBER")]
        source_port: Option<u16>,
    },
}

#[derive(Debug, Args)]
pub(crate) struct WorkloadArgs {
    #[command(subcommand)]
    pub(crate) command: WorkloadCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum WorkloadCommand {
    /// Register a workload of this host
    Add {
        /// Its name, unique on this host
        name: String,
        /// Path of its network namespace, e.g. /run/netns/web
        #[arg(
            long,
            value_name = "PATH",
            required_unless_present_any = ["interface", "cgroup"],
            conflicts_with_all = ["interface", "cgroup"]
        )]
        netns: Option<String>,
        /// Its host-side interface
        #[arg(long, value_name = "NAME", requires = "address")]
        interface: Option<String>,
        /// Its control group (cgroup2): a path, or the name of a systemd unit, e.g. nginx.service
        #[arg(long, value_name = "PATH|UNIT", conflicts_with = "interface")]
        cgroup: Option<String>,
        /// Its address, if it cannot be seen in the namespace; may be given several times
        #[arg(long, value_name = "ADDRESS")]
        address: Vec<std::net::IpAddr>,
        /// A label, KEY=VALUE; may be given several times
        #[arg(short = 'l', long, value_name = "KEY=VALUE")]
        label: Vec<String>,
        /// The namespace that it is in
        #[arg(short = 'n', long, value_name = "NAME")]
        namespace: Option<String>,
        /// The service account that it runs under
        #[arg(long, value_name = "NAME")]
        service_account: Option<String>,
        /// A port that it gives a name to, NAME=tcp/PORT; may be given several times
        #[arg(long, value_name = "NAME=tcp/PORT")]
        named_port: Vec<String>,
    },
    /// Take back a registration: its interface is not judged any more
    Remove {
        /// Its name
        name: String,
    },
    /// Show the registrations of this host
    List,
}
