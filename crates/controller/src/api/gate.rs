//! Who may ask at all: the first thing that happens to a request.

use axum::extract::{Request, State};
use axum::http::{StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use super::Shared;
use super::problem::Refusal;
use crate::access::{Caller, Who};
use crate::context::Context;

/// What everybody may ask: how the controller is, and what there is to ask. Probes have no certificates.
const PUBLIC: [&str; 4] = ["/healthz", "/readyz", "/openapi.json", "/version"];

/// Lets a request pass with its caller, or refuses it.
pub(super) async fn admit(State(context): Shared, mut request: Request, next: Next) -> Response {
    let caller = match identify(&context, &request) {
        Ok(caller) => caller,
        Err(refusal) => return refuse(&context, refusal),
    };
    if !PUBLIC.contains(&request.uri().path())
        && let Err(refusal) = may_ask(&caller)
    {
        return refuse(&context, refusal);
    }
    request.extensions_mut().insert(caller);
    next.run(request).await
}

/// A token in the request's head counts before the connection's certificate.
fn identify(context: &Context, request: &Request) -> Result<Caller, Refusal> {
    let caller = request.extensions().get::<Caller>().cloned();
    let caller = caller
        .ok_or_else(|| Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, "InternalError", "nobody asks"))?;
    let Some(value) = request.headers().get(header::AUTHORIZATION) else {
        return match caller.certificate.as_ref().and_then(|holder| context.grants.revoked(holder)) {
            Some(_) => Err(unauthenticated("the certificate is revoked")),
            None => Ok(caller),
        };
    };
    let token = value.to_str().ok().and_then(|value| value.strip_prefix("Bearer "));
    let token = token.ok_or_else(|| unauthenticated("expected Authorization: Bearer TOKEN"))?;
    caller.with_token(&context.grants, token.trim()).ok_or_else(|| {
        unauthenticated("the token is unknown, revoked or expired: ask an administrator for another")
    })
}

fn may_ask(caller: &Caller) -> Result<(), Refusal> {
    match &caller.who {
        Who::Nobody => Err(unauthenticated(
            "who are you? Show a certificate or a token: on the controller's host, root makes one with \
             bulkhead certificate create operator/NAME",
        )),
        Who::Operator(_) | Who::Local { .. } if caller.is_admin() => Ok(()),
        Who::Controller(_) => Ok(()),
        Who::Operator(_) | Who::Local { .. } | Who::Agent(_) => {
            Err(Refusal::new(StatusCode::FORBIDDEN, "Forbidden", format!("{caller} may not do this")))
        }
    }
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
