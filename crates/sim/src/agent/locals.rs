//! What runs on a simulated host, and what becomes of it.

use std::sync::Arc;

use bulkhead_engine::LocalEndpoint;
use bulkhead_model::Entity;
use bulkhead_model::host_policy::Attachment;
use bulkhead_wire::proto::Inventory;
use bulkhead_wire::proto::agent_message::Body as Out;

use super::{Agent, text};
use crate::catalogue::Shared;
use crate::fleet::{Instance, Slice};
use crate::tracker::{Becomes, Readers};

/// A change of what runs on the host.
#[derive(Debug, Clone)]
pub(crate) enum Change {
    /// All workloads of a slice start, those that run anew.
    Start(Slice),
    /// They stop.
    Stop(Slice),
    /// One of them takes part, or does no more.
    Ready(Slice, bool),
}

impl Agent {
    pub(super) fn start(&mut self, workload: u32) {
        let generation = self.generations.entry(workload).or_default();
        *generation += 1;
        let ready = self.running.get(&workload).is_none_or(|instance| instance.ready);
        let instance = Instance { generation: *generation, ready };
        self.running.insert(workload, instance);
        self.set_local(workload);
    }

    fn set_local(&mut self, workload: u32) {
        let Some(instance) = self.running.get(&workload) else { return };
        let Some(entity) = Entity::of(&self.world.fleet.workload(workload, *instance)) else { return };
        // Known policies that nothing here was concerned by until now.
        let new: Vec<Arc<Shared>> = self
            .known
            .for_labels(&entity.labels)
            .filter(|object| !self.assembly.objects().contains_key(&object.key))
            .cloned()
            .collect();
        new.iter().for_each(|object| self.set_resource(&object.key, Some(object.resource.clone())));
        let attachment = Attachment::Interface(workload + 2);
        let name = Arc::clone(&entity.name);
        self.engine.set_local(&name, Some(LocalEndpoint { entity, attachment }));
    }

    /// Something happens on the host, and is published if there is a controller.
    pub(crate) fn change(&mut self, change: &Change, measured: bool) -> Vec<Out> {
        let (mut upserts, mut removes, mut starts) = (Vec::new(), Vec::new(), 0);
        let slice = match change {
            Change::Start(slice) | Change::Stop(slice) | Change::Ready(slice, _) => *slice,
        };
        // By its first workload a slice's change is recognised, by its last one a change of labels.
        let (first, last) = (slice.workloads().start, slice.workloads().end - 1);
        let (workload, becomes, readers) = match change {
            Change::Start(_) => {
                for workload in slice.workloads() {
                    self.start(workload);
                    starts += 1;
                }
                (first, Becomes::Member(self.generations[&first]), Readers::All)
            }
            Change::Stop(_) => {
                if !self.running.contains_key(&first) {
                    return Vec::new();
                }
                for workload in slice.workloads() {
                    self.running.remove(&workload);
                    let name: Arc<str> = format!("Workload/{}", self.world.fleet.name(workload)).into();
                    self.engine.set_local(&name, None);
                    removes.push(self.world.fleet.name(workload));
                }
                self.world.tracker.overtake(slice.application(), last);
                (first, Becomes::Stranger, Readers::All)
            }
            Change::Ready(_, ready) => {
                match self.running.get_mut(&last) {
                    Some(instance) if instance.ready != *ready => instance.ready = *ready,
                    _ => return Vec::new(),
                }
                self.set_local(last);
                let generation = self.generations[&last];
                (
                    last,
                    if *ready { Becomes::Member(generation) } else { Becomes::Stranger },
                    Readers::OfReadiness,
                )
            }
        };
        if removes.is_empty() {
            let changed = if starts > 0 { slice.workloads() } else { last..last + 1 };
            let changed = changed.filter_map(|workload| Some((workload, *self.running.get(&workload)?)));
            upserts
                .extend(changed.map(|(number, instance)| text(&self.world.fleet.workload(number, instance))));
        }
        let mut out = self.compute();
        let Some(link) = self.link.as_mut().filter(|link| link.epoch.is_some()) else {
            // It will be told with everything else. Whoever has not heard of what was before may never do.
            [first, last].into_iter().for_each(|one| self.world.tracker.overtake(slice.application(), one));
            return out;
        };
        link.generation += 1;
        let generation = link.generation;
        let at = (slice.application(), workload);
        let event = self.world.tracker.publish(self.number, at, becomes, readers, measured);
        link.published.push_back((generation, vec![event], starts));
        out.push(Out::Inventory(Inventory { generation, complete: false, upserts, removes }));
        out.extend(self.status());
        out
    }
}
