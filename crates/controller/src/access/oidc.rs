//! Operators known by somebody else: ID tokens of an OpenID Connect provider (OpenID Connect Core 1.0, section 3.1.3.7).
//!
//! The provider's keys are fetched when a token first asks for them, kept for [`KEYS_FRESH`], and fetched again for a key that
//! is not among them, [`FETCH_EVERY`] apart at least. While the provider cannot be reached, those that are known go on for
//! [`KEYS_STALE`].

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::http::Uri;
use bulkhead_identity::{GROUPS_MAX, Identity, tls};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;
use jsonwebtoken::jwk::{Jwk, JwkSet};
use jsonwebtoken::{Algorithm, DecodingKey, Validation, decode, decode_header};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::sync::Mutex;

use super::caller::Who;

/// How long the provider's keys are taken as they are.
const KEYS_FRESH: Duration = Duration::from_secs(3600);
/// How long they count if it cannot be reached.
const KEYS_STALE: Duration = Duration::from_secs(86_400);
/// Shortest time between two attempts to fetch them: tokens that name a key that nobody has must not make us ask all day.
const FETCH_EVERY: Duration = Duration::from_secs(10);
/// Longest that an answer of the provider may take, and be.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(5);
const ANSWER_BYTES_MAX: usize = 1 << 20;
/// Clocks may differ by so many seconds.
const LEEWAY_S: u64 = 60;
/// What names and groups of the provider begin with here, so that they are nobody's whom we have named.
const PREFIX: &str = "oidc:";
/// Signatures with public keys. What a shared secret signs, we could have signed ourselves.
const ALGORITHMS: [Algorithm; 9] = [
    Algorithm::RS256,
    Algorithm::RS384,
    Algorithm::RS512,
    Algorithm::PS256,
    Algorithm::PS384,
    Algorithm::PS512,
    Algorithm::ES256,
    Algorithm::ES384,
    Algorithm::EdDSA,
];

/// An OpenID Connect provider whose ID tokens let operators in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct OidcConfig {
    /// Its URL, `https://…`, exactly as its tokens have it.
    pub issuer: String,
    /// Whom a token must be for: our client id there.
    pub audience: String,
    /// The claim that names the operator; default `sub`.
    #[serde(default = "subject")]
    pub username_claim: String,
    /// The claim that lists groups; default `groups`.
    #[serde(default = "groups")]
    pub groups_claim: String,
    /// File of the authorities that its server's certificate may be of; default Debian's bundle.
    #[serde(default = "system_authorities")]
    pub authorities: PathBuf,
}

fn subject() -> String {
    "sub".into()
}

fn groups() -> String {
    "groups".into()
}

fn system_authorities() -> PathBuf {
    "/etc/ssl/certs/ca-certificates.crt".into()
}

#[derive(Debug)]
struct Keys {
    set: JwkSet,
    fetched: Instant,
}

#[derive(Debug, Default)]
struct State {
    keys: Option<Keys>,
    tried: Option<Instant>,
}

/// The provider, and its keys as far as they are known.
#[derive(Debug)]
pub(crate) struct Oidc {
    config: OidcConfig,
    state: Mutex<State>,
}

/// Why a token lets nobody in.
#[derive(Debug, thiserror::Error)]
pub(crate) enum OidcError {
    #[error("the ID token is not accepted: {0}")]
    Token(#[from] jsonwebtoken::errors::Error),
    #[error("the ID token is not accepted: {0}")]
    Content(String),
    #[error("the provider's keys cannot be fetched: {0}")]
    Fetch(String),
}

impl Oidc {
    pub(crate) fn new(config: OidcConfig) -> Self {
        Self { config, state: Mutex::default() }
    }

    /// Who holds an ID token.
    pub(crate) async fn operator(&self, token: &str) -> Result<(Who, Arc<[String]>), OidcError> {
        let header = decode_header(token)?;
        if !ALGORITHMS.contains(&header.alg) {
            return Err(OidcError::Content(format!("signed by {:?}", header.alg)));
        }
        let key = self.key(header.kid.as_deref()).await?;
        let mut validation = Validation::new(header.alg);
        validation.set_issuer(&[&self.config.issuer]);
        validation.set_audience(&[&self.config.audience]);
        validation.set_required_spec_claims(&["exp", "iss", "aud"]);
        validation.validate_nbf = true;
        validation.leeway = LEEWAY_S;
        let claims = decode::<Value>(token, &DecodingKey::from_jwk(&key)?, &validation)?.claims;
        let name = claims[&self.config.username_claim].as_str();
        let name = name.ok_or_else(|| {
            OidcError::Content(format!("it has no claim {:?} to name anybody", self.config.username_claim))
        })?;
        let groups = claims[&self.config.groups_claim].as_array().into_iter().flatten();
        let groups = groups.filter_map(Value::as_str).map(|group| format!("{PREFIX}{group}"));
        // A group that we could not name, nobody can have bound to a role.
        let groups = groups.filter(|group| Identity::operator(group, &[]).is_ok()).take(GROUPS_MAX);
        let identity = Identity::operator(&format!("{PREFIX}{name}"), &groups.collect::<Vec<_>>());
        let identity = identity.map_err(|error| OidcError::Content(error.to_string()))?;
        Ok((Who::Operator(identity.name().to_owned()), identity.groups().into()))
    }

    /// The provider's key of an id; if the token names none, its only one.
    async fn key(&self, id: Option<&str>) -> Result<Jwk, OidcError> {
        let find = |set: &JwkSet| match id {
            Some(id) => set.find(id).cloned(),
            None => (set.keys.len() == 1).then(|| set.keys[0].clone()),
        };
        let mut state = self.state.lock().await;
        let fresh = state.keys.as_ref().filter(|keys| keys.fetched.elapsed() < KEYS_FRESH);
        if let Some(key) = fresh.and_then(|keys| find(&keys.set)) {
            return Ok(key);
        }
        let mut failed = None;
        if state.tried.is_none_or(|tried| tried.elapsed() >= FETCH_EVERY) {
            state.tried = Some(Instant::now());
            match self.fetch_keys().await {
                Ok(set) => state.keys = Some(Keys { set, fetched: Instant::now() }),
                Err(error) => {
                    tracing::warn!(%error, issuer = self.config.issuer, "no keys from the OpenID provider");
                    failed = Some(error);
                }
            }
        }
        let known = state.keys.as_ref().filter(|keys| keys.fetched.elapsed() < KEYS_STALE);
        match (known.and_then(|keys| find(&keys.set)), failed) {
            (Some(key), _) => Ok(key),
            (None, Some(error)) => Err(error),
            (None, None) => Err(OidcError::Content("the provider has no such key".into())),
        }
    }

    async fn fetch_keys(&self) -> Result<JwkSet, OidcError> {
        let issuer = self.config.issuer.trim_end_matches('/');
        let document = self.get(&format!("{issuer}/.well-known/openid-configuration")).await?;
        // OpenID Connect Discovery 1.0, 4.3: it must be about whom we asked.
        if document["issuer"].as_str() != Some(&self.config.issuer) {
            return Err(OidcError::Fetch(format!("the document is of {}", document["issuer"])));
        }
        let keys = document["jwks_uri"].as_str();
        let keys = self.get(keys.ok_or_else(|| OidcError::Fetch("no jwks_uri".into()))?).await?;
        serde_json::from_value(keys).map_err(|error| OidcError::Fetch(error.to_string()))
    }

    async fn get(&self, url: &str) -> Result<Value, OidcError> {
        let fail = |error: &dyn std::fmt::Display| OidcError::Fetch(format!("{url}: {error}"));
        let answer = tokio::time::timeout(ANSWER_TIME_MAX, self.request(url)).await;
        let body = answer.map_err(|error| fail(&error))?.map_err(|error| fail(&error))?;
        serde_json::from_slice(&body).map_err(|error| fail(&error))
    }

    async fn request(&self, url: &str) -> io::Result<Bytes> {
        let uri: Uri = url.parse().map_err(io::Error::other)?;
        let host = uri.host().filter(|_| uri.scheme_str() == Some("https"));
        let host = host.ok_or_else(|| io::Error::other("expected https://HOST/…"))?;
        let authorities = std::fs::read_to_string(&self.config.authorities)?;
        let config = tls::client_config(&authorities, None, "http/1.1").map_err(io::Error::other)?;
        let address = format!("{host}:{}", uri.port_u16().unwrap_or(443));
        let stream = tls::connect_to(&address, host.trim_matches(['[', ']']), &config).await?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(io::Error::other)?;
        tokio::spawn(connection);
        let path = uri.path_and_query().map_or("/", |path| path.as_str());
        let request = hyper::Request::get(path).header("host", host).header("accept", "application/json");
        let request = request.body(Empty::<Bytes>::new()).map_err(io::Error::other)?;
        let response = sender.send_request(request).await.map_err(io::Error::other)?;
        if !response.status().is_success() {
            return Err(io::Error::other(response.status().to_string()));
        }
        let body = Limited::new(response.into_body(), ANSWER_BYTES_MAX).collect().await;
        Ok(body.map_err(io::Error::other)?.to_bytes())
    }
}
