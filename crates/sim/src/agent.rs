//! One simulated agent, without its connection: what it hears goes into the engine at each Synced, what it wants and
//! what runs on its host goes out. The order of things is that of the real agent (`agent::reconcile`).

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use bulkhead_engine::{Assembly, HostEngine, Member};
use bulkhead_model::selector::Restriction;
use bulkhead_model::{Entity, Labels, ObjectKey, Prefix, Resource, Selector};
use bulkhead_wire::proto::agent_message::Body as Out;
use bulkhead_wire::proto::controller_message::Body as In;
use bulkhead_wire::proto::{
    AgentStatus, Hello, Inventory, InventoryAck, Members, Resources, Subscribe, Unsubscribe, Welcome,
};
use bulkhead_wire::{PACKING, PROTOCOL, port_from_wire, prefix_from_wire};

use crate::catalogue::{Known, Shared};
use crate::fleet::{Fleet, Instance, Slice, number_of, start_of};
use crate::tracker::{Becomes, EventId};
use crate::world::World;

mod locals;

pub(crate) use locals::Change;

/// As the real agent holds a status back that differs in nothing but its revision.
const STATUS_EVERY: Duration = Duration::from_millis(500);

/// An open stream.
#[derive(Debug, Default)]
struct Link {
    epoch: Option<String>,
    handles: BTreeMap<Selector, u32>,
    selectors: BTreeMap<u32, Selector>,
    next_handle: u32,
    unanswered: BTreeSet<u32>,
    buffer: Vec<In>,
    generation: u64,
    /// Events of the inventories that were not acknowledged yet, with the number of starts in each.
    published: VecDeque<(u64, Vec<EventId>, u32)>,
    synced: bool,
    /// What the engine asked for when it was subscribed to.
    asks: Option<u64>,
    last_status: Option<AgentStatus>,
    status_told: Option<Instant>,
    status_owed: bool,
    heartbeat: Duration,
}

/// One host.
#[derive(Debug)]
pub(crate) struct Agent {
    pub(crate) number: u32,
    pub(crate) world: Arc<World>,
    /// Whether anybody waits for it: not for one that reads slowly on purpose.
    pub(crate) counts: bool,
    engine: HostEngine,
    assembly: Assembly,
    pub(crate) known: Known,
    running: BTreeMap<u32, Instance>,
    /// Generations of what runs no more: a start is never taken for an earlier one.
    generations: BTreeMap<u32, u32>,
    pub(crate) members: BTreeMap<Selector, BTreeMap<Arc<str>, Vec<Prefix>>>,
    epoch: String,
    revision: u64,
    members_revision: u64,
    link: Option<Link>,
    pub(crate) settled: bool,
}

/// The application that a selector reads, and whether only those of its workloads that are ready.
fn reads(selector: &Selector) -> Option<(u32, bool)> {
    let Restriction::OneOf(label, values) = selector.restriction() else { return None };
    let number = values.first()?.strip_prefix('a')?.parse().ok()?;
    (&*label == "app").then(|| (number, selector.reads("state")))
}

impl Agent {
    /// With the workloads that run from the beginning.
    pub(crate) fn new(number: u32, world: Arc<World>, slices: impl IntoIterator<Item = Slice>) -> Self {
        let mut agent = Self {
            number,
            counts: !Fleet::is_slow(number),
            engine: HostEngine::new(world.fleet.host(number)),
            assembly: Assembly::default(),
            known: Known::default(),
            running: BTreeMap::new(),
            generations: BTreeMap::new(),
            members: BTreeMap::new(),
            epoch: String::new(),
            revision: 0,
            members_revision: 0,
            link: None,
            settled: false,
            world,
        };
        for workload in slices.into_iter().flat_map(Slice::workloads) {
            agent.start(workload);
        }
        agent
    }

    pub(crate) fn host(&self) -> &Arc<str> {
        self.world.fleet.host(self.number)
    }

    /// Workloads that run here now.
    pub(crate) fn running(&self) -> impl Iterator<Item = Resource> + '_ {
        self.running.iter().map(|(number, instance)| self.world.fleet.workload(*number, *instance))
    }

    /// What the engine asks for.
    pub(crate) fn wanted(&self) -> impl Iterator<Item = &Selector> {
        self.engine.wanted()
    }

    /// Addresses in its tables.
    pub(crate) fn knows_address(&self, prefix: Prefix) -> bool {
        self.engine.policy().addresses.contains_key(&prefix)
    }

    /// A stream is open: what to say first.
    pub(crate) fn connected(&mut self) -> Hello {
        self.link = Some(Link { next_handle: 1, ..Link::default() });
        Hello {
            protocol: PROTOCOL,
            host: self.host().to_string(),
            version: env!("CARGO_PKG_VERSION").into(),
            epoch: self.epoch.clone(),
            revision: self.revision,
            accepts: vec![PACKING.into()],
            ..Hello::default()
        }
    }

    /// The stream is closed.
    pub(crate) fn disconnected(&mut self) {
        let Some(link) = self.link.take() else { return };
        for selector in link.handles.iter().filter(|(_, handle)| !link.unanswered.contains(handle)) {
            self.ignores(selector.0);
        }
        self.world.tracker.away(self.number);
        let events = link.published.into_iter().flat_map(|(_, events, _)| events);
        events.for_each(|event| self.world.tracker.abandon(event));
        self.settle(false);
    }

    fn settle(&mut self, settled: bool) {
        if self.settled != settled {
            self.settled = settled;
            self.world.settled.send_modify(|count| if settled { *count += 1 } else { *count -= 1 });
        }
    }

    fn reads(&self, selector: &Selector) {
        if let Some((application, readiness)) = reads(selector).filter(|_| self.counts) {
            self.world.tracker.reads(self.number, application, readiness);
        }
    }

    fn ignores(&self, selector: &Selector) {
        if let Some((application, readiness)) = reads(selector).filter(|_| self.counts) {
            self.world.tracker.ignores(self.number, application, readiness);
        }
    }

    /// What to answer to a message.
    pub(crate) fn hears(&mut self, message: In) -> anyhow::Result<Vec<Out>> {
        let Some(link) = &mut self.link else { return Ok(Vec::new()) };
        match message {
            In::Welcome(welcome) => Ok(self.welcome(welcome)),
            In::Synced(synced) => self.synced(synced.revision),
            In::InventoryAck(ack) => {
                self.acknowledged(&ack);
                Ok(Vec::new())
            }
            heard @ (In::Resources(_) | In::Members(_)) => {
                link.buffer.push(heard);
                Ok(Vec::new())
            }
            // For relays.
            In::Revocations(_) => Ok(Vec::new()),
        }
    }

    fn welcome(&mut self, welcome: Welcome) -> Vec<Out> {
        let Some(link) = &mut self.link else { return Vec::new() };
        link.epoch = Some(welcome.epoch);
        link.heartbeat = Duration::from_millis(u64::from(welcome.heartbeat_ms) / 2);
        link.generation = 1;
        link.published.push_back((1, Vec::new(), 0));
        let upserts = self.running().map(|workload| text(&workload)).collect();
        let inventory = Inventory { generation: 1, complete: true, upserts, removes: Vec::new() };
        let mut out = self.subscriptions();
        out.push(Out::Inventory(inventory));
        out
    }

    fn synced(&mut self, revision: u64) -> anyhow::Result<Vec<Out>> {
        let Some(link) = &mut self.link else { return Ok(Vec::new()) };
        let Some(epoch) = link.epoch.clone() else { return Ok(Vec::new()) };
        let asked = !link.synced || !link.unanswered.is_empty();
        link.synced = true;
        let mut heard_members = Vec::new();
        let mut heard_policies = Vec::new();
        let (mut concerned, mut unconcerned, mut policies) = (0, 0, 0);
        let mut resources = Vec::new();
        let mut resource_bytes = 0;
        for heard in std::mem::take(&mut link.buffer) {
            let bytes = heard.encoded_len() as u64;
            match heard {
                In::Resources(heard) => {
                    resource_bytes += bytes;
                    resources.push(heard);
                }
                In::Members(members) => {
                    if self.members_heard(&members, &mut heard_members) {
                        concerned += bytes;
                    } else {
                        unconcerned += bytes;
                    }
                }
                In::Welcome(_) | In::Synced(_) | In::InventoryAck(_) | In::Revocations(_) => {}
            }
        }
        if !resources.is_empty() {
            match self.resources_heard(&resources, &mut heard_policies)? {
                true => concerned += resource_bytes,
                false => policies += resource_bytes,
            }
        }
        let barrier = In::Synced(bulkhead_wire::proto::Synced { revision }).encoded_len() as u64;
        if concerned > 0 || asked {
            concerned += barrier;
        } else if policies > 0 {
            policies += barrier;
        } else {
            unconcerned += barrier;
        }
        self.world.count_bytes(concerned, unconcerned, policies);
        let answered = self.link.as_ref().is_some_and(|link| link.unanswered.is_empty());
        self.members_revision = match answered {
            true => revision,
            false if self.epoch == epoch => self.members_revision,
            false => 0,
        };
        (self.epoch, self.revision) = (epoch, revision);
        self.engine.set_revision(revision);
        let mut out = self.compute();
        self.tell(heard_members, heard_policies);
        out.extend(self.status());
        Ok(out)
    }

    /// Says to the tracker what is in the tables now.
    fn tell(&mut self, members: Vec<(u32, Becomes)>, policies: Vec<u64>) {
        let link = self.link.as_ref();
        let waits = link.is_some_and(|link| !link.unanswered.is_empty() || !link.published.is_empty());
        self.settle(!waits);
        if !self.counts {
            return;
        }
        for (workload, becomes) in members {
            let application = Slice::of_workload(workload).application();
            self.world.tracker.heard(self.number, application, workload, becomes);
        }
        policies.into_iter().for_each(|change| self.world.tracker.policy_heard(self.number, change));
    }

    /// Answers whether any of it may concern workloads here.
    fn resources_heard(&mut self, heard: &[Resources], changes: &mut Vec<u64>) -> anyhow::Result<bool> {
        let world = Arc::clone(&self.world);
        let (new, gone) = self.known.take_in(&world.catalogue, heard)?;
        let mut concerned = heard.iter().any(|message| message.snapshot);
        // Of what is for nobody here it has heard, too: a workload may have stopped since the change was made.
        changes.extend(new.iter().filter_map(|object| object.change()));
        let labels = self.distinct_labels();
        let applying: Vec<Arc<Shared>> = if concerned {
            labels.iter().flat_map(|labels| self.known.for_labels(labels)).cloned().collect()
        } else {
            let applies = |object: &&Arc<Shared>| {
                self.assembly.objects().contains_key(&object.key)
                    || labels.iter().any(|labels| object.concerns(labels))
            };
            new.iter().filter(applies).cloned().collect()
        };
        for object in applying {
            concerned = true;
            self.set_resource(&object.key, Some(object.resource.clone()));
        }
        let gone: Vec<_> = gone.into_iter().filter(|key| self.assembly.objects().contains_key(key)).collect();
        for key in gone {
            concerned = true;
            self.set_resource(&key, None);
        }
        Ok(concerned)
    }

    /// What selectors of policies can tell apart here: the first workload of a slice stands for all but the last.
    fn distinct_labels(&self) -> Vec<Labels> {
        let distinct = self.running.iter().filter(|(number, _)| {
            let slice = Slice::of_workload(**number).workloads();
            **number == slice.start || **number == slice.end - 1
        });
        let entities = distinct
            .filter_map(|(number, instance)| Entity::of(&self.world.fleet.workload(*number, *instance)));
        entities.map(|entity| entity.labels).collect()
    }

    fn set_resource(&mut self, key: &ObjectKey, resource: Option<Resource>) {
        let changes = self.assembly.set(key, resource);
        for (name, spec) in changes.tiers {
            self.engine.set_tier(&name, spec);
        }
        for (key, spec) in &changes.policies {
            self.engine.set_policy(key, spec.as_ref());
        }
        if let Some(settings) = changes.settings {
            self.engine.set_settings(settings.unwrap_or_default());
        }
    }

    /// Answers whether it is about anybody elsewhere whom this host asked about.
    fn members_heard(&mut self, heard: &Members, changes: &mut Vec<(u32, Becomes)>) -> bool {
        let Some(link) = &mut self.link else { return false };
        let awaited = link.unanswered.remove(&heard.handle);
        // An answer to a question that was taken back meanwhile.
        let Some(selector) = link.selectors.get(&heard.handle).cloned() else { return true };
        if awaited {
            self.reads(&selector);
        }
        let joins: Vec<Member> = heard.joins.iter().map(member).collect();
        let here = self.world.fleet.host(self.number);
        let elsewhere = joins.iter().any(|member| member.host.as_ref() != Some(here));
        let about_others = elsewhere || !heard.leaves.is_empty();
        let known = self.members.entry(selector.clone()).or_default();
        if heard.snapshot {
            known.clear();
        }
        for name in &heard.leaves {
            known.remove(name.as_str());
            changes.extend(number_of(name).map(|number| (number, Becomes::Stranger)));
        }
        for member in &joins {
            known.insert(Arc::clone(&member.entity), member.prefixes.clone());
            let start = member.prefixes.first().and_then(|prefix| start_of(prefix.address()));
            changes.extend(start.map(|(number, generation)| (number, Becomes::Member(generation))));
        }
        if heard.snapshot {
            self.engine.set_members(&selector, joins);
        } else {
            self.engine.change_members(
                &selector,
                joins,
                heard.leaves.iter().map(|name| name.as_str().into()),
            );
        }
        awaited || about_others
    }

    /// Brings the tables up to date, and asks for what they need.
    fn compute(&mut self) -> Vec<Out> {
        let mut out = Vec::new();
        loop {
            // Applied by nobody: the engine keeps what the kernel would have.
            let _delta = self.engine.flush();
            let mut answered = false;
            let asks = Some(self.engine.asks());
            if self.link.as_ref().is_some_and(|link| link.asks == asks) {
                if self.engine.needs_flush() {
                    continue;
                }
                break;
            }
            out.extend(self.subscriptions());
            for selector in self.engine.waiting() {
                if let Some(known) = self.members.get(&selector) {
                    let members: Vec<Member> =
                        known.iter().map(|(name, prefixes)| remembered(name, prefixes)).collect();
                    self.engine.set_members(&selector, members);
                    answered = true;
                }
            }
            if !answered && !self.engine.needs_flush() {
                break;
            }
        }
        self.world.turns.fetch_add(1, Relaxed);
        out
    }

    /// Subscribes to what the engine wants and to nothing else.
    fn subscriptions(&mut self) -> Vec<Out> {
        let mut out = Vec::new();
        let Some(link) = self.link.as_mut().filter(|link| link.epoch.is_some()) else { return out };
        link.asks = Some(self.engine.asks());
        let same_epoch = link.epoch.as_ref() == Some(&self.epoch);
        let wanted: BTreeSet<&Selector> = self.engine.wanted().collect();
        let mut dropped = Vec::new();
        if wanted.len() != link.handles.len() || !link.handles.keys().all(|known| wanted.contains(known)) {
            let stale: Vec<Selector> =
                link.handles.keys().filter(|known| !wanted.contains(*known)).cloned().collect();
            for selector in stale {
                if let Some(handle) = link.handles.remove(&selector) {
                    link.selectors.remove(&handle);
                    let answered = !link.unanswered.remove(&handle);
                    dropped.push((selector, answered));
                    out.push(Out::Unsubscribe(Unsubscribe { handle }));
                }
            }
        }
        for selector in wanted {
            if link.handles.contains_key(selector) {
                continue;
            }
            let handle = link.next_handle;
            link.next_handle += 1;
            link.handles.insert(selector.clone(), handle);
            link.selectors.insert(handle, selector.clone());
            link.unanswered.insert(handle);
            let known = same_epoch && self.members.contains_key(selector);
            let revision = if known { self.members_revision } else { 0 };
            out.push(Out::Subscribe(Subscribe { handle, selector: selector.to_string(), revision }));
        }
        // Of the others nobody tells any more what becomes of them: not since a connection before, if they were wanted then.
        self.members.retain(|selector, _| link.handles.contains_key(selector));
        for (selector, _) in dropped.into_iter().filter(|(_, answered)| *answered) {
            self.ignores(&selector);
        }
        out
    }

    /// When the next status is due: one that is held back, or a sign of life.
    pub(crate) fn status_due(&self) -> Option<Instant> {
        let link = self.link.as_ref()?;
        Some(link.status_told? + if link.status_owed { STATUS_EVERY } else { link.heartbeat })
    }

    pub(crate) fn status(&mut self) -> Option<Out> {
        let status = AgentStatus {
            revision: self.revision,
            endpoints: u32::try_from(self.running.len()).unwrap_or(u32::MAX),
            dataplane: "none".into(),
            ..AgentStatus::default()
        };
        let link = self.link.as_mut()?;
        let told = link.status_told.map(|told| told.elapsed());
        link.status_owed = false;
        if link.last_status.as_ref() == Some(&status) && told.is_some_and(|told| told < link.heartbeat) {
            return None;
        }
        link.status_owed = told.is_some_and(|told| told < STATUS_EVERY);
        if link.status_owed {
            return None;
        }
        link.status_told = Some(Instant::now());
        link.last_status = Some(status.clone());
        Some(Out::Status(status))
    }

    fn acknowledged(&mut self, ack: &InventoryAck) {
        if let Some(refused) = ack.refused.first() {
            self.world.complain(format!("{} was refused: {}", refused.name, refused.reason));
        }
        let Some(link) = &mut self.link else { return };
        while link.published.front().is_some_and(|(generation, ..)| *generation <= ack.generation) {
            let Some((_, events, starts)) = link.published.pop_front() else { break };
            events.into_iter().for_each(|event| self.world.tracker.stored(event));
            self.world.activations.fetch_add(u64::from(starts), Relaxed);
        }
        let waits = !link.unanswered.is_empty() || !link.published.is_empty() || !link.synced;
        self.settle(!waits);
    }
}

fn text(workload: &Resource) -> bytes::Bytes {
    workload.to_json_text().into()
}

fn member(wire: &bulkhead_wire::proto::Member) -> Member {
    Member {
        entity: wire.entity.as_str().into(),
        host: (!wire.host.is_empty()).then(|| wire.host.as_str().into()),
        prefixes: wire.prefixes.iter().filter_map(|prefix| prefix_from_wire(prefix).ok()).collect(),
        ports: wire.ports.iter().filter_map(port_from_wire).collect(),
    }
}

/// A member that is known from before; the fleet's names tell the host.
fn remembered(name: &Arc<str>, prefixes: &[Prefix]) -> Member {
    let host = number_of(name).and_then(|_| name.split_once('.')).map(|(_, host)| host.into());
    Member { entity: Arc::clone(name), host, prefixes: prefixes.to_vec(), ports: Vec::new() }
}
