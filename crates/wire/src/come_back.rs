//! How a controller that is busy says when an agent is to try again.

use std::time::Duration;

use tonic::Status;
use tonic::metadata::MetadataValue;

/// Metadata of the refusal: milliseconds.
const KEY: &str = "bulkhead-come-back-ms";
/// Metadata besides: to come back to another controller.
const ELSEWHERE: &str = "bulkhead-elsewhere";
/// Longest that an agent lets itself be told to stay away.
pub const COME_BACK_MAX: Duration = Duration::from_secs(30);

/// The refusal of an agent that is to come back after some time.
pub fn come_back(after: Duration, why: &str) -> Status {
    let mut status = Status::unavailable(why);
    status
        .metadata_mut()
        .insert(KEY, MetadataValue::from(u64::try_from(after.as_millis()).unwrap_or(u64::MAX)));
    status
}

/// The refusal of an agent that is to go to another controller after some time.
pub fn come_back_elsewhere(after: Duration, why: &str) -> Status {
    let mut status = come_back(after, why);
    status.metadata_mut().insert(ELSEWHERE, MetadataValue::from_static("yes"));
    status
}

/// Whether a refusal sends the agent to another controller.
pub fn is_elsewhere(status: &Status) -> bool {
    status.metadata().contains_key(ELSEWHERE)
}

/// When to come back, if a refusal says so.
pub fn when_to_come_back(status: &Status) -> Option<Duration> {
    let milliseconds = status.metadata().get(KEY)?.to_str().ok()?.parse().ok()?;
    Some(Duration::from_millis(milliseconds).min(COME_BACK_MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_says_when_and_never_for_too_long() {
        let status = come_back(Duration::from_millis(300), "busy");
        assert_eq!(when_to_come_back(&status), Some(Duration::from_millis(300)));
        assert_eq!(when_to_come_back(&come_back(Duration::MAX, "busy")), Some(COME_BACK_MAX));
        assert_eq!(when_to_come_back(&Status::unavailable("gone")), None);
        assert!(!is_elsewhere(&status));
        let elsewhere = come_back_elsewhere(Duration::ZERO, "stops");
        assert!(is_elsewhere(&elsewhere) && when_to_come_back(&elsewhere) == Some(Duration::ZERO));
    }
}
