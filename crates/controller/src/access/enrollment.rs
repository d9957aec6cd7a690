//! Certificates for agents and operators.

use std::time::Duration;

use bulkhead_identity::{Authority, AuthorityError, Holder, Identity, NameError};
use bulkhead_model::resource::is_name;
use bulkhead_store::StoreError;
use bulkhead_wire::proto::{EnrollRequest, Enrollment};

use super::grants::NotGranted;
use super::records::milliseconds;
use crate::clock;
use crate::context::Context;

/// Why nobody gets a certificate.
#[derive(Debug, thiserror::Error)]
pub(crate) enum EnrollmentError {
    #[error(transparent)]
    NotGranted(#[from] NotGranted),
    #[error("an authority of your own signs for this fleet: give the agent its certificate in a file")]
    NotOurs,
    #[error("{0:?} cannot be the name of a host")]
    Host(String),
    #[error(transparent)]
    Name(#[from] NameError),
    #[error(transparent)]
    Authority(#[from] AuthorityError),
    #[error(transparent)]
    Store(#[from] StoreError),
}

fn authority(context: &Context) -> Result<&Authority, EnrollmentError> {
    context.trust.authority.as_ref().ok_or(EnrollmentError::NotOurs)
}

/// Longest that the certificate of a relay lasts: its agents trust it for as long, also once it is revoked.
const RELAY_LIFETIME_MAX: Duration = Duration::from_secs(7 * 24 * 3600);

fn lifetime(context: &Context, identity: &Identity) -> Duration {
    let lifetime = context.config.certificate_lifetime();
    if matches!(identity, Identity::Relay(_)) { lifetime.min(RELAY_LIFETIME_MAX) } else { lifetime }
}

/// A machine joins with a token.
pub(crate) async fn enroll(
    context: &Context,
    request: &EnrollRequest,
) -> Result<Enrollment, EnrollmentError> {
    let EnrollRequest { token_id, token_secret, host, signing_request, relay } = request;
    if !is_name(host) {
        return Err(EnrollmentError::Host(host.clone()));
    }
    let identity = if *relay { Identity::relay(host)? } else { Identity::agent(host)? };
    // What cannot be signed must not use a token up.
    let lifetime = lifetime(context, &identity);
    authority(context)?.sign(signing_request, &identity, lifetime, clock::system())?;
    let key = Authority::key_digest(signing_request)?;
    let token = (token_id.as_str(), token_secret.as_str());
    if *relay {
        context.grants.use_relay_token(token, host, &key).await??;
    } else {
        context.grants.use_join_token(token, host, &key).await??;
    }
    tracing::info!(who = %identity, token = %token_id, "a host or relay has joined");
    context.metrics.hosts_joined.add(1);
    certify(context, signing_request, &identity, lifetime).await
}

/// Somebody with a certificate gets the next one.
pub(crate) async fn renew(
    context: &Context,
    holder: &Holder,
    signing_request: &str,
) -> Result<Enrollment, EnrollmentError> {
    let lifetime = lifetime(context, &holder.identity);
    let enrollment = certify(context, signing_request, &holder.identity, lifetime).await?;
    tracing::info!(who = %holder.identity, "a certificate was renewed");
    context.metrics.certificates_renewed.add(1);
    Ok(enrollment)
}

/// Signs.
pub(crate) async fn certify(
    context: &Context,
    signing_request: &str,
    identity: &Identity,
    lifetime: Duration,
) -> Result<Enrollment, EnrollmentError> {
    // A certificate begins at a full second. One that began before the holder's last revocation would be refused.
    let revoked_ms = context.grants.revoked_since(identity).unwrap_or(0);
    let mut now = clock::system();
    while milliseconds(now) / 1000 * 1000 < revoked_ms {
        // Another controller's clock may be ahead, by more than anybody should wait for.
        if revoked_ms.saturating_sub(milliseconds(now)) > 5_000 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
        now = clock::system();
    }
    let authority = authority(context)?;
    let certificate = authority.sign(signing_request, identity, lifetime, now)?;
    Ok(Enrollment { certificate, authorities: context.trust.authorities.clone() })
}
