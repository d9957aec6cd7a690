//! Flows: what a dataplane reports about one connection, and the record made of it.

use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

use crate::host_policy::{Attachment, RuleId};
use crate::ports::Protocol;
use crate::verdict::{Direction, RuleRef, Verdict};

/// Why a packet was dropped. The numbers are shared with the kernel programs
/// (`crates/ebpf/bpf/abi.h`) and shown in `docs/drop-reasons.md`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[repr(u8)]
pub enum DropReason {
    /// Not dropped.
    None = 0,
    /// A policy (rule, tier default or posture) denied it.
    Policy = 1,
    /// The interface has no tables yet.
    Unprogrammed = 2,
    /// The workload used an address that is not its own.
    Spoofed = 3,
    /// The packet could not be parsed.
    Malformed = 4,
    /// A fragment whose first fragment was not seen.
    FragmentWithoutFirst = 5,
    /// A live connection that the current policy no longer allows.
    Revoked = 6,
    /// No IPv4, IPv6 or ARP.
    UnknownEthertype = 7,
}

impl DropReason {
    /// All of them, by number.
    pub const ALL: [Self; 8] = [
        Self::None,
        Self::Policy,
        Self::Unprogrammed,
        Self::Spoofed,
        Self::Malformed,
        Self::FragmentWithoutFirst,
        Self::Revoked,
        Self::UnknownEthertype,
    ];

    /// From the kernel's number.
    pub fn from_number(number: u8) -> Option<Self> {
        Self::ALL.get(usize::from(number)).copied()
    }
}

/// Addresses, ports and protocol of a connection as one endpoint sees it: `local` is the endpoint's
/// own side whoever began.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ConnectionKey {
    /// Where the endpoint's packets are met.
    pub attachment: Attachment,
    /// IP protocol.
    pub protocol: Protocol,
    /// The endpoint's address.
    pub local: IpAddr,
    /// The endpoint's port; for ICMP echo the identifier, else 0.
    pub local_port: u16,
    /// The other end's address.
    pub peer: IpAddr,
    /// The other end's port; for ICMP `type << 8 | code` of the first message.
    pub peer_port: u16,
}

/// Packets and bytes each way.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Counters {
    /// Packets from the side that began the connection.
    pub packets_forward: u64,
    /// Bytes (IP length) from the side that began.
    pub bytes_forward: u64,
    /// Packets of the other side.
    pub packets_reverse: u64,
    /// Bytes of the other side.
    pub bytes_reverse: u64,
}

/// What happened to a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FlowEvent {
    /// First packet of an allowed connection.
    Open,
    /// Still going, or newly counted, at a reporting interval.
    Update,
    /// Both sides closed, it was reset, or it has been idle for its time-out.
    Close,
    /// The verdict of a live connection changed, or its deciding rule did.
    Change,
    /// A refused connection: first packet, or packets counted since the last report.
    Deny,
}

/// One report of a dataplane about one connection of one endpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RawFlow {
    /// What happened.
    pub event: FlowEvent,
    /// Which connection.
    pub key: ConnectionKey,
    /// Who the other end really is, and was judged as: another than in `key` where the host rewrites addresses (a
    /// service's backend, a client behind masquerading).
    pub peer: IpAddr,
    /// Its port there (for ICMP as in `key`).
    pub peer_port: u16,
    /// Which of the endpoint's policies judged it: egress if the endpoint began it.
    pub direction: Direction,
    /// What was enforced.
    pub verdict: Verdict,
    /// Who decided.
    pub rule: RuleId,
    /// What the audit policies would have made of it.
    pub audit_verdict: Verdict,
    /// Who would have decided that.
    pub audit_rule: RuleId,
    /// Why it was dropped.
    pub reason: DropReason,
    /// Totals since the connection was opened (for [`FlowEvent::Deny`]: since the last report).
    pub counters: Counters,
    /// When it was opened, in nanoseconds of CLOCK_MONOTONIC.
    pub opened_ns: u64,
    /// Its last packet, in nanoseconds of CLOCK_MONOTONIC.
    pub last_ns: u64,
}

/// One end of a recorded flow.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FlowEnd {
    /// Address.
    pub address: IpAddr,
    /// Port (for ICMP: see [`ConnectionKey`]).
    pub port: u16,
    /// As the reporter's endpoint sees this end, where the host rewrites addresses: the service that it called, or the
    /// host behind which a client hides.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seen_as: Option<SocketAddr>,
    /// Workload (or network set) that had the address at that time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub workload: Option<String>,
    /// Host on which that workload ran.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
    /// The workload's labels at that time.
    #[serde(default, skip_serializing_if = "crate::labels::Labels::is_empty")]
    pub labels: crate::labels::Labels,
}

/// A verdict with its author and the repository revision that was in force.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Decision {
    /// Allow or deny.
    pub verdict: Verdict,
    /// Who decided.
    pub rule: RuleRef,
}

/// The record that people and programs read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FlowRecord {
    /// Milliseconds since the Unix epoch at which the record was made.
    pub time_ms: u64,
    /// When the connection was opened, milliseconds since the Unix epoch.
    pub opened_ms: u64,
    /// What happened.
    pub event: FlowEvent,
    /// Host that reports.
    pub reporter: String,
    /// Which policy judged it at the reporter's endpoint.
    pub direction: Direction,
    /// IP protocol number.
    pub protocol: Protocol,
    /// Who began the connection.
    pub source: FlowEnd,
    /// Who was called.
    pub destination: FlowEnd,
    /// What was enforced.
    pub enforced: Decision,
    /// What the audit policies would have made of it.
    pub audit: Decision,
    /// Why it was dropped, if it was.
    pub reason: DropReason,
    /// Repository revision in force when the record was made.
    pub revision: u64,
    /// Packets and bytes.
    #[serde(flatten)]
    pub counters: Counters,
}
