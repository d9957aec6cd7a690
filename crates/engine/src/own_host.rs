//! DESIGN 4.10: its host reaches a workload unless a written rule forbids it. A kernel knows who sent a packet by the way
//! that it came; whoever only computes, by the address.

use std::net::IpAddr;

use bulkhead_model::labels::{HOST_LABEL, KIND_LABEL, NAME_LABEL};
use bulkhead_model::{Builtin, Entity, Kind, RuleRef, Verdict};

use crate::judgement::Judgement;

/// What becomes of a judgement about a connection to a workload, if its own host began it.
pub(crate) fn unless_own_host(workload: &Entity, own_host: bool, judged: Judgement) -> Judgement {
    let written = matches!(judged.rule, RuleRef::Rule { .. });
    if judged.verdict == Verdict::Allow || written || !own_host || workload.is_host_endpoint() {
        return judged;
    }
    let rule = RuleRef::Builtin { builtin: Builtin::HostToWorkload };
    let (audit_verdict, audit_rule) = if judged.audit_rule == judged.rule {
        (Verdict::Allow, rule.clone())
    } else {
        (judged.audit_verdict, judged.audit_rule)
    };
    Judgement { verdict: Verdict::Allow, rule, audit_verdict, audit_rule, ..judged }
}

/// Whether an entity is this host, or an endpoint of it, and has this address.
pub(crate) fn is_host_at(entity: &Entity, host: &str, address: IpAddr) -> bool {
    host_of(entity) == Some(host) && entity.prefixes.iter().any(|prefix| prefix.contains_address(address))
}

/// Which host an entity is, or is an endpoint of.
pub(crate) fn host_of(entity: &Entity) -> Option<&str> {
    if entity.labels.get(KIND_LABEL) == Some(Kind::Host.as_str()) {
        entity.labels.get(NAME_LABEL)
    } else {
        entity.is_host_endpoint().then(|| entity.labels.get(HOST_LABEL))?
    }
}
