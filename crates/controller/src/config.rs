//! What can be configured.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use crate::access::OidcConfig;
use bulkhead_identity::{LIFETIME, LIFETIME_MAX};
use bulkhead_store::{ETCD_PREFIX, EtcdOptions, Location};
use serde::{Deserialize, Serialize};

/// Shortest time after which a controller counts as dead: it has to say three times in it that it is not.
const CONTROLLER_LEASE_MS_MIN: u64 = 500;

/// Where the repository is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum StoreKind {
    /// In one file of [`Config::data_directory`].
    #[default]
    Embedded,
    /// In memory, and lost when the controller stops. Flows are then kept in memory only, too.
    Memory,
    /// In an etcd cluster, see [`Config::etcd`]. Flows are kept in [`Config::data_directory`].
    Etcd,
}

/// The etcd cluster of a repository.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct EtcdConfig {
    /// The members, as `HOST:PORT`; default `127.0.0.1:2379`.
    pub endpoints: Vec<String>,
    /// What all keys begin with; default `/bulkhead`.
    pub prefix: String,
    /// User, if etcd asks for one.
    pub user: Option<String>,
    /// File with that user's password.
    pub password_file: Option<PathBuf>,
    /// Authority of the members' certificates; with it, etcd is asked over TLS.
    pub ca_file: Option<PathBuf>,
    /// Certificate to show to etcd.
    pub cert_file: Option<PathBuf>,
    /// Key of that certificate.
    pub key_file: Option<PathBuf>,
}

impl Default for EtcdConfig {
    fn default() -> Self {
        let EtcdOptions {
            endpoints,
            prefix,
            user,
            password_file,
            ca_file,
            cert_file,
            key_file,
            page_keys: _,
        } = EtcdOptions::new(vec!["127.0.0.1:2379".into()], ETCD_PREFIX);
        Self { endpoints, prefix, user, password_file, ca_file, cert_file, key_file }
    }
}

impl EtcdConfig {
    fn options(&self) -> EtcdOptions {
        let Self { endpoints, prefix, user, password_file, ca_file, cert_file, key_file } = self.clone();
        let options = EtcdOptions::new(endpoints, prefix);
        EtcdOptions { user, password_file, ca_file, cert_file, key_file, ..options }
    }
}

/// Configuration of a controller.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Config {
    /// Its name, which no other controller of the repository has; default `controller`.
    pub name: String,
    /// Where operators are served (REST over TLS); default `127.0.0.1:7440`. Port 0 takes any free one.
    pub listen_api: SocketAddr,
    /// Where agents are served (gRPC over mutual TLS); default `127.0.0.1:7441`.
    pub listen_agents: SocketAddr,
    /// Unix socket on which operators of this machine are served; default `/run/bulkhead/controller.sock`. Absent: none.
    pub socket: Option<PathBuf>,
    /// Directory of all files; default `/var/lib/bulkhead/controller`.
    pub data_directory: PathBuf,
    /// Directory of the certificate authority; default: `identity` in the data directory.
    pub identity_directory: Option<PathBuf>,
    /// Further names and addresses by which clients reach this controller, for its certificate. Bulkhead's own clients do not
    /// need them.
    pub known_as: Vec<String>,
    /// An OpenID Connect provider whose ID tokens let operators in; absent: none.
    pub oidc: Option<OidcConfig>,
    /// How many seconds certificates of agents last; default 30 days. They are renewed at half of it.
    pub certificate_lifetime_s: u64,
    /// Where the repository is kept; default `embedded`.
    pub store: StoreKind,
    /// The cluster, if it is kept in etcd.
    pub etcd: EtcdConfig,
    /// Where the other controllers reach this one's API, as `HOST:PORT`; default: [`Config::listen_api`], and with an
    /// unspecified address the host's name in place of it.
    pub advertise_api: Option<String>,
    /// Where this controller says that agents reach it; by default found likewise.
    pub advertise_agents: Option<String>,
    /// The other controllers take one that is silent for so many milliseconds for dead, and its sessions for ended; default
    /// 10 000. etcd counts in whole seconds, up, and gives two at least.
    pub controller_lease_ms: u64,
    /// An agent that is silent for so many milliseconds is unseen; default 60 000. Agents are told to
    /// report three times as often.
    pub lease_ms: u64,
    /// How long after that the workloads of its host are kept; default 240 000.
    pub grace_ms: u64,
    /// Flow records in memory, from which recent queries are answered; default 100 000.
    pub flow_records_in_memory: usize,
    /// Flow records on disk; default 1 000 000. Those of the last second before a crash may be missing.
    pub flow_records_on_disk: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            name: "controller".into(),
            listen_api: SocketAddr::from((Ipv4Addr::LOCALHOST, 7440)),
            listen_agents: SocketAddr::from((Ipv4Addr::LOCALHOST, 7441)),
            socket: Some("/run/bulkhead/controller.sock".into()),
            data_directory: "/var/lib/bulkhead/controller".into(),
            identity_directory: None,
            known_as: Vec::new(),
            oidc: None,
            certificate_lifetime_s: LIFETIME.as_secs(),
            store: StoreKind::Embedded,
            etcd: EtcdConfig::default(),
            advertise_api: None,
            advertise_agents: None,
            controller_lease_ms: 10_000,
            lease_ms: 60_000,
            grace_ms: 240_000,
            flow_records_in_memory: 100_000,
            flow_records_on_disk: 1_000_000,
        }
    }
}

impl Config {
    /// Where the certificate authority is.
    pub fn identity_directory(&self) -> PathBuf {
        self.identity_directory.clone().unwrap_or_else(|| self.data_directory.join("identity"))
    }

    pub(crate) fn certificate_lifetime(&self) -> Duration {
        Duration::from_secs(self.certificate_lifetime_s.max(1)).min(LIFETIME_MAX)
    }

    /// Where the repository is kept.
    pub fn location(&self) -> Location {
        match self.store {
            StoreKind::Memory => Location::Memory,
            StoreKind::Embedded => Location::Embedded(self.data_directory.clone()),
            StoreKind::Etcd => Location::Etcd(self.etcd.options()),
        }
    }

    /// Keeps the repository somewhere else.
    pub fn set_location(&mut self, location: Location) {
        match location {
            Location::Memory => self.store = StoreKind::Memory,
            Location::Embedded(directory) => {
                self.store = StoreKind::Embedded;
                self.data_directory = directory;
            }
            Location::Etcd(options) => {
                self.store = StoreKind::Etcd;
                let EtcdOptions {
                    endpoints,
                    prefix,
                    user,
                    password_file,
                    ca_file,
                    cert_file,
                    key_file,
                    page_keys: _,
                } = options;
                self.etcd =
                    EtcdConfig { endpoints, prefix, user, password_file, ca_file, cert_file, key_file };
            }
        }
    }

    pub(crate) fn lease(&self) -> Duration {
        Duration::from_millis(self.lease_ms.max(1))
    }

    /// What is said of where the API and the agents' side are, which listen on these addresses.
    pub(crate) fn advertised(&self, [api, agents]: [SocketAddr; 2]) -> [String; 2] {
        let found = |address: SocketAddr| {
            if address.ip().is_unspecified() {
                let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
                format!("{host}:{}", address.port())
            } else {
                address.to_string()
            }
        };
        [
            self.advertise_api.clone().unwrap_or_else(|| found(api)),
            self.advertise_agents.clone().unwrap_or_else(|| found(agents)),
        ]
    }

    pub(crate) fn controller_lease(&self) -> Duration {
        Duration::from_millis(self.controller_lease_ms.max(CONTROLLER_LEASE_MS_MIN))
    }

    pub(crate) fn grace(&self) -> Duration {
        Duration::from_millis(self.grace_ms)
    }

    /// How often agents are asked to report.
    pub(crate) fn heartbeat_ms(&self) -> u32 {
        u32::try_from((self.lease_ms / 3).max(1)).unwrap_or(u32::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_keys_are_refused_and_absent_ones_have_defaults() {
        let config: Config = serde_json::from_str(r#"{"leaseMs": 5000}"#).unwrap();
        assert_eq!(config, Config { lease_ms: 5000, ..Config::default() });
        assert!(serde_json::from_str::<Config>(r#"{"lease": 5000}"#).is_err());
    }

    #[test]
    fn the_stores_location_is_in_the_configuration() {
        let text =
            r#"{"store": "etcd", "etcd": {"endpoints": ["a:1", "b:2"], "user": "x", "passwordFile": "/p"}}"#;
        let config: Config = serde_json::from_str(text).unwrap();
        assert_eq!(config.location().to_string(), "etcd://a:1,b:2/bulkhead");
        let mut other = Config::default();
        assert_eq!(other.location(), Location::Embedded(other.data_directory.clone()));
        other.set_location(config.location());
        assert_eq!(other, config);
    }
}
