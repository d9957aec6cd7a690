//! Traffic of an endpoint with itself and with its own host (4.10), which no policy need allow.

use std::net::IpAddr;
use std::sync::Arc;

use bulkhead_model::labels::{HOST_LABEL, NAME_LABEL};
use bulkhead_model::{Builtin, Entity, Kind, RuleRef, Verdict};

use crate::decide::{Judgement, kind};
use crate::world::World;

/// A workload may always reach itself.
pub(crate) fn own_traffic(endpoint: &Entity) -> Judgement {
    let rule = RuleRef::Builtin { builtin: Builtin::SelfTraffic };
    Judgement {
        workload: Arc::clone(&endpoint.name),
        verdict: Verdict::Allow,
        rule: rule.clone(),
        audit_verdict: Verdict::Allow,
        audit_rule: rule,
        log: false,
        trace: Vec::new(),
    }
}

/// Its host reaches a workload unless a written rule forbids it. A kernel knows who sent a packet by the way that
/// it came; here it is by the address.
pub(crate) fn unless_own_host(
    world: &World,
    workload: &Entity,
    source: IpAddr,
    judged: Judgement,
) -> Judgement {
    let written = matches!(judged.rule, RuleRef::Rule { .. });
    if judged.verdict == Verdict::Allow || written || !is_own_host(world, workload, source) {
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

/// Whether an address is of the host that a workload runs on.
fn is_own_host(world: &World, workload: &Entity, address: IpAddr) -> bool {
    let Some(host) = workload.labels.get(HOST_LABEL) else { return false };
    !workload.is_host_endpoint()
        && world.entities.values().any(|entity| {
            let is_host = kind(entity) == Some(Kind::Host.as_str());
            let label = if is_host { NAME_LABEL } else { HOST_LABEL };
            (is_host || entity.is_host_endpoint())
                && entity.labels.get(label) == Some(host)
                && entity.prefixes.iter().any(|prefix| prefix.contains_address(address))
        })
}
