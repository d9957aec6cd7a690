//! What an agent can be told.

use std::path::PathBuf;

use bulkhead_model::{Labels, Verdict};
use serde::{Deserialize, Serialize};

/// Messages waiting for the reconcile loop. Full: whoever sends waits.
pub const INPUT_QUEUE_LEN: usize = 1024;
/// Messages waiting for the controller. Full: the session ends and resumes.
pub const OUTGOING_QUEUE_LEN: usize = 1024;
/// Flow records waiting for the controller. Full: further ones are dropped and counted.
pub const FLOW_QUEUE_LEN: usize = 16_384;
/// Flow records kept for `bulkhead flows` on this host. Full: the oldest goes.
pub const FLOW_RING_LEN: usize = 4096;

/// What enforces in the kernel.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DataplaneChoice {
    /// eBPF, or nftables where this host cannot do that.
    #[default]
    Auto,
    /// eBPF, or nothing.
    Ebpf,
    /// nftables.
    Nftables,
}

/// Settings of an agent. Every field has a default; unknown fields are refused.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
pub struct Config {
    /// Name of this host, unique in the fleet. Default: the host's name.
    pub host: String,
    /// Labels of this host.
    pub labels: Labels,
    /// Agent ports of the controllers, `https://HOST:PORT`; any of them will do.
    pub controllers: Vec<String>,
    /// What this host joins with, if it has no certificate yet: from `bulkhead token create`.
    pub join_token: Option<String>,
    /// Where the agent remembers what to enforce. Default: `/var/lib/bulkhead/agent`.
    pub state_directory: PathBuf,
    /// The agent's own socket, for `bulkhead workload` and `bulkhead status`.
    pub socket: PathBuf,
    /// Socket of the Docker engine; absent: Docker is not watched.
    pub docker_socket: Option<PathBuf>,
    /// Directory of workload registrations; absent: only those added through the socket.
    pub workload_directory: Option<PathBuf>,
    /// Names of interfaces (`*` stands for anything at the end) that belong to workloads. One that appears
    /// while the agent runs is closed at once, before anybody knows whose it is.
    pub workload_interfaces: Vec<String>,
    /// Whether the kernel keeps them closed by itself until an agent is in charge, also while none runs.
    pub fence: bool,
    /// What happens to connections of endpoints that no policy speaks of.
    pub default_posture: Verdict,
    /// What enforces in the kernel.
    pub dataplane: DataplaneChoice,
    /// An agent that another than its first controller serves tries to go back to the first after so many milliseconds, or up
    /// to a half less, and again and again.
    pub home_after_ms: u64,
    /// Milliseconds between two walks over the connection table.
    pub sweep_interval_ms: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            host: rustix::system::uname().nodename().to_string_lossy().to_ascii_lowercase(),
            labels: Labels::new(),
            controllers: vec!["https://127.0.0.1:7441".into()],
            join_token: None,
            state_directory: "/var/lib/bulkhead/agent".into(),
            socket: "/run/bulkhead/agent.sock".into(),
            docker_socket: None,
            workload_directory: None,
            workload_interfaces: Vec::new(),
            fence: false,
            default_posture: Verdict::Allow,
            dataplane: DataplaneChoice::Auto,
            home_after_ms: 600_000,
            sweep_interval_ms: 5_000,
        }
    }
}

impl Config {
    /// Whether an interface of this name belongs to a workload whoever claims it.
    pub fn is_workload_interface(&self, name: &str) -> bool {
        self.workload_interfaces.iter().any(|pattern| match pattern.strip_suffix('*') {
            Some(start) => name.starts_with(start),
            None => name == pattern,
        })
    }

    /// Directory of this host's certificate, in files named [`crate::IDENTITY_FILES`].
    pub fn identity_directory(&self) -> PathBuf {
        self.state_directory.join("identity")
    }

    /// Directory of the registrations made through the socket.
    pub fn registrations(&self) -> PathBuf {
        self.state_directory.join("workloads")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interface_patterns_match_whole_names_or_beginnings() {
        let config = Config { workload_interfaces: vec!["veth*".into(), "tap0".into()], ..Config::default() };
        assert!(config.is_workload_interface("veth12ab") && config.is_workload_interface("tap0"));
        assert!(!config.is_workload_interface("tap01") && !config.is_workload_interface("eth0"));
    }

    #[test]
    fn unknown_settings_are_refused() {
        assert!(serde_json::from_str::<Config>(r#"{"contorller": "x"}"#).is_err());
        assert_eq!(serde_json::from_str::<Config>("{}").unwrap(), Config::default());
    }
}
