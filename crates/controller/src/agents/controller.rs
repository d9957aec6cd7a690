//! The controller as whom agents and relays speak with.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::sync::{Arc, RwLockReadGuard, RwLockWriteGuard};
use std::time::Duration;

use bulkhead_identity::{Holder, Identity, proves, tls};
use bulkhead_model::entity::{ADDRESSES_MAX, HostSpec};
use bulkhead_model::resource::{Host, Metadata, Resource, is_name};
use bulkhead_model::{Facts, Labels};
use bulkhead_store::StoreError;
use bulkhead_wire::address_from_wire;
use bulkhead_wire::proto::{
    AgentStatus, EnrollRequest, Enrollment, FlowBatch, FlowReceipt, Hello, Relayed, RenewRequest,
};
use tonic::Status;
use tracing::Instrument;

use super::desk::{Begin, Caller, Desk, FlowStreams, Part, Publication, Published, Sessions, Speaker};
use super::inventory;
use crate::access::{self, EnrollmentError, HostPatterns, Revocation, Revoked};
use crate::clock;
use crate::context::{Context, stopped};
use crate::guard::Ends;
use crate::members::SessionId;
use crate::repository::View;

#[async_trait::async_trait]
impl Desk for Context {
    type Source = View;
    const SERVES_RELAYS: bool = true;

    fn source(&self) -> RwLockReadGuard<'_, View> {
        self.repository.view()
    }

    fn source_mut(&self) -> RwLockWriteGuard<'_, View> {
        self.repository.view_mut()
    }

    fn sessions(&self) -> &Sessions {
        &self.sessions
    }

    fn epoch(&self) -> String {
        self.repository.store().epoch().to_owned()
    }

    fn name(&self) -> String {
        self.config.name.clone()
    }

    fn lease(&self) -> Duration {
        self.config.lease()
    }

    fn heartbeat_ms(&self) -> u32 {
        self.config.heartbeat_ms()
    }

    fn revoked(&self, holder: &Holder) -> bool {
        self.grants.is_revoked(holder)
    }

    fn revocations(&self, hosts: &HostPatterns, told: &mut HashSet<(Revoked, u64)>) -> Vec<Revocation> {
        let concerns = |one: &Revocation| match &one.of {
            // Whose it is, is not known.
            Revoked::Serial(_) => true,
            Revoked::Holder(holder) => holder.strip_prefix("agent/").is_some_and(|host| hosts.covers(host)),
        };
        let mut all = self.grants.revocations();
        all.retain(|one| concerns(one) && told.insert((one.of.clone(), one.since_ms)));
        all
    }

    fn speaker(&self, caller: &Caller, hello: &Hello) -> Result<Speaker, Status> {
        let holder = &caller.holder;
        match (&holder.identity, &hello.relayed) {
            (Identity::Relay(name), None) if hello.host.is_empty() => {
                let (relay, since) = self.grants.relay(name).ok_or_else(|| unknown_relay(name))?;
                let part = Part::Relay { hosts: relay.hosts, changed: since.0 > hello.revision };
                let key = holder.identity.to_string().into();
                Ok(Speaker { part, key, holder: Arc::clone(holder), via: None, ends: None })
            }
            (Identity::Relay(_), relayed) => {
                let behind = behind(self, caller, &hello.host, relayed.as_ref())?;
                let ends = relayed.as_ref().and_then(ends_of);
                let key = hello.host.as_str().into();
                let via = Some(Arc::clone(holder));
                Ok(Speaker { part: Part::Lane, key, holder: behind, via, ends })
            }
            (_, Some(_)) => {
                Err(self.refused(format!("{} is no relay: it speaks for itself", holder.identity)))
            }
            (_, None) if !is_name(&hello.host) => {
                Err(Status::invalid_argument(format!("{:?} cannot be the name of a host", hello.host)))
            }
            (_, None) if holder.identity.name() != hello.host => Err(self
                .refused(format!("the certificate is of {}, not of host {:?}", holder.identity, hello.host))),
            (_, None) => Ok(Speaker {
                part: Part::Agent,
                key: hello.host.as_str().into(),
                holder: Arc::clone(holder),
                via: None,
                ends: Some(caller.ends),
            }),
        }
    }

    async fn begin(&self, begin: Begin<'_>) -> Result<Option<Publication>, Status> {
        let Begin { id, speaker, hello, began, .. } = begin;
        if matches!(speaker.part, Part::Relay { .. }) {
            return Ok(None);
        }
        self.cluster.begin(&speaker.key, id, clock::now_ms(), speaker.ends, began);
        Ok(Some(Publication::Host(Box::new(host_of(hello)))))
    }

    fn end(&self, speaker: &Speaker, id: SessionId) {
        self.cluster.end(&speaker.key, id);
    }

    async fn publish(
        &self,
        host: &Arc<str>,
        _id: SessionId,
        publication: Publication,
    ) -> Result<Published, Status> {
        let stored = match &publication {
            Publication::Host(own) => {
                let own = Resource::Host(Host::clone(own));
                self.repository.publish(vec![own], Vec::new()).await.map(|_applied| Published::Silently)
            }
            Publication::Inventory(inventory) => {
                let span = tracing::debug_span!("publish", %host, workloads = inventory.upserts.len());
                inventory::take_in(self, host, inventory).instrument(span).await.map(Published::Acknowledged)
            }
        };
        match stored {
            Err(StoreError::Full { .. }) => Ok(Published::NoRoom(publication)),
            stored => stored.map_err(unavailable),
        }
    }

    async fn status(&self, host: &Arc<str>, id: SessionId, status: AgentStatus) {
        self.sessions.registry.status(host, id, status);
    }

    async fn enroll(&self, caller: Option<Caller>, request: EnrollRequest) -> Result<Enrollment, Status> {
        // Of what a relay passes on, only what concerns its own site. It has no hosts to ask for before it has joined.
        if let Some(Identity::Relay(name)) = caller.as_ref().map(|caller| &caller.holder.identity)
            && (request.relay || !self.may_speak(name, &request.host))
        {
            return Err(self.refused(format!("relay {name:?} may not speak for host {:?}", request.host)));
        }
        access::enroll(self, &request).await.map_err(|error| not_enrolled(self, &error))
    }

    async fn renew(&self, caller: Caller, request: RenewRequest) -> Result<Enrollment, Status> {
        let holder = if request.host.is_empty() {
            caller.holder
        } else {
            let behind = behind(self, &caller, &request.host, request.relayed.as_ref())?;
            // Else a relay could have certificates of its hosts for keys of its own, and keep them when it is revoked.
            let shown = request.relayed.iter().flat_map(|relayed| &relayed.certificates).next();
            let said = request.signing_request.as_bytes();
            if !shown.is_some_and(|shown| proves(shown, said, &request.proof)) {
                return Err(self
                    .refused(format!("the agent of {:?} does not say that it asks for this", request.host)));
            }
            behind
        };
        let renewed = access::renew(self, &holder, &request.signing_request).await;
        renewed.map_err(|error| not_enrolled(self, &error))
    }

    async fn flows(&self, caller: Caller, (mut batches, receipts): FlowStreams) {
        let mut shutdown = self.shutdown.clone();
        let mut shown = None;
        loop {
            let batch = tokio::select! {
                batch = batches.message() => batch,
                () = stopped(&mut shutdown) => {
                    // The agent may be gone already.
                    let _ = receipts.try_send(Err(Status::unavailable("the controller stops")));
                    return;
                }
            };
            let Ok(Some(FlowBatch { sequence, records, lost, host, relayed })) = batch else { return };
            // What was right at the stream's beginning may have been revoked.
            let allowed = match caller.holder.identity {
                Identity::Relay(_) => self.reports_for(&caller, &host, relayed.as_ref(), &mut shown),
                _ if self.revoked(&caller.holder) => {
                    Err(Status::unauthenticated("the certificate is revoked"))
                }
                _ if !host.is_empty() || relayed.is_some() => {
                    Err(self.refused(format!("{} is no relay: it speaks for itself", caller.holder.identity)))
                }
                _ => Ok(()),
            };
            if let Err(status) = allowed {
                // The agent may be gone already.
                let _ = receipts.try_send(Err(status));
                return;
            }
            self.flows.receive(&records, lost);
            if receipts.send(Ok(FlowReceipt { sequence })).await.is_err() {
                return;
            }
        }
    }
}

impl Context {
    fn refused(&self, why: String) -> Status {
        self.metrics.agents_refused.add(1);
        Status::permission_denied(why)
    }

    /// Whether a relay may report for a host whose certificate it shows, or has shown on this stream.
    fn reports_for(
        &self,
        caller: &Caller,
        host: &str,
        relayed: Option<&Relayed>,
        shown: &mut Option<Arc<Holder>>,
    ) -> Result<(), Status> {
        if relayed.is_some() {
            *shown = Some(behind(self, caller, host, relayed)?);
            return Ok(());
        }
        match shown {
            Some(holder) if holder.identity.name() == host => still_behind(self, caller, host, holder),
            _ => behind(self, caller, host, None).map(drop),
        }
    }

    fn may_speak(&self, relay: &str, host: &str) -> bool {
        self.grants.relay(relay).is_some_and(|(relay, _)| relay.hosts.covers(host))
    }
}

fn unknown_relay(name: &str) -> Status {
    Status::permission_denied(format!(
        "no relay {name:?} is known: an administrator makes it a token with bulkhead token create --relay"
    ))
}

/// The agent for which a relay speaks. What the relay says that it was shown is checked as if it had been shown here, but that
/// the agent has the key of it is the relay's word.
fn behind(
    context: &Context,
    caller: &Caller,
    host: &str,
    relayed: Option<&Relayed>,
) -> Result<Arc<Holder>, Status> {
    // Before anything is computed for somebody who may not ask.
    check_listed(context, caller, host)?;
    let shown = relayed.map(|relayed| relayed.certificates.as_slice()).unwrap_or_default();
    let holder = tls::verify(&context.trust.authorities, shown, clock::system())
        .map_err(|error| context.refused(format!("the certificate of host {host:?}: {error}")))?;
    if holder.identity != Identity::Agent(host.to_owned()) {
        return Err(
            context.refused(format!("the certificate is of {}, not of host {host:?}", holder.identity))
        );
    }
    check_valid(context, caller, &holder)?;
    Ok(Arc::new(holder))
}

/// Whether a relay may still speak for a host whose certificate has been verified.
fn still_behind(context: &Context, caller: &Caller, host: &str, holder: &Holder) -> Result<(), Status> {
    check_listed(context, caller, host)?;
    check_valid(context, caller, holder)
}

/// Whether the caller is a relay that may speak for a host.
fn check_listed(context: &Context, caller: &Caller, host: &str) -> Result<(), Status> {
    let Identity::Relay(name) = &caller.holder.identity else {
        return Err(context.refused(format!("{} is no relay: it speaks for itself", caller.holder.identity)));
    };
    if !is_name(host) || !context.may_speak(name, host) {
        return Err(context.refused(format!("relay {name:?} may not speak for host {host:?}")));
    }
    Ok(())
}

/// Whether neither a relay's certificate nor that of the host behind it is good for nothing any more.
fn check_valid(context: &Context, caller: &Caller, holder: &Holder) -> Result<(), Status> {
    if context.revoked(&caller.holder) {
        return Err(Status::unauthenticated("the relay's certificate is revoked"));
    }
    if context.revoked(holder) || holder.not_after <= clock::system() {
        return Err(Status::unauthenticated("the certificate is revoked, or has ended"));
    }
    Ok(())
}

fn ends_of(relayed: &Relayed) -> Option<Ends> {
    let end = |text: &str| text.parse::<SocketAddr>().ok();
    Some(Ends { remote: end(&relayed.remote)?, local: end(&relayed.local)? })
}

fn not_enrolled(context: &Context, error: &EnrollmentError) -> Status {
    context.metrics.agents_refused.add(1);
    if let Some(more) = context.sessions.enrolling.log.now() {
        tracing::warn!(%error, more, "no certificate was given");
    }
    let message = error.to_string();
    match error {
        EnrollmentError::NotGranted(_) => Status::permission_denied(message),
        EnrollmentError::NotOurs => Status::failed_precondition(message),
        EnrollmentError::Host(_) | EnrollmentError::Name(_) | EnrollmentError::Authority(_) => {
            Status::invalid_argument(message)
        }
        EnrollmentError::Store(_) => Status::unavailable(message),
    }
}

/// A host as its agent describes it.
fn host_of(hello: &Hello) -> Host {
    let host = &hello.host;
    let labels = hello.labels.iter().map(|(key, value)| (key.as_str(), value.as_str()));
    let (labels, refused) = Labels::from_foreign(labels);
    if refused > 0 {
        tracing::warn!(%host, refused, "labels of a host cannot be used");
    }
    let facts = hello.facts.iter().map(|(key, value)| (key.as_str(), value.as_str()));
    let (facts, refused) = Facts::from_observed(facts);
    if let Some(first) = refused.first() {
        tracing::warn!(%host, refused = refused.len(), %first, "facts of a host cannot be used");
    }
    let metadata = Metadata { name: host.clone(), labels, ..Metadata::default() };
    let agent_version = (!hello.version.is_empty()).then(|| hello.version.clone());
    let addresses = hello.addresses.iter().take(ADDRESSES_MAX);
    let addresses = addresses.filter_map(|bytes| address_from_wire(bytes)).collect();
    let spec = HostSpec { agent_version, facts, addresses };
    Host { metadata, spec }
}

fn unavailable(error: impl std::fmt::Display) -> Status {
    Status::unavailable(format!("the repository does not write: {error}"))
}
