//! Who has still to hear of what, and how long it took until the last one had.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Durations that are kept; those beyond are counted and not kept.
const SAMPLES_MAX: usize = 10_000_000;

/// Changes of each kind that are described.
const DESCRIBED_MAX: usize = 5;

/// What a change makes of the workload by which it is recognised.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Becomes {
    /// A member with the address of this start.
    Member(u32),
    /// A member no more.
    Stranger,
}

/// Who hears of a change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Readers {
    /// All who read its application.
    All,
    /// Those who ask whether it is ready.
    OfReadiness,
}

/// Names an event while it is open.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct EventId {
    application: u32,
    number: u64,
}

#[derive(Debug)]
struct Event {
    number: u64,
    workload: u32,
    becomes: Becomes,
    readers: Readers,
    published: Instant,
    stored: Option<Instant>,
    waiting: Vec<u32>,
    /// When the last one computed it.
    last: Instant,
    measured: bool,
}

/// How an agent reads an application.
#[derive(Debug, Clone, Copy, Default)]
struct Reads {
    whole: u32,
    readiness: u32,
}

impl Reads {
    fn hears(self, readers: Readers) -> bool {
        match readers {
            Readers::All => self.whole + self.readiness > 0,
            Readers::OfReadiness => self.readiness > 0,
        }
    }
}

#[derive(Debug, Default)]
struct Application {
    readers: BTreeMap<u32, Reads>,
    open: Vec<Event>,
    next: u64,
}

#[derive(Debug)]
struct PolicyChange {
    policy: u32,
    waiting: Vec<u32>,
    stored: Option<Instant>,
    last: Instant,
}

/// Durations of one kind.
#[derive(Debug, Clone, Default)]
pub(crate) struct Samples {
    pub(crate) from_stored: Vec<Duration>,
    pub(crate) from_published: Vec<Duration>,
}

/// All that is open, and what was measured.
#[derive(Debug)]
pub(crate) struct Tracker {
    applications: Vec<Mutex<Application>>,
    policies: Mutex<HashMap<u64, PolicyChange>>,
    samples: Mutex<Samples>,
    policy_samples: Mutex<Vec<Duration>>,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Tracker {
    pub(crate) fn new(applications: u32) -> Self {
        Self {
            applications: (0..applications).map(|_| Mutex::default()).collect(),
            policies: Mutex::default(),
            samples: Mutex::default(),
            policy_samples: Mutex::default(),
        }
    }

    fn application(&self, number: u32) -> MutexGuard<'_, Application> {
        locked(&self.applications[number as usize % self.applications.len()])
    }

    /// An agent knows an application's members from now on.
    pub(crate) fn reads(&self, agent: u32, application: u32, readiness: bool) {
        let mut application = self.application(application);
        let reads = application.readers.entry(agent).or_default();
        if readiness { reads.readiness += 1 } else { reads.whole += 1 }
    }

    /// An agent does not hear of an application any more: nobody waits for it.
    pub(crate) fn ignores(&self, agent: u32, application: u32, readiness: bool) {
        let mut application = self.application(application);
        let Some(reads) = application.readers.get_mut(&agent) else { return };
        let count = if readiness { &mut reads.readiness } else { &mut reads.whole };
        *count = count.saturating_sub(1);
        let reads = *reads;
        if reads.readiness + reads.whole == 0 {
            application.readers.remove(&agent);
        }
        let unheard = |event: &&mut Event| !reads.hears(event.readers);
        let unheard = application.open.iter_mut().filter(unheard);
        unheard.for_each(|event| event.waiting.retain(|waiting| *waiting != agent));
        self.close(&mut application);
    }

    /// An agent publishes a change of an application's workload now.
    pub(crate) fn publish(
        &self,
        agent: u32,
        (application, workload): (u32, u32),
        becomes: Becomes,
        readers: Readers,
        measured: bool,
    ) -> EventId {
        let mut locked = self.application(application);
        locked.next += 1;
        let concerned =
            |(reader, reads): (&u32, &Reads)| (*reader != agent && reads.hears(readers)).then_some(*reader);
        let waiting = locked.readers.iter().filter_map(concerned).collect();
        let now = Instant::now();
        let number = locked.next;
        // Whoever hears of the newer start need not have heard of the older one.
        locked.open.push(Event {
            number,
            workload,
            becomes,
            readers,
            published: now,
            stored: None,
            waiting,
            last: now,
            measured,
        });
        EventId { application, number }
    }

    /// The repository has acknowledged it.
    pub(crate) fn stored(&self, id: EventId) {
        let mut application = self.application(id.application);
        if let Some(event) = application.open.iter_mut().find(|event| event.number == id.number) {
            event.stored = Some(Instant::now());
            self.close(&mut application);
        }
    }

    /// A workload is gone with its slice, which is recognised by another one: nobody may ever hear what was changed of it
    /// just before.
    pub(crate) fn overtake(&self, application: u32, workload: u32) {
        self.application(application).open.retain(|event| event.workload != workload);
    }

    /// It was never acknowledged: its agent will publish everything anew. What was changed of the same workload before may
    /// never be heard either, by whoever hears of that next.
    pub(crate) fn abandon(&self, id: EventId) {
        let mut application = self.application(id.application);
        let abandoned = application.open.iter().find(|event| event.number == id.number);
        let Some(workload) = abandoned.map(|event| event.workload) else { return };
        application.open.retain(|event| event.workload != workload || event.number > id.number);
    }

    /// An agent has computed its tables with what a workload has become.
    pub(crate) fn heard(&self, agent: u32, application: u32, workload: u32, becomes: Becomes) {
        let mut application = self.application(application);
        // What was open before the newest that it may have heard of is overtaken.
        let reached = |event: &Event| match (event.becomes, becomes) {
            (Becomes::Member(expected), Becomes::Member(heard)) => heard >= expected,
            (Becomes::Stranger, Becomes::Stranger) => true,
            (Becomes::Stranger, Becomes::Member(_)) | (Becomes::Member(_), Becomes::Stranger) => false,
        };
        let newest = application.open.iter().filter(|event| event.workload == workload && reached(event));
        let Some(newest) = newest.map(|event| event.number).max() else { return };
        let now = Instant::now();
        for event in &mut application.open {
            if event.workload == workload && event.number <= newest {
                let before = event.waiting.len();
                event.waiting.retain(|waiting| *waiting != agent);
                if event.waiting.len() < before {
                    event.last = now;
                }
            }
        }
        self.close(&mut application);
    }

    fn close(&self, application: &mut Application) {
        let mut samples = None;
        application.open.retain(|event| {
            let Some(stored) = event.stored.filter(|_| event.waiting.is_empty()) else { return true };
            if event.measured {
                let samples = samples.get_or_insert_with(|| locked(&self.samples));
                if samples.from_stored.len() < SAMPLES_MAX {
                    samples.from_stored.push(event.last.saturating_duration_since(stored));
                    samples.from_published.push(event.last.saturating_duration_since(event.published));
                }
            }
            false
        });
    }

    /// Whether a change of an application is still under way.
    pub(crate) fn is_busy(&self, application: u32) -> bool {
        !self.application(application).open.is_empty()
    }

    /// Changes that somebody has still to hear of.
    pub(crate) fn open(&self) -> usize {
        let applications = self.applications.iter().map(|application| locked(application).open.len());
        applications.sum::<usize>() + locked(&self.policies).len()
    }

    /// The first few changes that somebody has still to hear of, for people.
    pub(crate) fn describe(&self) -> String {
        let workloads = self.applications.iter().flat_map(|application| {
            let application = locked(application);
            let describe = |event: &Event| {
                let Event { workload, becomes, stored, waiting, .. } = event;
                format!("workload {workload} {becomes:?}, stored {}, agents {waiting:?}", stored.is_some())
            };
            application.open.iter().map(describe).collect::<Vec<_>>()
        });
        let workloads: Vec<_> = workloads.take(DESCRIBED_MAX).collect();
        let policies = locked(&self.policies);
        let policies = policies.values().take(DESCRIBED_MAX).map(|event| {
            let PolicyChange { policy, waiting, stored, .. } = event;
            format!("policy {policy}, stored {}, agents {waiting:?}", stored.is_some())
        });
        workloads.into_iter().chain(policies).collect::<Vec<_>>().join("; ")
    }

    /// Somebody changes a policy now; these agents have endpoints that it is for. Answers whether he may: not while a change
    /// of the same one is under way, of which those would never hear who hear of the later one.
    pub(crate) fn policy_changes(&self, change: u64, policy: u32, concerned: Vec<u32>) -> bool {
        let event = PolicyChange { policy, waiting: concerned, stored: None, last: Instant::now() };
        let mut policies = locked(&self.policies);
        let busy = policies.values().any(|other| other.policy == policy);
        if !busy {
            policies.insert(change, event);
        }
        !busy
    }

    /// The repository has taken the change, or has not.
    pub(crate) fn policy_stored(&self, change: u64, accepted: bool) {
        let mut policies = locked(&self.policies);
        match policies.get_mut(&change) {
            Some(event) if accepted => event.stored = Some(Instant::now()),
            _ => _ = policies.remove(&change),
        }
        self.close_policy(&mut policies, change);
    }

    /// An agent has computed its tables with a changed policy, or has found that it is for nobody there any more.
    pub(crate) fn policy_heard(&self, agent: u32, change: u64) {
        let mut policies = locked(&self.policies);
        if let Some(event) = policies.get_mut(&change)
            && let Some(place) = event.waiting.iter().position(|waiting| *waiting == agent)
        {
            event.waiting.swap_remove(place);
            event.last = Instant::now();
            self.close_policy(&mut policies, change);
        }
    }

    /// An agent is away: nobody waits for it.
    pub(crate) fn away(&self, agent: u32) {
        let mut policies = locked(&self.policies);
        let changes: Vec<u64> = policies.keys().copied().collect();
        for change in changes {
            if let Some(event) = policies.get_mut(&change) {
                event.waiting.retain(|waiting| *waiting != agent);
            }
            self.close_policy(&mut policies, change);
        }
    }

    fn close_policy(&self, policies: &mut HashMap<u64, PolicyChange>, change: u64) {
        let done = policies.get(&change).filter(|event| event.waiting.is_empty());
        if let Some(stored) = done.and_then(|event| event.stored)
            && let Some(event) = policies.remove(&change)
        {
            locked(&self.policy_samples).push(event.last.saturating_duration_since(stored));
        }
    }

    /// What was measured so far.
    pub(crate) fn samples(&self) -> (Samples, Vec<Duration>) {
        (locked(&self.samples).clone(), locked(&self.policy_samples).clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_ends_with_the_last_who_had_to_hear_of_it() {
        let tracker = Tracker::new(4);
        tracker.reads(1, 3, false);
        tracker.reads(2, 3, true);
        tracker.reads(9, 3, true);
        let first = tracker.publish(9, (3, 60), Becomes::Member(1), Readers::All, true);
        let second = tracker.publish(9, (3, 60), Becomes::Member(2), Readers::OfReadiness, true);
        tracker.stored(first);
        tracker.stored(second);
        assert_eq!(tracker.open(), 2);
        tracker.heard(2, 3, 60, Becomes::Stranger);
        assert_eq!(tracker.open(), 2, "that is something else");
        // Both at once: the older one was overtaken.
        tracker.heard(2, 3, 60, Becomes::Member(2));
        assert_eq!(tracker.open(), 1);
        tracker.ignores(1, 3, false);
        assert_eq!((tracker.open(), tracker.samples().0.from_stored.len()), (0, 2));
    }

    #[test]
    fn nobody_waits_for_who_has_ceased_to_ask_about_readiness() {
        let tracker = Tracker::new(4);
        tracker.reads(1, 3, false);
        tracker.reads(1, 3, true);
        let change = tracker.publish(9, (3, 64), Becomes::Stranger, Readers::OfReadiness, true);
        tracker.stored(change);
        tracker.ignores(1, 3, true);
        assert_eq!(tracker.open(), 0);
    }

    #[test]
    fn nobody_waits_for_a_start_whose_end_may_be_heard_of_unannounced() {
        let tracker = Tracker::new(4);
        tracker.reads(1, 3, false);
        let start = tracker.publish(9, (3, 60), Becomes::Member(2), Readers::All, true);
        tracker.stored(start);
        let other = tracker.publish(9, (3, 65), Becomes::Member(1), Readers::All, true);
        tracker.stored(other);
        let stop = tracker.publish(9, (3, 60), Becomes::Stranger, Readers::All, true);
        // Its connection breaks; it comes back without the workload, which is all that the reader ever hears.
        tracker.abandon(stop);
        tracker.heard(1, 3, 60, Becomes::Stranger);
        assert_eq!(tracker.open(), 1, "of the other one somebody still has to hear");
        tracker.heard(1, 3, 65, Becomes::Member(1));
        assert_eq!(tracker.open(), 0);
    }

    #[test]
    fn a_policy_changes_once_at_a_time_and_until_all_have_heard_of_it() {
        let tracker = Tracker::new(4);
        assert!(tracker.policy_changes(1, 7, vec![3, 4]));
        assert!(!tracker.policy_changes(2, 7, vec![3]));
        tracker.policy_stored(1, true);
        for agent in [3, 5] {
            tracker.policy_heard(agent, 1);
            assert_eq!(tracker.open(), 1);
        }
        tracker.policy_heard(4, 1);
        assert_eq!((tracker.open(), tracker.samples().1.len()), (0, 1));
    }
}
