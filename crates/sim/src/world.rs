//! What all simulated agents share.

use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;

use crate::catalogue::Catalogue;
use crate::fleet::Fleet;
use crate::fleet_identity::FleetIdentity;
use crate::tracker::Tracker;

/// Complaints that are kept.
const COMPLAINTS_MAX: usize = 20;

/// The fleet, and what is counted about it.
#[derive(Debug)]
pub(crate) struct World {
    pub(crate) fleet: Fleet,
    /// Where the controller serves agents, `HOST:PORT`.
    pub(crate) controller: String,
    pub(crate) identity: FleetIdentity,
    pub(crate) catalogue: Catalogue,
    pub(crate) tracker: Tracker,
    /// Agents that know all they asked for, and whose own workloads are stored.
    pub(crate) settled: watch::Sender<usize>,
    /// Starts that the repository has acknowledged.
    pub(crate) activations: AtomicU64,
    /// Times that any agent computed its tables.
    pub(crate) turns: AtomicU64,
    /// Connections that broke because they were told to.
    pub(crate) broken: AtomicU64,
    /// Times that an agent was told to come back later.
    pub(crate) deferred: AtomicU64,
    /// Streams that ended without being told to.
    pub(crate) lost: AtomicU64,
    /// Whether bytes are counted.
    pub(crate) counting: AtomicBool,
    concerned_bytes: AtomicU64,
    concerned_turns: AtomicU64,
    unconcerned_bytes: AtomicU64,
    policy_bytes: AtomicU64,
    begun: Instant,
    last_message_us: AtomicU64,
    complaints: Mutex<Vec<String>>,
}

/// Bytes that agents received while they were counted.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bytes {
    pub(crate) concerned: u64,
    /// Times that an agent heard something that concerned it.
    pub(crate) hearings: u64,
    pub(crate) unconcerned: u64,
    /// Policies told to hosts where they select nobody.
    pub(crate) policies: u64,
}

impl World {
    pub(crate) fn new(fleet: Fleet, controller: String, identity: FleetIdentity) -> Self {
        Self {
            tracker: Tracker::new(fleet.applications),
            fleet,
            controller,
            identity,
            catalogue: Catalogue::default(),
            settled: watch::Sender::new(0),
            activations: AtomicU64::new(0),
            turns: AtomicU64::new(0),
            broken: AtomicU64::new(0),
            deferred: AtomicU64::new(0),
            lost: AtomicU64::new(0),
            counting: AtomicBool::new(false),
            concerned_bytes: AtomicU64::new(0),
            concerned_turns: AtomicU64::new(0),
            unconcerned_bytes: AtomicU64::new(0),
            policy_bytes: AtomicU64::new(0),
            begun: Instant::now(),
            last_message_us: AtomicU64::new(0),
            complaints: Mutex::default(),
        }
    }

    pub(crate) fn count_bytes(&self, concerned: u64, unconcerned: u64, policies: u64) {
        if self.counting.load(Relaxed) {
            self.concerned_bytes.fetch_add(concerned, Relaxed);
            self.concerned_turns.fetch_add(u64::from(concerned > 0), Relaxed);
            self.unconcerned_bytes.fetch_add(unconcerned, Relaxed);
            self.policy_bytes.fetch_add(policies, Relaxed);
        }
    }

    pub(crate) fn bytes(&self) -> Bytes {
        Bytes {
            concerned: self.concerned_bytes.load(Relaxed),
            hearings: self.concerned_turns.load(Relaxed),
            unconcerned: self.unconcerned_bytes.load(Relaxed),
            policies: self.policy_bytes.load(Relaxed),
        }
    }

    /// Some agent has heard something just now.
    pub(crate) fn message(&self) {
        let elapsed = u64::try_from(self.begun.elapsed().as_micros()).unwrap_or(u64::MAX);
        self.last_message_us.store(elapsed, Relaxed);
    }

    /// For how long nobody has heard anything.
    pub(crate) fn quiet_for(&self) -> Duration {
        self.begun.elapsed().saturating_sub(Duration::from_micros(self.last_message_us.load(Relaxed)))
    }

    /// Notes something that must not be.
    pub(crate) fn complain(&self, what: String) {
        let mut complaints = self.complaints.lock().unwrap_or_else(PoisonError::into_inner);
        if complaints.len() < COMPLAINTS_MAX {
            complaints.push(what);
        }
    }

    pub(crate) fn complaints(&self) -> Vec<String> {
        self.complaints.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}
