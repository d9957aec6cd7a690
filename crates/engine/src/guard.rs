//! Lifelines: connections that no change should end unawares, and which of them one would.
//!
//! The controller asks before it commits: of an operator's own session, and of every agent's. The reference evaluator
//! judges, in a world cut down to what can matter to it: the entities that have one of the two addresses, and the
//! policies that select one of the ends. A change that concerns nobody's ends costs a walk over the objects.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;

use bulkhead_model::address::address_bits;
use bulkhead_model::facts::PROCESS_GROUP;
use bulkhead_model::policy::{Mode, PolicySpec};
use bulkhead_model::ports::Protocol;
use bulkhead_model::time::Timestamp;
use bulkhead_model::{Direction, Entity, ObjectKey, Prefix, Resource, RuleRef, Verdict};

use crate::assembly::Assembly;
use crate::decide::{decide, selects};
use crate::judgement::{Endpoint, Flow};
use crate::selector_index::SelectorIndex;
use crate::world::World;

/// Most lifelines that are judged for one change. More that it concerns are not guessed at: [`TooMany`].
pub const LIFELINES_JUDGED_MAX: usize = 20_000;

/// A TCP connection that should stay possible, as the one called sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lifeline {
    /// Who began it.
    pub source: SocketAddr,
    /// Who was called.
    pub destination: SocketAddr,
}

/// A lifeline that passes now and would not any more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cut {
    /// Its place in the list.
    pub lifeline: usize,
    /// The endpoint whose policy forbids it.
    pub endpoint: Arc<str>,
    /// In which direction.
    pub direction: Direction,
    /// What decides.
    pub rule: RuleRef,
    /// If a tier's end decides: the policies that make the tier speak of the endpoint.
    pub policies: Vec<ObjectKey>,
}

/// A change concerns more than [`LIFELINES_JUDGED_MAX`] lifelines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("it concerns {0} connections, more than the {LIFELINES_JUDGED_MAX} that are judged for one change")]
pub struct TooMany(pub usize);

/// Which lifelines pass now and would not after these changes (`None`: the object goes).
///
/// # Errors
/// [`TooMany`].
pub fn cuts<'a>(
    objects: &[&'a Resource],
    changes: &BTreeMap<ObjectKey, Option<&'a Resource>>,
    lifelines: &[Lifeline],
    now: Timestamp,
) -> Result<Vec<Cut>, TooMany> {
    let States { before, after, policies } = states(objects, changes, lifelines, now);
    if before.owners.is_empty() && after.owners.is_empty() {
        return Ok(Vec::new());
    }
    let concerned = concerned(&before, &after, &policies, lifelines);
    if concerned.len() > LIFELINES_JUDGED_MAX {
        return Err(TooMany(concerned.len()));
    }
    if concerned.is_empty() {
        return Ok(Vec::new());
    }
    let of = |choose: fn(&Change<'a>) -> Option<&'a PolicySpec>| {
        policies.iter().filter_map(move |policy| Some((&policy.key, choose(policy)?)))
    };
    let mut then = Court::new(&before, of(|policy| policy.before));
    let mut thereafter = Court::new(&after, of(|policy| policy.after));
    let mut cuts = Vec::new();
    for number in concerned {
        let line = &lifelines[number];
        if let Some((endpoint, direction, rule)) = thereafter.refusal(line)
            && then.refusal(line).is_none()
        {
            let policies = thereafter.behind(&endpoint, direction, &rule);
            cuts.push(Cut { lifeline: number, endpoint, direction, rule, policies });
        }
    }
    Ok(cuts)
}

/// What holds at one time, as far as it can matter to a lifeline.
struct State {
    /// Without policies.
    world: World,
    /// Names of all that has an end's address.
    at: BTreeMap<u128, Vec<Arc<str>>>,
    /// Those of them that policies can apply to.
    owners: BTreeMap<u128, Vec<Arc<str>>>,
}

/// A policy before and after; `None`: there is none.
struct Change<'a> {
    key: ObjectKey,
    before: Option<&'a PolicySpec>,
    after: Option<&'a PolicySpec>,
}

struct States<'a> {
    before: State,
    after: State,
    policies: Vec<Change<'a>>,
}

fn ends(line: &Lifeline) -> [u128; 2] {
    [line.source, line.destination].map(|end| address_bits(end.ip()))
}

fn states<'a>(
    objects: &[&'a Resource],
    changes: &BTreeMap<ObjectKey, Option<&'a Resource>>,
    lifelines: &[Lifeline],
    now: Timestamp,
) -> States<'a> {
    let addresses: BTreeSet<u128> = lifelines.iter().flat_map(ends).collect();
    let mut assembly = Assembly::default();
    let mut world = World { now, ..World::new() };
    let mut policies: BTreeMap<ObjectKey, Change<'a>> = BTreeMap::new();
    for resource in objects {
        let key = resource.key();
        let changed = changes.contains_key(&key);
        for (key, spec) in policies_of(resource) {
            let after = (!changed).then_some(spec);
            policies.insert(key.clone(), Change { key, before: Some(spec), after });
        }
        if changed || matters(resource, &addresses) {
            world.change(&assembly.set(&key, Some((*resource).clone())));
        }
    }
    world.policies.clear();
    let before = State::new(world.clone(), &addresses);
    for (key, after) in changes {
        world.change(&assembly.set(key, after.cloned()));
        for (key, spec) in after.iter().flat_map(|after| policies_of(after)) {
            let change = Change { key: key.clone(), before: None, after: None };
            policies.entry(key).or_insert(change).after = Some(spec);
        }
    }
    world.policies.clear();
    States { before, after: State::new(world, &addresses), policies: policies.into_values().collect() }
}

fn policies_of(resource: &Resource) -> Vec<(ObjectKey, &PolicySpec)> {
    match resource {
        Resource::Policy(policy) => vec![(resource.key(), &policy.spec)],
        Resource::Foreign(foreign) => {
            foreign.meaning.policies.iter().map(|(key, spec)| (key.clone(), spec)).collect()
        }
        Resource::Tier(_)
        | Resource::Settings(_)
        | Resource::Namespace(_)
        | Resource::NetworkSet(_)
        | Resource::NameTable(_)
        | Resource::HostEndpoint(_)
        | Resource::Host(_)
        | Resource::Workload(_)
        | Resource::RoleBinding(_) => Vec::new(),
    }
}

fn is_in(prefix: Prefix, addresses: &BTreeSet<u128>) -> bool {
    addresses.range(prefix.bits()..=prefix.last_bits()).next().is_some()
}

/// Whether an object, but for its policies, can matter: it has one of the addresses, or holds for all.
fn matters(resource: &Resource, addresses: &BTreeSet<u128>) -> bool {
    let has = |address: &std::net::IpAddr| addresses.contains(&address_bits(*address));
    match resource {
        Resource::Tier(_) | Resource::Settings(_) | Resource::Namespace(_) => true,
        Resource::Policy(_) | Resource::RoleBinding(_) => false,
        Resource::Workload(workload) => workload.spec.addresses.iter().any(has),
        Resource::Host(host) => host.spec.addresses.iter().any(has),
        Resource::HostEndpoint(endpoint) => endpoint.spec.addresses.iter().any(has),
        Resource::NetworkSet(set) => set.spec.cidrs.iter().any(|block| is_in(*block, addresses)),
        Resource::NameTable(table) => table.spec.names.values().flatten().any(has),
        Resource::Foreign(foreign) => {
            let meaning = &foreign.meaning;
            let mut blocks = meaning.entities.iter().flat_map(|entity| &entity.prefixes);
            !meaning.tiers.is_empty()
                || !meaning.bequests.is_empty()
                || meaning.settings.is_some()
                || blocks.any(|block| is_in(*block, addresses))
        }
    }
}

impl State {
    fn new(mut world: World, addresses: &BTreeSet<u128>) -> Self {
        let (mut at, mut owners) = (BTreeMap::<_, Vec<_>>::new(), BTreeMap::<_, Vec<_>>::new());
        world.entities.retain(|name, entity| {
            let blocks = entity.prefixes.iter();
            let has: BTreeSet<u128> =
                blocks.flat_map(|block| addresses.range(block.bits()..=block.last_bits())).copied().collect();
            for address in &has {
                at.entry(*address).or_default().push(Arc::clone(name));
                // Who shares its host's addresses is not who speaks with them here.
                let shares = entity.labels.get(PROCESS_GROUP).is_some();
                if entity.is_endpoint() && !shares {
                    owners.entry(*address).or_default().push(Arc::clone(name));
                }
            }
            !has.is_empty()
        });
        Self { world, at, owners }
    }

    fn owners(&self, address: u128) -> impl Iterator<Item = &Entity> {
        let names = self.owners.get(&address).into_iter().flatten();
        names.filter_map(|name| self.world.entities.get(name))
    }
}

/// The lifelines that a change can matter to: an end is selected by a policy that changes, something that has an end's
/// address changes, or what holds for all does.
fn concerned<'a>(
    before: &State,
    after: &State,
    policies: &[Change<'a>],
    lifelines: &[Lifeline],
) -> Vec<usize> {
    let all = before.world.tiers != after.world.tiers || before.world.settings != after.world.settings;
    let differs = |address: u128| {
        let known = |state: &State| -> Vec<Entity> {
            let names = state.at.get(&address).into_iter().flatten();
            names.filter_map(|name| state.world.entities.get(name)).cloned().collect()
        };
        known(before) != known(after)
    };
    let addresses: BTreeSet<u128> = lifelines.iter().flat_map(ends).collect();
    let changed: BTreeSet<u128> =
        addresses.iter().copied().filter(|address| all || differs(*address)).collect();
    let changed_policies = |choose: fn(&Change<'a>) -> Option<&'a PolicySpec>| {
        let changed = policies.iter().filter(|policy| policy.before != policy.after);
        let specs: Vec<_> = changed.filter_map(|policy| Some((&policy.key, choose(policy)?))).collect();
        let mut index = SelectorIndex::default();
        for (number, (_, spec)) in specs.iter().enumerate() {
            index.insert(&number, &spec.applies_to);
        }
        move |end: &Entity| {
            let candidates = index.candidates(&end.labels);
            candidates.into_iter().any(|number| selects(specs[number].0, specs[number].1, end))
        }
    };
    let (old, new) = (changed_policies(|policy| policy.before), changed_policies(|policy| policy.after));
    let selected = |address: u128| before.owners(address).any(&old) || after.owners(address).any(&new);
    let selected: BTreeSet<u128> = addresses.iter().copied().filter(|address| selected(*address)).collect();
    let owned = |line: &Lifeline| ends(line).iter().any(|end| after.owners.contains_key(end));
    let concerns = |line: &Lifeline| {
        owned(line) && ends(line).iter().any(|end| changed.contains(end) || selected.contains(end))
    };
    lifelines.iter().enumerate().filter(|(_, line)| concerns(line)).map(|(number, _)| number).collect()
}

/// Judges in one state.
struct Court<'a> {
    state: &'a State,
    policies: Vec<(&'a ObjectKey, &'a PolicySpec)>,
    index: SelectorIndex<usize>,
    /// The world of the last judgement, and the numbers of the policies in it: hosts are much alike.
    world: World,
    seated: BTreeSet<usize>,
}

impl<'a> Court<'a> {
    fn new(state: &'a State, policies: impl Iterator<Item = (&'a ObjectKey, &'a PolicySpec)>) -> Self {
        let policies: Vec<_> = policies.collect();
        let mut index = SelectorIndex::default();
        for (number, (_, spec)) in policies.iter().enumerate() {
            index.insert(&number, &spec.applies_to);
        }
        let world = World { entities: BTreeMap::new(), ..state.world.clone() };
        Self { state, policies, index, world, seated: BTreeSet::new() }
    }

    /// Who refuses a lifeline, if anybody does. An address may have several owners: each pair must let it pass.
    fn refusal(&mut self, line: &Lifeline) -> Option<(Arc<str>, Direction, RuleRef)> {
        self.seat(line);
        let owners = |end: SocketAddr| {
            let known = self.state.owners.get(&address_bits(end.ip()));
            known
                .map_or_else(|| vec![None], |names| names.iter().map(|name| Some(Arc::clone(name))).collect())
        };
        let destinations = owners(line.destination);
        for source in owners(line.source) {
            for destination in &destinations {
                let flow = Flow {
                    source: Endpoint { workload: source.clone(), address: line.source.ip() },
                    destination: Endpoint { workload: destination.clone(), address: line.destination.ip() },
                    key: Protocol::TCP.key(line.destination.port()),
                    source_port: line.source.port(),
                };
                let explanation = decide(&self.world, &flow);
                let sides =
                    [(explanation.egress, Direction::Egress), (explanation.ingress, Direction::Ingress)];
                for (judgement, direction) in sides {
                    if let Some(judgement) = judgement.filter(|judgement| judgement.verdict == Verdict::Deny)
                    {
                        return Some((judgement.workload, direction, judgement.rule));
                    }
                }
            }
        }
        None
    }

    /// The policies behind the end of a tier, in the world of the last judgement.
    fn behind(&self, endpoint: &str, direction: Direction, rule: &RuleRef) -> Vec<ObjectKey> {
        let (RuleRef::TierDefault { tier }, Some(endpoint)) = (rule, self.world.entities.get(endpoint))
        else {
            return Vec::new();
        };
        let policies = self.world.policies.iter().filter(|(key, spec)| {
            spec.tier == *tier
                && spec.mode == Mode::Enforce
                && spec.is_valid_at(self.world.now)
                && spec.rules(direction).is_some()
                && selects(key, spec, endpoint)
        });
        policies.map(|(key, _)| key.clone()).collect()
    }

    /// Makes the world that a lifeline is judged in.
    fn seat(&mut self, line: &Lifeline) {
        let mut seated = BTreeSet::new();
        self.world.entities.clear();
        for end in ends(line) {
            for name in self.state.at.get(&end).into_iter().flatten() {
                if let Some(entity) = self.state.world.entities.get(name) {
                    self.world.entities.insert(Arc::clone(name), entity.clone());
                }
            }
            for owner in self.state.owners(end) {
                let candidates = self.index.candidates(&owner.labels).into_iter();
                seated.extend(candidates.filter(|number| {
                    let (key, spec) = self.policies[*number];
                    selects(key, spec, owner)
                }));
            }
        }
        if seated != self.seated {
            let policies = seated.iter().map(|number| self.policies[*number]);
            self.world.policies = policies.map(|(key, spec)| (key.clone(), spec.clone())).collect();
            self.seated = seated;
        }
    }
}

#[cfg(test)]
mod tests;
