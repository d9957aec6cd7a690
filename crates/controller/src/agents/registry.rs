//! Which agents there are: connected or lately seen, and what they said of themselves.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bulkhead_identity::{Holder, Identity};
use bulkhead_wire::proto;
use serde::Serialize;
use tokio::sync::oneshot;
use tonic::Status;

use super::desk::Speaker;
use crate::clock;
use crate::guard::{Ends, Known, Who};
use crate::members::SessionId;

/// Most hosts that are remembered.
const HOSTS_MAX: usize = 50_000;

/// Most things not enforced that are kept of one agent.
const NOT_ENFORCED_LEN_MAX: usize = 1000;

/// One agent, as status shows it.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct AgentReport {
    pub(crate) host: String,
    pub(crate) connected: bool,
    /// The relay that speaks for it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) relay: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) connected_since: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) last_seen: Option<String>,
    pub(crate) version: String,
    pub(crate) dataplane: String,
    /// Revision up to which it has been told everything that concerns it.
    pub(crate) sent_revision: u64,
    /// Revision up to which it enforces.
    pub(crate) enforced_revision: u64,
    /// The difference: 0 means that it enforces all that concerns it.
    pub(crate) lag: u64,
    pub(crate) endpoints: u32,
    pub(crate) entries: u64,
    pub(crate) not_enforced: Vec<NotEnforced>,
    pub(crate) subscriptions: usize,
    pub(crate) messages_sent: u64,
    pub(crate) bytes_sent: u64,
}

/// Something that an agent cannot put into force.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct NotEnforced {
    pub(crate) subject: String,
    pub(crate) reason: String,
}

#[derive(Debug)]
struct Live {
    id: SessionId,
    holder: Arc<Holder>,
    /// The relay that speaks for it.
    via: Option<Arc<Holder>>,
    ends: Option<Ends>,
    close: oneshot::Sender<Status>,
}

#[derive(Debug, Default)]
struct Record {
    live: Option<Live>,
    connected_since_ms: u64,
    last_seen_ms: u64,
    seen: bool,
    version: String,
    /// Of a relay.
    agents_at: String,
    status: proto::AgentStatus,
    sent_revision: u64,
    subscriptions: usize,
    messages_sent: u64,
    bytes_sent: u64,
}

#[derive(Debug, Default)]
struct Hosts {
    by_name: HashMap<Arc<str>, Record>,
    last_session: SessionId,
}

/// All agents.
#[derive(Debug, Default)]
pub(crate) struct Registry {
    hosts: Mutex<Hosts>,
}

/// A session's place in the registry.
#[derive(Debug)]
pub(crate) struct Admission {
    pub(crate) id: SessionId,
    /// Answers when another session has taken this one's place.
    pub(crate) closed: oneshot::Receiver<Status>,
    /// Whether it took another's place.
    pub(crate) replaced: bool,
}

impl Registry {
    fn hosts(&self) -> MutexGuard<'_, Hosts> {
        self.hosts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A session of a host begins. A session that the host still has is closed: its agent has come back
    /// before we noticed that it was gone.
    pub(crate) fn admit(&self, speaker: &Speaker, hello: &proto::Hello) -> Result<Admission, Status> {
        let Speaker { part: _, key: host, holder, via, ends } = speaker.clone();
        let host = &host;
        let mut hosts = self.hosts();
        if hosts.by_name.len() >= HOSTS_MAX && !hosts.by_name.contains_key(host) {
            return Err(Status::resource_exhausted(format!("{HOSTS_MAX} hosts are known already")));
        }
        hosts.last_session += 1;
        let id = hosts.last_session;
        let record = hosts.by_name.entry(Arc::clone(host)).or_default();
        let (close, closed) = oneshot::channel();
        let before = record.live.replace(Live { id, holder, via, ends, close });
        let replaced = before.is_some();
        if let Some(before) = before {
            let reason = format!("another session of host {host:?} has taken the place of this one");
            // An error means that it has ended by itself meanwhile.
            let _ = before.close.send(Status::aborted(reason));
        }
        let (now_ms, version) = (clock::now_ms(), hello.version.clone());
        *record = Record {
            live: record.live.take(),
            connected_since_ms: now_ms,
            last_seen_ms: now_ms,
            seen: true,
            version,
            agents_at: hello.agents_at.clone(),
            ..Record::default()
        };
        Ok(Admission { id, closed, replaced })
    }

    /// Changes what is known of a host, if the session is still its own.
    fn update(&self, host: &str, id: SessionId, update: impl FnOnce(&mut Record)) {
        if let Some(record) = self.hosts().by_name.get_mut(host)
            && record.live.as_ref().is_some_and(|live| live.id == id)
        {
            update(record);
        }
    }

    /// The agent said something.
    pub(crate) fn seen(&self, host: &str, id: SessionId) {
        self.update(host, id, |record| {
            record.last_seen_ms = clock::now_ms();
        });
    }

    /// The agent said how it is.
    pub(crate) fn status(&self, host: &str, id: SessionId, mut status: proto::AgentStatus) {
        status.not_enforced.truncate(NOT_ENFORCED_LEN_MAX);
        self.update(host, id, |record| {
            // Of an agent that is connected here it is known better.
            let via = record.live.as_ref().is_some_and(|live| live.via.is_some());
            if let Some(told) = status.told.take().filter(|_| via) {
                record.sent_revision = told.revision;
                record.subscriptions = usize::try_from(told.subscriptions).unwrap_or(usize::MAX);
                (record.messages_sent, record.bytes_sent) = (told.messages, told.bytes);
            }
            record.status = status;
        });
    }

    /// The agent has been told everything up to a revision, by so many messages and bytes since the last time.
    pub(crate) fn synced(
        &self,
        host: &str,
        id: SessionId,
        revision: u64,
        subscriptions: usize,
        (messages, bytes): (u64, u64),
    ) {
        self.update(host, id, |record| {
            record.sent_revision = revision;
            record.subscriptions = subscriptions;
            record.messages_sent += messages;
            record.bytes_sent += bytes;
        });
    }

    /// What the agent of a host has been told, by this session.
    pub(crate) fn told(&self, host: &str, id: SessionId) -> Option<proto::Told> {
        let hosts = self.hosts();
        let record = hosts.by_name.get(host)?;
        record.live.as_ref().filter(|live| live.id == id)?;
        Some(proto::Told {
            revision: record.sent_revision,
            subscriptions: u32::try_from(record.subscriptions).unwrap_or(u32::MAX),
            messages: record.messages_sent,
            bytes: record.bytes_sent,
        })
    }

    /// The session has ended.
    pub(crate) fn leave(&self, host: &str, id: SessionId) {
        self.update(host, id, |record| record.live = None);
    }

    /// Whether a host has a session here.
    pub(crate) fn is_connected(&self, host: &str) -> bool {
        self.hosts().by_name.get(host).is_some_and(|record| record.live.is_some())
    }

    /// Ends a session, if it has not ended.
    pub(crate) fn close_session(&self, host: &str, id: SessionId, status: Status) {
        let mut hosts = self.hosts();
        let record = hosts.by_name.get_mut(host);
        if let Some(live) = record.and_then(|record| record.live.take_if(|live| live.id == id)) {
            // An error means that it has ended by itself meanwhile.
            let _ = live.close.send(status);
        }
    }

    /// Ends the sessions of holders that are no longer welcome, and of hosts for which such a relay speaks.
    pub(crate) fn close_where(&self, unwelcome: impl Fn(&Holder) -> bool, status: impl Fn() -> Status) {
        for record in self.hosts().by_name.values_mut() {
            if let Some(live) = record
                .live
                .take_if(|live| unwelcome(&live.holder) || live.via.as_deref().is_some_and(&unwelcome))
            {
                // An error means that it has ended by itself meanwhile.
                let _ = live.close.send(status());
            }
        }
    }

    /// The connections of all agents that are connected.
    pub(crate) fn lifelines(&self) -> Vec<Known> {
        let known = |(host, record): (&Arc<str>, &Record)| {
            let ends = record.live.as_ref()?.ends?;
            Some(Known { who: Who::Agent(Arc::clone(host)), ends })
        };
        let mut all: Vec<_> = self.hosts().by_name.iter().filter_map(known).collect();
        all.sort_unstable_by_key(|known| match &known.who {
            Who::Operator => None,
            Who::Agent(host) => Some(Arc::clone(host)),
        });
        all
    }

    /// Sessions there are.
    pub(crate) fn connected(&self) -> usize {
        self.hosts().by_name.values().filter(|record| record.live.is_some()).count()
    }

    /// Where a relay's agents reach it, and its version; `None`: it is not connected here.
    pub(crate) fn relay(&self, name: &str) -> Option<(String, String)> {
        let hosts = self.hosts();
        let record = hosts.by_name.get(&*Identity::Relay(name.to_owned()).to_string())?;
        record.live.as_ref().map(|_| (record.agents_at.clone(), record.version.clone()))
    }

    /// All agents, by host.
    pub(crate) fn report(&self) -> Vec<AgentReport> {
        let hosts = self.hosts();
        // Hosts have no slash in their names.
        let agents = hosts.by_name.iter().filter(|(host, _)| !host.contains('/'));
        let mut reports: Vec<_> = agents.map(|(host, record)| record.report(host)).collect();
        reports.sort_unstable_by(|a, b| a.host.cmp(&b.host));
        reports
    }
}

impl Record {
    fn report(&self, host: &str) -> AgentReport {
        let not_enforced = self
            .status
            .not_enforced
            .iter()
            .map(|one| NotEnforced { subject: one.subject.clone(), reason: one.reason.clone() });
        AgentReport {
            host: host.to_owned(),
            connected: self.live.is_some(),
            relay: self
                .live
                .as_ref()
                .and_then(|live| live.via.as_ref())
                .map(|relay| relay.identity.name().to_owned()),
            connected_since: self.live.as_ref().map(|_| clock::rfc3339(self.connected_since_ms)),
            last_seen: self.seen.then(|| clock::rfc3339(self.last_seen_ms)),
            version: self.version.clone(),
            dataplane: self.status.dataplane.clone(),
            sent_revision: self.sent_revision,
            enforced_revision: self.status.revision,
            lag: self.sent_revision.saturating_sub(self.status.revision),
            endpoints: self.status.endpoints,
            entries: self.status.entries,
            not_enforced: not_enforced.collect(),
            subscriptions: self.subscriptions,
            messages_sent: self.messages_sent,
            bytes_sent: self.bytes_sent,
        }
    }
}
