//! The lock-out guard: whose connection to this controller a change would cut, asked of the engine before it is made.
//!
//! Judged are the session that brings the change and every connected agent's, with the addresses that the controller
//! sees. What a proxy or a translation of addresses hides from it, it cannot judge.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;

use bulkhead_engine::{Lifeline, TooMany, cuts};
use bulkhead_model::{ObjectKey, Resource};
use serde::Serialize;

use crate::clock;
use crate::repository::Object;

/// Most lifelines that an answer names; the others are counted.
pub(crate) const NAMED_MAX: usize = 20;

/// Most policies that are named behind one tier's end.
const POLICIES_MAX: usize = 5;

/// Both ends of a connection to this controller, as it sees them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Ends {
    /// The other end.
    pub(crate) remote: SocketAddr,
    /// This end.
    pub(crate) local: SocketAddr,
}

/// A connection that should not be cut, and whose it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Known {
    pub(crate) who: Who,
    pub(crate) ends: Ends,
}

/// Whose connection it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Who {
    /// The operator who asks for the change.
    Operator,
    /// The agent of this host.
    Agent(Arc<str>),
}

/// Somebody who would be cut off.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Warning {
    /// `operator` or `agent`.
    pub(crate) who: &'static str,
    /// The agent's host.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) host: Option<Arc<str>>,
    /// Its address as the controller sees it.
    pub(crate) from: SocketAddr,
    /// What it is connected to.
    pub(crate) to: SocketAddr,
    /// The endpoint whose policy forbids it.
    pub(crate) endpoint: Arc<str>,
    /// `ingress` or `egress`.
    pub(crate) direction: String,
    /// The rule, and the policy or tier that it belongs to.
    pub(crate) rule: String,
    /// If a tier's end decides: the policies that make the tier speak of the endpoint, the first few.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) policies: Vec<String>,
}

impl std::fmt::Display for Warning {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.host {
            Some(host) => write!(f, "the agent of {host}")?,
            None => f.write_str("your own session")?,
        }
        let Self { from, to, endpoint, direction, rule, policies, .. } = self;
        write!(f, " ({from} to {to}) would be cut off by {rule}")?;
        if !policies.is_empty() {
            write!(f, " after {}", policies.join(", "))?;
        }
        write!(f, ": {direction} of {endpoint}")
    }
}

/// Whom these changes would cut off who is not now. Walks over all objects: not for a thread that serves.
///
/// # Errors
/// If they concern more than can be judged.
pub(crate) fn warnings(
    objects: &[Arc<Object>],
    changes: &[(ObjectKey, Option<Resource>)],
    known: &[Known],
) -> Result<Vec<Warning>, TooMany> {
    let objects: Vec<&Resource> = objects.iter().map(|object| &object.resource).collect();
    let changes: BTreeMap<ObjectKey, Option<&Resource>> =
        changes.iter().map(|(key, after)| (key.clone(), after.as_ref())).collect();
    let plain = |end: SocketAddr| SocketAddr::new(end.ip().to_canonical(), end.port());
    let lifelines: Vec<Lifeline> = known
        .iter()
        .map(|known| Lifeline { source: plain(known.ends.remote), destination: plain(known.ends.local) })
        .collect();
    let cuts = cuts(&objects, &changes, &lifelines, clock::now())?;
    let warning = |cut: bulkhead_engine::Cut| {
        let (line, known) = (lifelines[cut.lifeline], &known[cut.lifeline]);
        let (who, host) = match &known.who {
            Who::Operator => ("operator", None),
            Who::Agent(host) => ("agent", Some(Arc::clone(host))),
        };
        Warning {
            who,
            host,
            from: line.source,
            to: line.destination,
            endpoint: cut.endpoint,
            direction: cut.direction.to_string(),
            rule: cut.rule.to_string(),
            policies: cut.policies.iter().take(POLICIES_MAX).map(ToString::to_string).collect(),
        }
    };
    Ok(cuts.into_iter().map(warning).collect())
}

/// What a refusal says, and a forced change warns of.
pub(crate) fn summary(warnings: &[Warning]) -> String {
    let mut lines: Vec<String> = warnings.iter().take(NAMED_MAX).map(ToString::to_string).collect();
    if let Some(more @ 1..) = warnings.len().checked_sub(NAMED_MAX) {
        lines.push(format!("and {more} more"));
    }
    lines.join("\n")
}
