//! Credentials with when they were taken up, so that a time of day that jumps neither ends them, nor has them renewed too late or
//! all the time.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bulkhead_identity::{Credentials, CredentialsError};

use crate::clock;

/// What somebody has, and since when.
#[derive(Debug, Clone)]
pub struct Held {
    /// Certificate, key and authorities.
    pub credentials: Arc<Credentials>,
    /// After the machine's start.
    since: Duration,
    /// What was left then of the first half of its life, and of all of it.
    due_in: Duration,
    ends_in: Duration,
    life: Duration,
    /// Until when it is not renewed by the time of day; `None`: that has no say, since it was made just then.
    due_at: Option<SystemTime>,
}

impl Held {
    /// What an authority has made just now: its life begins, whatever the time of day is here.
    pub(crate) fn made(credentials: Credentials) -> Result<Self, CredentialsError> {
        let held = Self::found(credentials)?;
        Ok(Self { due_in: held.life / 2, ends_in: held.life, due_at: None, ..held })
    }

    /// What was on disk: how old it is, the time of day says.
    pub(crate) fn found(credentials: Credentials) -> Result<Self, CredentialsError> {
        let (holder, now) = (credentials.holder()?, clock::system());
        let life = holder.not_after.duration_since(holder.not_before).unwrap_or_default();
        // No more is left than there was, also if it begins in the future.
        let until = |moment: SystemTime, all| moment.duration_since(now).unwrap_or_default().min(all);
        Ok(Self {
            since: clock::since_boot(),
            due_in: until(holder.renew_at(), life / 2),
            ends_in: until(holder.not_after, life),
            life,
            due_at: Some(holder.renew_at()),
            credentials: Arc::new(credentials),
        })
    }

    pub(crate) fn life(&self) -> Duration {
        self.life
    }

    fn age(&self) -> Duration {
        clock::since_boot().saturating_sub(self.since)
    }

    /// Whether it is to be renewed.
    pub(crate) fn is_due(&self) -> bool {
        self.age() >= self.due_in || self.due_at.is_some_and(|due| clock::system() >= due)
    }

    /// Whether it may be good. Who is shown it has a clock of its own: what has ended or not begun by this one may be good there.
    pub(crate) fn may_be_good(&self) -> bool {
        self.age() < self.ends_in || self.credentials.valid_at(clock::system()).unwrap_or(false)
    }
}
