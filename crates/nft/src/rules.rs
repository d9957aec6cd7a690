//! The rules: constant, whatever the policy. Everything that changes stands in sets.
//!
//! ```text
//! forward, input, output ──► family ──► egress of the caller ──► ingress of the called ──► back
//!  (after DNAT, before SNAT)   │             └──────────────┬────────────┘
//!                              └─ nobody of ours: back      └─► refuse: count, tell once, drop
//!          input, output ──► the policies of the process's control groups ──► back, or refuse
//!                        ──► the host's own policy, if it is an endpoint ──► back, or refuse
//! ```
//!
//! Who is asked leaves the packet alone where it is allowed, so that the next is asked as well: what comes back to the
//! chain that the kernel calls, all have let through.
//!
//! Every packet is judged, those of established connections too, and always as its connection: by the addresses and
//! ports that conntrack keeps, as the caller uses its own and the called is really reached. So a policy that
//! changes cuts at the next packet, in both directions. Until it changes, a connection that has been judged passes by one
//! look-up ([`crate::fresh`]).
//!
//! A register does not outlive its rule (the kernel refuses to read one that the same rule has not written), so
//! what a rule must know it looks up itself, and a question with a fallback is several rules.

use bulkhead_model::flow::DropReason;
use bulkhead_model::verdict::Direction;

use crate::expression::{Base, Ct, Expression as E, Meta, Register, Tuple, Verdict};
use crate::fresh::Place;
use crate::guard;
use crate::schema::{self, ALLOW, FAMILIES, Family, HOST_MAY, Kind, REVERSED, Subject};

mod ask;
pub(crate) mod edge;
mod entry;
mod forwarded;
mod host;
mod process;
mod tell;

use ask::{NOTHING, Outcome, Question, ask, refuse};

/// Chains with their rules, in an order in which each only leads to earlier ones.
pub(crate) type Chains = Vec<(String, Vec<Vec<E>>)>;

/// `IPS_CONFIRMED` (linux/netfilter/nf_conntrack_common.h), in the byte order of this machine.
const CONFIRMED: u32 = 1 << 3;
/// `IPS_SEEN_REPLY`, likewise.
const SEEN_REPLY: u32 = 1 << 1;
const TCP: u8 = 6;
const UDP: u8 = 17;
const ICMP: u8 = 1;
const ICMPV6: u8 = 58;
const SYN: u8 = 0x02;
const ACK: u8 = 0x10;
/// Offset of the flags in a TCP header.
const TCP_FLAGS: u32 = 13;

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

/// Whether somebody has answered in this connection.
fn answered(answered: bool) -> Vec<E> {
    let (mask, zero) = (SEEN_REPLY.to_ne_bytes().to_vec(), vec![0; 4]);
    vec![
        E::Ct(Ct::Status, None, SCRATCH),
        E::Mask { from: SCRATCH, to: SCRATCH, mask },
        if answered { E::NotEqual(SCRATCH, zero) } else { E::Equal(SCRATCH, zero) },
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

fn counted(reason: DropReason) -> E {
    let named = schema::COUNTERS.iter().find(|(_, other)| *other == reason).map(|(name, _)| *name);
    E::Count(named.unwrap_or("policy"))
}

fn count_and_drop(reason: DropReason) -> Vec<E> {
    vec![counted(reason), E::Verdict(Verdict::Drop)]
}

fn count_and_goto(reason: DropReason, chain: String) -> Vec<E> {
    vec![counted(reason), E::Verdict(Verdict::Goto(chain))]
}

/// What a log message says before its packet: see [`crate::log`].
pub(crate) fn prefix(kind: Kind, reason: DropReason, direction: Direction) -> &'static str {
    let egress = direction == Direction::Egress;
    match (kind, reason) {
        (Kind::Workload, DropReason::Unprogrammed) if egress => "bulkhead egress unprogrammed",
        (Kind::Workload, DropReason::Unprogrammed) => "bulkhead ingress unprogrammed",
        (_, DropReason::Spoofed) => "bulkhead egress spoofed",
        (_, DropReason::Malformed) if egress => "bulkhead egress malformed",
        (_, DropReason::Malformed) => "bulkhead ingress malformed",
        (Kind::Workload, _) if egress => "bulkhead egress policy",
        (Kind::Workload, _) => "bulkhead ingress policy",
        (Kind::Host, DropReason::Unprogrammed) if egress => "bulkhead host egress unprogrammed",
        (Kind::Host, DropReason::Unprogrammed) => "bulkhead host ingress unprogrammed",
        (Kind::Host, _) if egress => "bulkhead host egress policy",
        (Kind::Host, _) => "bulkhead host ingress policy",
        (Kind::Group, DropReason::Unprogrammed) if egress => "bulkhead process egress unprogrammed",
        (Kind::Group, DropReason::Unprogrammed) => "bulkhead process ingress unprogrammed",
        (Kind::Group, _) if egress => "bulkhead process egress policy",
        (Kind::Group, _) => "bulkhead process ingress policy",
    }
}

fn goto(chain: impl Into<String>) -> Vec<E> {
    vec![E::Verdict(Verdict::Goto(chain.into()))]
}

/// Whoever is asked here has nothing against it.
fn back() -> Vec<E> {
    vec![E::Verdict(Verdict::Return)]
}

/// A connection that conntrack has the wrong way round.
fn turned() -> Vec<E> {
    let mut mask = vec![0; 4];
    mask.extend(REVERSED.to_be_bytes());
    mask.resize(16, 0);
    vec![
        E::Ct(Ct::Labels, None, LABEL),
        E::Mask { from: LABEL, to: LABEL, mask },
        E::NotEqual(LABEL, vec![0; 16]),
    ]
}

/// The chains that judge connections of workloads of one family.
fn judging(family: &'static Family, log_group: u16, shape: Shape, chains: &mut Chains) {
    let variants = shape.variants;
    let question = |direction, roles| Question::new(Subject::Workload, family, direction, roles);
    let mut label = vec![0; 4];
    label.extend(REVERSED.to_be_bytes());
    label.resize(16, 0);
    let keep = vec![E::Immediate(LABEL, label), E::SetCt(Ct::Labels, LABEL)];
    let (egress, ingress) =
        (question(Direction::Egress, Roles::Reversed), question(Direction::Ingress, Roles::Reversed));
    let then = joined([keep, back()]);
    let outcome = Outcome { bit: ALLOW, label: false, nobody: then.clone(), then, refuse: None };
    chains.push((ingress.trying(), ask(&ingress, &outcome, variants)));
    let then = goto(ingress.trying());
    let outcome = Outcome { nobody: then.clone(), then, ..outcome };
    chains.push((egress.trying(), ask(&egress, &outcome, variants)));
    for roles in [Roles::Ports, Roles::Icmp, Roles::Reversed] {
        let (egress, ingress) = (question(Direction::Egress, roles), question(Direction::Ingress, roles));
        let label = roles != Roles::Reversed;
        for question in [&egress, &ingress] {
            refuse(question, log_group, shape, chains);
        }
        let refuse = Some(ingress.refusing());
        let host = Outcome { bit: HOST_MAY, label, then: back(), nobody: back(), refuse: refuse.clone() };
        chains.push((ingress.chain("from_host_"), ask(&ingress, &host, variants)));
        let mut rules = from_host(roles, &ingress.chain("from_host_"));
        rules.extend(ask(&ingress, &Outcome { bit: ALLOW, ..host }, variants));
        chains.push((ingress.name(), rules));
        let then = goto(ingress.name());
        let refuse = Some(egress.refusing());
        let outcome = Outcome { bit: ALLOW, label, nobody: then.clone(), then, refuse };
        chains.push((egress.name(), ask(&egress, &outcome, variants)));
    }
}

/// Leads to `chain` what this host began: what leaves it, and what comes back to it.
fn from_host(roles: Roles, chain: &str) -> Vec<Vec<E>> {
    let sides = [(Meta::InputInterface, roles.caller()), (Meta::OutputInterface, roles.called())];
    let rule = |(interface, tuple): (Meta, Tuple)| {
        let none = vec![E::Meta(interface, SCRATCH), E::Equal(SCRATCH, vec![0; 4])];
        joined([none, way(tuple), goto(chain)])
    };
    sides.into_iter().map(rule).collect()
}

/// A packet of this direction of its connection.
fn way(tuple: Tuple) -> Vec<E> {
    vec![E::Ct(Ct::Direction, None, SCRATCH), E::Equal(SCRATCH, vec![tuple as u8])]
}

/// A rule of a chain that the kernel calls.
pub(crate) fn jump(chain: &str) -> Vec<E> {
    vec![E::Verdict(Verdict::Jump(chain.to_owned()))]
}

/// Lets packets pass whose connection has been judged since tables last changed; but for those that begin one.
pub(crate) fn pass_fresh(place: Place) -> Vec<Vec<E>> {
    let fresh = vec![
        E::Ct(Ct::Labels, None, LABEL),
        E::Mask { from: LABEL, to: LABEL, mask: place.mask().to_vec() },
        E::Contains { set: schema::FRESH.name, key: LABEL },
        E::Verdict(Verdict::Accept),
    ];
    let other = vec![E::Meta(Meta::Transport, SCRATCH), E::NotEqual(SCRATCH, vec![TCP])];
    vec![joined([handshake(false), fresh.clone()]), joined([other, fresh])]
}

/// What comes here, all have let through: that is noted. Not of a connection's first packet: until it is confirmed, nobody
/// finds a connection whose bits are to be cleared.
pub(crate) fn note_fresh(place: Place) -> Vec<E> {
    let note = vec![
        E::Immediate(0, place.key()),
        E::Get { map: schema::CURRENT.name, key: 0, to: LABEL },
        E::SetCt(Ct::Labels, LABEL),
    ];
    joined([first_packet(false), note])
}

/// Leads packets of each family to a chain of their own.
fn by_family(chain: &str) -> Vec<Vec<E>> {
    // NFPROTO_IPV4, NFPROTO_IPV6.
    let rule = |(number, name): (u8, &str)| {
        joined([
            vec![E::Meta(Meta::Family, SCRATCH), E::Equal(SCRATCH, vec![number])],
            goto(format!("{chain}{name}")),
        ])
    };
    [(2, "4"), (10, "6")].into_iter().map(rule).collect()
}

/// What the rules must be able to ask. What nobody has asked for is not asked.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Shape {
    /// Whether some policy asks for source ports.
    pub(crate) variants: bool,
    /// Whether some refusal is told to whoever is refused.
    pub(crate) rejects: bool,
    /// Whether the host is an endpoint.
    pub(crate) host: bool,
    /// Whether it is another endpoint behind some of its interfaces.
    pub(crate) by_interface: bool,
    /// Whether something is asked about what is forwarded through interfaces.
    pub(crate) forwarded: bool,
    /// Levels at which there are control groups in charge, as bits.
    pub(crate) levels: u32,
}

impl Shape {
    /// Where what passes depends on nothing but the connection's addresses and ports.
    pub(crate) fn by_address(self, place: Place) -> bool {
        match place {
            Place::Forward => !self.forwarded,
            Place::Local => !self.by_interface && self.levels == 0,
        }
    }

    /// Rules that can ask what either can.
    pub(crate) fn union(self, other: Self) -> Self {
        Self {
            variants: self.variants || other.variants,
            rejects: self.rejects || other.rejects,
            host: self.host || other.host,
            by_interface: self.by_interface || other.by_interface,
            forwarded: self.forwarded || other.forwarded,
            levels: self.levels | other.levels,
        }
    }
}

/// Refuses what comes from, or goes to, an interface of a workload that nobody is in charge of yet.
fn guarding() -> Vec<Vec<E>> {
    let ways = [(Meta::InputName, Meta::InputInterface), (Meta::OutputName, Meta::OutputInterface)];
    let rule = |(name, index): (Meta, Meta)| {
        let workload = vec![E::Meta(name, 0), E::Contains { set: schema::GUARDED.name, key: 0 }];
        let open = [schema::ATTACHED, schema::SPARED].map(|set| E::Lacks { set: set.name, key: 0 });
        joined([workload, vec![E::Meta(index, 0)], open.into(), count_and_drop(DropReason::Unprogrammed)])
    };
    ways.into_iter().map(rule).collect()
}

/// Names of all that [`judging_chains`] makes.
pub(crate) fn names(shape: Shape) -> Vec<String> {
    judging_chains(0, shape).into_iter().map(|(name, _)| name).collect()
}

/// Every chain of the table that judges connections, but for those that the kernel calls.
pub(crate) fn judging_chains(log_group: u16, shape: Shape) -> Chains {
    let mut chains = vec![(NOTHING.to_owned(), Vec::new()), (guard::CHAIN.to_owned(), guarding())];
    if shape.rejects {
        chains.push((tell::CHAIN.to_owned(), tell::rules()));
    }
    for family in &FAMILIES {
        judging(family, log_group, shape, &mut chains);
        let number = if family.v6 { 6 } else { 4 };
        chains.push((format!("judge{number}"), entry::judge(family)));
        chains.push((format!("packet{number}"), entry::packet(family)));
        if shape.host {
            host::chains(family, log_group, shape, &mut chains);
        }
        if shape.forwarded {
            forwarded::chains(family, log_group, shape, &mut chains);
        }
        if shape.levels != 0 {
            process::chains(family, log_group, shape, &mut chains);
        }
    }
    let mut packet = if shape.rejects { tell::pass() } else { Vec::new() };
    packet.extend(by_family("packet"));
    chains.push(("packet".to_owned(), packet));
    if shape.forwarded {
        forwarded::by_families(&mut chains);
    }
    chains.push((forwarded::CHAIN.to_owned(), if shape.forwarded { forwarded::entry() } else { Vec::new() }));
    if shape.levels != 0 {
        process::by_families(shape.levels, &mut chains);
    }
    for hook in host::Hook::BOTH {
        let asked = if shape.levels == 0 { Vec::new() } else { process::entry(hook, shape.levels) };
        chains.push((process::entry_name(hook).to_owned(), asked));
        chains.push((hook.chain().to_owned(), if shape.host { host::entry(hook) } else { Vec::new() }));
    }
    chains
}
