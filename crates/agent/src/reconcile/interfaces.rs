//! Which interfaces this host's agent is in charge of, and when it closes or opens one.

use std::collections::BTreeSet;
use std::time::Instant;

use bulkhead_dataplane::DataplaneError;
use bulkhead_discover::links::{self, LinkChange};
use bulkhead_model::host_policy::{Attachment, HostDelta};

use super::{Agent, RETRY_INTERVAL};
use crate::AgentError;

impl Agent {
    /// What is there before the first turn.
    pub(super) fn take_stock(&mut self) -> Result<(), AgentError> {
        self.attached = self.dataplane.attached()?;
        let here = links::links().map_err(AgentError::Links)?;
        let first_start = self.progress.epoch.is_empty() && self.attached.is_empty();
        // What an earlier process remembered may have gone, or its index may be another's by now.
        for found in self.found.values_mut() {
            for workload in &mut found.workloads {
                workload.interfaces.retain(|(index, name)| {
                    here.iter().any(|link| link.index == *index && link.name == *name)
                });
            }
            found.workloads.retain(|workload| !workload.interfaces.is_empty() || workload.group.is_some());
        }
        for link in here {
            self.older_interfaces.insert(link.index);
            // While no agent ran, a workload's interface may have appeared: it is closed now. At the very first
            // start nothing is touched before its policy is known.
            if !first_start && self.config.is_workload_interface(&link.name) {
                self.attach(Attachment::Interface(link.index));
            } else if self.config.is_workload_interface(&link.name) {
                self.spared.insert(link.index);
            }
        }
        self.guard()
    }

    /// Says which interfaces are workloads' whoever claims them: that one appears is heard late.
    fn guard(&mut self) -> Result<(), AgentError> {
        Ok(self.dataplane.guard(&self.config.workload_interfaces, &self.spared)?)
    }

    pub(super) fn link_changed(&mut self, change: LinkChange) {
        match change {
            LinkChange::There(link) => {
                let here = Attachment::Interface(link.index);
                let new = !self.older_interfaces.contains(&link.index) && !self.attached.contains(&here);
                if new && self.config.is_workload_interface(&link.name) {
                    tracing::info!(
                        interface = link.name,
                        "a workload's interface appeared: closed until claimed"
                    );
                    self.attach(here);
                }
            }
            LinkChange::Gone(link) => {
                self.older_interfaces.remove(&link.index);
                // Another one may get its number.
                if self.spared.remove(&link.index)
                    && let Err(error) = self.guard()
                {
                    tracing::warn!(interface = link.name, %error, "cannot forget an interface");
                }
                let there = Attachment::Interface(link.index);
                if self.attached.remove(&there)
                    && let Err(error) = self.dataplane.detach(there)
                {
                    tracing::warn!(interface = link.name, %error, "cannot clean up after an interface");
                }
            }
            LinkChange::Lost => match links::links() {
                Ok(here) => {
                    let there: BTreeSet<_> =
                        here.iter().map(|link| Attachment::Interface(link.index)).collect();
                    let interfaces = |one: &&Attachment| matches!(one, Attachment::Interface(_));
                    let gone: Vec<_> = self.attached.difference(&there).filter(interfaces).copied().collect();
                    for gone in gone {
                        self.attached.remove(&gone);
                        let _ = self.dataplane.detach(gone);
                    }
                    here.into_iter().for_each(|link| self.link_changed(LinkChange::There(link)));
                }
                Err(error) => tracing::error!(%error, "cannot list interfaces"),
            },
        }
    }

    pub(super) fn attach(&mut self, attachment: Attachment) {
        if self.attached.contains(&attachment) {
            return;
        }
        match self.dataplane.attach(attachment) {
            Ok(()) => {
                self.attached.insert(attachment);
            }
            // It went again before it could be closed.
            Err(DataplaneError::Gone { .. }) => {}
            Err(error) => {
                tracing::error!(%attachment, %error, "cannot take charge");
                self.failed = Some((error.to_string(), Instant::now() + RETRY_INTERVAL));
            }
        }
    }

    /// Takes charge of endpoints' interfaces that are new, or that it could not take charge of before. After their
    /// tables are in force, so that an interface that was open until now is never closed in between.
    pub(super) fn attach_missing(&mut self) {
        if !self.programmed {
            return;
        }
        let bindings = self.engine.policy().endpoints.values();
        let missing: Vec<_> = bindings
            .map(|binding| binding.attachment)
            .filter(|one| !one.is_of_host() && !self.attached.contains(one))
            .collect();
        if !missing.is_empty() {
            self.failed = None;
            missing.into_iter().for_each(|attachment| self.attach(attachment));
        }
    }

    /// Interfaces that a delta leaves without endpoint.
    pub(super) fn released_interfaces(&self, delta: &HostDelta) -> Vec<Attachment> {
        let still: BTreeSet<_> = self.locals.endpoints.values().map(|local| local.attachment).collect();
        self.attached
            .iter()
            .filter(|_| delta.endpoints.values().any(Option::is_none))
            .filter(|one| !still.contains(*one))
            .copied()
            .collect()
    }

    /// Lets go of an interface that was registered by hand; one that belongs to workloads by its name stays
    /// closed until it disappears.
    pub(super) fn release(&mut self, attachment: Attachment) {
        if let Attachment::Interface(ifindex) = attachment {
            let links = links::links().unwrap_or_default();
            let link = links.into_iter().find(|link| link.index == ifindex);
            if link.is_some_and(|link| self.config.is_workload_interface(&link.name)) {
                return;
            }
        }
        match self.dataplane.detach(attachment) {
            Ok(()) => {
                self.attached.remove(&attachment);
            }
            Err(error) => tracing::warn!(%attachment, %error, "cannot let go"),
        }
    }
}
