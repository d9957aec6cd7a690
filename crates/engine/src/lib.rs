//! The engine: from policies, labels and members to the tables that one host must enforce.
//!
//! Pure: no clock, no IO, no async, no global state.
//!
//! * [`decide`] walks the rules naively and answers with its trace. It is the reference that the compiled
//!   tables and every dataplane must agree with.
//! * [`MemberIndex`] keeps, for each selector somebody asked for, the entities that match it.
//! * [`lint`](fn@lint) says what is suspicious in policies, and nothing that is not certain.
//! * [`HostEngine`] keeps the [`HostPolicy`](bulkhead_model::host_policy::HostPolicy) of one host, by the
//!   difference. Its output is a function of its input's current state, whatever the order of updates.
#![deny(missing_docs)]

mod assembly;
mod classes;
mod decide;
mod explain;
mod few;
mod find;
mod fleet;
mod guard;
mod host;
mod intervals;
mod judgement;
mod lint;
mod members;
mod own_host;
mod program;
mod selector_index;
mod world;

pub use assembly::{Assembly, Changes, Heritage};
pub use decide::{decide, judge, judge_forwarded};
pub use explain::{
    COST_HOSTS_MAX, HostCost, Isolation, PolicyExplanation, PolicyUse, RuleExplanation, TierExplanation,
    WorkloadExplanation, explain_policy, explain_workload,
};
pub use find::{FindError, find_end, find_endpoint, find_policy};
pub use fleet::Fleet;
pub use guard::{Cut, LIFELINES_JUDGED_MAX, Lifeline, TooMany, cuts};
pub use host::{HostEngine, LocalEndpoint, Member, NotReady};
pub use judgement::{Endpoint, Explanation, Flow, Judgement, Outcome, Step};
pub use lint::{CODES, Code, CodeInfo, Finding, Findings, Severity, lint};
pub use members::{Change, MemberChange, MemberIndex, MemberRef, SelectorId};
pub use world::World;
