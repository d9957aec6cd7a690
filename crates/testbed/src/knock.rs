//! Connections that are tried again and again, and must not come about.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::namespace::enter;
use crate::probe::{Outcome, Probe, Protocol, probe_here};
use crate::workload::Workload;

/// Connections tried at once, and how long each has for its answer.
const AT_ONCE: usize = 4;
const WAIT: Duration = Duration::from_millis(20);

/// Tries to connect, from one workload to a port of another where nobody listens: the kernel there answers every SYN
/// with a reset, and counts them, so that none can arrive unseen, even if its answer is lost.
#[derive(Debug)]
pub struct Knocks {
    stop: Arc<AtomicBool>,
    tried: Arc<AtomicU64>,
    answered: Arc<AtomicU64>,
    resets_before: u64,
    thread: Option<JoinHandle<()>>,
}

/// What became of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KnockReport {
    /// Connections tried.
    pub tried: u64,
    /// How many were answered, in any way.
    pub answered: u64,
    /// How many resets the other side has sent: SYNs that arrived there.
    pub arrived: u64,
}

impl Knocks {
    /// Begins.
    ///
    /// # Errors
    /// If the other namespace is gone.
    pub fn start(from: &Workload, to: &Workload, port: u16) -> Result<Self> {
        let resets_before = resets(to)?;
        let [tried, answered] = [(); 2].map(|()| Arc::new(AtomicU64::new(0)));
        let stop = Arc::new(AtomicBool::new(false));
        let (stopping, trying, answering) = (Arc::clone(&stop), Arc::clone(&tried), Arc::clone(&answered));
        let (path, target) = (from.netns.path(), SocketAddr::new(to.v4.into(), port));
        let thread = std::thread::spawn(move || knock(&path, target, &stopping, &trying, &answering));
        Ok(Self { stop, tried, answered, resets_before, thread: Some(thread) })
    }

    /// Connections tried so far.
    pub fn tried(&self) -> u64 {
        self.tried.load(Relaxed)
    }

    /// Ends it, and counts. Whoever else the other workload has reset since the beginning counts as arrived.
    ///
    /// # Errors
    /// If the other namespace is gone.
    pub fn finish(mut self, to: &Workload) -> Result<KnockReport> {
        self.stop.store(true, Relaxed);
        if let Some(thread) = self.thread.take() {
            let _panicked = thread.join();
        }
        let arrived = resets(to)? - self.resets_before;
        Ok(KnockReport { tried: self.tried(), answered: self.answered.load(Relaxed), arrived })
    }
}

impl Drop for Knocks {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
        if let Some(thread) = self.thread.take() {
            let _panicked = thread.join();
        }
    }
}

fn knock(namespace: &Path, to: SocketAddr, stop: &AtomicBool, tried: &AtomicU64, answered: &AtomicU64) {
    // Without a namespace nothing is tried, which every caller's figures show.
    if enter(namespace).is_err() {
        return;
    }
    let probe = Probe { address: to.ip(), protocol: Protocol::Tcp(to.port()) };
    while !stop.load(Relaxed) {
        let Ok(outcomes) = probe_here(&[probe; AT_ONCE], WAIT) else { return };
        for outcome in outcomes {
            match outcome {
                Outcome::Reached | Outcome::Refused => {
                    answered.fetch_add(1, Relaxed);
                    tried.fetch_add(1, Relaxed);
                }
                Outcome::Silent => {
                    tried.fetch_add(1, Relaxed);
                }
                // No interface yet: nothing was sent.
                Outcome::Failed(_) => std::thread::sleep(Duration::from_millis(1)),
            }
        }
    }
}

/// `OutRsts` of `Tcp` in `/proc/net/snmp`.
fn resets(of: &Workload) -> Result<u64> {
    of.netns.run(|| {
        let text = std::fs::read_to_string("/proc/thread-self/net/snmp")?;
        let mut lines = text.lines().filter_map(|line| line.strip_prefix("Tcp: "));
        let (names, values) = (lines.next().unwrap_or_default(), lines.next().unwrap_or_default());
        let found = names.split(' ').zip(values.split(' ')).find(|(name, _)| *name == "OutRsts");
        found.and_then(|(_, value)| value.parse().ok()).context("/proc/net/snmp has no OutRsts")
    })
}
