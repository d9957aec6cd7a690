//! What agents publish: the workloads of their own hosts, and nothing else.

use std::collections::{BTreeMap, BTreeSet};

use bulkhead_model::{Kind, ObjectKey, Resource};
use bulkhead_store::StoreError;
use bulkhead_wire::proto::{Inventory, InventoryAck, Refused};

use crate::context::Context;

/// Stores what is acceptable in one transaction, and says what is not.
pub(super) async fn take_in(
    context: &Context,
    host: &str,
    inventory: &Inventory,
) -> Result<InventoryAck, StoreError> {
    let Inventory { generation, complete, upserts, removes } = inventory;
    let mut accepted: BTreeMap<ObjectKey, Resource> = BTreeMap::new();
    let mut named: BTreeSet<String> = BTreeSet::new();
    let mut refused = Vec::new();
    for bytes in upserts {
        match check(bytes, host) {
            Ok(resource) => {
                named.insert(resource.key().qualified_name());
                accepted.insert(resource.key(), resource);
            }
            Err(refusal) => {
                // A workload that is there but wrongly described keeps its last good description.
                named.insert(refusal.name.clone());
                refused.push(refusal);
            }
        }
    }
    let mut gone = BTreeSet::new();
    for name in removes {
        match check_removal(context, name, host) {
            Ok(Some(key)) if !accepted.contains_key(&key) => {
                gone.insert(key);
            }
            Ok(_) => {}
            Err(refusal) => refused.push(refusal),
        }
    }
    if *complete {
        let others = published_by(context, host);
        gone.extend(others.into_iter().filter(|key| !named.contains(&key.qualified_name())));
    }
    if !refused.is_empty() {
        context.metrics.workloads_refused.add(refused.len() as u64);
        tracing::warn!(%host, count = refused.len(), first = %refused[0].reason, "workloads were refused");
    }
    let (upserts, removes) = (accepted.into_values().collect(), gone.into_iter().collect());
    context.repository.publish(upserts, removes).await?;
    Ok(InventoryAck { generation: *generation, refused })
}

/// The workloads of a host that its agent has published: those with its name.
pub(crate) fn published_by(context: &Context, host: &str) -> Vec<ObjectKey> {
    let view = context.repository.view();
    let keys = view.workloads_of(host).map(|object| object.resource.key());
    keys.filter(|key| is_of(&key.name, host)).collect()
}

/// Whether a name is `NAME.HOST`.
fn is_of(name: &str, host: &str) -> bool {
    name.strip_suffix(host).and_then(|name| name.strip_suffix('.')).is_some_and(|name| !name.is_empty())
}

fn check(bytes: &[u8], host: &str) -> Result<Resource, Refused> {
    let refused = |reason: String| Refused { name: name_in(bytes), reason };
    let resource = Resource::from_json_text(bytes).map_err(|problems| {
        refused(problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))
    })?;
    let Resource::Workload(workload) = &resource else {
        return Err(refused(format!("an agent publishes workloads, not a {}", resource.kind())));
    };
    if workload.spec.host != host {
        return Err(refused(format!(
            "it is on host {:?}, and this is the agent of {host:?}",
            workload.spec.host
        )));
    }
    if !is_of(&workload.metadata.name, host) {
        return Err(refused(format!("its name must be NAME.{host}")));
    }
    Ok(resource)
}

/// What a workload is called that may be no workload: `NAME` or `NAMESPACE/NAME`, empty if it has none.
pub(crate) fn name_in(bytes: &[u8]) -> String {
    let json: serde_json::Value = serde_json::from_slice(bytes).unwrap_or_default();
    let name = json["metadata"]["name"].as_str().unwrap_or_default().to_owned();
    match json["metadata"]["namespace"].as_str() {
        Some(namespace) => format!("{namespace}/{name}"),
        None => name,
    }
}

fn check_removal(context: &Context, name: &str, host: &str) -> Result<Option<ObjectKey>, Refused> {
    let (namespace, short) = match name.split_once('/') {
        Some((namespace, short)) => (Some(namespace.to_owned()), short),
        None => (None, name),
    };
    let key = ObjectKey { kind: Kind::Workload, namespace, name: short.to_owned() };
    match context.repository.view().get(&key).map(|object| &object.resource) {
        Some(Resource::Workload(workload)) if workload.spec.host != host => Err(Refused {
            name: name.to_owned(),
            reason: format!("it is on host {:?}, and this is the agent of {host:?}", workload.spec.host),
        }),
        Some(_) => Ok(Some(key)),
        None => Ok(None),
    }
}
