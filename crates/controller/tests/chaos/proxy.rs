//! A way to a server that can be cut, in both directions or in one.

use std::net::SocketAddr;
use std::sync::Arc;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// Which bytes arrive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Open {
    pub(crate) there: bool,
    pub(crate) back: bool,
}

pub(crate) const OPEN: Open = Open { there: true, back: true };
/// As when a switch is off: nobody hears that a connection has ended.
pub(crate) const CUT: Open = Open { there: false, back: false };
/// Requests arrive, answers do not.
pub(crate) const DEAF: Open = Open { there: true, back: false };

pub(crate) struct Proxy {
    pub(crate) address: SocketAddr,
    open: Arc<watch::Sender<Open>>,
}

impl Proxy {
    pub(crate) async fn to(server: String) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let open = Arc::new(watch::Sender::new(OPEN));
        let ways = Arc::clone(&open);
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let (server, ways) = (server.clone(), Arc::clone(&ways));
                tokio::spawn(async move {
                    let Ok(server) = TcpStream::connect(&server).await else { return };
                    let ((from_client, to_client), (from_server, to_server)) =
                        (client.into_split(), server.into_split());
                    tokio::select! {
                        () = carry(from_client, to_server, ways.subscribe(), |open| open.there) => {}
                        () = carry(from_server, to_client, ways.subscribe(), |open| open.back) => {}
                    }
                });
            }
        });
        Self { address, open }
    }

    pub(crate) fn set(&self, open: Open) {
        self.open.send_replace(open);
    }
}

/// What comes while the way is cut waits, as a sender's kernel would send it again.
async fn carry(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    mut open: watch::Receiver<Open>,
    way: fn(&Open) -> bool,
) {
    let mut buffer = vec![0; 64 << 10];
    loop {
        let Ok(length @ 1..) = from.read(&mut buffer).await else { return };
        if open.wait_for(way).await.is_err() || to.write_all(&buffer[..length]).await.is_err() {
            return;
        }
    }
}
