//! From what the sources found to endpoints and inventory: pure.

use std::collections::BTreeMap;
use std::sync::Arc;

use bulkhead_discover::{Found, FoundWorkload, NotManaged};
use bulkhead_engine::{Heritage, LocalEndpoint};
use bulkhead_model::entity::WorkloadSpec;
use bulkhead_model::resource::{Metadata, Object, is_name};
use bulkhead_model::{Entity, Prefix, Resource};

/// What this host has: endpoints for the engine and workloads for the repository.
#[derive(Debug, Default, Clone, PartialEq)]
pub(crate) struct Locals {
    /// By entity name. A workload with several interfaces is several endpoints.
    pub(crate) endpoints: BTreeMap<Arc<str>, LocalEndpoint>,
    /// By name in the repository.
    pub(crate) workloads: BTreeMap<String, Resource>,
    /// What could not be taken in.
    pub(crate) not_managed: Vec<NotManaged>,
}

/// Puts together what all sources found, with what it inherits. Sources are asked in the order of their names; a name that two claim
/// stays with the first.
pub(crate) fn assemble(host: &str, sources: &BTreeMap<String, Found>, heritage: &Heritage) -> Locals {
    let mut locals = Locals::default();
    for (source, found) in sources {
        locals.not_managed.extend(found.not_managed.iter().cloned());
        for workload in &found.workloads {
            let name = format!("{}.{host}", workload.name);
            if locals.workloads.contains_key(&name) || !is_name(&name) {
                let reason = format!("the name {name:?} from {source} is taken or not valid");
                locals.not_managed.push(NotManaged { subject: workload.name.clone(), reason });
                continue;
            }
            add(&mut locals, host, source, name, workload, heritage);
        }
    }
    locals
}

fn add(
    locals: &mut Locals,
    host: &str,
    source: &str,
    name: String,
    workload: &FoundWorkload,
    heritage: &Heritage,
) {
    let FoundWorkload { name: _, labels, addresses, interfaces } = workload;
    let resource = Resource::Workload(Object {
        metadata: Metadata { name: name.clone(), labels: labels.clone(), ..Metadata::default() },
        spec: WorkloadSpec {
            host: host.into(),
            addresses: addresses.clone(),
            interface: interfaces.first().map(|(_, name)| name.clone()),
            source: Some(source.into()),
            ..WorkloadSpec::default()
        },
    });
    let Some(mut entity) = Entity::of(&resource) else { return };
    heritage.complete(&mut entity);
    for (number, (ifindex, interface)) in interfaces.iter().enumerate() {
        let mut entity = entity.clone();
        if number > 0 {
            entity.name = format!("{}%{interface}", entity.name).into();
        }
        debug_assert!(entity.prefixes.iter().copied().all(Prefix::is_host));
        let endpoint = LocalEndpoint { entity, ifindex: *ifindex };
        locals.endpoints.insert(Arc::clone(&endpoint.entity.name), endpoint);
    }
    locals.workloads.insert(name, resource);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(name: &str, ifindex: u32) -> Found {
        let workload = FoundWorkload {
            name: name.into(),
            labels: bulkhead_model::Labels::new(),
            addresses: vec!["10.0.0.1".parse().unwrap()],
            interfaces: vec![(ifindex, format!("veth{ifindex}")), (ifindex + 1, "veth-b".into())],
        };
        Found { workloads: vec![workload], ..Found::default() }
    }

    #[test]
    fn a_name_claimed_twice_stays_with_the_first_and_is_told() {
        let sources =
            BTreeMap::from([("docker".to_owned(), found("web", 3)), ("manual".to_owned(), found("web", 7))]);
        let locals = assemble("h", &sources, &Heritage::default());
        assert_eq!(locals.workloads.keys().collect::<Vec<_>>(), ["web.h"]);
        let names: Vec<_> = locals.endpoints.keys().map(AsRef::as_ref).collect();
        assert_eq!(names, ["Workload/web.h", "Workload/web.h%veth-b"]);
        assert_eq!(locals.not_managed.len(), 1);
    }
}
