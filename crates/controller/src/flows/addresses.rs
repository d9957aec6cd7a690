//! Which workload had which address when. Addresses are used again, so a flow must be joined with the
//! inventory as of its own time.

use std::collections::{HashMap, VecDeque};
use std::net::IpAddr;
use std::sync::Arc;

use bulkhead_model::Labels;
use bulkhead_model::resource::Workload;

/// Ended assignments that are remembered.
const ENDED_LEN_MAX: usize = 200_000;
/// A flow may begin this much before its workload was heard of: discovery takes a moment, clocks differ.
const EARLY_MS_MAX: u64 = 30_000;

/// A workload while it had an address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Holder {
    /// `name` or `namespace/name`.
    pub(crate) workload: Arc<str>,
    pub(crate) host: Arc<str>,
    pub(crate) labels: Labels,
}

#[derive(Debug)]
struct Assignment {
    holder: Arc<Holder>,
    from_ms: u64,
    to_ms: Option<u64>,
}

/// The history.
#[derive(Debug, Default)]
pub(crate) struct AddressHistory {
    by_address: HashMap<IpAddr, Vec<Assignment>>,
    current: HashMap<Arc<str>, (Arc<Holder>, Vec<IpAddr>)>,
    /// Addresses with ended assignments, oldest end first; each stands for that address's oldest.
    ended: VecDeque<IpAddr>,
}

impl AddressHistory {
    /// Takes in a new or changed workload.
    pub(crate) fn assign(&mut self, name: &str, workload: &Workload, now_ms: u64) {
        let holder = Holder {
            workload: name.into(),
            host: workload.spec.host.as_str().into(),
            labels: workload.metadata.labels.clone(),
        };
        if let Some((known, addresses)) = self.current.get(name)
            && **known == holder
            && *addresses == workload.spec.addresses
        {
            return;
        }
        self.release(name, now_ms);
        let holder = Arc::new(holder);
        for address in &workload.spec.addresses {
            let assignment = Assignment { holder: Arc::clone(&holder), from_ms: now_ms, to_ms: None };
            self.by_address.entry(*address).or_default().push(assignment);
        }
        self.current.insert(Arc::clone(&holder.workload), (holder, workload.spec.addresses.clone()));
    }

    /// A workload has gone.
    pub(crate) fn release(&mut self, name: &str, now_ms: u64) {
        let Some((holder, addresses)) = self.current.remove(name) else { return };
        for address in addresses {
            let assignments = self.by_address.get_mut(&address).into_iter().flatten();
            for assignment in assignments.filter(|assignment| Arc::ptr_eq(&assignment.holder, &holder)) {
                if assignment.to_ms.is_none() {
                    assignment.to_ms = Some(now_ms);
                    self.ended.push_back(address);
                }
            }
        }
        self.trim();
    }

    fn trim(&mut self) {
        while self.ended.len() > ENDED_LEN_MAX
            && let Some(address) = self.ended.pop_front()
        {
            let Some(assignments) = self.by_address.get_mut(&address) else { continue };
            if let Some(oldest) = assignments.iter().position(|assignment| assignment.to_ms.is_some()) {
                assignments.remove(oldest);
            }
            if assignments.is_empty() {
                self.by_address.remove(&address);
            }
        }
    }

    /// Who had an address at a time.
    pub(crate) fn holder(&self, address: IpAddr, at_ms: u64) -> Option<&Holder> {
        let assignments = self.by_address.get(&address)?;
        let holds = |assignment: &&Assignment, at_ms: u64| {
            assignment.from_ms <= at_ms && assignment.to_ms.is_none_or(|to_ms| at_ms < to_ms)
        };
        // The newest first: two workloads may share an address for a moment while one replaces the other.
        let newest_first = || assignments.iter().rev();
        newest_first()
            .find(|assignment| holds(assignment, at_ms))
            .or_else(|| newest_first().find(|assignment| holds(assignment, at_ms + EARLY_MS_MAX)))
            .map(|assignment| &*assignment.holder)
    }
}

#[cfg(test)]
mod tests {
    use bulkhead_model::entity::WorkloadSpec;
    use bulkhead_model::resource::Metadata;

    use super::*;

    fn workload(addresses: &[&str]) -> Workload {
        let addresses = addresses.iter().map(|address| address.parse().unwrap()).collect();
        let spec = WorkloadSpec { host: "h".into(), addresses, ..WorkloadSpec::default() };
        Workload { metadata: Metadata::default(), spec }
    }

    #[test]
    fn an_address_used_again_belongs_to_whoever_had_it_then() {
        let mut history = AddressHistory::default();
        let address = "10.0.0.1".parse().unwrap();
        let name = |history: &AddressHistory, at_ms| {
            history.holder(address, at_ms).map(|holder| holder.workload.to_string())
        };
        history.assign("a.h", &workload(&["10.0.0.1"]), 100_000);
        history.assign("a.h", &workload(&["10.0.0.1"]), 150_000);
        history.release("a.h", 200_000);
        history.assign("b.h", &workload(&["10.0.0.1", "10.0.0.2"]), 300_000);
        assert_eq!(name(&history, 60_000), None);
        assert_eq!(name(&history, 80_000).as_deref(), Some("a.h"));
        assert_eq!(name(&history, 199_999).as_deref(), Some("a.h"));
        assert_eq!(name(&history, 240_000), None);
        assert_eq!(name(&history, 290_000).as_deref(), Some("b.h"));
        history.assign("b.h", &workload(&["10.0.0.2"]), 400_000);
        assert_eq!(name(&history, 350_000).as_deref(), Some("b.h"));
        assert_eq!(name(&history, 400_000), None);
    }
}
