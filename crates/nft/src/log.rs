//! Log messages: the first packet of each refused connection.

use std::net::IpAddr;

use bulkhead_model::flow::DropReason;
use bulkhead_model::ports::Protocol;
use bulkhead_model::verdict::Direction;

use crate::elements;
use crate::message::{Attributes, Message, Request, SUBSYSTEM_LOG};
use crate::rules;
use crate::schema::{Kind, Words};

const PACKET: u16 = 0;
const CONFIG: u16 = 1;
/// `NFULA_CFG_CMD` bind, and how much of a packet is wanted.
const BIND: u8 = 1;
const COPY_PACKET: u8 = 2;
const COPY_BYTES: u32 = 192;
/// Messages that the kernel gathers before it sends them.
const TOLD_AT_ONCE: u32 = 1;
/// Of a chain at the interface's egress, packets come with their link's header.
const ETHERNET: usize = 14;

/// A refused packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Refused {
    pub(crate) kind: Kind,
    pub(crate) reason: DropReason,
    pub(crate) direction: Direction,
    /// First word of the decision; of a process, its control group's number.
    pub(crate) word: u32,
    /// Interface, where the chain was one at it.
    pub(crate) interface: Option<u32>,
    pub(crate) protocol: Protocol,
    pub(crate) source: IpAddr,
    pub(crate) destination: IpAddr,
    /// For ICMP, the identifier.
    pub(crate) source_port: u16,
    /// For ICMP, type and code.
    pub(crate) destination_port: u16,
    /// From the network header on.
    pub(crate) bytes: u64,
}

impl Refused {
    /// Number of the control group that has refused it.
    pub(crate) fn group(&self) -> Option<u32> {
        Words(0, self.word).group().filter(|_| self.kind == Kind::Group)
    }
}

fn config(group: u16, attribute: u16, value: &[u8]) -> Request {
    let mut attributes = Attributes::default();
    attributes.bytes(attribute, value);
    Request { subsystem: SUBSYSTEM_LOG, kind: CONFIG, flags: 0, family: 0, resource: group, attributes }
}

/// Requests that bind a socket to a group.
pub(crate) fn listen(group: u16) -> [Request; 3] {
    let mode = [&COPY_BYTES.to_be_bytes()[..], &[COPY_PACKET, 0]].concat();
    [config(group, 1, &[BIND]), config(group, 2, &mode), config(group, 5, &TOLD_AT_ONCE.to_be_bytes())]
}

/// The refused packet of a message. `None` if it is none of ours.
pub(crate) fn read(message: &Message<'_>) -> Option<Refused> {
    if message.subsystem() != SUBSYSTEM_LOG || message.number() != PACKET {
        return None;
    }
    let attributes = message.attributes();
    let prefix = attributes.text(10)?;
    let reasons = [DropReason::Policy, DropReason::Unprogrammed, DropReason::Spoofed, DropReason::Malformed];
    let all = Kind::ALL.into_iter().flat_map(|kind| {
        Direction::BOTH.into_iter().flat_map(move |direction| reasons.map(|reason| (kind, direction, reason)))
    });
    let (kind, direction, reason) =
        { all }.find(|(kind, direction, reason)| rules::prefix(*kind, *reason, *direction) == prefix)?;
    let word = attributes.number(2).map(u32::from_be);
    // `struct nfulnl_msg_packet_hdr`: ethertype, then the hook.
    let header = attributes.get(1)?;
    let ethertype = u16::from_be_bytes(header.get(..2)?.try_into().ok()?);
    let payload = attributes.get(9)?;
    let network = match payload.first().map(|byte| byte >> 4) {
        Some(4) if ethertype == 0x0800 => payload,
        Some(6) if ethertype == 0x86dd => payload,
        _ => payload.get(ETHERNET..)?,
    };
    let interface = attributes.number(4).or_else(|| attributes.number(5));
    let word = word.unwrap_or(0);
    parse(
        network,
        Refused {
            kind,
            reason,
            direction,
            word,
            interface,
            protocol: Protocol(0),
            source: IpAddr::from([0; 4]),
            destination: IpAddr::from([0; 4]),
            source_port: 0,
            destination_port: 0,
            bytes: 0,
        },
    )
}

fn parse(packet: &[u8], mut refused: Refused) -> Option<Refused> {
    let half = |at: usize| Some(u16::from_be_bytes(packet.get(at..at + 2)?.try_into().ok()?));
    let mut transport;
    if packet.first()? >> 4 == 4 {
        transport = usize::from(packet[0] & 15) * 4;
        refused.protocol = Protocol(*packet.get(9)?);
        refused.source = elements::address(packet.get(12..16)?)?;
        refused.destination = elements::address(packet.get(16..20)?)?;
        refused.bytes = u64::from(half(2)?);
    } else {
        transport = 40;
        let mut next = *packet.get(6)?;
        // Hop-by-hop, routing, destination options; fragments have been put together.
        while matches!(next, 0 | 43 | 60) {
            let (following, length) = (*packet.get(transport)?, *packet.get(transport + 1)?);
            next = following;
            transport += (usize::from(length) + 1) * 8;
        }
        refused.protocol = Protocol(next);
        refused.source = elements::address(packet.get(8..24)?)?;
        refused.destination = elements::address(packet.get(24..40)?)?;
        refused.bytes = u64::from(half(4)?) + 40;
    }
    if refused.protocol.is_icmp() {
        refused.destination_port = half(transport).unwrap_or(0);
        refused.source_port = half(transport + 4).unwrap_or(0);
    } else if refused.protocol.has_ports() {
        refused.source_port = half(transport).unwrap_or(0);
        refused.destination_port = half(transport + 2).unwrap_or(0);
    }
    Some(refused)
}
