//! The only place that asks for the time of day.

use std::time::{SystemTime, UNIX_EPOCH};

use bulkhead_model::time::Timestamp;

/// The time of day. It may jump at any moment: what must take its time is measured by the monotonic clock instead.
pub(crate) fn system() -> SystemTime {
    let now = SystemTime::now();
    #[cfg(test)]
    let now = jumps::shifted(now);
    now
}

/// Milliseconds since the Unix epoch; 0 if the clock stands before it.
pub(crate) fn now_ms() -> u64 {
    let since = system().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// The second that it is now.
pub(crate) fn now() -> Timestamp {
    Timestamp { seconds: now_ms() / 1000 }
}

/// A time as people read it: RFC 3339, UTC, whole seconds.
pub(crate) fn rfc3339(ms: u64) -> String {
    Timestamp { seconds: ms / 1000 }.to_string()
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
        let hours = HOURS.get();
        let by = Duration::from_secs(3600) * hours.unsigned_abs();
        if hours < 0 { now - by } else { now + by }
    }

    /// This thread's clock is so many hours ahead of the machine's from now on, or behind.
    pub(crate) fn set(hours: i32) {
        HOURS.set(hours);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_right_around_leap_days() {
        assert_eq!(rfc3339(0), "1970-01-01T00:00:00Z");
        assert_eq!(rfc3339(951_782_400_000), "2000-02-29T00:00:00Z");
        assert_eq!(rfc3339(1_795_347_348_999), "2026-11-22T11:35:48Z");
    }
}
