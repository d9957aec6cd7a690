//! A whole fleet in one value: a controller's index and one agent on whose host everything runs, joined by function
//! calls. What `decide`, `test` and `lint` ask, and what they get is what a kernel's tables would say.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use bulkhead_model::host_policy::{Attachment, Cell, HostDelta, HostPolicy, RuleId};
use bulkhead_model::labels::HOST_LABEL;
use bulkhead_model::policy::{PolicySpec, TierSpec};
use bulkhead_model::settings::SettingsSpec;
use bulkhead_model::time::Timestamp;
use bulkhead_model::{Builtin, Direction, Entity, ObjectKey, RuleRef, Selector, Verdict};

use crate::assembly::Changes;
use crate::decide::decide;
use crate::host::{HostEngine, LocalEndpoint, Member};
use crate::judgement::{Explanation, Flow, Judgement};
use crate::members::{Change, MemberChange, MemberIndex, MemberRef, SelectorId};
use crate::own_host::{host_of, is_host_at, unless_own_host};
use crate::world::World;

/// Name of the host that everything runs on.
const HOST: &str = "everywhere";

/// Everything that is known, ready to be asked.
#[derive(Debug)]
pub struct Fleet {
    world: World,
    index: MemberIndex,
    subscribed: BTreeMap<Selector, SelectorId>,
    engine: HostEngine,
    interfaces: BTreeMap<Arc<str>, u32>,
    next_interface: u32,
    /// Hosts, and endpoints of hosts, by the host's name.
    hosts: BTreeMap<String, BTreeSet<Arc<str>>>,
    /// The only host whose endpoints are ours, if it is not all of them.
    host: Option<String>,
}

impl Default for Fleet {
    fn default() -> Self {
        Self::new()
    }
}

impl Fleet {
    /// A fleet in which nothing is known.
    pub fn new() -> Self {
        Self {
            world: World::new(),
            index: MemberIndex::new(),
            subscribed: BTreeMap::new(),
            engine: HostEngine::new(HOST),
            interfaces: BTreeMap::new(),
            next_interface: 1,
            hosts: BTreeMap::new(),
            host: None,
        }
    }

    /// A fleet of which only what runs on one host gets tables.
    pub fn of_host(host: &str) -> Self {
        Self { host: Some(host.to_owned()), ..Self::new() }
    }

    fn is_ours(&self, entity: &Entity) -> bool {
        let host = entity.labels.get(HOST_LABEL).unwrap_or_default();
        entity.is_endpoint() && self.host.as_ref().is_none_or(|ours| ours == host)
    }

    /// Takes in what has changed. Call [`Fleet::settle`] afterwards.
    pub fn change(&mut self, changes: &Changes) {
        for (name, spec) in &changes.tiers {
            self.set_tier(name, spec.clone());
        }
        for (key, spec) in &changes.policies {
            self.set_policy(key, spec.as_ref());
        }
        for (name, entity) in &changes.entities {
            self.set_entity(name, entity.as_ref());
        }
        if let Some(settings) = &changes.settings {
            self.set_settings(settings.clone().unwrap_or_default());
        }
    }

    /// Sets what holds for everything.
    pub fn set_settings(&mut self, settings: SettingsSpec) {
        self.engine.set_settings(settings.clone());
        self.world.settings = settings;
    }

    /// Sets what time it is.
    pub fn set_now(&mut self, now: Timestamp) {
        self.engine.set_now(now);
        self.world.now = now;
    }

    /// What is known.
    pub fn world(&self) -> &World {
        &self.world
    }

    /// The tables.
    pub fn tables(&self) -> &HostPolicy {
        self.engine.policy()
    }

    /// Adds, replaces or removes a tier.
    pub fn set_tier(&mut self, name: &str, spec: Option<TierSpec>) {
        self.engine.set_tier(name, spec.clone());
        self.world.set_tier(name, spec);
    }

    /// Adds, replaces or removes a policy.
    pub fn set_policy(&mut self, key: &ObjectKey, spec: Option<&PolicySpec>) {
        self.engine.set_policy(key, spec);
        match spec {
            Some(spec) => self.world.policies.insert(key.clone(), spec.clone()),
            None => self.world.policies.remove(key),
        };
    }

    /// Adds, replaces or removes an entity.
    pub fn set_entity(&mut self, name: &Arc<str>, entity: Option<&Entity>) {
        let endpoint = entity.filter(|entity| self.is_ours(entity)).map(|entity| LocalEndpoint {
            // It runs here whatever its labels say, so that no membership of it comes from elsewhere.
            entity: Entity { host: Some(HOST.into()), ..entity.clone() },
            attachment: Attachment::Interface(*self.interfaces.entry(Arc::clone(name)).or_insert_with(
                || {
                    self.next_interface += 1;
                    self.next_interface
                },
            )),
        });
        if let Some(host) = self.world.entities.get(name).and_then(host_of)
            && let Some(names) = self.hosts.get_mut(host)
        {
            names.remove(name);
            if names.is_empty() {
                self.hosts.remove(host);
            }
        }
        if let Some(host) = entity.and_then(host_of) {
            self.hosts.entry(host.to_owned()).or_default().insert(Arc::clone(name));
        }
        let local = endpoint.is_some();
        self.engine.set_local(name, endpoint);
        let changes = match entity {
            Some(entity) => {
                self.world.entities.insert(Arc::clone(name), entity.clone());
                // The engine knows its own endpoints itself.
                if local { self.index.remove(name) } else { self.index.upsert(entity) }
            }
            None => {
                self.world.entities.remove(name);
                self.interfaces.remove(name);
                self.index.remove(name)
            }
        };
        tell(&mut self.engine, &self.index, changes);
    }

    /// Brings the tables up to date.
    pub fn settle(&mut self) {
        self.settle_by(&mut |_delta| ());
    }

    /// Brings the tables up to date and hands over each difference on the way, as a dataplane gets them.
    pub fn settle_by(&mut self, apply: &mut dyn FnMut(&HostDelta)) {
        loop {
            apply(&self.engine.flush());
            let waiting = self.engine.waiting();
            for selector in &waiting {
                let id = match self.subscribed.get(selector) {
                    Some(id) => *id,
                    None => self.index.subscribe(selector),
                };
                self.subscribed.insert(selector.clone(), id);
                self.engine.set_members(selector, self.index.members(id).map(Member::from));
            }
            if waiting.is_empty() && !self.engine.needs_flush() {
                break;
            }
        }
        let wanted: BTreeSet<&Selector> = self.engine.wanted().collect();
        let stale: Vec<_> = self.subscribed.keys().filter(|s| !wanted.contains(s)).cloned().collect();
        for selector in stale {
            if let Some(id) = self.subscribed.remove(&selector) {
                self.index.unsubscribe(id);
            }
        }
    }

    /// What the tables say of a new connection. Call [`Fleet::settle`] after changes.
    pub fn decide_by_tables(&self, flow: &Flow) -> Explanation {
        let Flow { source, destination, key, source_port } = flow;
        let own = source.workload.is_some() && source.workload == destination.workload;
        let side = |end: &Option<Arc<str>>, direction, peer| {
            let name = end.as_ref().filter(|name| self.interfaces.contains_key(*name))?;
            let cell = self.engine.policy().lookup(name, direction, peer, *key, *source_port);
            Some(self.judge(name, cell, own))
        };
        let egress = side(&source.workload, Direction::Egress, destination.address);
        let ingress = side(&destination.workload, Direction::Ingress, source.address);
        let ingress = ingress.map(|judged| match self.world.entities.get(&judged.workload) {
            Some(workload) if !own => {
                unless_own_host(workload, self.is_own_host(workload, source.address), judged)
            }
            _ => judged,
        });
        Explanation::of(egress, ingress)
    }

    fn is_own_host(&self, workload: &Entity, address: IpAddr) -> bool {
        let Some(host) = workload.labels.get(HOST_LABEL) else { return false };
        let names = self.hosts.get(host).into_iter().flatten();
        names.filter_map(|name| self.world.entities.get(name)).any(|entity| is_host_at(entity, host, address))
    }

    /// What the reference evaluator says of it.
    pub fn decide_by_reference(&self, flow: &Flow) -> Explanation {
        decide(&self.world, flow)
    }

    fn judge(&self, name: &Arc<str>, cell: Option<Cell>, own: bool) -> Judgement {
        let policy = self.engine.policy();
        let builtin = |builtin| RuleRef::Builtin { builtin };
        let rule = |id: RuleId| policy.rules.get(&id).cloned().unwrap_or(RuleRef::DefaultPosture);
        let (verdict, author, audit_verdict, audit_author) = match cell {
            _ if own => {
                let author = builtin(Builtin::SelfTraffic);
                (Verdict::Allow, author.clone(), Verdict::Allow, author)
            }
            Some(cell) => (cell.verdict, rule(cell.rule), cell.audit_verdict, rule(cell.audit_rule)),
            None => {
                let author = builtin(Builtin::Unprogrammed);
                (Verdict::Deny, author.clone(), Verdict::Deny, author)
            }
        };
        Judgement {
            workload: Arc::clone(name),
            verdict,
            rule: author,
            audit_verdict,
            audit_rule: audit_author,
            log: cell.is_some_and(|cell| cell.log && !own),
            reject: cell.is_some_and(|cell| cell.reject && !own),
            trace: Vec::new(),
        }
    }
}

/// Hands an index's changes to an engine, as a controller and an agent do over the wire.
pub(crate) fn tell(engine: &mut HostEngine, index: &MemberIndex, changes: Vec<MemberChange>) {
    for MemberChange { selector, entity, change } in changes {
        let Some(selector) = index.selector(selector) else { continue };
        match change {
            Change::Join { prefixes, host, ports } => {
                let (prefixes, ports) = (prefixes.to_vec(), ports.to_vec());
                engine.change_members(selector, [Member { entity, host, prefixes, ports }], []);
            }
            Change::Leave => engine.change_members(selector, [], [entity]),
        }
    }
}

impl From<MemberRef<'_>> for Member {
    fn from(member: MemberRef<'_>) -> Self {
        Self {
            entity: Arc::clone(member.entity),
            host: member.host.cloned(),
            prefixes: member.prefixes.to_vec(),
            ports: member.ports.to_vec(),
        }
    }
}
