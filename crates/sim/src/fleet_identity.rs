//! Certificates of a whole fleet: the simulation has the authority, so that thousands of hosts need not join one by one.

use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use anyhow::Context;
use bulkhead_identity::tls::{self, ClientConfig};
use bulkhead_identity::{Authority, Identity, LIFETIME};

/// The group whose members may do everything.
const ADMINS: &str = "bulkhead:admins";

/// Makes certificates.
#[derive(Debug)]
pub(crate) struct FleetIdentity {
    authority: Authority,
}

impl FleetIdentity {
    /// With the authority of a directory.
    pub(crate) fn open(directory: &Path) -> anyhow::Result<Self> {
        let authority = Authority::load(directory)?;
        let authority = authority.with_context(|| format!("{} has no ca.key", directory.display()))?;
        Ok(Self { authority })
    }

    /// One that nobody else knows.
    #[cfg(test)]
    pub(crate) fn of_nobody() -> Self {
        Self { authority: Authority::generate("test", SystemTime::now()).unwrap() }
    }

    /// What the agent of a host connects with.
    pub(crate) fn agent(&self, host: &str) -> anyhow::Result<Arc<ClientConfig>> {
        self.client(&Identity::agent(host)?, "h2")
    }

    /// What an administrator connects with.
    pub(crate) fn administrator(&self) -> anyhow::Result<Arc<ClientConfig>> {
        self.client(&Identity::operator("simulation", &[ADMINS.to_owned()])?, "http/1.1")
    }

    fn client(&self, identity: &Identity, protocol: &str) -> anyhow::Result<Arc<ClientConfig>> {
        let own = self.authority.issue(identity, LIFETIME, SystemTime::now(), &[])?;
        Ok(tls::client_config(self.authority.bundle(), Some(&own), protocol)?)
    }
}
