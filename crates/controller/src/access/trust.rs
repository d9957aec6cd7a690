//! The authority, and this controller's own certificate.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant, SystemTime};

use bulkhead_identity::tls::{ClientConfig, ServerIdentity, client_config};
use bulkhead_identity::{Authority, AuthorityError, Credentials, CredentialsError, Identity, LIFETIME};
use tokio::sync::watch;

use crate::clock;
use crate::config::Config;
use crate::context::{Context, stopped};

/// Name of the files of a certificate that somebody else's authority made for a controller.
const OWN_FILES: &str = "controller";
/// What controllers speak with each other.
const PEERS_PROTOCOL: &str = "http/1.1";
/// How often it is looked at whether the own certificate has to be made or read anew.
const LOOK_EVERY: Duration = Duration::from_secs(60);

/// Why a controller has no identity.
#[derive(Debug, thiserror::Error)]
pub enum TrustError {
    /// The authority cannot be used.
    #[error(transparent)]
    Authority(#[from] AuthorityError),
    /// The controller's certificate cannot be used.
    #[error(transparent)]
    Credentials(#[from] CredentialsError),
    /// There is an authority without its key, and no certificate that it made.
    #[error(
        "{0} has ca.crt without ca.key: with an authority of your own, put controller.crt and controller.key there \
         (for the name controller.bulkhead, and with the URI spiffe://bulkhead/controller/NAME)"
    )]
    NoCertificate(PathBuf),
    /// The name cannot be in a certificate.
    #[error("{0:?} cannot be the name of a controller")]
    Name(String),
}

/// Whom a controller trusts, and what it shows.
#[derive(Debug)]
pub(crate) struct Trust {
    /// `None`: somebody else signs.
    pub(crate) authority: Option<Authority>,
    /// What everybody trusts, as PEM.
    pub(crate) authorities: String,
    pub(crate) server: Arc<ServerIdentity>,
    /// What this controller asks others with.
    client: RwLock<Arc<ClientConfig>>,
    directory: PathBuf,
    identity: Identity,
    known_as: Vec<String>,
}

impl Trust {
    /// Reads the authority, or makes one where there is none.
    pub(crate) fn open(config: &Config, addresses: &[SocketAddr]) -> Result<Self, TrustError> {
        let directory = config.identity_directory();
        let identity =
            Identity::controller(&config.name).map_err(|_not_one| TrustError::Name(config.name.clone()))?;
        let known_as = known_as(config, addresses);
        let now = clock::system();
        let mut authority = Authority::load(&directory)?;
        let has_certificate = directory.join("ca.crt").exists();
        if authority.is_none() && !has_certificate {
            let made = Authority::generate("bulkhead", now)?;
            made.save(&directory)?;
            tracing::info!(directory = %directory.display(), "made a certificate authority for this fleet");
            authority = Some(made);
        }
        let own = match &authority {
            Some(authority) => authority.issue(&identity, LIFETIME, now, &known_as)?,
            None => read_own(&directory)?,
        };
        let (authorities, server) = (own.authorities.clone(), ServerIdentity::new(&own)?);
        let client = RwLock::new(client_config(&authorities, Some(&own), PEERS_PROTOCOL)?);
        Ok(Self { authority, authorities, server, client, directory, identity, known_as })
    }

    /// Shows a new certificate: its own authority's, or what has been put into the directory.
    fn renew(&self) -> Result<(), TrustError> {
        let own = match &self.authority {
            Some(authority) => authority.issue(&self.identity, LIFETIME, clock::system(), &self.known_as)?,
            None => read_own(&self.directory)?,
        };
        let client = client_config(&own.authorities, Some(&own), PEERS_PROTOCOL)?;
        self.server.replace(&own)?;
        *self.client.write().unwrap_or_else(PoisonError::into_inner) = client;
        Ok(())
    }

    /// What this controller asks others with.
    pub(crate) fn client(&self) -> Arc<ClientConfig> {
        Arc::clone(&self.client.read().unwrap_or_else(PoisonError::into_inner))
    }
}

fn read_own(directory: &Path) -> Result<Credentials, TrustError> {
    let own = Credentials::load(directory, OWN_FILES)?;
    own.ok_or_else(|| TrustError::NoCertificate(directory.to_owned()))
}

/// Names and addresses by which clients other than ours, that look at them, may reach this controller.
fn known_as(config: &Config, addresses: &[SocketAddr]) -> Vec<String> {
    let mut names = config.known_as.clone();
    names.extend(["localhost".to_owned(), "127.0.0.1".to_owned(), "::1".to_owned()]);
    let host = rustix::system::uname().nodename().to_string_lossy().to_ascii_lowercase();
    let is_name = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-');
    if !host.is_empty() && host.bytes().all(is_name) {
        names.push(host);
    }
    let own: Vec<IpAddr> = addresses.iter().map(SocketAddr::ip).collect();
    names.extend(own.iter().filter(|address| !address.is_unspecified()).map(ToString::to_string));
    names.sort();
    names.dedup();
    names
}

/// Whether a certificate that was made then is to be made anew now: half of its life is over by either clock (the monotonic one
/// stands still while a machine sleeps), or it has not begun, since the time of day was set back.
fn is_due((made, made_at): (Instant, SystemTime), (now, time): (Instant, SystemTime)) -> bool {
    let over = |lasted: Duration| lasted >= LIFETIME / 2;
    over(now.saturating_duration_since(made)) || time.duration_since(made_at).map_or(true, over)
}

/// Keeps the own certificate current until `shutdown`.
pub(crate) async fn keep_certificate(context: Arc<Context>, mut shutdown: watch::Receiver<bool>) {
    let mut made = (Instant::now(), clock::system());
    loop {
        tokio::select! {
            () = tokio::time::sleep(LOOK_EVERY) => {}
            () = stopped(&mut shutdown) => return,
        }
        // Others write theirs when they want; ours are made when half of their life is over.
        if context.trust.authority.is_some() && !is_due(made, (Instant::now(), clock::system())) {
            continue;
        }
        match context.trust.renew() {
            Ok(()) => made = (Instant::now(), clock::system()),
            Err(error) => tracing::error!(%error, "the controller's certificate cannot be renewed"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_own_certificate_is_made_anew_when_the_time_of_day_jumps_out_of_it() {
        let made = (Instant::now(), SystemTime::now());
        let hour = Duration::from_secs(3600);
        assert!(!is_due(made, made));
        assert!(!is_due(made, (made.0 + hour, made.1 + 3 * hour)), "a small jump is nothing");
        assert!(
            is_due(made, (made.0 + hour, made.1 + LIFETIME)),
            "hours of sleep, or a clock that was wrong"
        );
        assert!(is_due(made, (made.0 + hour, made.1 - hour)), "it begins in the future");
        assert!(is_due(made, (made.0 + LIFETIME / 2, made.1 + LIFETIME / 2)));
    }
}
