//! What the store says about controllers and sessions, as of one revision.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bulkhead_store::{Change, Revision};

use super::records::{ControllerRecord, Key, SessionRecord, read_key};

/// Controllers, sessions, and since when hosts have none.
#[derive(Debug, Default)]
pub(super) struct Table {
    controllers: BTreeMap<String, ControllerRecord>,
    sessions: HashMap<Arc<str>, (SessionRecord, Revision)>,
    /// When we saw that a host has no session. Of this process' own clock, which nobody sets.
    gone: HashMap<Arc<str>, Instant>,
    /// When hosts' workloads were removed, until the host comes back.
    expired: HashMap<Arc<str>, Revision>,
}

/// What a change means for whoever serves the host.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Event {
    /// A host's session is this one's now.
    Taken { host: Arc<str>, controller: String, revision: Revision },
    /// A host's session is gone.
    Gone { host: Arc<str>, revision: Revision },
}

impl Table {
    /// Takes in a change of a revision.
    pub(super) fn take_in(&mut self, change: &Change, revision: Revision, now: Instant) -> Option<Event> {
        let value = change.object.as_ref().map(|stored| &stored.value);
        match (read_key(&change.key)?, value) {
            (Key::Controller(name), None) => {
                self.controllers.remove(name);
                None
            }
            (Key::Controller(name), Some(value)) => {
                if let Some(record) = read(&change.key, value) {
                    self.controllers.insert(name.to_owned(), record);
                }
                None
            }
            (Key::Session(host), None) => {
                let host: Arc<str> = host.into();
                self.sessions.remove(&host);
                self.gone.insert(Arc::clone(&host), now);
                Some(Event::Gone { host, revision })
            }
            (Key::Session(host), Some(value)) => {
                // Whoever it is, somebody serves the host: that much is known even if it cannot be read.
                let record: SessionRecord = read(&change.key, value).unwrap_or_else(nobody);
                let (host, controller): (Arc<str>, _) = (host.into(), record.controller.clone());
                self.gone.remove(&host);
                self.sessions.insert(Arc::clone(&host), (record, revision));
                Some(Event::Taken { host, controller, revision })
            }
            (Key::Expired(host), None) => {
                self.expired.remove(host);
                None
            }
            (Key::Expired(host), Some(_)) => {
                self.expired.insert(host.into(), revision);
                None
            }
        }
    }

    pub(super) fn controllers(&self) -> impl Iterator<Item = &ControllerRecord> {
        self.controllers.values()
    }

    /// Who serves a host, and since which revision.
    pub(super) fn session(&self, host: &str) -> Option<(&SessionRecord, Revision)> {
        self.sessions.get(host).map(|(record, revision)| (record, *revision))
    }

    pub(super) fn served_by(&self, controller: &str) -> usize {
        self.sessions.values().filter(|(record, _)| record.controller == controller).count()
    }

    pub(super) fn served_by_others<'a>(
        &'a self,
        own: &'a str,
    ) -> impl Iterator<Item = (&'a Arc<str>, &'a SessionRecord)> {
        let all = self.sessions.iter().map(|(host, (record, _))| (host, record));
        all.filter(move |(_, record)| record.controller != own)
    }

    /// For how long a host has had no session, as far as we have seen; it begins with this question if it was not known.
    /// `None`: it has one.
    pub(super) fn gone_for(&mut self, host: &str, now: Instant) -> Option<Duration> {
        if self.sessions.contains_key(host) {
            return None;
        }
        let since = match self.gone.get(host) {
            Some(since) => *since,
            None => *self.gone.entry(host.into()).or_insert(now),
        };
        Some(now.saturating_duration_since(since))
    }

    /// A host is served here, whatever the store says: its time without a session begins anew.
    pub(super) fn is_here(&mut self, host: &str) {
        self.gone.remove(host);
    }

    /// The revision in which a host's workloads were removed, if it has not come back since.
    pub(super) fn expired(&self, host: &str) -> Option<Revision> {
        self.expired.get(host).copied()
    }
}

fn nobody() -> SessionRecord {
    let none = String::new;
    SessionRecord { controller: none(), since_ms: 0, session: 0, remote: none(), local: none() }
}

fn read<T: serde::de::DeserializeOwned>(key: &str, value: &[u8]) -> Option<T> {
    serde_json::from_slice(value)
        .map_err(|error| tracing::error!(%key, %error, "what a controller has written cannot be read"))
        .ok()
}

#[cfg(test)]
mod tests {
    use bulkhead_store::Stored;

    use super::super::records::{encode, session_key};
    use super::*;

    fn put(host: &str, controller: &str, revision: u64) -> (Change, Revision) {
        let (key, revision): (Arc<str>, _) = (session_key(host).into(), Revision(revision));
        let record = SessionRecord { controller: controller.into(), ..nobody() };
        let value = encode(&record).into();
        let stored =
            Stored { key: Arc::clone(&key), value, created: revision, modified: revision, lease: None };
        (Change { key, object: Some(stored) }, revision)
    }

    /// Only differences of the process' own clock count, whatever the time of day is set to.
    #[test]
    fn grace_begins_when_a_session_is_seen_to_go() {
        let (mut table, start) = (Table::default(), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        let (change, revision) = put("h1", "a", 5);
        let taken = table.take_in(&change, revision, at(0));
        assert_eq!(taken, Some(Event::Taken { host: "h1".into(), controller: "a".into(), revision }));
        assert_eq!(table.gone_for("h1", at(100)), None);
        let gone = Change { object: None, ..change.clone() };
        table.take_in(&gone, Revision(6), at(100));
        assert_eq!(table.gone_for("h1", at(107)), Some(Duration::from_secs(7)));
        table.take_in(&change, Revision(7), at(108));
        assert_eq!(table.gone_for("h1", at(200)), None);
        // One that was never seen is given its time from now on.
        assert_eq!(table.gone_for("h2", at(200)), Some(Duration::ZERO));
        assert_eq!(table.gone_for("h2", at(203)), Some(Duration::from_secs(3)));
        assert_eq!(table.gone_for("h2", at(199)), Some(Duration::ZERO), "time does not run backwards");
    }
}
