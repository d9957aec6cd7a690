//! Connections that are through their handshake, as the two servers want them.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context as Poller, Poll};
use std::time::Duration;
use std::{fs, io};

use bulkhead_identity::door::{Door, Limits};
use bulkhead_identity::tls::{self, Incoming, Peer};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream, UnixListener};
use tokio::sync::mpsc;
use tokio::time::Sleep;
use tokio_rustls::server::TlsStream;
use tonic::transport::server::Connected;

use super::trust::{Trust, TrustError};

/// What agents speak inside TLS.
const AGENTS_PROTOCOL: &str = "h2";
/// What operators speak.
const OPERATORS_PROTOCOL: &str = "http/1.1";

/// Longest that a connection to the agents' port without a certificate may last: all that it is good for is to join.
const STRANGER_TIME_MAX: Duration = Duration::from_secs(30);
/// Connections of operators: most programs show a token instead of a certificate, and may all be behind one address.
const OPERATORS: Limits =
    Limits { known: 4096, per_holder: 1024, strangers: 4096, strangers_per_address: 1024 };

/// An agent's connection.
#[derive(Debug)]
pub(crate) struct AgentConnection {
    stream: TlsStream<TcpStream>,
    peer: Arc<Peer>,
    /// When it is ended, if it is a stranger's.
    ends: Option<Pin<Box<Sleep>>>,
}

impl From<Incoming> for AgentConnection {
    fn from((stream, peer): Incoming) -> Self {
        let ends = peer.holder.is_none().then(|| Box::pin(tokio::time::sleep(STRANGER_TIME_MAX)));
        Self { stream, peer: Arc::new(peer), ends }
    }
}

impl Connected for AgentConnection {
    type ConnectInfo = Arc<Peer>;

    fn connect_info(&self) -> Arc<Peer> {
        Arc::clone(&self.peer)
    }
}

impl AsyncRead for AgentConnection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        poller: &mut Poller<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.ends.as_mut().is_some_and(|ends| ends.as_mut().poll(poller).is_ready()) {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        Pin::new(&mut self.stream).poll_read(poller, buffer)
    }
}

impl AsyncWrite for AgentConnection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        poller: &mut Poller<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(poller, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, poller: &mut Poller<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(poller)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, poller: &mut Poller<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(poller)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        poller: &mut Poller<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(poller, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

/// Connections from now on, and who is at the door.
pub(crate) type Entrance = (mpsc::Receiver<Incoming>, Arc<Door>);

/// Agents' connections.
pub(crate) fn agents(listener: TcpListener, trust: &Trust) -> Result<Entrance, TrustError> {
    let config = tls::server_config(&trust.server, &trust.authorities, AGENTS_PROTOCOL)?;
    Ok(tls::listen_within(listener, config, "agents", Limits::default()))
}

/// Operators' connections.
pub(crate) fn operators(listener: TcpListener, trust: &Trust) -> Result<Entrance, TrustError> {
    let config = tls::server_config(&trust.server, &trust.authorities, OPERATORS_PROTOCOL)?;
    Ok(tls::listen_within(listener, config, "operators", OPERATORS))
}

/// Listens on a Unix socket. Everybody on this machine may connect, and is known by the kernel's word.
pub(crate) fn unix_listener(path: &Path) -> io::Result<UnixListener> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    // One that nobody listens on any more is in the way.
    if std::os::unix::net::UnixStream::connect(path).is_ok() {
        return Err(io::Error::new(io::ErrorKind::AddrInUse, "another controller listens there"));
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o666))?;
    Ok(listener)
}
