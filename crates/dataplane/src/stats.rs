//! What a dataplane says about itself.

use std::collections::BTreeMap;
use std::time::Duration;

use bulkhead_model::flow::DropReason;

/// What one [`crate::Dataplane::replace`] or [`crate::Dataplane::apply`] did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Applied {
    /// Table entries written.
    pub entries_written: u64,
    /// Table entries deleted.
    pub entries_deleted: u64,
    /// How long it took.
    pub duration: Duration,
}

/// What one [`crate::Dataplane::sweep`] saw.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SweepStats {
    /// Live connections after the sweep.
    pub connections: u64,
    /// Connections reported as still going.
    pub updated: u64,
    /// Connections removed because they ended or were idle for their time-out.
    pub closed: u64,
    /// Entries of refused connections reported and removed.
    pub denials: u64,
    /// Files by which tables and programs outlive the agent, put back after somebody had removed them.
    pub put_back: u64,
}

/// How full one table is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TableUse {
    /// Its name, as in [`crate::DataplaneError::Capacity`].
    pub table: &'static str,
    /// Entries in use.
    pub used: u64,
    /// Entries that fit.
    pub capacity: u64,
}

/// Counters since the tables were first created, and sizes now.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DataplaneStats {
    /// Packets dropped, by reason; reasons that never occurred are absent.
    pub drops: BTreeMap<DropReason, u64>,
    /// Packets dropped without an entry of their own, because the table of refused connections was
    /// full: they are in `drops`, but in no flow.
    pub unrecorded_denials: u64,
    /// Events lost because nobody read them in time. The connections are still in the table, and the
    /// next sweep reports them.
    pub lost_events: u64,
    /// Packets refused by a rule with `reject` whose sender was not told: more than 1000 a second of one endpoint, or
    /// nothing could be sent to them.
    pub untold_refusals: u64,
    /// Tables, in a fixed order.
    pub tables: Vec<TableUse>,
}
