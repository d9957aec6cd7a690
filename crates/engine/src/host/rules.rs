//! Numbers for the authors of decisions.

use std::collections::{BTreeMap, HashMap};

use bulkhead_model::RuleRef;
use bulkhead_model::host_policy::RuleId;
use bulkhead_model::verdict::{Builtin, FIRST_FREE_RULE_ID};

/// Gives each [`RuleRef`] one number for good: a rule that comes back, or whose policy is edited, keeps its
/// number, and a live connection that was judged by a rule which is gone can still be named.
#[derive(Debug)]
pub(super) struct RuleTable {
    ids: HashMap<RuleRef, RuleId>,
    new: BTreeMap<RuleId, RuleRef>,
    next: u32,
}

impl Default for RuleTable {
    fn default() -> Self {
        let builtins = Builtin::ALL.map(|builtin| (RuleRef::Builtin { builtin }, RuleId(builtin as u32)));
        let new = builtins.iter().map(|(rule, id)| (*id, rule.clone())).collect();
        Self { ids: builtins.into_iter().collect(), new, next: FIRST_FREE_RULE_ID }
    }
}

impl RuleTable {
    pub(super) fn id(&mut self, rule: RuleRef) -> RuleId {
        if let Some(id) = self.ids.get(&rule) {
            return *id;
        }
        let id = RuleId(self.next);
        self.next += 1;
        self.new.insert(id, rule.clone());
        self.ids.insert(rule, id);
        id
    }

    /// Those that were given out since the last call.
    pub(super) fn take_new(&mut self) -> BTreeMap<RuleId, RuleRef> {
        std::mem::take(&mut self.new)
    }

    pub(super) fn adopt(&mut self, rules: &BTreeMap<RuleId, RuleRef>) {
        for (id, rule) in rules.iter().filter(|(id, _)| id.0 >= FIRST_FREE_RULE_ID) {
            self.ids.insert(rule.clone(), *id);
            self.new.insert(*id, rule.clone());
            self.next = self.next.max(id.0 + 1);
        }
    }
}
