//! From one dataplane to another without a gap.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::os::fd::BorrowedFd;

use bulkhead_model::Direction;
use bulkhead_model::flow::RawFlow;
use bulkhead_model::host_policy::{Attachment, Cell, HostDelta, HostPolicy};
use bulkhead_model::ports::PortKey;

use crate::{Applied, Dataplane, DataplaneError, DataplaneStats, SweepStats};

/// The dataplane that was chosen, and the one that enforced before it for as long as that has to.
///
/// INVARIANT: the earlier one goes on until a whole state of the later one is in force at every interface; from then on
/// nothing of it is left.
pub struct Handover {
    current: Box<dyn Dataplane>,
    previous: Option<Box<dyn Dataplane>>,
    because: Option<String>,
    /// What the later one is told when it is in charge.
    guarded: Option<(Vec<String>, BTreeSet<u32>)>,
}

impl std::fmt::Debug for Handover {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let previous = self.previous.as_ref().map(|previous| previous.name());
        f.debug_struct("Handover")
            .field("current", &self.current.name())
            .field("previous", &previous)
            .finish()
    }
}

impl Handover {
    /// `previous`: what an earlier process left of another kind. `because`: why this one was chosen, if somebody has to
    /// know.
    pub fn new(
        current: Box<dyn Dataplane>,
        previous: Option<Box<dyn Dataplane>>,
        because: Option<String>,
    ) -> Self {
        Self { current, previous, because, guarded: None }
    }
}

impl Dataplane for Handover {
    fn name(&self) -> &'static str {
        self.current.name()
    }

    fn chosen_because(&self) -> Option<&str> {
        self.because.as_deref().or_else(|| self.current.chosen_because())
    }

    fn guard(&mut self, names: &[String], spared: &BTreeSet<u32>) -> Result<(), DataplaneError> {
        self.guarded = Some((names.to_vec(), spared.clone()));
        match &mut self.previous {
            // What it is in charge of, the later one is not yet.
            Some(previous) => previous.guard(names, spared),
            None => self.current.guard(names, spared),
        }
    }

    fn attach(&mut self, attachment: Attachment) -> Result<(), DataplaneError> {
        match &mut self.previous {
            // The later one has no binding for it yet, and would close what is open.
            Some(previous) => previous.attach(attachment),
            None => self.current.attach(attachment),
        }
    }

    fn detach(&mut self, attachment: Attachment) -> Result<(), DataplaneError> {
        if let Some(previous) = &mut self.previous {
            previous.detach(attachment)?;
        }
        self.current.detach(attachment)
    }

    fn attached(&self) -> Result<BTreeSet<Attachment>, DataplaneError> {
        let mut all = self.current.attached()?;
        if let Some(previous) = &self.previous {
            all.extend(previous.attached()?);
        }
        Ok(all)
    }

    fn replace(&mut self, policy: &HostPolicy) -> Result<Applied, DataplaneError> {
        let applied = self.current.replace(policy)?;
        let Some(previous) = &mut self.previous else { return Ok(applied) };
        for attachment in previous.attached()? {
            match self.current.attach(attachment) {
                Ok(()) | Err(DataplaneError::Gone { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        if let Some((names, spared)) = &self.guarded {
            self.current.guard(names, spared)?;
        }
        previous.cleanup()?;
        self.previous = None;
        Ok(applied)
    }

    fn apply(&mut self, delta: &HostDelta) -> Result<Applied, DataplaneError> {
        self.current.apply(delta)
    }

    fn poll(&mut self, sink: &mut dyn FnMut(RawFlow)) -> Result<(), DataplaneError> {
        self.current.poll(sink)
    }

    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        self.current.event_fd()
    }

    fn sweep(&mut self, now_ns: u64, sink: &mut dyn FnMut(RawFlow)) -> Result<SweepStats, DataplaneError> {
        self.current.sweep(now_ns, sink)
    }

    fn stats(&self) -> Result<DataplaneStats, DataplaneError> {
        self.current.stats()
    }

    fn lookup(
        &self,
        attachment: Attachment,
        direction: Direction,
        peer: IpAddr,
        key: PortKey,
        source_port: u16,
    ) -> Result<Option<Cell>, DataplaneError> {
        self.current.lookup(attachment, direction, peer, key, source_port)
    }

    fn read_back(&self) -> Result<HostPolicy, DataplaneError> {
        self.current.read_back()
    }

    fn generation(&self) -> u64 {
        self.current.generation()
    }

    fn cleanup(&mut self) -> Result<(), DataplaneError> {
        if let Some(previous) = &mut self.previous {
            previous.cleanup()?;
        }
        self.current.cleanup()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::{Call, FakeDataplane};

    #[test]
    fn the_earlier_one_goes_when_the_later_one_is_in_force() {
        let (old, new) = (FakeDataplane::default(), FakeDataplane::default());
        let interface = Attachment::Interface(3);
        old.clone().attach(interface).unwrap();
        old.take_calls();
        let mut handover = Handover::new(Box::new(new.clone()), Some(Box::new(old.clone())), None);
        assert_eq!(handover.attached().unwrap(), [interface].into());
        handover.attach(Attachment::Interface(4)).unwrap();
        assert_eq!(new.take_calls(), [], "nothing is closed before it is known what may pass");
        new.fail_next(DataplaneError::Inconsistent("not yet".into()));
        assert!(handover.replace(&HostPolicy::default()).is_err());
        assert_eq!(old.take_calls(), [Call::Attach(Attachment::Interface(4))]);
        new.take_calls();
        handover.replace(&HostPolicy::default()).unwrap();
        let calls = new.take_calls();
        assert!(matches!(calls[0], Call::Replace(_)), "{calls:?}");
        assert_eq!(calls[1..], [3, 4].map(|index| Call::Attach(Attachment::Interface(index))));
        assert_eq!(old.take_calls(), [Call::Cleanup]);
        handover.attach(Attachment::Interface(5)).unwrap();
        assert_eq!(new.take_calls(), [Call::Attach(Attachment::Interface(5))]);
    }
}
