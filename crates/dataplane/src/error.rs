//! What can go wrong in a dataplane.

use std::io;

use bulkhead_model::host_policy::Attachment;

/// Why a dataplane could not do something. The state in force is unchanged unless the variant says
/// otherwise.
#[derive(Debug, thiserror::Error)]
pub enum DataplaneError {
    /// The kernel (or this process's rights in it) lacks something.
    #[error("{feature} is missing: {advice}")]
    Requirement {
        /// What: `tcx`, `BTF`, `bpffs`, `CAP_BPF`…
        feature: &'static str,
        /// What it is needed for and how to get it, as a sentence.
        advice: String,
    },
    /// A plan does not fit. It was refused whole before anything was written.
    #[error(
        "table {table} would need {needed} entries and holds {capacity}; the last tables stay in force: \
         raise the capacity of {table} or use fewer, broader rules"
    )]
    Capacity {
        /// Name of the table, as in [`crate::DataplaneStats::tables`].
        table: &'static str,
        /// Entries that the plan needs.
        needed: u64,
        /// Entries that the table holds.
        capacity: u64,
    },
    /// What is to be attached to does not exist (any more).
    #[error("{attachment} does not exist here")]
    Gone {
        /// What.
        attachment: Attachment,
    },
    /// Another process has taken over.
    #[error(
        "another agent (generation {current}) has taken over from this one (generation {own}); \
         nothing was written"
    )]
    Fenced {
        /// Generation of the one in charge.
        current: u64,
        /// Generation of this one.
        own: u64,
    },
    /// A plan refers to something that is not there: a defect of whoever made the plan.
    #[error("inconsistent plan: {0}")]
    Inconsistent(String),
    /// The kernel refused an operation. Part of a plan may have been written: repair by replacing.
    #[error("{context}: {source}")]
    Io {
        /// What was being done, to what.
        context: String,
        /// What the kernel said.
        source: io::Error,
    },
}

impl DataplaneError {
    /// An [`Self::Io`] for the thing that was being done.
    pub fn io(context: impl Into<String>, source: io::Error) -> Self {
        Self::Io { context: context.into(), source }
    }
}
