//! Continuous traffic that knows exactly what it sent and what came.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use rustix::net::sockopt::set_socket_recv_buffer_size_force;

use crate::namespace::enter;
use crate::workload::Workload;

/// Datagrams that a receiver can be late for without losing one.
const RECEIVE_BUFFER: usize = 64 << 20;
/// How long what is on its way may take to arrive once nothing is sent any more.
const SETTLE_TIME: Duration = Duration::from_secs(2);
/// A receiver looks this often whether it is to stop.
const READ_TIMEOUT: Duration = Duration::from_millis(20);
/// A ping-pong that hears nothing this long has stalled.
const STALL_TIME: Duration = Duration::from_millis(500);

#[derive(Debug, Default)]
struct Shared {
    stop: AtomicBool,
    sent: AtomicU64,
    refused: AtomicU64,
    received: AtomicU64,
    duplicates: AtomicU64,
    longest_gap_us: AtomicU64,
}

/// Datagrams with sequence numbers from one workload to another at a fixed rate.
#[derive(Debug)]
pub struct UdpStream {
    shared: Arc<Shared>,
    stop_receiver: Arc<AtomicBool>,
    sender: Option<JoinHandle<()>>,
    receiver: Option<JoinHandle<()>>,
}

/// What became of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UdpReport {
    /// Datagrams that the sender's kernel took.
    pub sent: u64,
    /// Different ones that arrived.
    pub received: u64,
    /// Times that the sender's kernel said no (an interface that is not there yet).
    pub refused: u64,
    /// Longest time between two arrivals.
    pub longest_gap: Duration,
}

impl UdpReport {
    /// Sent and never seen.
    pub fn lost(&self) -> u64 {
        self.sent - self.received
    }
}

impl UdpStream {
    /// Begins to send `rate` datagrams a second to `port`, from changing source ports if `ports` is greater
    /// than one. The receiver listens before the first is sent.
    ///
    /// # Errors
    /// If a namespace is gone or the port is taken.
    pub fn start(
        from: &Workload,
        to: &Workload,
        address: IpAddr,
        port: u16,
        rate: u32,
        ports: usize,
    ) -> Result<Self> {
        Self::start_from(from, to, SocketAddr::new(address, port), rate, vec![0; ports.max(1)])
    }

    /// As [`UdpStream::start`], from these source ports in turn; 0 is any that is free.
    ///
    /// # Errors
    /// If a namespace is gone or the receiver's port is taken.
    pub fn start_from(
        from: &Workload,
        to: &Workload,
        target: SocketAddr,
        rate: u32,
        sources: Vec<u16>,
    ) -> Result<Self> {
        let (address, port) = (target.ip(), target.port());
        let socket = to.netns.run(|| {
            // Any address: the one that is meant may not be there yet.
            let socket =
                UdpSocket::bind((unspecified(address), port)).with_context(|| format!("udp port {port}"))?;
            set_socket_recv_buffer_size_force(&socket, RECEIVE_BUFFER)?;
            socket.set_read_timeout(Some(READ_TIMEOUT))?;
            Ok(socket)
        })?;
        let shared = Arc::new(Shared::default());
        let stop_receiver = Arc::new(AtomicBool::new(false));
        let receiver = {
            let (shared, stop) = (Arc::clone(&shared), Arc::clone(&stop_receiver));
            std::thread::spawn(move || receive(&socket, &shared, &stop))
        };
        let sender = {
            let (shared, path) = (Arc::clone(&shared), from.netns.path());
            std::thread::spawn(move || send(&path, target, rate, &sources, &shared))
        };
        Ok(Self { shared, stop_receiver, sender: Some(sender), receiver: Some(receiver) })
    }

    /// Counts so far; what is on its way counts as lost.
    pub fn so_far(&self) -> UdpReport {
        let received = self.shared.received.load(Relaxed);
        UdpReport {
            sent: self.shared.sent.load(Relaxed).max(received),
            received,
            refused: self.shared.refused.load(Relaxed),
            longest_gap: Duration::from_micros(self.shared.longest_gap_us.load(Relaxed)),
        }
    }

    /// Stops sending, waits for what is on its way, and counts.
    pub fn finish(mut self) -> UdpReport {
        self.shared.stop.store(true, Relaxed);
        join(&mut self.sender);
        let deadline = Instant::now() + SETTLE_TIME;
        let mut last = u64::MAX;
        // Done when everything has come, or when nothing has come for a while.
        while self.so_far().lost() > 0 && Instant::now() < deadline && last != self.so_far().received {
            last = self.so_far().received;
            std::thread::sleep(READ_TIMEOUT * 5);
        }
        self.so_far()
    }
}

impl Drop for UdpStream {
    fn drop(&mut self) {
        self.shared.stop.store(true, Relaxed);
        self.stop_receiver.store(true, Relaxed);
        join(&mut self.sender);
        join(&mut self.receiver);
    }
}

fn join(thread: &mut Option<JoinHandle<()>>) {
    if let Some(thread) = thread.take() {
        let _panicked = thread.join();
    }
}

fn unspecified(address: IpAddr) -> IpAddr {
    if address.is_ipv4() { [0u8; 4].into() } else { [0u16; 8].into() }
}

fn receive(socket: &UdpSocket, shared: &Shared, stop: &AtomicBool) {
    let mut buffer = [0u8; 64];
    // One bit per sequence number: nothing may be counted twice.
    let mut seen: Vec<u64> = Vec::new();
    let mut last: Option<Instant> = None;
    while !stop.load(Relaxed) {
        let Ok(length) = socket.recv(&mut buffer) else { continue };
        let Some(number) = buffer[..length].first_chunk::<8>().map(|bytes| u64::from_be_bytes(*bytes)) else {
            continue;
        };
        let now = Instant::now();
        if let Some(last) = last {
            let gap = u64::try_from((now - last).as_micros()).unwrap_or(u64::MAX);
            shared.longest_gap_us.fetch_max(gap, Relaxed);
        }
        last = Some(now);
        let (word, bit) = (usize::try_from(number / 64).unwrap_or(usize::MAX), number % 64);
        if word >= 1 << 20 {
            continue;
        }
        if seen.len() <= word {
            seen.resize(word + 1, 0);
        }
        if seen[word] >> bit & 1 == 1 {
            shared.duplicates.fetch_add(1, Relaxed);
        } else {
            seen[word] |= 1 << bit;
            shared.received.fetch_add(1, Relaxed);
        }
    }
}

fn send(namespace: &std::path::Path, to: SocketAddr, rate: u32, sources: &[u16], shared: &Shared) {
    let any = unspecified(to.ip());
    let open = || -> Result<Vec<UdpSocket>> {
        enter(namespace)?;
        sources.iter().map(|source| UdpSocket::bind((any, *source)).map_err(Into::into)).collect()
    };
    // Without sockets nothing is sent, which every caller's figures show.
    let Ok(sockets) = open() else { return };
    let interval = Duration::from_secs(1) / rate.max(1);
    let mut number = 0u64;
    let mut due = Instant::now();
    for socket in sockets.iter().cycle() {
        if shared.stop.load(Relaxed) {
            return;
        }
        match socket.send_to(&number.to_be_bytes(), to) {
            Ok(_) => {
                shared.sent.fetch_add(1, Relaxed);
                number += 1;
            }
            Err(_) => {
                shared.refused.fetch_add(1, Relaxed);
            }
        }
        due += interval;
        let now = Instant::now();
        if due > now {
            std::thread::sleep(due - now);
        } else if now - due > Duration::from_millis(50) {
            // A machine that was busy is not made up for with a burst.
            due = now;
        }
    }
}

/// One connection on which a numbered message goes out as soon as the last came back.
#[derive(Debug)]
pub struct PingPong {
    stop: Arc<AtomicBool>,
    count: Arc<AtomicU64>,
    last: Arc<Mutex<Instant>>,
    thread: Option<JoinHandle<Result<()>>>,
}

/// How it went.
#[derive(Debug)]
pub struct PingPongReport {
    /// Round trips.
    pub round_trips: u64,
    /// When the last answer came.
    pub last_answer: Instant,
    /// Why it ended, if not because it was told to.
    pub broken: Option<String>,
}

impl PingPong {
    /// Connects and begins.
    ///
    /// # Errors
    /// If the connection cannot be opened.
    pub fn start(from: &Workload, to: SocketAddr) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let count = Arc::new(AtomicU64::new(0));
        let last = Arc::new(Mutex::new(Instant::now()));
        let stream = connect(from.netns.path(), to)?;
        let (stopping, counting, touched) = (Arc::clone(&stop), Arc::clone(&count), Arc::clone(&last));
        let thread = std::thread::spawn(move || exchange(stream, &stopping, &counting, &touched));
        Ok(Self { stop, count, last, thread: Some(thread) })
    }

    /// Round trips so far.
    pub fn round_trips(&self) -> u64 {
        self.count.load(Relaxed)
    }

    /// Whether no answer has come for [`STALL_TIME`].
    pub fn has_stalled(&self) -> bool {
        self.last_answer().elapsed() >= STALL_TIME
    }

    /// When the last answer came.
    pub fn last_answer(&self) -> Instant {
        self.last.lock().map_or_else(|poisoned| *poisoned.into_inner(), |last| *last)
    }

    /// Ends it and says how it went.
    pub fn finish(mut self) -> PingPongReport {
        self.stop.store(true, Relaxed);
        let ended = self.thread.take().map(JoinHandle::join);
        let broken = match ended {
            Some(Ok(Err(error))) => Some(format!("{error:#}")),
            Some(Err(_)) => Some("the thread panicked".into()),
            Some(Ok(Ok(()))) | None => None,
        };
        PingPongReport { round_trips: self.round_trips(), last_answer: self.last_answer(), broken }
    }
}

impl Drop for PingPong {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
        if let Some(thread) = self.thread.take() {
            let _panicked = thread.join();
        }
    }
}

fn connect(namespace: PathBuf, to: SocketAddr) -> Result<TcpStream> {
    let thread = std::thread::spawn(move || -> Result<TcpStream> {
        enter(&namespace)?;
        let stream = TcpStream::connect_timeout(&to, Duration::from_secs(3))
            .with_context(|| format!("cannot connect to {to}"))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(READ_TIMEOUT))?;
        Ok(stream)
    });
    thread.join().unwrap_or_else(|_| Err(anyhow!("a connecting thread panicked")))
}

fn exchange(
    mut stream: TcpStream,
    stop: &AtomicBool,
    count: &AtomicU64,
    last: &Mutex<Instant>,
) -> Result<()> {
    let mut number = 0u64;
    while !stop.load(Relaxed) {
        stream.write_all(&number.to_be_bytes())?;
        let mut answer = [0u8; 8];
        let mut have = 0;
        while have < answer.len() {
            match stream.read(&mut answer[have..]) {
                Ok(0) => return Err(anyhow!("closed by the other side")),
                Ok(length) => have += length,
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                    if stop.load(Relaxed) {
                        return Err(anyhow!("no answer to message {number}"));
                    }
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        if u64::from_be_bytes(answer) != number {
            return Err(anyhow!("message {number} came back as {}", u64::from_be_bytes(answer)));
        }
        number += 1;
        count.store(number, Relaxed);
        if let Ok(mut last) = last.lock() {
            *last = Instant::now();
        }
        // Some thousand a second: a connection, not a load test.
        std::thread::sleep(Duration::from_micros(300));
    }
    Ok(())
}
