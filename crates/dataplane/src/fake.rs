//! A dataplane that enforces nothing, for tests of whatever drives one.

use std::collections::{BTreeSet, VecDeque};
use std::net::IpAddr;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bulkhead_model::Direction;
use bulkhead_model::flow::RawFlow;
use bulkhead_model::host_policy::{Attachment, Cell, CompiledId, HostDelta, HostPolicy};
use bulkhead_model::ports::PortKey;

use crate::{Applied, Dataplane, DataplaneError, DataplaneStats, SweepStats};

/// One call that changed something, in the order in which they came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Call {
    /// [`Dataplane::attach`].
    Attach(Attachment),
    /// [`Dataplane::detach`].
    Detach(Attachment),
    /// [`Dataplane::replace`].
    Replace(Box<HostPolicy>),
    /// [`Dataplane::apply`].
    Apply(Box<HostDelta>),
    /// [`Dataplane::cleanup`].
    Cleanup,
}

#[derive(Debug, Default)]
struct State {
    policy: HostPolicy,
    attached: BTreeSet<Attachment>,
    calls: Vec<Call>,
    events: VecDeque<RawFlow>,
    swept: VecDeque<RawFlow>,
    failures: VecDeque<DataplaneError>,
    generation: u64,
}

/// Holds what it is told. Clones share one state, so a test keeps one and gives another away; that
/// is also how an agent "restarts" over tables that stayed in force ([`FakeDataplane::take_over`]).
#[derive(Debug, Clone)]
pub struct FakeDataplane {
    state: Arc<Mutex<State>>,
    generation: u64,
}

impl Default for FakeDataplane {
    fn default() -> Self {
        let state = State { generation: 1, ..State::default() };
        Self { state: Arc::new(Mutex::new(state)), generation: 1 }
    }
}

impl FakeDataplane {
    /// A second agent over the same state: from now on the others are fenced off.
    pub fn take_over(&self) -> Self {
        let mut state = self.state();
        state.generation += 1;
        Self { state: Arc::clone(&self.state), generation: state.generation }
    }

    /// What is in force.
    pub fn policy(&self) -> HostPolicy {
        self.state().policy.clone()
    }

    /// Every changing call so far, failed ones included; empties the list.
    pub fn take_calls(&self) -> Vec<Call> {
        std::mem::take(&mut self.state().calls)
    }

    /// The next changing call answers this and changes nothing.
    pub fn fail_next(&self, error: DataplaneError) {
        self.state().failures.push_back(error);
    }

    /// The next [`Dataplane::poll`] hands this over.
    pub fn push_event(&self, flow: RawFlow) {
        self.state().events.push_back(flow);
    }

    /// The next [`Dataplane::sweep`] reports this.
    pub fn push_swept(&self, flow: RawFlow) {
        self.state().swept.push_back(flow);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // A test that panicked with the lock held has failed already; let the others see the state.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Records the call; the state to change, unless a failure is due.
    fn begin(&self, call: Call) -> Result<MutexGuard<'_, State>, DataplaneError> {
        let mut state = self.state();
        state.calls.push(call);
        if let Some(error) = state.failures.pop_front() {
            return Err(error);
        }
        if state.generation != self.generation {
            return Err(DataplaneError::Fenced { current: state.generation, own: self.generation });
        }
        Ok(state)
    }
}

impl Dataplane for FakeDataplane {
    fn name(&self) -> &'static str {
        "fake"
    }

    fn attach(&mut self, attachment: Attachment) -> Result<(), DataplaneError> {
        self.begin(Call::Attach(attachment))?.attached.insert(attachment);
        Ok(())
    }

    fn detach(&mut self, attachment: Attachment) -> Result<(), DataplaneError> {
        self.begin(Call::Detach(attachment))?.attached.remove(&attachment);
        Ok(())
    }

    fn attached(&self) -> Result<BTreeSet<Attachment>, DataplaneError> {
        Ok(self.state().attached.clone())
    }

    fn replace(&mut self, policy: &HostPolicy) -> Result<Applied, DataplaneError> {
        let mut state = self.begin(Call::Replace(Box::new(policy.clone())))?;
        state.policy = policy.clone();
        let rows: usize = policy.policies.values().map(|compiled| compiled.rows.len() + 1).sum();
        let entries_written = (rows + policy.addresses.len() + policy.endpoints.len()) as u64;
        Ok(Applied { entries_written, ..Applied::default() })
    }

    fn apply(&mut self, delta: &HostDelta) -> Result<Applied, DataplaneError> {
        let mut state = self.begin(Call::Apply(Box::new(delta.clone())))?;
        state.policy.apply(delta);
        Ok(Applied { entries_written: delta.entries_written() as u64, ..Applied::default() })
    }

    fn poll(&mut self, sink: &mut dyn FnMut(RawFlow)) -> Result<(), DataplaneError> {
        let events = std::mem::take(&mut self.state().events);
        events.into_iter().for_each(sink);
        Ok(())
    }

    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn sweep(&mut self, _now_ns: u64, sink: &mut dyn FnMut(RawFlow)) -> Result<SweepStats, DataplaneError> {
        let swept = std::mem::take(&mut self.state().swept);
        let updated = swept.len() as u64;
        swept.into_iter().for_each(sink);
        Ok(SweepStats { updated, ..SweepStats::default() })
    }

    fn stats(&self) -> Result<DataplaneStats, DataplaneError> {
        Ok(DataplaneStats::default())
    }

    fn read_back(&self) -> Result<HostPolicy, DataplaneError> {
        let mut policy = self.state().policy.clone();
        let endpoints = std::mem::take(&mut policy.endpoints);
        let by_attachment =
            endpoints.into_values().map(|binding| (binding.attachment.to_string().into(), binding));
        policy.endpoints = by_attachment.collect();
        policy.rules.clear();
        Ok(policy)
    }

    fn lookup(
        &self,
        attachment: Attachment,
        direction: Direction,
        peer: IpAddr,
        key: PortKey,
        source_port: u16,
    ) -> Result<Option<Cell>, DataplaneError> {
        let state = self.state();
        let Some(binding) = state.policy.endpoints.values().find(|binding| binding.attachment == attachment)
        else {
            return Ok(None);
        };
        let compiled = match direction {
            Direction::Ingress => binding.ingress,
            Direction::Egress => binding.egress,
        };
        if compiled == CompiledId::NONE {
            return Ok(None);
        }
        let class = state.policy.class_of(peer);
        Ok(state.policy.policies.get(&compiled).map(|policy| policy.cell(class, key, source_port)))
    }

    fn generation(&self) -> u64 {
        self.generation
    }

    fn cleanup(&mut self) -> Result<(), DataplaneError> {
        let mut state = self.begin(Call::Cleanup)?;
        state.policy = HostPolicy::default();
        state.attached.clear();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_what_it_had_when_a_call_fails() {
        let mut fake = FakeDataplane::default();
        fake.replace(&HostPolicy { revision: 3, ..HostPolicy::default() }).unwrap();
        fake.fail_next(DataplaneError::Capacity { table: "rows", needed: 2, capacity: 1 });
        assert!(fake.apply(&HostDelta { revision: 4, ..HostDelta::default() }).is_err());
        assert_eq!(fake.policy().revision, 3);
        fake.apply(&HostDelta { revision: 5, ..HostDelta::default() }).unwrap();
        assert_eq!(fake.policy().revision, 5);
        assert_eq!(fake.take_calls().len(), 3);
    }

    #[test]
    fn the_one_who_came_later_is_in_charge() {
        let mut first = FakeDataplane::default();
        let mut second = first.take_over();
        let error = first.replace(&HostPolicy::default()).unwrap_err();
        assert!(matches!(error, DataplaneError::Fenced { current: 2, own: 1 }));
        second.replace(&HostPolicy::default()).unwrap();
    }
}
