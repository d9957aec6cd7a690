//! Whether every agent has what the repository has, found out anew: by the lists of the API and by asking every selector
//! about every workload, without the engine's indexes.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use bulkhead_model::entity::matches;
use bulkhead_model::labels::{HOST_LABEL, NAME_LABEL};
use bulkhead_model::{Entity, Labels, ObjectKey, Prefix, Resource, Selector};
use serde_json::Value;

use crate::agent::Agent;
use crate::rest::Rest;

/// Differences that are told.
const DIFFERENCES_MAX: usize = 20;

/// All that the repository lists.
#[derive(Debug)]
pub(crate) struct Truth {
    resources: BTreeMap<ObjectKey, Resource>,
    entities: Vec<Entity>,
    /// Entities by what selectors can see of them; those labels that nobody shares are left out.
    by_labels: HashMap<Labels, Vec<usize>>,
}

impl Truth {
    pub(crate) async fn read(rest: &Rest) -> anyhow::Result<Self> {
        let mut resources = BTreeMap::new();
        for kind in ["tiers", "policies"] {
            for resource in parsed(&rest.list(kind).await?)? {
                resources.insert(resource.key(), resource);
            }
        }
        let mut entities = Vec::new();
        for kind in ["workloads", "networksets"] {
            entities.extend(parsed(&rest.list(kind).await?)?.iter().filter_map(Entity::of));
        }
        let mut by_labels: HashMap<Labels, Vec<usize>> = HashMap::new();
        for (index, entity) in entities.iter().enumerate() {
            by_labels.entry(entity.labels.without(&[NAME_LABEL, HOST_LABEL])).or_default().push(index);
        }
        Ok(Self { resources, entities, by_labels })
    }

    /// Everybody whom a selector selects.
    fn selected(&self, selector: &Selector) -> Vec<usize> {
        if selector.reads(NAME_LABEL) || selector.reads(HOST_LABEL) {
            let all = self.entities.iter().enumerate();
            return all
                .filter(|(_, entity)| matches(selector, &entity.labels))
                .map(|(index, _)| index)
                .collect();
        }
        let sets = self.by_labels.iter().filter(|(labels, _)| matches(selector, labels));
        sets.flat_map(|(_, entities)| entities.iter().copied()).collect()
    }

    /// What differs.
    pub(crate) fn compare(&self, agents: &[Agent]) -> Vec<String> {
        let mut differences = Vec::new();
        let mut selected: HashMap<Selector, Vec<usize>> = HashMap::new();
        let hosted = self.hosted();
        for agent in agents {
            self.compare_resources(agent, &mut differences);
            self.compare_running(agent, &hosted, &mut differences);
            self.compare_members(agent, &mut selected, &mut differences);
            if differences.len() >= DIFFERENCES_MAX {
                break;
            }
        }
        differences
    }

    fn hosted(&self) -> HashMap<&str, BTreeMap<&str, &Entity>> {
        let mut hosted: HashMap<&str, BTreeMap<&str, &Entity>> = HashMap::new();
        for entity in &self.entities {
            if let Some(host) = entity.host.as_deref() {
                hosted.entry(host).or_default().insert(&entity.name, entity);
            }
        }
        hosted
    }

    fn compare_resources(&self, agent: &Agent, differences: &mut Vec<String>) {
        let known: BTreeMap<&ObjectKey, &Resource> =
            agent.known.objects().map(|object| (&object.key, &object.resource)).collect();
        for (key, resource) in &self.resources {
            // A predefined tier that nobody has written is told to nobody.
            let written = resource.metadata().uid.is_some();
            match known.get(key) {
                // The same object for all agents: that it is the same is mostly seen at once.
                Some(known) if known.metadata().resource_version == resource.metadata().resource_version => {}
                Some(_) => differences.push(format!("{}: has another {key}", agent.host())),
                None if written => differences.push(format!("{}: lacks {key}", agent.host())),
                None => {}
            }
        }
        for key in known.keys().filter(|key| !self.resources.contains_key(**key)) {
            differences.push(format!("{}: has {key}, which is gone", agent.host()));
        }
    }

    /// The repository has this host's workloads as they run.
    fn compare_running(
        &self,
        agent: &Agent,
        hosted: &HashMap<&str, BTreeMap<&str, &Entity>>,
        differences: &mut Vec<String>,
    ) {
        let nothing = BTreeMap::new();
        let stored = hosted.get(&**agent.host()).unwrap_or(&nothing);
        let running: Vec<Entity> = agent.running().filter_map(|workload| Entity::of(&workload)).collect();
        let same = stored.len() == running.len()
            && running.iter().all(|entity| {
                stored.get(&*entity.name).is_some_and(|stored| {
                    (&stored.prefixes, &stored.labels) == (&entity.prefixes, &entity.labels)
                })
            });
        if !same {
            let (stored, running) = (stored.len(), running.len());
            differences
                .push(format!("{}: the repository's {stored} workloads are not its {running}", agent.host()));
        }
    }

    fn compare_members(
        &self,
        agent: &Agent,
        selected: &mut HashMap<Selector, Vec<usize>>,
        differences: &mut Vec<String>,
    ) {
        let wanted: BTreeSet<&Selector> = agent.wanted().collect();
        for selector in self.needed(agent).iter().filter(|selector| !wanted.contains(selector)) {
            differences.push(format!("{}: has not asked for {selector}", agent.host()));
        }
        for selector in wanted {
            let indices = selected.entry(selector.clone()).or_insert_with(|| self.selected(selector));
            let here = Some(agent.host());
            let elsewhere = indices.iter().map(|index| &self.entities[*index]);
            let expected: BTreeMap<&Arc<str>, &Vec<Prefix>> = elsewhere
                .filter(|entity| entity.host.as_ref() != here)
                .map(|entity| (&entity.name, &entity.prefixes))
                .collect();
            let known = agent.members.get(selector);
            let known: BTreeMap<&Arc<str>, &Vec<Prefix>> = known.into_iter().flatten().collect();
            if known != expected {
                let name = expected.keys().find(|name| known.get(*name) != expected.get(*name));
                let name = name.or_else(|| known.keys().find(|name| !expected.contains_key(*name)));
                differences.push(format!(
                    "{}: {selector} has {} members and not {}, see {}",
                    agent.host(),
                    known.len(),
                    expected.len(),
                    name.map_or("?", |name| name)
                ));
                continue;
            }
            let missing = expected.values().flat_map(|prefixes| prefixes.iter());
            for prefix in missing.filter(|prefix| !agent.knows_address(**prefix)) {
                differences.push(format!("{}: {prefix} of {selector} is not in its tables", agent.host()));
            }
        }
    }

    /// Selectors that policies for this host's workloads read.
    fn needed(&self, agent: &Agent) -> BTreeSet<Selector> {
        let mut labels: Vec<Labels> = agent
            .running()
            .filter_map(|workload| Entity::of(&workload))
            .map(|entity| entity.labels.without(&[NAME_LABEL, HOST_LABEL]))
            .collect();
        labels.sort_by_cached_key(|labels| format!("{labels:?}"));
        labels.dedup();
        let mut needed = BTreeSet::new();
        for object in labels.iter().flat_map(|labels| agent.known.for_labels(labels)) {
            for (_, policy) in &object.resource.meaning().policies {
                let rules = policy.ingress.iter().chain(&policy.egress).flatten();
                let peers = rules.flat_map(|rule| &rule.peers);
                needed.extend(peers.filter_map(|peer| peer.selector.clone()));
            }
        }
        needed
    }
}

fn parsed(items: &[Value]) -> anyhow::Result<Vec<Resource>> {
    let parse =
        |item: &Value| Resource::from_json(item).map_err(|problems| anyhow::anyhow!("{item}: {problems:?}"));
    items.iter().map(parse).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::{Fleet, Slice};
    use crate::fleet_identity::FleetIdentity;
    use crate::world::World;

    fn truth(workloads: &[Resource]) -> Truth {
        let entities: Vec<Entity> = workloads.iter().filter_map(Entity::of).collect();
        Truth { resources: BTreeMap::new(), entities, by_labels: HashMap::new() }
    }

    #[test]
    fn a_repository_that_says_something_else_is_noticed() {
        let world =
            Arc::new(World::new(Fleet::new(4, 20, 0), "127.0.0.1:1".into(), FleetIdentity::of_nobody()));
        let number = world.fleet.host_of(Slice(1));
        let agent = Agent::new(number, world, [Slice(1)]);
        let mut workloads: Vec<Resource> = agent.running().collect();
        let agents = [agent];
        assert_eq!(truth(&workloads).compare(&agents), Vec::<String>::new());
        workloads.pop();
        let differences = truth(&workloads).compare(&agents);
        assert_eq!(differences.len(), 1, "{differences:?}");
        assert!(differences[0].ends_with("the repository's 4 workloads are not its 5"), "{differences:?}");
    }
}
