//! Who is selected by what, for every selector that an agent has subscribed to.
//!
//! One [`MemberIndex`] serves all agents: a selector that a thousand of them read is evaluated once. Each
//! selector has a bounded log of the entities that joined, changed or left, from which its subscribers catch
//! up at their own pace, and a list of subscribers, so that nobody else is woken.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};

use bulkhead_engine::{MemberIndex, MemberRef, SelectorId};
use bulkhead_model::{Entity, Selector};
use bulkhead_wire::{port_to_wire, prefix_to_wire, proto};
use bytes::Bytes;
use tokio::sync::Notify;

use crate::access::HostPatterns;
use crate::agents::joining;
use crate::repository::ChangeLog;

/// Changes that each selector remembers.
pub(crate) const SELECTOR_LOG_LEN_MAX: usize = 10_000;

/// Number of a session, never used again.
pub(crate) type SessionId = u64;

/// Who is told: what he hears of and what he does not.
#[derive(Debug, Clone)]
pub(crate) enum Audience {
    /// The agent of a host: changes of its own workloads do not concern it.
    Host(Arc<str>),
    /// A relay, which leaves out of what its agents hear what is their own.
    Relay(HostPatterns),
}

impl Audience {
    /// Whether it is not told of members on a host.
    pub(crate) fn leaves_out(&self, host: &str) -> bool {
        matches!(self, Self::Host(own) if **own == *host)
    }

    /// Whether it is not told of the change of an entity that was and is on these hosts (network sets: on none).
    pub(crate) fn leaves_out_change(&self, before: Option<&str>, after: Option<&str>) -> bool {
        let mut hosts = [before, after].into_iter().flatten().peekable();
        hosts.peek().is_some() && hosts.all(|host| self.leaves_out(host))
    }

    /// Whether it is told what is for a host alone.
    pub(crate) fn hears_for(&self, host: &str) -> bool {
        match self {
            Self::Host(own) => **own == *host,
            Self::Relay(hosts) => hosts.covers(host),
        }
    }

    /// Whether an entity that is gone was on a host that is left out, by its name: `NAME.HOST`.
    pub(crate) fn left_out(&self, name: &str) -> bool {
        let Self::Host(own) = self else { return false };
        name.strip_suffix(&**own).is_some_and(|name| name.ends_with('.'))
    }
}

/// A session as the repository knows it.
#[derive(Debug)]
pub(crate) struct Subscriber {
    /// Which.
    pub(crate) id: SessionId,
    pub(crate) audience: Audience,
    /// To be rung when something concerns it.
    pub(crate) wake: Notify,
    /// Selectors of its own whose members have changed since it was last told. Never more than it has subscribed to.
    changed: Mutex<HashSet<SelectorId>>,
}

impl Subscriber {
    /// Of a host's agent.
    #[cfg(test)]
    pub(crate) fn new(id: SessionId, host: Arc<str>) -> Self {
        Self::of(id, Audience::Host(host))
    }

    pub(crate) fn of(id: SessionId, audience: Audience) -> Self {
        Self { id, audience, wake: Notify::new(), changed: Mutex::default() }
    }

    /// Notes that a selector's members have changed, and rings unless that is done already.
    pub(crate) fn note(&self, selector: SelectorId) {
        let mut changed = self.changed.lock().unwrap_or_else(PoisonError::into_inner);
        if changed.insert(selector) {
            self.wake.notify_one();
        }
    }

    /// How many selectors' members have changed, left as it is.
    #[cfg(test)]
    pub(crate) fn changed_len(&self) -> usize {
        self.changed.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// The selectors whose members have changed; from then on none has. To be called with the view locked, as of which it
    /// is told.
    pub(crate) fn take_changed(&self) -> HashSet<SelectorId> {
        std::mem::take(&mut *self.changed.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// A member as agents hear of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Member {
    pub(crate) entity: Arc<str>,
    pub(crate) host: Option<Arc<str>>,
    /// As it stands in a message: once for all who hear of it.
    pub(crate) join: Bytes,
}

impl From<MemberRef<'_>> for Member {
    fn from(member: MemberRef<'_>) -> Self {
        let wire = proto::Member {
            entity: member.entity.to_string(),
            host: member.host.map(ToString::to_string).unwrap_or_default(),
            prefixes: member.prefixes.iter().copied().map(prefix_to_wire).collect(),
            ports: member.ports.iter().map(port_to_wire).collect(),
        };
        Self { entity: Arc::clone(member.entity), host: member.host.cloned(), join: joining(&wire) }
    }
}

/// What has become of an entity that a selector's readers are to hear of.
#[derive(Debug)]
pub(crate) struct Became {
    name: Arc<str>,
    /// The host that it is on, if it is known and on one.
    host: Option<Option<Arc<str>>>,
    /// As a member; `None`: it is none.
    member: Option<Member>,
}

impl Became {
    /// Its name, for those whom it concerns: a host's own workloads its agent knows better.
    fn name_for(&self, audience: &Audience) -> Option<&Arc<str>> {
        let is_own = match &self.host {
            Some(on) => on.as_ref().is_some_and(|on| audience.leaves_out(on)),
            // The host's own, gone: never told to it.
            None => audience.left_out(&self.name),
        };
        (!is_own).then_some(&self.name)
    }
}

/// What a subscriber is to be told.
#[derive(Debug, Default)]
pub(crate) struct Difference {
    /// New members, and members whose prefixes changed.
    pub(crate) joins: Vec<Member>,
    /// Entities that are members no longer.
    pub(crate) leaves: Vec<Arc<str>>,
}

impl Difference {
    /// What there is to tell somebody about these entities. Of those that match no more it is not known whether they ever
    /// did: that they left is no harm to say.
    pub(crate) fn of(to: &Audience, changed: &[Became]) -> Self {
        let mut difference = Self::default();
        for became in changed {
            match (became.name_for(to), &became.member) {
                (None, _) => {}
                (Some(_), Some(member)) => difference.joins.push(member.clone()),
                (Some(name), None) => difference.leaves.push(Arc::clone(name)),
            }
        }
        difference
    }
}

/// What became of those whom a part of a selector's log names, for all who know what was before it.
#[derive(Debug)]
struct Told {
    span: (u64, u64),
    entities: Arc<[Became]>,
}

#[derive(Debug)]
struct InForce {
    log: ChangeLog<Arc<str>>,
    subscribers: HashMap<SessionId, Arc<Subscriber>>,
    /// What was asked for last. A member of this selector does not become another without an entry in its log, so this
    /// holds for as long as the log is not longer.
    told: Mutex<Option<Told>>,
}

/// The index with its logs and subscribers.
#[derive(Debug, Default)]
pub(crate) struct Members {
    index: MemberIndex,
    in_force: HashMap<SelectorId, InForce>,
}

impl Members {
    /// Takes in a new or changed entity. `host_before` is the host that it was on, if it was known.
    pub(crate) fn upsert(&mut self, entity: &Entity, host_before: Option<&str>, revision: u64) {
        let hosts = (host_before, entity.host.as_deref());
        for change in self.index.upsert(entity) {
            self.note(change.selector, revision, &change.entity, hosts);
        }
    }

    /// Takes an entity out.
    pub(crate) fn remove(&mut self, name: &str, host_before: Option<&str>, revision: u64) {
        let hosts = (host_before, None);
        for change in self.index.remove(name) {
            self.note(change.selector, revision, &change.entity, hosts);
        }
    }

    /// `before` and `after`: the hosts that it was and is on.
    fn note(
        &mut self,
        id: SelectorId,
        revision: u64,
        name: &Arc<str>,
        (before, after): (Option<&str>, Option<&str>),
    ) {
        let Some(in_force) = self.in_force.get_mut(&id) else { return };
        in_force.log.push(revision, Arc::clone(name));
        let subscribers = in_force.subscribers.values();
        subscribers
            .filter(|subscriber| !subscriber.audience.leaves_out_change(before, after))
            .for_each(|subscriber| subscriber.note(id));
    }

    /// Puts a selector in force for a session, as of `revision`.
    pub(crate) fn subscribe(
        &mut self,
        selector: &Selector,
        subscriber: &Arc<Subscriber>,
        revision: u64,
    ) -> SelectorId {
        let id = self.index.subscribe(selector);
        let in_force = self.in_force.entry(id).or_insert_with(|| InForce {
            log: ChangeLog::new(revision, SELECTOR_LOG_LEN_MAX),
            subscribers: HashMap::new(),
            told: Mutex::default(),
        });
        in_force.subscribers.insert(subscriber.id, Arc::clone(subscriber));
        id
    }

    /// Takes back one [`Members::subscribe`]. The selector is out of force when nobody reads it any more;
    /// `still_read` says that the session itself does, by another subscription.
    pub(crate) fn unsubscribe(&mut self, id: SelectorId, session: SessionId, still_read: bool) {
        self.index.unsubscribe(id);
        if still_read {
            return;
        }
        if let Some(in_force) = self.in_force.get_mut(&id) {
            in_force.subscribers.remove(&session);
            if in_force.subscribers.is_empty() {
                self.in_force.remove(&id);
            }
        }
    }

    /// All members that somebody hears of, by name.
    pub(crate) fn all(&self, id: SelectorId, to: &Audience) -> Vec<Member> {
        let mut members: Vec<_> = self
            .index
            .members(id)
            .filter(|member| member.host.is_none_or(|on| !to.leaves_out(on)))
            .map(Member::from)
            .collect();
        members.sort_unstable_by(|a, b| a.entity.cmp(&b.entity));
        members
    }

    /// What became of the entities that joined, changed or left a selector after `revision`; `None` if its log begins later.
    /// Found out once for all readers who are equally far.
    pub(crate) fn changed_since(&self, id: SelectorId, revision: u64) -> Option<Arc<[Became]>> {
        let InForce { log, told, .. } = self.in_force.get(&id)?;
        let span = log.span_since(revision)?;
        let mut told = told.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(told) = told.as_ref().filter(|told| told.span == span) {
            return Some(Arc::clone(&told.entities));
        }
        let entities: Arc<[Became]> =
            log.since(revision)?.into_iter().map(|name| self.became(id, name)).collect();
        *told = Some(Told { span, entities: Arc::clone(&entities) });
        Some(entities)
    }

    /// What has become of an entity, for the readers of a selector.
    pub(crate) fn became(&self, id: SelectorId, name: Arc<str>) -> Became {
        let standing = self.index.standing(id, &name);
        let host = standing.map(|(entity, _)| entity.host.cloned());
        let member = standing.filter(|(_, is_member)| *is_member).map(|(entity, _)| Member::from(entity));
        Became { name, host, member }
    }

    /// Hosts of those whom any of these selectors selects, whether somebody has subscribed to it or not; `None` if that is
    /// not found out quickly.
    pub(crate) fn hosts_of(&mut self, selectors: &[Selector]) -> Option<HashSet<Arc<str>>> {
        let mut hosts = HashSet::new();
        for selector in selectors {
            hosts.extend(self.index.hosts_of(selector)?);
        }
        Some(hosts)
    }

    /// Whether a selector has more members than that.
    pub(crate) fn has_more_than(&self, id: SelectorId, number: usize) -> bool {
        self.index.members(id).nth(number).is_some()
    }

    /// Selectors in force.
    pub(crate) fn selectors(&self) -> usize {
        self.in_force.len()
    }
}
