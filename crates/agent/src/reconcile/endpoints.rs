//! The endpoints of this host: what the sources found, and what the repository says of the host itself.

use std::sync::Arc;

use bulkhead_model::Resource;

use super::Agent;
use super::controller::owner_of;
use crate::hosts::{self, Here};
use crate::locals::assemble;

impl Agent {
    /// Tells the engine which endpoints there are now: workloads that were found, and this host's own.
    pub(super) fn assemble_locals(&mut self) {
        let mut locals = assemble(&self.config.host, &self.facts, &self.found, self.assembly.heritage());
        let endpoints = self.host_endpoints.values().map(|(key, entity)| {
            let object = self.assembly.objects().get(key);
            (entity, object.and_then(Resource::host_interface))
        });
        let (endpoints, not_managed) = hosts::resolve(endpoints, &self.here);
        let named = endpoints.into_iter().map(|endpoint| (Arc::clone(&endpoint.entity.name), endpoint));
        locals.endpoints.extend(named);
        locals.not_managed.extend(not_managed);
        if locals == self.locals {
            return;
        }
        for name in self.locals.endpoints.keys().filter(|name| !locals.endpoints.contains_key(*name)) {
            self.engine.set_local(name, None);
        }
        for (name, endpoint) in &locals.endpoints {
            self.engine.set_local(name, Some(endpoint.clone()));
        }
        for endpoint in self.locals.endpoints.values() {
            self.book.remove(&owner_of(&endpoint.entity), &endpoint.entity.prefixes);
        }
        for endpoint in locals.endpoints.values() {
            self.book.add(&owner_of(&endpoint.entity), &endpoint.entity.prefixes);
        }
        self.locals = locals;
    }

    /// Which interfaces and addresses this host has, if anything depends on it.
    pub(super) fn look_around(&mut self) {
        if self.host_endpoints.is_empty() {
            return;
        }
        match Here::read() {
            Ok(here) if here == self.here => {}
            Ok(here) => {
                self.here = here;
                self.dirty = true;
            }
            Err(error) => {
                tracing::warn!(%error, "this host's interfaces cannot be read: host endpoints stay as they are")
            }
        }
    }
}
