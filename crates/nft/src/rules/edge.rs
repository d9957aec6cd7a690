//! The rules at a workload's interface: whose addresses may be used, and what passes without any policy.

use bulkhead_model::flow::DropReason;
use bulkhead_model::verdict::{Builtin, Direction, Verdict as Answer};

use super::{Chains, DENIED, ICMPV6, SCRATCH, UDP, count_and_drop, joined, prefix};
use crate::expression::{Base, Expression as E, Meta, Register, Verdict};
use crate::schema::{
    self, FAMILIES, Family, Kind, OPEN_RECEIVERS, OPEN_SENDERS, RECEIVERS, SENDERS, UNRECORDED, Words,
};

const ETHERTYPE_ARP: [u8; 2] = [0x08, 0x06];
const HOP_LIMIT: u32 = 7;
const UNROUTED: u8 = 255;

/// Where a packet's source or destination address stands.
pub(crate) fn address(family: &Family, source: bool, to: Register) -> E {
    let (offset, len) = match (family.v6, source) {
        (false, true) => (12, 4),
        (false, false) => (16, 4),
        (true, true) => (8, 16),
        (true, false) => (24, 16),
    };
    E::Payload { base: Base::Network, offset, len, to }
}

fn ethertype(family: &Family) -> Vec<E> {
    let value = if family.v6 { vec![0x86, 0xdd] } else { vec![0x08, 0x00] };
    vec![E::Meta(Meta::Protocol, SCRATCH), E::Equal(SCRATCH, value)]
}

fn transport(offset: u32, len: u32, to: Register) -> E {
    E::Payload { base: Base::Transport, offset, len, to }
}

fn protocol(number: u8) -> Vec<E> {
    vec![E::Meta(Meta::Transport, SCRATCH), E::Equal(SCRATCH, vec![number])]
}

/// DHCP, from a client to a server or back.
pub(crate) fn dhcp(v6: bool, from_server: bool, to_server: bool) -> Vec<E> {
    let port = |server: bool| match (v6, server) {
        (false, false) => 68u16,
        (false, true) => 67,
        (true, false) => 546,
        (true, true) => 547,
    };
    let ports = [port(from_server).to_be_bytes(), port(to_server).to_be_bytes()].concat();
    joined([protocol(UDP), vec![transport(0, 4, SCRATCH), E::Equal(SCRATCH, ports)]])
}

/// Neighbour discovery that was not routed (RFC 4861), and multicast listener discovery.
pub(crate) fn discovery() -> Vec<Vec<E>> {
    let kind = |first: u8, last: u8| {
        joined([
            protocol(ICMPV6),
            vec![transport(0, 1, SCRATCH), E::Between(SCRATCH, vec![first], vec![last])],
        ])
    };
    let hops = E::Payload { base: Base::Network, offset: HOP_LIMIT, len: 1, to: SCRATCH };
    let unrouted = vec![hops, E::Equal(SCRATCH, vec![UNROUTED])];
    vec![joined([kind(133, 137), unrouted]), kind(130, 132), kind(143, 143)]
}

fn link_local(source: bool) -> Vec<E> {
    let offset = if source { 8 } else { 24 };
    vec![
        E::Payload { base: Base::Network, offset, len: 2, to: SCRATCH },
        E::Mask { from: SCRATCH, to: SCRATCH, mask: vec![0xff, 0xc0] },
        E::Equal(SCRATCH, vec![0xfe, 0x80]),
    ]
}

fn multicast6() -> Vec<E> {
    let first = E::Payload { base: Base::Network, offset: 24, len: 1, to: SCRATCH };
    vec![first, E::Equal(SCRATCH, vec![0xff])]
}

fn accept() -> Vec<E> {
    vec![E::Verdict(Verdict::Accept)]
}

/// The two directions at an interface.
struct Side {
    direction: Direction,
    interface: Meta,
    programmed: &'static str,
    open: &'static str,
}

const FROM: Side = Side {
    direction: Direction::Egress,
    interface: Meta::InputInterface,
    programmed: SENDERS.name,
    open: OPEN_SENDERS.name,
};
const TO: Side = Side {
    direction: Direction::Ingress,
    interface: Meta::OutputInterface,
    programmed: RECEIVERS.name,
    open: OPEN_RECEIVERS.name,
};

impl Side {
    /// The interface and the workload's address.
    fn own(&self, family: &Family) -> Vec<E> {
        let source = self.direction == Direction::Egress;
        let own = E::Contains { set: family.own.name, key: 0 };
        vec![E::Meta(self.interface, 0), address(family, source, 1), own]
    }

    fn member(&self, set: &'static str) -> Vec<E> {
        vec![E::Meta(self.interface, 0), E::Contains { set, key: 0 }]
    }

    /// Counted in an entry of its own, told when that is made; or at least counted.
    fn refuse(&self, reason: DropReason, rule: Builtin, log_group: u16) -> Vec<Vec<E>> {
        let mut rules = Vec::new();
        // These make no flows.
        let (to, from) = (self.direction == Direction::Egress, self.direction == Direction::Ingress);
        let silent = discovery().into_iter().map(|kind| joined([ethertype(&FAMILIES[1]), kind]));
        let silent = silent.chain([false, true].map(|v6| dhcp(v6, from, to)));
        rules.extend(silent.map(|rule| joined([rule, count_and_drop(reason)])));
        for family in &FAMILIES {
            let width = if family.v6 { 4 } else { 1 };
            let key = || {
                joined([
                    ethertype(family),
                    vec![
                        E::Immediate(
                            0,
                            schema::denied_begin(reason, self.direction, Kind::Workload).to_vec(),
                        ),
                        E::Meta(self.interface, 1),
                        E::Meta(Meta::Transport, 2),
                        address(family, true, 3),
                        address(family, false, 3 + width),
                        transport(0, 2, 3 + 2 * width),
                        transport(2, 2, 4 + 2 * width),
                    ],
                ])
            };
            let map = family.edge_denied.name;
            let data = schema::denied_data(Words::builtin(rule, Answer::Deny));
            let known = vec![E::Get { map, key: 0, to: DENIED }];
            rules.push(joined([key(), known, count_and_drop(reason)]));
            let fresh = vec![
                E::Immediate(DENIED, data),
                E::Add { map, key: 0, data: DENIED },
                E::SetMeta(Meta::Mark, DENIED + 1),
                E::Log { group: log_group, prefix: prefix(Kind::Workload, reason, self.direction) },
            ];
            rules.push(joined([key(), fresh, count_and_drop(reason)]));
            rules.push(joined([ethertype(family), vec![E::Count(UNRECORDED)], count_and_drop(reason)]));
        }
        rules.push(count_and_drop(reason));
        rules
    }

    fn chain(&self) -> &'static str {
        match self.direction {
            Direction::Egress => "from_workload",
            Direction::Ingress => "to_workload",
        }
    }
}

/// Name of the chain that refuses.
fn refusing(side: &Side, reason: DropReason) -> String {
    format!("{}_{}", side.chain(), if reason == DropReason::Unprogrammed { "closed" } else { "refused" })
}

fn goto(side: &Side, reason: DropReason) -> Vec<E> {
    vec![E::Verdict(Verdict::Goto(refusing(side, reason)))]
}

fn closed(side: &Side) -> Vec<E> {
    let lacks = E::Lacks { set: side.programmed, key: 0 };
    joined([vec![E::Meta(side.interface, 0), lacks], goto(side, DropReason::Unprogrammed)])
}

/// ARP with an address of the workload's own, or 0.0.0.0, which asks whether one is free (RFC 5227).
fn arp_from() -> Vec<Vec<E>> {
    let arp = vec![E::Meta(Meta::Protocol, SCRATCH), E::Equal(SCRATCH, ETHERTYPE_ARP.to_vec())];
    // Protocol IPv4, lengths 6 and 4.
    let usual = vec![
        E::Payload { base: Base::Network, offset: 2, len: 4, to: SCRATCH },
        E::Equal(SCRATCH, vec![0x08, 0x00, 6, 4]),
    ];
    let sender = |to| E::Payload { base: Base::Network, offset: 14, len: 4, to };
    let own =
        vec![E::Meta(Meta::InputInterface, 0), sender(1), E::Contains { set: FAMILIES[0].own.name, key: 0 }];
    let probe = vec![sender(0), E::Equal(0, vec![0; 4])];
    vec![
        joined([arp.clone(), usual.clone(), own, accept()]),
        joined([arp.clone(), usual.clone(), probe, accept()]),
        joined([arp.clone(), usual, count_and_drop(DropReason::Spoofed)]),
        joined([arp, count_and_drop(DropReason::Malformed)]),
    ]
}

fn from_workload() -> Vec<Vec<E>> {
    let [v4, v6] = &FAMILIES;
    let mut rules = vec![
        joined([ethertype(v4), FROM.member(SENDERS.name), FROM.own(v4), accept()]),
        joined([ethertype(v6), FROM.member(SENDERS.name), FROM.own(v6), accept()]),
        closed(&FROM),
    ];
    rules.extend(arp_from());
    let nobody = |family: &Family| {
        let len = if family.v6 { 16 } else { 4 };
        vec![address(family, true, 0), E::Equal(0, vec![0; len])]
    };
    rules.push(joined([ethertype(v4), dhcp(false, false, true), nobody(v4), accept()]));
    rules.push(joined([ethertype(v6), dhcp(true, false, true), link_local(true), accept()]));
    for source in [link_local(true), nobody(v6)] {
        for kind in discovery() {
            rules.push(joined([ethertype(v6), kind, source.clone(), accept()]));
        }
    }
    for destination in [link_local(false), multicast6()] {
        let open = FROM.member(FROM.open);
        rules.push(joined([ethertype(v6), link_local(true), destination, open, accept()]));
    }
    for family in [v4, v6] {
        rules.push(joined([ethertype(family), goto(&FROM, DropReason::Spoofed)]));
    }
    rules.push(count_and_drop(DropReason::UnknownEthertype));
    rules
}

fn to_workload() -> Vec<Vec<E>> {
    let [v4, v6] = &FAMILIES;
    let arp = vec![E::Meta(Meta::Protocol, SCRATCH), E::Equal(SCRATCH, ETHERTYPE_ARP.to_vec())];
    let mut rules = vec![
        joined([ethertype(v4), TO.member(RECEIVERS.name), TO.own(v4), accept()]),
        joined([ethertype(v6), TO.member(RECEIVERS.name), TO.own(v6), accept()]),
        closed(&TO),
        joined([arp, accept()]),
        joined([ethertype(v4), dhcp(false, true, false), accept()]),
        joined([ethertype(v6), dhcp(true, true, false), accept()]),
    ];
    rules.extend(discovery().into_iter().map(|kind| joined([ethertype(v6), kind, accept()])));
    for family in [v4, v6] {
        rules.push(joined([ethertype(family), TO.member(TO.open), accept()]));
        rules.push(joined([ethertype(family), goto(&TO, DropReason::Malformed)]));
    }
    rules.push(count_and_drop(DropReason::UnknownEthertype));
    rules
}

/// Every chain of the table at the interfaces, but for those that the kernel calls.
pub(crate) fn chains(log_group: u16) -> Chains {
    let refused = [
        (&FROM, DropReason::Unprogrammed, Builtin::Unprogrammed),
        (&FROM, DropReason::Spoofed, Builtin::Spoofed),
        (&TO, DropReason::Unprogrammed, Builtin::Unprogrammed),
        (&TO, DropReason::Malformed, Builtin::Malformed),
    ];
    let mut chains: Chains = Vec::new();
    for (side, reason, rule) in refused {
        chains.push((refusing(side, reason), side.refuse(reason, rule, log_group)));
    }
    chains.push((FROM.chain().to_owned(), from_workload()));
    chains.push((TO.chain().to_owned(), to_workload()));
    chains
}
