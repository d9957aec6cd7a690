//! Verdicts and who made them.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Which of an endpoint's two policies is meant: for connections towards it, or from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    /// Towards the endpoint.
    Ingress,
    /// From the endpoint.
    Egress,
}

impl Direction {
    /// Both, in the order in which they are listed everywhere.
    pub const BOTH: [Self; 2] = [Self::Ingress, Self::Egress];
}

impl fmt::Display for Direction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ingress => "ingress",
            Self::Egress => "egress",
        })
    }
}

/// What happens to a connection at one endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// Refused, silently unless the rule rejects.
    Deny,
    /// Let through.
    Allow,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Allow => "allow",
            Self::Deny => "deny",
        })
    }
}

/// Who decided.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(tag = "by", rename_all = "camelCase")]
pub enum RuleRef {
    /// A written rule.
    #[serde(rename_all = "camelCase")]
    Rule {
        /// Tier of the policy.
        tier: String,
        /// `name` or `namespace/name` of the policy; `KIND/namespace/name` of one of another system.
        policy: String,
        /// Which of the policy's two lists.
        direction: Direction,
        /// Position in that list, from 0.
        index: u32,
    },
    /// A tier that applied, whose rules did not match.
    TierDefault {
        /// The tier.
        tier: String,
    },
    /// No tier decided: the endpoint's default posture.
    DefaultPosture,
    /// The dataplane itself, for one of the reasons in [`Builtin`].
    Builtin {
        /// Which.
        builtin: Builtin,
    },
}

/// Decisions that no policy can take away (DESIGN 4.8, 4.10 and 4.13), with the fixed rule ids that the
/// kernel programs use for them. [`FIRST_FREE_RULE_ID`] is above all of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[repr(u32)]
pub enum Builtin {
    /// No tables yet for this interface.
    Unprogrammed = 1,
    /// The endpoint talks to itself.
    SelfTraffic = 2,
    /// The endpoint's own host talks to it.
    HostToWorkload = 3,
    /// ARP, neighbour discovery, DHCP.
    Infrastructure = 4,
    /// Reply to, or ICMP error about, an allowed connection.
    Reply = 5,
    /// Source address that is not the endpoint's own.
    Spoofed = 6,
    /// Packet that cannot be parsed, or a fragment without its first.
    Malformed = 7,
    /// A port of a host that no policy can close (DESIGN 4.11).
    FailSafe = 8,
}

/// Lowest rule id that the engine may give out.
pub const FIRST_FREE_RULE_ID: u32 = 16;

impl Builtin {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Unprogrammed,
        Self::SelfTraffic,
        Self::HostToWorkload,
        Self::Infrastructure,
        Self::Reply,
        Self::Spoofed,
        Self::Malformed,
        Self::FailSafe,
    ];
}

impl fmt::Display for Builtin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Unprogrammed => "interface without tables yet",
            Self::SelfTraffic => "own traffic",
            Self::HostToWorkload => "host to its workload",
            Self::Infrastructure => "ARP, neighbour discovery or DHCP",
            Self::Reply => "reply of an allowed connection",
            Self::Spoofed => "foreign source address",
            Self::Malformed => "malformed packet",
            Self::FailSafe => "fail-safe port of a host",
        })
    }
}

impl fmt::Display for RuleRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Rule { tier, policy, direction, index } => {
                write!(f, "{tier}/{policy} {direction}[{index}]")
            }
            Self::TierDefault { tier } => write!(f, "{tier} (end of tier)"),
            Self::DefaultPosture => f.write_str("default posture"),
            Self::Builtin { builtin } => write!(f, "built in: {builtin}"),
        }
    }
}
