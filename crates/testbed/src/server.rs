//! What runs in a workload: echo over TCP and UDP on some ports, one thread for all of them.

use std::collections::BTreeMap;
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv6Addr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::sockopt::set_socket_recv_buffer_size_force;

use crate::namespace::{Netns, enter};

/// Most connections served at once; further ones wait in the kernel.
const CONNECTIONS_MAX: usize = 512;
/// Room for datagrams, so that only a dataplane can lose them.
const RECEIVE_BUFFER: usize = 8 << 20;

/// An echo server; stops when dropped.
#[derive(Debug)]
pub struct Server {
    stop: Option<UnixStream>,
    thread: Option<JoinHandle<()>>,
    datagrams: BTreeMap<u16, Arc<AtomicU64>>,
    accepted: Arc<AtomicU64>,
}

struct Ports {
    listeners: Vec<TcpListener>,
    datagrams: Vec<(UdpSocket, Arc<AtomicU64>)>,
    connections: Vec<TcpStream>,
    accepted: Arc<AtomicU64>,
}

impl Server {
    /// Serves TCP and UDP on `ports` in a namespace; it listens when this answers.
    ///
    /// # Errors
    /// If the namespace is gone or a port is taken.
    pub fn start(namespace: &Netns, ports: &[u16]) -> Result<Self> {
        Self::start_at(&namespace.path(), ports)
    }

    /// As [`Server::start`], in the namespace that a file stands for.
    ///
    /// # Errors
    /// If the namespace is gone or a port is taken.
    pub fn start_at(namespace: &Path, ports: &[u16]) -> Result<Self> {
        let (stop, stopped) = UnixStream::pair()?;
        let counters: BTreeMap<u16, Arc<AtomicU64>> =
            ports.iter().map(|port| (*port, Arc::default())).collect();
        let accepted = Arc::new(AtomicU64::new(0));
        let (told, listening) = mpsc::channel();
        let (path, count, accepts) = (namespace.to_owned(), counters.clone(), Arc::clone(&accepted));
        let thread = std::thread::spawn(move || {
            let opened = enter(&path).and_then(|()| Ports::open(&count, accepts));
            match opened {
                Ok(mut ports) => {
                    let _ = told.send(Ok(()));
                    // Ends with an error only if poll itself fails: then nobody is answered, and tests see it.
                    let _ = ports.serve(&stopped);
                }
                Err(error) => {
                    let _ = told.send(Err(error));
                }
            }
        });
        listening.recv().context("the server's thread ended")??;
        Ok(Self { stop: Some(stop), thread: Some(thread), datagrams: counters, accepted })
    }

    /// Datagrams received on a port.
    pub fn datagrams(&self, port: u16) -> u64 {
        self.datagrams.get(&port).map_or(0, |count| count.load(Relaxed))
    }

    /// Connections accepted.
    pub fn accepted(&self) -> u64 {
        self.accepted.load(Relaxed)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _panicked = thread.join();
        }
    }
}

impl Ports {
    fn open(ports: &BTreeMap<u16, Arc<AtomicU64>>, accepted: Arc<AtomicU64>) -> Result<Self> {
        let mut opened =
            Self { listeners: Vec::new(), datagrams: Vec::new(), connections: Vec::new(), accepted };
        for (port, count) in ports {
            // Both families: an IPv6 socket takes IPv4 too unless told otherwise.
            let address = (Ipv6Addr::UNSPECIFIED, *port);
            let listener = TcpListener::bind(address).with_context(|| format!("tcp port {port}"))?;
            listener.set_nonblocking(true)?;
            opened.listeners.push(listener);
            let socket = UdpSocket::bind(address).with_context(|| format!("udp port {port}"))?;
            socket.set_nonblocking(true)?;
            set_socket_recv_buffer_size_force(&socket, RECEIVE_BUFFER)?;
            opened.datagrams.push((socket, Arc::clone(count)));
        }
        Ok(opened)
    }

    fn serve(&mut self, stopped: &UnixStream) -> Result<()> {
        loop {
            let mut all = vec![PollFd::from_borrowed_fd(stopped.as_fd(), PollFlags::IN)];
            all.extend(self.listeners.iter().map(|socket| PollFd::new(socket, PollFlags::IN)));
            all.extend(self.datagrams.iter().map(|(socket, _)| PollFd::new(socket, PollFlags::IN)));
            all.extend(self.connections.iter().map(|socket| PollFd::new(socket, PollFlags::IN)));
            poll(&mut all, None)?;
            let ready: Vec<bool> = all.iter().map(|fd| !fd.revents().is_empty()).collect();
            drop(all);
            let mut ready = ready.into_iter();
            if ready.next().unwrap_or(true) {
                return Ok(());
            }
            let listeners: Vec<bool> = ready.by_ref().take(self.listeners.len()).collect();
            for ((socket, count), _) in self.datagrams.iter().zip(ready.by_ref()).filter(|(_, ready)| *ready)
            {
                answer_datagrams(socket, count);
            }
            self.connections.retain_mut(|connection| !ready.next().unwrap_or(false) || echo(connection));
            for (listener, _) in self.listeners.iter().zip(listeners).filter(|(_, ready)| *ready) {
                accept(listener, &mut self.connections, &self.accepted);
            }
        }
    }
}

fn accept(listener: &TcpListener, connections: &mut Vec<TcpStream>, accepted: &AtomicU64) {
    while connections.len() < CONNECTIONS_MAX {
        let Ok((connection, _)) = listener.accept() else { return };
        accepted.fetch_add(1, Relaxed);
        if connection.set_nonblocking(true).is_ok() {
            let _ = connection.set_nodelay(true);
            connections.push(connection);
        }
    }
    // Above the limit a connection whose client was cut off for ever would block new ones: the oldest goes.
    connections.drain(..CONNECTIONS_MAX / 2);
}

fn answer_datagrams(socket: &UdpSocket, count: &AtomicU64) {
    let mut buffer = [0u8; 2048];
    while let Ok((length, from)) = socket.recv_from(&mut buffer) {
        count.fetch_add(1, Relaxed);
        // A full queue towards the client loses the answer, as networks do; streams count requests here.
        let _ = socket.send_to(&buffer[..length], from);
    }
}

/// Sends back what has arrived; false at the end of the connection.
fn echo(connection: &mut TcpStream) -> bool {
    let mut buffer = [0u8; 4096];
    match connection.read(&mut buffer) {
        Ok(0) => false,
        Ok(length) => {
            // Whoever waits for an answer before the next message never fills the queue.
            let _ = connection.set_write_timeout(Some(Duration::from_millis(100)));
            connection.write_all(&buffer[..length]).is_ok()
        }
        Err(error) => matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted),
    }
}
