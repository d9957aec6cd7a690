//! What the model checkers of the protocol share (`agents::pump::tests::model`, `relay::mirror::tests::model`): what is written,
//! what the repository says, and an agent that does what the protocol asks.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{Hash, Hasher};

use bulkhead_model::{Entity, Kind, Resource, Selector, document};
use bulkhead_store::{Memory, Precondition, Store, Transaction};
use bulkhead_wire::proto;
use bulkhead_wire::proto::controller_message::Body;

use crate::repository::View;

/// The host of the agent.
pub(crate) const HOST: &str = "h1";

/// What is written, one transaction each. The third changes a policy and whom it speaks of together: an agent must never know
/// one without the other.
pub(crate) const WRITES: [&[&str]; 4] = [
    &["Policy a", "Workload w1 a"],
    &["Workload w2 a"],
    &["Policy b", "Workload w1 b", "-Workload w2", "Workload own b"],
    &["Workload w2 b"],
];

/// A state of a model: how it was reached, which can be played again, and by what it is told from others.
#[derive(Debug, Clone)]
pub(crate) struct State<A, S> {
    pub(crate) way: Vec<A>,
    pub(crate) seen: S,
}

impl<A, S: PartialEq> PartialEq for State<A, S> {
    fn eq(&self, other: &Self) -> bool {
        self.seen == other.seen
    }
}

impl<A, S: Hash> Hash for State<A, S> {
    fn hash<H: Hasher>(&self, hasher: &mut H) {
        self.seen.hash(hasher);
    }
}

/// Plays something to its end. Each thread of the checker has a runtime of its own.
pub(crate) fn played<T>(play: impl Future<Output = T>) -> T {
    thread_local! {
        static RUNTIME: tokio::runtime::Runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    }
    RUNTIME.with(|runtime| runtime.block_on(play))
}

/// Members by name, with the role that they had when it was said.
type Members = BTreeMap<String, String>;

/// What the repository said at a revision.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub(crate) struct Truth {
    policy: Option<String>,
    workloads: BTreeMap<String, (String, String)>,
}

impl Truth {
    pub(crate) fn of(view: &View) -> Self {
        let policy = view.of_kind(Kind::Policy).next().map(|object| selector_of(&object.resource));
        let workloads = view.of_kind(Kind::Workload).filter_map(|object| {
            let entity = Entity::of(&object.resource)?;
            let host = entity.host.as_deref().unwrap_or_default().to_owned();
            Some((entity.name.to_string(), (host, entity.labels.get("role")?.to_owned())))
        });
        Self { policy, workloads: workloads.collect() }
    }

    fn members(&self, selector: &str, to: &str) -> Members {
        let elsewhere = self.workloads.iter().filter(|(_, (host, _))| host != to);
        let matching = elsewhere.filter(|(_, (_, role))| selector == format!("role == \"{role}\""));
        matching.map(|(name, (_, role))| (name.clone(), role.clone())).collect()
    }
}

fn selector_of(resource: &Resource) -> String {
    let json = resource.to_json();
    let text = json["spec"]["ingress"][0]["from"]["selector"].as_str().unwrap_or_default().to_owned();
    Selector::parse(&text).unwrap().canonical().to_string()
}

/// The agent, as far as the protocol is concerned.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub(crate) struct Agent {
    host: &'static str,
    pub(crate) epoch: u8,
    pub(crate) revision: u64,
    /// Remembered members are complete up to here.
    pub(crate) members_revision: u64,
    policy: Option<String>,
    members: BTreeMap<String, Members>,
    /// Of this connection.
    subscribed: BTreeMap<u32, String>,
    unanswered: BTreeSet<u32>,
    /// A handle never stands for two subscriptions of a connection: answers to the first may still be on their way.
    last_handle: u32,
    pub(crate) buffer: Vec<Heard>,
}

/// What an agent understands of a message.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum Heard {
    Policies { snapshot: bool, upserts: Vec<String>, gone: bool },
    Members { handle: u32, snapshot: bool, joins: Vec<String>, leaves: Vec<String> },
    Synced(u64),
}

pub(crate) fn heard(body: &Body) -> Heard {
    match body {
        Body::Resources(resources) => {
            let policies = resources.upserts.iter().filter_map(|json| {
                let resource = Resource::from_json(&serde_json::from_slice(json).unwrap()).unwrap();
                (resource.kind() == Kind::Policy).then(|| selector_of(&resource))
            });
            let gone = resources.removes.iter().any(|key| key.kind == "Policy");
            Heard::Policies { snapshot: resources.snapshot, upserts: policies.collect(), gone }
        }
        Body::Members(members) => Heard::Members {
            handle: members.handle,
            snapshot: members.snapshot,
            joins: members.joins.iter().map(|member| member.entity.clone()).collect(),
            leaves: members.leaves.clone(),
        },
        Body::Synced(synced) => Heard::Synced(synced.revision),
        Body::Welcome(_) | Body::InventoryAck(_) | Body::Revocations(_) => {
            unreachable!("the pump says none of these")
        }
    }
}

impl Agent {
    /// One that knows nothing.
    pub(crate) fn of(host: &'static str) -> Self {
        Self { host, ..Self::default() }
    }

    /// The connection ends. What it knew at the last barrier it remembers.
    pub(crate) fn disconnect(&mut self) {
        self.buffer.clear();
        self.subscribed.clear();
        self.unanswered.clear();
        self.last_handle = 0;
    }

    /// What it knows at a barrier that the repository did not say at its revision.
    pub(crate) fn differs(&self, truth: &Truth, revision: u64) -> Option<String> {
        if self.policy != truth.policy {
            return Some(format!("at {revision}: {:?} instead of {:?}", self.policy, truth.policy));
        }
        let mut answered = self.subscribed.iter().filter(|(handle, _)| !self.unanswered.contains(handle));
        answered.find_map(|(_, selector)| {
            let known = self.members.get(selector).cloned().unwrap_or_default();
            let said = truth.members(selector, self.host);
            (known != said).then(|| format!("at {revision} {selector}: {known:?} instead of {said:?}"))
        })
    }

    /// Whether it has asked for something that no answer has come to.
    pub(crate) fn waits(&self) -> bool {
        !self.unanswered.is_empty()
    }

    /// Whether it knows all that concerns it.
    pub(crate) fn is_current(&self, truth: &Truth) -> bool {
        let known = |selector: &String| self.members.get(selector).cloned().unwrap_or_default();
        let is_known = |selector: &String| known(selector) == truth.members(selector, self.host);
        self.policy == truth.policy && self.policy.as_ref().is_none_or(is_known)
    }

    /// What it subscribes to and unsubscribes from, as its policies ask for.
    pub(crate) fn follow(&mut self) -> Vec<Result<proto::Subscribe, u32>> {
        let wanted: BTreeSet<String> = self.policy.iter().cloned().collect();
        let mut said = Vec::new();
        let unwanted: Vec<u32> = self
            .subscribed
            .iter()
            .filter(|(_, selector)| !wanted.contains(*selector))
            .map(|(handle, _)| *handle)
            .collect();
        for handle in unwanted {
            let selector = self.subscribed.remove(&handle).unwrap();
            self.unanswered.remove(&handle);
            self.members.remove(&selector);
            said.push(Err(handle));
        }
        self.members.retain(|selector, _| wanted.contains(selector));
        for selector in wanted {
            if self.subscribed.values().any(|known| *known == selector) {
                continue;
            }
            self.last_handle += 1;
            let handle = self.last_handle;
            let revision = if self.members.contains_key(&selector) { self.members_revision } else { 0 };
            said.push(Ok(proto::Subscribe { handle, selector: selector.clone(), revision }));
            self.subscribed.insert(handle, selector);
            self.unanswered.insert(handle);
        }
        said
    }

    pub(crate) fn synced(&mut self, revision: u64) {
        for message in std::mem::take(&mut self.buffer) {
            match message {
                Heard::Policies { snapshot, upserts, gone } => {
                    if snapshot || gone {
                        self.policy = None;
                    }
                    self.policy = upserts.into_iter().next_back().or(self.policy.take());
                }
                Heard::Members { handle, snapshot, joins, leaves } => {
                    self.unanswered.remove(&handle);
                    // The answer to a question that was taken back meanwhile.
                    let Some(selector) = self.subscribed.get(&handle) else { continue };
                    let known = self.members.entry(selector.clone()).or_default();
                    if snapshot {
                        known.clear();
                    }
                    leaves.iter().for_each(|name| drop(known.remove(name)));
                    known.extend(joins.into_iter().map(|name| (name, role_in(selector))));
                }
                Heard::Synced(_) => unreachable!("it ends the buffer"),
            }
        }
        let asked = |selector: &String| self.subscribed.values().any(|known| known == selector);
        if self.unanswered.is_empty() && self.members.keys().all(asked) {
            self.members_revision = revision;
        }
        self.revision = revision;
    }
}

fn role_in(selector: &str) -> String {
    selector.split('"').nth(1).unwrap_or_default().to_owned()
}

/// Writes lines of [`WRITES`] in one transaction.
pub(crate) async fn write(store: &Memory, lines: &[&str]) {
    let mut transaction = Transaction::new();
    for line in lines {
        let words: Vec<&str> = line.split(' ').collect();
        let (key, text) = match words.as_slice() {
            ["Policy", role] => (
                "/bulkhead.dev/v1/policies/_/p".to_owned(),
                format!(
                    "apiVersion: bulkhead.dev/v1\nkind: Policy\nmetadata: {{name: p}}\nspec: {{appliesTo: all(), \
                     ingress: [{{action: Allow, from: {{selector: role == '{role}'}}}}]}}"
                ),
            ),
            ["Workload", name, role] => {
                let host = if *name == "own" { HOST } else { "h2" };
                (
                    format!("/bulkhead.dev/v1/workloads/_/{name}.{host}"),
                    format!(
                        "apiVersion: bulkhead.dev/v1\nkind: Workload\nmetadata: {{name: {name}.{host}, labels: \
                         {{role: {role}}}}}\nspec: {{host: {host}, addresses: [10.0.0.1]}}"
                    ),
                )
            }
            ["-Workload", name] => {
                let key = format!("/bulkhead.dev/v1/workloads/_/{name}.h2");
                transaction = transaction.delete(key, Precondition::Any);
                continue;
            }
            other => panic!("{other:?}"),
        };
        let resource = document::parse("model", &text).unwrap().remove(0).resource;
        transaction = transaction.put(key, resource.to_json().to_string(), Precondition::Any);
    }
    store.apply(transaction).await.unwrap();
}
