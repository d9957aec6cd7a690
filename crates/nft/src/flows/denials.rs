//! Refused connections: told at their first packet, counted until nobody tries any more.

use std::collections::HashMap;
use std::net::IpAddr;

use bulkhead_dataplane::SweepStats;
use bulkhead_model::flow::{Counters, DropReason, FlowEvent, RawFlow};
use bulkhead_model::host_policy::{Attachment, Cell, RuleId};
use bulkhead_model::ports::Protocol;
use bulkhead_model::verdict::{Builtin, Direction, Verdict};

use super::{Endpoint, Judge, Side, Sink, key, rule_of};
use crate::elements;
use crate::image::Image;
use crate::kernel::CountedElement;
use crate::log::Refused;
use crate::schema::{Kind, Words};

/// A refused connection is forgotten when nobody has tried for this long.
const IDLE_NS: u64 = 2_000_000_000;

/// The key of an entry, taken apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Entry {
    kind: u8,
    reason: u8,
    direction: Direction,
    /// At the edge.
    interface: u32,
    /// Number of the control group, if it is one that has refused.
    group: u32,
    protocol: Protocol,
    caller: (IpAddr, u16),
    called: (IpAddr, u16),
}

#[derive(Debug, Clone, Copy, Default)]
struct Told {
    packets: u64,
    bytes: u64,
    first_ns: u64,
    last_ns: u64,
}

/// What has been told of refused connections.
#[derive(Debug, Default)]
pub(crate) struct Denials {
    told: HashMap<Entry, Told>,
    /// Entries at the last sweep.
    pub(crate) entries: u64,
}

impl Entry {
    fn read(key: &[u8]) -> Option<Self> {
        let width = (key.len().checked_sub(20)?) / 2;
        let half = |at: usize| Some(u16::from_be_bytes(key.get(at..at + 2)?.try_into().ok()?));
        let address = |at: usize| elements::address(key.get(at..at + width)?);
        let direction = if *key.get(1)? == 1 { Direction::Egress } else { Direction::Ingress };
        let ports = 12 + 2 * width;
        let (kind, protocol) = (*key.get(2)?, Protocol(*key.get(8)?));
        let of_group = kind == Kind::Group as u8;
        let interface = if of_group { 0 } else { elements::index(key.get(4..8)?)? };
        let group = if of_group { Words(0, elements::number(key.get(4..8)?)?).group()? } else { 0 };
        // At the edge the first bytes of the transport header stand there whatever they are.
        let raw = interface != 0 && protocol.is_icmp();
        let (first, second) = (half(ports)?, half(ports + 4)?);
        let (source_port, destination_port) = if raw { (0, first) } else { (first, second) };
        Some(Self {
            kind,
            reason: *key.first()?,
            direction,
            interface,
            group,
            protocol,
            caller: (address(12)?, source_port),
            called: (address(12 + width)?, destination_port),
        })
    }

    fn of(refused: &Refused, at_edge: bool) -> Self {
        let raw = at_edge && refused.protocol.is_icmp();
        Self {
            kind: refused.kind as u8,
            reason: refused.reason as u8,
            direction: refused.direction,
            interface: refused.interface.filter(|_| at_edge).unwrap_or(0),
            group: refused.group().unwrap_or(0),
            protocol: refused.protocol,
            caller: (refused.source, if raw { 0 } else { refused.source_port }),
            called: (refused.destination, refused.destination_port),
        }
    }

    fn flow(&self, attachment: Attachment, cell: &Cell, told: Told, counters: Counters) -> RawFlow {
        let side = Side { attachment, direction: self.direction, cell: *cell, peer: None };
        let icmp = self.protocol.is_icmp();
        let key = key(icmp, self.protocol, &side, self.caller, self.called);
        RawFlow {
            event: FlowEvent::Deny,
            key,
            // What is refused is known by whom it was meant for in the end.
            peer: key.peer,
            peer_port: key.peer_port,
            direction: self.direction,
            verdict: Verdict::Deny,
            rule: cell.rule,
            audit_verdict: cell.audit_verdict,
            audit_rule: cell.audit_rule,
            reason: DropReason::from_number(self.reason).unwrap_or(DropReason::Policy),
            counters,
            opened_ns: told.first_ns,
            last_ns: told.last_ns,
        }
    }

    /// The endpoint that has refused it, if the interface does not say so.
    fn endpoint<'a>(&self, judge: &'a Judge) -> Option<&'a Endpoint> {
        let own = if self.direction == Direction::Egress { self.caller.0 } else { self.called.0 };
        let kind = Kind::ALL.into_iter().find(|kind| *kind as u8 == self.kind)?;
        judge.refused_by(kind, self.group, own)
    }

    fn attachment(&self, judge: &Judge) -> Option<Attachment> {
        let interface = (self.interface != 0).then_some(Attachment::Interface(self.interface));
        interface.or_else(|| self.endpoint(judge).map(|endpoint| endpoint.attachment))
    }
}

fn once(bytes: u64) -> Counters {
    Counters { packets_forward: 1, bytes_forward: bytes, ..Counters::default() }
}

impl Denials {
    /// Takes in the message about a first packet.
    pub(crate) fn event(
        &mut self,
        refused: &Refused,
        (judge, image): (&Judge, &Image),
        now_ns: u64,
        sink: Sink<'_>,
    ) {
        let at_edge = refused.kind == Kind::Workload
            && !matches!(refused.reason, DropReason::Policy | DropReason::Revoked)
            && refused.interface.is_some_and(|index| image.attached().contains(&index));
        let entry = Entry::of(refused, at_edge);
        let Some(attachment) = entry.attachment(judge) else { return };
        let icmp = refused.protocol.is_icmp();
        let key = refused.protocol.key(refused.destination_port);
        let source_port = if icmp { 0 } else { refused.source_port };
        let ends = (refused.source, refused.destination);
        let says = judge.audit(image, ends, (entry.endpoint(judge), refused.direction), key, source_port);
        let rule = match says.filter(|_| refused.kind == Kind::Group) {
            // The message says whose it is instead.
            Some(cell) => cell.rule,
            None if refused.kind == Kind::Group => RuleId(Builtin::Unprogrammed as u32),
            None => rule_of(refused.word),
        };
        let alone = Words(rule.0, rule.0).cell();
        let cell = says
            .filter(|cell| cell.rule == rule && refused.reason == DropReason::Policy)
            .unwrap_or(Cell { audit_rule: rule, audit_verdict: Verdict::Deny, ..alone });
        let told = Told { packets: 1, bytes: refused.bytes, first_ns: now_ns, last_ns: now_ns };
        self.told.insert(entry, told);
        // The message has the identifier that the entry's key lacks.
        let whole = Entry { caller: (refused.source, refused.source_port), ..entry };
        sink(whole.flow(attachment, &cell, told, once(refused.bytes)));
    }

    /// Takes in all entries; answers those that can go.
    pub(crate) fn sweep(
        &mut self,
        entries: Vec<CountedElement>,
        judge: &Judge,
        now_ns: u64,
        stats: &mut SweepStats,
        sink: Sink<'_>,
    ) -> Vec<CountedElement> {
        let mut gone = Vec::new();
        let mut kept = HashMap::new();
        for element in entries {
            let (Some(entry), Some(words)) =
                (Entry::read(&element.key), element.data.get(4..).and_then(Words::read))
            else {
                continue;
            };
            let fresh = Told { first_ns: now_ns, last_ns: now_ns, ..Told::default() };
            let mut told = self.told.remove(&entry).unwrap_or(fresh);
            let packets = element.packets.saturating_sub(told.packets);
            let bytes = element.bytes.saturating_sub(told.bytes);
            if packets > 0 {
                told = Told { packets: element.packets, bytes: element.bytes, last_ns: now_ns, ..told };
                let counters =
                    Counters { packets_forward: packets, bytes_forward: bytes, ..Counters::default() };
                if let Some(attachment) = entry.attachment(judge) {
                    sink(entry.flow(attachment, &words.cell(), told, counters));
                    stats.denials += 1;
                }
            }
            if now_ns.saturating_sub(told.last_ns) > IDLE_NS {
                gone.push(element);
            } else {
                kept.insert(entry, told);
            }
        }
        self.entries = kept.len() as u64;
        self.told = kept;
        gone
    }
}
