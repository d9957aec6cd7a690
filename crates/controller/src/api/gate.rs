//! Who may ask at all: the first thing that happens to a request.

use std::num::NonZeroU32;

use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderValue, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use bulkhead_model::roles::Role;
use governor::clock::{Clock, DefaultClock};
use governor::{Quota, RateLimiter, state::keyed::HashMapStateStore};

use super::problem::Refusal;
use super::{ROUTES, Shared};
use crate::access::{Caller, Permissions, Who};
use crate::context::Context;

/// Requests that each caller may make in a second, and at once.
const REQUESTS_PER_SECOND: u32 = 200;
const REQUESTS_AT_ONCE: u32 = 1000;
/// Callers that are remembered before those that have been quiet are forgotten.
const CALLERS_MAX: usize = 10_000;

/// For whom a path is. Methods that only read need less than those that change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Whom {
    /// How the controller is, and what there is to ask: probes have no certificates.
    Everybody,
    /// Whoever shows who he is.
    Known,
    /// Reading: viewers. Changing: whoever may change anything; what exactly, the repository decides object by object.
    Roles,
    /// Administrators only.
    Admins,
}

/// How often each caller has asked lately.
#[derive(Debug)]
pub(crate) struct Rates(RateLimiter<String, HashMapStateStore<String>, DefaultClock>);

impl Default for Rates {
    fn default() -> Self {
        let per_second = NonZeroU32::new(REQUESTS_PER_SECOND).unwrap_or(NonZeroU32::MIN);
        let at_once = NonZeroU32::new(REQUESTS_AT_ONCE).unwrap_or(NonZeroU32::MIN);
        Self(RateLimiter::hashmap(Quota::per_second(per_second).allow_burst(at_once)))
    }
}

impl Rates {
    /// Counts a request; if it is one too many, for how many seconds to wait.
    fn count(&self, caller: &Caller) -> Result<(), u64> {
        if self.0.len() > CALLERS_MAX {
            self.0.retain_recent();
        }
        // Those that nobody knows share the rate of their address.
        let key = match (&caller.who, caller.ends) {
            (Who::Nobody, Some(ends)) => ends.remote.ip().to_string(),
            _ => caller.name(),
        };
        self.0.check_key(&key).map_err(|until| {
            let wait = until.wait_time_from(DefaultClock::default().now());
            wait.as_secs().max(1)
        })
    }
}

/// Lets a request pass with its caller and what he may do, or refuses it.
pub(super) async fn admit(State(context): Shared, mut request: Request, next: Next) -> Response {
    let shown = request.headers().get(header::AUTHORIZATION).cloned();
    let caller = match identify(&context, request.extensions().get::<Caller>().cloned(), shown).await {
        Ok(caller) => caller,
        Err(refusal) => return refuse(&context, refusal),
    };
    if let Err(seconds) = context.rates.count(&caller) {
        context.metrics.requests_too_many.add(1);
        return too_many(seconds);
    }
    let path = request.extensions().get::<MatchedPath>().map(MatchedPath::as_str);
    // Where there is nothing, whoever is known may hear that.
    let whom = path.and_then(|path| ROUTES.iter().find(|route| route.path == path));
    let whom = whom.map_or(Whom::Known, |route| route.whom);
    let permissions = Permissions::of(&context.repository.view(), &caller);
    let namespace = path.and_then(|path| namespace_of(path, request.uri().path()));
    if let Err(refusal) = may_ask(whom, request.method(), namespace, &caller, &permissions) {
        if caller.who != Who::Nobody && !reads(request.method()) {
            let (method, path) = (request.method(), request.uri().path());
            context.audit.refused(&caller, method, path, &refusal.message).await;
        }
        return refuse(&context, refusal);
    }
    request.extensions_mut().insert(caller);
    request.extensions_mut().insert(permissions);
    next.run(request).await
}

fn too_many(seconds: u64) -> Response {
    let message = format!("more than {REQUESTS_PER_SECOND} requests a second: try again in {seconds} s");
    let refusal = Refusal::new(StatusCode::TOO_MANY_REQUESTS, "TooManyRequests", message);
    ([(header::RETRY_AFTER, seconds.to_string())], refusal).into_response()
}

/// A token in the request's head counts before the connection's certificate.
async fn identify(
    context: &Context,
    caller: Option<Caller>,
    shown: Option<HeaderValue>,
) -> Result<Caller, Refusal> {
    let caller = caller
        .ok_or_else(|| Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, "InternalError", "nobody asks"))?;
    let Some(value) = shown else {
        let revoked = caller.certificate.as_ref().is_some_and(|holder| context.grants.is_revoked(holder));
        return if revoked { Err(unauthenticated("the certificate is revoked")) } else { Ok(caller) };
    };
    let token = value.to_str().ok().and_then(|value| value.strip_prefix("Bearer "));
    let token = token.ok_or_else(|| unauthenticated("expected Authorization: Bearer TOKEN"))?;
    if let Some(operator) = context.grants.operator(token.trim()) {
        return Ok(caller.speaks_for(operator));
    }
    // A JSON Web Token has three parts, ours have another beginning.
    match &context.oidc {
        Some(oidc) if !token.starts_with("bho1.") && token.matches('.').count() == 2 => {
            let operator = oidc.operator(token.trim()).await;
            operator
                .map(|operator| caller.speaks_for(operator))
                .map_err(|error| unauthenticated(&error.to_string()))
        }
        _ => {
            Err(unauthenticated("the token is unknown, revoked or expired: ask an administrator for another"))
        }
    }
}

fn reads(method: &Method) -> bool {
    matches!(*method, Method::GET | Method::HEAD | Method::OPTIONS)
}

/// The namespace that a path is about, as it stands there.
fn namespace_of<'a>(route: &str, path: &'a str) -> Option<&'a str> {
    let (_, found) = route.split('/').zip(path.split('/')).find(|(part, _)| *part == "{namespace}")?;
    Some(found)
}

fn may_ask(
    whom: Whom,
    method: &Method,
    namespace: Option<&str>,
    caller: &Caller,
    permissions: &Permissions,
) -> Result<(), Refusal> {
    if whom == Whom::Everybody {
        return Ok(());
    }
    if caller.who == Who::Nobody {
        return Err(unauthenticated(
            "who are you? Show a certificate or a token: on the controller's host, root makes one with \
             bulkhead certificate create operator/NAME",
        ));
    }
    let least = match whom {
        Whom::Everybody => return Ok(()),
        Whom::Known if !matches!(caller.who, Who::Agent(_) | Who::Relay(_)) => return Ok(()),
        Whom::Known | Whom::Roles if reads(method) => Role::Viewer,
        Whom::Known | Whom::Roles => Role::Editor,
        Whom::Admins => Role::Admin,
    };
    if permissions.role() >= Some(least) || least == Role::Viewer && permissions.may_read(namespace) {
        return Ok(());
    }
    let message = format!(
        "{} has {}, and this takes {}: an administrator binds roles with a RoleBinding",
        caller.name(),
        permissions.title().unwrap_or_else(|| "no role".into()),
        least.as_str()
    );
    Err(Refusal::new(StatusCode::FORBIDDEN, "Forbidden", message))
}

fn unauthenticated(message: &str) -> Refusal {
    Refusal::new(StatusCode::UNAUTHORIZED, "Unauthorized", message)
}

fn refuse(context: &Context, refusal: Refusal) -> Response {
    if refusal.code == StatusCode::UNAUTHORIZED {
        context.metrics.requests_unauthenticated.add(1);
    } else {
        context.metrics.requests_forbidden.add(1);
    }
    refusal.into_response()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guard::Ends;

    #[test]
    fn who_asks_too_often_is_told_to_wait() {
        let rates = Rates::default();
        let ends = |port| Ends { remote: ([10, 0, 0, 9], port).into(), local: ([10, 0, 0, 1], 7440).into() };
        let one = |port| Caller::over_tls(None, ends(port));
        for _ in 0..REQUESTS_AT_ONCE {
            assert_eq!(rates.count(&one(1000)), Ok(()));
        }
        // Some come back while these are counted; another connection of the same address is no other caller.
        let told = (0..REQUESTS_AT_ONCE).find_map(|_| rates.count(&one(2000)).err());
        let seconds = told.expect("it must be told");
        assert_eq!(rates.count(&Caller::local(0, 0)), Ok(()), "nobody else is");
        let response = too_many(seconds);
        assert_eq!(response.status(), StatusCode::TOO_MANY_REQUESTS);
        assert_eq!(response.headers()[header::RETRY_AFTER], seconds.to_string().as_str());
    }
}
