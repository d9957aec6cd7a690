//! The protocol, every way that it can go: a model checker tries all orders of writes, messages, breaks and restarts, up to a
//! bound, with the controller's own code (the store, the view, the pump) and an agent that does what the protocol asks.
//!
//! A state is the way to it, played again from the beginning, since a view cannot be copied; two ways that lead to what cannot
//! be told apart are one state. A connection delivers in order what it delivers: what is lost is the end of it, with the
//! connection. An agent that starts anew remembers what it knew at the last barrier.

use std::collections::{BTreeMap, VecDeque};

use bulkhead_store::Memory;
use bulkhead_wire::proto::controller_message::Body;
use stateright::{Checker, Model, Property};

use super::super::*;
use crate::modelled::{self, Agent, HOST, Heard, Truth, WRITES, heard};
use crate::repository::Repository;

/// Restarts of either side, and replacements of the store by an older copy, in one history.
const RESTARTS_MAX: u8 = 1;
const RESTORES_MAX: u8 = 1;
/// What the older copy has of the writes.
const RESTORED: usize = 2;

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

impl Pump {
    /// What its messages depend on, besides what it tells from.
    pub(crate) fn seen(&self) -> String {
        let mut known: Vec<_> = self.subscriptions.iter().map(|(handle, one)| (*handle, one.known)).collect();
        known.sort_unstable();
        let unheard = self.subscriber.changed_len();
        format!("{:?} {known:?} {:?} {} {unheard}", self.resources_known, self.new, self.unanswered)
    }
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
            agent: Agent::of(HOST),
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
        self.agent.disconnect();
    }

    async fn act(&mut self, action: Action) {
        match action {
            Action::Write => {
                modelled::write(&self.store, WRITES[self.written]).await;
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
                for lines in WRITES.iter().take(RESTORED.min(self.written)) {
                    modelled::write(&self.store, lines).await;
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
        self.wrong = self.wrong.take().or_else(|| self.agent.differs(truth, revision));
    }

    fn seen(mut self) -> Seen {
        let session = self.session.as_ref().map(Pump::seen);
        let (up, down) = (format!("{:?}", self.up), self.down.iter().map(heard).collect::<Vec<_>>());
        let mut quiet = false;
        if let Some(pump) = &mut self.session {
            let silent = pump.bodies(&*self.repository.view()).is_empty();
            quiet = silent && self.up.is_empty() && self.down.is_empty();
        }
        if quiet {
            let newest = self.repository.view().revision;
            let concerned = self.truths.get(&(self.epoch, newest)).cloned().unwrap_or_default();
            if !self.agent.is_current(&concerned) {
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

type State = modelled::State<Action, Seen>;

fn play(way: Vec<Action>) -> State {
    modelled::played(async {
        let mut world = World::new().await;
        for action in &way {
            world.act(*action).await;
        }
        State { seen: world.seen(), way }
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
