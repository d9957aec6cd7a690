//! Conntrack's messages: what a connection is, what it has carried, and how it stands.

use std::net::IpAddr;

use bulkhead_model::flow::Counters;
use bulkhead_model::ports::Protocol;

use crate::elements;
use crate::fresh;
use crate::message::{Attributes, DUMP, Message, Parsed, Request, SUBSYSTEM_CONNTRACK};
use crate::schema::{REVERSED, Words};

const NEW: u16 = 0;
const GET: u16 = 1;
const DELETE: u16 = 2;
/// `NFNLGRP_CONNTRACK_NEW`, `_UPDATE`, `_DESTROY`.
pub(crate) const GROUPS: [u32; 3] = [1, 2, 3];
/// `NLM_F_CREATE`: the first word about a connection.
const FIRST: u16 = 0x400;
/// `TCP_CONNTRACK_TIME_WAIT` and `TCP_CONNTRACK_CLOSE`.
const TCP_OVER: [u8; 2] = [7, 8];

/// One direction of a connection. For ICMP, the source port is the identifier, and the destination port type and code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Way {
    pub(crate) source: IpAddr,
    pub(crate) destination: IpAddr,
    pub(crate) source_port: u16,
    pub(crate) destination_port: u16,
}

/// What a connection is known by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Connection {
    pub(crate) protocol: Protocol,
    pub(crate) original: Way,
    pub(crate) reply: Way,
}

/// What a message says about a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Report {
    pub(crate) connection: Connection,
    /// Whether this is the first word about it.
    pub(crate) first: bool,
    /// Whether it is the last.
    pub(crate) last: bool,
    /// Whether both sides have closed it, or one has broken it off.
    pub(crate) over: bool,
    /// Original and reply direction.
    pub(crate) counters: Option<Counters>,
    /// Decisions for the caller and the called.
    pub(crate) decisions: [Option<Words>; 2],
    /// Number of the control group that each of these is from; then there is no audit rule.
    pub(crate) groups: [Option<u32>; 2],
    pub(crate) reversed: bool,
    /// Of a connection that is not in the usual one.
    pub(crate) zone: Option<u16>,
    /// In which epochs it was judged, as bits: see [`crate::fresh`].
    pub(crate) epochs: u8,
}

impl Connection {
    /// Whether it is of the protocol's own ICMP.
    pub(crate) fn is_icmp(&self) -> bool {
        self.protocol.is_icmp() && (self.protocol == Protocol::ICMPV6) == self.original.source.is_ipv6()
    }

    /// Who began: address, port or identifier.
    pub(crate) fn caller(&self, reversed: bool) -> (IpAddr, u16) {
        let way = if reversed { &self.reply } else { &self.original };
        (way.source, way.source_port)
    }

    /// Who was really reached: address, port or type and code.
    pub(crate) fn called(&self, reversed: bool) -> (IpAddr, u16) {
        if self.is_icmp() {
            return (self.reply.source, self.original.destination_port);
        }
        let way = if reversed { &self.original } else { &self.reply };
        (way.source, way.source_port)
    }
}

impl Connection {
    /// Whom the caller (or the called) sees at the other end: another than is really there where addresses are rewritten.
    pub(crate) fn seen_by(&self, caller: bool, reversed: bool) -> (IpAddr, u16) {
        let way = if caller == reversed { &self.reply } else { &self.original };
        let port = if self.is_icmp() { self.original.destination_port } else { way.destination_port };
        (way.destination, port)
    }
}

fn tuple(attributes: Parsed<'_>) -> Option<(Protocol, Way)> {
    let addresses = attributes.nested(1)?;
    let address = |v4, v6| elements::address(addresses.get(v4).or_else(|| addresses.get(v6))?);
    let ports = attributes.nested(2)?;
    let protocol = Protocol(ports.byte(1)?);
    let message = |kind: u16| ports.byte(kind).or_else(|| ports.byte(kind + 3)).unwrap_or(0);
    let (source_port, destination_port) = if let Some(id) = ports.half(4).or_else(|| ports.half(7)) {
        (id, u16::from_be_bytes([message(5), message(6)]))
    } else {
        (ports.half(2).unwrap_or(0), ports.half(3).unwrap_or(0))
    };
    let way = Way { source: address(1, 3)?, destination: address(2, 4)?, source_port, destination_port };
    Some((protocol, way))
}

/// What an event or an entry says. `None` if it is about nothing of IP.
pub(crate) fn read(message: &Message<'_>) -> Option<Report> {
    if message.subsystem() != SUBSYSTEM_CONNTRACK || message.number() == GET {
        return None;
    }
    let attributes = message.attributes();
    let (protocol, original) = tuple(attributes.nested(1)?)?;
    let (_, reply) = tuple(attributes.nested(2)?)?;
    let count = |kind: u16| {
        let counter = attributes.nested(kind)?;
        Some((counter.long(1)?, counter.long(2)?))
    };
    let counters = count(9).zip(count(10)).map(|((packets, bytes), (back, back_bytes))| Counters {
        packets_forward: packets,
        bytes_forward: bytes,
        packets_reverse: back,
        bytes_reverse: back_bytes,
    });
    let state = attributes.nested(4).and_then(|info| info.nested(1)).and_then(|tcp| tcp.byte(1));
    let label = attributes.get(22).unwrap_or(&[]);
    let words = |at: usize| label.get(at..at + 8).and_then(Words::read).filter(|words| words.is_decision());
    let group = |at: usize| words(at).and_then(Words::group);
    let reversed = label.get(4..8).and_then(elements::number).is_some_and(|word| word & REVERSED != 0);
    Some(Report {
        connection: Connection { protocol, original, reply },
        first: message.number() == NEW && message.flags & FIRST != 0,
        last: message.number() == DELETE,
        over: state.is_some_and(|state| TCP_OVER.contains(&state)),
        counters,
        zone: attributes.half(18),
        epochs: fresh::epochs_of(label),
        decisions: [words(0), words(8)],
        groups: [group(0), group(8)],
        reversed,
    })
}

/// All connections of both families.
pub(crate) fn dump() -> Request {
    Request {
        subsystem: SUBSYSTEM_CONNTRACK,
        kind: GET,
        flags: DUMP,
        family: 0,
        resource: 0,
        attributes: Attributes::default(),
    }
}

/// One connection.
pub(crate) fn get(connection: &Connection) -> Request {
    request(connection, GET, &Attributes::default())
}

/// Clears what a connection's label says of some epochs.
pub(crate) fn clear(report: &Report, epochs: u8) -> Request {
    let mut label = Attributes::default();
    label.bytes(22, &[0; 16]).bytes(23, &fresh::mask_of(epochs));
    if let Some(zone) = report.zone {
        label.bytes(18, &zone.to_be_bytes());
    }
    request(&report.connection, NEW, &label)
}

fn request(connection: &Connection, kind: u16, more: &Attributes) -> Request {
    let Connection { protocol, original, .. } = connection;
    let (mut addresses, mut ports, mut tuple) =
        (Attributes::default(), Attributes::default(), Attributes::default());
    let v6 = original.source.is_ipv6();
    let (source, destination) = if v6 { (3, 4) } else { (1, 2) };
    addresses.bytes(source, &elements::octets(original.source));
    addresses.bytes(destination, &elements::octets(original.destination));
    ports.bytes(1, &[protocol.0]);
    if connection.is_icmp() {
        let (id, [kind, code]) = (if v6 { 7 } else { 4 }, original.destination_port.to_be_bytes());
        ports.bytes(id, &original.source_port.to_be_bytes()).bytes(id + 1, &[kind]).bytes(id + 2, &[code]);
    } else {
        ports.bytes(2, &original.source_port.to_be_bytes());
        ports.bytes(3, &original.destination_port.to_be_bytes());
    }
    tuple.nest(1, &addresses).nest(2, &ports);
    let mut attributes = Attributes::default();
    attributes.nest(1, &tuple).0.extend(&more.0);
    // AF_INET, AF_INET6.
    let family = if v6 { 10 } else { 2 };
    Request { subsystem: SUBSYSTEM_CONNTRACK, kind, flags: 0, family, resource: 0, attributes }
}
