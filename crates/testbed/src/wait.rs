//! Waiting for what must become true, with a deadline and without guessing how long it takes.

use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};

/// How long something that must happen may take on a loaded machine.
const DEADLINE: Duration = Duration::from_secs(60);
/// Time between two looks.
const LOOK_INTERVAL: Duration = Duration::from_millis(5);

/// Looks until `look` answers without error, [`DEADLINE`] at most.
///
/// # Errors
/// The last error of `look`, with `what` before it.
pub fn eventually<T>(what: &str, look: impl FnMut() -> Result<T>) -> Result<T> {
    eventually_within(DEADLINE, what, look)
}

/// Looks until `look` answers without error, `limit` at most.
///
/// # Errors
/// The last error of `look`, with `what` before it.
pub fn eventually_within<T>(limit: Duration, what: &str, mut look: impl FnMut() -> Result<T>) -> Result<T> {
    let deadline = Instant::now() + limit;
    loop {
        match look() {
            Ok(value) => return Ok(value),
            Err(error) if Instant::now() >= deadline => {
                return Err(anyhow!("{what}: not within {:.1} s: {error:#}", limit.as_secs_f64()));
            }
            Err(_) => std::thread::sleep(LOOK_INTERVAL),
        }
    }
}
