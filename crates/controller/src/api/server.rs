//! Connections to the API: over TLS and on the Unix socket, each with who is at its other end.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::Request;
use axum::response::Response;
use bulkhead_identity::tls::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::UnixListener;
use tokio::sync::watch::Receiver;
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;
use tower::ServiceExt;

use crate::access::Caller;
use crate::context::{Context, stopped};
use crate::guard::Ends;

/// Longest that the head of a request may take, and that a connection may be idle between two.
const HEAD_TIME_MAX: Duration = Duration::from_secs(30);
/// Most connections at once; more wait.
const CONNECTIONS_MAX: usize = 8192;

/// Serves until `shutdown`, and then until all requests are answered.
pub(crate) async fn serve(
    mut over_tls: mpsc::Receiver<Incoming>,
    socket: Option<UnixListener>,
    context: Arc<Context>,
    mut shutdown: Receiver<bool>,
) -> std::io::Result<()> {
    let router = super::router(Arc::clone(&context));
    let own_uid = rustix::process::geteuid().as_raw();
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let mut connections = JoinSet::new();
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return Ok(()) };
        let router = router.clone();
        let stop = shutdown.clone();
        tokio::select! {
            Some((stream, peer)) = over_tls.recv() => {
                let ends = Ends { remote: peer.remote, local: peer.local };
                let caller = Caller::over_tls(peer.holder.clone(), ends);
                connections.spawn(async move {
                    converse(stream, caller, router, stop).await;
                    drop((place, peer));
                });
            }
            accepted = accept(socket.as_ref()) => {
                let Ok((stream, uid)) = accepted else {
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                };
                let caller = Caller::local(uid, own_uid);
                connections.spawn(async move {
                    converse(stream, caller, router, stop).await;
                    drop(place);
                });
            }
            Some(_ended) = connections.join_next(), if !connections.is_empty() => {}
            () = stopped(&mut shutdown) => break,
        }
    }
    drop(over_tls);
    while connections.join_next().await.is_some() {}
    Ok(())
}

/// The next connection to the socket, with its user; never, if there is no socket.
async fn accept(socket: Option<&UnixListener>) -> std::io::Result<(tokio::net::UnixStream, u32)> {
    let Some(socket) = socket else { return std::future::pending().await };
    let (stream, _) = socket.accept().await?;
    let uid = stream.peer_cred()?.uid();
    Ok((stream, uid))
}

async fn converse<IO>(io: IO, caller: Caller, router: Router, mut shutdown: Receiver<bool>)
where
    IO: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let service = service_fn(move |request: hyper::Request<hyper::body::Incoming>| {
        let mut request: Request = request.map(Body::new);
        request.extensions_mut().insert(caller.clone());
        let router = router.clone();
        async move { answer(router, request).await }
    });
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIME_MAX)
        .serve_connection(TokioIo::new(io), service);
    tokio::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = stopped(&mut shutdown) => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "a connection to the API broke off");
    }
}

async fn answer(router: Router, request: Request) -> Result<Response, Infallible> {
    router.oneshot(request).await
}
