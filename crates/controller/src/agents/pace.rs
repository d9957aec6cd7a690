//! How long a session waits before it tells what has changed: not at all, unless the controller is busy.
//!
//! What changes together, on several hosts, comes as several commits shortly one after the other. Each message costs both
//! ends more than what is in it, so in a busy fleet they are awaited for a moment and told as one.

use std::ops::RangeInclusive;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

/// Agents told in one [`WINDOW`] from which on the controller is busy: 2000 in a second, a tenth of what it can do on two
/// cores, so that a change made by hand is told at once.
const BUSY_TOLD: u64 = 200;
/// Time over which they are counted.
const WINDOW: Duration = Duration::from_millis(100);
/// How long changes are awaited then: longer than the store takes for a group, and far below the 250 ms within which the last
/// concerned agent is to have a change. The more agents are told, the longer, as less is left of the machine for those who
/// would be told twice.
const AWAITED: RangeInclusive<Duration> = Duration::from_millis(15)..=Duration::from_millis(60);

/// Counts how many agents are told.
#[derive(Debug)]
pub(crate) struct Pace {
    since: Instant,
    /// The window that is counted in, and what was counted in it and in the one before.
    window: AtomicU64,
    now: AtomicU64,
    before: AtomicU64,
}

impl Default for Pace {
    fn default() -> Self {
        let (window, now, before) = (AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0));
        Self { since: Instant::now(), window, now, before }
    }
}

impl Pace {
    /// An agent is told something. That two threads turn the window at once loses some of the count, no more.
    pub(super) fn told(&self) {
        self.turn(self.since.elapsed());
        self.now.fetch_add(1, Relaxed);
    }

    /// How long to wait before telling.
    pub(super) fn wait(&self) -> Option<Duration> {
        self.turn(self.since.elapsed());
        let told = self.before.load(Relaxed).max(self.now.load(Relaxed));
        let times = u32::try_from(told / BUSY_TOLD).unwrap_or(u32::MAX);
        (times > 0).then(|| AWAITED.start().saturating_mul(times).min(*AWAITED.end()))
    }

    fn turn(&self, elapsed: Duration) {
        let window = u64::try_from(elapsed.as_millis() / WINDOW.as_millis()).unwrap_or(u64::MAX);
        let counted = self.window.swap(window, Relaxed);
        if window != counted {
            let told = self.now.swap(0, Relaxed);
            self.before.store(if window == counted + 1 { told } else { 0 }, Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_who_tells_many_waits_and_only_as_long_as_it_does() {
        let pace = Pace::default();
        pace.turn(WINDOW);
        (0..BUSY_TOLD - 1).for_each(|_| _ = pace.now.fetch_add(1, Relaxed));
        pace.turn(WINDOW * 2);
        assert_eq!(pace.before.load(Relaxed), BUSY_TOLD - 1);
        pace.turn(WINDOW * 5);
        assert_eq!((pace.before.load(Relaxed), pace.now.load(Relaxed)), (0, 0));
    }
}
