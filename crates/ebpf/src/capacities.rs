//! How large the tables may become.

use bulkhead_dataplane::DataplaneError;

/// Entries per table. The hash tables take memory only as they fill; `conns` and `frags` (LRU) and the
/// arrays `steps`, `cells` and `variants` take it at once: about 75 MB with the defaults, and 20 MB more during a
/// replacement.
///
/// Bank tables (`addresses`, `prefixes`, `rows`, `steps`, `cells`, `variants`) take a new size at the next
/// replacement; the others keep the size with which they were created until
/// [`bulkhead_dataplane::Dataplane::cleanup`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capacities {
    /// Single addresses with a class.
    pub addresses: u32,
    /// Address blocks with a class.
    pub prefixes: u32,
    /// (Compiled policy, class) pairs with a row, default rows included.
    pub rows: u32,
    /// Steps of all distinct rows.
    pub steps: u32,
    /// Distinct answers.
    pub cells: u32,
    /// Source ports at which rows that ask for them change.
    pub variants: u32,
    /// Endpoints.
    pub endpoints: u32,
    /// Addresses of all endpoints.
    pub endpoint_addrs: u32,
    /// Live connections; beyond it, the least recently used one is forgotten (and judged again). One endpoint's that
    /// nobody has answered take a sixteenth at most.
    pub conns: u32,
    /// Refused connections between two sweeps; beyond it, drops are counted by reason only.
    pub denials: u32,
    /// Fragmented datagrams in flight.
    pub frags: u32,
    /// Bytes of the ring buffer: a power of two, at least a page.
    pub events_bytes: u32,
}

impl Default for Capacities {
    fn default() -> Self {
        Self {
            addresses: 262_144,
            prefixes: 65_536,
            rows: 524_288,
            steps: 2_097_152,
            cells: 262_144,
            variants: 65_536,
            endpoints: 4096,
            endpoint_addrs: 65_536,
            conns: 262_144,
            denials: 65_536,
            frags: 8192,
            events_bytes: 4 << 20,
        }
    }
}

/// One endpoint's part of [`Capacities::conns`] for connections that nobody has answered in the last minute.
const HALF_OPEN_PART: u32 = 16;

impl Capacities {
    /// Connections of one endpoint that may wait for an answer and be remembered; those beyond it are judged, let through
    /// and forgotten, so that no endpoint can make others' be forgotten.
    pub fn half_open_max(&self) -> u32 {
        (self.conns / HALF_OPEN_PART).max(1)
    }
}

/// Refuses a plan that does not fit.
pub(crate) fn fits(table: &'static str, needed: u64, capacity: u32) -> Result<(), DataplaneError> {
    let capacity = u64::from(capacity);
    if needed > capacity { Err(DataplaneError::Capacity { table, needed, capacity }) } else { Ok(()) }
}
