//! What an object means: the tiers, policies and entities that it stands for, and what others inherit from it.
//!
//! Every kind, ours or foreign, is read into these few things. The rest of Bulkhead knows nothing else.

use std::borrow::Cow;
use std::net::IpAddr;

use crate::address::Prefix;
use crate::entity::Entity;
use crate::labels::{
    DOMAIN_LABEL, Labels, NAMESPACE_LABELS_PREFIX, PROFILE_LABELS_PREFIX, SERVICE_ACCOUNT_LABELS_PREFIX,
};
use crate::policy::{PolicySpec, TierSpec};
use crate::resource::{ObjectKey, Resource};
use crate::settings::SettingsSpec;
use crate::verdict::Verdict;

/// What one object stands for.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Meaning {
    /// Tiers by name.
    pub tiers: Vec<(String, TierSpec)>,
    /// Policies; the key is the object's own or, where it stands for several, begins with its name.
    pub policies: Vec<(ObjectKey, PolicySpec)>,
    /// Things with addresses, before [`Entity::inherit`].
    pub entities: Vec<Entity>,
    /// What others inherit from it.
    pub bequests: Vec<Bequest>,
    /// What holds for the whole repository.
    pub settings: Option<SettingsSpec>,
}

/// Whom an entity inherits from.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Parent {
    /// The namespace of this name.
    Namespace(String),
    /// The service account of this namespace and name.
    ServiceAccount(String, String),
    /// The profile of this name (Calico).
    Profile(String),
}

/// What is inherited.
#[derive(Debug, Clone, PartialEq)]
pub struct Bequest {
    /// By whoever has this parent.
    pub from: Parent,
    /// Labels, with the prefix that keeps them apart from the heir's own.
    pub labels: Labels,
    /// What happens to an heir's connections where no tier decided.
    pub posture: Option<Verdict>,
}

impl Bequest {
    /// The labels of a namespace, for what is in it.
    pub fn of_namespace(name: &str, labels: &Labels, posture: Option<Verdict>) -> Self {
        let labels = labels.with_prefix(NAMESPACE_LABELS_PREFIX);
        Self { from: Parent::Namespace(name.into()), labels, posture }
    }

    /// What Calico makes of every namespace: a profile that allows everything. Its labels come with the namespace.
    pub(crate) fn of_namespace_profile(name: &str) -> Self {
        let from = Parent::Profile(format!("kns.{name}"));
        Self { from, labels: Labels::new(), posture: Some(Verdict::Allow) }
    }

    /// What Calico makes of every service account: a profile without rules.
    pub(crate) fn of_service_account_profile(namespace: &str, name: &str) -> Self {
        let from = Parent::Profile(format!("ksa.{namespace}.{name}"));
        Self { from, labels: Labels::new(), posture: None }
    }

    /// The labels of a service account, for what runs under it.
    pub fn of_service_account(namespace: &str, name: &str, labels: &Labels) -> Self {
        let labels = labels.with_prefix(SERVICE_ACCOUNT_LABELS_PREFIX);
        Self { from: Parent::ServiceAccount(namespace.into(), name.into()), labels, posture: None }
    }
}

/// The label that says that the profile at this place (from 0) of an entity's list is this one.
pub fn profile_label(place: usize) -> String {
    format!("{PROFILE_LABELS_PREFIX}{place}")
}

/// The part of an object that is known by a DNS name.
pub(crate) fn domain_entity(key: &ObjectKey, domain: &str, addresses: &[IpAddr]) -> Entity {
    let mut labels = Labels::new();
    // Validated as a name, so an acceptable value.
    let _ = labels.insert_any(crate::labels::KIND_LABEL, key.kind.as_str());
    let _ = labels.insert_any(DOMAIN_LABEL, domain);
    Entity {
        name: format!("{key}#{domain}").into(),
        labels,
        prefixes: addresses.iter().copied().map(Prefix::host).collect(),
        ..Entity::default()
    }
}

impl Resource {
    /// Names of the tiers that it makes.
    pub fn tiers_made(&self) -> impl Iterator<Item = &str> {
        let (own, foreign): (Option<&str>, &[_]) = match self {
            Self::Tier(tier) => (Some(&tier.metadata.name), &[]),
            Self::Foreign(foreign) => (None, &foreign.meaning.tiers),
            _ => (None, &[]),
        };
        own.into_iter().chain(foreign.iter().map(|(name, _)| name.as_str()))
    }

    /// Names of the tiers that its policies are in.
    pub fn tiers_used(&self) -> impl Iterator<Item = &str> {
        let (own, foreign): (Option<&str>, &[_]) = match self {
            Self::Policy(policy) => (Some(&policy.spec.tier), &[]),
            Self::Foreign(foreign) => (None, &foreign.meaning.policies),
            _ => (None, &[]),
        };
        own.into_iter().chain(foreign.iter().map(|(_, spec)| spec.tier.as_str()))
    }

    /// What it stands for.
    pub fn meaning(&self) -> Cow<'_, Meaning> {
        let nothing = Meaning::default();
        let meaning = match self {
            Self::Foreign(foreign) => return Cow::Borrowed(&foreign.meaning),
            Self::Tier(tier) => {
                Meaning { tiers: vec![(tier.metadata.name.clone(), tier.spec.clone())], ..nothing }
            }
            Self::Policy(policy) => Meaning { policies: vec![(self.key(), policy.spec.clone())], ..nothing },
            Self::Namespace(namespace) => {
                let (name, labels) = (&namespace.metadata.name, &namespace.metadata.labels);
                let bequest = Bequest::of_namespace(name, labels, namespace.spec.default_posture);
                Meaning { bequests: vec![bequest], ..nothing }
            }
            Self::Settings(settings) => Meaning { settings: Some(settings.spec.clone()), ..nothing },
            Self::NameTable(table) => {
                let key = self.key();
                let names = table.spec.names.iter();
                let entities = names.map(|(name, addresses)| domain_entity(&key, name, addresses)).collect();
                Meaning { entities, ..nothing }
            }
            // Of nothing that agents enforce.
            Self::RoleBinding(_) => nothing,
            Self::NetworkSet(_) | Self::Workload(_) | Self::Host(_) | Self::HostEndpoint(_) => {
                Meaning { entities: Entity::of(self).into_iter().collect(), ..nothing }
            }
        };
        Cow::Owned(meaning)
    }
}
