//! The only place that asks for the time.

use std::time::{Duration, SystemTime};

/// The time of day. It may jump at any moment.
pub(crate) fn system() -> SystemTime {
    let now = SystemTime::now();
    #[cfg(test)]
    let now = jumps::shifted(now);
    now
}

/// Since the machine was started, also while it slept. This one never jumps.
pub(crate) fn since_boot() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let seconds = Duration::from_secs(u64::try_from(time.tv_sec).unwrap_or_default());
    seconds + Duration::from_nanos(u64::try_from(time.tv_nsec).unwrap_or_default())
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

    /// The time of day is so many hours ahead of the machine's from now on, or behind.
    pub(crate) fn set(hours: i32) {
        HOURS.set(hours);
    }
}
