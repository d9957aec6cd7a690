//! The rules: constant, whatever the policy. Everything that changes stands in sets.
//!
//! ```text
//! forward, input, output ──► family ──► egress of the caller ──► ingress of the called ──► accept
//!  (after DNAT, before SNAT)   │             └──────────────┬────────────┘
//!                              └─ nobody of ours: accept    └─► refuse: count, tell once, drop
//! ```
//!
//! Every packet is judged, those of established connections too, and always as its connection: by the addresses and
//! ports that conntrack keeps, as the caller uses its own and the called is really reached. So a policy that
//! changes cuts at the next packet, in both directions, and nothing has to be marked or forgotten.
//!
//! A register does not outlive its rule (the kernel refuses to read one that the same rule has not written), so
//! what a rule must know it looks up itself, and a question with a fallback is several rules.

use bulkhead_model::flow::DropReason;
use bulkhead_model::verdict::{Builtin, Direction, Verdict as Answer};

use crate::expression::{Base, Ct, Expression as E, Meta, Register, Tuple, Verdict};
use crate::object::Set;
use crate::schema::{
    self, ALLOW, ASK_BLOCKS, DEFAULT_ROW, FAMILIES, Family, HOST_MAY, REVERSED, ROWS, STEPS, UNRECORDED,
    VARIANTS, Words,
};

pub(crate) mod edge;
mod entry;

/// Chains with their rules, in an order in which each only leads to earlier ones.
pub(crate) type Chains = Vec<(String, Vec<Vec<E>>)>;

/// `IPS_CONFIRMED` (linux/netfilter/nf_conntrack_common.h), in the byte order of this machine.
const CONFIRMED: u32 = 1 << 3;
const TCP: u8 = 6;
const UDP: u8 = 17;
const ICMP: u8 = 1;
const ICMPV6: u8 = 58;
const SYN: u8 = 0x02;
const ACK: u8 = 0x10;
/// Offset of the flags in a TCP header.
const TCP_FLAGS: u32 = 13;

/// A chain without rules: whoever is led there goes back to where it was called.
const NOTHING: &str = "nothing";

/// Where the decision of a look-up goes, and room for masking.
const DECISION: Register = 13;
const SCRATCH: Register = 15;
/// What an entry of the refused holds: a word of zeros, as of keys, and the decision.
const DENIED: Register = 13;
/// A label takes four registers from here.
const LABEL: Register = 8;

/// Who began, as conntrack has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Roles {
    /// Protocols with ports, and those with nothing of the kind (their ports are 0).
    Ports,
    /// ICMP: the port is type and code of the first message.
    Icmp,
    /// A TCP connection that was met halfway by a packet of the side that was called.
    Reversed,
}

impl Roles {
    fn tag(self) -> &'static str {
        match self {
            Self::Ports => "ports",
            Self::Icmp => "icmp",
            Self::Reversed => "reversed",
        }
    }

    fn caller(self) -> Tuple {
        match self {
            Self::Ports | Self::Icmp => Tuple::Original,
            Self::Reversed => Tuple::Reply,
        }
    }

    fn called(self) -> Tuple {
        match self {
            Self::Ports | Self::Icmp => Tuple::Reply,
            Self::Reversed => Tuple::Original,
        }
    }

    fn port(self, to: Register) -> E {
        match self {
            Self::Ports | Self::Reversed => E::Ct(Ct::SourcePort, Some(self.called()), to),
            Self::Icmp => E::Ct(Ct::DestinationPort, Some(Tuple::Original), to),
        }
    }

    /// For rows that ask for the source port.
    fn source_port(self, to: Register) -> E {
        match self {
            Self::Ports | Self::Reversed => E::Ct(Ct::SourcePort, Some(self.caller()), to),
            Self::Icmp => E::Immediate(to, vec![0; 4]),
        }
    }
}

/// Which row of a policy, found how.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Row {
    /// That of the address's own class.
    Own,
    OwnVariant,
    /// That of the class of the blocks that the address is in.
    Block,
    BlockVariant,
    Default,
    DefaultVariant,
}

/// All of them. Variants only where some policy asks for source ports.
fn rows(variants: bool) -> &'static [Row] {
    if variants {
        &[Row::Own, Row::OwnVariant, Row::Block, Row::BlockVariant, Row::Default, Row::DefaultVariant]
    } else {
        &[Row::Own, Row::Block, Row::Default]
    }
}

/// One question to the tables.
#[derive(Debug, Clone, Copy)]
struct Question {
    family: &'static Family,
    direction: Direction,
    roles: Roles,
}

impl Question {
    fn name(&self, what: &str) -> String {
        format!("{what}_{}{}", self.roles.tag(), if self.family.v6 { 6 } else { 4 })
    }

    fn address(&self, tuple: Tuple, to: Register) -> E {
        E::Ct(if self.family.v6 { Ct::Source6 } else { Ct::Source4 }, Some(tuple), to)
    }

    fn subject(&self) -> Tuple {
        match self.direction {
            Direction::Egress => self.roles.caller(),
            Direction::Ingress => self.roles.called(),
        }
    }

    fn peer(&self) -> Tuple {
        match self.direction {
            Direction::Egress => self.roles.called(),
            Direction::Ingress => self.roles.caller(),
        }
    }

    /// The policy into register 1, the class (or that of the default row) into 2, the row's number into 1.
    fn find_row(&self, row: Row) -> Vec<E> {
        let policy = match self.direction {
            Direction::Egress => self.family.egress.name,
            Direction::Ingress => self.family.ingress.name,
        };
        let mut rule = vec![key_of(STEPS)];
        rule.push(self.address(self.subject(), 1));
        rule.push(E::Get { map: policy, key: 1, to: 1 });
        match row {
            Row::Own | Row::OwnVariant => {
                rule.push(self.address(self.peer(), 2));
                rule.push(E::Get { map: self.family.classes.name, key: 2, to: 2 });
            }
            Row::Block | Row::BlockVariant => {
                rule.push(self.address(self.peer(), 2));
                rule.push(E::Get { map: self.family.classes.name, key: 2, to: SCRATCH });
                rule.push(E::Equal(SCRATCH, ASK_BLOCKS.to_be_bytes().to_vec()));
                rule.push(E::Get { map: self.family.blocks.name, key: 2, to: 2 });
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

    /// What a refused connection is counted under, into registers 0 to 12 at most.
    fn denied_key(&self, reason: DropReason) -> Vec<E> {
        let width = if self.family.v6 { 4 } else { 1 };
        let id = E::Ct(Ct::SourcePort, Some(self.roles.caller()), 3 + 2 * width);
        vec![
            schema::denied_begin(reason, self.direction),
            E::Immediate(1, vec![0; 4]),
            E::Ct(Ct::Protocol, Some(Tuple::Original), 2),
            self.address(self.roles.caller(), 3),
            self.address(self.roles.called(), 3 + width),
            id,
            self.roles.port(4 + 2 * width),
        ]
    }
}

/// Zeros where a key will be. Its first word stays 0, and tells nothing: `nft` 1.0.6 dies of a rule whose key begins with
/// what came out of a map, unless the register was written at that length, and takes everybody's rules off its list.
fn key_of(set: Set) -> E {
    E::Immediate(0, vec![0; set.key_len as usize])
}

fn joined(parts: impl IntoIterator<Item = Vec<E>>) -> Vec<E> {
    parts.into_iter().flatten().collect()
}

/// Whether this is the first packet of its connection.
fn first_packet(first: bool) -> Vec<E> {
    let mask = CONFIRMED.to_ne_bytes().to_vec();
    let zero = vec![0; 4];
    vec![
        E::Ct(Ct::Status, None, SCRATCH),
        E::Mask { from: SCRATCH, to: SCRATCH, mask },
        if first { E::Equal(SCRATCH, zero) } else { E::NotEqual(SCRATCH, zero) },
    ]
}

fn has(bit: u32, word: Register) -> Vec<E> {
    let mask = bit.to_be_bytes().to_vec();
    vec![E::Mask { from: word, to: SCRATCH, mask }, E::NotEqual(SCRATCH, vec![0; 4])]
}

fn lacks(bit: u32, word: Register) -> Vec<E> {
    let mask = bit.to_be_bytes().to_vec();
    vec![E::Mask { from: word, to: SCRATCH, mask }, E::Equal(SCRATCH, vec![0; 4])]
}

/// A TCP packet that is (or is not) the very first of a handshake.
fn handshake(begins: bool) -> Vec<E> {
    let flags = E::Payload { base: Base::Transport, offset: TCP_FLAGS, len: 1, to: SCRATCH };
    let compare = if begins { E::Equal(SCRATCH, vec![SYN]) } else { E::NotEqual(SCRATCH, vec![SYN]) };
    vec![
        E::Meta(Meta::Transport, SCRATCH),
        E::Equal(SCRATCH, vec![TCP]),
        flags,
        E::Mask { from: SCRATCH, to: SCRATCH, mask: vec![SYN | ACK] },
        compare,
    ]
}

fn count_and_drop(reason: DropReason) -> Vec<E> {
    let named = schema::COUNTERS.iter().find(|(_, other)| *other == reason).map(|(name, _)| *name);
    vec![E::Count(named.unwrap_or("policy")), E::Verdict(Verdict::Drop)]
}

/// What happens to a packet that the tables allow.
struct Outcome {
    /// Bit of the decision's first word that allows it.
    bit: u32,
    /// Whether the connection's label gets the decision.
    label: bool,
    then: Vec<E>,
    /// Where one goes that they do not allow; `None`: back.
    refuse: Option<String>,
}

/// A chain that asks one side's policy.
fn ask(question: &Question, outcome: &Outcome, variants: bool) -> Vec<Vec<E>> {
    let Outcome { bit, label, then, refuse } = outcome;
    let ours = E::Lacks { set: question.family.ours.name, key: 0 };
    let mut rules = vec![joined([vec![question.address(question.subject(), 0), ours], then.clone()])];
    for row in rows(variants) {
        if *label {
            let (to, zeros) = match question.direction {
                Direction::Egress => (LABEL, LABEL + 2),
                Direction::Ingress => (LABEL + 2, LABEL),
            };
            rules.push(joined([
                first_packet(true),
                question.decide(*row, to),
                has(*bit, to),
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
    if let Some(refuse) = refuse {
        rules.push(vec![E::Verdict(Verdict::Goto(refuse.clone()))]);
    }
    rules
}

/// A chain that refuses: counted in the connection's entry, told when that is made.
fn refuse(question: &Question, log_group: u16, variants: bool) -> Vec<Vec<E>> {
    let mut rules = Vec::new();
    if question.roles == Roles::Ports {
        // Its entry may have been lost, or the tables came after it: whoever began, if that was allowed, it goes on.
        let again = vec![E::Verdict(Verdict::Jump(reversed(question.family, "try_egress")))];
        rules.push(joined([first_packet(true), handshake(false), again]));
    }
    let denied = question.family.denied.name;
    let seen = [(true, DropReason::Policy), (false, DropReason::Revoked)];
    for (first, reason) in seen.into_iter().chain([(true, DropReason::Unprogrammed)]) {
        rules.push(joined([
            first_packet(first),
            question.denied_key(reason),
            vec![E::Get { map: denied, key: 0, to: DENIED }],
            count_and_drop(reason),
        ]));
    }
    let add = E::Add { map: denied, key: 0, data: DENIED };
    let tell = |prefix| vec![E::SetMeta(Meta::Mark, DENIED + 1), E::Log { group: log_group, prefix }];
    for (first, reason) in seen {
        for row in rows(variants) {
            rules.push(joined([
                first_packet(first),
                vec![E::Immediate(DENIED, vec![0; 12])],
                question.decide(*row, DENIED + 1),
                question.denied_key(reason),
                vec![add.clone()],
                if first { tell(prefix(reason, question.direction)) } else { Vec::new() },
                count_and_drop(reason),
            ]));
        }
    }
    let none = schema::denied_data(Words::builtin(Builtin::Unprogrammed, Answer::Deny));
    let reason = DropReason::Unprogrammed;
    for (first, reason) in seen {
        let full = vec![E::Count(UNRECORDED)];
        let row = question.find_row(Row::Default);
        rules.push(joined([first_packet(first), row, full, count_and_drop(reason)]));
    }
    rules.push(joined([
        question.denied_key(reason),
        vec![E::Immediate(DENIED, none), add],
        tell(prefix(reason, question.direction)),
        count_and_drop(reason),
    ]));
    rules.push(joined([vec![E::Count(UNRECORDED)], count_and_drop(reason)]));
    rules
}

/// What a log message says before its packet: see [`crate::log`].
pub(crate) fn prefix(reason: DropReason, direction: Direction) -> &'static str {
    let egress = direction == Direction::Egress;
    match reason {
        DropReason::Unprogrammed if egress => "bulkhead egress unprogrammed",
        DropReason::Unprogrammed => "bulkhead ingress unprogrammed",
        DropReason::Spoofed => "bulkhead egress spoofed",
        DropReason::Malformed if egress => "bulkhead egress malformed",
        DropReason::Malformed => "bulkhead ingress malformed",
        _ if egress => "bulkhead egress policy",
        _ => "bulkhead ingress policy",
    }
}

fn reversed(family: &Family, what: &str) -> String {
    format!("{what}_reversed{}", if family.v6 { 6 } else { 4 })
}

fn goto(chain: impl Into<String>) -> Vec<E> {
    vec![E::Verdict(Verdict::Goto(chain.into()))]
}

fn accept() -> Vec<E> {
    vec![E::Verdict(Verdict::Accept)]
}

/// The chains that judge connections of one family.
fn judging(family: &'static Family, log_group: u16, variants: bool, chains: &mut Chains) {
    let question = |direction, roles| Question { family, direction, roles };
    let mut label = vec![0; 4];
    label.extend(REVERSED.to_be_bytes());
    label.resize(16, 0);
    let keep = vec![E::Immediate(LABEL, label), E::SetCt(Ct::Labels, LABEL)];
    let (egress, ingress) =
        (question(Direction::Egress, Roles::Reversed), question(Direction::Ingress, Roles::Reversed));
    let then = joined([keep, accept()]);
    let outcome = Outcome { bit: ALLOW, label: false, then, refuse: None };
    chains.push((ingress.name("try_ingress"), ask(&ingress, &outcome, variants)));
    let outcome = Outcome { then: goto(ingress.name("try_ingress")), ..outcome };
    chains.push((egress.name("try_egress"), ask(&egress, &outcome, variants)));
    for roles in [Roles::Ports, Roles::Icmp, Roles::Reversed] {
        let (egress, ingress) = (question(Direction::Egress, roles), question(Direction::Ingress, roles));
        let label = roles != Roles::Reversed;
        for (direction, what) in [(&egress, "refuse_egress"), (&ingress, "refuse_ingress")] {
            chains.push((direction.name(what), refuse(direction, log_group, variants)));
        }
        let refuse = Some(ingress.name("refuse_ingress"));
        let host = Outcome { bit: HOST_MAY, label, then: accept(), refuse: refuse.clone() };
        chains.push((ingress.name("from_host"), ask(&ingress, &host, variants)));
        let outcome = Outcome { bit: ALLOW, label, then: accept(), refuse };
        let mut rules = from_host(roles, &ingress.name("from_host"));
        rules.extend(ask(&ingress, &outcome, variants));
        chains.push((ingress.name("ingress"), rules));
        let refuse = Some(egress.name("refuse_egress"));
        let outcome = Outcome { bit: ALLOW, label, then: goto(ingress.name("ingress")), refuse };
        chains.push((egress.name("egress"), ask(&egress, &outcome, variants)));
    }
}

/// Leads to `chain` what this host began: what leaves it, and what comes back to it.
fn from_host(roles: Roles, chain: &str) -> Vec<Vec<E>> {
    let sides = [(Meta::InputInterface, roles.caller()), (Meta::OutputInterface, roles.called())];
    let rule = |(interface, tuple): (Meta, Tuple)| {
        let none = vec![E::Meta(interface, SCRATCH), E::Equal(SCRATCH, vec![0; 4])];
        let way = vec![E::Ct(Ct::Direction, None, SCRATCH), E::Equal(SCRATCH, vec![tuple as u8])];
        joined([none, way, goto(chain)])
    };
    sides.into_iter().map(rule).collect()
}

/// The only rule of a chain that the kernel calls.
pub(crate) fn jump(chain: &str) -> Vec<E> {
    vec![E::Verdict(Verdict::Jump(chain.to_owned()))]
}

/// Every chain of the table that judges connections, but for those that the kernel calls.
pub(crate) fn judging_chains(log_group: u16, variants: bool) -> Chains {
    let mut chains = vec![(NOTHING.to_owned(), Vec::new())];
    for family in &FAMILIES {
        judging(family, log_group, variants, &mut chains);
        let number = if family.v6 { 6 } else { 4 };
        chains.push((format!("judge{number}"), entry::judge(family)));
        chains.push((format!("packet{number}"), entry::packet(family)));
    }
    let family = |number: u8, chain: &str| {
        let jump = E::Verdict(Verdict::Goto(chain.to_owned()));
        vec![E::Meta(Meta::Family, SCRATCH), E::Equal(SCRATCH, vec![number]), jump]
    };
    // NFPROTO_IPV4, NFPROTO_IPV6.
    chains.push(("packet".to_owned(), vec![family(2, "packet4"), family(10, "packet6")]));
    chains
}
