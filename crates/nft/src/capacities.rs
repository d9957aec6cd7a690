//! How large the tables may become.

use bulkhead_dataplane::DataplaneError;

/// Entries per table. The kernel takes memory only as they fill.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capacities {
    /// Addresses and blocks with a class.
    pub addresses: u32,
    /// (Compiled policy, class) pairs with a row, default rows included.
    pub rows: u32,
    /// Steps of all distinct rows.
    pub steps: u32,
    /// Source ports at which rows that ask for them change.
    pub variants: u32,
    /// Endpoints.
    pub endpoints: u32,
}

impl Default for Capacities {
    fn default() -> Self {
        Self { addresses: 262_144, rows: 524_288, steps: 262_144, variants: 65_536, endpoints: 4096 }
    }
}

impl Capacities {
    /// Refuses a plan that does not fit.
    pub(crate) fn fits(
        &self,
        table: &'static str,
        needed: usize,
        capacity: u32,
    ) -> Result<(), DataplaneError> {
        let (needed, capacity) = (needed as u64, u64::from(capacity));
        if needed > capacity { Err(DataplaneError::Capacity { table, needed, capacity }) } else { Ok(()) }
    }

    /// Of a table, by its name in [`bulkhead_dataplane::DataplaneStats::tables`].
    pub(crate) fn of(&self, table: &str) -> u64 {
        u64::from(match table {
            "addresses" => self.addresses,
            // A block cuts what is around it once on either side.
            "ranges" => self.addresses.saturating_mul(2),
            "rows" => self.rows,
            "steps" => self.steps,
            "variants" => self.variants,
            _ => self.endpoints,
        })
    }
}
