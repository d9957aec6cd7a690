//! Beginning and ending the time in which a connection that has been judged is not judged again.

use std::io;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bulkhead_dataplane::{DataplaneError, grace_period};

use super::{NftDataplane, failed};
use crate::conntrack::{self, Report};
use crate::fresh::{Epochs, Place};
use crate::kernel;
use crate::message::Request;
use crate::schema::{CURRENT, FRESH};

/// Nothing has changed for this long before an epoch begins: it costs a transaction, and each connection a message.
const QUIET: Duration = Duration::from_millis(50);

/// Whether the kernel's grace period has passed since tables changed. Waiting takes milliseconds, in which an interface
/// that appears must not stay open: somebody else waits.
#[derive(Debug)]
pub(super) enum Settling {
    Changed(Instant),
    Waiting(JoinHandle<io::Result<()>>),
    Over,
}

impl Settling {
    fn go_on(&mut self) {
        let next = match std::mem::replace(self, Self::Over) {
            Self::Changed(when) if when.elapsed() >= QUIET => Self::Waiting(std::thread::spawn(grace_period)),
            Self::Waiting(waits) if waits.is_finished() => match waits.join() {
                Ok(Ok(())) => Self::Over,
                // Once more, after a while.
                Ok(Err(_)) | Err(_) => Self::Changed(Instant::now()),
            },
            other => other,
        };
        *self = next;
    }

    fn is_over(&self) -> bool {
        matches!(self, Self::Over)
    }
}

impl NftDataplane {
    /// Learns which epoch is in force.
    pub(super) fn read_epochs(&mut self) -> Result<(), DataplaneError> {
        let context = failed("read the tables");
        let current = kernel::elements(&mut self.talker, CURRENT).map_err(&context)?;
        let fresh = kernel::elements(&mut self.talker, FRESH).map_err(&context)?;
        self.epochs = Some(Epochs::found(current, fresh));
        Ok(())
    }

    /// What ends the epoch: no later than with the first change after it, or a connection would pass that may not.
    pub(super) fn end_epoch(&mut self) -> Result<Vec<Request>, DataplaneError> {
        if self.epochs.is_none() {
            self.read_epochs()?;
        }
        self.settling = Settling::Changed(Instant::now());
        let mut requests = Vec::new();
        for (set, elements) in self.epochs.as_mut().and_then(Epochs::end).into_iter().flatten() {
            set.remove(&elements, &mut requests);
        }
        Ok(requests)
    }

    /// Begins an epoch, if nothing changes any more.
    pub(super) fn begin_epoch(&mut self) -> Result<(), DataplaneError> {
        self.settling.go_on();
        let waits = self.epochs.as_ref().is_none_or(Epochs::is_in_force);
        // Whoever asked the tables as they were must not note it as judged by what they are.
        if waits || !self.settling.is_over() || !self.ours || self.disturbed {
            return Ok(());
        }
        let places = Place::BOTH.into_iter();
        let places: Vec<_> =
            places.filter(|place| self.shape.is_some_and(|shape| shape.by_address(*place))).collect();
        let Some(elements) = self.epochs.as_mut().and_then(|epochs| epochs.begin(&places)) else {
            return Ok(());
        };
        let mut requests = Vec::new();
        elements.iter().for_each(|(set, elements)| set.add(elements, &mut requests));
        let written = self.write(requests);
        if written.is_err() {
            self.epochs = None;
        }
        written
    }

    /// Which epochs are over, so that their bits can be cleared: nobody sets them any more.
    fn epochs_over(&mut self) -> Result<u8, DataplaneError> {
        if self.epochs.is_none() && self.ours {
            self.read_epochs()?;
        }
        let over = self.epochs.as_ref().map_or(0, Epochs::over);
        Ok(if self.settling.is_over() { over } else { 0 })
    }

    /// All connections, and clears their labels of epochs that are over.
    pub(super) fn walk_connections(&mut self) -> Result<Vec<Report>, DataplaneError> {
        let (over, buckets) = (self.epochs_over()?, kernel::conntrack_buckets());
        let reports = self.dump_connections()?;
        let have = |report: &&Report| report.epochs & over != 0;
        let (mut some, mut left) = (false, false);
        for report in reports.iter().filter(have) {
            // One that has gone in the meantime is no error.
            let cleared = self.talker.one(&conntrack::clear(report, over), |_| Some(()));
            cleared.map_err(failed("clear a connection's label"))?;
            some = true;
        }
        if some {
            left = self.dump_connections()?.iter().any(|report| have(&report));
        }
        // Of a table that was moved meanwhile not all may have been seen.
        if !left
            && buckets == kernel::conntrack_buckets()
            && let Some(epochs) = &mut self.epochs
        {
            epochs.cleared(over);
        }
        Ok(reports)
    }

    fn dump_connections(&mut self) -> Result<Vec<Report>, DataplaneError> {
        self.talker
            .dump(&conntrack::dump(), |message, all| all.extend(conntrack::read(message)))
            .map_err(failed("read connections"))
    }
}
