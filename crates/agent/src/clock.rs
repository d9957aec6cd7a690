//! The only place that asks for the time of day.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Since the Unix epoch; nothing if the clock stands before it. It may jump at any moment: what must take its time is measured by
/// the monotonic clock instead.
pub(crate) fn since_epoch() -> Duration {
    let now = SystemTime::now();
    #[cfg(test)]
    let now = jumps::shifted(now);
    now.duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// Clocks that jump, for the tests of one thread.
#[cfg(test)]
pub(crate) mod jumps {
    use std::cell::Cell;
    use std::time::{Duration, SystemTime};

    thread_local! {
        static HOURS: Cell<i32> = const { Cell::new(0) };
    }

    pub(super) fn shifted(now: SystemTime) -> SystemTime {
        let by = Duration::from_secs(3600) * HOURS.get().unsigned_abs();
        if HOURS.get() < 0 { now - by } else { now + by }
    }

    /// This thread's clock is so many hours ahead of the machine's from now on, or behind.
    pub(crate) fn set(hours: i32) {
        HOURS.set(hours);
    }
}
