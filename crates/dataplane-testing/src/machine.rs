//! From objects to what a dataplane is told, on the product's own way: assembly, engine, differences.

use std::collections::BTreeMap;
use std::sync::Arc;

use bulkhead_engine::{Assembly, Fleet};
use bulkhead_model::host_policy::{Attachment, EndpointBinding, HostDelta, HostPolicy};
use bulkhead_model::time::Timestamp;
use bulkhead_model::{ObjectKey, Resource};

/// An agent's half of one host, without the agent: objects in, differences out.
#[derive(Debug)]
pub struct Machine {
    assembly: Assembly,
    fleet: Fleet,
    /// The interfaces behind which endpoints are met. The fleet counts interfaces of its own.
    interfaces: BTreeMap<Arc<str>, u32>,
}

impl Machine {
    /// A machine whose fleet knows nothing yet.
    pub fn new(fleet: Fleet) -> Self {
        Self { assembly: Assembly::default(), fleet, interfaces: BTreeMap::new() }
    }

    /// What is known, and what the tables say of it.
    pub fn fleet(&self) -> &Fleet {
        &self.fleet
    }

    /// The objects.
    pub fn objects(&self) -> &BTreeMap<ObjectKey, Resource> {
        self.assembly.objects()
    }

    /// An endpoint of this name is met behind this interface. Say so before it is known.
    pub fn place(&mut self, endpoint: &str, interface: u32) {
        self.interfaces.insert(endpoint.into(), interface);
    }

    /// Sets what time it is.
    pub fn set_now(&mut self, now: Timestamp) {
        self.fleet.set_now(now);
    }

    /// Adds, replaces or removes an object.
    pub fn change(&mut self, key: &ObjectKey, resource: Option<Resource>) {
        let changes = self.assembly.set(key, resource);
        self.fleet.change(&changes);
    }

    /// Makes these objects the whole state, by the difference.
    pub fn set(&mut self, wanted: BTreeMap<ObjectKey, Resource>) {
        let gone: Vec<_> = self.objects().keys().filter(|key| !wanted.contains_key(*key)).cloned().collect();
        for key in gone {
            self.change(&key, None);
        }
        for (key, resource) in wanted {
            if self.objects().get(&key) != Some(&resource) {
                self.change(&key, Some(resource));
            }
        }
    }

    /// Brings the tables up to date; answers what a dataplane must apply, in order.
    pub fn settle(&mut self) -> Vec<HostDelta> {
        let mut deltas = Vec::new();
        self.fleet.settle_by(&mut |delta| deltas.push(delta.clone()));
        for delta in &mut deltas {
            for (name, binding) in &mut delta.endpoints {
                if let Some(binding) = binding {
                    self.bind(name, binding);
                }
            }
        }
        deltas.retain(|delta| !delta.is_empty());
        deltas
    }

    /// The whole tables.
    pub fn policy(&self) -> HostPolicy {
        let mut policy = self.fleet.tables().clone();
        for (name, binding) in &mut policy.endpoints {
            self.bind(name, binding);
        }
        policy
    }

    fn bind(&self, name: &Arc<str>, binding: &mut EndpointBinding) {
        let interface = self.interfaces.get(name);
        let interface = interface.unwrap_or_else(|| panic!("nobody has said where {name} is"));
        binding.attachment = Attachment::Interface(*interface);
    }
}
