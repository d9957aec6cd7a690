//! The protocol, every way that it can go: a model checker tries all orders of writes, messages, breaks and restarts, up to a
//! bound, with the controller's own code (the store, the view, the pump) and an agent that does what the protocol asks.
//!
//! A state is the way to it, played again from the beginning, since a view cannot be copied; two ways that lead to what cannot
//! be told apart are one state. A connection delivers in order what it delivers: what is lost is the end of it, with the
//! connection. An agent that starts anew remembers what it knew at the last barrier.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::hash::{Hash, Hasher};

use bulkhead_model::{Entity, Kind, Resource, document};
use bulkhead_store::{Memory, Precondition, Store, Transaction};
use bulkhead_wire::proto::controller_message::Body;
use stateright::{Checker, Model, Property};

use super::super::*;
use crate::repository::Repository;

const HOST: &str = "h1";
/// Restarts of either side, and replacements of the store by an older copy, in one history.
const RESTARTS_MAX: u8 = 1;
const RESTORES_MAX: u8 = 1;
/// What the older copy has of the writes.
const RESTORED: usize = 2;

/// What is written, one transaction each. The third changes a policy and whom it speaks of together: an agent must never know
/// one without the other.
const WRITES: [&[&str]; 4] = [
    &["Policy a", "Workload w1 a"],
    &["Workload w2 a"],
    &["Policy b", "Workload w1 b", "-Workload w2", "Workload own b"],
    &["Workload w2 b"],
];

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Action {
    Write,
    Connect,
    /// The controller hears what the agent has said first.
    Hear,
    Tell,
    /// The agent takes what has come first.
    Deliver,
    Break,
    RestartController,
    RestartAgent,
    /// The store is replaced by an older copy: another epoch.
    Restore,
}

/// Members by name, with the role that they had when it was said.
type Members = BTreeMap<String, String>;

/// What the repository said at a revision.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
struct Truth {
    policy: Option<String>,
    workloads: BTreeMap<String, (String, String)>,
}

impl Truth {
    fn of(view: &View) -> Self {
        let policy = view.of_kind(Kind::Policy).next().map(|object| selector_of(&object.resource));
        let workloads = view.of_kind(Kind::Workload).filter_map(|object| {
            let entity = Entity::of(&object.resource)?;
            let host = entity.host.as_deref().unwrap_or_default().to_owned();
            Some((entity.name.to_string(), (host, entity.labels.get("role")?.to_owned())))
        });
        Self { policy, workloads: workloads.collect() }
    }

    fn members(&self, selector: &str) -> Members {
        let elsewhere = self.workloads.iter().filter(|(_, (host, _))| host != HOST);
        let matching = elsewhere.filter(|(_, (_, role))| selector == format!("role == \"{role}\""));
        matching.map(|(name, (_, role))| (name.clone(), role.clone())).collect()
    }
}

fn selector_of(resource: &Resource) -> String {
    let json = resource.to_json();
    let text = json["spec"]["ingress"][0]["from"]["selector"].as_str().unwrap_or_default().to_owned();
    Selector::parse(&text).unwrap().canonical().to_string()
}

/// The agent, as far as the protocol is concerned.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
struct Agent {
    epoch: u8,
    revision: u64,
    /// Remembered members are complete up to here.
    members_revision: u64,
    policy: Option<String>,
    members: BTreeMap<String, Members>,
    /// Of this connection.
    subscribed: BTreeMap<u32, String>,
    unanswered: BTreeSet<u32>,
    /// A handle never stands for two subscriptions of a connection: answers to the first may still be on their way.
    last_handle: u32,
    buffer: Vec<Heard>,
}

/// What an agent understands of a message.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Heard {
    Policies { snapshot: bool, upserts: Vec<String>, gone: bool },
    Members { handle: u32, snapshot: bool, joins: Vec<String>, leaves: Vec<String> },
    Synced(u64),
}

fn heard(body: &Body) -> Heard {
    match body {
        Body::Resources(resources) => {
            let policies = resources.upserts.iter().filter_map(|json| {
                let resource = Resource::from_json(&serde_json::from_slice(json).unwrap()).unwrap();
                (resource.kind() == Kind::Policy).then(|| selector_of(&resource))
            });
            let gone = resources.removes.iter().any(|key| key.kind == "Policy");
            Heard::Policies { snapshot: resources.snapshot, upserts: policies.collect(), gone }
        }
        Body::Members(members) => Heard::Members {
            handle: members.handle,
            snapshot: members.snapshot,
            joins: members.joins.iter().map(|member| member.entity.clone()).collect(),
            leaves: members.leaves.clone(),
        },
        Body::Synced(synced) => Heard::Synced(synced.revision),
        Body::Welcome(_) | Body::InventoryAck(_) | Body::Revocations(_) => {
            unreachable!("the pump says none of these")
        }
    }
}

impl Agent {
    /// What it subscribes to and unsubscribes from, as its policies ask for.
    fn follow(&mut self) -> Vec<Result<proto::Subscribe, u32>> {
        let wanted: BTreeSet<String> = self.policy.iter().cloned().collect();
        let mut said = Vec::new();
        let unwanted: Vec<u32> = self
            .subscribed
            .iter()
            .filter(|(_, selector)| !wanted.contains(*selector))
            .map(|(handle, _)| *handle)
            .collect();
        for handle in unwanted {
            let selector = self.subscribed.remove(&handle).unwrap();
            self.unanswered.remove(&handle);
            self.members.remove(&selector);
            said.push(Err(handle));
        }
        self.members.retain(|selector, _| wanted.contains(selector));
        for selector in wanted {
            if self.subscribed.values().any(|known| *known == selector) {
                continue;
            }
            self.last_handle += 1;
            let handle = self.last_handle;
            let revision = if self.members.contains_key(&selector) { self.members_revision } else { 0 };
            said.push(Ok(proto::Subscribe { handle, selector: selector.clone(), revision }));
            self.subscribed.insert(handle, selector);
            self.unanswered.insert(handle);
        }
        said
    }

    fn synced(&mut self, revision: u64) {
        for message in std::mem::take(&mut self.buffer) {
            match message {
                Heard::Policies { snapshot, upserts, gone } => {
                    if snapshot || gone {
                        self.policy = None;
                    }
                    self.policy = upserts.into_iter().next_back().or(self.policy.take());
                }
                Heard::Members { handle, snapshot, joins, leaves } => {
                    self.unanswered.remove(&handle);
                    // The answer to a question that was taken back meanwhile.
                    let Some(selector) = self.subscribed.get(&handle) else { continue };
                    let known = self.members.entry(selector.clone()).or_default();
                    if snapshot {
                        known.clear();
                    }
                    leaves.iter().for_each(|name| drop(known.remove(name)));
                    known.extend(joins.into_iter().map(|name| (name, role_in(selector))));
                }
                Heard::Synced(_) => unreachable!("it ends the buffer"),
            }
        }
        let asked = |selector: &String| self.subscribed.values().any(|known| known == selector);
        if self.unanswered.is_empty() && self.members.keys().all(asked) {
            self.members_revision = revision;
        }
        self.revision = revision;
    }
}

fn role_in(selector: &str) -> String {
    selector.split('"').nth(1).unwrap_or_default().to_owned()
}

/// Everything, while a history is played.
struct World {
    store: Arc<Memory>,
    repository: Repository,
    written: usize,
    epoch: u8,
    truths: BTreeMap<(u8, u64), Truth>,
    agent: Agent,
    session: Option<Pump>,
    sessions: u64,
    up: VecDeque<Result<proto::Subscribe, u32>>,
    down: VecDeque<Body>,
    counts: [u8; 4],
    wrong: Option<String>,
}

async fn write(store: &Memory, number: usize) {
    let mut transaction = Transaction::new();
    for line in WRITES[number] {
        let words: Vec<&str> = line.split(' ').collect();
        let (key, text) = match words.as_slice() {
            ["Policy", role] => (
                "/bulkhead.dev/v1/policies/_/p".to_owned(),
                format!(
                    "apiVersion: bulkhead.dev/v1\nkind: Policy\nmetadata: {{name: p}}\nspec: {{appliesTo: all(), \
                     ingress: [{{action: Allow, from: {{selector: role == '{role}'}}}}]}}"
                ),
            ),
            ["Workload", name, role] => {
                let host = if *name == "own" { HOST } else { "h2" };
                (
                    format!("/bulkhead.dev/v1/workloads/_/{name}.{host}"),
                    format!(
                        "apiVersion: bulkhead.dev/v1\nkind: Workload\nmetadata: {{name: {name}.{host}, labels: \
                         {{role: {role}}}}}\nspec: {{host: {host}, addresses: [10.0.0.1]}}"
                    ),
                )
            }
            ["-Workload", name] => {
                let key = format!("/bulkhead.dev/v1/workloads/_/{name}.h2");
                transaction = transaction.delete(key, Precondition::Any);
                continue;
            }
            other => panic!("{other:?}"),
        };
        let resource = document::parse("model", &text).unwrap().remove(0).resource;
        transaction = transaction.put(key, resource.to_json().to_string(), Precondition::Any);
    }
    store.apply(transaction).await.unwrap();
}

impl World {
    async fn new() -> Self {
        let store = Arc::new(Memory::new());
        let repository = Repository::open(Arc::clone(&store) as _).await.unwrap();
        let mut world = Self {
            store,
            repository,
            written: 0,
            epoch: 1,
            truths: BTreeMap::new(),
            agent: Agent::default(),
            session: None,
            sessions: 0,
            up: VecDeque::new(),
            down: VecDeque::new(),
            counts: [0; 4],
            wrong: None,
        };
        world.note_truth();
        world
    }

    fn note_truth(&mut self) {
        let view = self.repository.view();
        self.truths.insert((self.epoch, view.revision), Truth::of(&view));
    }

    fn disconnect(&mut self) {
        if let Some(mut pump) = self.session.take() {
            pump.close(&mut *self.repository.view_mut());
        }
        self.up.clear();
        self.down.clear();
        self.agent.buffer.clear();
        self.agent.subscribed.clear();
        self.agent.unanswered.clear();
        self.agent.last_handle = 0;
    }

    async fn act(&mut self, action: Action) {
        match action {
            Action::Write => {
                write(&self.store, self.written).await;
                self.written += 1;
                self.repository.catch_up().await;
                self.note_truth();
            }
            Action::Connect => {
                self.sessions += 1;
                let subscriber = Arc::new(Subscriber::new(self.sessions, HOST.into()));
                self.repository.view_mut().add_session(&subscriber);
                let same = self.agent.epoch == self.epoch;
                let known = (same && self.agent.revision > 0).then_some(self.agent.revision);
                if !same {
                    // Revisions of another epoch say nothing here.
                    self.agent.members_revision = 0;
                }
                self.session = Some(Pump::new(subscriber, known, false));
                self.up.extend(self.agent.follow());
            }
            Action::Hear => {
                let (Some(said), Some(pump)) = (self.up.pop_front(), &mut self.session) else { return };
                let mut view = self.repository.view_mut();
                match said {
                    Ok(subscribe) => {
                        let same = self.agent.epoch == self.epoch && subscribe.revision > 0;
                        let known = same.then_some(subscribe.revision);
                        pump.subscribe(&mut *view, &subscribe, known).unwrap();
                    }
                    Err(handle) => pump.unsubscribe(&mut *view, handle),
                }
            }
            Action::Tell => {
                let Some(pump) = &mut self.session else { return };
                self.down.extend(pump.bodies(&*self.repository.view()));
            }
            Action::Deliver => {
                let Some(body) = self.down.pop_front() else { return };
                match heard(&body) {
                    Heard::Synced(revision) => {
                        self.agent.synced(revision);
                        self.agent.epoch = self.epoch;
                        self.check(revision);
                        let said = self.agent.follow();
                        self.up.extend(said);
                    }
                    other => self.agent.buffer.push(other),
                }
            }
            Action::Break => {
                self.counts[0] += 1;
                self.disconnect();
            }
            Action::RestartController => {
                self.counts[1] += 1;
                self.disconnect();
                self.repository = Repository::open(Arc::clone(&self.store) as _).await.unwrap();
            }
            Action::RestartAgent => {
                self.counts[2] += 1;
                self.disconnect();
            }
            Action::Restore => {
                self.counts[3] += 1;
                self.disconnect();
                self.store = Arc::new(Memory::new());
                for number in 0..RESTORED.min(self.written) {
                    write(&self.store, number).await;
                }
                self.written = RESTORED.min(self.written);
                self.repository = Repository::open(Arc::clone(&self.store) as _).await.unwrap();
                self.epoch += 1;
                self.note_truth();
            }
        }
    }

    /// At a barrier the agent knows what the repository said at its revision: all of one revision, and nothing of another.
    fn check(&mut self, revision: u64) {
        let Some(truth) = self.truths.get(&(self.epoch, revision)) else {
            self.wrong = Some(format!("there was no revision {revision}"));
            return;
        };
        if self.agent.policy != truth.policy {
            self.wrong =
                Some(format!("at {revision}: {:?} instead of {:?}", self.agent.policy, truth.policy));
        }
        for (handle, selector) in &self.agent.subscribed {
            let answered = !self.agent.unanswered.contains(handle);
            let known = self.agent.members.get(selector).cloned().unwrap_or_default();
            if answered && known != truth.members(selector) {
                self.wrong = Some(format!(
                    "at {revision} {selector}: {known:?} instead of {:?}",
                    truth.members(selector)
                ));
            }
        }
    }

    fn seen(mut self) -> Seen {
        let session = self.session.as_ref().map(|pump| {
            let mut known: Vec<_> =
                pump.subscriptions.iter().map(|(handle, one)| (*handle, one.known)).collect();
            known.sort_unstable();
            let unheard = pump.subscriber.changed_len();
            format!("{:?} {known:?} {:?} {} {unheard}", pump.resources_known, pump.new, pump.unanswered)
        });
        let (up, down) = (format!("{:?}", self.up), self.down.iter().map(heard).collect::<Vec<_>>());
        let mut quiet = false;
        if let Some(pump) = &mut self.session {
            let silent = pump.bodies(&*self.repository.view()).is_empty();
            quiet = silent && self.up.is_empty() && self.down.is_empty();
        }
        if quiet {
            let newest = self.repository.view().revision;
            let concerned = self.truths.get(&(self.epoch, newest)).cloned().unwrap_or_default();
            let members = self.agent.policy.as_ref().map(|selector| {
                self.agent.members.get(selector).cloned().unwrap_or_default() == concerned.members(selector)
            });
            if self.agent.policy != concerned.policy || members == Some(false) {
                self.wrong = Some(format!(
                    "nothing more is to come, and it knows {:?}, not {concerned:?}",
                    self.agent
                ));
            }
        }
        Seen {
            written: self.written,
            epoch: self.epoch,
            connected: self.session.is_some(),
            session,
            up,
            down,
            agent: self.agent,
            counts: self.counts,
            wrong: self.wrong,
            quiet,
        }
    }
}

/// What two ways to a state have to agree in to be one.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Seen {
    written: usize,
    epoch: u8,
    connected: bool,
    session: Option<String>,
    up: String,
    down: Vec<Heard>,
    agent: Agent,
    counts: [u8; 4],
    wrong: Option<String>,
    /// Everything that there is to say is said and heard.
    quiet: bool,
}

#[derive(Debug, Clone)]
struct State {
    way: Vec<Action>,
    seen: Seen,
}

impl PartialEq for State {
    fn eq(&self, other: &Self) -> bool {
        self.seen == other.seen
    }
}

impl Hash for State {
    fn hash<H: Hasher>(&self, hasher: &mut H) {
        self.seen.hash(hasher);
    }
}

fn play(way: Vec<Action>) -> State {
    thread_local! {
        static RUNTIME: tokio::runtime::Runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    }
    RUNTIME.with(|runtime| {
        runtime.block_on(async {
            let mut world = World::new().await;
            for action in &way {
                world.act(*action).await;
            }
            State { seen: world.seen(), way }
        })
    })
}

/// How far the checker goes.
#[derive(Debug)]
struct Protocol {
    writes: usize,
    /// Breaks of the connection in one history.
    breaks: u8,
}

impl Model for Protocol {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        vec![play(Vec::new())]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        let Seen { written, connected, up, down, counts, .. } = &state.seen;
        let possible = [
            (Action::Write, *written < self.writes),
            (Action::Connect, !connected),
            (Action::Hear, *connected && up != "[]"),
            (Action::Tell, *connected && up == "[]"),
            (Action::Deliver, !down.is_empty()),
            (Action::Break, *connected && counts[0] < self.breaks),
            (Action::RestartController, counts[1] < RESTARTS_MAX),
            (Action::RestartAgent, counts[2] < RESTARTS_MAX),
            (Action::Restore, *written > RESTORED && counts[3] < RESTORES_MAX),
        ];
        actions.extend(possible.into_iter().filter(|(_, possible)| *possible).map(|(action, _)| action));
    }

    fn next_state(&self, state: &State, action: Action) -> Option<State> {
        let mut way = state.way.clone();
        way.push(action);
        let next = play(way);
        // What changes nothing leads nowhere.
        (next != *state).then_some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always(
                "an agent knows what the repository said at one revision",
                |_, state: &State| state.seen.wrong.is_none(),
            ),
            Property::sometimes("everything arrives", |model: &Self, state: &State| {
                state.seen.quiet && state.seen.written == model.writes
            }),
            Property::sometimes(
                "everything arrives after all that can go wrong",
                |model: &Self, state: &State| {
                    let Seen { quiet, written, counts, .. } = &state.seen;
                    *quiet && *written == model.writes && counts.iter().all(|count| *count > 0)
                },
            ),
        ]
    }
}

#[test]
fn every_way_that_the_protocol_can_go_ends_where_the_repository_is() {
    // `make model` goes further.
    let whole = std::env::var_os("BULKHEAD_MODEL").is_some();
    let protocol = if whole { Protocol { writes: 4, breaks: 2 } } else { Protocol { writes: 3, breaks: 1 } };
    let checker = protocol.checker().threads(2).spawn_bfs().join();
    println!("{} states, depth {}", checker.unique_state_count(), checker.max_depth());
    checker.assert_properties();
    assert!(checker.unique_state_count() > 1000);
}
