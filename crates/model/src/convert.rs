//! Objects of other systems as Bulkhead's own, where they can be said in them without a change of meaning.

use crate::address::Prefix;
use crate::entity::{Entity, HostSpec, NetworkSetSpec, WorkloadSpec};
use crate::foreign::Foreign;
use crate::kind::Kind;
use crate::labels::{HOST_LABEL, KIND_LABEL, NAMESPACE_LABELS_PREFIX, SERVICE_ACCOUNT_LABEL};
use crate::meaning::{Bequest, Parent};
use crate::policy::PolicySpec;
use crate::resource::{Host, Metadata, Namespace, NetworkSet, Policy, Resource, Tier, Workload, is_name};
use crate::settings::NamespaceSpec;

/// Host of converted workloads whose own is not known.
const UNKNOWN_HOST: &str = "unknown";

/// Why an object stays as it is.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Kept {
    /// It is one of ours already.
    #[error("it is Bulkhead's own already")]
    Own,
    /// Bulkhead reads this kind as it is and has none like it.
    #[error("Bulkhead reads {0} as it is, and has no kind like it")]
    NoCounterpart(Kind),
    /// It means something that only its own kind can say.
    #[error("{0}")]
    Unsayable(String),
}

impl Resource {
    /// The same in Bulkhead's own kinds. Policies keep tier and order; where two of one tier have the same order, the
    /// names decide, which are others now.
    ///
    /// # Errors
    /// If it stays as it is.
    pub fn to_native(&self) -> Result<Vec<Self>, Kept> {
        let Self::Foreign(foreign) = self else { return Err(Kept::Own) };
        match foreign.kind {
            Kind::Profile | Kind::ServiceAccount | Kind::Service | Kind::EndpointSlice => {
                return Err(Kept::NoCounterpart(foreign.kind));
            }
            _ => {}
        }
        let mut native = Vec::new();
        for (name, spec) in &foreign.meaning.tiers {
            let metadata = Metadata { name: name.clone(), ..metadata(foreign) };
            native.push(Self::Tier(Tier { metadata, spec: spec.clone() }));
        }
        for (_, spec) in &foreign.meaning.policies {
            native.push(policy(foreign, spec)?);
        }
        for entity in &foreign.meaning.entities {
            native.push(self::entity(foreign, entity)?);
        }
        for bequest in &foreign.meaning.bequests {
            native.extend(namespace(foreign, bequest));
        }
        Ok(native)
    }
}

/// The labels that people set; what other systems note in annotations has no meaning here.
fn metadata(foreign: &Foreign) -> Metadata {
    let Metadata { name, namespace, labels, .. } = &foreign.metadata;
    Metadata {
        name: name.clone(),
        namespace: namespace.clone(),
        labels: labels.clone(),
        ..Metadata::default()
    }
}

/// Several kinds of policy can have one name: theirs is put before it.
fn policy(foreign: &Foreign, spec: &PolicySpec) -> Result<Resource, Kept> {
    let name = format!("{}.{}", foreign.kind.as_str().to_ascii_lowercase(), foreign.metadata.name);
    if !is_name(&name) {
        return Err(Kept::Unsayable(format!("{name:?} cannot be the name of a Policy")));
    }
    if spec.ingress.is_none() && spec.egress.is_none() {
        return Err(Kept::Unsayable("it speaks of no direction, so it means nothing".into()));
    }
    let metadata = Metadata { name, ..metadata(foreign) };
    Ok(Resource::Policy(Policy { metadata, spec: spec.clone() }))
}

fn entity(foreign: &Foreign, entity: &Entity) -> Result<Resource, Kept> {
    if entity.posture.is_some() || entity.parents.iter().any(|parent| matches!(parent, Parent::Profile(_))) {
        return Err(Kept::Unsayable(
            "its profiles decide where no tier does, which only Calico's kinds say".into(),
        ));
    }
    let mut metadata = metadata(foreign);
    // What the system itself labels is part of what selectors see.
    metadata.labels = entity.labels.without_reserved();
    let addresses = || entity.prefixes.iter().map(|prefix: &Prefix| prefix.address()).collect();
    let kind = entity.labels.get(KIND_LABEL).and_then(Kind::parse);
    Ok(match kind {
        Some(Kind::NetworkSet) => {
            if entity.prefixes.is_empty() {
                return Err(Kept::Unsayable("a NetworkSet of ours has one block at least".into()));
            }
            let spec = NetworkSetSpec { cidrs: entity.prefixes.clone() };
            Resource::NetworkSet(NetworkSet { metadata, spec })
        }
        Some(Kind::Host) => Resource::Host(Host {
            metadata,
            spec: HostSpec { addresses: addresses(), ..HostSpec::default() },
        }),
        Some(Kind::Workload) => {
            let host = entity.labels.get(HOST_LABEL).unwrap_or(UNKNOWN_HOST).to_owned();
            let spec = WorkloadSpec {
                host,
                addresses: addresses(),
                ports: entity.ports.clone(),
                service_account: entity.labels.get(SERVICE_ACCOUNT_LABEL).map(Into::into),
                ..WorkloadSpec::default()
            };
            Resource::Workload(Workload { metadata, spec })
        }
        _ => return Err(Kept::Unsayable("it has an address of its host and no policy of its own".into())),
    })
}

fn namespace(foreign: &Foreign, bequest: &Bequest) -> Option<Resource> {
    let Parent::Namespace(name) = &bequest.from else { return None };
    let mut metadata = Metadata { name: name.clone(), ..metadata(foreign) };
    for (key, value) in bequest.labels.iter() {
        let key = key.strip_prefix(NAMESPACE_LABELS_PREFIX).unwrap_or(key);
        // It was a label before it was left to others.
        let _ = metadata.labels.insert(key, value);
    }
    let spec = NamespaceSpec { default_posture: bequest.posture };
    Some(Resource::Namespace(Namespace { metadata, spec }))
}
