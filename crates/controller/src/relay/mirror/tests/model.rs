//! The protocol with a relay between, every way that it can go up to a bound: all orders of writes, messages, breaks on either
//! side of the relay, restarts, and a store that is replaced, with the code of the controller and of the relay (the store, the
//! view, both pumps, the mirror, the reception) and agents that do what the protocol asks.
//!
//! As in `agents::pump::tests::model` a state is the way to it, played again, and what is lost is the end of a connection with
//! the connection: what was on its way is gone, and is said again over the next. What one side says up to a barrier is taken in
//! at once here, when it is said: the parts before a barrier change nothing, so that this is as if it was on its way until then.
//! What two connections carry comes in any order, and the relay's questions one at a time.
//!
//! From each state everything is let through once, with whatever is broken mended: then all must know what there is.

use std::collections::{BTreeMap, BTreeSet, HashSet, VecDeque};
use std::sync::Arc;
use std::time::Instant;

use bulkhead_store::Memory;
use bulkhead_wire::proto::Subscribe;
use bulkhead_wire::proto::controller_message::Body;
use stateright::{Checker, Model, Property};

use super::super::super::reception::Reception;
use super::super::*;
use crate::access::HostPatterns;
use crate::agents::Pump;
use crate::modelled::{self, Agent, HOST, Heard, Truth, WRITES, heard};
use crate::repository::Repository;

/// Behind the relay. The workloads that are written are of the second and of nobody.
const HOSTS: [&str; 2] = [HOST, "h2"];
/// What is written before anybody connects, and what an older copy of the store has.
const WRITTEN: usize = 2;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Action {
    Write,
    /// The relay opens its session with the controller.
    Reach,
    /// The controller hears what the relay has said first.
    Ask,
    /// The controller tells the relay what there is.
    Carry,
    Connect(usize),
    /// The relay hears what an agent has said.
    Hear(usize),
    /// The relay tells an agent what there is.
    Tell(usize),
    Fault(Fault),
}

/// What goes wrong, each once in a history.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Fault {
    /// The connection between relay and controller breaks.
    Lose,
    /// The connection of the first agent breaks, or it starts anew: it remembers what it knew.
    Break,
    RestartController,
    RestartRelay,
    /// The store is replaced by an older copy: another epoch.
    Restore,
    /// Selectors that nobody reads are given up.
    Idle,
}

const FAULTS: [Fault; 6] =
    [Fault::Lose, Fault::Break, Fault::RestartController, Fault::RestartRelay, Fault::Restore, Fault::Idle];

/// An agent, and the relay's side of its connection.
struct Behind {
    agent: Agent,
    session: Option<Pump>,
    up: VecDeque<Result<Subscribe, u32>>,
}

/// Everything, while a history is played.
struct World {
    store: Arc<Memory>,
    repository: Repository,
    written: usize,
    /// What of it was there when the controller began: it knows no change before.
    opened: usize,
    epoch: u8,
    truths: BTreeMap<(u8, u64), Truth>,
    /// The controller's side of its connection with the relay.
    upstream: Option<Pump>,
    /// Whether the relay has said over it that it knows this store.
    resumes: bool,
    orders: VecDeque<Up>,
    reception: Reception,
    mirror: Mirror,
    behind: Vec<Behind>,
    sessions: u64,
    faults: BTreeSet<Fault>,
    wrong: Option<String>,
}

fn handle(order: &Up) -> u32 {
    match order {
        Up::Subscribe(subscribe) => subscribe.handle,
        Up::Unsubscribe(gone) => gone.handle,
        other => panic!("a relay does not order {other:?}"),
    }
}

fn name(epoch: u8) -> String {
    format!("e{epoch}")
}

impl World {
    async fn new(agents: usize) -> Self {
        let store = Arc::new(Memory::new());
        for lines in &WRITES[..WRITTEN] {
            modelled::write(&store, lines).await;
        }
        let repository = Repository::open(Arc::clone(&store) as _).await.unwrap();
        let behind =
            |host: &&'static str| Behind { agent: Agent::of(host), session: None, up: VecDeque::new() };
        let mut world = Self {
            store,
            repository,
            written: WRITTEN,
            opened: WRITTEN,
            epoch: 1,
            truths: BTreeMap::new(),
            upstream: None,
            resumes: false,
            orders: VecDeque::new(),
            reception: Reception::default(),
            mirror: Mirror::default(),
            behind: HOSTS[..agents].iter().map(behind).collect(),
            sessions: 0,
            faults: BTreeSet::new(),
            wrong: None,
        };
        world.note_truth();
        world
    }

    fn note_truth(&mut self) {
        let view = self.repository.view();
        self.truths.insert((self.epoch, view.revision), Truth::of(&view));
    }

    fn subscriber(&mut self, audience: Audience) -> Arc<Subscriber> {
        self.sessions += 1;
        Arc::new(Subscriber::of(self.sessions, audience))
    }

    async fn reopen(&mut self) {
        self.lose();
        self.opened = self.written;
        self.repository = Repository::open(Arc::clone(&self.store) as _).await.unwrap();
    }

    fn lose(&mut self) {
        if let Some(mut pump) = self.upstream.take() {
            pump.close(&mut *self.repository.view_mut());
        }
        self.orders.clear();
        self.mirror.set_connected(false);
    }

    /// As `uplink::converse` begins.
    fn reach(&mut self) {
        self.resumes = self.mirror.epoch() == name(self.epoch);
        let known = self.resumes.then(|| self.mirror.revision());
        let subscriber = self.subscriber(Audience::Relay(HostPatterns::new(vec!["*".into()]).unwrap()));
        self.repository.view_mut().add_session(&subscriber);
        self.upstream = Some(Pump::new(subscriber, known, false));
        self.mirror.set_connected(true);
        let (subscriptions, owed) = self.mirror.resume();
        self.reception = Reception::new(if self.resumes { owed } else { HashSet::new() });
        self.orders = subscriptions.into();
        // They come in any order; a way that is played again has to be the same way.
        self.orders.make_contiguous().sort_by_key(handle);
    }

    fn ask(&mut self) {
        self.orders.extend(self.mirror.take_orders());
        let (Some(order), Some(pump)) = (self.orders.pop_front(), &mut self.upstream) else { return };
        let mut view = self.repository.view_mut();
        match order {
            Up::Subscribe(subscribe) => {
                let known = Some(subscribe.revision).filter(|revision| self.resumes && *revision > 0);
                pump.subscribe(&mut *view, &subscribe, known).unwrap();
            }
            Up::Unsubscribe(gone) => pump.unsubscribe(&mut *view, gone.handle),
            other => panic!("a relay does not order {other:?}"),
        }
    }

    fn carry(&mut self) {
        let Some(pump) = &mut self.upstream else { return };
        let messages = pump.bodies(&*self.repository.view());
        for body in messages {
            let Some((batch, revision)) = self.reception.hear(body) else { continue };
            if self.mirror.take_in(&name(self.epoch), batch, revision) {
                (0..self.behind.len()).for_each(|number| self.disconnect(number));
            }
        }
    }

    fn disconnect(&mut self, number: usize) {
        let Behind { agent, session, up } = &mut self.behind[number];
        if let Some(mut pump) = session.take() {
            pump.close(&mut self.mirror);
        }
        up.clear();
        agent.disconnect();
    }

    /// What the mirror is of; 0: of nothing.
    fn mirrored(&self) -> u8 {
        self.mirror.epoch().trim_start_matches('e').parse().unwrap_or(0)
    }

    /// Whether the relay does not send an agent elsewhere: `desk::Shared::speaker`.
    fn is_welcome(&self, agent: &Agent) -> bool {
        let behind = agent.epoch == self.mirrored() && agent.revision > self.mirror.revision();
        self.mirror.is_ready() && (self.mirror.is_connected() || !behind)
    }

    fn connect(&mut self, number: usize) {
        let (epoch, agent) = (self.mirrored(), &mut self.behind[number].agent);
        let same = agent.epoch == epoch;
        let known = (same && agent.revision > 0).then_some(agent.revision);
        if !same {
            agent.members_revision = 0;
        }
        let up = agent.follow();
        let subscriber = self.subscriber(Audience::Host(HOSTS[number].into()));
        self.mirror.view_mut().add_session(&subscriber);
        self.behind[number].session = Some(Pump::new(subscriber, known, false));
        self.behind[number].up.extend(up);
    }

    fn hear(&mut self, number: usize) {
        let epoch = self.mirrored();
        let Behind { agent, session, up } = &mut self.behind[number];
        let Some(pump) = session else { return };
        for said in up.drain(..) {
            match said {
                Ok(subscribe) => {
                    let same = agent.epoch == epoch && subscribe.revision > 0;
                    let known = same.then_some(subscribe.revision);
                    pump.subscribe(&mut self.mirror, &subscribe, known).unwrap();
                }
                Err(handle) => pump.unsubscribe(&mut self.mirror, handle),
            }
        }
    }

    fn tell(&mut self, number: usize) {
        let epoch = self.mirrored();
        let Behind { agent, session, up } = &mut self.behind[number];
        let Some(pump) = session else { return };
        let messages: Vec<Body> = pump.bodies(&self.mirror);
        for body in &messages {
            match heard(body) {
                Heard::Synced(revision) => {
                    agent.synced(revision);
                    agent.epoch = epoch;
                    let wrong = match self.truths.get(&(epoch, revision)) {
                        Some(_) if agent.waits() && self.mirror.is_connected() => {
                            Some("a barrier waits while there is somebody to answer".to_owned())
                        }
                        Some(truth) => agent.differs(truth, revision),
                        None => Some(format!("there was no revision {revision}")),
                    };
                    self.wrong =
                        self.wrong.take().or(wrong.map(|wrong| format!("{}: {wrong}", HOSTS[number])));
                    up.extend(agent.follow());
                }
                other => agent.buffer.push(other),
            }
        }
    }

    async fn act(&mut self, action: Action) {
        match action {
            Action::Write => {
                modelled::write(&self.store, WRITES[self.written]).await;
                self.written += 1;
                self.repository.catch_up().await;
                self.note_truth();
            }
            Action::Reach => self.reach(),
            Action::Ask => self.ask(),
            Action::Carry => self.carry(),
            Action::Connect(number) => self.connect(number),
            Action::Hear(number) => self.hear(number),
            Action::Tell(number) => self.tell(number),
            Action::Fault(fault) => {
                self.faults.insert(fault);
                self.fail(fault).await;
            }
        }
    }

    async fn fail(&mut self, fault: Fault) {
        match fault {
            Fault::Lose => self.lose(),
            Fault::Break => self.disconnect(0),
            Fault::RestartController => self.reopen().await,
            Fault::RestartRelay => {
                (0..self.behind.len()).for_each(|number| self.disconnect(number));
                self.lose();
                self.mirror = Mirror::default();
            }
            Fault::Restore => {
                self.store = Arc::new(Memory::new());
                for lines in &WRITES[..WRITTEN] {
                    modelled::write(&self.store, lines).await;
                }
                self.written = WRITTEN;
                self.reopen().await;
                self.epoch += 1;
                self.note_truth();
            }
            Fault::Idle => {
                if self.reception.is_settled() {
                    let before = self.mirror.orders.len();
                    self.mirror.forget_idle(Instant::now() + IDLE_TIME_MAX);
                    self.mirror.orders.make_contiguous()[before..].sort_by_key(handle);
                }
            }
        }
    }

    /// Everything is mended, and everything that is said is heard.
    fn settle(&mut self) {
        let truth = Truth::of(&self.repository.view());
        for _ in 0..8 {
            if self.upstream.is_none() {
                self.reach();
            }
            // As many as there may be selectors to ask about or to give up.
            (0..8).for_each(|_| self.ask());
            self.carry();
            for number in 0..self.behind.len() {
                if self.behind[number].session.is_none() && self.is_welcome(&self.behind[number].agent) {
                    self.connect(number);
                }
                self.hear(number);
                self.tell(number);
            }
            if self.behind.iter().all(|behind| behind.agent.is_current(&truth)) {
                break;
            }
        }
        let wrong = self.behind.iter().find(|behind| !behind.agent.is_current(&truth));
        let wrong = wrong.map(|behind| format!("in the end it knows {:?}, not {truth:?}", behind.agent));
        self.wrong = self.wrong.take().or(wrong);
    }

    fn seen(&mut self) -> Seen {
        let pump = |pump: &Option<Pump>| pump.as_ref().map(Pump::seen);
        let agents = self.behind.iter().map(|one| {
            (one.agent.clone(), pump(&one.session), format!("{:?}", one.up), self.is_welcome(&one.agent))
        });
        let agents = agents.collect();
        let relay = format!(
            "{:?} {} {:?} {} {}",
            pump(&self.upstream),
            self.resumes,
            self.orders,
            // Of a connection that is gone nothing is heard any more.
            if self.upstream.is_some() { self.reception.seen() } else { String::new() },
            self.mirror.seen()
        );
        let is_up = self.upstream.is_some();
        let asks = is_up && (!self.orders.is_empty() || !self.mirror.orders.is_empty());
        let (written, opened, epoch, faults) = (self.written, self.opened, self.epoch, self.faults.clone());
        self.settle();
        let wrong = self.wrong.take();
        Seen { written, opened, epoch, is_up, asks, relay, agents, faults, wrong }
    }
}

impl Mirror {
    /// What it answers depends on, from whichever revision somebody comes.
    fn seen(&self) -> String {
        let selectors: BTreeMap<_, _> = self
            .selectors
            .iter()
            .map(|(id, one)| {
                let names = one.members.as_ref().map(|members| members.keys().cloned().collect::<Vec<_>>());
                let mut readers: Vec<_> =
                    one.readers.values().map(|reader| format!("{:?}", reader.audience)).collect();
                readers.sort();
                (id.0, (one.text.clone(), names, format!("{:?}", one.log), readers, one.idle_since.is_some()))
            })
            .collect();
        let told: Vec<_> = (0..=self.view.revision)
            .map(|revision| {
                let told = self.view.resources_since(revision, &Audience::Host(HOST.into()));
                told.map(|told| told.len())
            })
            .collect();
        format!(
            "{} {} {:?} {told:?} {selectors:?} {} {} {:?}",
            self.epoch,
            self.view.revision,
            Truth::of(&self.view),
            self.last_id,
            self.connected,
            self.orders
        )
    }
}

/// What two ways to a state have to agree in to be one.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Seen {
    written: usize,
    opened: usize,
    epoch: u8,
    is_up: bool,
    /// The relay has questions on their way.
    asks: bool,
    relay: String,
    /// Each with its session, what it has said, and whether the relay would let it in.
    agents: Vec<(Agent, Option<String>, String, bool)>,
    faults: BTreeSet<Fault>,
    wrong: Option<String>,
}

type State = modelled::State<Action, Seen>;

/// How far the checker goes.
#[derive(Debug)]
struct Relayed {
    agents: usize,
    /// Of [`WRITES`], all in all.
    writes: usize,
    /// What may go wrong, in one history.
    faults: usize,
}

impl Relayed {
    fn play(&self, way: Vec<Action>) -> State {
        modelled::played(async {
            let mut world = World::new(self.agents).await;
            for action in &way {
                world.act(*action).await;
            }
            State { seen: world.seen(), way }
        })
    }
}

impl Model for Relayed {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        vec![self.play(Vec::new())]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        let Seen { written, is_up, asks, agents, faults, .. } = &state.seen;
        let mut try_it = |action, possible| actions.extend(Some(action).filter(|_| possible));
        try_it(Action::Write, *written < self.writes);
        try_it(Action::Reach, !is_up);
        try_it(Action::Ask, *asks);
        try_it(Action::Carry, *is_up);
        for (number, (_, session, up, is_welcome)) in agents.iter().enumerate() {
            try_it(Action::Connect(number), session.is_none() && *is_welcome);
            try_it(Action::Hear(number), up != "[]");
            try_it(Action::Tell(number), session.is_some() && up == "[]");
        }
        for fault in FAULTS {
            let possible = match fault {
                Fault::Lose => *is_up,
                Fault::Break => agents[0].1.is_some(),
                Fault::Restore => *written > WRITTEN,
                Fault::RestartController | Fault::RestartRelay | Fault::Idle => true,
            };
            try_it(Action::Fault(fault), possible && faults.len() < self.faults && !faults.contains(&fault));
        }
    }

    fn next_state(&self, state: &State, action: Action) -> Option<State> {
        let mut way = state.way.clone();
        way.push(action);
        let next = self.play(way);
        // What changes nothing leads nowhere; what goes wrong without changing anything has not gone wrong.
        let seen = Seen { faults: state.seen.faults.clone(), ..next.seen.clone() };
        (seen != state.seen).then_some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always(
                "an agent knows what the repository said at one revision",
                |_, state: &State| state.seen.wrong.is_none(),
            ),
            Property::sometimes("everything arrives", |model: &Self, state: &State| {
                let revision = |(agent, ..): &(Agent, Option<String>, String, bool)| agent.revision;
                state.seen.written == model.writes
                    && state.seen.agents.iter().all(|one| revision(one) == model.writes as u64)
            }),
            Property::sometimes("as much goes wrong as may", |model: &Self, state: &State| {
                state.seen.faults.len() == model.faults
            }),
        ]
    }
}

#[test]
fn every_way_that_the_protocol_can_go_through_a_relay_ends_where_the_repository_is() {
    // `make model` goes further.
    let whole = std::env::var_os("BULKHEAD_MODEL").is_some();
    let models = if whole {
        [Relayed { agents: 1, writes: 4, faults: 2 }, Relayed { agents: 2, writes: 3, faults: 1 }]
    } else {
        [Relayed { agents: 1, writes: 3, faults: 1 }, Relayed { agents: 2, writes: 3, faults: 0 }]
    };
    for model in models {
        let (what, began) = (format!("{model:?}"), Instant::now());
        let checker = model.checker().threads(2).spawn_bfs().join();
        let (states, depth) = (checker.unique_state_count(), checker.max_depth());
        println!("{what}: {states} states, depth {depth}, {:?}", began.elapsed());
        checker.assert_properties();
        assert!(states > 100);
    }
}
