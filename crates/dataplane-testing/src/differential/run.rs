//! Brings a dataplane through a history, and asks everybody about every connection in every state.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::net::IpAddr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Instant;

use bulkhead_engine::{Judgement, judge};
use bulkhead_model::flow::{FlowEvent, RawFlow};
use bulkhead_model::host_policy::{Attachment, Cell, HostPolicy};
use bulkhead_model::labels::HOST_LABEL;
use bulkhead_model::ports::Protocol;
use bulkhead_model::verdict::{Direction, Verdict};
use bulkhead_model::{Entity, Prefix};

use super::case::{Case, Expected, Question, Step, holder};
use super::history::{HOST, State};
use super::world::{OUTSIDE, World};
use crate::frames::{numbered, sctp_init};
use crate::machine::Machine;
use crate::packet::{Packet, SYN};
use crate::policy::cell;
use crate::stations::station;

/// Something that somebody answers otherwise than the reference does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mismatch {
    /// In the state after which step, from 0.
    pub step: usize,
    /// How that state was reached.
    pub reached: &'static str,
    /// About which connection, if about one.
    pub flow: Option<Question>,
    /// Who says what.
    pub what: String,
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "step {} ({})", self.step, self.reached)?;
        if let Some(flow) = &self.flow {
            write!(f, ", {flow}")?;
        }
        write!(f, ": {}", self.what)
    }
}

/// What a case came to.
#[derive(Debug, Clone, Default)]
pub struct Answered {
    /// Connections that were tried, each time counted.
    pub flows: usize,
    /// Those that passed.
    pub passed: usize,
    /// States that were compared, each time counted.
    pub states: usize,
    /// What was wrong.
    pub mismatches: Vec<Mismatch>,
}

impl Answered {
    /// Takes in what another case came to.
    pub fn add(&mut self, other: &Self) {
        self.flows += other.flows;
        self.passed += other.passed;
        self.states += other.states;
        self.mismatches.extend(other.mismatches.iter().cloned());
    }
}

/// One end's part of a connection.
struct Side {
    direction: Direction,
    endpoint: Arc<str>,
    attachment: Attachment,
    own: IpAddr,
    peer: IpAddr,
    cell: Cell,
}

/// A connection on its way.
struct Underway<'a> {
    question: &'a Question,
    number: u16,
    receiver: usize,
    sides: Vec<Side>,
}

/// After a restart and before anything is put into force.
const LEFT: &str = "left by the process before";

/// By what an event is recognised.
type Place = (Attachment, Protocol, (IpAddr, u16), (IpAddr, u16), Direction);

impl Underway<'_> {
    fn allowed(&self) -> bool {
        self.sides.iter().all(|side| side.cell.verdict == Verdict::Allow)
    }

    fn place(&self, side: &Side) -> Place {
        let Question { protocol, port, source_port, .. } = self.question;
        let (here, there) = match (protocol.is_icmp(), side.direction) {
            (true, _) => (self.number, *port),
            (false, Direction::Egress) => (*source_port, *port),
            (false, Direction::Ingress) => (*port, *source_port),
        };
        (side.attachment, *protocol, (side.own, here), (side.peer, there), side.direction)
    }

    /// The ends that must report, and those that may: a sender that allows what the receiver then refuses has something
    /// to tell in one dataplane, and nothing in the other.
    fn must_report(&self, side: &Side) -> bool {
        self.allowed() || side.cell.verdict == Verdict::Deny && !self.refused_before(side)
    }

    /// What the sender's policy refuses never comes to the receiver's.
    fn refused_before(&self, side: &Side) -> bool {
        let sender = |other: &Side| other.direction == Direction::Egress;
        side.direction == Direction::Ingress
            && self.sides.iter().any(|other| sender(other) && other.cell.verdict == Verdict::Deny)
    }
}

impl World {
    /// Runs a case from the beginning.
    ///
    /// # Errors
    /// If it is no case: an object is refused, or they contradict each other.
    pub fn run(&mut self, case: &Case) -> Result<Answered, String> {
        let states = State::all(case)?;
        let mut answered = Answered::default();
        let run = AssertUnwindSafe(|| self.bring_through(case, &states, &mut answered));
        if let Err(panic) = catch_unwind(run) {
            let text = panic.downcast_ref::<String>().cloned();
            let text = text.or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string));
            let what = format!("panicked: {}", text.unwrap_or_default());
            answered.mismatches.push(Mismatch { step: 0, reached: "somehow", flow: None, what });
            self.reopen();
        }
        if self.forget().is_err() {
            self.reopen();
        }
        Ok(answered)
    }

    fn bring_through(&mut self, case: &Case, states: &[State], answered: &mut Answered) {
        let mut slots = BTreeMap::new();
        let interfaces: Vec<_> = (0..super::world::SLOTS).map(|slot| self.interface(slot)).collect();
        let mut machine = State::default().machine(&interfaces, &mut slots).unwrap();
        for (index, (step, state)) in case.steps.iter().zip(states).enumerate() {
            let whole = index == 0 || step.restart;
            if whole && index > 0 {
                self.reopen();
                let mut at = At { step: index, reached: LEFT, answered };
                self.compare(&mut at, step, &machine);
            }
            let applied = if whole {
                machine = state.machine(&interfaces, &mut slots).unwrap();
                machine.settle();
                self.dataplane.replace(&machine.policy()).map(|_| ())
            } else {
                state.bring(&mut machine, &interfaces, &mut slots).unwrap();
                let mut deltas = machine.settle().into_iter();
                deltas.try_for_each(|delta| self.dataplane.apply(&delta).map(|_| ()))
            };
            let reached = if whole { "put there whole" } else { "by the difference" };
            let mut at = At { step: index, reached, answered };
            if let Err(error) = applied {
                at.wrong(None, format!("the dataplane refuses it: {error}"));
                return;
            }
            self.route(&machine.policy());
            self.compare(&mut at, step, &machine);
        }
        let (Some(step), Some(state)) = (case.steps.last(), states.last()) else { return };
        let mut fresh = state.machine(&interfaces, &mut slots).unwrap();
        fresh.settle();
        let mut at = At { step: case.steps.len() - 1, reached: "from scratch", answered };
        match self.dataplane.replace(&fresh.policy()) {
            Ok(_) => self.compare(&mut at, step, &fresh),
            Err(error) => at.wrong(None, format!("the dataplane refuses it: {error}")),
        }
    }

    fn compare(&mut self, at: &mut At<'_>, step: &Step, machine: &Machine) {
        let policy = machine.policy();
        self.compare_tables(at, &policy);
        at.answered.states += 1;
        let refused_before = self.refused();
        let mut underway = Vec::new();
        for question in &step.flows {
            self.number = self.number.wrapping_add(1).max(1);
            underway.extend(self.ask(at, machine, &policy, question, self.number));
        }
        self.compare_packets(at, &underway, refused_before);
        if let Err(error) = self.forget() {
            at.wrong(None, format!("sweep: {error}"));
        }
    }

    /// What is read back is what was put there, as far as an endpoint can reach it.
    fn compare_tables(&self, at: &mut At<'_>, policy: &HostPolicy) {
        let read = match self.dataplane.read_back() {
            Ok(read) => read,
            Err(error) => return at.wrong(None, format!("read back: {error}")),
        };
        let wanted: BTreeMap<_, _> =
            policy.endpoints.values().map(|binding| (binding.attachment, binding)).collect();
        let found: BTreeMap<_, _> =
            read.endpoints.values().map(|binding| (binding.attachment, binding)).collect();
        if found != wanted {
            at.wrong(None, format!("endpoints read back {found:?}, wanted {wanted:?}"));
        }
        if !wanted.is_empty() && read.addresses != policy.addresses {
            let (found, wanted) = (&read.addresses, &policy.addresses);
            at.wrong(None, format!("addresses read back {found:?}, wanted {wanted:?}"));
        }
        let bound: BTreeSet<_> =
            wanted.values().flat_map(|binding| [binding.ingress, binding.egress]).collect();
        for id in &bound {
            let (found, wanted) = (read.policies.get(id), policy.policies.get(id));
            if found != wanted {
                at.wrong(None, format!("compiled policy read back {found:?}, wanted {wanted:?}"));
            }
        }
        if let Some(more) = read.policies.keys().find(|id| !bound.contains(id)) {
            at.wrong(None, format!("compiled policy {more:?} that nobody is bound to is still there"));
        }
    }

    /// Compares what can be compared without a packet, and sends one.
    fn ask<'a>(
        &self,
        at: &mut At<'_>,
        machine: &Machine,
        policy: &HostPolicy,
        question: &'a Question,
        number: u16,
    ) -> Option<Underway<'a>> {
        let Question { from, to, .. } = question;
        let (sender, receiver) = (self.place(*from), self.place(*to));
        if sender == receiver {
            // Nothing that this host sees.
            return None;
        }
        let mut sides = Vec::new();
        let mut said = [None, None];
        for (direction, own, peer) in [(Direction::Egress, *from, *to), (Direction::Ingress, *to, *from)] {
            let Some(endpoint) = holder(policy, own) else { continue };
            let entity = &machine.fleet().world().entities[endpoint];
            let (cell, judged) = self.judged(at, machine, policy, entity, direction, peer, question);
            said[usize::from(direction == Direction::Ingress)] = Some(spoken(&judged));
            let attachment = policy.endpoints[endpoint].attachment;
            sides.push(Side { direction, endpoint: Arc::clone(endpoint), attachment, own, peer, cell });
        }
        // What is expected is expected of the new state.
        if let Some(expected) = question.expect.as_ref().filter(|_| at.reached != LEFT)
            && [&expected.egress, &expected.ingress] != [&said[0], &said[1]]
        {
            at.wrong(Some(question), format!("the reference says {said:?}, the case {expected:?}"));
        }
        let frame =
            numbered(&packet(question, number), station(sender, false), station(sender, true), number);
        self.send(sender, &frame);
        Some(Underway { question, number, receiver, sides })
    }

    #[expect(clippy::too_many_arguments, reason = "a question, and everybody who may be asked")]
    fn judged(
        &self,
        at: &mut At<'_>,
        machine: &Machine,
        policy: &HostPolicy,
        entity: &Entity,
        direction: Direction,
        peer: IpAddr,
        question: &Question,
    ) -> (Cell, Judgement) {
        let (key, source) = (question.key(), question.source_port);
        let judged = judge(machine.fleet().world(), entity, direction, peer, key, source);
        let cell = policy.lookup(&entity.name, direction, peer, key, source);
        let rule = |id| policy.rules.get(&id);
        let found = cell.map(|cell| {
            let (enforced, audit) = (rule(cell.rule), rule(cell.audit_rule));
            (cell.verdict, enforced, cell.audit_verdict, audit, cell.log, cell.reject)
        });
        let Judgement { verdict, rule, audit_verdict, audit_rule, log, reject, .. } = &judged;
        let wanted = (*verdict, Some(rule), *audit_verdict, Some(audit_rule), *log, *reject);
        if found != Some(wanted) {
            at.wrong(Some(question), format!("{direction}: tables say {found:?}, the reference {wanted:?}"));
        }
        let attachment = policy.endpoints[&entity.name].attachment;
        match self.dataplane.lookup(attachment, direction, peer, key, source) {
            Ok(held) if held == cell => {}
            held => at.wrong(
                Some(question),
                format!("{direction}: the kernel holds {held:?}, the tables {cell:?}"),
            ),
        }
        (cell.unwrap_or(self::cell(Verdict::Deny, 1, false)), judged)
    }

    fn compare_packets(&mut self, at: &mut At<'_>, underway: &[Underway<'_>], refused_before: u64) {
        let refused = underway.iter().filter(|one| !one.allowed()).count() as u64;
        let on_their_way = underway.iter().map(|one| (one.number, one.question.to)).collect();
        let mut arrived = BTreeSet::new();
        let mut told: HashMap<Place, Vec<RawFlow>> = HashMap::new();
        let deadline = Instant::now() + self.patience;
        loop {
            // Before looking: a machine that stood still for a while gets another look.
            let late = Instant::now() > deadline;
            let mut keep = |flow: RawFlow| {
                if matches!(flow.event, FlowEvent::Open | FlowEvent::Deny) {
                    let key = flow.key;
                    let (local, peer) = ((key.local, key.local_port), (key.peer, key.peer_port));
                    let place = (key.attachment, key.protocol, local, peer, flow.direction);
                    told.entry(place).or_default().push(flow);
                }
            };
            if let Err(error) = self.dataplane.poll(&mut keep) {
                at.wrong(None, format!("poll: {error}"));
            }
            self.hear(&on_their_way, &mut arrived);
            // Where nothing is told, what is refused is at least counted.
            let all_met = !at.is_silent() || self.refused() >= refused_before + refused;
            let complete = all_met
                && underway.iter().all(|one| {
                    let must = one.sides.iter().filter(|side| one.must_report(side));
                    (!one.allowed() || arrived.contains(&(one.receiver, one.number)))
                        && (at.is_silent()
                            || must.into_iter().all(|side| told.contains_key(&one.place(side))))
                });
            if complete {
                break;
            }
            if late {
                let (waited, stats) = (self.patience, self.dataplane.stats().map(|stats| stats.lost_events));
                at.wrong(
                    None,
                    format!("something was not there after {waited:?}; reports lost so far: {stats:?}"),
                );
                break;
            }
            std::thread::yield_now();
        }
        for one in underway {
            let passed = arrived.remove(&(one.receiver, one.number));
            at.answered.flows += 1;
            at.answered.passed += usize::from(passed);
            if passed != one.allowed() {
                let word = if passed { "passed" } else { "did not pass" };
                at.wrong(Some(one.question), format!("the packet {word}: {}", one.opinions()));
            }
            for side in &one.sides {
                compare_reports(at, one, side, &told.remove(&one.place(side)).unwrap_or_default());
            }
        }
        for (number, _) in arrived {
            at.wrong(None, format!("a packet came out at {number}, where nobody expects one"));
        }
        for flows in told.into_values() {
            at.wrong(None, format!("reports about nothing that was tried: {flows:?}"));
        }
    }
}

impl Case {
    /// The same with what the reference says of every connection, so that it is known when it says something else.
    ///
    /// # Errors
    /// If it is no case.
    pub fn with_answers(&self) -> Result<Self, String> {
        let mut answered = self.clone();
        for (step, state) in answered.steps.iter_mut().zip(State::all(self)?) {
            let machine = state.machine(&[0; super::world::SLOTS], &mut BTreeMap::new())?;
            let world = machine.fleet().world();
            for question in &mut step.flows {
                let Question { from, to, source_port, .. } = *question;
                let says = |direction, own: IpAddr, peer| {
                    let ours = |entity: &&Entity| {
                        entity.is_endpoint()
                            && entity.labels.get(HOST_LABEL) == Some(HOST)
                            && entity.prefixes.contains(&Prefix::host(own))
                    };
                    let entity = world.entities.values().find(ours)?;
                    Some(spoken(&judge(world, entity, direction, peer, question.key(), source_port)))
                };
                let (egress, ingress) =
                    (says(Direction::Egress, from, to), says(Direction::Ingress, to, from));
                question.expect = Some(Expected { egress, ingress });
            }
        }
        Ok(answered)
    }
}

/// How a judgement stands in a case.
fn spoken(judged: &Judgement) -> String {
    format!("{} by {}", judged.verdict, judged.rule)
}

fn compare_reports(at: &mut At<'_>, one: &Underway<'_>, side: &Side, told: &[RawFlow]) {
    let Side { direction, cell, .. } = side;
    let [report] = told else {
        let may_be_silent = told.is_empty() && (at.is_silent() || !one.must_report(side));
        if !may_be_silent {
            let (count, verdict) = (told.len(), cell.verdict);
            at.wrong(Some(one.question), format!("{direction}: {verdict}, but {count} reports: {told:?}"));
        }
        return;
    };
    if one.refused_before(side) {
        return at.wrong(Some(one.question), format!("the receiver saw what the sender refuses: {report:?}"));
    }
    let event = if cell.verdict == Verdict::Allow { FlowEvent::Open } else { FlowEvent::Deny };
    let wanted = (event, cell.verdict, cell.rule, cell.audit_verdict, cell.audit_rule);
    let found = (report.event, report.verdict, report.rule, report.audit_verdict, report.audit_rule);
    if found != wanted {
        at.wrong(Some(one.question), format!("{direction}: reported {found:?}, the tables say {wanted:?}"));
    }
}

impl Underway<'_> {
    fn opinions(&self) -> String {
        let opinion =
            |side: &Side| format!("{} of {} says {}", side.direction, side.endpoint, side.cell.verdict);
        self.sides.iter().map(opinion).collect::<Vec<_>>().join(", ")
    }
}

/// Where in a history, and what has been found so far.
struct At<'a> {
    step: usize,
    reached: &'static str,
    answered: &'a mut Answered,
}

impl At<'_> {
    /// Whether nothing need be told: a new process may not know yet whose the addresses are (nftables).
    fn is_silent(&self) -> bool {
        self.reached == LEFT
    }

    fn wrong(&mut self, flow: Option<&Question>, what: String) {
        let mismatch = Mismatch { step: self.step, reached: self.reached, flow: flow.cloned(), what };
        self.answered.mismatches.push(mismatch);
    }
}

/// The first packet of a connection. Echo requests carry the number as their identifier.
fn packet(question: &Question, number: u16) -> Packet {
    let Question { from, to, protocol, port, source_port, .. } = question;
    match *protocol {
        Protocol::TCP => Packet::tcp(*from, *source_port, *to, *port, SYN),
        Protocol::UDP => Packet::udp(*from, *source_port, *to, *port),
        Protocol::SCTP => sctp_init(*from, *source_port, *to, *port),
        Protocol::ICMP | Protocol::ICMPV6 => Packet::icmp(*from, *to, (port >> 8) as u8, *port as u8, number),
        other => Packet::new(*from, *to, other, vec![7; 16]),
    }
}

const _: () = assert!(OUTSIDE < 255, "stations are told apart by one byte of their address");
