//! Reading what the kernel tells of connections and refused packets.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use bulkhead_dataplane::{DataplaneError, SweepStats};
use bulkhead_model::flow::RawFlow;

use super::{NftDataplane, failed};
use crate::message::messages;
use crate::object::Element;
use crate::schema::{EDGE, FAMILIES, Kind, LOG_GROUP};
use crate::{conntrack, kernel, log};

/// Whether the kernel tells us of refused packets: one process at a time can listen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Listening {
    /// Nobody has asked yet.
    Not,
    /// Somebody else listens.
    Refused,
    Told,
}

impl NftDataplane {
    /// Asks to be told of refused packets, until it is so.
    ///
    /// Whoever was in charge before may hold the group for as long as a process that it has forked holds its sockets.
    /// What was refused in that time has been noted by the kernel and told to nobody: it is told now.
    pub(super) fn listen(
        &mut self,
        now_ns: u64,
        sink: &mut dyn FnMut(RawFlow),
    ) -> Result<(), DataplaneError> {
        let listens = log::listen(LOG_GROUP).iter().all(|request| self.refused.ask(request).is_ok());
        let late = matches!(self.listening, Listening::Refused);
        self.listening = if listens { Listening::Told } else { Listening::Refused };
        if late && listens {
            // First what has been told since, which must not be told again.
            self.read_refused(now_ns, sink)?;
            self.sweep_denials(now_ns, &mut SweepStats::default(), sink)?;
        }
        Ok(())
    }

    pub(super) fn read_refused(
        &mut self,
        now_ns: u64,
        sink: &mut dyn FnMut(RawFlow),
    ) -> Result<(), DataplaneError> {
        loop {
            match self.refused.next() {
                Ok(None) => return Ok(()),
                Ok(Some(bytes)) => {
                    for refused in messages(&bytes).filter_map(|message| log::read(&message)) {
                        self.denials.event(&refused, (&self.judge, &self.image), now_ns, sink);
                    }
                }
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => self.lost_events += 1,
                Err(error) => return Err(DataplaneError::io("hear of refused packets", error)),
            }
        }
    }

    pub(super) fn read_connections(
        &mut self,
        now_ns: u64,
        sink: &mut dyn FnMut(RawFlow),
    ) -> Result<(), DataplaneError> {
        loop {
            match self.connections.next() {
                Ok(None) => return Ok(()),
                Ok(Some(bytes)) => {
                    for report in messages(&bytes).filter_map(|message| conntrack::read(&message)) {
                        let talker = &mut self.talker;
                        let count = |connection: &conntrack::Connection| {
                            let question = conntrack::get(connection);
                            let answer = talker.one(&question, conntrack::read).ok().flatten();
                            answer.and_then(|report| report.counters)
                        };
                        self.flows.event(&report, (&self.judge, &self.image), now_ns, count, sink);
                    }
                }
                // The connections are still there: the next sweep tells of them.
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => self.lost_events += 1,
                Err(error) => return Err(DataplaneError::io("hear of connections", error)),
            }
        }
    }

    pub(super) fn sweep_connections(
        &mut self,
        now_ns: u64,
        sink: &mut dyn FnMut(RawFlow),
    ) -> Result<SweepStats, DataplaneError> {
        let reports = self.walk_connections()?;
        Ok(self.flows.sweep(reports, (&self.judge, &self.image), now_ns, sink))
    }

    pub(super) fn sweep_denials(
        &mut self,
        now_ns: u64,
        stats: &mut SweepStats,
        sink: &mut dyn FnMut(RawFlow),
    ) -> Result<(), DataplaneError> {
        let sets = FAMILIES.iter().flat_map(|family| [family.denied, family.edge_denied]);
        let sets: Vec<_> = sets.collect();
        let mut all = Vec::new();
        for set in &sets {
            let entries = kernel::counted_elements(&mut self.talker, *set);
            all.push(entries.map_err(failed("read refused connections"))?);
        }
        let mut requests = Vec::new();
        let gone = self.denials.sweep(all.into_iter().flatten().collect(), &self.judge, now_ns, stats, sink);
        for (set, table) in sets.iter().map(|set| (*set, set.table)) {
            let mine = gone.iter().filter(|element| {
                // At the edge, and only there, the interface is part of the key.
                let at_edge = element.key.get(2) != Some(&(Kind::Group as u8))
                    && element.key.get(4..8).is_some_and(|index| index != [0; 4]);
                element.key.len() == set.key_len as usize && at_edge == (table == EDGE)
            });
            let elements: Vec<_> =
                mine.map(|element| Element::Key { key: element.key.clone(), data: Vec::new() }).collect();
            set.remove(&elements, &mut requests);
        }
        self.write(requests)
    }
}

/// One descriptor that is readable when one of these is.
pub(super) fn epoll(watched: &[BorrowedFd<'_>]) -> io::Result<OwnedFd> {
    #[expect(unsafe_code, reason = "system calls without a safe wrapper")]
    // SAFETY: the new descriptor is owned by nobody else; the event outlives the call that reads it.
    unsafe {
        let fd = libc::epoll_create1(libc::EPOLL_CLOEXEC);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        let wait = OwnedFd::from_raw_fd(fd);
        for fd in watched {
            let mut event = libc::epoll_event { events: libc::EPOLLIN as u32, u64: 0 };
            let result =
                libc::epoll_ctl(wait.as_raw_fd(), libc::EPOLL_CTL_ADD, fd.as_raw_fd(), &raw mut event);
            if result < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(wait)
    }
}

/// Nanoseconds of CLOCK_MONOTONIC.
pub(super) fn monotonic_ns() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    #[expect(unsafe_code, reason = "system call without a safe wrapper")]
    // SAFETY: the struct outlives the call.
    unsafe {
        libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time);
    }
    u64::try_from(time.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(time.tv_nsec).unwrap_or(0)
}
