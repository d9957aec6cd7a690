//! What a relay knows of the repository: what it was told, as of one revision, with logs from which its agents resume.
//!
//! Everything is taken in at a barrier, so a session that looks at it never sees two revisions mixed. Selectors are those
//! that the site's agents have subscribed to, each once; who their members are is the controller's word.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bulkhead_engine::SelectorId;
use bulkhead_model::{Kind, ObjectKey, Resource, Selector};
use bulkhead_wire::proto::agent_message::Body as Up;
use bulkhead_wire::proto::{self, Subscribe, Unsubscribe};
use tokio::sync::Notify;
use tonic::Status;

use super::reception::Batch;
use crate::agents::{Answers, RELAY_SUBSCRIPTIONS_MAX, Source, joining};
use crate::clock;
use crate::members::{Audience, Difference, Member, SELECTOR_LOG_LEN_MAX, SessionId, Subscriber};
use crate::repository::{ChangeLog, Decoded, Hearers, View};

/// How long a selector stays subscribed to that nobody reads any more: who comes back in it is told the difference.
const IDLE_TIME_MAX: Duration = Duration::from_secs(300);

type Name = Arc<str>;
type Host = Option<Arc<str>>;

/// A selector that agents of the site have subscribed to, or had lately.
#[derive(Debug)]
struct Selected {
    text: Arc<str>,
    /// `None`: not answered yet.
    members: Option<BTreeMap<Name, Member>>,
    /// Who joined, changed or left, and on which host it was before.
    log: ChangeLog<(Name, Host)>,
    readers: HashMap<SessionId, Arc<Subscriber>>,
    idle_since: Option<Instant>,
}

/// What was heard of a selector's members up to a barrier.
#[derive(Debug, Default)]
struct Heard {
    snapshot: bool,
    changes: BTreeMap<Name, Option<Member>>,
}

/// The copy.
#[derive(Debug)]
pub(crate) struct Mirror {
    /// Of the revisions; empty: nothing is known.
    epoch: String,
    view: View,
    selectors: HashMap<SelectorId, Selected>,
    by_text: HashMap<Arc<str>, SelectorId>,
    last_id: u32,
    connected: bool,
    /// Subscriptions that are to be made or ended.
    orders: VecDeque<Up>,
    pub(super) ordered: Arc<Notify>,
    /// Objects told that could not be read.
    pub(super) unreadable: u64,
}

impl Default for Mirror {
    fn default() -> Self {
        Self {
            epoch: String::new(),
            view: View::beginning(0),
            selectors: HashMap::new(),
            by_text: HashMap::new(),
            last_id: 0,
            connected: false,
            orders: VecDeque::new(),
            ordered: Arc::default(),
            unreadable: 0,
        }
    }
}

impl Mirror {
    pub(super) fn epoch(&self) -> &str {
        &self.epoch
    }

    pub(super) fn revision(&self) -> u64 {
        self.view.revision
    }

    /// Whether a barrier was ever heard.
    pub(super) fn is_ready(&self) -> bool {
        !self.epoch.is_empty()
    }

    pub(super) fn is_connected(&self) -> bool {
        self.connected
    }

    pub(super) fn selectors(&self) -> usize {
        self.selectors.len()
    }

    /// Whether there is somebody to be asked. Whose barrier waits for an answer that will not come hears it without.
    pub(super) fn set_connected(&mut self, connected: bool) {
        self.connected = connected;
        if !connected {
            let unanswered = self.selectors.values().filter(|one| one.members.is_none());
            unanswered.flat_map(|one| one.readers.values()).for_each(|reader| reader.wake.notify_one());
        }
    }

    /// All subscriptions, for a new connection, and which of them resume: of those all has to be heard before what is known
    /// can move to another revision.
    pub(super) fn resume(&mut self) -> (Vec<Up>, HashSet<u32>) {
        self.orders.clear();
        let revision = self.view.revision;
        let subscribe = |(id, one): (&SelectorId, &Selected)| {
            let revision = if one.members.is_some() { revision } else { 0 };
            Up::Subscribe(Subscribe { handle: id.0, selector: one.text.to_string(), revision })
        };
        let known = self.selectors.iter().filter(|(_, one)| one.members.is_some()).map(|(id, _)| id.0);
        (self.selectors.iter().map(subscribe).collect(), known.collect())
    }

    /// What has been ordered since.
    pub(super) fn take_orders(&mut self) -> Vec<Up> {
        self.orders.drain(..).collect()
    }

    /// Ends subscriptions that nobody has read for long.
    pub(super) fn forget_idle(&mut self, now: Instant) {
        let idle = |one: &Selected| {
            one.idle_since.is_some_and(|since| now.saturating_duration_since(since) >= IDLE_TIME_MAX)
        };
        let gone: Vec<_> = self.selectors.iter().filter(|(_, one)| idle(one)).map(|(id, _)| *id).collect();
        gone.into_iter().for_each(|id| self.forget(id));
    }

    fn forget(&mut self, id: SelectorId) {
        let Some(gone) = self.selectors.remove(&id) else { return };
        self.by_text.remove(&gone.text);
        self.orders.push_back(Up::Unsubscribe(Unsubscribe { handle: id.0 }));
        self.ordered.notify_one();
    }

    /// Moves everything to a revision at once. Answers whether that is another repository, of which no session knows anything.
    pub(super) fn take_in(&mut self, epoch: &str, batch: Batch, revision: u64) -> bool {
        let first = self.epoch != epoch;
        let other = first && self.is_ready();
        if first {
            epoch.clone_into(&mut self.epoch);
            self.view = View::beginning(revision);
            for one in self.selectors.values_mut() {
                one.members = None;
                one.log = ChangeLog::new(revision, SELECTOR_LOG_LEN_MAX);
            }
        }
        let changes = self.resources(batch.resources, revision);
        let mut heard: BTreeMap<u32, Heard> = BTreeMap::new();
        for members in batch.members {
            let one = heard.entry(members.handle).or_default();
            if members.snapshot {
                *one = Heard { snapshot: true, changes: BTreeMap::new() };
            }
            one.changes.extend(members.leaves.iter().map(|name| (name.as_str().into(), None)));
            one.changes
                .extend(members.joins.iter().map(|join| (join.entity.as_str().into(), Some(member(join)))));
        }
        for (handle, heard) in heard {
            if let Some(selected) = self.selectors.get_mut(&SelectorId(handle)) {
                selected.take_in(SelectorId(handle), heard, revision);
            }
        }
        // A site is small enough to be woken together.
        let Hearers { concerned, others } = self.view.commit(changes, revision, clock::now_ms());
        concerned.iter().chain(&others).for_each(|session| session.wake.notify_one());
        other
    }

    /// What differs from what is known.
    fn resources(&mut self, heard: Vec<proto::Resources>, revision: u64) -> Vec<Decoded> {
        let mut now: BTreeMap<ObjectKey, Option<Resource>> = BTreeMap::new();
        for resources in heard {
            let (mut named, mut all_read) = (BTreeSet::new(), true);
            let mut read = Vec::with_capacity(resources.upserts.len());
            for json in &resources.upserts {
                match Resource::from_json_text(json) {
                    Ok(resource) => read.push(resource),
                    Err(problems) => {
                        let error = problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ");
                        tracing::error!(error, "an object from the controller cannot be read");
                        self.unreadable += 1;
                        all_read = false;
                    }
                }
            }
            if resources.snapshot {
                now.clear();
                named.extend(read.iter().map(Resource::key));
                // Of what cannot be read the name is not known: then nothing is taken for gone.
                if all_read {
                    let known = self.view.objects().filter(|object| object.modified > 0);
                    let gone = known.map(|object| object.resource.key()).filter(|key| !named.contains(key));
                    now.extend(gone.map(|key| (key, None)));
                }
            }
            now.extend(read.into_iter().map(|resource| (resource.key(), Some(resource))));
            now.extend(resources.removes.iter().filter_map(object_key).map(|key| (key, None)));
        }
        let view = &self.view;
        let differs = |(key, now): &(ObjectKey, Option<Resource>)| match (view.get(key), now) {
            (Some(before), Some(now)) => *before.json() != now.to_json_text(),
            (before, now) => before.is_some() || now.is_some(),
        };
        let changes = now.into_iter().filter(differs);
        changes.map(|(key, now)| Decoded::told(key, now, revision)).collect()
    }
}

impl Selected {
    fn take_in(&mut self, id: SelectorId, heard: Heard, revision: u64) {
        let Heard { snapshot, mut changes } = heard;
        let Some(members) = &mut self.members else {
            let joined = changes.into_iter().filter_map(|(name, now)| Some((name, now?)));
            self.members = Some(joined.collect());
            self.log = ChangeLog::new(revision, SELECTOR_LOG_LEN_MAX);
            self.readers.values().for_each(|reader| reader.note(id));
            return;
        };
        if snapshot {
            let gone: Vec<_> = members.keys().filter(|name| !changes.contains_key(*name)).cloned().collect();
            changes.extend(gone.into_iter().map(|name| (name, None)));
        }
        let mut concerned: Vec<(Host, Host)> = Vec::new();
        for (name, now) in changes {
            if members.get(&name) == now.as_ref() {
                continue;
            }
            let after = now.as_ref().and_then(|now| now.host.clone());
            let before = match now {
                Some(now) => members.insert(Arc::clone(&name), now),
                None => members.remove(&name),
            };
            let before = before.and_then(|before| before.host);
            self.log.push(revision, (name, before.clone()));
            concerned.push((before, after));
        }
        for reader in self.readers.values() {
            let left_out = |(before, after): &(Host, Host)| {
                reader.audience.leaves_out_change(before.as_deref(), after.as_deref())
            };
            if !concerned.iter().all(left_out) {
                reader.note(id);
            }
        }
    }
}

impl Source for Mirror {
    fn view(&self) -> &View {
        &self.view
    }

    fn view_mut(&mut self) -> &mut View {
        &mut self.view
    }

    fn answers(&self, id: SelectorId) -> Answers {
        let answered = self.selectors.get(&id).is_some_and(|one| one.members.is_some());
        match (answered, self.connected) {
            (true, _) => Answers::Now,
            (false, true) => Answers::Soon,
            (false, false) => Answers::Later,
        }
    }

    fn subscribe(&mut self, selector: &Selector, subscriber: &Arc<Subscriber>) -> Result<SelectorId, Status> {
        let text = selector.canonical();
        let id = match self.by_text.get(text) {
            Some(id) => *id,
            None => {
                self.make_room()?;
                self.last_id += 1;
                let (id, text) = (SelectorId(self.last_id), Arc::clone(text));
                self.by_text.insert(Arc::clone(&text), id);
                let subscribe = Subscribe { handle: id.0, selector: text.to_string(), revision: 0 };
                let log = ChangeLog::new(self.view.revision, SELECTOR_LOG_LEN_MAX);
                let (members, readers, idle_since) = (None, HashMap::new(), None);
                self.selectors.insert(id, Selected { text, members, log, readers, idle_since });
                // Whoever connects asks for all of them.
                if self.connected {
                    self.orders.push_back(Up::Subscribe(subscribe));
                    self.ordered.notify_one();
                }
                id
            }
        };
        if let Some(selected) = self.selectors.get_mut(&id) {
            selected.readers.insert(subscriber.id, Arc::clone(subscriber));
            selected.idle_since = None;
        }
        Ok(id)
    }

    fn unsubscribe(&mut self, id: SelectorId, session: SessionId, still_read: bool) {
        if still_read {
            return;
        }
        if let Some(selected) = self.selectors.get_mut(&id) {
            selected.readers.remove(&session);
            if selected.readers.is_empty() {
                selected.idle_since = Some(Instant::now());
            }
        }
    }

    fn members_since(&self, id: SelectorId, to: &Audience, revision: u64) -> Option<Difference> {
        let selected = self.selectors.get(&id)?;
        let members = selected.members.as_ref()?;
        if revision > self.view.revision {
            return None;
        }
        let mut changed: BTreeMap<Name, Vec<Host>> = BTreeMap::new();
        for (name, before) in selected.log.since(revision)? {
            changed.entry(name).or_default().push(before);
        }
        let own = |host: &Host| host.as_ref().is_some_and(|host| to.leaves_out(host));
        let mut difference = Difference::default();
        for (name, before) in changed {
            match members.get(&name).filter(|now| !own(&now.host)) {
                Some(now) => difference.joins.push(now.clone()),
                // It was on its own host only: never told.
                None if before.iter().all(own) => {}
                None => difference.leaves.push(name),
            }
        }
        Some(difference)
    }

    fn members(&self, id: SelectorId, to: &Audience) -> Vec<Member> {
        let members = self.selectors.get(&id).and_then(|one| one.members.as_ref());
        let all = members.into_iter().flat_map(BTreeMap::values);
        all.filter(|one| one.host.as_ref().is_none_or(|host| !to.leaves_out(host))).cloned().collect()
    }
}

impl Mirror {
    /// For one more selector, at the cost of whichever has been idle for longest.
    fn make_room(&mut self) -> Result<(), Status> {
        if self.selectors.len() < RELAY_SUBSCRIPTIONS_MAX {
            return Ok(());
        }
        let idle = self.selectors.iter().filter_map(|(id, one)| Some((one.idle_since?, *id)));
        match idle.min() {
            Some((_, id)) => self.forget(id),
            None => {
                let message =
                    format!("this relay's agents have {RELAY_SUBSCRIPTIONS_MAX} subscriptions already");
                return Err(Status::resource_exhausted(message));
            }
        }
        Ok(())
    }
}

fn object_key(wire: &proto::ObjectKey) -> Option<ObjectKey> {
    let kind = Kind::parse(&wire.kind)?;
    let namespace = (!wire.namespace.is_empty()).then(|| wire.namespace.clone());
    Some(ObjectKey { kind, namespace, name: wire.name.clone() })
}

fn member(wire: &proto::Member) -> Member {
    Member {
        entity: wire.entity.as_str().into(),
        host: (!wire.host.is_empty()).then(|| wire.host.as_str().into()),
        join: joining(wire),
    }
}

#[cfg(test)]
mod tests;
