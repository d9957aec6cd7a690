//! Flags of the command that simulates a fleet.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};

/// Where a simulated fleet's controller keeps its repository.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum SimStore {
    /// In a file of a temporary directory
    Embedded,
    /// In memory
    Memory,
}

#[derive(Debug, Args)]
#[command(after_help = "\
It starts a controller of its own on free ports of the loopback interface, lets workloads start and stop, policies and
labels change and connections break, and measures how long it takes until the last host concerned has computed its
tables. In the end every agent's state is compared with the repository's.

  bulkhead sim                                                     a first look, less than a minute
  bulkhead sim --agents 5000 --workloads 100000 --policies 10000 --activations-per-second 20000 --duration 30s

Exit code 1: an agent ended in another state than the repository.")]
pub(crate) struct SimArgs {
    /// Hosts, each with an agent and a connection of its own
    #[arg(long, default_value_t = 200, value_name = "NUMBER")]
    pub(crate) agents: u32,
    /// Workloads on all hosts together, in applications of 20 on four hosts each
    #[arg(long, default_value_t = 4000, value_name = "NUMBER")]
    pub(crate) workloads: u32,
    /// Policies, two for each application before there is a third for any
    #[arg(long, default_value_t = 400, value_name = "NUMBER")]
    pub(crate) policies: u32,
    /// Workloads that start each second
    #[arg(long, default_value_t = 1000.0, value_name = "NUMBER")]
    pub(crate) activations_per_second: f64,
    /// For how long
    #[arg(long, default_value = "10s", value_parser = humantime::parse_duration, value_name = "DURATION")]
    pub(crate) duration: Duration,
    /// Decides what happens to whom: the same seed, the same script
    #[arg(long, default_value_t = 1, value_name = "NUMBER")]
    pub(crate) seed: u64,
    /// Store of the controller that is started
    #[arg(long, default_value = "embedded")]
    pub(crate) store: SimStore,
    /// Use a running controller, with an empty repository, instead: its address for agents; --server says where its API is
    #[arg(long, value_name = "URL", requires = "identity_dir")]
    pub(crate) controller: Option<String>,
    /// Directory of that controller's certificate authority, with which the simulation makes its hosts' certificates
    #[arg(long, value_name = "DIRECTORY")]
    pub(crate) identity_dir: Option<PathBuf>,
}
