//! What a host's agent has published and the controller has not acknowledged, and all that it has: whatever happens to the
//! way upstream, it is said again until it is stored.

use std::collections::{BTreeMap, VecDeque};

use bulkhead_wire::MESSAGE_BYTES_MAX;
use bulkhead_wire::proto::{Inventory, InventoryAck};
use bytes::Bytes;

use crate::agents::name_in;

/// Inventories that are on their way at the same time.
const FLYING_MAX: usize = 16;
/// Inventories that wait to be sent. Where all is known that runs on the host, more become one.
const WAITING_MAX: usize = 64;
/// Generations of which an agent awaits an acknowledgement; of more the oldest are forgotten, since later ones come.
const UNANSWERED_MAX: usize = 1024;
/// Most bytes of what runs on a host: it has to fit into one message.
const HOST_BYTES_MAX: usize = MESSAGE_BYTES_MAX - (1 << 20);

/// More than can be held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "more is published of this host than a relay can hold ({HOST_BYTES_MAX} bytes, {WAITING_MAX} inventories)"
)]
pub(super) struct TooMuch;

/// Of one session of an agent.
#[derive(Debug, Default)]
pub(super) struct Outbox {
    /// What runs on the host, by name.
    known: BTreeMap<String, Bytes>,
    bytes: usize,
    /// Whether that is all.
    whole: bool,
    newest: u64,
    unanswered: VecDeque<u64>,
    waiting: VecDeque<Inventory>,
    flying: VecDeque<Inventory>,
}

impl Outbox {
    /// The agent publishes.
    pub(super) fn take_in(&mut self, inventory: Inventory) -> Result<(), TooMuch> {
        if inventory.complete {
            self.known.clear();
            self.bytes = 0;
            self.whole = true;
        }
        for name in &inventory.removes {
            self.put(name, None);
        }
        for workload in &inventory.upserts {
            self.put(&name_in(workload), Some(workload.clone()));
        }
        if self.bytes > HOST_BYTES_MAX {
            return Err(TooMuch);
        }
        self.newest = inventory.generation;
        self.unanswered.push_back(inventory.generation);
        if self.unanswered.len() > UNANSWERED_MAX {
            self.unanswered.pop_front();
        }
        self.waiting.push_back(inventory);
        if self.waiting.len() > WAITING_MAX {
            if !self.whole {
                return Err(TooMuch);
            }
            self.waiting = VecDeque::from([self.all()]);
        }
        Ok(())
    }

    fn put(&mut self, name: &str, workload: Option<Bytes>) {
        self.bytes += workload.as_ref().map_or(0, Bytes::len);
        let before = match workload {
            Some(workload) => self.known.insert(name.to_owned(), workload),
            None => self.known.remove(name),
        };
        self.bytes -= before.map_or(0, |before| before.len());
    }

    fn all(&self) -> Inventory {
        let upserts = self.known.values().cloned().collect();
        Inventory { generation: self.newest, complete: true, upserts, removes: Vec::new() }
    }

    /// There is a new way upstream, where nothing may be left of this host.
    pub(super) fn begin_anew(&mut self) {
        if self.whole {
            self.flying.clear();
            self.waiting = VecDeque::from([self.all()]);
        } else {
            self.flying.extend(self.waiting.drain(..));
            self.waiting = std::mem::take(&mut self.flying);
        }
    }

    /// What is to be sent now.
    pub(super) fn next(&mut self) -> Option<Inventory> {
        if self.flying.len() >= FLYING_MAX {
            return None;
        }
        let next = self.waiting.pop_front()?;
        self.flying.push_back(next.clone());
        Some(next)
    }

    /// Something was stored. Answers what the agent is to hear of it.
    pub(super) fn acknowledged(&mut self, ack: &InventoryAck) -> Vec<InventoryAck> {
        while self.flying.pop_front().is_some_and(|sent| sent.generation != ack.generation) {}
        let mut acks = Vec::new();
        while let Some(generation) = self.unanswered.pop_front_if(|waits| *waits <= ack.generation) {
            acks.push(InventoryAck { generation, refused: ack.refused.clone() });
        }
        acks
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn workload(name: &str, label: &str) -> Bytes {
        format!(r#"{{"metadata":{{"name":"{name}"}},"label":"{label}"}}"#).into()
    }

    fn inventory(generation: u64, complete: bool, upserts: &[Bytes], removes: &[&str]) -> Inventory {
        let removes = removes.iter().map(ToString::to_string).collect();
        Inventory { generation, complete, upserts: upserts.to_vec(), removes }
    }

    fn ack(generation: u64) -> InventoryAck {
        InventoryAck { generation, refused: Vec::new() }
    }

    #[test]
    fn what_is_not_acknowledged_is_said_again_as_a_whole() {
        let mut outbox = Outbox::default();
        outbox.take_in(inventory(1, true, &[workload("a", "1"), workload("b", "1")], &[])).unwrap();
        assert_eq!(outbox.next().unwrap().generation, 1);
        assert_eq!(outbox.acknowledged(&ack(1)), [ack(1)]);
        outbox.take_in(inventory(2, false, &[workload("c", "1")], &["a"])).unwrap();
        outbox.take_in(inventory(3, false, &[workload("b", "2")], &[])).unwrap();
        assert_eq!(outbox.next().unwrap().generation, 2);
        assert!(!outbox.unanswered.is_empty());
        outbox.begin_anew();
        let all = outbox.next().unwrap();
        assert_eq!(all, inventory(3, true, &[workload("b", "2"), workload("c", "1")], &[]));
        assert!(outbox.next().is_none());
        // Both were waited for, and both are stored by that.
        assert_eq!(outbox.acknowledged(&ack(3)), [ack(2), ack(3)]);
        assert!(outbox.unanswered.is_empty());
        outbox.begin_anew();
        assert!(outbox.next().unwrap().complete, "the controller may have removed everything meanwhile");
        assert_eq!(outbox.acknowledged(&ack(3)), [], "but nobody waits for that");
    }

    #[test]
    fn without_a_whole_the_parts_are_said_again() {
        let mut outbox = Outbox::default();
        outbox.take_in(inventory(1, false, &[workload("a", "1")], &[])).unwrap();
        outbox.take_in(inventory(2, false, &[], &["a"])).unwrap();
        outbox.next().unwrap();
        outbox.begin_anew();
        let again: Vec<_> = std::iter::from_fn(|| outbox.next()).map(|one| one.generation).collect();
        assert_eq!(again, [1, 2]);
    }

    #[test]
    fn it_is_bounded_and_loses_nothing() {
        let mut outbox = Outbox::default();
        outbox.take_in(inventory(1, true, &[], &[])).unwrap();
        for generation in 2..5000 {
            let name = format!("w{}", generation % 7);
            outbox
                .take_in(inventory(generation, false, &[workload(&name, &generation.to_string())], &[]))
                .unwrap();
            assert!(outbox.waiting.len() <= WAITING_MAX && outbox.unanswered.len() <= UNANSWERED_MAX);
        }
        let mut heard = BTreeMap::new();
        while let Some(said) = outbox.next() {
            if said.complete {
                heard.clear();
            }
            heard.extend(said.upserts.iter().map(|workload| (name_in(workload), workload.clone())));
            outbox.acknowledged(&ack(said.generation));
        }
        assert_eq!(heard, outbox.known);
        let mut outbox = Outbox::default();
        let all = (1..).map(|generation| outbox.take_in(inventory(generation, false, &[], &[])));
        assert_eq!(all.take(100).find(Result::is_err), Some(Err(TooMuch)), "parts alone cannot become one");
    }
}
