//! The API for operators: REST in the manner of Kubernetes, over TLS and on a Unix socket.
//!
//! [`ROUTES`] is the one table of what there is; the router is built from it, and a test holds
//! `openapi.json` against it. A request has [`REQUEST_TIME_MAX`] for its head and body and our answer's head;
//! streams then last until the client or the controller leaves.

mod apply;
mod backup;
mod change;
mod confirmations;
mod elsewhere;
mod explain;
mod flows;
mod gate;
mod history;
mod identities;
mod input;
mod kubernetes;
mod objects;
mod problem;
mod server;
mod status;
mod stream;
mod watch;

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::{DefaultBodyLimit, Request, State};
use axum::http::{Method, StatusCode};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::MethodRouter;
use tracing::Instrument;
use tracing::field::Empty;

use crate::context::Context;

use gate::Whom;
use kubernetes::{discovery, reviews, schemas};
use problem::Refusal;

pub(crate) use gate::Rates;
pub(crate) use server::serve;

/// Largest body of a request.
pub(crate) const BODY_BYTES_MAX: usize = 16 << 20;
/// Longest that a request may take to be read and answered (streams: to begin).
const REQUEST_TIME_MAX: Duration = Duration::from_secs(30);

/// What handlers share.
pub(crate) type Shared = State<Arc<Context>>;
type Methods = MethodRouter<Arc<Context>, Infallible>;

/// Finishes a change though its client leaves: it may be the change that cuts it off.
async fn to_the_end<T: Send + 'static>(work: impl Future<Output = T> + Send + 'static) -> Result<T, Refusal> {
    tokio::spawn(work.in_current_span()).await.map_err(|error| {
        let message = format!("the change failed half-way: {error}");
        Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, "InternalError", message)
    })
}

/// A path with its methods.
pub(crate) struct Route {
    /// As axum and OpenAPI both write it.
    pub(crate) path: &'static str,
    /// Methods, for the document; the router's own are in `handlers`.
    #[cfg_attr(not(test), expect(dead_code, reason = "read by the test that compares with the document"))]
    pub(crate) methods: &'static [&'static str],
    /// For whom it is.
    pub(crate) whom: Whom,
    handlers: fn() -> Methods,
}

/// What can be done with the objects of a kind.
fn listed() -> Methods {
    axum::routing::get(objects::list).post(objects::create).delete(objects::delete_all)
}

/// What can be done with an object.
fn named() -> Methods {
    let methods = axum::routing::get(objects::get).put(objects::replace).delete(objects::delete);
    methods.patch(kubernetes::patch::patch)
}

/// Everything that is served.
pub(crate) const ROUTES: &[Route] = &[
    Route {
        path: "/healthz",
        whom: Whom::Everybody,
        methods: &["get"],
        handlers: || axum::routing::get(status::healthz),
    },
    Route {
        path: "/readyz",
        whom: Whom::Everybody,
        methods: &["get"],
        handlers: || axum::routing::get(status::readyz),
    },
    Route {
        path: "/metrics",
        whom: Whom::Roles,
        methods: &["get"],
        handlers: || axum::routing::get(status::metrics),
    },
    Route {
        path: "/openapi.json",
        whom: Whom::Everybody,
        methods: &["get"],
        handlers: || axum::routing::get(status::openapi),
    },
    Route {
        path: "/apis/bulkhead.dev/v1/status",
        whom: Whom::Roles,
        methods: &["get"],
        handlers: || axum::routing::get(status::status),
    },
    Route {
        path: "/apis/bulkhead.dev/v1/backup",
        whom: Whom::Admins,
        methods: &["get"],
        handlers: || axum::routing::get(backup::backup),
    },
    Route {
        path: "/apis/bulkhead.dev/v1/apply",
        whom: Whom::Roles,
        methods: &["post"],
        handlers: || axum::routing::post(apply::apply),
    },
    Route {
        path: "/apis/bulkhead.dev/v1/delete",
        whom: Whom::Roles,
        methods: &["post"],
        handlers: || axum::routing::post(apply::delete),
    },
    Route {
        path: "/apis/bulkhead.dev/v1/confirmations",
        whom: Whom::Roles,
        methods: &["get"],
        handlers: || axum::routing::get(confirmations::list),
    },
    Route {
        path: "/apis/bulkhead.dev/v1/confirmations/{id}/confirm",
        whom: Whom::Roles,
        methods: &["post"],
        handlers: || axum::routing::post(confirmations::confirm),
    },
    Route {
        path: "/apis/bulkhead.dev/v1/confirmations/{id}/rollback",
        whom: Whom::Roles,
        methods: &["post"],
        handlers: || axum::routing::post(confirmations::roll_back),
    },
    Route {
        path: "/apis/bulkhead.dev/v1/explain",
        whom: Whom::Roles,
        methods: &["get"],
        handlers: || axum::routing::get(explain::explain),
    },
    Route {
        path: "/apis/bulkhead.dev/v1/flows",
        whom: Whom::Roles,
        methods: &["get"],
        handlers: || axum::routing::get(flows::flows),
    },
    Route {
        path: "/apis/bulkhead.dev/v1/history",
        whom: Whom::Roles,
        methods: &["get"],
        handlers: || axum::routing::get(history::list),
    },
    Route {
        path: "/apis/bulkhead.dev/v1/history/diff",
        whom: Whom::Roles,
        methods: &["get"],
        handlers: || axum::routing::get(history::diff),
    },
    Route {
        path: "/apis/bulkhead.dev/v1/history/rollback",
        whom: Whom::Roles,
        methods: &["post"],
        handlers: || axum::routing::post(history::roll_back),
    },
    Route {
        path: "/apis/bulkhead.dev/v1/tokens",
        whom: Whom::Admins,
        methods: &["get", "post"],
        handlers: || axum::routing::get(identities::tokens).post(identities::create_token),
    },
    Route {
        path: "/apis/bulkhead.dev/v1/tokens/{id}",
        whom: Whom::Admins,
        methods: &["delete"],
        handlers: || axum::routing::delete(identities::delete_token),
    },
    Route {
        path: "/apis/bulkhead.dev/v1/relays",
        whom: Whom::Admins,
        methods: &["get"],
        handlers: || axum::routing::get(identities::relays),
    },
    Route {
        path: "/apis/bulkhead.dev/v1/relays/{name}",
        whom: Whom::Admins,
        methods: &["delete"],
        handlers: || axum::routing::delete(identities::delete_relay),
    },
    Route {
        path: "/apis/bulkhead.dev/v1/certificates",
        whom: Whom::Admins,
        methods: &["post"],
        handlers: || axum::routing::post(identities::create_certificate),
    },
    Route {
        path: "/apis/bulkhead.dev/v1/revocations",
        whom: Whom::Admins,
        methods: &["get", "post"],
        handlers: || axum::routing::get(identities::revocations).post(identities::revoke),
    },
    Route {
        path: "/apis/bulkhead.dev/v1/whoami",
        whom: Whom::Known,
        methods: &["get"],
        handlers: || axum::routing::get(identities::who_am_i),
    },
    Route {
        path: "/version",
        whom: Whom::Known,
        methods: &["get"],
        handlers: || axum::routing::get(discovery::version),
    },
    Route {
        path: "/api",
        whom: Whom::Known,
        methods: &["get"],
        handlers: || axum::routing::get(discovery::core),
    },
    Route {
        path: "/api/v1",
        whom: Whom::Known,
        methods: &["get"],
        handlers: || axum::routing::get(discovery::core_resources),
    },
    Route {
        path: "/apis",
        whom: Whom::Known,
        methods: &["get"],
        handlers: || axum::routing::get(discovery::groups),
    },
    Route {
        path: "/apis/bulkhead.dev/v1",
        whom: Whom::Known,
        methods: &["get"],
        handlers: || axum::routing::get(discovery::own_resources),
    },
    Route {
        path: "/apis/{group}",
        whom: Whom::Known,
        methods: &["get"],
        handlers: || axum::routing::get(discovery::group),
    },
    Route {
        path: "/apis/{group}/{version}",
        whom: Whom::Known,
        methods: &["get"],
        handlers: || axum::routing::get(discovery::group_resources),
    },
    Route {
        path: "/openapi/v2",
        whom: Whom::Known,
        methods: &["get"],
        handlers: || axum::routing::get(schemas::v2),
    },
    Route {
        path: "/openapi/v3",
        whom: Whom::Known,
        methods: &["get"],
        handlers: || axum::routing::get(schemas::v3),
    },
    Route {
        path: "/openapi/v3/api/v1",
        whom: Whom::Known,
        methods: &["get"],
        handlers: || axum::routing::get(schemas::v3_core),
    },
    Route {
        path: "/openapi/v3/apis/{group}/{version}",
        whom: Whom::Known,
        methods: &["get"],
        handlers: || axum::routing::get(schemas::v3_group),
    },
    Route {
        path: "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews",
        whom: Whom::Known,
        methods: &["post"],
        handlers: || axum::routing::post(reviews::access),
    },
    Route {
        path: "/apis/authorization.k8s.io/v1/selfsubjectrulesreviews",
        whom: Whom::Known,
        methods: &["post"],
        handlers: || axum::routing::post(reviews::rules),
    },
    Route {
        path: "/apis/authentication.k8s.io/v1/selfsubjectreviews",
        whom: Whom::Known,
        methods: &["post"],
        handlers: || axum::routing::post(reviews::subject),
    },
    Route {
        path: "/apis/bulkhead.dev/v1/{plural}",
        whom: Whom::Roles,
        methods: &["get", "post", "delete"],
        handlers: listed,
    },
    Route {
        path: "/apis/bulkhead.dev/v1/{plural}/{name}",
        whom: Whom::Roles,
        methods: &["get", "put", "patch", "delete"],
        handlers: named,
    },
    Route {
        path: "/apis/bulkhead.dev/v1/namespaces/{namespace}/{plural}",
        whom: Whom::Roles,
        methods: &["get", "post", "delete"],
        handlers: listed,
    },
    Route {
        path: "/apis/bulkhead.dev/v1/namespaces/{namespace}/{plural}/{name}",
        whom: Whom::Roles,
        methods: &["get", "put", "patch", "delete"],
        handlers: named,
    },
    Route {
        path: "/api/v1/{plural}",
        whom: Whom::Roles,
        methods: &["get", "post", "delete"],
        handlers: listed,
    },
    Route {
        path: "/api/v1/{plural}/{name}",
        whom: Whom::Roles,
        methods: &["get", "put", "patch", "delete"],
        handlers: named,
    },
    Route {
        path: "/api/v1/namespaces/{namespace}/{plural}",
        whom: Whom::Roles,
        methods: &["get", "post", "delete"],
        handlers: listed,
    },
    Route {
        path: "/api/v1/namespaces/{namespace}/{plural}/{name}",
        whom: Whom::Roles,
        methods: &["get", "put", "patch", "delete"],
        handlers: named,
    },
    Route {
        path: "/apis/{group}/{version}/{plural}",
        whom: Whom::Roles,
        methods: &["get", "post", "delete"],
        handlers: listed,
    },
    Route {
        path: "/apis/{group}/{version}/{plural}/{name}",
        whom: Whom::Roles,
        methods: &["get", "put", "patch", "delete"],
        handlers: named,
    },
    Route {
        path: "/apis/{group}/{version}/namespaces/{namespace}/{plural}",
        whom: Whom::Roles,
        methods: &["get", "post", "delete"],
        handlers: listed,
    },
    Route {
        path: "/apis/{group}/{version}/namespaces/{namespace}/{plural}/{name}",
        whom: Whom::Roles,
        methods: &["get", "put", "patch", "delete"],
        handlers: named,
    },
];

/// The document that describes the API.
pub(crate) const OPENAPI: &str = include_str!("../openapi.json");

pub(super) fn router(context: Arc<Context>) -> Router {
    let mut router = Router::new();
    for route in ROUTES {
        router = router.route(route.path, (route.handlers)());
    }
    router
        .fallback(no_such_path)
        .method_not_allowed_fallback(no_such_method)
        .layer(middleware::from_fn_with_state(Arc::clone(&context), gate::admit))
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .layer(middleware::from_fn_with_state(Arc::clone(&context), watched))
        .with_state(context)
}

async fn no_such_path(request: Request) -> Refusal {
    let message = format!("there is nothing at {}", request.uri().path());
    Refusal::new(StatusCode::NOT_FOUND, "NotFound", message)
}

async fn no_such_method(method: Method) -> Refusal {
    let message = format!("{method} is not possible here");
    Refusal::new(StatusCode::METHOD_NOT_ALLOWED, "MethodNotAllowed", message)
}

/// Limits the time of requests and counts them.
async fn watched(State(context): Shared, request: Request, next: Next) -> Response {
    context.metrics.requests.add(1);
    let span = tracing::debug_span!("request", method = %request.method(), path = request.uri().path(), status = Empty);
    let answering = tokio::time::timeout(REQUEST_TIME_MAX, next.run(request)).instrument(span.clone());
    let response = match answering.await {
        Ok(response) => response,
        Err(_elapsed) => {
            let message = format!("not done within {} seconds", REQUEST_TIME_MAX.as_secs());
            Refusal::new(StatusCode::GATEWAY_TIMEOUT, "Timeout", message).into_response()
        }
    };
    span.record("status", response.status().as_u16());
    if response.status().is_server_error() {
        context.metrics.requests_failed.add(1);
    }
    response
}

#[cfg(test)]
mod tests;
