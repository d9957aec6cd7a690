//! Datagrams from one workload to another all the time, and when each was sent and arrived.

use std::net::{Ipv4Addr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::anyhow;

use crate::netns::Namespace;

const PORT: u16 = 7003;
/// Between two datagrams; the resolution of the measurement. The sleep itself adds some 50 µs.
const INTERVAL: Duration = Duration::from_micros(100);
/// How long an arrival may take; what is younger is not judged yet.
const FLIGHT_TIME_MAX: Duration = Duration::from_millis(5);

/// Datagrams that must agree.
const PROOF_LEN: usize = 10;

/// When each datagram was sent, and when it arrived; its number is its place.
type Log = Arc<Mutex<Vec<(Instant, Option<Instant>)>>>;

/// The running probe.
#[derive(Debug, Clone)]
pub(super) struct Probe {
    log: Log,
    _running: Arc<Running>,
}

#[derive(Debug)]
struct Running {
    stop: Arc<AtomicBool>,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

impl Probe {
    /// Starts to send from one namespace to 10.0.2.2 in the other.
    pub(super) fn start(from: &Namespace, to: &Namespace) -> anyhow::Result<Self> {
        let (log, stop): (Log, Arc<AtomicBool>) = (Arc::default(), Arc::default());
        let (receiver_log, receiver_stop) = (Arc::clone(&log), Arc::clone(&stop));
        to.exec(move || -> std::io::Result<()> {
            let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, PORT))?;
            socket.set_read_timeout(Some(Duration::from_millis(100)))?;
            let receive = move || receive(&socket, &receiver_log, &receiver_stop);
            std::thread::Builder::new().name("probed".into()).spawn(receive).map(drop)
        })??;
        let (sender_log, sender_stop) = (Arc::clone(&log), Arc::clone(&stop));
        from.exec(move || -> std::io::Result<()> {
            let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
            socket.connect((Ipv4Addr::new(10, 0, 2, 2), PORT))?;
            let send = move || send(&socket, &sender_log, &sender_stop);
            std::thread::Builder::new().name("prober".into()).spawn(send).map(drop)
        })??;
        Ok(Self { log, _running: Arc::new(Running { stop }) })
    }

    /// Whether all datagrams arrive now, or none; neither if some do.
    pub(super) fn passes(&self) -> anyhow::Result<Option<bool>> {
        let from = Instant::now();
        std::thread::sleep(4 * FLIGHT_TIME_MAX);
        let log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        let judged = log.iter().filter(|(sent, _)| *sent > from && sent.elapsed() > FLIGHT_TIME_MAX);
        let arrived: Vec<bool> = judged.map(|(_, arrived)| arrived.is_some()).collect();
        let first = *arrived.first().ok_or_else(|| anyhow!("no datagram was sent"))?;
        Ok(arrived.iter().all(|arrived| *arrived == first).then_some(first))
    }

    /// When the verdict became the one that is given and stayed so, among datagrams sent since `from`: the
    /// arrival of the first that passed, or the sending of the first that did not.
    pub(super) fn flipped(&self, from: Instant, open: bool) -> anyhow::Result<Option<Instant>> {
        let log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        let since = log.get(log.partition_point(|(sent, _)| *sent < from)..).unwrap_or_default();
        let judged = since.partition_point(|(sent, _)| sent.elapsed() > FLIGHT_TIME_MAX);
        let since = &since[..judged];
        if since.is_empty() {
            return Err(anyhow!("no datagram was sent"));
        }
        let last_other = since.iter().rposition(|(_, arrived)| arrived.is_some() != open);
        let flipped = since.get(last_other.map_or(0, |last| last + 1)..).unwrap_or_default();
        // One lost datagram is no verdict.
        let first = flipped.first().filter(|_| flipped.len() >= PROOF_LEN);
        Ok(first.map(|(sent, arrived)| arrived.unwrap_or(*sent)))
    }
}

fn send(socket: &UdpSocket, log: &Log, stop: &AtomicBool) {
    while !stop.load(Ordering::Relaxed) {
        let number = {
            let mut log = log.lock().unwrap_or_else(PoisonError::into_inner);
            log.push((Instant::now(), None));
            log.len() as u64 - 1
        };
        // What is refused on the way is what is looked for.
        let _ = socket.send(&number.to_be_bytes());
        std::thread::sleep(INTERVAL);
    }
}

fn receive(socket: &UdpSocket, log: &Log, stop: &AtomicBool) {
    let mut bytes = [0; 8];
    while !stop.load(Ordering::Relaxed) {
        if !matches!(socket.recv(&mut bytes), Ok(8)) {
            continue;
        }
        let arrived = Instant::now();
        let Ok(number) = usize::try_from(u64::from_be_bytes(bytes)) else { continue };
        let mut log = log.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(entry) = log.get_mut(number) {
            entry.1 = Some(arrived);
        }
    }
}
