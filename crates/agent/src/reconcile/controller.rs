//! The agent's side of the conversation: what is heard goes into the engine at each Synced, what is wanted and
//! what runs here goes out.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bulkhead_engine::Member;
use bulkhead_model::{Entity, Kind, ObjectKey, Resource, Selector};
use bulkhead_wire::proto::agent_message::Body as Out;
use bulkhead_wire::proto::controller_message::Body as In;
use bulkhead_wire::proto::{
    AgentMessage, AgentStatus, Inventory, InventoryAck, Members, NotEnforced, Resources, Subscribe,
    Unsubscribe, Welcome,
};
use bulkhead_wire::{PROTOCOL, port_from_wire, prefix_from_wire};
use tokio::sync::mpsc;

use super::Agent;
use crate::address_book::Owner;
use crate::disk::KnownMembers;
use crate::session::{Progress, SessionEvent};

/// An open stream.
pub(super) struct Link {
    outgoing: mpsc::Sender<AgentMessage>,
    /// The controller's epoch, once it has said Welcome.
    epoch: Option<String>,
    subscriptions: BTreeMap<Selector, u32>,
    selectors: BTreeMap<u32, Selector>,
    /// What the engine asked for when all of it was subscribed to and nothing else.
    followed: Option<u64>,
    next_handle: u32,
    /// Subscriptions whose first answer has not arrived.
    unanswered: BTreeSet<u32>,
    /// Heard since the last Synced.
    buffer: Vec<In>,
    /// Workloads that the controller has been told of.
    published: Option<BTreeMap<String, Resource>>,
    generation: u64,
    last_status: Option<AgentStatus>,
    status_due: Instant,
    status_told: Instant,
    /// A status is held back since only its revision is another.
    status_owed: bool,
    heartbeat_ms: u64,
}

/// A status that differs from the last one in nothing but how far it is waits until this long after it: in a busy fleet
/// one for each change would be as many messages as the changes themselves.
const STATUS_EVERY: Duration = Duration::from_millis(500);

/// Completes then, or never.
pub(super) async fn at(moment: Option<Instant>) {
    match moment {
        Some(moment) => tokio::time::sleep_until(moment.into()).await,
        None => std::future::pending().await,
    }
}

impl Agent {
    pub(super) fn session_event(&mut self, event: SessionEvent) {
        match event {
            SessionEvent::Connected(outgoing) => {
                self.link = Some(Link {
                    outgoing,
                    epoch: None,
                    subscriptions: BTreeMap::new(),
                    selectors: BTreeMap::new(),
                    followed: None,
                    next_handle: 1,
                    unanswered: BTreeSet::new(),
                    buffer: Vec::new(),
                    published: None,
                    generation: 0,
                    last_status: None,
                    status_due: Instant::now(),
                    status_told: Instant::now(),
                    status_owed: false,
                    heartbeat_ms: 10_000,
                });
            }
            SessionEvent::Lost { reason, retry } => {
                self.link = None;
                if self.disconnected_because.as_ref() != Some(&reason) {
                    let controller = self.conversation.membership.controller();
                    tracing::warn!(
                        controller,
                        reason,
                        retry_ms = retry.as_millis(),
                        "no controller: enforcing what is known, trying again"
                    );
                }
                self.disconnected_because = Some(reason);
            }
            SessionEvent::Message(message) => match message.body {
                Some(In::Welcome(welcome)) => self.welcome(&welcome),
                Some(In::Synced(synced)) => self.synced(synced.revision),
                Some(In::InventoryAck(ack)) => self.inventory_ack(ack),
                Some(heard @ (In::Resources(_) | In::Members(_))) => {
                    if let Some(link) = &mut self.link {
                        link.buffer.push(heard);
                    }
                }
                // For relays, or a newer controller's words that an older agent need not know.
                Some(In::Revocations(_)) | None => {}
            },
        }
    }

    fn welcome(&mut self, welcome: &Welcome) {
        if welcome.protocol != PROTOCOL {
            let reason =
                format!("the controller speaks protocol {}, this agent {PROTOCOL}", welcome.protocol);
            tracing::error!(reason, "cannot work with this controller");
            self.disconnected_because = Some(reason);
            self.link = None;
            return;
        }
        tracing::info!(controller = welcome.controller, revision = welcome.revision, "connected");
        self.disconnected_because = None;
        if let Some(link) = &mut self.link {
            link.epoch = Some(welcome.epoch.clone());
            link.heartbeat_ms = u64::from(welcome.heartbeat_ms).max(1_000);
        }
        self.follow_wanted();
        self.publish();
        self.tell_status();
    }

    /// All that was asked for has arrived as of `revision`.
    fn synced(&mut self, revision: u64) {
        let Some(link) = &mut self.link else { return };
        let Some(epoch) = link.epoch.clone() else { return };
        for heard in std::mem::take(&mut link.buffer) {
            match heard {
                In::Resources(resources) => self.resources_heard(&resources),
                In::Members(members) => self.members_heard(&members),
                In::Welcome(_) | In::Synced(_) | In::InventoryAck(_) | In::Revocations(_) => {}
            }
        }
        // The barrier speaks of what had been subscribed to when it was sent. Members that are remembered, but not
        // asked about yet (after a boot nothing is wanted until the sources have answered) or not answered yet, are
        // still as of the revision before.
        let answered = self.link.as_ref().is_some_and(|link| {
            let asked = |selector| link.subscriptions.contains_key(selector);
            link.unanswered.is_empty() && self.members.keys().all(asked)
        });
        let members = if answered {
            revision
        } else if self.progress.epoch == epoch {
            self.progress.members
        } else {
            0
        };
        self.progress = Progress { epoch, revision, members };
        self.conversation.progress.send_replace(self.progress.clone());
        self.unsaved.progress = Some(self.progress.clone());
        self.engine.set_revision(revision);
        self.dirty = true;
    }

    fn resources_heard(&mut self, heard: &Resources) {
        let mut named = BTreeSet::new();
        for json in &heard.upserts {
            let parsed = Resource::from_json_text(json).map_err(|problems| join(&problems));
            match parsed {
                Ok(resource) => {
                    let key = resource.key();
                    self.refused.remove(&key.to_string());
                    self.set_resource(&key, Some(resource.clone()));
                    named.insert(key.clone());
                    self.unsaved.resources.insert(key, Some(resource));
                }
                Err(reason) => {
                    // DESIGN 4.14: the last good form of it, if there is one, stays in force.
                    let name = name_of(json);
                    tracing::error!(
                        resource = name,
                        reason,
                        "a resource from the controller is not understood"
                    );
                    named.extend(self.resources.iter().filter(|key| key.to_string() == name).cloned());
                    self.refused.insert(name, format!("refused at revision {}: {reason}", heard.revision));
                }
            }
        }
        let mut gone: Vec<ObjectKey> = heard.removes.iter().filter_map(object_key).collect();
        if heard.snapshot {
            gone.extend(self.resources.difference(&named).cloned());
        }
        for key in gone {
            self.set_resource(&key, None);
            self.refused.remove(&key.to_string());
            self.unsaved.resources.insert(key, None);
        }
    }

    fn members_heard(&mut self, heard: &Members) {
        let Some(link) = &mut self.link else { return };
        link.unanswered.remove(&heard.handle);
        // An answer to a question that was taken back meanwhile.
        let Some(selector) = link.selectors.get(&heard.handle).cloned() else { return };
        let joins: Vec<Member> = heard.joins.iter().map(member).collect();
        if heard.snapshot {
            let known = joins.into_iter().map(|member| (Arc::clone(&member.entity), member)).collect();
            self.remember(&selector, known);
            let known = self.members.get(&selector).cloned();
            self.unsaved.members.retain(|(of, _), _| *of != selector);
            self.unsaved.selectors.insert(selector.clone(), known.clone());
            self.engine.set_members(&selector, known.unwrap_or_default().into_values());
            return;
        }
        let leaves: Vec<Arc<str>> = heard.leaves.iter().map(|name| name.as_str().into()).collect();
        let known = self.members.entry(selector.clone()).or_default();
        for name in &leaves {
            if let Some(old) = known.remove(name) {
                self.book.remove(&owner(&old), &old.prefixes);
            }
            self.unsaved.members.insert((selector.clone(), Arc::clone(name)), None);
        }
        for member in &joins {
            self.book.add(&owner(member), &member.prefixes);
            if let Some(old) = known.insert(Arc::clone(&member.entity), member.clone()) {
                self.book.remove(&owner(&old), &old.prefixes);
            }
            let key = (selector.clone(), Arc::clone(&member.entity));
            self.unsaved.members.insert(key, Some(member.clone()));
        }
        // A whole state that is not on disk yet is written with these changes in it.
        if let Some(Some(whole)) = self.unsaved.selectors.get_mut(&selector) {
            whole.clone_from(known);
        }
        self.engine.change_members(&selector, joins, leaves);
    }

    /// Takes a selector's members as known, without telling the engine.
    pub(super) fn remember(&mut self, selector: &Selector, known: KnownMembers) {
        for member in known.values() {
            self.book.add(&owner(member), &member.prefixes);
        }
        let old = self.members.insert(selector.clone(), known);
        for member in old.iter().flat_map(BTreeMap::values) {
            self.book.remove(&owner(member), &member.prefixes);
        }
    }

    /// Subscribes to what the engine wants and to nothing else; members that are remembered are given to the
    /// engine at once. Answers whether the engine was given any.
    pub(super) fn follow_wanted(&mut self) -> bool {
        let asks = Some(self.engine.asks());
        if self.link.as_ref().is_some_and(|link| link.followed == asks) {
            return false;
        }
        let wanted: BTreeSet<Selector> = self.engine.wanted().cloned().collect();
        let mut answered = false;
        for selector in self.engine.waiting() {
            if let Some(known) = self.members.get(&selector) {
                self.engine.set_members(&selector, known.values().cloned());
                answered = true;
            }
        }
        let unwanted: Vec<_> =
            self.members.keys().filter(|selector| !wanted.contains(*selector)).cloned().collect();
        // Before the first tables are computed nothing is wanted yet; what is remembered must wait for them. And without
        // a controller nobody could tell it again: after a boot the agent is there before its workloads.
        let connected = self.link.as_ref().is_some_and(|link| link.epoch.is_some());
        if self.programmed && connected {
            for selector in unwanted {
                self.remember(&selector, KnownMembers::new());
                self.members.remove(&selector);
                self.unsaved.members.retain(|(of, _), _| *of != selector);
                self.unsaved.selectors.insert(selector, None);
            }
            if let Some(link) = &mut self.link {
                link.followed = asks;
            }
        }
        self.update_subscriptions(&wanted);
        answered
    }

    fn update_subscriptions(&mut self, wanted: &BTreeSet<Selector>) {
        let Some(link) = &mut self.link else { return };
        let Some(epoch) = &link.epoch else { return };
        let same_epoch = *epoch == self.progress.epoch;
        let mut out = Vec::new();
        let stale: Vec<_> =
            link.subscriptions.keys().filter(|selector| !wanted.contains(*selector)).cloned().collect();
        for selector in stale {
            if let Some(handle) = link.subscriptions.remove(&selector) {
                link.selectors.remove(&handle);
                link.unanswered.remove(&handle);
                out.push(Out::Unsubscribe(Unsubscribe { handle }));
            }
        }
        for selector in wanted {
            if link.subscriptions.contains_key(selector) {
                continue;
            }
            let handle = link.next_handle;
            link.next_handle += 1;
            link.subscriptions.insert(selector.clone(), handle);
            link.selectors.insert(handle, selector.clone());
            link.unanswered.insert(handle);
            let known = same_epoch && self.members.contains_key(selector);
            let revision = if known { self.progress.members } else { 0 };
            out.push(Out::Subscribe(Subscribe { handle, selector: selector.to_string(), revision }));
        }
        out.into_iter().for_each(|body| self.send(body));
    }

    /// Sends, or ends a stream that is too slow: it resumes from what is known.
    fn send(&mut self, body: Out) {
        let Some(link) = &self.link else { return };
        if let Err(error) = link.outgoing.try_send(AgentMessage { body: Some(body) }) {
            tracing::warn!(%error, "the stream to the controller is too slow or closed");
            self.link = None;
        }
    }

    /// Tells the controller which workloads run here: all of them once, differences from then on.
    pub(super) fn publish(&mut self) {
        if !self.sources_have_answered() {
            return;
        }
        let Some(link) = &mut self.link else { return };
        if link.epoch.is_none() {
            return;
        }
        let now = &self.locals.workloads;
        let nothing = BTreeMap::new();
        let before = link.published.as_ref().unwrap_or(&nothing);
        let complete = link.published.is_none();
        let changed = now.iter().filter(|(name, workload)| before.get(*name) != Some(workload));
        let upserts: Vec<_> = changed.map(|(_, workload)| workload.to_json_text().into()).collect();
        let removes: Vec<_> = before.keys().filter(|name| !now.contains_key(*name)).cloned().collect();
        if !complete && upserts.is_empty() && removes.is_empty() {
            return;
        }
        link.generation += 1;
        let inventory = Inventory { generation: link.generation, complete, upserts, removes };
        link.published = Some(now.clone());
        self.send(Out::Inventory(inventory));
    }

    fn inventory_ack(&mut self, ack: InventoryAck) {
        for refused in ack.refused {
            tracing::error!(
                workload = refused.name,
                reason = refused.reason,
                "the controller did not accept a workload: others will not know it"
            );
            self.refused.insert(format!("Workload/{}", refused.name), refused.reason);
        }
    }

    pub(super) fn heartbeat(&mut self) {
        if let Some(link) = &mut self.link
            && Instant::now() >= link.status_due
        {
            link.last_status = None;
            self.tell_status();
        }
    }

    /// When the status that is held back is due.
    pub(super) fn status_owed_at(&self) -> Option<Instant> {
        self.link.as_ref().filter(|link| link.status_owed).map(|link| link.status_told + STATUS_EVERY)
    }

    /// Sends the status if it is another than the last.
    pub(super) fn tell_status(&mut self) {
        if self.link.as_ref().is_none_or(|link| link.epoch.is_none()) {
            return;
        }
        let policy = self.engine.policy();
        let status = AgentStatus {
            revision: if self.programmed { policy.revision } else { 0 },
            endpoints: u32::try_from(policy.endpoints.len()).unwrap_or(u32::MAX),
            not_enforced: self
                .not_enforced()
                .into_iter()
                .map(|entry| NotEnforced { subject: entry.subject, reason: entry.reason })
                .collect(),
            dataplane: self.dataplane.name().into(),
            entries: self.entries_written,
            told: None,
        };
        let Some(link) = &mut self.link else { return };
        link.status_owed = false;
        if link.last_status.as_ref() == Some(&status) {
            return;
        }
        let how_far = |last: &AgentStatus| AgentStatus {
            revision: status.revision,
            entries: status.entries,
            ..last.clone()
        };
        let waits = link.last_status.as_ref().is_some_and(|last| how_far(last) == status);
        link.status_owed = waits && link.status_told.elapsed() < STATUS_EVERY;
        if link.status_owed {
            return;
        }
        link.status_told = Instant::now();
        link.last_status = Some(status.clone());
        link.status_due = Instant::now() + Duration::from_millis(link.heartbeat_ms / 2);
        self.send(Out::Status(status));
    }
}

/// Whose address it is, for the address book.
pub(super) fn owner_of(entity: &Entity) -> Owner {
    Owner { entity: Arc::clone(&entity.name), host: entity.host.clone() }
}

fn owner(member: &Member) -> Owner {
    Owner { entity: Arc::clone(&member.entity), host: member.host.clone() }
}

fn member(wire: &bulkhead_wire::proto::Member) -> Member {
    let prefixes = wire.prefixes.iter().filter_map(|prefix| match prefix_from_wire(prefix) {
        Ok(prefix) => Some(prefix),
        Err(error) => {
            tracing::error!(entity = wire.entity, %error, "an address from the controller is not valid");
            None
        }
    });
    let host = (!wire.host.is_empty()).then(|| wire.host.as_str().into());
    let ports = wire.ports.iter().filter_map(port_from_wire).collect();
    Member { entity: wire.entity.as_str().into(), host, prefixes: prefixes.collect(), ports }
}

fn object_key(wire: &bulkhead_wire::proto::ObjectKey) -> Option<ObjectKey> {
    let kind = Kind::parse(&wire.kind)?;
    let namespace = (!wire.namespace.is_empty()).then(|| wire.namespace.clone());
    Some(ObjectKey { kind, namespace, name: wire.name.clone() })
}

fn join(problems: &[bulkhead_model::Problem]) -> String {
    problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}

/// `Kind/name` of a resource that could not be read as one.
fn name_of(json: &[u8]) -> String {
    let value: serde_json::Value = serde_json::from_slice(json).unwrap_or_default();
    let text =
        |pointer: &str| value.pointer(pointer).and_then(|text| text.as_str()).unwrap_or("?").to_owned();
    let namespace = value.pointer("/metadata/namespace").and_then(|text| text.as_str());
    let namespace = namespace.map(|namespace| format!("{namespace}/")).unwrap_or_default();
    format!("{}/{namespace}{}", text("/kind"), text("/metadata/name"))
}

#[cfg(test)]
mod tests {
    use bulkhead_dataplane::fake::FakeDataplane;
    use bulkhead_wire::proto::{ControllerMessage, Synced};
    use tokio::sync::watch;

    use bulkhead_model::Facts;

    use super::*;
    use crate::session::Conversation;
    use crate::{Config, disk, flows};

    fn hears(agent: &mut Agent, body: In) {
        agent.session_event(SessionEvent::Message(ControllerMessage { body: Some(body) }));
    }

    /// After a boot the controller answers before the sources have: what is remembered is not wanted yet.
    #[tokio::test]
    async fn a_barrier_says_nothing_about_members_that_were_not_asked_for() {
        let directory = tempfile::tempdir().unwrap();
        let (disk, mut remembered) = disk::open(directory.path(), "boot").unwrap();
        let selector = Selector::parse("role == 'a'").unwrap();
        remembered.progress = Progress { epoch: "e".into(), revision: 5, members: 5 };
        remembered.members.insert(selector, KnownMembers::new());
        let config = Arc::new(Config { state_directory: directory.path().into(), ..Config::default() });
        let membership = Arc::new(crate::membership::open(&config).unwrap());
        let flows = flows::spawn(&membership);
        let progress = watch::channel(Progress::default()).0;
        let session = Conversation { progress, membership, task: tokio::spawn(async {}) };
        let dataplane = Box::new(FakeDataplane::default());
        let mut agent = Agent::new(config, Facts::new(), dataplane, disk, remembered, session, flows);
        let (outgoing, _sent) = mpsc::channel(8);
        agent.session_event(SessionEvent::Connected(outgoing));
        hears(
            &mut agent,
            In::Welcome(Welcome { protocol: PROTOCOL, epoch: "e".into(), ..Welcome::default() }),
        );
        hears(&mut agent, In::Synced(Synced { revision: 9 }));
        assert_eq!((agent.progress.revision, agent.progress.members), (9, 5));
    }
}
