//! What a host forwards through the interface of one of its endpoints: an endpoint beside that one, without addresses.

use bulkhead_model::host_policy::Attachment;
use bulkhead_model::{Entity, ObjectKey};

use super::{HostEngine, LocalEndpoint};

impl LocalEndpoint {
    /// The endpoint that stands for what is forwarded through this interface (0: any without one of its own): as the
    /// host endpoint, but that nothing has its addresses. It is bound only while policies are for it.
    pub fn forwarding(host_endpoint: &Entity, interface: u32) -> Self {
        let name = format!("{}#forwarded", host_endpoint.name).into();
        let entity = Entity { name, prefixes: Vec::new(), ..host_endpoint.clone() };
        Self { entity, attachment: Attachment::Forwarded(interface) }
    }

    pub(super) fn is_forwarding(&self) -> bool {
        matches!(self.attachment, Attachment::Forwarded(_))
    }
}

impl HostEngine {
    pub(super) fn is_for_forwarded(&self, key: &ObjectKey) -> bool {
        let stored = self.policies.get(key);
        stored.is_some_and(|stored| stored.spec.apply_on_forward && stored.spec.is_valid_at(self.now))
    }
}
