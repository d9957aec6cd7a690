//! The loop: everything that is known goes into the engine, everything that comes out goes into the kernel.
//!
//! Order within one turn: take in what is waiting, compute once, apply once, then tell (disk, controller).

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bulkhead_dataplane::{Dataplane, DataplaneError};
use bulkhead_discover::{Found, NotManaged};
use bulkhead_engine::{Assembly, HostEngine, NotReady};
use bulkhead_model::host_policy::{Attachment, HostDelta};
use bulkhead_model::policy::SOURCE_PORT_PARTS_MAX;
use bulkhead_model::settings::SettingsSpec;
use bulkhead_model::time::Timestamp;
use bulkhead_model::{Entity, Facts, ObjectKey, Resource, Selector};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{mpsc, watch};

use crate::address_book::AddressBook;
use crate::disk::{Changes, Disk, KnownMembers, Remembered};
use crate::flows::{self, Clock, Context, Flows, monotonic_ns};
use crate::hosts::Here;
use crate::inputs::{Input, sources};
use crate::locals::Locals;
use crate::session::{Conversation, Progress};
use crate::{AgentError, Config, clock};

mod controller;
mod cost;
mod endpoints;
mod inspect;
mod interfaces;
mod report;

use controller::Link;
pub(crate) use inspect::Lookup;

/// Inputs taken in before the tables are computed again.
const INPUTS_PER_TURN: usize = 256;
/// At the very first start a policy may wait this long for its members before the others are put into force.
const FIRST_MEMBERS_WAIT: Duration = Duration::from_secs(5);
/// A source that has never answered holds the first tables up for this long: what it would have found is not in
/// charge of anything yet, and the other workloads must not wait for it for ever.
const FIRST_ANSWER_WAIT: Duration = Duration::from_secs(10);
/// A failed application is tried again after this time.
const RETRY_INTERVAL: Duration = Duration::from_secs(2);

/// The second that it is now.
fn now() -> Timestamp {
    Timestamp::since_epoch(clock::since_epoch())
}

/// What holds until the repository says otherwise.
fn own_settings(config: &Config) -> SettingsSpec {
    SettingsSpec { default_posture: config.default_posture, ..SettingsSpec::default() }
}

/// The state of one host's enforcement.
pub(crate) struct Agent {
    config: Arc<Config>,
    /// Of this host.
    facts: Facts,
    dataplane: Box<dyn Dataplane>,
    disk: Disk,
    engine: HostEngine,
    /// What each source last said, or said to an earlier process.
    found: BTreeMap<String, Found>,
    /// Sources that have not said anything, not even to an earlier process.
    silent: BTreeSet<String>,
    locals: Locals,
    resources: BTreeSet<ObjectKey>,
    /// The same objects, and what they mean together.
    assembly: Assembly,
    /// This host's own endpoints, by name, with the objects that they come from.
    host_endpoints: BTreeMap<Arc<str>, (ObjectKey, Entity)>,
    here: Here,
    /// Members of selectors, as far as known; complete up to `progress`.
    members: BTreeMap<Selector, KnownMembers>,
    book: AddressBook,
    progress: Progress,
    conversation: Conversation,
    link: Option<Link>,
    disconnected_because: Option<String>,
    /// Resources from the controller that could not be understood.
    refused: BTreeMap<String, String>,
    /// Not yet on disk.
    unsaved: Changes,
    dirty: bool,
    started: Instant,
    ready_since: Option<Instant>,
    /// Whether the kernel holds this engine's tables.
    programmed: bool,
    /// The last application that failed: why, and when to try again.
    failed: Option<(String, Instant)>,
    attached: BTreeSet<Attachment>,
    /// Interfaces that were there before this agent: left alone until somebody claims them.
    older_interfaces: BTreeSet<u32>,
    /// Those among them that are workloads' by their names.
    spared: BTreeSet<u32>,
    flows: Flows,
    entries_written: u64,
}

impl Agent {
    pub(crate) fn new(
        config: Arc<Config>,
        facts: Facts,
        dataplane: Box<dyn Dataplane>,
        disk: Disk,
        remembered: Remembered,
        conversation: Conversation,
        flows: Flows,
    ) -> Self {
        let Remembered { progress, resources, members, rules, found, .. } = remembered;
        let mut engine = HostEngine::new(&config.host);
        engine.set_settings(own_settings(&config));
        engine.adopt_rules(&rules);
        engine.set_revision(progress.revision);
        let silent =
            sources(&config).into_iter().filter(|source| !found.contains_key(*source)).map(Into::into);
        let mut agent = Self {
            silent: silent.collect(),
            engine,
            dataplane,
            disk,
            found,
            locals: Locals::default(),
            resources: BTreeSet::new(),
            assembly: Assembly::default(),
            host_endpoints: BTreeMap::new(),
            here: Here::default(),
            members: BTreeMap::new(),
            book: AddressBook::default(),
            progress,
            conversation,
            link: None,
            disconnected_because: None,
            refused: BTreeMap::new(),
            unsaved: Changes::default(),
            dirty: true,
            started: Instant::now(),
            ready_since: None,
            programmed: false,
            failed: None,
            attached: BTreeSet::new(),
            older_interfaces: BTreeSet::new(),
            spared: BTreeSet::new(),
            flows,
            entries_written: 0,
            config,
            facts,
        };
        for resource in resources {
            agent.set_resource(&resource.key(), Some(resource));
        }
        for (selector, known) in members {
            agent.remember(&selector, known);
        }
        agent
    }

    /// Runs until `shutdown` or until another agent takes over.
    pub(crate) async fn run(
        &mut self,
        mut inputs: mpsc::Receiver<Input>,
        shutdown: &mut watch::Receiver<bool>,
        beat: &(impl Fn() + Send),
    ) -> Result<(), AgentError> {
        self.engine.set_now(now());
        self.take_stock()?;
        let events = match self.dataplane.event_fd() {
            Some(fd) => Some(register(fd).map_err(AgentError::Links)?),
            None => None,
        };
        let mut sweep = tokio::time::interval(Duration::from_millis(self.config.sweep_interval_ms.max(10)));
        sweep.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut retry = tokio::time::interval(RETRY_INTERVAL);
        self.reconcile()?;
        beat();
        loop {
            tokio::select! {
                input = inputs.recv() => {
                    let Some(input) = input else { return Ok(()) };
                    self.take_in(input);
                    for _ in 1..INPUTS_PER_TURN {
                        match inputs.try_recv() {
                            Ok(input) => self.take_in(input),
                            Err(_) => break,
                        }
                    }
                    self.reconcile()?;
                }
                () = readable(events.as_ref()) => self.collect_events(),
                _ = sweep.tick() => self.sweep(),
                () = controller::at(self.status_owed_at()) => self.tell_status(),
                _ = retry.tick() => {
                    self.engine.set_now(now());
                    self.dirty |= self.engine.needs_flush();
                    self.dirty |= self.failed.is_some() || !self.programmed;
                    self.look_around();
                    self.save();
                    self.heartbeat();
                    self.reconcile()?;
                    beat();
                }
                changed = shutdown.changed() => {
                    if changed.is_err() || *shutdown.borrow() {
                        return Ok(());
                    }
                }
            }
        }
    }

    /// Says what there is to say, and leaves the kernel as it is.
    pub(crate) async fn stop(&mut self) {
        self.sweep();
        self.conversation.task.abort();
        self.flows.finish().await;
    }

    fn take_in(&mut self, input: Input) {
        match input {
            Input::Found(source, found) => {
                self.silent.remove(source);
                if self.found.get(source) != Some(&found) {
                    self.unsaved.found.insert(source.to_owned(), found.clone());
                }
                self.found.insert(source.to_owned(), found);
                self.dirty = true;
            }
            Input::Links(changes) => {
                changes.into_iter().for_each(|change| self.link_changed(change));
                self.look_around();
            }
            Input::Session(event) => self.session_event(event),
            Input::Request(request, reply) => {
                // Who asked may have gone; that is no concern of the loop.
                let _ = reply.send(self.answer(&request));
            }
        }
    }

    /// Computes and applies, if there is something to do and enough is known.
    fn reconcile(&mut self) -> Result<(), AgentError> {
        if !self.dirty || !self.ready() {
            return Ok(());
        }
        let _span = tracing::debug_span!("reconcile", revision = self.progress.revision).entered();
        self.dirty = false;
        self.assemble_locals();
        loop {
            let delta = self.engine.flush();
            let answered = self.follow_wanted();
            if !delta.is_empty() && self.programmed {
                self.apply(&delta)?;
            }
            self.unsaved.rules.extend(delta.rules);
            if !answered && !self.engine.needs_flush() {
                break;
            }
        }
        if !self.programmed && self.may_program() {
            self.replace()?;
        }
        self.attach_missing();
        self.save();
        self.publish();
        self.tell_status();
        Ok(())
    }

    /// Whether enough is known to compute tables: policies from somewhere, and every source's workloads.
    fn ready(&mut self) -> bool {
        let ready = !self.progress.epoch.is_empty() && self.sources_have_answered();
        if ready && self.ready_since.is_none() {
            self.ready_since = Some(Instant::now());
        }
        ready
    }

    fn sources_have_answered(&self) -> bool {
        self.silent.is_empty() || self.started.elapsed() >= FIRST_ANSWER_WAIT
    }

    /// Whether the first tables may go into the kernel: all members are known, or have been waited for.
    fn may_program(&self) -> bool {
        let waited = self.ready_since.is_some_and(|since| since.elapsed() >= FIRST_MEMBERS_WAIT);
        let waiting = self.engine.not_ready().into_values().flatten();
        waited || !waiting.into_iter().any(|reason| matches!(reason, NotReady::Waiting(_)))
    }

    fn apply(&mut self, delta: &HostDelta) -> Result<(), AgentError> {
        let released = self.released_interfaces(delta);
        match self.dataplane.apply(delta) {
            Ok(applied) => {
                self.entries_written += applied.entries_written;
                self.failed = None;
                tracing::debug!(
                    revision = delta.revision,
                    written = applied.entries_written,
                    deleted = applied.entries_deleted,
                    micros = applied.duration.as_micros(),
                    "applied"
                );
                released.into_iter().for_each(|attachment| self.release(attachment));
                Ok(())
            }
            Err(error @ DataplaneError::Fenced { .. }) => Err(error.into()),
            Err(error) => {
                tracing::error!(%error, "a difference could not be applied: replacing everything");
                self.programmed = false;
                self.replace()
            }
        }
    }

    fn replace(&mut self) -> Result<(), AgentError> {
        if self.failed.as_ref().is_some_and(|(_, again)| Instant::now() < *again) {
            return Ok(());
        }
        match self.dataplane.replace(self.engine.policy()) {
            Ok(applied) => {
                self.entries_written += applied.entries_written;
                self.programmed = true;
                self.failed = None;
                let policy = self.engine.policy();
                tracing::info!(
                    revision = policy.revision,
                    endpoints = policy.endpoints.len(),
                    written = applied.entries_written,
                    micros = applied.duration.as_micros(),
                    "tables in force"
                );
                Ok(())
            }
            Err(error @ DataplaneError::Fenced { .. }) => Err(error.into()),
            Err(error) => {
                let reason = cost::explain(&error, self.engine.policy());
                tracing::error!(reason, "tables could not be put into force; the last good ones stay");
                self.failed = Some((reason, Instant::now() + RETRY_INTERVAL));
                Ok(())
            }
        }
    }

    fn save(&mut self) {
        if self.unsaved.is_empty() {
            return;
        }
        // Kept, and tried again, if it fails. Enforcement does not depend on it.
        if self.disk.write(&self.unsaved) {
            self.unsaved = Changes::default();
        }
    }

    /// Takes in an object that all agents hear of.
    fn set_resource(&mut self, key: &ObjectKey, resource: Option<Resource>) {
        match &resource {
            Some(_) => self.resources.insert(key.clone()),
            None => self.resources.remove(key),
        };
        let changes = self.assembly.set(key, resource);
        for (name, spec) in changes.tiers {
            self.engine.set_tier(&name, spec);
        }
        for (key, spec) in &changes.policies {
            self.engine.set_policy(key, spec.as_ref());
        }
        let mut concerns_host = false;
        for (name, entity) in changes.entities {
            let Some(entity) = entity.filter(Entity::is_host_endpoint) else {
                self.host_endpoints.remove(&name);
                continue;
            };
            // It may have changed because another object did, from which it inherits.
            let of = self.host_endpoints.get(&name).map_or(key, |(of, _)| of).clone();
            self.host_endpoints.insert(name, (of, entity));
            concerns_host = true;
        }
        if concerns_host {
            self.look_around();
        }
        if let Some(settings) = changes.settings {
            self.engine.set_settings(settings.unwrap_or_else(|| own_settings(&self.config)));
        }
        self.dirty = true;
    }

    fn collect_events(&mut self) {
        self.with_flows(|dataplane, sink| dataplane.poll(sink));
    }

    fn sweep(&mut self) {
        let mut pins = 0;
        self.with_flows(|dataplane, sink| {
            pins = dataplane.sweep(monotonic_ns(), sink)?.put_back;
            Ok(())
        });
        if pins > 0 {
            tracing::warn!(pins, "somebody had removed pins: put back");
        }
    }

    fn with_flows(
        &mut self,
        read: impl FnOnce(
            &mut dyn Dataplane,
            &mut dyn FnMut(bulkhead_model::flow::RawFlow),
        ) -> Result<(), DataplaneError>,
    ) {
        let mut raw = Vec::new();
        if let Err(error) = read(self.dataplane.as_mut(), &mut |flow| raw.push(flow)) {
            tracing::error!(%error, "connections could not be read");
        }
        if raw.is_empty() {
            return;
        }
        let by_attachment: BTreeMap<Attachment, _> =
            self.locals.endpoints.values().map(|local| (local.attachment, local)).collect();
        let clock = Clock::now();
        for raw in raw {
            let context = Context {
                host: &self.config.host,
                policy: self.engine.policy(),
                local: by_attachment.get(&raw.key.attachment).copied(),
                book: &self.book,
                clock,
            };
            self.flows.push(flows::record(&context, &raw));
        }
    }

    /// What is not enforced, and why.
    fn not_enforced(&self) -> Vec<NotManaged> {
        let mut list = self.locals.not_managed.clone();
        let mut add = |subject: &str, reason: String| {
            list.push(NotManaged { subject: subject.to_owned(), reason });
        };
        for (name, reasons) in self.engine.not_ready() {
            for reason in reasons {
                let text = match reason {
                    NotReady::Waiting(selector) => format!("waiting for the members of {selector}"),
                    NotReady::UnknownTier { policy, tier } => {
                        format!("policy {policy} is in tier {tier:?}, which does not exist")
                    }
                    NotReady::TooManySourcePorts { direction, parts } => format!(
                        "its {direction} policies cut the source ports into {parts} parts, \
                         {SOURCE_PORT_PARTS_MAX} at most are possible"
                    ),
                };
                add(&name, text);
            }
        }
        for (name, reason) in &self.refused {
            add(name, reason.clone());
        }
        if let Some((reason, _)) = &self.failed {
            add("dataplane", reason.clone());
        }
        self.disk.failing().into_iter().for_each(|reason| add("agent", reason.to_owned()));
        if !self.silent.is_empty() {
            let silent: Vec<_> = self.silent.iter().map(String::as_str).collect();
            add("agent", format!("waiting for the first answer of {}", silent.join(", ")));
        }
        if self.progress.epoch.is_empty() {
            add("agent", "no policy is known yet: the controller has not been reached".into());
        }
        list
    }
}

/// The dataplane's descriptor, watched for events to read.
#[expect(unsafe_code, reason = "tokio has no safe way to watch a descriptor that it did not open itself")]
fn register(fd: BorrowedFd<'_>) -> std::io::Result<AsyncFd<OwnedFd>> {
    let own = fd.try_clone_to_owned()?;
    // SAFETY: the descriptor is a clone that the AsyncFd owns from here on; nobody else can close it, and
    // OwnedFd answers the same number as long as it lives.
    unsafe { AsyncFd::register_with_interest(own, Interest::READABLE) }.map_err(Into::into)
}

async fn readable(events: Option<&AsyncFd<OwnedFd>>) {
    match events {
        Some(fd) => {
            if let Ok(mut guard) = fd.readable().await {
                guard.clear_ready();
            }
        }
        // A dataplane without a descriptor is asked by time.
        None => tokio::time::sleep(Duration::from_millis(100)).await,
    }
}

#[cfg(test)]
mod tests;
