//! How an agent or a relay is known to the controllers: it joins with a token, has a certificate, renews it, and finds a
//! controller that answers.

mod clock;
mod held;

use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bulkhead_identity::tls::{self, client_config, joining_client_config};
use bulkhead_identity::{
    Credentials, CredentialsError, Identity, JoinToken, Key, TokenError, read_text, write_private,
};
use bulkhead_wire::proto::distribution_client::DistributionClient;
use bulkhead_wire::proto::{EnrollRequest, Enrollment, RenewRequest};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::watch;
use tonic::Status;
use tonic::transport::{Channel, Endpoint};

pub use held::Held;

/// The key of somebody that has asked to join and has no answer yet. If the answer was lost, whoever has the key may ask again.
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
/// The same for certificates that last for minutes, as tests have them: a part of their life.
const LOOKS_PER_LIFE: u32 = 20;

/// Who somebody is to be, and where.
#[derive(Debug, Clone)]
pub struct Place {
    /// The agent of a host, or a relay.
    pub identity: Identity,
    /// Where its certificate and key are.
    pub directory: PathBuf,
    /// Their files' name, without its end.
    pub files: &'static str,
    /// Text of the token that it joins with, if it has no certificate yet.
    pub token: Option<String>,
    /// Where controllers serve agents, `https://HOST:PORT`.
    pub controllers: Vec<String>,
}

/// Why somebody has no place.
#[derive(Debug, thiserror::Error)]
pub enum MembershipError {
    /// The certificate cannot be used.
    #[error("the certificate cannot be used: {0}")]
    Credentials(#[from] CredentialsError),
    /// The token is none.
    #[error(transparent)]
    Token(#[from] TokenError),
    /// The certificate in the directory is another's.
    #[error(
        "the state directory has the certificate of {holder}: give this one a directory of its own with --state-dir, or a \
         token with which it joins"
    )]
    Other {
        /// Whose it is.
        holder: String,
    },
}

/// A place in the fleet.
#[derive(Debug)]
pub struct Membership {
    identity: Identity,
    directory: PathBuf,
    files: &'static str,
    token: Option<JoinToken>,
    /// Addresses of controllers, the favourite first.
    controllers: Vec<String>,
    /// Which of them is in use.
    in_use: AtomicUsize,
    current: watch::Sender<Option<Held>>,
    /// The controller has said that the certificate is good for nothing: it is revoked, perhaps.
    refused: AtomicBool,
    /// Of the session; what else is told to the controller takes the same connection.
    channel: Mutex<Option<Channel>>,
}

impl Membership {
    /// Reads the credentials, if there are any.
    ///
    /// # Errors
    /// If they cannot be used, or are somebody else's and there is no token to get others.
    pub fn open(place: Place) -> Result<Self, MembershipError> {
        let Place { identity, directory, files, token, controllers } = place;
        let credentials = Credentials::load(&directory, files)?;
        let token = token.as_deref().map(str::parse).transpose()?;
        if let Some(credentials) = &credentials {
            let holder = credentials.holder()?.identity;
            if holder != identity && token.is_none() {
                return Err(MembershipError::Other { holder: holder.to_string() });
            }
        }
        let own = |credentials: &Credentials| {
            let holder = credentials.holder();
            holder.is_ok_and(|holder| holder.identity == identity)
        };
        let current = credentials.filter(own).map(Held::found).transpose()?;
        let current = watch::Sender::new(current);
        let (controllers, in_use) = (by_preference(identity.name(), &controllers), AtomicUsize::new(0));
        Ok(Self {
            identity,
            directory,
            files,
            token,
            controllers,
            in_use,
            current,
            refused: AtomicBool::new(false),
            channel: Mutex::new(None),
        })
    }

    /// The controller in use, `HOST:PORT`.
    pub fn controller(&self) -> &str {
        let number = self.in_use.load(Ordering::Relaxed);
        self.controllers.get(number % self.controllers.len().max(1)).map_or("", String::as_str)
    }

    /// Whether the controller in use is the favourite.
    pub fn is_home(&self) -> bool {
        self.in_use.load(Ordering::Relaxed).is_multiple_of(self.controllers.len().max(1))
    }

    /// Whether the favourite can be reached now.
    pub async fn home_answers(&self) -> bool {
        let Some((credentials, address)) = self.credentials().zip(self.controllers.first()) else {
            return false;
        };
        let Ok(config) = client_config(&credentials.authorities, Some(&credentials), PROTOCOL) else {
            return false;
        };
        let connected = tokio::time::timeout(
            CONNECT_TIMEOUT,
            dial(matches!(self.identity, Identity::Agent(_)), address, &config),
        )
        .await;
        matches!(connected, Ok(Ok(_)))
    }

    /// Takes the favourite from now on.
    pub fn go_home(&self) {
        self.in_use.store(0, Ordering::Relaxed);
        *lock(&self.channel) = None;
    }

    /// Goes on to the next controller.
    pub fn try_another(&self) {
        self.in_use.fetch_add(1, Ordering::Relaxed);
        *lock(&self.channel) = None;
    }

    /// The session's connection, for whatever else there is to tell.
    pub fn channel(&self) -> Option<Channel> {
        lock(&self.channel).clone()
    }

    /// What it has, if that may be good now: whether it is, decides the clock of whoever is shown it.
    pub fn valid_credentials(&self) -> Option<Arc<Credentials>> {
        let held = self.held().filter(|held| held.may_be_good());
        held.map(|held| held.credentials)
    }

    fn held(&self) -> Option<Held> {
        self.current.borrow().clone()
    }

    fn credentials(&self) -> Option<Arc<Credentials>> {
        self.held().map(|held| held.credentials)
    }

    /// What it has, whenever that is another: a renewed certificate, other authorities.
    pub fn changes(&self) -> watch::Receiver<Option<Held>> {
        self.current.subscribe()
    }

    /// A new connection to the controller in use; joins before, if there is no valid certificate, or a token that may be worth
    /// more than that.
    ///
    /// # Errors
    /// If it cannot join, or something that it has cannot be used.
    pub async fn connect(&self) -> Result<Channel, Status> {
        let credentials = match self.valid_credentials() {
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

    /// Whether the token is of another authority than the certificate, which is valid.
    pub fn has_token_of_another_authority(&self) -> bool {
        let own = self.valid_credentials();
        self.token.as_ref().zip(own).is_some_and(|(token, own)| !token.is_of(&own.authorities))
    }

    /// The controller does not take the certificate: with a token, the next connection joins before.
    pub fn refused(&self) {
        self.refused.store(true, Ordering::Relaxed);
    }

    fn open_channel(&self, config: Arc<tls::ClientConfig>) -> Result<Channel, Status> {
        let address = self.controller().to_owned();
        // What is inside TLS; the connector makes the outside.
        let endpoint = Endpoint::from_shared(format!("http://{address}"))
            .map_err(|error| Status::invalid_argument(format!("{address:?} is no address: {error}")))?;
        let is_agent = matches!(self.identity, Identity::Agent(_));
        let endpoint = endpoint
            .connect_timeout(CONNECT_TIMEOUT)
            .http2_keep_alive_interval(KEEPALIVE)
            .keep_alive_timeout(KEEPALIVE)
            .keep_alive_while_idle(true);
        Ok(endpoint.connect_with_connector_lazy(tower::service_fn(move |_uri| {
            let (address, config) = (address.clone(), Arc::clone(&config));
            async move { dial(is_agent, &address, &config).await.map(TokioIo::new) }
        })))
    }

    /// Gets a certificate with the token.
    async fn join(&self) -> Result<Arc<Credentials>, Status> {
        let Some(token) = &self.token else {
            let what = if matches!(self.identity, Identity::Relay(_)) { "relay" } else { "host" };
            let name = self.identity.name();
            let why = match self.credentials() {
                Some(_) => format!("this {what}'s certificate has ended"),
                None => format!("this {what} has not joined"),
            };
            return Err(Status::unauthenticated(format!(
                "{why}: make a token with \"bulkhead token create --{what} {name}\", and start it with --join-token"
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
            host: self.identity.name().to_owned(),
            relay: matches!(self.identity, Identity::Relay(_)),
            signing_request: key.request().map_err(unusable)?,
        };
        let answer = tokio::time::timeout(ANSWER_TIMEOUT, client.enroll(request)).await;
        let enrollment = answer.map_err(|_elapsed| Status::deadline_exceeded("no answer"))??.into_inner();
        let credentials = self.adopt(&key, enrollment)?;
        // A next time it joins with another.
        let _not_there = std::fs::remove_file(&path);
        tracing::info!(who = %self.identity, "joined");
        Ok(credentials)
    }

    /// From now on this certificate is used.
    fn adopt(&self, key: &Key, enrollment: Enrollment) -> Result<Arc<Credentials>, Status> {
        let Enrollment { certificate, authorities } = enrollment;
        let credentials = Credentials { certificate, key: key.pem(), authorities };
        let holder = credentials.holder().map_err(unusable)?;
        if holder.identity != self.identity {
            return Err(Status::internal(format!(
                "the controller made a certificate for {}",
                holder.identity
            )));
        }
        credentials.save(&self.directory, self.files).map_err(unusable)?;
        let held = Held::made(credentials).map_err(unusable)?;
        self.current.send_replace(Some(held.clone()));
        Ok(held.credentials)
    }

    /// Takes up what somebody has put into the directory: another bundle of authorities, or what an authority of one's own
    /// has signed.
    fn look_into_directory(&self) {
        let Some(before) = self.credentials() else { return };
        // Not there, or half of it: somebody is writing.
        let Ok(Some(found)) = Credentials::load(&self.directory, self.files) else { return };
        let texts = |one: &Credentials| [one.certificate.clone(), one.key.clone(), one.authorities.clone()];
        if texts(&found) == texts(&before) {
            return;
        }
        let is_ours = found.holder().is_ok_and(|holder| holder.identity == self.identity);
        // A certificate and another's key are no pair.
        if !is_ours || client_config(&found.authorities, Some(&found), PROTOCOL).is_err() {
            return;
        }
        let Ok(found) = Held::found(found) else { return };
        if !found.may_be_good() {
            return;
        }
        let taken = self.current.send_if_modified(|current| {
            // Unless it has joined meanwhile: then it looks again.
            let is_as_before =
                current.as_ref().is_some_and(|current| Arc::ptr_eq(&current.credentials, &before));
            if is_as_before {
                *current = Some(found);
            }
            is_as_before
        });
        if taken {
            tracing::info!(directory = %self.directory.display(), "took up other files of the certificate");
        }
    }

    /// Renews the certificate whenever half of its life is over, and takes up what is put into its directory, for as long as
    /// the agent runs.
    pub async fn keep_current(self: Arc<Self>) {
        loop {
            self.look_into_directory();
            let held = self.held();
            // Of its life, and not of what is left of it: that would be nothing for a clock that is ahead.
            let part =
                |held: &Held| (held.life() / LOOKS_PER_LIFE).clamp(Duration::from_millis(100), LOOK_EVERY);
            let wait = held.as_ref().map_or(LOOK_EVERY, part);
            if held.is_some_and(|held| held.is_due())
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
        let signing_request = key.request().map_err(unusable)?;
        // Whoever passes it on cannot put another key into it.
        let own = self.credentials().ok_or_else(|| Status::unauthenticated("no certificate"))?;
        let proof = own.sign(signing_request.as_bytes()).map_err(unusable)?.into();
        let request = RenewRequest { signing_request, proof, ..RenewRequest::default() };
        let mut client = DistributionClient::new(channel);
        let answer = tokio::time::timeout(ANSWER_TIMEOUT, client.renew(request)).await;
        let enrollment = answer.map_err(|_elapsed| Status::deadline_exceeded("no answer"))??.into_inner();
        self.adopt(&key, enrollment)?;
        tracing::info!("the certificate was renewed");
        Ok(())
    }
}

/// Only for an agent a relay is a controller.
async fn dial(
    is_agent: bool,
    address: &str,
    config: &Arc<tls::ClientConfig>,
) -> std::io::Result<impl AsyncRead + AsyncWrite + Send + Unpin + use<>> {
    if is_agent { tls::connect_as_agent(address, config).await } else { tls::connect(address, config).await }
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
mod tests;
