//! From what the sources found to endpoints and inventory: pure.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bulkhead_discover::{Found, FoundWorkload, NotManaged};
use bulkhead_engine::{Heritage, LocalEndpoint};
use bulkhead_model::entity::WorkloadSpec;
use bulkhead_model::host_policy::Attachment;
use bulkhead_model::registration::Identity;
use bulkhead_model::resource::{Metadata, Object, is_name};
use bulkhead_model::{Entity, Facts, Prefix, Resource};

/// What this host has: endpoints for the engine and workloads for the repository.
#[derive(Debug, Default, Clone, PartialEq)]
pub(crate) struct Locals {
    /// By entity name. A workload with several interfaces is several endpoints.
    pub(crate) endpoints: BTreeMap<Arc<str>, LocalEndpoint>,
    /// By name in the repository, with the namespace before it if there is one.
    pub(crate) workloads: BTreeMap<String, Resource>,
    /// What could not be taken in.
    pub(crate) not_managed: Vec<NotManaged>,
}

/// Puts together what all sources found; each workload carries its host's facts too, and what it inherits. Sources are
/// asked in the order of their names; a name that two claim stays with the first.
pub(crate) fn assemble(
    host: &str,
    facts: &Facts,
    sources: &BTreeMap<String, Found>,
    heritage: &Heritage,
) -> Locals {
    let mut locals = Locals::default();
    let mut taken = BTreeSet::new();
    for (source, found) in sources {
        locals.not_managed.extend(found.not_managed.iter().cloned());
        for workload in &found.workloads {
            let name = format!("{}.{host}", workload.name);
            if !is_name(&name) || !taken.insert(name.clone()) {
                let reason = format!("the name {name:?} from {source} is taken or not valid");
                locals.not_managed.push(NotManaged { subject: workload.name.clone(), reason });
                continue;
            }
            let resource = workload_of(host, facts, source, &name, workload);
            add(&mut locals, resource, workload, heritage);
        }
    }
    locals
}

fn workload_of(
    host: &str,
    host_facts: &Facts,
    source: &str,
    name: &str,
    workload: &FoundWorkload,
) -> Resource {
    let FoundWorkload { name: _, labels, addresses, interfaces, group: _, facts, identity } = workload;
    let Identity { namespace, service_account, ports } = identity.clone();
    Resource::Workload(Object {
        metadata: Metadata { name: name.into(), namespace, labels: labels.clone(), ..Metadata::default() },
        spec: WorkloadSpec {
            host: host.into(),
            addresses: addresses.clone(),
            interface: interfaces.first().map(|(_, name)| name.clone()),
            source: Some(source.into()),
            facts: facts.with_fallback(host_facts),
            ports,
            service_account,
        },
    })
}

fn add(locals: &mut Locals, resource: Resource, found: &FoundWorkload, heritage: &Heritage) {
    let Some(mut entity) = Entity::of(&resource) else { return };
    heritage.complete(&mut entity);
    if let Some((inode, _)) = &found.group {
        let attachment = Attachment::Cgroup(*inode);
        let mut entity = entity.clone();
        // Known on this host only: to others it is its host's addresses.
        entity.prefixes.extend(attachment.own_address().map(Prefix::host));
        let endpoint = LocalEndpoint { entity, attachment };
        locals.endpoints.insert(Arc::clone(&endpoint.entity.name), endpoint);
    }
    for (number, (ifindex, interface)) in found.interfaces.iter().enumerate() {
        let mut entity = entity.clone();
        if number > 0 {
            entity.name = format!("{}%{interface}", entity.name).into();
        }
        debug_assert!(entity.prefixes.iter().copied().all(Prefix::is_host));
        let endpoint = LocalEndpoint { entity, attachment: Attachment::Interface(*ifindex) };
        locals.endpoints.insert(Arc::clone(&endpoint.entity.name), endpoint);
    }
    locals.workloads.insert(resource.key().qualified_name(), resource);
}

#[cfg(test)]
mod tests {
    use bulkhead_model::Selector;

    use super::*;

    fn found(name: &str, ifindex: u32) -> Found {
        let workload = FoundWorkload {
            name: name.into(),
            labels: bulkhead_model::Labels::new(),
            addresses: vec!["10.0.0.1".parse().unwrap()],
            interfaces: vec![(ifindex, format!("veth{ifindex}")), (ifindex + 1, "veth-b".into())],
            group: None,
            facts: Facts::new(),
            identity: Identity::default(),
        };
        Found { workloads: vec![workload], ..Found::default() }
    }

    #[test]
    fn a_name_claimed_twice_stays_with_the_first_and_is_told() {
        let sources =
            BTreeMap::from([("docker".to_owned(), found("web", 3)), ("manual".to_owned(), found("web", 7))]);
        let locals = assemble("h", &Facts::new(), &sources, &Heritage::default());
        assert_eq!(locals.workloads.keys().collect::<Vec<_>>(), ["web.h"]);
        let names: Vec<_> = locals.endpoints.keys().map(AsRef::as_ref).collect();
        assert_eq!(names, ["Workload/web.h", "Workload/web.h%veth-b"]);
        assert_eq!(locals.not_managed.len(), 1);
    }

    #[test]
    fn a_workload_carries_the_facts_of_its_host_here_and_for_others() {
        let (host, _) = Facts::from_observed([("host.kernel", "5.10.0-21-amd64"), ("os.id", "debian")]);
        let mut sources = BTreeMap::from([("docker".to_owned(), found("web", 3))]);
        let workload = &mut sources.get_mut("docker").unwrap().workloads[0];
        workload.facts.insert("image.tag", "1.25").unwrap();
        workload.facts.insert("os.id", "alpine").unwrap();
        // Nobody talks a host's kernel newer than it is.
        workload.labels.insert("host.kernel", "9.9").unwrap();
        let locals = assemble("h", &host, &sources, &Heritage::default());
        let endpoint = &locals.endpoints["Workload/web.h"].entity;
        for text in ["host.kernel < version('5.11')", "os.id == 'alpine'", "image.tag == '1.25'"] {
            assert!(Selector::parse(text).unwrap().matches(&endpoint.labels), "{text}: {}", endpoint.labels);
        }
        // What the repository and so all others are told is the same.
        let told = Resource::from_json(&locals.workloads["web.h"].to_json()).unwrap();
        assert_eq!(Entity::of(&told).unwrap().labels, endpoint.labels);
    }
}
