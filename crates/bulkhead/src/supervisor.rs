//! What systemd hears of a daemon: that it is ready, that it lives, that it stops (sd_notify(3)).

use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::atomic::{AtomicBool, Ordering};

/// Says something to whoever supervises this process, if anybody does.
pub(crate) fn tell(state: &str) {
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else { return };
    let path = path.to_string_lossy().into_owned();
    let address = match path.strip_prefix('@') {
        Some(name) => SocketAddr::from_abstract_name(name),
        None => SocketAddr::from_pathname(&path),
    };
    let sent = address
        .and_then(|address| UnixDatagram::unbound()?.send_to_addr(state.as_bytes(), &address).map(drop));
    if let Err(error) = sent {
        tracing::warn!(%error, state, "the supervisor cannot be told");
    }
}

/// The first time that the daemon is ready, from then on that it lives.
pub(crate) fn beat() {
    static READY: AtomicBool = AtomicBool::new(false);
    tell(if READY.swap(true, Ordering::Relaxed) { "WATCHDOG=1" } else { "READY=1" });
}
