//! The boundary between an agent and whatever enforces policy on its host.
//!
//! The agent hands a [`Dataplane`] a [`HostPolicy`] (whole) or a [`HostDelta`] (difference) and hears
//! back about connections. Which kernel mechanism is behind it is none of its business.
#![deny(missing_docs)]

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::os::fd::BorrowedFd;

use bulkhead_model::Direction;
use bulkhead_model::flow::RawFlow;
use bulkhead_model::host_policy::{Attachment, Cell, HostDelta, HostPolicy};
use bulkhead_model::ports::PortKey;

mod error;
pub mod fake;
mod grace;
mod groups;
mod handover;
mod stats;

pub use error::DataplaneError;
pub use grace::grace_period;
pub use groups::ControlGroup;
pub use handover::Handover;
pub use stats::{Applied, DataplaneStats, SweepStats, TableUse};

/// Something that enforces policy on this host's endpoints and reports their connections.
///
/// Every call blocks for as long as the kernel takes (microseconds for a delta, up to a second for a
/// large replacement): an async caller gives it a thread of its own.
///
/// INVARIANT: an attached interface without a binding is denied everything, and what was last
/// applied stays in force when the value is dropped or its process dies. Only [`Self::detach`] and
/// [`Self::cleanup`] open anything.
pub trait Dataplane: Send {
    /// Name in logs and status: `ebpf`, `nftables`, `fake`.
    fn name(&self) -> &'static str;

    /// Why it was chosen, where that is not what everybody would expect.
    fn chosen_because(&self) -> Option<&str> {
        None
    }

    /// Names of interfaces (`*` stands for anything at the end) that belong to workloads, and those of them that are left
    /// alone until somebody claims them. A dataplane that can judge interfaces by their names refuses what all others send
    /// and get from the moment they appear, before [`Self::attach`], and whether or not this process lives.
    fn guard(&mut self, _names: &[String], _spared: &BTreeSet<u32>) -> Result<(), DataplaneError> {
        Ok(())
    }

    /// Takes charge of an interface or control group, in both directions: deny all from now on, until a binding for it
    /// is applied. Idempotent; one that already has a binding keeps it. The host itself needs none: it is judged where
    /// it has a binding, so that nobody is locked out before there is a policy.
    fn attach(&mut self, attachment: Attachment) -> Result<(), DataplaneError>;

    /// Lets it go: its traffic is not judged any more. Idempotent, also when it no longer exists.
    fn detach(&mut self, attachment: Attachment) -> Result<(), DataplaneError>;

    /// What is in charge, of an earlier process too.
    fn attached(&self) -> Result<BTreeSet<Attachment>, DataplaneError>;

    /// Puts a whole state into force, whatever was there before, with one atomic switch per endpoint.
    /// Endpoints that are not in it are denied everything.
    fn replace(&mut self, policy: &HostPolicy) -> Result<Applied, DataplaneError>;

    /// Applies a difference to what the last [`Self::replace`] and [`Self::apply`] made, in the order
    /// documented at [`HostDelta`]. After an error other than [`DataplaneError::Capacity`] (which
    /// changes nothing), the caller repairs with [`Self::replace`].
    fn apply(&mut self, delta: &HostDelta) -> Result<Applied, DataplaneError>;

    /// Hands over waiting events without blocking.
    fn poll(&mut self, sink: &mut dyn FnMut(RawFlow)) -> Result<(), DataplaneError>;

    /// Readable when [`Self::poll`] has something to hand over. `None`: poll by time.
    fn event_fd(&self) -> Option<BorrowedFd<'_>>;

    /// Walks connections and denials: reports what was counted since the last sweep, and removes and
    /// reports what has ended or been idle too long. `now_ns` is CLOCK_MONOTONIC.
    fn sweep(&mut self, now_ns: u64, sink: &mut dyn FnMut(RawFlow)) -> Result<SweepStats, DataplaneError>;

    /// Drops by reason, lost reports, table sizes and capacities.
    fn stats(&self) -> Result<DataplaneStats, DataplaneError>;

    /// What the tables in force say about a new connection of an endpoint; the source port is that of whoever begins
    /// (0 for protocols without). `None` if it has no tables for
    /// that direction.
    fn lookup(
        &self,
        attachment: Attachment,
        direction: Direction,
        peer: IpAddr,
        key: PortKey,
        source_port: u16,
    ) -> Result<Option<Cell>, DataplaneError>;

    /// The tables in force as the kernel holds them now. Endpoints are named by their attachment, and rules by
    /// their ids alone: names and meanings are not in the kernel.
    ///
    /// # Errors
    /// If the kernel refuses, or what is there cannot be tables of ours.
    fn read_back(&self) -> Result<HostPolicy, DataplaneError>;

    /// Number of this process's term. Whoever took over later has a higher one, and from then on
    /// [`Self::replace`] and [`Self::apply`] here answer [`DataplaneError::Fenced`].
    fn generation(&self) -> u64;

    /// Removes every trace from the kernel. Traffic is not judged any more.
    fn cleanup(&mut self) -> Result<(), DataplaneError>;
}
