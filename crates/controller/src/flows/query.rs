//! Which flows somebody wants to see.

use bulkhead_model::flow::{FlowEnd, FlowRecord};
use bulkhead_model::{RuleRef, Selector, Verdict};

/// All conditions that are given must hold.
#[derive(Debug, Clone, Default)]
pub(crate) struct Filter {
    /// Made at or after this time.
    pub(crate) since_ms: Option<u64>,
    /// Either end is this workload: `NAME.HOST`, or `NAME` on any host.
    pub(crate) workload: Option<String>,
    /// Either end has such labels.
    pub(crate) label: Option<Selector>,
    /// What was enforced.
    pub(crate) verdict: Option<Verdict>,
    /// A rule of this policy decided, or would have if the audit policies were enforced.
    pub(crate) policy: Option<String>,
}

impl Filter {
    pub(crate) fn passes(&self, record: &FlowRecord) -> bool {
        let ends = [&record.source, &record.destination];
        self.since_ms.is_none_or(|since_ms| record.time_ms >= since_ms)
            && self.verdict.is_none_or(|verdict| record.enforced.verdict == verdict)
            && self.workload.as_deref().is_none_or(|name| ends.iter().any(|end| is_workload(end, name)))
            && self.label.as_ref().is_none_or(|label| ends.iter().any(|end| label.matches(&end.labels)))
            && self.policy.as_deref().is_none_or(|policy| {
                is_policy(&record.enforced.rule, policy) || is_policy(&record.audit.rule, policy)
            })
    }
}

fn is_workload(end: &FlowEnd, name: &str) -> bool {
    let Some(workload) = end.workload.as_deref() else { return false };
    let workload = workload.strip_prefix("Workload/").unwrap_or(workload);
    let short = end.host.as_deref().and_then(|host| workload.strip_suffix(host)?.strip_suffix('.'));
    workload == name || short == Some(name)
}

fn is_policy(rule: &RuleRef, name: &str) -> bool {
    match rule {
        RuleRef::Rule { policy, .. } => policy == name,
        RuleRef::TierDefault { .. } | RuleRef::DefaultPosture | RuleRef::Builtin { .. } => false,
    }
}
