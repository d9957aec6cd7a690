//! Tokens, relays, certificates and revocations: what administrators do about who may come in.

use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::{Extension, Json};
use bulkhead_identity::{Identity, JoinToken};
use bulkhead_model::resource::{API_VERSION, is_name};
use bulkhead_store::StoreError;
use serde::Deserialize;
use serde_json::{Value, json};
use std::time::Duration;

use super::input::{self, Body, Parameters};
use super::problem::Refusal;
use super::{Shared, to_the_end};
use crate::access::{
    self, Caller, EnrollmentError, Grant, HostPatterns, RELAYS_MAX, Relay, Revocation, Revoked, Token,
};
use crate::clock;
use crate::context::Context;

/// How long a join token is good unless told otherwise, and at most; an operator's: at most ten years.
const JOIN_TTL_MS: u64 = 3_600_000;
const JOIN_TTL_MS_MAX: u64 = 30 * 86_400_000;
const OPERATOR_TTL_MS: u64 = 90 * 86_400_000;
const OPERATOR_TTL_MS_MAX: u64 = 3650 * 86_400_000;
/// Most machines that may join by one token.
const USES_MAX: u32 = 10_000;

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Operator {
    name: String,
    #[serde(default)]
    groups: Vec<String>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct TokenRequest {
    /// For a machine: of this host only.
    host: Option<String>,
    /// For how many machines.
    uses: Option<u32>,
    /// For an operator instead of a machine.
    operator: Option<Operator>,
    /// For the relay of this name instead.
    relay: Option<String>,
    /// For which hosts that relay may speak, by names or patterns; absent: as before.
    hosts: Option<Vec<String>>,
    /// How long.
    ttl: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct CertificateRequest {
    signing_request: String,
    operator: Option<Operator>,
    /// For a host's agent instead of an operator.
    agent: Option<String>,
    ttl: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RevocationRequest {
    serial: Option<String>,
    /// `agent/HOST`, `relay/NAME` or `operator/NAME`.
    holder: Option<String>,
    #[serde(default)]
    reason: String,
}

fn ttl_ms(text: Option<&str>, default_ms: u64, max_ms: u64) -> Result<u64, Refusal> {
    let Some(text) = text else { return Ok(default_ms) };
    let ttl = input::duration_ms(text).filter(|ttl| (1_000..=max_ms).contains(ttl));
    ttl.ok_or_else(|| {
        let days = max_ms / 86_400_000;
        Refusal::bad_request(format!("ttl: expected 1s to {days}d, found {text:?}"))
    })
}

fn named(operator: &Operator) -> Result<Identity, Refusal> {
    Identity::operator(&operator.name, &operator.groups)
        .map_err(|error| Refusal::bad_request(error.to_string()))
}

/// `GET /apis/bulkhead.dev/v1/tokens`.
pub(super) async fn tokens(State(context): Shared, parameters: Parameters) -> Result<Json<Value>, Refusal> {
    parameters.only(&[])?;
    let items: Vec<_> = context.grants.tokens().iter().map(described).collect();
    Ok(Json(json!({ "apiVersion": API_VERSION, "kind": "TokenList", "items": items })))
}

/// Everything but its secret, which nobody knows any more.
fn described(token: &Token) -> Value {
    let mut described = json!({
        "id": token.id,
        "createdAt": clock::rfc3339(token.created_ms),
        "expiresAt": clock::rfc3339(token.expires_ms),
        "by": token.by,
    });
    match &token.grant {
        Grant::Join { host } => {
            described["for"] = json!("join");
            described["usesLeft"] = json!(token.uses_left);
            if let Some(host) = host {
                described["host"] = json!(host);
            }
        }
        Grant::Relay { name } => {
            described["for"] = json!("relay");
            described["relay"] = json!(name);
            described["usesLeft"] = json!(token.uses_left);
        }
        Grant::Operator { name, groups } => {
            described["for"] = json!("operator");
            described["operator"] = json!({ "name": name, "groups": groups });
        }
    }
    described
}

/// `POST /apis/bulkhead.dev/v1/tokens`: the answer is the only place where the token itself is.
pub(super) async fn create_token(
    State(context): Shared,
    Extension(caller): Extension<Caller>,
    parameters: Parameters,
    body: Body,
) -> Result<(StatusCode, Json<Value>), Refusal> {
    parameters.only(&[])?;
    let TokenRequest { host, uses, operator, relay, hosts, ttl } = input::json(body)?;
    let uses = uses.unwrap_or(1);
    if !(1..=USES_MAX).contains(&uses) {
        return Err(Refusal::bad_request(format!("uses: expected 1 to {USES_MAX}, found {uses}")));
    }
    let Some(authority) = &context.trust.authority else {
        return Err(Refusal::from(EnrollmentError::NotOurs));
    };
    let secret = JoinToken::generate(authority.certificate());
    if relay.is_some() && (operator.is_some() || host.is_some() || uses != 1) {
        return Err(Refusal::bad_request("a token is for machines, for a relay or for an operator"));
    }
    let made_relay =
        relay.as_deref().map(|name| described_relay(&context, &caller, name, hosts.clone())).transpose()?;
    if relay.is_none() && hosts.is_some() {
        return Err(Refusal::bad_request("hosts: only a relay speaks for hosts"));
    }
    let (grant, uses_left, text, ttl) = match (operator, relay) {
        (None, Some(name)) => {
            let ttl = ttl_ms(ttl.as_deref(), JOIN_TTL_MS, JOIN_TTL_MS_MAX)?;
            (Grant::Relay { name }, 1, secret.to_string(), ttl)
        }
        (None, None) => {
            if let Some(host) = host.as_ref().filter(|host| !is_name(host)) {
                return Err(Refusal::bad_request(format!("{host:?} cannot be the name of a host")));
            }
            let ttl = ttl_ms(ttl.as_deref(), JOIN_TTL_MS, JOIN_TTL_MS_MAX)?;
            (Grant::Join { host }, uses, secret.to_string(), ttl)
        }
        (Some(operator), _) => {
            if host.is_some() || uses != 1 {
                return Err(Refusal::bad_request("a token is for machines or for an operator, not both"));
            }
            named(&operator)?;
            let ttl = ttl_ms(ttl.as_deref(), OPERATOR_TTL_MS, OPERATOR_TTL_MS_MAX)?;
            let Operator { name, groups } = operator;
            (Grant::Operator { name, groups }, 0, access::operator_token(&secret), ttl)
        }
    };
    if !context.grants.has_room() {
        return Err(Refusal::new(
            StatusCode::CONFLICT,
            "TooManyTokens",
            "too many tokens are valid: delete some",
        ));
    }
    let now = clock::now_ms();
    let token = Token {
        id: secret.id.clone(),
        digest: secret.secret.digest().text().to_owned(),
        grant,
        uses_left,
        created_ms: now,
        expires_ms: now.saturating_add(ttl),
        by: caller.to_string(),
    };
    let mut answer = described(&token);
    if let Some(relay) = &made_relay {
        answer["hosts"] = json!(relay.hosts);
    }
    answer["token"] = json!(text);
    context.audit.ready().await?;
    let add = async move {
        context.grants.add_token(&token, made_relay.as_ref()).await?;
        let mut detail = described(&token);
        if let Some(relay) = &made_relay {
            detail["hosts"] = json!(relay.hosts);
        }
        context.audit.done(&caller.name(), &caller.from(), "token create", detail).await;
        Ok::<_, StoreError>(())
    };
    to_the_end(add).await??;
    Ok((StatusCode::CREATED, Json(answer)))
}

/// What a relay may do from now on.
fn described_relay(
    context: &Context,
    caller: &Caller,
    name: &str,
    hosts: Option<Vec<String>>,
) -> Result<Relay, Refusal> {
    if !is_name(name) {
        return Err(Refusal::bad_request(format!("{name:?} cannot be the name of a relay")));
    }
    let before = context.grants.relay(name);
    if before.is_none() && context.grants.relays().len() >= RELAYS_MAX {
        let message = format!("there are {RELAYS_MAX} relays already");
        return Err(Refusal::new(StatusCode::CONFLICT, "TooManyRelays", message));
    }
    let hosts = match (hosts, before) {
        (Some(hosts), _) => {
            HostPatterns::new(hosts).map_err(|error| Refusal::bad_request(format!("hosts: {error}")))?
        }
        (None, Some((before, _))) => before.hosts,
        (None, None) => {
            return Err(Refusal::bad_request("hosts: for which hosts may the relay speak?"));
        }
    };
    Ok(Relay { name: name.to_owned(), hosts, since_ms: clock::now_ms(), by: caller.to_string() })
}

/// `DELETE /apis/bulkhead.dev/v1/tokens/{id}`.
pub(super) async fn delete_token(
    State(context): Shared,
    Path(id): Path<String>,
    Extension(caller): Extension<Caller>,
    parameters: Parameters,
) -> Result<Json<Value>, Refusal> {
    parameters.only(&[])?;
    let name = id.clone();
    context.audit.ready().await?;
    let remove = async move {
        let removed = context.grants.remove_token(&name).await?;
        context.audit.done(&caller.name(), &caller.from(), "token delete", json!({ "id": name })).await;
        Ok::<_, StoreError>(removed)
    };
    if to_the_end(remove).await?? {
        Ok(Json(json!({ "id": id })))
    } else {
        Err(Refusal::not_found(format!("there is no token {id:?}")))
    }
}

/// `GET /apis/bulkhead.dev/v1/relays`.
pub(super) async fn relays(State(context): Shared, parameters: Parameters) -> Result<Json<Value>, Refusal> {
    parameters.only(&[])?;
    let items: Vec<_> = context.grants.relays().iter().map(relay).collect();
    Ok(Json(json!({ "apiVersion": API_VERSION, "kind": "RelayList", "items": items })))
}

fn relay(one: &Relay) -> Value {
    json!({ "name": one.name, "hosts": one.hosts, "since": clock::rfc3339(one.since_ms), "by": one.by })
}

/// `DELETE /apis/bulkhead.dev/v1/relays/{name}`.
pub(super) async fn delete_relay(
    State(context): Shared,
    Path(name): Path<String>,
    Extension(caller): Extension<Caller>,
    parameters: Parameters,
) -> Result<Json<Value>, Refusal> {
    parameters.only(&[])?;
    let none = || Refusal::not_found(format!("there is no relay {name:?}"));
    if context.grants.relay(&name).is_none() {
        return Err(none());
    }
    room_for_revocation(&context)?;
    context.audit.ready().await?;
    let identity = Identity::relay(&name).map_err(|error| Refusal::bad_request(error.to_string()))?;
    let revocation = Revocation {
        of: Revoked::Holder(identity.to_string()),
        since_ms: clock::now_ms(),
        by: caller.to_string(),
        reason: "the relay was deleted".into(),
    };
    tracing::warn!(relay = name, by = %caller, "a relay was deleted");
    let remove = async move {
        let removed = context.grants.remove_relay(&revocation).await?;
        if let Some(removed) = &removed {
            context.audit.done(&caller.name(), &caller.from(), "relay delete", relay(removed)).await;
        }
        Ok::<_, StoreError>(removed)
    };
    let removed = to_the_end(remove).await??.ok_or_else(none)?;
    Ok(Json(relay(&removed)))
}

/// `POST /apis/bulkhead.dev/v1/certificates`.
pub(super) async fn create_certificate(
    State(context): Shared,
    Extension(caller): Extension<Caller>,
    parameters: Parameters,
    body: Body,
) -> Result<(StatusCode, Json<Value>), Refusal> {
    parameters.only(&[])?;
    let CertificateRequest { signing_request, operator, agent, ttl } = input::json(body)?;
    let identity = match (operator, agent) {
        (Some(operator), None) => named(&operator)?,
        (None, Some(host)) if is_name(&host) => {
            Identity::agent(&host).map_err(|error| Refusal::bad_request(error.to_string()))?
        }
        (None, Some(host)) => {
            return Err(Refusal::bad_request(format!("{host:?} cannot be the name of a host")));
        }
        (Some(_), Some(_)) | (None, None) => {
            return Err(Refusal::bad_request("a certificate is for an operator or an agent"));
        }
    };
    let default_ms = context.config.certificate_lifetime_s.saturating_mul(1000);
    let ttl = Duration::from_millis(ttl_ms(ttl.as_deref(), default_ms, OPERATOR_TTL_MS_MAX)?);
    let detail = json!({ "holder": identity.to_string(), "groups": identity.groups() });
    context.audit.ready().await?;
    let made = access::certify(&context, &signing_request, &identity, ttl).await?;
    context.audit.done(&caller.name(), &caller.from(), "certificate create", detail).await;
    let answer = json!({
        "holder": identity.to_string(),
        "certificate": made.certificate,
        "authorities": made.authorities,
    });
    Ok((StatusCode::CREATED, Json(answer)))
}

/// `GET /apis/bulkhead.dev/v1/revocations`.
pub(super) async fn revocations(
    State(context): Shared,
    parameters: Parameters,
) -> Result<Json<Value>, Refusal> {
    parameters.only(&[])?;
    let items: Vec<_> = context.grants.revocations().iter().map(revocation).collect();
    Ok(Json(json!({ "apiVersion": API_VERSION, "kind": "RevocationList", "items": items })))
}

fn revocation(one: &Revocation) -> Value {
    let mut described = json!({ "since": clock::rfc3339(one.since_ms), "by": one.by, "reason": one.reason });
    match &one.of {
        Revoked::Serial(serial) => described["serial"] = json!(serial),
        Revoked::Holder(holder) => described["holder"] = json!(holder),
    }
    described
}

/// `POST /apis/bulkhead.dev/v1/revocations`.
pub(super) async fn revoke(
    State(context): Shared,
    Extension(caller): Extension<Caller>,
    parameters: Parameters,
    body: Body,
) -> Result<(StatusCode, Json<Value>), Refusal> {
    parameters.only(&[])?;
    let RevocationRequest { serial, holder, reason } = input::json(body)?;
    let of = match (serial, holder) {
        (Some(serial), None) if serial.bytes().all(|byte| byte.is_ascii_hexdigit()) && !serial.is_empty() => {
            Revoked::Serial(serial.to_ascii_lowercase())
        }
        (None, Some(holder)) => Revoked::Holder(checked_holder(&holder)?),
        _ => return Err(Refusal::bad_request("expected a serial (hexadecimal) or a holder")),
    };
    room_for_revocation(&context)?;
    context.audit.ready().await?;
    let made = Revocation { of, since_ms: clock::now_ms(), by: caller.to_string(), reason };
    tracing::warn!(of = ?made.of, by = %made.by, "a certificate was revoked");
    let answer = revocation(&made);
    let detail = answer.clone();
    let revoke = async move {
        context.grants.revoke(&made).await?;
        context.audit.done(&caller.name(), &caller.from(), "certificate revoke", detail).await;
        Ok::<_, StoreError>(())
    };
    to_the_end(revoke).await??;
    Ok((StatusCode::CREATED, Json(answer)))
}

fn room_for_revocation(context: &Context) -> Result<(), Refusal> {
    if context.grants.has_room_for_revocation() {
        return Ok(());
    }
    let message = "too many revocations: make a new authority instead";
    Err(Refusal::new(StatusCode::CONFLICT, "TooManyRevocations", message))
}

fn checked_holder(holder: &str) -> Result<String, Refusal> {
    let identity = match holder.split_once('/') {
        Some(("agent", host)) => Identity::agent(host).ok(),
        Some(("operator", name)) => Identity::operator(name, &[]).ok(),
        Some(("relay", name)) => Identity::relay(name).ok(),
        _ => None,
    };
    identity.map(|identity| identity.to_string()).ok_or_else(|| {
        Refusal::bad_request(format!(
            "holder: expected agent/HOST, relay/NAME or operator/NAME, found {holder:?}"
        ))
    })
}

/// `GET /apis/bulkhead.dev/v1/whoami`.
pub(super) async fn who_am_i(
    Extension(caller): Extension<Caller>,
    parameters: Parameters,
) -> Result<Json<Value>, Refusal> {
    parameters.only(&[])?;
    let groups: Vec<&str> = caller.groups.iter().map(String::as_str).collect();
    Ok(Json(json!({ "caller": caller.name(), "groups": groups, "admin": caller.is_admin() })))
}

impl From<EnrollmentError> for Refusal {
    fn from(error: EnrollmentError) -> Self {
        let message = error.to_string();
        match error {
            EnrollmentError::NotGranted(_) => Self::new(StatusCode::FORBIDDEN, "Forbidden", message),
            EnrollmentError::NotOurs => Self::new(StatusCode::CONFLICT, "ExternalAuthority", message),
            EnrollmentError::Host(_) | EnrollmentError::Name(_) | EnrollmentError::Authority(_) => {
                Self::bad_request(message)
            }
            EnrollmentError::Store(error) => error.into(),
        }
    }
}
