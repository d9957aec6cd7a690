//! What a caller may do: the sum of the role bindings that name it, or one of its groups.

use std::collections::BTreeSet;

use bulkhead_model::roles::Role;
use bulkhead_model::{Kind, ObjectKey, Resource};

use super::caller::{Caller, Who};
use crate::repository::View;

/// What somebody may do.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Permissions {
    role: Option<Role>,
    /// Namespaces that somebody may read who may not read everything.
    sees: BTreeSet<String>,
    /// Where an editor may edit; no more than his bindings say.
    scopes: Vec<Scope>,
}

/// Tiers and namespaces of one binding; `None`: all.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Scope {
    tiers: Option<BTreeSet<String>>,
    namespaces: Option<BTreeSet<String>>,
}

impl Permissions {
    /// Of a caller, as the repository's bindings are now.
    pub(crate) fn of(view: &View, caller: &Caller) -> Self {
        if caller.is_admin() {
            return Self { role: Some(Role::Admin), ..Self::default() };
        }
        let user = match &caller.who {
            Who::Operator(name) => name.clone(),
            Who::Local { .. } => caller.name(),
            // They ask each other what only one of them knows.
            Who::Controller(_) => return Self { role: Some(Role::Viewer), ..Self::default() },
            Who::Agent(_) | Who::Relay(_) | Who::Nobody => return Self::default(),
        };
        let mut permissions = Self::default();
        for object in view.of_kind(Kind::RoleBinding) {
            let Resource::RoleBinding(binding) = &object.resource else { continue };
            let spec = &binding.spec;
            if !spec.binds(&user, caller.groups.iter().map(String::as_str)) {
                continue;
            }
            if let (Role::Viewer, Some(namespaces)) = (spec.role, &spec.namespaces) {
                permissions.sees.extend(namespaces.iter().cloned());
                continue;
            }
            permissions.role = permissions.role.max(Some(spec.role));
            if spec.role == Role::Editor {
                let set =
                    |names: &Option<Vec<String>>| names.as_ref().map(|all| all.iter().cloned().collect());
                let scope = Scope { tiers: set(&spec.tiers), namespaces: set(&spec.namespaces) };
                permissions.scopes.push(scope);
            }
        }
        permissions
    }

    /// The highest role that holds in all namespaces; an editor's bindings say where he may edit, and he may read everything.
    pub(crate) fn role(&self) -> Option<Role> {
        self.role
    }

    /// What he is, for people.
    pub(crate) fn title(&self) -> Option<String> {
        let seen = || self.sees.iter().map(String::as_str).collect::<Vec<_>>().join(", ");
        match self.role {
            Some(role) => Some(format!("the role {}", role.as_str())),
            None if self.sees.is_empty() => None,
            None => Some(format!("the role {} in namespaces {}", Role::Viewer.as_str(), seen())),
        }
    }

    /// Whether he may read what is in a namespace; `None`: what is in none, or in all.
    pub(crate) fn may_read(&self, namespace: Option<&str>) -> bool {
        self.role >= Some(Role::Viewer) || namespace.is_some_and(|name| self.sees.contains(name))
    }

    /// Whether a change of an object is allowed; if not, why.
    pub(crate) fn may_change(
        &self,
        key: &ObjectKey,
        before: Option<&Resource>,
        after: Option<&Resource>,
    ) -> Result<(), String> {
        let allowed = match self.role {
            None | Some(Role::Viewer) => false,
            Some(Role::Admin) => true,
            Some(Role::Operator) => !matches!(key.kind, Kind::RoleBinding | Kind::Settings),
            // What it was must be his to change as well as what it becomes.
            Some(Role::Editor) => {
                [before, after].into_iter().flatten().all(|resource| self.may_edit(key, resource))
            }
        };
        if allowed {
            return Ok(());
        }
        let role = self.role.map_or_else(|| "without a role".into(), |role| format!("as {}", role.as_str()));
        Err(format!("{key} may not be changed {role}"))
    }

    /// Whether some object of a kind may be changed in a namespace, or in none: which, [`Permissions::may_change`] knows.
    pub(crate) fn could_change(&self, kind: Kind, namespace: Option<&str>) -> bool {
        self.could(kind, |scope| match (&scope.namespaces, namespace) {
            (None, _) => true,
            (Some(names), Some(namespace)) => names.contains(namespace),
            (Some(_), None) => false,
        })
    }

    /// The same, wherever they lie.
    pub(crate) fn could_change_everywhere(&self, kind: Kind) -> bool {
        self.could(kind, |scope| scope.namespaces.is_none())
    }

    fn could(&self, kind: Kind, there: impl Fn(&Scope) -> bool) -> bool {
        match self.role {
            None | Some(Role::Viewer) => false,
            Some(Role::Admin) => true,
            Some(Role::Operator) => !matches!(kind, Kind::RoleBinding | Kind::Settings),
            Some(Role::Editor) => self.scopes.iter().any(|scope| {
                let owns_set = is_set(kind) && scope.namespaces.is_some() && scope.tiers.is_none();
                there(scope) && (is_policy(kind) || owns_set)
            }),
        }
    }

    fn may_edit(&self, key: &ObjectKey, resource: &Resource) -> bool {
        let tiers: BTreeSet<&str> = resource.tiers_used().collect();
        let is_policy = !tiers.is_empty() && resource.tiers_made().next().is_none();
        let is_set = is_set(key.kind);
        self.scopes.iter().any(|scope| {
            let in_namespace = match (&scope.namespaces, &key.namespace) {
                (None, _) => true,
                (Some(names), Some(namespace)) => names.contains(namespace),
                (Some(_), None) => false,
            };
            let in_tiers =
                scope.tiers.as_ref().is_none_or(|names| tiers.iter().all(|tier| names.contains(*tier)));
            // A set of a namespace is nobody else's; others may be read by every policy.
            let owns_set = is_set && scope.namespaces.is_some() && scope.tiers.is_none();
            in_namespace && ((is_policy && in_tiers) || owns_set)
        })
    }
}

fn is_set(kind: Kind) -> bool {
    matches!(kind, Kind::NetworkSet | Kind::CalicoNetworkSet)
}

/// Whether objects of a kind are policies, which lie in tiers.
fn is_policy(kind: Kind) -> bool {
    matches!(
        kind,
        Kind::Policy
            | Kind::NetworkPolicy
            | Kind::ClusterNetworkPolicy
            | Kind::AdminNetworkPolicy
            | Kind::BaselineAdminNetworkPolicy
            | Kind::CalicoNetworkPolicy
            | Kind::GlobalNetworkPolicy
            | Kind::StagedNetworkPolicy
            | Kind::StagedGlobalNetworkPolicy
            | Kind::StagedKubernetesNetworkPolicy
    )
}
