//! Points in time, as data: nothing here knows what time it is.

use std::fmt;
use std::str::FromStr;
use std::time::{Duration, UNIX_EPOCH};

/// A second of UTC.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Timestamp {
    /// Seconds since 1970-01-01T00:00:00Z.
    pub seconds: u64,
}

/// A text that is no point in time.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("expected a time like 2026-01-31T18:00:00Z (RFC 3339, UTC), found {0:?}")]
pub struct TimestampError(String);

impl Timestamp {
    /// The second in which this time since the epoch lies.
    pub fn since_epoch(duration: Duration) -> Self {
        Self { seconds: duration.as_secs() }
    }
}

impl FromStr for Timestamp {
    type Err = TimestampError;

    fn from_str(text: &str) -> Result<Self, TimestampError> {
        let moment = humantime::parse_rfc3339(text).map_err(|_| TimestampError(text.into()))?;
        let since = moment.duration_since(UNIX_EPOCH).map_err(|_| TimestampError(text.into()))?;
        Ok(Self::since_epoch(since))
    }
}

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Beyond the year 9999 there is no RFC 3339; such a value was not parsed.
        let moment = UNIX_EPOCH + Duration::from_secs(self.seconds.min(253_402_300_799));
        humantime::format_rfc3339_seconds(moment).fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prints_what_it_parsed() {
        for text in ["1970-01-01T00:00:00Z", "2000-02-29T00:00:00Z", "2026-11-22T11:35:48Z"] {
            assert_eq!(text.parse::<Timestamp>().unwrap().to_string(), text);
        }
        for text in ["tomorrow", "2026-02-30T00:00:00Z", "2026-01-01", "2026-01-01T25:00:00Z"] {
            assert!(text.parse::<Timestamp>().is_err(), "{text}");
        }
    }
}
