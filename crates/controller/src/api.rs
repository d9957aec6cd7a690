//! The API for operators: REST in the manner of Kubernetes, on one listener.
//!
//! [`ROUTES`] is the one table of what there is; the router is built from it, and a test holds
//! `openapi.json` against it. A request has [`REQUEST_TIME_MAX`] for its head and body and our answer's head;
//! streams then last until the client or the controller leaves.

mod apply;
mod backup;
mod confirmations;
mod explain;
mod flows;
mod input;
mod objects;
mod problem;
mod status;
mod stream;
mod watch;

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::connect_info::Connected;
use axum::extract::{ConnectInfo, DefaultBodyLimit, Request, State};
use axum::http::{Method, StatusCode};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::MethodRouter;
use axum::serve::IncomingStream;
use tokio::net::TcpListener;
use tokio::sync::watch::Receiver;

use crate::context::{Context, stopped};
use crate::guard::Ends;

use problem::Refusal;

/// Largest body of a request.
pub(crate) const BODY_BYTES_MAX: usize = 16 << 20;
/// Longest that a request may take to be read and answered (streams: to begin).
const REQUEST_TIME_MAX: Duration = Duration::from_secs(30);

/// What handlers share.
pub(crate) type Shared = State<Arc<Context>>;
type Methods = MethodRouter<Arc<Context>, Infallible>;

/// The connection that a request comes by.
pub(crate) type Session = ConnectInfo<Ends>;

impl Connected<IncomingStream<'_, TcpListener>> for Ends {
    fn connect_info(stream: IncomingStream<'_, TcpListener>) -> Self {
        let remote = *stream.remote_addr();
        // A socket that has just been accepted has an address.
        let local = stream.io().local_addr().unwrap_or(remote);
        Self { remote, local }
    }
}

/// Finishes a change though its client leaves: it may be the change that cuts it off.
async fn to_the_end<T: Send + 'static>(work: impl Future<Output = T> + Send + 'static) -> Result<T, Refusal> {
    tokio::spawn(work).await.map_err(|error| {
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
    handlers: fn() -> Methods,
}

/// Everything that is served.
pub(crate) const ROUTES: &[Route] = &[
    Route { path: "/healthz", methods: &["get"], handlers: || axum::routing::get(status::healthz) },
    Route { path: "/readyz", methods: &["get"], handlers: || axum::routing::get(status::readyz) },
    Route { path: "/metrics", methods: &["get"], handlers: || axum::routing::get(status::metrics) },
    Route { path: "/openapi.json", methods: &["get"], handlers: || axum::routing::get(status::openapi) },
    Route {
        path: "/apis/bulkhead.dev/v1/status",
        methods: &["get"],
        handlers: || axum::routing::get(status::status),
    },
    Route {
        path: "/apis/bulkhead.dev/v1/backup",
        methods: &["get"],
        handlers: || axum::routing::get(backup::backup),
    },
    Route {
        path: "/apis/bulkhead.dev/v1/apply",
        methods: &["post"],
        handlers: || axum::routing::post(apply::apply),
    },
    Route {
        path: "/apis/bulkhead.dev/v1/delete",
        methods: &["post"],
        handlers: || axum::routing::post(apply::delete),
    },
    Route {
        path: "/apis/bulkhead.dev/v1/confirmations",
        methods: &["get"],
        handlers: || axum::routing::get(confirmations::list),
    },
    Route {
        path: "/apis/bulkhead.dev/v1/confirmations/{id}/confirm",
        methods: &["post"],
        handlers: || axum::routing::post(confirmations::confirm),
    },
    Route {
        path: "/apis/bulkhead.dev/v1/confirmations/{id}/rollback",
        methods: &["post"],
        handlers: || axum::routing::post(confirmations::roll_back),
    },
    Route {
        path: "/apis/bulkhead.dev/v1/explain",
        methods: &["get"],
        handlers: || axum::routing::get(explain::explain),
    },
    Route {
        path: "/apis/bulkhead.dev/v1/flows",
        methods: &["get"],
        handlers: || axum::routing::get(flows::flows),
    },
    Route {
        path: "/apis/bulkhead.dev/v1/{plural}",
        methods: &["get", "post"],
        handlers: || axum::routing::get(objects::list).post(objects::create),
    },
    Route {
        path: "/apis/bulkhead.dev/v1/{plural}/{name}",
        methods: &["get", "put", "delete"],
        handlers: || axum::routing::get(objects::get).put(objects::replace).delete(objects::delete),
    },
    Route {
        path: "/apis/bulkhead.dev/v1/namespaces/{namespace}/{plural}",
        methods: &["get", "post"],
        handlers: || axum::routing::get(objects::list).post(objects::create),
    },
    Route {
        path: "/apis/bulkhead.dev/v1/namespaces/{namespace}/{plural}/{name}",
        methods: &["get", "put", "delete"],
        handlers: || axum::routing::get(objects::get).put(objects::replace).delete(objects::delete),
    },
];

/// The document that describes the API.
pub(crate) const OPENAPI: &str = include_str!("../openapi.json");

fn router(context: Arc<Context>) -> Router {
    let mut router = Router::new();
    for route in ROUTES {
        router = router.route(route.path, (route.handlers)());
    }
    router
        .fallback(no_such_path)
        .method_not_allowed_fallback(no_such_method)
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
    let response = match tokio::time::timeout(REQUEST_TIME_MAX, next.run(request)).await {
        Ok(response) => response,
        Err(_elapsed) => {
            let message = format!("not done within {} seconds", REQUEST_TIME_MAX.as_secs());
            Refusal::new(StatusCode::GATEWAY_TIMEOUT, "Timeout", message).into_response()
        }
    };
    if response.status().is_server_error() {
        context.metrics.requests_failed.add(1);
    }
    response
}

/// Serves until `shutdown`, and then until all requests are answered.
pub(crate) async fn serve(
    listener: TcpListener,
    context: Arc<Context>,
    mut shutdown: Receiver<bool>,
) -> std::io::Result<()> {
    let stop = async move { stopped(&mut shutdown).await };
    let service = router(context).into_make_service_with_connect_info::<Ends>();
    axum::serve(listener, service).with_graceful_shutdown(stop).await
}

#[cfg(test)]
mod tests;
