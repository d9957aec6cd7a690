//! What is asked about a connection, and what the answer says.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use bulkhead_model::ports::PortKey;
use bulkhead_model::{RuleRef, Verdict};
use serde::Serialize;

/// One end of a flow.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Endpoint {
    /// The workload, if this end is one of ours.
    pub workload: Option<Arc<str>>,
    /// Its address.
    pub address: IpAddr,
}

/// A new connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Flow {
    /// Who begins it.
    pub source: Endpoint,
    /// Who is called.
    pub destination: Endpoint,
    /// Protocol and destination port.
    pub key: PortKey,
    /// The port of whoever begins; 0 for protocols without.
    pub source_port: u16,
}

/// Why a connection passes or not, at both ends.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Explanation {
    /// Whether it passes.
    pub verdict: Verdict,
    /// Whether it would if every Audit policy were enforced.
    pub audit_verdict: Verdict,
    /// What the source's policy says, if the source is ours.
    pub egress: Option<Judgement>,
    /// What the destination's policy says, if the destination is ours.
    pub ingress: Option<Judgement>,
}

/// What one endpoint's policy says in one direction.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Judgement {
    /// The endpoint.
    pub workload: Arc<str>,
    /// What is enforced.
    pub verdict: Verdict,
    /// Who decided.
    pub rule: RuleRef,
    /// What would be enforced if every Audit policy were.
    pub audit_verdict: Verdict,
    /// Who would have decided that.
    pub audit_rule: RuleRef,
    /// Whether a rule on the way asked for the connection to be logged.
    pub log: bool,
    /// Whether whoever is refused is told so, instead of waiting in vain.
    pub reject: bool,
    /// Everything that was looked at, in order. Audit policies are among it, marked.
    pub trace: Vec<Step>,
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Step {
    /// What it was.
    pub rule: RuleRef,
    /// Whether it belongs to an Audit policy.
    pub audit: bool,
    /// What came of it.
    pub outcome: Outcome,
}

/// What came of looking at a rule or at the end of a tier.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Outcome {
    /// The rule is not for this endpoint of its policy.
    OtherEndpoint,
    /// The other end is not one that the rule names.
    OtherPeer,
    /// The port is not one that the rule names.
    OtherPort,
    /// The source port is not one that the rule names, or there is none.
    OtherSourcePort,
    /// It matched: allow.
    Allow,
    /// It matched: deny.
    Deny,
    /// It matched: ask the next tier.
    Pass,
    /// It matched: noted.
    Log,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::OtherEndpoint => "no match: other endpoint",
            Self::OtherPeer => "no match: other peer",
            Self::OtherPort => "no match: other port",
            Self::OtherSourcePort => "no match: other source port",
            Self::Allow => "allow",
            Self::Deny => "deny",
            Self::Pass => "pass",
            Self::Log => "log",
        })
    }
}

impl Explanation {
    /// A connection passes if both ends that are ours let it (4.1).
    pub(crate) fn of(egress: Option<Judgement>, ingress: Option<Judgement>) -> Self {
        let both = |verdict: fn(&Judgement) -> Verdict| {
            let sides = [&egress, &ingress];
            let all = sides.into_iter().flatten().all(|side| verdict(side) == Verdict::Allow);
            if all { Verdict::Allow } else { Verdict::Deny }
        };
        Self {
            verdict: both(|side| side.verdict),
            audit_verdict: both(|side| side.audit_verdict),
            egress,
            ingress,
        }
    }
}
