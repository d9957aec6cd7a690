//! The kinds of objects: Bulkhead's own, and those of Kubernetes and Calico that it understands.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Whether objects of a kind lie in namespaces.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// Never.
    Fleet,
    /// Always; where it is left out, in `default`.
    Namespaced,
    /// If the object says so.
    Either,
}

/// What there is to know of a kind.
#[derive(Debug, Clone, Copy)]
struct Info {
    kind: Kind,
    /// `apiVersion` of manifests; the first is the one that is written.
    api_versions: &'static [&'static str],
    /// `kind` of manifests.
    manifest: &'static str,
    /// Unique name.
    name: &'static str,
    /// As in URLs, unique.
    plural: &'static str,
    short: &'static [&'static str],
    scope: Scope,
}

macro_rules! kinds {
    ($($(#[$doc:meta])* $kind:ident: $versions:expr, $manifest:literal, $name:literal, $plural:literal, $short:expr, $scope:ident;)*) => {
        /// The kinds of objects, in the order in which they are applied.
        ///
        /// INVARIANT: policies of one tier and order are sorted by kind (DESIGN 4.2), which is this order.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Kind { $($(#[$doc])* $kind,)* }

        /// In the order of the enum.
        const INFOS: &[Info] = &[$(Info {
            kind: Kind::$kind,
            api_versions: $versions,
            manifest: $manifest,
            name: $name,
            plural: $plural,
            short: $short,
            scope: Scope::$scope,
        },)*];

        impl Kind {
            /// All kinds.
            pub const ALL: &'static [Self] = &[$(Self::$kind,)*];
        }
    };
}

/// `apiVersion` of Bulkhead's own kinds.
pub const API_VERSION: &str = "bulkhead.dev/v1";
const OWN: &[&str] = &[API_VERSION];
const CORE: &[&str] = &["v1"];
const DISCOVERY: &[&str] = &["discovery.k8s.io/v1"];
const NETWORKING: &[&str] = &["networking.k8s.io/v1"];
const CLUSTER: &[&str] = &["policy.networking.k8s.io/v1alpha2"];
const ADMIN: &[&str] = &["policy.networking.k8s.io/v1alpha1"];
const CALICO: &[&str] = &["projectcalico.org/v3", "crd.projectcalico.org/v1"];

kinds! {
    /// What holds for the whole repository.
    Settings: OWN, "Settings", "Settings", "settings", &[], Fleet;
    /// Ordered group of policies.
    Tier: OWN, "Tier", "Tier", "tiers", &[], Fleet;
    /// A name space for workloads and policies, whose labels they inherit.
    Namespace: OWN, "Namespace", "Namespace", "namespaces", &["ns"], Fleet;
    /// Labelled list of address blocks outside the fleet.
    NetworkSet: OWN, "NetworkSet", "NetworkSet", "networksets", &["netset"], Either;
    /// Addresses of DNS names.
    NameTable: OWN, "NameTable", "NameTable", "nametables", &["names"], Fleet;
    /// Rules bound to endpoints by a selector.
    Policy: OWN, "Policy", "Policy", "policies", &["pol"], Either;
    /// A host's own interfaces as a subject of policy.
    HostEndpoint: OWN, "HostEndpoint", "HostEndpoint", "hostendpoints", &["hep"], Fleet;
    /// A machine with an agent. Written by the controller.
    Host: OWN, "Host", "Host", "hosts", &[], Fleet;
    /// Anything with addresses and labels that runs on a host. Written by agents.
    Workload: OWN, "Workload", "Workload", "workloads", &["wl"], Either;
    /// Who may do what with the repository.
    RoleBinding: OWN, "RoleBinding", "RoleBinding", "rolebindings", &["rb"], Fleet;

    /// Kubernetes' Namespace.
    KubernetesNamespace: CORE, "Namespace", "Namespace.kubernetes.io", "namespaces.kubernetes.io", &[], Fleet;
    /// Kubernetes' ServiceAccount.
    ServiceAccount: CORE, "ServiceAccount", "ServiceAccount", "serviceaccounts", &["sa"], Namespaced;
    /// Kubernetes' Node.
    Node: CORE, "Node", "Node", "nodes", &["no"], Fleet;
    /// Kubernetes' Pod.
    Pod: CORE, "Pod", "Pod", "pods", &["po"], Namespaced;
    /// Kubernetes' Service.
    Service: CORE, "Service", "Service", "services", &["svc"], Namespaced;
    /// Kubernetes' EndpointSlice.
    EndpointSlice: DISCOVERY, "EndpointSlice", "EndpointSlice", "endpointslices", &[], Namespaced;
    /// Kubernetes' NetworkPolicy.
    NetworkPolicy: NETWORKING, "NetworkPolicy", "NetworkPolicy", "networkpolicies", &["netpol"], Namespaced;
    /// Kubernetes' ClusterNetworkPolicy.
    ClusterNetworkPolicy: CLUSTER, "ClusterNetworkPolicy", "ClusterNetworkPolicy", "clusternetworkpolicies", &["cnp"], Fleet;
    /// Kubernetes' AdminNetworkPolicy.
    AdminNetworkPolicy: ADMIN, "AdminNetworkPolicy", "AdminNetworkPolicy", "adminnetworkpolicies", &["anp"], Fleet;
    /// Kubernetes' BaselineAdminNetworkPolicy.
    BaselineAdminNetworkPolicy: ADMIN, "BaselineAdminNetworkPolicy", "BaselineAdminNetworkPolicy", "baselineadminnetworkpolicies", &["banp"], Fleet;

    /// Calico's Tier.
    CalicoTier: CALICO, "Tier", "Tier.projectcalico.org", "tiers.projectcalico.org", &[], Fleet;
    /// Calico's Profile.
    Profile: CALICO, "Profile", "Profile", "profiles", &[], Fleet;
    /// Calico's NetworkSet.
    CalicoNetworkSet: CALICO, "NetworkSet", "NetworkSet.projectcalico.org", "networksets.projectcalico.org", &[], Namespaced;
    /// Calico's GlobalNetworkSet.
    GlobalNetworkSet: CALICO, "GlobalNetworkSet", "GlobalNetworkSet", "globalnetworksets", &["gns"], Fleet;
    /// Calico's HostEndpoint.
    CalicoHostEndpoint: CALICO, "HostEndpoint", "HostEndpoint.projectcalico.org", "hostendpoints.projectcalico.org", &[], Fleet;
    /// Calico's WorkloadEndpoint.
    WorkloadEndpoint: CALICO, "WorkloadEndpoint", "WorkloadEndpoint", "workloadendpoints", &["wep"], Namespaced;
    /// Calico's NetworkPolicy.
    CalicoNetworkPolicy: CALICO, "NetworkPolicy", "NetworkPolicy.projectcalico.org", "networkpolicies.projectcalico.org", &["caliconp"], Namespaced;
    /// Calico's GlobalNetworkPolicy.
    GlobalNetworkPolicy: CALICO, "GlobalNetworkPolicy", "GlobalNetworkPolicy", "globalnetworkpolicies", &["gnp"], Fleet;
    /// Calico's StagedNetworkPolicy.
    StagedNetworkPolicy: CALICO, "StagedNetworkPolicy", "StagedNetworkPolicy", "stagednetworkpolicies", &["snp"], Namespaced;
    /// Calico's StagedGlobalNetworkPolicy.
    StagedGlobalNetworkPolicy: CALICO, "StagedGlobalNetworkPolicy", "StagedGlobalNetworkPolicy", "stagedglobalnetworkpolicies", &["sgnp"], Fleet;
    /// Calico's StagedKubernetesNetworkPolicy.
    StagedKubernetesNetworkPolicy: CALICO, "StagedKubernetesNetworkPolicy", "StagedKubernetesNetworkPolicy", "stagedkubernetesnetworkpolicies", &["sknp"], Namespaced;
}

impl Kind {
    fn info(self) -> &'static Info {
        &INFOS[self as usize]
    }

    /// Its unique name: the manifest's `kind`, followed by the group where two groups have one of that name.
    pub fn as_str(self) -> &'static str {
        self.info().name
    }

    /// `kind` of its manifests.
    pub fn manifest_kind(self) -> &'static str {
        self.info().manifest
    }

    /// `apiVersion` of its manifests.
    pub fn api_version(self) -> &'static str {
        self.info().api_versions[0]
    }

    /// As in URLs.
    pub fn plural(self) -> &'static str {
        self.info().plural
    }

    /// As in URLs below its group: the plural without the group.
    pub fn resource(self) -> &'static str {
        self.plural().split('.').next().unwrap_or_default()
    }

    /// Every `apiVersion` that its manifests may have, the one that is written first.
    pub fn manifest_versions(self) -> &'static [&'static str] {
        self.info().api_versions
    }

    /// Short forms for the command line.
    pub fn short(self) -> &'static [&'static str] {
        self.info().short
    }

    /// Whether its objects lie in namespaces.
    pub fn scope(self) -> Scope {
        self.info().scope
    }

    /// Whether it is one of Bulkhead's own.
    pub fn is_own(self) -> bool {
        self.api_version() == API_VERSION
    }

    /// From any spelling: kind, singular, plural or short form, in any case.
    pub fn parse(text: &str) -> Option<Self> {
        let lower = text.to_ascii_lowercase();
        let info = INFOS.iter().find(|info| {
            lower == info.name.to_ascii_lowercase()
                || lower == info.plural
                || info.short.contains(&lower.as_str())
        });
        info.map(|info| info.kind)
    }

    /// From the `apiVersion` and `kind` of a manifest.
    pub fn of_manifest(api_version: &str, kind: &str) -> Option<Self> {
        let info =
            INFOS.iter().find(|info| info.manifest == kind && info.api_versions.contains(&api_version));
        info.map(|info| info.kind)
    }

    /// Kinds that manifests of an `apiVersion` can have.
    pub fn of_api_version(api_version: &str) -> impl Iterator<Item = Self> {
        INFOS.iter().filter(move |info| info.api_versions.contains(&api_version)).map(|info| info.kind)
    }

    /// The kind that is served below an `apiVersion` under this name.
    pub fn of_resource(api_version: &str, resource: &str) -> Option<Self> {
        Self::of_api_version(api_version).find(|kind| kind.resource() == resource)
    }

    /// Every known `apiVersion`.
    pub fn api_versions() -> impl Iterator<Item = &'static str> {
        [OWN, CORE, DISCOVERY, NETWORKING, CLUSTER, ADMIN, CALICO].into_iter().flatten().copied()
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl Serialize for Kind {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}

impl<'de> Deserialize<'de> for Kind {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let exact = INFOS.iter().find(|info| info.name == text).map(|info| info.kind);
        exact.ok_or_else(|| serde::de::Error::custom(format!("there is no kind {text:?}")))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_spelling_leads_to_one_kind() {
        let mut spellings = BTreeSet::new();
        for kind in Kind::ALL {
            assert_eq!(INFOS[*kind as usize].kind, *kind);
            assert_eq!(Kind::parse(kind.as_str()), Some(*kind));
            assert_eq!(Kind::parse(kind.plural()), Some(*kind));
            assert_eq!(Kind::of_manifest(kind.api_version(), kind.manifest_kind()), Some(*kind));
            for version in kind.manifest_versions() {
                assert_eq!(Kind::of_resource(version, kind.resource()), Some(*kind));
            }
            for text in [kind.as_str().to_ascii_lowercase(), kind.plural().into()]
                .into_iter()
                .chain(kind.short().iter().map(|short| (*short).to_owned()))
                .collect::<BTreeSet<_>>()
            {
                assert!(spellings.insert(text.clone()), "{text}");
            }
        }
    }

    #[test]
    fn a_name_that_two_groups_use_is_told_apart_by_the_group() {
        assert_eq!(Kind::parse("networkpolicies"), Some(Kind::NetworkPolicy));
        assert_eq!(Kind::parse("networkpolicies.projectcalico.org"), Some(Kind::CalicoNetworkPolicy));
        assert_eq!(Kind::of_manifest("crd.projectcalico.org/v1", "Tier"), Some(Kind::CalicoTier));
        assert_eq!(Kind::of_manifest("v1", "Secret"), None);
    }
}
