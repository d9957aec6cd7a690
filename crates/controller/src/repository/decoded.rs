//! Changes of objects, read before the view is locked.

use std::sync::Arc;

use bulkhead_model::{ObjectKey, Resource};
use bulkhead_store::{Commit, Revision, Stored};

use super::keys;

/// A change of an object, read from the store.
#[derive(Debug)]
pub(crate) struct Decoded {
    pub(super) key: ObjectKey,
    /// What it is now; `None`: gone; an error if it cannot be read.
    pub(super) object: Option<Result<Resource, keys::Undecodable>>,
    pub(super) revision: u64,
}

/// Reads commits: `read` each object. This is the work in taking them in, so it is done before the view is locked.
pub(super) fn decode(
    commits: &[Arc<Commit>],
    read: impl Fn(&Stored) -> Result<Resource, keys::Undecodable>,
) -> Vec<Decoded> {
    let changes =
        commits.iter().flat_map(|commit| commit.changes.iter().map(move |change| (commit.revision, change)));
    let decoded = changes.filter_map(|(Revision(revision), change)| {
        let key = keys::object_key(&change.key)?;
        Some(Decoded { key, object: change.object.as_ref().map(&read), revision })
    });
    decoded.collect()
}

impl Decoded {
    /// What a relay was told of.
    pub(crate) fn told(key: ObjectKey, now: Option<Resource>, revision: u64) -> Self {
        Self { key, object: now.map(Ok), revision }
    }
}
