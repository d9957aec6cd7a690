//! One side's policy, asked: the look-ups, the chain that asks them, and the chain that refuses.

use bulkhead_model::flow::DropReason;
use bulkhead_model::host_policy::CompiledId;
use bulkhead_model::verdict::{Builtin, Direction, Verdict as Answer};

use super::{
    Chains, DECISION, DENIED, LABEL, Roles, SCRATCH, Shape, answered, count_and_drop, count_and_goto, edge,
    first_packet, goto, handshake, has, joined, lacks, prefix, tell, turned,
};
use crate::elements;
use crate::expression::{Ct, Expression as E, Meta, Register, Tuple, Verdict};
use crate::object::Set;
use crate::schema::{
    self, ASK_BLOCKS, DEFAULT_ROW, FAMILIES, FORWARDED, FORWARDED_EGRESS, FORWARDED_INGRESS,
    FORWARDED_NUMBERS, Family, GROUP, GROUP_EGRESS, GROUP_INGRESS, GROUP_NUMBERS, GROUPS, HOST_EGRESS,
    HOST_INGRESS, HOST_INTERFACES, Kind, NAMED, NAMED_INGRESS, NAMES, REJECT, ROWS, RULE_END, STEPS, Subject,
    Through, UNRECORDED, VARIANTS, Words,
};

/// Where the number of a control group goes, beside keys.
const NUMBER: Register = 7;

/// A chain without rules: whoever is led there goes back to where it was called.
pub(super) const NOTHING: &str = "nothing";

/// Which row of a policy, found how.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Row {
    /// That of the address's own class.
    Own,
    OwnVariant,
    /// That of the class of the blocks that the address is in.
    Block,
    BlockVariant,
    Default,
    DefaultVariant,
}

/// All of them, in the order in which they are asked. Variants only where some policy asks for source ports.
///
/// An address's own class is asked for twice: one that got it, or lost it, while the packet was between two rules would have
/// neither that of its own nor that of its block, and meet the default row, which may say the opposite of either.
fn rows(variants: bool) -> &'static [Row] {
    if variants {
        &[
            Row::Own,
            Row::OwnVariant,
            Row::Block,
            Row::BlockVariant,
            Row::Own,
            Row::OwnVariant,
            Row::Default,
            Row::DefaultVariant,
        ]
    } else {
        &[Row::Own, Row::Block, Row::Own, Row::Default]
    }
}

/// By what the other end is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Peer {
    /// Its address.
    Address,
    /// It is a process of this host: what the packet's priority says of its sender.
    Priority,
    /// It is a process of this host: what the connection's label says of who began.
    Label,
    /// It is this host, and no process that anybody has named.
    Host,
}

/// One question to the tables.
#[derive(Debug, Clone, Copy)]
pub(super) struct Question {
    pub(super) subject: Subject,
    pub(super) family: &'static Family,
    pub(super) direction: Direction,
    pub(super) roles: Roles,
    pub(super) peer: Peer,
}

impl Question {
    pub(super) fn new(subject: Subject, family: &'static Family, direction: Direction, roles: Roles) -> Self {
        Self { subject, family, direction, roles, peer: Peer::Address }
    }

    /// Name of the chain that asks this.
    pub(super) fn name(&self) -> String {
        self.chain("")
    }

    /// Name of the chain that refuses.
    pub(super) fn refusing(&self) -> String {
        self.chain("refuse_")
    }

    /// Name of the chain that tries whether this is allowed, and goes back if not.
    pub(super) fn trying(&self) -> String {
        self.chain("try_")
    }

    pub(super) fn chain(&self, what: &str) -> String {
        let subject = match self.subject {
            Subject::Workload => "",
            Subject::HostAddress => "host_",
            Subject::HostInterface => "host_interface_",
            Subject::Forwarded(Through { out, any }) => match (out, any) {
                (false, false) => "in_",
                (false, true) => "any_in_",
                (true, false) => "out_",
                (true, true) => "any_out_",
            },
            Subject::Group(level) => &format!("group{level}_"),
            Subject::Labelled => "labelled_",
        };
        let peer = match self.peer {
            Peer::Address => "",
            Peer::Priority => "_by_sender",
            Peer::Label => "_by_caller",
            Peer::Host => "_by_host",
        };
        let direction = if self.direction == Direction::Egress { "egress" } else { "ingress" };
        let number = if self.family.v6 { 6 } else { 4 };
        format!("{what}{subject}{direction}{peer}_{}{number}", self.roles.tag())
    }

    pub(super) fn address(&self, tuple: Tuple, to: Register) -> E {
        E::Ct(if self.family.v6 { Ct::Source6 } else { Ct::Source4 }, Some(tuple), to)
    }

    /// Whoever is at the other end, into registers from 2 on; the family of the maps that know it.
    fn other(&self) -> (Vec<E>, &'static Family) {
        let [_, v6] = &FAMILIES;
        // The key written whole, whatever words of it are others': see `key_of`.
        let host = vec![E::Immediate(2, elements::octets(schema::NO_PROCESS))];
        let named = |number: Vec<E>| {
            let last = E::Get { map: NAMES.name, key: NUMBER, to: 5 };
            (joined([number, host.clone(), vec![last]]), v6)
        };
        match self.peer {
            Peer::Address => (vec![self.address(self.peer_tuple(), 2)], self.family),
            Peer::Priority => named(vec![E::Meta(Meta::Priority, NUMBER)]),
            Peer::Label => named(caller_group(NUMBER)),
            Peer::Host => (host, v6),
        }
    }

    /// Whether a packet is one of those at which a connection is decided.
    fn first(&self, first: bool) -> Vec<E> {
        // What goes through the loopback interface has left the host before it comes back.
        if self.peer == Peer::Address { first_packet(first) } else { answered(!first) }
    }

    fn own(&self) -> Tuple {
        match self.direction {
            Direction::Egress => self.roles.caller(),
            Direction::Ingress => self.roles.called(),
        }
    }

    pub(super) fn peer_tuple(&self) -> Tuple {
        match self.direction {
            Direction::Egress => self.roles.called(),
            Direction::Ingress => self.roles.caller(),
        }
    }

    /// What the endpoint is found by, into registers from `to` on; the set of those that there are.
    fn find(&self, to: Register) -> (Vec<E>, Set) {
        let family = self.family;
        match self.subject {
            Subject::Workload => (vec![self.address(self.own(), to)], family.ours),
            Subject::HostAddress => (vec![self.address(self.own(), to)], family.host_own),
            Subject::HostInterface => (interfaces(to), HOST_INTERFACES),
            Subject::Forwarded(through) => (vec![forwarded_through(through, to)], FORWARDED),
            Subject::Group(level) => (vec![E::Group { level, to }], GROUPS),
            Subject::Labelled => (called_group(to), NAMED),
        }
    }

    /// The policy into register 1.
    fn find_policy(&self) -> Vec<E> {
        let family = self.family;
        let (egress, ingress) = match self.subject {
            Subject::Workload => (family.egress, family.ingress),
            Subject::HostAddress => (family.host_egress, family.host_ingress),
            Subject::HostInterface => (HOST_EGRESS, HOST_INGRESS),
            Subject::Forwarded(_) => (FORWARDED_EGRESS, FORWARDED_INGRESS),
            Subject::Group(_) => (GROUP_EGRESS, GROUP_INGRESS),
            Subject::Labelled => (NAMED_INGRESS, NAMED_INGRESS),
        };
        let map = if self.direction == Direction::Egress { egress } else { ingress };
        joined([self.find(1).0, vec![E::Get { map: map.name, key: 1, to: 1 }]])
    }

    /// The policy into register 1, the class (or that of the default row) into 2, the row's number into 1.
    fn find_row(&self, row: Row) -> Vec<E> {
        let mut rule = vec![key_of(STEPS)];
        rule.extend(self.find_policy());
        let (other, family) = self.other();
        match row {
            Row::Own | Row::OwnVariant => {
                rule.extend(other);
                rule.push(E::Get { map: family.classes.name, key: 2, to: 2 });
            }
            Row::Block | Row::BlockVariant => {
                rule.extend(other);
                rule.push(E::Get { map: family.classes.name, key: 2, to: SCRATCH });
                rule.push(E::Equal(SCRATCH, ASK_BLOCKS.to_be_bytes().to_vec()));
                rule.push(E::Get { map: family.blocks.name, key: 2, to: 2 });
            }
            Row::Default | Row::DefaultVariant => {
                rule.push(E::Immediate(2, DEFAULT_ROW.to_be_bytes().to_vec()));
            }
        }
        rule.push(E::Get { map: ROWS.name, key: 0, to: 1 });
        rule
    }

    /// The decision's words into registers `to` and the next.
    fn decide(&self, row: Row, to: Register) -> Vec<E> {
        let mut rule = self.find_row(row);
        if matches!(row, Row::OwnVariant | Row::BlockVariant | Row::DefaultVariant) {
            rule.push(self.roles.source_port(2));
            rule.push(E::Get { map: VARIANTS.name, key: 0, to: 1 });
        }
        rule.push(E::Ct(Ct::Protocol, Some(Tuple::Original), 2));
        rule.push(self.roles.port(3));
        rule.push(E::Get { map: STEPS.name, key: 0, to });
        rule
    }

    /// What is asked first about a packet in the middle of a connection, taken the other way round.
    fn first_try(&self) -> Self {
        let direction = match self.subject {
            // Both ends, the caller first.
            Subject::Workload => Direction::Egress,
            _ => match self.direction {
                Direction::Egress => Direction::Ingress,
                Direction::Ingress => Direction::Egress,
            },
        };
        let subject = match self.subject {
            Subject::HostInterface => Subject::HostAddress,
            Subject::Forwarded(through) => Subject::Forwarded(Through { any: false, ..through }),
            other => other,
        };
        Self { subject, direction, roles: Roles::Reversed, peer: Peer::Address, ..*self }
    }

    /// What a refused connection is counted under, into registers 0 to 12 at most.
    fn denied_key(&self, reason: DropReason) -> Vec<E> {
        let width = if self.family.v6 { 4 } else { 1 };
        let id = E::Ct(Ct::SourcePort, Some(self.roles.caller()), 3 + 2 * width);
        let begin = schema::denied_begin(reason, self.direction, self.subject.kind());
        let whose = match self.subject {
            Subject::Group(level) => group_number(level, 1),
            Subject::Labelled => called_group(1),
            Subject::Forwarded(through) => forwarded_number(through, 1),
            _ => Vec::new(),
        };
        // As much as can be written at once: see `key_of`.
        let begin = vec![E::Immediate(0, [&begin[..], &[0; 12]].concat())];
        let key = vec![
            E::Ct(Ct::Protocol, Some(Tuple::Original), 2),
            self.address(self.roles.caller(), 3),
            self.address(self.roles.called(), 3 + width),
            id,
            self.roles.port(4 + 2 * width),
        ];
        joined([begin, whose, key])
    }
}

/// What the maps of [`FORWARDED`] are asked for.
fn forwarded_through(through: Through, to: Register) -> E {
    match through {
        Through { any: true, .. } => E::Immediate(to, vec![0; 4]),
        Through { out: false, .. } => E::Meta(Meta::InputInterface, to),
        Through { out: true, .. } => E::Meta(Meta::OutputInterface, to),
    }
}

fn forwarded_number(through: Through, to: Register) -> Vec<E> {
    vec![forwarded_through(through, to), E::Get { map: FORWARDED_NUMBERS.name, key: to, to }]
}

/// Number of the control group at a level, with [`GROUP`], and something else behind it.
pub(super) fn group_number(level: u32, to: Register) -> Vec<E> {
    vec![E::Group { level, to }, E::Get { map: GROUP_NUMBERS.name, key: to, to }]
}

fn group_of_label(word: Register, to: Register) -> Vec<E> {
    let mask = (GROUP | (RULE_END - 1)).to_be_bytes().to_vec();
    vec![E::Ct(Ct::Labels, None, LABEL), E::Mask { from: LABEL + word, to, mask }]
}

/// Number of the control group that began a connection, as its label has it.
pub(super) fn caller_group(to: Register) -> Vec<E> {
    group_of_label(1, to)
}

/// Number of the control group that was called.
pub(super) fn called_group(to: Register) -> Vec<E> {
    group_of_label(3, to)
}

/// Whether nothing is known in a connection's label of one side's decision.
pub(super) fn undecided(direction: Direction) -> Vec<E> {
    let side = if direction == Direction::Egress { 0 } else { 8 };
    let mut mask = vec![0; 16];
    // But for bits that are about something else.
    mask[side..side + 8].copy_from_slice(&schema::DECISION_MASK);
    vec![
        E::Ct(Ct::Labels, None, LABEL),
        E::Mask { from: LABEL, to: LABEL, mask },
        E::Equal(LABEL, vec![0; 16]),
    ]
}

/// The interfaces that a packet comes and goes by, of which the host's own have one.
pub(super) fn interfaces(to: Register) -> Vec<E> {
    vec![E::Meta(Meta::InputInterface, to), E::Meta(Meta::OutputInterface, to + 1)]
}

/// Zeros where a key will be. Its first word stays 0, and tells nothing: `nft` 1.0.6 dies of a rule whose key begins with
/// what came out of a map, unless the register was written at that length, and takes everybody's rules off its list.
fn key_of(set: Set) -> E {
    E::Immediate(0, vec![0; set.key_len as usize])
}

/// What happens to a packet that the tables allow.
pub(super) struct Outcome {
    /// Bit of the decision's first word that allows it.
    pub(super) bit: u32,
    /// Whether the connection's label gets the decision.
    pub(super) label: bool,
    pub(super) then: Vec<E>,
    /// What happens where nobody is asked.
    pub(super) nobody: Vec<E>,
    /// Where one goes that they do not allow; `None`: back.
    pub(super) refuse: Option<String>,
}

/// A chain that asks one side's policy.
pub(super) fn ask(question: &Question, outcome: &Outcome, variants: bool) -> Vec<Vec<E>> {
    let Outcome { bit, label, then, nobody, refuse } = outcome;
    let (find, ours) = question.find(0);
    let lacking = vec![E::Lacks { set: ours.name, key: 0 }];
    let mut rules = vec![joined([find, lacking, nobody.clone()])];
    for row in rows(variants) {
        if *label {
            let (to, zeros) = match question.direction {
                Direction::Egress => (LABEL, LABEL + 2),
                Direction::Ingress => (LABEL + 2, LABEL),
            };
            let (undecided, whose) = match question.subject {
                Subject::Workload => (Vec::new(), Vec::new()),
                Subject::Group(level) => (undecided(question.direction), group_number(level, 0)),
                Subject::Forwarded(through) => (undecided(question.direction), forwarded_number(through, 0)),
                _ => (undecided(question.direction), Vec::new()),
            };
            // The number instead of the audit rule: conntrack does not know whose a socket is.
            let copied = E::Mask { from: 0, to: to + 1, mask: vec![0xff; 4] };
            let named = if whose.is_empty() { Vec::new() } else { joined([whose, vec![copied]]) };
            rules.push(joined([
                question.first(true),
                undecided,
                question.decide(*row, to),
                has(*bit, to),
                named,
                vec![E::Immediate(zeros, vec![0; 8]), E::SetCt(Ct::Labels, LABEL)],
                then.clone(),
            ]));
        }
        rules.push(joined([question.decide(*row, DECISION), has(*bit, DECISION), then.clone()]));
        if !matches!(row, Row::Default | Row::DefaultVariant) {
            // The class has a row, and that does not allow it: the default row has no say.
            let away = refuse.as_deref().unwrap_or(NOTHING);
            rules.push(joined([question.decide(*row, DECISION), lacks(*bit, DECISION), goto(away)]));
        }
    }
    rules.extend(refuse.as_ref().map(|refuse| goto(refuse.clone())));
    rules
}

/// A chain that refuses: counted in the connection's entry, told when that is made.
pub(super) fn refuse(question: &Question, log_group: u16, shape: Shape, chains: &mut Chains) {
    let variants = shape.variants;
    let mut rules = Vec::new();
    let drop = |reason| {
        if shape.rejects { count_and_goto(reason, question.chain("tell_")) } else { count_and_drop(reason) }
    };
    if shape.rejects {
        chains.push((question.chain("tell_"), tell(question, variants)));
    }
    if question.roles == Roles::Ports && question.subject != Subject::Labelled {
        // Its entry may have been lost, or the tables came after it: whoever began, if that was allowed, it goes on.
        let again = vec![E::Verdict(Verdict::Jump(question.first_try().trying()))];
        rules.push(joined([question.first(true), handshake(false), again]));
        rules.push(joined([
            question.first(true),
            handshake(false),
            turned(),
            vec![E::Verdict(Verdict::Return)],
        ]));
    }
    let denied = question.family.denied.name;
    let seen = [(true, DropReason::Policy), (false, DropReason::Revoked)];
    for (first, reason) in seen.into_iter().chain([(true, DropReason::Unprogrammed)]) {
        rules.push(joined([
            question.first(first),
            question.denied_key(reason),
            vec![E::Get { map: denied, key: 0, to: DENIED }],
            drop(reason),
        ]));
    }
    let add = E::Add { map: denied, key: 0, data: DENIED };
    // The rule; of a process, who it is, which nothing else tells.
    let told = if question.subject.kind() == Kind::Group { 1 } else { DENIED + 1 };
    let prefix = |reason| prefix(question.subject.kind(), reason, question.direction);
    let log =
        |reason| vec![E::SetMeta(Meta::Mark, told), E::Log { group: log_group, prefix: prefix(reason) }];
    for (first, reason) in seen {
        for row in rows(variants) {
            rules.push(joined([
                question.first(first),
                vec![E::Immediate(DENIED, vec![0; 12])],
                question.decide(*row, DENIED + 1),
                question.denied_key(reason),
                vec![add.clone()],
                if first { log(reason) } else { Vec::new() },
                drop(reason),
            ]));
        }
    }
    let none = schema::denied_data(Words::builtin(Builtin::Unprogrammed, Answer::Deny));
    let reason = DropReason::Unprogrammed;
    for (first, reason) in seen {
        let full = vec![E::Count(UNRECORDED)];
        let row = question.find_row(Row::Default);
        rules.push(joined([question.first(first), row, full, drop(reason)]));
    }
    rules.push(joined([
        question.denied_key(reason),
        vec![E::Immediate(DENIED, none), add],
        log(reason),
        count_and_drop(reason),
    ]));
    rules.push(joined([vec![E::Count(UNRECORDED)], count_and_drop(reason)]));
    chains.push((question.refusing(), rules));
}

/// What is left of a refusal when it has been counted: whoever is refused is told, if the rule that refuses says so. Asked
/// anew, since the entry that counts has the rule by which it was made.
fn tell(question: &Question, variants: bool) -> Vec<Vec<E>> {
    let family = question.family;
    // Whoever is closed to everything hears nothing: its interface would refuse the answer, and that would be reported.
    let closed = vec![
        edge::address(family, true, 0),
        E::Get { map: family.ingress.name, key: 0, to: DECISION },
        E::Equal(DECISION, CompiledId::NONE.0.to_be_bytes().to_vec()),
        E::Verdict(Verdict::Drop),
    ];
    let mut rules = vec![closed];
    for row in rows(variants) {
        rules.push(joined([question.decide(*row, DECISION), has(REJECT, DECISION), goto(tell::CHAIN)]));
        rules.push(joined([question.decide(*row, DECISION), vec![E::Verdict(Verdict::Drop)]]));
    }
    rules.push(vec![E::Verdict(Verdict::Drop)]);
    rules
}
