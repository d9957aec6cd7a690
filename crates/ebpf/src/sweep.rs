//! Walks connections and denials at each reporting interval.

use std::collections::HashMap;
use std::io;

use bulkhead_dataplane::SweepStats;
use bulkhead_model::flow::{Counters, DropReason, FlowEvent, RawFlow};
use bulkhead_model::host_policy::RuleId;
use bulkhead_model::ports::Protocol;
use bulkhead_model::verdict::Verdict;

use crate::events::{counters, direction, verdict};
use crate::layout::{self, Conn, ConnKey, Denial, DenialKey};
use crate::sys::Table;

/// A refused connection is forgotten when nobody has tried for this long: far longer than a program
/// runs, so that no packet is counted in an entry that has just been removed.
const DENIAL_IDLE_NS: u64 = 2_000_000_000;

/// How far the clock of established packets may lag behind: a tick of the slowest kernel (100 Hz), twice.
const CLOCK_LAG_NS: u64 = 20_000_000;

/// Idle time after which a connection has ended: `timeout_of` of `bpf/conntrack.h`.
fn timeout(protocol: Protocol, flags: u32) -> u64 {
    let has = |bits: u32| flags & bits == bits;
    if has(layout::CONN_REVOKED) {
        return match protocol {
            Protocol::TCP => layout::TIMEOUT_REVOKED_TCP,
            _ => layout::TIMEOUT_REVOKED_OTHER,
        };
    }
    match protocol {
        Protocol::TCP if is_closed(flags) => layout::TIMEOUT_TCP_CLOSING,
        Protocol::TCP if has(layout::CONN_REPLIED) => layout::TIMEOUT_TCP_ESTABLISHED,
        Protocol::TCP => layout::TIMEOUT_TCP_SYN,
        Protocol::UDP | Protocol::UDPLITE if has(layout::CONN_REPLIED) => layout::TIMEOUT_UDP_REPLIED,
        Protocol::UDP | Protocol::UDPLITE => layout::TIMEOUT_UDP_UNREPLIED,
        Protocol::ICMP | Protocol::ICMPV6 => layout::TIMEOUT_ICMP,
        _ => layout::TIMEOUT_OTHER,
    }
}

fn is_closed(flags: u32) -> bool {
    let fins = layout::CONN_FIN_FORWARD | layout::CONN_FIN_REVERSE;
    flags & layout::CONN_RST != 0 || flags & fins == fins
}

/// What has been reported about a refused connection so far.
#[derive(Debug, Clone, Copy, Default)]
struct Told {
    packets: u64,
    bytes: u64,
}

/// The tables to walk and what earlier sweeps have told.
#[derive(Debug)]
pub(crate) struct Sweeper {
    conns: Table<ConnKey, Conn>,
    denials: Table<DenialKey, Denial>,
    told: HashMap<DenialKey, Told>,
    last_ns: u64,
    /// Entries seen by the last sweep.
    pub(crate) connections: u64,
    pub(crate) denied: u64,
}

impl Sweeper {
    pub(crate) fn new(conns: Table<ConnKey, Conn>, denials: Table<DenialKey, Denial>) -> Self {
        Self { conns, denials, told: HashMap::new(), last_ns: 0, connections: 0, denied: 0 }
    }

    pub(crate) fn sweep(&mut self, now_ns: u64, sink: &mut dyn FnMut(RawFlow)) -> io::Result<SweepStats> {
        let mut stats = SweepStats::default();
        self.sweep_connections(now_ns, sink, &mut stats)?;
        self.sweep_denials(now_ns, sink, &mut stats)?;
        self.last_ns = now_ns;
        Ok(stats)
    }

    fn sweep_connections(
        &mut self,
        now_ns: u64,
        sink: &mut dyn FnMut(RawFlow),
        stats: &mut SweepStats,
    ) -> io::Result<()> {
        let since = self.last_ns.saturating_sub(CLOCK_LAG_NS);
        for (key, conn) in self.conns.entries()? {
            let revoked = conn.flags & layout::CONN_REVOKED != 0;
            if now_ns.saturating_sub(conn.last_ns) > timeout(Protocol(key.protocol), conn.flags) {
                // A packet in between finds no entry, and is judged like one of an evicted connection.
                let last = self.conns.take(&key)?.unwrap_or(conn);
                if !revoked && last.flags & layout::CONN_CLOSE_REPORTED == 0 {
                    sink(connection_flow(FlowEvent::Close, key, &last));
                }
                stats.closed += 1;
                continue;
            }
            stats.connections += 1;
            let told = layout::CONN_CLOSE_REPORTED | layout::CONN_REVOKED;
            if conn.last_ns > since && conn.flags & told == 0 {
                // Its first event was lost: nobody has heard of it yet.
                let first = conn.flags & layout::CONN_OPEN_REPORTED == 0 && conn.opened_ns > self.last_ns;
                let event = if first { FlowEvent::Open } else { FlowEvent::Update };
                sink(connection_flow(event, key, &conn));
                stats.updated += 1;
            }
        }
        self.connections = stats.connections;
        Ok(())
    }

    fn sweep_denials(
        &mut self,
        now_ns: u64,
        sink: &mut dyn FnMut(RawFlow),
        stats: &mut SweepStats,
    ) -> io::Result<()> {
        let mut told = HashMap::new();
        self.denied = 0;
        for (key, denial) in self.denials.entries()? {
            let before = self.told.get(&key).copied().unwrap_or(Told {
                packets: u64::from(denial.reported_packets),
                bytes: denial.reported_bytes,
            });
            let mut current = denial;
            if now_ns.saturating_sub(denial.last_ns) > DENIAL_IDLE_NS {
                current = self.denials.take(&key)?.unwrap_or(denial);
            } else {
                told.insert(key, Told { packets: denial.packets, bytes: denial.bytes });
                self.denied += 1;
            }
            if current.packets > before.packets {
                sink(denial_flow(key, &current, before));
                stats.denials += 1;
            }
        }
        self.told = told;
        Ok(())
    }
}

fn connection_flow(event: FlowEvent, key: ConnKey, conn: &Conn) -> RawFlow {
    RawFlow {
        event,
        key: key.connection(),
        peer: conn.peer.address(),
        peer_port: conn.peer_port,
        direction: direction(conn.direction),
        verdict: Verdict::Allow,
        rule: RuleId(conn.rule),
        audit_verdict: verdict(conn.audit),
        audit_rule: RuleId(conn.audit_rule),
        reason: DropReason::None,
        counters: counters(conn.packets, conn.bytes),
        opened_ns: conn.opened_ns,
        last_ns: conn.last_ns,
    }
}

fn denial_flow(key: DenialKey, denial: &Denial, before: Told) -> RawFlow {
    RawFlow {
        event: FlowEvent::Deny,
        key: key.conn.connection(),
        peer: denial.peer.address(),
        peer_port: denial.peer_port,
        direction: direction(key.direction),
        verdict: Verdict::Deny,
        rule: RuleId(denial.rule),
        audit_verdict: verdict(denial.audit),
        audit_rule: RuleId(denial.audit_rule),
        reason: DropReason::from_number(denial.reason).unwrap_or(DropReason::Policy),
        counters: Counters {
            packets_forward: denial.packets.saturating_sub(before.packets),
            bytes_forward: denial.bytes.saturating_sub(before.bytes),
            ..Counters::default()
        },
        opened_ns: denial.first_ns,
        last_ns: denial.last_ns,
    }
}
