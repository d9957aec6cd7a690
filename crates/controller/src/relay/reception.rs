//! What is heard over one connection upstream, until everything may move to another revision at once.

use std::collections::HashSet;

use bulkhead_wire::proto;
use bulkhead_wire::proto::controller_message::Body;

/// What was heard up to a barrier.
#[derive(Debug, Default)]
pub(super) struct Batch {
    pub(super) resources: Vec<proto::Resources>,
    pub(super) members: Vec<proto::Members>,
}

/// Of one connection.
#[derive(Debug, Default)]
pub(super) struct Reception {
    batch: Batch,
    /// Subscriptions that were resumed and are not answered yet.
    owed: HashSet<u32>,
}

impl Reception {
    /// `owed`: subscriptions whose members are known as of an earlier revision. Barriers before their answers speak of
    /// resources that are ahead of them.
    pub(super) fn new(owed: HashSet<u32>) -> Self {
        Self { batch: Batch::default(), owed }
    }

    /// Hears a message; at a barrier to which everything has come, all that was heard up to there and its revision.
    pub(super) fn hear(&mut self, body: Body) -> Option<(Batch, u64)> {
        match body {
            Body::Resources(resources) => self.batch.resources.push(resources),
            Body::Members(members) => {
                self.owed.remove(&members.handle);
                self.batch.members.push(members);
            }
            Body::Synced(synced) if self.owed.is_empty() => {
                return Some((std::mem::take(&mut self.batch), synced.revision));
            }
            Body::Synced(_) | Body::Welcome(_) | Body::InventoryAck(_) | Body::Revocations(_) => {}
        }
        None
    }

    /// Whether all that was resumed is answered.
    pub(super) fn is_settled(&self) -> bool {
        self.owed.is_empty()
    }
}

#[cfg(test)]
impl Reception {
    /// What it answers depends on.
    pub(super) fn seen(&self) -> String {
        let owed: std::collections::BTreeSet<_> = self.owed.iter().collect();
        format!("{owed:?} {:?}", self.batch)
    }
}
