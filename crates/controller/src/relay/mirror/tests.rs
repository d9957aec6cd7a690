//! Whatever happens in whatever order between repository, relay and agents: at each barrier an agent knows what the
//! repository said at one revision, and when nothing more is to come, what it says now.

mod model;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use bulkhead_model::entity::WorkloadSpec;
use bulkhead_model::policy::{DefaultAction, Order, TierSpec};
use bulkhead_model::resource::{Metadata, Tier, Workload};
use bulkhead_model::{Entity, Labels};
use bulkhead_store::Memory;
use bulkhead_wire::proto::controller_message::Body;
use proptest::prelude::*;

use super::super::reception::Reception;
use super::*;
use crate::access::HostPatterns;
use crate::agents::Pump;
use crate::repository::Repository;

const HOSTS: [&str; 3] = ["h1", "h2", "h3"];
const SELECTORS: [&str; 4] = ["role == 'a'", "has(role)", "bulkhead.dev/host == 'h2'", "role != 'a'"];
const EPOCHS: [&str; 2] = ["e1", "e2"];

#[derive(Debug, Clone)]
enum Step {
    /// Workload (number on host) gets a role (0: none) and an address.
    Workload(u8, u8, u8, u8),
    /// A workload moves to another host, keeping its name.
    Moves(u8, u8),
    Gone(u8, u8),
    Tier(u8, bool),
    /// So many of the relay's orders reach the controller.
    Order(usize),
    /// So many of the controller's messages reach the relay.
    Carry(usize),
    Break,
    Connect,
    /// The relay starts anew.
    Restart,
    /// The controllers' store is replaced.
    Replace,
    /// Selectors that nobody reads are given up.
    Idle,
    Subscribe(usize, usize),
    Unsubscribe(usize, usize),
    Tell(usize),
    Reconnect(usize),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (0_u8..3, 0_u8..3, 0_u8..3, 0_u8..4).prop_map(|(n, h, r, a)| Step::Workload(n, h, r, a)),
        2 => (0_u8..3, 0_u8..3).prop_map(|(n, h)| Step::Moves(n, h)),
        3 => (0_u8..3, 0_u8..3).prop_map(|(n, h)| Step::Gone(n, h)),
        1 => (0_u8..3, any::<bool>()).prop_map(|(n, there)| Step::Tier(n, there)),
        3 => (1_usize..5).prop_map(Step::Order),
        6 => (1_usize..8).prop_map(Step::Carry),
        1 => Just(Step::Break),
        2 => Just(Step::Connect),
        1 => prop_oneof![Just(Step::Restart), Just(Step::Replace), Just(Step::Idle)],
        3 => (0_usize..2, 0_usize..4).prop_map(|(agent, selector)| Step::Subscribe(agent, selector)),
        1 => (0_usize..2, 0_usize..4).prop_map(|(agent, selector)| Step::Unsubscribe(agent, selector)),
        6 => (0_usize..2).prop_map(Step::Tell),
        1 => (0_usize..2).prop_map(Step::Reconnect),
    ]
}

type Known = BTreeMap<String, Vec<proto::Prefix>>;

/// What the repository said.
#[derive(Debug, Clone)]
struct Truth {
    tiers: BTreeSet<String>,
    workloads: Vec<Entity>,
}

impl Truth {
    fn of(view: &View) -> Self {
        let tiers = view.of_kind(Kind::Tier).filter(|tier| tier.modified > 0);
        let tiers = tiers.map(|tier| tier.resource.metadata().name.clone()).collect();
        let workloads = view.of_kind(Kind::Workload).filter_map(|object| Entity::of(&object.resource));
        Self { tiers, workloads: workloads.collect() }
    }

    fn members(&self, selector: &str, host: &str) -> Known {
        let selector = Selector::parse(selector).unwrap();
        let elsewhere = self.workloads.iter().filter(|one| one.host.as_deref() != Some(host));
        let matching = elsewhere.filter(|one| selector.matches(&one.labels));
        let known = matching.map(|one| {
            let prefixes = one.prefixes.iter().copied().map(bulkhead_wire::prefix_to_wire);
            (one.name.to_string(), prefixes.collect())
        });
        known.collect()
    }
}

/// An agent as the protocol asks for it.
struct Agent {
    host: &'static str,
    pump: Pump,
    epoch: String,
    revision: u64,
    /// What it knows all members as of: not what a barrier says that came before an answer.
    members_revision: u64,
    tiers: BTreeSet<String>,
    /// By handle; `None`: it was never told.
    members: BTreeMap<u32, Option<Known>>,
    /// Subscriptions that are not answered on this stream. Their members, if it knows any, are as of some time before.
    unanswered: BTreeSet<u32>,
    /// Which selector a handle is for.
    handles: BTreeMap<u32, usize>,
    last_handle: u32,
}

struct World {
    repository: Repository,
    /// Which store it is.
    epoch: usize,
    truths: BTreeMap<(usize, u64), Truth>,
    mirror: Mirror,
    reception: Reception,
    /// The controller's side of the connection.
    upstream: Option<Pump>,
    /// Whether the relay said at the beginning of the connection that it knows this store's revisions.
    resumes: bool,
    orders: VecDeque<Up>,
    carried: VecDeque<Body>,
    agents: Vec<Agent>,
    last_session: u64,
}

fn workload(number: u8, host: u8, role: u8, address: u8) -> Resource {
    let on = HOSTS[usize::from(host)];
    let mut labels = Labels::new();
    if role > 0 {
        labels.insert("role", if role == 1 { "a" } else { "b" }).unwrap();
    }
    let metadata = Metadata { name: format!("w{number}.{on}"), labels, ..Metadata::default() };
    let addresses = vec![[10, 0, 0, address].into()];
    let spec = WorkloadSpec { host: on.into(), addresses, ..WorkloadSpec::default() };
    Resource::Workload(Workload { metadata, spec })
}

async fn empty() -> Repository {
    Repository::open(Arc::new(Memory::new())).await.unwrap()
}

impl World {
    async fn new() -> Self {
        let mut world = Self {
            repository: empty().await,
            epoch: 0,
            truths: BTreeMap::new(),
            mirror: Mirror::default(),
            reception: Reception::default(),
            upstream: None,
            resumes: false,
            orders: VecDeque::new(),
            carried: VecDeque::new(),
            agents: Vec::new(),
            last_session: 0,
        };
        world.note_truth();
        for host in ["h1", "h2"] {
            let pump = world.session(host, None);
            world.agents.push(Agent {
                host,
                pump,
                epoch: String::new(),
                revision: 0,
                members_revision: 0,
                tiers: BTreeSet::new(),
                members: BTreeMap::new(),
                unanswered: BTreeSet::new(),
                handles: BTreeMap::new(),
                last_handle: 0,
            });
        }
        world
    }

    fn note_truth(&mut self) {
        let view = self.repository.view();
        self.truths.insert((self.epoch, view.revision), Truth::of(&view));
    }

    fn session(&mut self, host: &str, known: Option<u64>) -> Pump {
        self.last_session += 1;
        let subscriber = Arc::new(Subscriber::new(self.last_session, host.into()));
        self.mirror.view_mut().add_session(&subscriber);
        Pump::new(subscriber, known, false)
    }

    async fn write(&mut self, upserts: Vec<Resource>, removes: Vec<ObjectKey>) {
        let (transaction, _written) = self.repository.publication(upserts, removes);
        self.repository.store().apply(transaction).await.unwrap();
        self.repository.catch_up().await;
        self.note_truth();
    }

    fn disconnect(&mut self) {
        if let Some(mut pump) = self.upstream.take() {
            pump.close(&mut *self.repository.view_mut());
        }
        self.orders.clear();
        self.carried.clear();
        self.mirror.set_connected(false);
    }

    fn connect(&mut self) {
        self.disconnect();
        let same = self.mirror.epoch() == EPOCHS[self.epoch];
        let known = same.then(|| self.mirror.revision());
        self.resumes = same;
        self.last_session += 1;
        let hosts = HostPatterns::new(vec!["*".into()]).unwrap();
        let subscriber = Arc::new(Subscriber::of(self.last_session, Audience::Relay(hosts)));
        self.repository.view_mut().add_session(&subscriber);
        self.upstream = Some(Pump::new(subscriber, known, false));
        self.mirror.set_connected(true);
        let (subscriptions, owed) = self.mirror.resume();
        self.reception = Reception::new(if same { owed } else { HashSet::new() });
        self.orders = subscriptions.into();
    }

    fn order(&mut self, count: usize) {
        self.orders.extend(self.mirror.take_orders());
        let Some(pump) = &mut self.upstream else { return };
        for _ in 0..count {
            let mut view = self.repository.view_mut();
            match self.orders.pop_front() {
                Some(Up::Subscribe(subscribe)) => {
                    let known = Some(subscribe.revision).filter(|revision| self.resumes && *revision > 0);
                    pump.subscribe(&mut *view, &subscribe, known).unwrap();
                }
                Some(Up::Unsubscribe(gone)) => pump.unsubscribe(&mut *view, gone.handle),
                _ => return,
            }
        }
    }

    fn carry(&mut self, count: usize) {
        let Some(pump) = &mut self.upstream else { return };
        if self.carried.is_empty() {
            self.carried.extend(pump.bodies(&*self.repository.view()));
        }
        for _ in 0..count {
            let Some(body) = self.carried.pop_front() else { return };
            let Some((batch, revision)) = self.reception.hear(body) else { continue };
            if self.mirror.take_in(EPOCHS[self.epoch], batch, revision) {
                // All sessions are closed, and begin anew.
                (0..self.agents.len()).for_each(|agent| self.reconnect(agent));
            }
        }
    }

    fn reconnect(&mut self, number: usize) {
        self.agents[number].pump.close(&mut self.mirror);
        let agent = &self.agents[number];
        let same = self.mirror.is_ready() && agent.epoch == self.mirror.epoch();
        let known = Some(agent.revision).filter(|revision| same && *revision > 0);
        let mut pump = self.session(agent.host, known);
        let agent = &mut self.agents[number];
        for (handle, members) in &agent.members {
            let revision = Some(agent.members_revision);
            let revision = revision.filter(|revision| same && *revision > 0 && members.is_some());
            let selector = SELECTORS[agent.handles[handle]].to_owned();
            let subscribe = Subscribe { handle: *handle, selector, revision: revision.unwrap_or(0) };
            pump.subscribe(&mut self.mirror, &subscribe, revision).unwrap();
        }
        agent.unanswered = agent.members.keys().copied().collect();
        agent.pump = pump;
    }

    fn tell(&mut self, number: usize) {
        if !self.mirror.is_ready() {
            return;
        }
        let agent = &mut self.agents[number];
        let messages = agent.pump.bodies(&self.mirror);
        if messages.is_empty() {
            return;
        }
        mirror_epoch(agent, self.mirror.epoch());
        agent.hear(messages);
        let epoch = EPOCHS.iter().position(|epoch| *epoch == self.mirror.epoch()).unwrap();
        let truth = &self.truths[&(epoch, agent.revision)];
        assert_eq!(agent.tiers, truth.tiers, "at {} as of {}", agent.host, agent.revision);
        for (handle, known) in &agent.members {
            if agent.unanswered.contains(handle) {
                assert!(!self.mirror.is_connected(), "a barrier waits while there is somebody to answer");
                continue;
            }
            let known = known.as_ref().expect("an answer says who they are");
            let selector = SELECTORS[agent.handles[handle]];
            let expected = truth.members(selector, agent.host);
            assert_eq!(*known, expected, "{selector} at {} as of {}", agent.host, agent.revision);
        }
        assert!(agent.pump.bodies(&self.mirror).is_empty(), "all was told");
    }

    async fn act(&mut self, step: Step) {
        match step {
            Step::Workload(number, host, role, address) => {
                self.write(vec![workload(number, host, role, address)], Vec::new()).await;
            }
            Step::Moves(number, host) => {
                let Resource::Workload(mut moved) = workload(number, host, 1, number) else { return };
                moved.spec.host = HOSTS[(usize::from(host) + 1) % HOSTS.len()].into();
                self.write(vec![Resource::Workload(moved)], Vec::new()).await;
            }
            Step::Gone(number, host) => {
                let name = format!("w{number}.{}", HOSTS[usize::from(host)]);
                let key = ObjectKey { kind: Kind::Workload, namespace: None, name };
                self.write(Vec::new(), vec![key]).await;
            }
            Step::Tier(number, there) => {
                let metadata = Metadata { name: format!("t{number}"), ..Metadata::default() };
                let spec =
                    TierSpec { order: Order::new(f64::from(number)), default_action: DefaultAction::Deny };
                let tier = Resource::Tier(Tier { metadata, spec });
                let key = tier.key();
                let (upserts, removes) = if there { (vec![tier], vec![]) } else { (vec![], vec![key]) };
                self.write(upserts, removes).await;
            }
            Step::Order(count) => self.order(count),
            Step::Carry(count) => self.carry(count),
            Step::Break => self.disconnect(),
            Step::Connect => self.connect(),
            Step::Restart => {
                self.disconnect();
                self.mirror = Mirror::default();
                for number in 0..self.agents.len() {
                    // Its session was the other mirror's.
                    let pump = self.session(self.agents[number].host, None);
                    self.agents[number].pump = pump;
                    self.reconnect(number);
                }
            }
            Step::Replace => {
                if self.epoch == 0 {
                    self.disconnect();
                    (self.epoch, self.repository) = (1, empty().await);
                    self.note_truth();
                }
            }
            Step::Idle => {
                if self.reception.is_settled() {
                    self.mirror.forget_idle(Instant::now() + IDLE_TIME_MAX);
                }
            }
            Step::Subscribe(agent, selector) => {
                let agent = &mut self.agents[agent];
                if agent.handles.values().any(|known| *known == selector) {
                    return;
                }
                agent.last_handle += 1;
                let handle = agent.last_handle;
                agent.members.insert(handle, None);
                agent.unanswered.insert(handle);
                agent.handles.insert(handle, selector);
                let subscribe = Subscribe { handle, selector: SELECTORS[selector].into(), revision: 0 };
                agent.pump.subscribe(&mut self.mirror, &subscribe, None).unwrap();
            }
            Step::Unsubscribe(agent, selector) => {
                let agent = &mut self.agents[agent];
                let handle = agent.handles.iter().find(|(_, known)| **known == selector);
                let Some(handle) = handle.map(|(handle, _)| *handle) else { return };
                agent.members.remove(&handle);
                agent.unanswered.remove(&handle);
                agent.handles.remove(&handle);
                agent.pump.unsubscribe(&mut self.mirror, handle);
            }
            Step::Tell(agent) => self.tell(agent),
            Step::Reconnect(agent) => self.reconnect(agent),
        }
    }

    /// Everything arrives.
    fn settle(&mut self) {
        self.connect();
        for _ in 0..10 {
            self.order(usize::MAX);
            self.carry(usize::MAX);
            (0..self.agents.len()).for_each(|agent| self.tell(agent));
        }
        let truth = Truth::of(&self.repository.view());
        for agent in &self.agents {
            assert_eq!(agent.tiers, truth.tiers, "in the end, at {}", agent.host);
            for (handle, known) in &agent.members {
                let expected = truth.members(SELECTORS[agent.handles[handle]], agent.host);
                assert_eq!(known.as_ref(), Some(&expected), "in the end, at {}", agent.host);
            }
        }
    }
}

fn mirror_epoch(agent: &mut Agent, epoch: &str) {
    if agent.epoch != epoch {
        epoch.clone_into(&mut agent.epoch);
        agent.members_revision = 0;
    }
}

impl Agent {
    fn hear(&mut self, messages: Vec<Body>) {
        for message in messages {
            match message {
                Body::Resources(resources) => {
                    if resources.snapshot {
                        self.tiers.clear();
                    }
                    for json in &resources.upserts {
                        let json: serde_json::Value = serde_json::from_slice(json).unwrap();
                        self.tiers.insert(json["metadata"]["name"].as_str().unwrap().to_owned());
                    }
                    for key in &resources.removes {
                        self.tiers.remove(&key.name);
                    }
                }
                Body::Members(members) => {
                    self.unanswered.remove(&members.handle);
                    let known = self.members.get_mut(&members.handle).unwrap().get_or_insert_default();
                    if members.snapshot {
                        known.clear();
                    }
                    for join in members.joins {
                        assert_ne!(join.host, self.host, "never of its own host");
                        known.insert(join.entity, join.prefixes);
                    }
                    for leave in &members.leaves {
                        known.remove(leave);
                    }
                    // What runs here now it knows better, and what it was told of it before it forgets.
                }
                Body::Synced(synced) => {
                    self.revision = synced.revision;
                    if self.unanswered.is_empty() {
                        self.members_revision = synced.revision;
                    }
                }
                Body::Welcome(_) | Body::InventoryAck(_) | Body::Revocations(_) => {}
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn an_agent_behind_a_relay_knows_at_each_barrier_what_there_was(
        steps in prop::collection::vec(step(), 0..80),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let mut world = World::new().await;
            for step in steps {
                world.act(step).await;
            }
            world.settle();
        });
    }
}
