//! What the repository holds, in memory, as of one revision: fed from the store's watch, read by everybody.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Bound;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use bulkhead_engine::{Heritage, SelectorId};
use bulkhead_model::labels::HOST_LABEL;
use bulkhead_model::policy::PREDEFINED_TIERS;
use bulkhead_model::{Entity, Kind, Meaning, ObjectKey, Resource};
use bulkhead_store::{Commit, Revision, Stored};
use bytes::Bytes;

use super::decoded::Decoded;
use super::herald::{Hearers, Reach};
use super::keys;
use super::log::ChangeLog;
use crate::flows::AddressHistory;
use crate::members::{Audience, Difference, Members, SessionId, Subscriber};

/// Changes of tiers and policies from which agents resume.
const RESOURCE_LOG_LEN_MAX: usize = 20_000;
/// Changes of workloads and network sets from which subscriptions resume.
const ENTITY_LOG_LEN_MAX: usize = 100_000;
/// Changes of anything that are looked through for a subscription which nobody had, however few members it has.
const ASKED_AT_LEAST: usize = 8;

/// An object as everybody reads it.
#[derive(Debug)]
pub(crate) struct Object {
    /// With everything that the repository sets.
    pub(crate) resource: Resource,
    /// Revision of its last write; 0 for a predefined tier that nobody has written.
    pub(crate) modified: u64,
    json: OnceLock<Bytes>,
}

impl Object {
    pub(crate) fn new(resource: Resource, modified: u64) -> Self {
        Self { resource, modified, json: OnceLock::new() }
    }

    /// The manifest as JSON, made once for all readers.
    pub(crate) fn json(&self) -> &Bytes {
        self.json.get_or_init(|| self.resource.to_json_text().into())
    }
}

/// Whether all agents hear of it: policies, what orders them, and what their own workloads inherit. Of things with
/// addresses they hear by subscription.
fn is_for_all_agents(kind: Kind) -> bool {
    !matches!(
        kind,
        Kind::NetworkSet
            | Kind::NameTable
            | Kind::HostEndpoint
            | Kind::Host
            | Kind::Workload
            | Kind::Node
            | Kind::Pod
            | Kind::Service
            | Kind::EndpointSlice
            | Kind::CalicoNetworkSet
            | Kind::GlobalNetworkSet
            | Kind::CalicoHostEndpoint
            | Kind::WorkloadEndpoint
            | Kind::RoleBinding
    )
}

/// Whether the agent of the host that it is about hears of it, and no other.
fn is_for_one_host(kind: Kind) -> bool {
    matches!(kind, Kind::HostEndpoint | Kind::CalicoHostEndpoint)
}

/// Whether somebody hears of what is for one host.
fn is_for(resource: &Resource, to: &Audience) -> bool {
    host_of_endpoint(resource).is_some_and(|host| to.hears_for(&host))
}

/// The host that a host endpoint is about.
fn host_of_endpoint(resource: &Resource) -> Option<String> {
    let meaning = resource.meaning();
    let host = meaning.entities.first().and_then(|entity| entity.labels.get(HOST_LABEL));
    host.map(ToOwned::to_owned)
}

/// Whether a change of it changes one entity, the one that is named like it, and nobody else's.
fn is_one_entity(kind: Kind) -> bool {
    matches!(
        kind,
        Kind::NetworkSet | Kind::HostEndpoint | Kind::Host | Kind::Workload | Kind::Node | Kind::Pod
    )
}

/// The state.
#[derive(Debug)]
pub(crate) struct View {
    pub(crate) revision: u64,
    /// Revision of the last change by an operator, wherever it was made; `None` if there was none.
    pub(super) operators_at: Option<Revision>,
    objects: BTreeMap<ObjectKey, Arc<Object>>,
    heritage: Heritage,
    by_host: HashMap<String, BTreeSet<ObjectKey>>,
    resource_log: ChangeLog<ObjectKey>,
    /// Host endpoints, each with the host that it is or was about.
    host_log: ChangeLog<(String, ObjectKey)>,
    entity_log: ChangeLog<Arc<str>>,
    pub(crate) members: Members,
    sessions: HashMap<SessionId, Arc<Subscriber>>,
    pub(crate) addresses: AddressHistory,
    undecodable: u64,
    /// What all agents hear of, packed, as of the revision of its last change.
    packed: Mutex<Option<(u64, Arc<[Bytes]>)>>,
}

impl View {
    /// From a snapshot; `log` are the changes before it that are still known, after `log_begins_after`.
    pub(super) fn new(objects: &[Stored], revision: u64, log: &[Arc<Commit>], log_begins_after: u64) -> Self {
        let mut view = Self {
            revision,
            operators_at: None,
            objects: BTreeMap::new(),
            heritage: Heritage::default(),
            by_host: HashMap::new(),
            resource_log: ChangeLog::new(log_begins_after, RESOURCE_LOG_LEN_MAX),
            host_log: ChangeLog::new(log_begins_after, RESOURCE_LOG_LEN_MAX),
            entity_log: ChangeLog::new(log_begins_after, ENTITY_LOG_LEN_MAX),
            members: Members::default(),
            sessions: HashMap::new(),
            addresses: AddressHistory::default(),
            undecodable: 0,
            packed: Mutex::default(),
        };
        for (name, order, default_action) in PREDEFINED_TIERS {
            let tier = predefined_tier(name, order, default_action);
            view.objects.insert(tier.key(), Arc::new(Object::new(tier, 0)));
        }
        for commit in log {
            let keys = commit.changes.iter().filter_map(|change| keys::object_key(&change.key));
            // Who may do what with the repository is nothing that agents hear of.
            for key in keys.filter(|key| key.kind != Kind::RoleBinding) {
                let revision = commit.revision.0;
                if is_for_one_host(key.kind) {
                    // Which host it was about then is no longer known: who knew it before hears everything.
                    view.host_log = ChangeLog::new(revision, RESOURCE_LOG_LEN_MAX);
                }
                if is_for_all_agents(key.kind) {
                    view.resource_log.push(revision, key.clone());
                } else if is_one_entity(key.kind) {
                    view.entity_log.push(revision, key.to_string().into());
                }
                if !is_for_all_agents(key.kind) && !is_one_entity(key.kind) || leaves_labels(key.kind) {
                    // Which entities that changed is no longer known: who knew them before hears all of them.
                    view.entity_log = ChangeLog::new(revision, ENTITY_LOG_LEN_MAX);
                }
            }
        }
        for stored in objects {
            let Some(key) = keys::object_key(&stored.key) else { continue };
            // Since when its addresses are its own is not known: since ever, then.
            view.put(&key, keys::decode(stored), stored.modified.0, 0);
        }
        view
    }

    /// Nothing yet, as of a revision: who knows what was before it hears everything.
    pub(crate) fn beginning(revision: u64) -> Self {
        Self::new(&[], revision, &[], revision)
    }

    /// Takes in changes up to `revision`, and answers whom to tell of what all agents hear of. Whoever hears of something else
    /// that has changed is woken.
    pub(crate) fn commit(&mut self, changes: Vec<Decoded>, revision: u64, now_ms: u64) -> Hearers {
        let mut concerned: BTreeSet<String> = BTreeSet::new();
        let mut for_all = Reach::default();
        for Decoded { key, object, revision } in changes {
            if is_for_all_agents(key.kind) {
                self.resource_log.push(revision, key.clone());
                let before = self.objects.get(&key).map(|object| object.resource.meaning());
                let after = object.as_ref().and_then(|object| object.as_ref().ok()).map(Resource::meaning);
                [before, after].iter().flatten().for_each(|meaning| for_all.add(meaning));
            }
            let hosts_before = self.note_host(&key, revision);
            match object {
                Some(object) => self.put(&key, object, revision, now_ms),
                None => self.remove(&key, revision, now_ms),
            }
            let hosts = self.note_host(&key, revision).into_iter().chain(hosts_before);
            concerned.extend(hosts);
        }
        self.revision = revision;
        if !concerned.is_empty() {
            let sessions = self.sessions.values();
            sessions
                .filter(|session| concerned.iter().any(|host| session.audience.hears_for(host)))
                .for_each(|one| one.wake.notify_one());
        }
        for_all.hearers(&mut self.members, self.sessions.values())
    }

    /// Notes that a host endpoint changes, for the host that it is about now.
    fn note_host(&mut self, key: &ObjectKey, revision: u64) -> Option<String> {
        let object = self.objects.get(key).filter(|_| is_for_one_host(key.kind))?;
        let host = host_of_endpoint(&object.resource)?;
        self.host_log.push(revision, (host.clone(), key.clone()));
        Some(host)
    }

    fn put(
        &mut self,
        key: &ObjectKey,
        object: Result<Resource, keys::Undecodable>,
        revision: u64,
        now_ms: u64,
    ) {
        let resource = match object {
            Ok(resource) => resource,
            Err(error) => {
                // Written by a newer controller, or damaged: what was known before stays in force.
                tracing::error!(%key, %error, "an object in the store cannot be read");
                self.undecodable += 1;
                return;
            }
        };
        let host_before = self.forget_host(key);
        if let Resource::Workload(workload) = &resource {
            self.by_host.entry(workload.spec.host.clone()).or_default().insert(key.clone());
            self.addresses.assign(&key.qualified_name(), workload, now_ms);
        }
        let before = self.objects.insert(key.clone(), Arc::new(Object::new(resource, revision)));
        self.heed(key, before.as_deref(), host_before.as_deref(), revision);
    }

    fn remove(&mut self, key: &ObjectKey, revision: u64, now_ms: u64) {
        let host_before = self.forget_host(key);
        let before = self.objects.remove(key);
        if key.kind == Kind::Workload {
            self.addresses.release(&key.qualified_name(), now_ms);
        }
        self.heed(key, before.as_deref(), host_before.as_deref(), revision);
    }

    /// Tells the members what the change of an object means.
    fn heed(&mut self, key: &ObjectKey, before: Option<&Object>, host_before: Option<&str>, revision: u64) {
        if let Some(entity) = self.known_heir(key, before) {
            self.members.upsert(&entity, host_before, revision);
            self.entity_log.push(revision, entity.name);
            return;
        }
        let objects = &self.objects;
        let meaning_of = |key: &ObjectKey| objects.get(key).map(|object| object.resource.meaning());
        let before = before.map(|before| before.resource.meaning());
        let changes = self.heritage.change(key, before.as_deref(), meaning_of(key).as_deref(), meaning_of);
        for (name, entity) in changes.entities {
            // Of a workload that inherits something else, the host is still the same.
            let own = key.to_string() == *name;
            let host =
                if own { host_before } else { entity.as_ref().and_then(|entity| entity.host.as_deref()) };
            let host = host.map(ToOwned::to_owned);
            match &entity {
                Some(entity) => self.members.upsert(entity, host.as_deref(), revision),
                None => self.members.remove(&name, host.as_deref(), revision),
            }
            self.entity_log.push(revision, name);
        }
    }

    /// What a workload is that inherits from the same as before: by far the most changes, and of nobody else.
    fn known_heir(&self, key: &ObjectKey, before: Option<&Object>) -> Option<Entity> {
        let after = self.objects.get(key)?;
        let (Resource::Workload(now), Resource::Workload(before)) = (&after.resource, &before?.resource)
        else {
            return None;
        };
        if now.spec.service_account != before.spec.service_account {
            return None;
        }
        let mut entity = Entity::of(&after.resource)?;
        self.heritage.complete(&mut entity);
        Some(entity)
    }

    /// Takes a workload off the list of its host, and answers which that was.
    fn forget_host(&mut self, key: &ObjectKey) -> Option<String> {
        let Some(Resource::Workload(before)) = self.objects.get(key).map(|object| &object.resource) else {
            return None;
        };
        let host = before.spec.host.clone();
        if let Some(keys) = self.by_host.get_mut(&host) {
            keys.remove(key);
            if keys.is_empty() {
                self.by_host.remove(&host);
            }
        }
        Some(host)
    }

    /// An object.
    pub(crate) fn get(&self, key: &ObjectKey) -> Option<&Arc<Object>> {
        self.objects.get(key)
    }

    /// All objects.
    pub(crate) fn objects(&self) -> impl Iterator<Item = &Arc<Object>> {
        self.objects.values()
    }

    /// All objects of a kind, by namespace and name.
    pub(crate) fn of_kind(&self, kind: Kind) -> impl Iterator<Item = &Arc<Object>> {
        self.of_kind_after(kind, None)
    }

    /// Those that come after a key, by namespace and name.
    pub(crate) fn of_kind_after(
        &self,
        kind: Kind,
        after: Option<&ObjectKey>,
    ) -> impl Iterator<Item = &Arc<Object>> {
        let first = || Bound::Included(ObjectKey { kind, namespace: None, name: String::new() });
        let from = after.map_or_else(first, |key| Bound::Excluded(key.clone()));
        self.objects
            .range((from, Bound::Unbounded))
            .take_while(move |(key, _)| key.kind == kind)
            .map(|(_, object)| object)
    }

    /// Workloads that run on a host.
    pub(crate) fn workloads_of(&self, host: &str) -> impl Iterator<Item = &Arc<Object>> {
        self.by_host.get(host).into_iter().flatten().filter_map(|key| self.objects.get(key))
    }

    /// Objects that could not be read since the start.
    pub(crate) fn undecodable(&self) -> u64 {
        self.undecodable
    }

    /// Objects held.
    pub(crate) fn len(&self) -> usize {
        self.objects.len()
    }

    /// Revision of the last change that all agents hear of, or the agent of any one host.
    pub(crate) fn resources_newest(&self) -> u64 {
        self.resource_log.newest().max(self.host_log.newest())
    }

    /// Keys of the objects told to somebody that changed after a revision, with what they are now (`None`: gone, or about
    /// another host); `None` if it is no longer known.
    pub(crate) fn resources_since(
        &self,
        revision: u64,
        to: &Audience,
    ) -> Option<Vec<(ObjectKey, Option<Arc<Object>>)>> {
        if revision > self.revision {
            return None;
        }
        let mut keys = self.resource_log.since(revision)?;
        let about_hosts = self.host_log.since(revision)?;
        keys.extend(about_hosts.into_iter().filter(|(about, _)| to.hears_for(about)).map(|(_, key)| key));
        let now = |key: &ObjectKey| {
            let object = self.objects.get(key)?;
            let concerns = !is_for_one_host(key.kind) || is_for(&object.resource, to);
            concerns.then(|| Arc::clone(object))
        };
        Some(keys.into_iter().map(|key| (key.clone(), now(&key))).collect())
    }

    /// What all agents hear of, as JSON; tiers that nobody has written are known to them.
    pub(crate) fn written_resources(&self) -> impl Iterator<Item = Bytes> {
        self.resources().filter(|object| object.modified > 0).map(|object| object.json().clone())
    }

    /// The same, packed: once for all who ask until something of it changes.
    pub(crate) fn packed_resources(&self) -> Arc<[Bytes]> {
        let mut packed = self.packed.lock().unwrap_or_else(PoisonError::into_inner);
        let newest = self.resource_log.newest();
        match &*packed {
            Some((revision, parts)) if *revision == newest => Arc::clone(parts),
            _ => {
                let parts: Arc<[Bytes]> = crate::agents::packed(self.written_resources()).into();
                *packed = Some((newest, Arc::clone(&parts)));
                parts
            }
        }
    }

    /// All that all agents hear of.
    pub(crate) fn resources(&self) -> impl Iterator<Item = &Arc<Object>> {
        Kind::ALL.iter().filter(|kind| is_for_all_agents(**kind)).flat_map(|kind| self.of_kind(*kind))
    }

    /// What is for single hosts, and this one hears of besides.
    pub(crate) fn resources_of_host<'a>(&'a self, to: &'a Audience) -> impl Iterator<Item = &'a Arc<Object>> {
        let kinds = Kind::ALL.iter().filter(|kind| is_for_one_host(**kind));
        kinds.flat_map(|kind| self.of_kind(*kind)).filter(move |object| is_for(&object.resource, to))
    }

    /// What an object means, and all others.
    pub(crate) fn meanings(&self) -> impl Iterator<Item = (&ObjectKey, Cow<'_, Meaning>)> {
        self.objects.iter().map(|(key, object)| (key, object.resource.meaning()))
    }

    /// Every entity of an object, with all that it inherits.
    pub(crate) fn entities_of(&self, key: &ObjectKey) -> Vec<Entity> {
        let meaning = self.objects.get(key).map(|object| object.resource.meaning());
        let mut entities = meaning.map(|meaning| meaning.entities.clone()).unwrap_or_default();
        entities.iter_mut().for_each(|entity| self.heritage.complete(entity));
        entities
    }

    /// What somebody that knows a selector's members as of `revision` has to be told; `None` if it is no
    /// longer known what changed since.
    pub(crate) fn members_since(&self, id: SelectorId, to: &Audience, revision: u64) -> Option<Difference> {
        if revision > self.revision {
            return None;
        }
        if let Some(changed) = self.members.changed_since(id, revision) {
            return Some(Difference::of(to, &changed));
        }
        // Nobody has read the selector since then. To ask about everything that has changed would cost more than to tell all
        // its members, once that is more than they are.
        let changes = self.entity_log.changes_since(revision)?;
        if changes > ASKED_AT_LEAST && !self.members.has_more_than(id, changes / 2) {
            return None;
        }
        let names = self.entity_log.since(revision)?;
        let changed: Vec<_> = names.into_iter().map(|name| self.members.became(id, name)).collect();
        Some(Difference::of(to, &changed))
    }

    /// Makes a session known, so that it is woken when tiers or policies change.
    pub(crate) fn add_session(&mut self, session: &Arc<Subscriber>) {
        self.sessions.insert(session.id, Arc::clone(session));
    }

    /// Wakes the relays' sessions.
    pub(crate) fn wake_relays(&self) {
        let relays = self.sessions.values().filter(|one| matches!(one.audience, Audience::Relay(_)));
        relays.for_each(|relay| relay.wake.notify_one());
    }

    /// Forgets a session, whose subscriptions have ended.
    pub(crate) fn remove_session(&mut self, id: SessionId) {
        self.sessions.remove(&id);
    }
}

/// Whether entities inherit from it.
fn leaves_labels(kind: Kind) -> bool {
    matches!(kind, Kind::Namespace | Kind::KubernetesNamespace | Kind::ServiceAccount | Kind::Profile)
}

fn predefined_tier(
    name: &str,
    order: f64,
    default_action: bulkhead_model::policy::DefaultAction,
) -> Resource {
    let metadata = bulkhead_model::resource::Metadata { name: name.into(), ..Default::default() };
    let order = bulkhead_model::policy::Order::new(order);
    Resource::Tier(bulkhead_model::resource::Tier {
        metadata,
        spec: bulkhead_model::policy::TierSpec { order, default_action },
    })
}

/// Whether a tier exists without being written.
pub(crate) fn is_predefined(key: &ObjectKey) -> bool {
    key.kind == Kind::Tier && PREDEFINED_TIERS.iter().any(|(name, ..)| *name == key.name)
}
