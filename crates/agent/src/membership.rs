//! How this host is known to the controllers: it joins with a token, has a certificate, renews it, and finds a controller
//! that answers.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use bulkhead_identity::tls::{self, client_config, joining_client_config};
use bulkhead_identity::{Credentials, CredentialsError, Identity, JoinToken, Key, read_text, write_private};
use bulkhead_wire::proto::distribution_client::DistributionClient;
use bulkhead_wire::proto::{EnrollRequest, Enrollment, RenewRequest};
use hyper_util::rt::TokioIo;
use tonic::Status;
use tonic::transport::{Channel, Endpoint};

use crate::{AgentError, Config};

/// Name of the files of an agent's certificate and key, in [`Config::identity_directory`].
pub const IDENTITY_FILES: &str = "agent";
/// The key of a host that has asked to join and has no answer yet. If the answer was lost, whoever has the key may ask again.
const JOINING_KEY: &str = "joining.key";
/// What is spoken inside TLS.
const PROTOCOL: &str = "h2";
/// A connection that takes longer to open counts as failed.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// An answer to a request for a certificate that takes longer counts as lost.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(15);
/// A silent connection is asked for a sign of life this often, and given up after the same time again.
const KEEPALIVE: Duration = Duration::from_secs(10);
/// How often it is looked at whether the certificate is to be renewed, and a failed renewal is tried again.
const LOOK_EVERY: Duration = Duration::from_secs(60);
/// The same for certificates that last for minutes, as tests have them: a part of what is left of their life.
const LOOKS_PER_LIFE: u32 = 20;

/// This host's place in the fleet.
#[derive(Debug)]
pub(crate) struct Membership {
    host: String,
    directory: PathBuf,
    token: Option<JoinToken>,
    /// Addresses of controllers, this host's favourite first.
    controllers: Vec<String>,
    /// Which of them is in use.
    in_use: AtomicUsize,
    current: Mutex<Option<Arc<Credentials>>>,
    /// The controller has said that the certificate is good for nothing: it is revoked, perhaps.
    refused: AtomicBool,
    /// Of the session; what else is told to the controller takes the same connection.
    channel: Mutex<Option<Channel>>,
}

impl Membership {
    /// Reads the credentials, if there are any.
    pub(crate) fn open(config: &Config) -> Result<Self, AgentError> {
        let directory = config.identity_directory();
        let credentials = Credentials::load(&directory, IDENTITY_FILES)?;
        let token = config.join_token.as_deref().map(str::parse).transpose()?;
        if let Some(credentials) = &credentials {
            let holder = credentials.holder()?.identity;
            if holder != Identity::Agent(config.host.clone()) && token.is_none() {
                return Err(AgentError::OtherHost { holder: holder.to_string(), host: config.host.clone() });
            }
        }
        let of_this_host = |credentials: &Credentials| {
            let holder = credentials.holder();
            holder.is_ok_and(|holder| holder.identity == Identity::Agent(config.host.clone()))
        };
        let current = Mutex::new(credentials.filter(of_this_host).map(Arc::new));
        let (controllers, in_use) = (by_preference(&config.host, &config.controllers), AtomicUsize::new(0));
        let host = config.host.clone();
        let refused = AtomicBool::new(false);
        Ok(Self { host, directory, token, controllers, in_use, current, refused, channel: Mutex::new(None) })
    }

    /// The controller in use, `HOST:PORT`.
    pub(crate) fn controller(&self) -> &str {
        let number = self.in_use.load(Ordering::Relaxed);
        self.controllers.get(number % self.controllers.len().max(1)).map_or("", String::as_str)
    }

    /// Whether the controller in use is this host's favourite.
    pub(crate) fn is_home(&self) -> bool {
        self.in_use.load(Ordering::Relaxed).is_multiple_of(self.controllers.len().max(1))
    }

    /// Whether the favourite can be reached now.
    pub(crate) async fn home_answers(&self) -> bool {
        let Some((credentials, address)) = self.credentials().zip(self.controllers.first()) else {
            return false;
        };
        let Ok(config) = client_config(&credentials.authorities, Some(&credentials), PROTOCOL) else {
            return false;
        };
        let connected = tokio::time::timeout(CONNECT_TIMEOUT, tls::connect(address, &config)).await;
        matches!(connected, Ok(Ok(_)))
    }

    /// Takes the favourite from now on.
    pub(crate) fn go_home(&self) {
        self.in_use.store(0, Ordering::Relaxed);
        *lock(&self.channel) = None;
    }

    /// Goes on to the next controller.
    pub(crate) fn try_another(&self) {
        self.in_use.fetch_add(1, Ordering::Relaxed);
        *lock(&self.channel) = None;
    }

    /// The session's connection, for whatever else there is to tell.
    pub(crate) fn channel(&self) -> Option<Channel> {
        lock(&self.channel).clone()
    }

    fn credentials(&self) -> Option<Arc<Credentials>> {
        lock(&self.current).clone()
    }

    /// A new connection to the controller in use; joins before, if this host has no valid certificate.
    pub(crate) async fn connect(&self) -> Result<Channel, Status> {
        let valid = |own: &Arc<Credentials>| own.valid_at(SystemTime::now()).unwrap_or(false);
        let credentials = match self.credentials().filter(valid) {
            // The token may be an old one, and used up: then it is the certificate or nothing.
            Some(own) if self.has_better(&own) => match self.join().await {
                Ok(joined) => joined,
                Err(status) => {
                    tracing::warn!(reason = status.message(), "could not join again");
                    own
                }
            },
            Some(own) => own,
            None => self.join().await?,
        };
        let config = client_config(&credentials.authorities, Some(&credentials), PROTOCOL);
        let channel = self.open_channel(config.map_err(unusable)?)?;
        *lock(&self.channel) = Some(channel.clone());
        Ok(channel)
    }

    /// Whether there is a token that may be worth more than a certificate that has not ended: the controller has refused that,
    /// or it is of another authority.
    fn has_better(&self, own: &Credentials) -> bool {
        let refused = self.refused.swap(false, Ordering::Relaxed);
        self.token.as_ref().is_some_and(|token| refused || !token.is_of(&own.authorities))
    }

    /// The controller does not take the certificate.
    pub(crate) fn refused(&self) {
        self.refused.store(true, Ordering::Relaxed);
    }

    fn open_channel(&self, config: Arc<tls::ClientConfig>) -> Result<Channel, Status> {
        let address = self.controller().to_owned();
        // What is inside TLS; the connector makes the outside.
        let endpoint = Endpoint::from_shared(format!("http://{address}"))
            .map_err(|error| Status::invalid_argument(format!("{address:?} is no address: {error}")))?;
        let endpoint = endpoint
            .connect_timeout(CONNECT_TIMEOUT)
            .http2_keep_alive_interval(KEEPALIVE)
            .keep_alive_timeout(KEEPALIVE)
            .keep_alive_while_idle(true);
        Ok(endpoint.connect_with_connector_lazy(tower::service_fn(move |_uri| {
            let (address, config) = (address.clone(), Arc::clone(&config));
            async move { tls::connect(&address, &config).await.map(TokioIo::new) }
        })))
    }

    /// Gets a certificate with the token.
    async fn join(&self) -> Result<Arc<Credentials>, Status> {
        let Some(token) = &self.token else {
            let why = match self.credentials() {
                Some(_) => "this host's certificate has ended",
                None => "this host has not joined",
            };
            return Err(Status::unauthenticated(format!(
                "{why}: make a token with \"bulkhead token create --host {}\", and start the agent with --join-token",
                self.host
            )));
        };
        let path = self.directory.join(JOINING_KEY);
        let key = match read_text(&path).map_err(unusable)? {
            Some(pem) => Key::from_pem(&pem).map_err(unusable)?,
            None => {
                let key = Key::generate().map_err(unusable)?;
                write_private(&path, &key.pem()).map_err(unusable)?;
                key
            }
        };
        let config = joining_client_config(&token.authority, PROTOCOL).map_err(unusable)?;
        let mut client = DistributionClient::new(self.open_channel(config)?);
        let request = EnrollRequest {
            token_id: token.id.clone(),
            token_secret: token.secret.reveal(),
            host: self.host.clone(),
            signing_request: key.request().map_err(unusable)?,
        };
        let answer = tokio::time::timeout(ANSWER_TIMEOUT, client.enroll(request)).await;
        let enrollment = answer.map_err(|_elapsed| Status::deadline_exceeded("no answer"))??.into_inner();
        let credentials = self.adopt(&key, enrollment)?;
        // A next time it joins with another.
        let _not_there = std::fs::remove_file(&path);
        tracing::info!(host = self.host, "this host has joined");
        Ok(credentials)
    }

    /// From now on this certificate is used.
    fn adopt(&self, key: &Key, enrollment: Enrollment) -> Result<Arc<Credentials>, Status> {
        let Enrollment { certificate, authorities } = enrollment;
        let credentials = Credentials { certificate, key: key.pem(), authorities };
        let holder = credentials.holder().map_err(unusable)?;
        if holder.identity != Identity::Agent(self.host.clone()) {
            return Err(Status::internal(format!(
                "the controller made a certificate for {}",
                holder.identity
            )));
        }
        credentials.save(&self.directory, IDENTITY_FILES).map_err(unusable)?;
        let credentials = Arc::new(credentials);
        *lock(&self.current) = Some(Arc::clone(&credentials));
        Ok(credentials)
    }

    /// Renews the certificate whenever half of its life is over, for as long as the agent runs.
    pub(crate) async fn keep_current(self: Arc<Self>) {
        loop {
            let due = self.credentials().and_then(|own| own.holder().ok()).map(|own| {
                let left = own.not_after.duration_since(SystemTime::now()).unwrap_or_default();
                (own.renew_at() <= SystemTime::now(), left / LOOKS_PER_LIFE)
            });
            let wait = due.map_or(LOOK_EVERY, |(_, part)| part.clamp(Duration::from_millis(100), LOOK_EVERY));
            if due.is_some_and(|(due, _)| due)
                && let Err(status) = self.renew().await
            {
                tracing::warn!(
                    reason = status.message(),
                    "the certificate could not be renewed: trying again"
                );
            }
            tokio::time::sleep(wait).await;
        }
    }

    async fn renew(&self) -> Result<(), Status> {
        let channel = self.channel().ok_or_else(|| Status::unavailable("no controller"))?;
        let key = Key::generate().map_err(unusable)?;
        let request = RenewRequest { signing_request: key.request().map_err(unusable)? };
        let mut client = DistributionClient::new(channel);
        let answer = tokio::time::timeout(ANSWER_TIMEOUT, client.renew(request)).await;
        let enrollment = answer.map_err(|_elapsed| Status::deadline_exceeded("no answer"))??.into_inner();
        self.adopt(&key, enrollment)?;
        tracing::info!("the certificate was renewed");
        Ok(())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn unusable(error: impl Into<CredentialsError>) -> Status {
    Status::failed_precondition(error.into().to_string())
}

/// Every host has an order of its own, so that a fleet spreads over the controllers, and over those that are left when one
/// fails.
fn by_preference(host: &str, controllers: &[String]) -> Vec<String> {
    let mut all: Vec<String> = controllers.iter().map(|url| address(url).to_owned()).collect();
    all.sort_by_cached_key(|address| {
        let mut hasher = DefaultHasher::new();
        (host, address).hash(&mut hasher);
        hasher.finish()
    });
    all
}

/// `HOST:PORT` of `https://HOST:PORT`.
fn address(url: &str) -> &str {
    url.strip_prefix("https://").unwrap_or(url).trim_end_matches('/')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_spread_over_controllers() {
        let controllers = ["https://a:1/".to_owned(), "b:1".to_owned(), "c:1".to_owned()];
        let mut firsts = std::collections::BTreeMap::new();
        for number in 0..300 {
            let order = by_preference(&format!("h{number}"), &controllers);
            assert_eq!(order, by_preference(&format!("h{number}"), &controllers));
            *firsts.entry(order[0].clone()).or_insert(0) += 1;
        }
        assert_eq!(firsts.keys().collect::<Vec<_>>(), ["a:1", "b:1", "c:1"]);
        assert!(firsts.values().all(|count| *count > 60), "{firsts:?}");
    }
}
