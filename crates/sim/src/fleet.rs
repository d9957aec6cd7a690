//! What the simulated fleet looks like: pure, and the same for the same sizes.
//!
//! * An application has [`APPLICATION_WORKLOADS`] workloads in slices of [`SLICE_WORKLOADS`], each slice on a host of its
//!   own. A host thus runs slices of several applications, and every two hosts share few of them.
//! * Each application is called by the next one and calls the one before. Its two policies say so: calls from its own
//!   workloads and from the caller's that are ready, calls to its own, to the callee's that are ready, and to the resolver.
//! * A change of one slice thus concerns the other hosts of its application, of its caller and of its callee: eleven.
//! * Application 0 is the monitoring. Everybody is selected by a policy that lets it in, so everybody reads its members.
//! * More policies than two for each application are further rules of the same applications.

use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;

use bulkhead_model::entity::WorkloadSpec;
use bulkhead_model::resource::{Metadata, Object};
use bulkhead_model::{Labels, Resource};
use serde_json::{Value, json};

/// Workloads of an application.
pub(crate) const APPLICATION_WORKLOADS: u32 = 20;
/// Workloads of an application on one host.
pub(crate) const SLICE_WORKLOADS: u32 = 5;
/// Hosts of an application.
const SLICES: u32 = APPLICATION_WORKLOADS / SLICE_WORKLOADS;
/// The application that everybody reads.
pub(crate) const MONITORING: u32 = 0;
/// Steps by which the slices are dealt to the hosts: a round each, so that neighbours of one are not those of the next.
const STRIDES: [u32; 8] = [1, 7919, 6151, 4099, 3079, 2053, 1543, 1031];
/// One agent of so many reads slowly on purpose.
const SLOW_OF: u32 = 200;
/// Policies that select every workload.
const OF_EVERYBODY: u32 = 2;

/// Sizes, and where things are.
#[derive(Debug, Clone)]
pub(crate) struct Fleet {
    pub(crate) agents: u32,
    pub(crate) applications: u32,
    pub(crate) policies: u32,
    hosts: Vec<Arc<str>>,
}

/// What a workload is at the moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Instance {
    /// Rises with each start; part of its address.
    pub(crate) generation: u32,
    /// Whether callers are let in and it may call.
    pub(crate) ready: bool,
}

/// Workloads of one application on one host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Slice(pub(crate) u32);

impl Slice {
    pub(crate) fn application(self) -> u32 {
        self.0 / SLICES
    }

    /// Numbers of its workloads.
    pub(crate) fn workloads(self) -> std::ops::Range<u32> {
        self.0 * SLICE_WORKLOADS..(self.0 + 1) * SLICE_WORKLOADS
    }

    pub(crate) fn of_workload(number: u32) -> Self {
        Self(number / SLICE_WORKLOADS)
    }
}

impl Fleet {
    pub(crate) fn new(agents: u32, workloads: u32, policies: u32) -> Self {
        let applications = (workloads / APPLICATION_WORKLOADS).max(1);
        let hosts = (0..agents).map(|number| format!("sim-{number:05}").into()).collect();
        Self { agents, applications, policies, hosts }
    }

    pub(crate) fn workloads(&self) -> u32 {
        self.applications * APPLICATION_WORKLOADS
    }

    pub(crate) fn slices(&self) -> impl Iterator<Item = Slice> + use<> {
        (0..self.applications * SLICES).map(Slice)
    }

    /// Slices of one application.
    pub(crate) fn slices_of(&self, application: u32) -> impl Iterator<Item = Slice> + use<> {
        (application * SLICES..(application + 1) * SLICES).map(Slice)
    }

    /// Number of the host that a slice is on.
    pub(crate) fn host_of(&self, slice: Slice) -> u32 {
        let (round, place) = (slice.0 / self.agents, slice.0 % self.agents);
        let coprime = |stride: &u32| greatest_common_divisor(*stride, self.agents) == 1;
        let strides: Vec<u32> = STRIDES.into_iter().filter(coprime).collect();
        let stride = u64::from(strides[round as usize % strides.len()]);
        let host = (u64::from(place) * stride + u64::from(round) * 7) % u64::from(self.agents);
        // Smaller than the number of agents.
        host as u32
    }

    /// Whether the agent of a host reads slowly on purpose; nobody waits for it.
    pub(crate) fn is_slow(host: u32) -> bool {
        host % SLOW_OF == SLOW_OF - 1
    }

    pub(crate) fn host(&self, number: u32) -> &Arc<str> {
        &self.hosts[number as usize]
    }

    /// Name of a workload in the repository.
    pub(crate) fn name(&self, number: u32) -> String {
        format!("w{number}.{}", self.host(self.host_of(Slice::of_workload(number))))
    }

    /// A workload as its agent publishes it.
    pub(crate) fn workload(&self, number: u32, instance: Instance) -> Resource {
        let slice = Slice::of_workload(number);
        let application = format!("a{}", slice.application());
        let state = if instance.ready { "ready" } else { "draining" };
        let labels = [("app", application.as_str()), ("state", state)];
        let (labels, _refused) = Labels::from_foreign(labels);
        let host = self.host(self.host_of(slice)).to_string();
        Resource::Workload(Object {
            metadata: Metadata { name: self.name(number), labels, ..Metadata::default() },
            spec: WorkloadSpec {
                host,
                addresses: vec![address(number, instance.generation)],
                source: Some("docker".into()),
                ..WorkloadSpec::default()
            },
        })
    }

    /// All that operators have written before the agents come.
    pub(crate) fn manifests(&self) -> impl Iterator<Item = Value> + '_ {
        let fixed = [
            json!({
                "apiVersion": "bulkhead.dev/v1", "kind": "NetworkSet",
                "metadata": { "name": "resolver", "labels": { "service": "dns" } },
                "spec": { "cidrs": ["2001:db8:53::/64", "192.0.2.53/32"] },
            }),
            policy("monitoring", "all()", &[rule("from", "app == 'a0'", "tcp/9100")], &[]),
            policy("names", "all()", &[], &[rule("to", "service == 'dns'", "udp/53")]),
        ];
        fixed
            .into_iter()
            .chain((0..self.policies.saturating_sub(OF_EVERYBODY)).map(|number| self.policy(number, 8080)))
    }

    /// Policies that may be changed.
    pub(crate) fn changeable(&self) -> u32 {
        self.policies.saturating_sub(OF_EVERYBODY)
    }

    /// One policy of an application; `port` is what is changed about it.
    pub(crate) fn policy(&self, number: u32, port: u16) -> Value {
        let (application, kind) = ((number / 2) % self.applications, number / 2 / self.applications);
        let own = format!("app == 'a{application}'");
        let ready = |other: u32| format!("app == 'a{other}' && state == 'ready'");
        let caller = ready((application + 1) % self.applications);
        let callee = ready((application + self.applications - 1) % self.applications);
        let tcp = format!("tcp/{port}");
        let name = format!("a{application}-{}{kind}", if number.is_multiple_of(2) { "in" } else { "out" });
        if number.is_multiple_of(2) {
            policy(&name, &own, &[rule("from", &own, &tcp), rule("from", &caller, "tcp/443")], &[])
        } else {
            policy(&name, &own, &[], &[rule("to", &own, &tcp), rule("to", &callee, "tcp/443")])
        }
    }
}

fn policy(name: &str, applies_to: &str, ingress: &[Value], egress: &[Value]) -> Value {
    let mut spec = json!({ "order": 100, "appliesTo": applies_to });
    if !ingress.is_empty() {
        spec["ingress"] = json!(ingress);
    }
    if !egress.is_empty() {
        spec["egress"] = json!(egress);
    }
    json!({ "apiVersion": "bulkhead.dev/v1", "kind": "Policy", "metadata": { "name": name }, "spec": spec })
}

fn rule(end: &str, selector: &str, port: &str) -> Value {
    json!({ "action": "Allow", end: { "selector": selector }, "ports": [port] })
}

/// The address of a workload's start: it tells who and which.
fn address(number: u32, generation: u32) -> IpAddr {
    let bits = 0xfd00_u128 << 112 | u128::from(number) << 32 | u128::from(generation);
    IpAddr::V6(Ipv6Addr::from_bits(bits))
}

/// Inverse of the address of a start: number and generation.
pub(crate) fn start_of(address: IpAddr) -> Option<(u32, u32)> {
    let IpAddr::V6(address) = address else { return None };
    let bits = address.to_bits();
    // Cutting off is what is meant.
    (bits >> 112 == 0xfd00).then_some(((bits >> 32) as u32, bits as u32))
}

/// Inverse of [`Fleet::name`] as an entity's.
pub(crate) fn number_of(entity: &str) -> Option<u32> {
    entity.strip_prefix("Workload/w")?.split_once('.')?.0.parse().ok()
}

fn greatest_common_divisor(a: u32, b: u32) -> u32 {
    if b == 0 { a } else { greatest_common_divisor(b, a % b) }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use super::*;

    #[test]
    fn applications_are_spread_and_hosts_are_even() {
        let fleet = Fleet::new(5000, 100_000, 10_000);
        let mut hosts: BTreeMap<u32, u32> = BTreeMap::new();
        for application in 0..fleet.applications {
            let on: BTreeSet<u32> = fleet.slices_of(application).map(|slice| fleet.host_of(slice)).collect();
            assert_eq!(on.len(), SLICES as usize, "{application}");
            on.into_iter().for_each(|host| *hosts.entry(host).or_default() += 1);
        }
        assert_eq!(hosts.len(), 5000);
        assert!(hosts.values().all(|slices| *slices == 4));
        assert_eq!(fleet.manifests().count(), 10_001);
    }

    #[test]
    fn starts_are_told_by_their_addresses_and_workloads_by_their_names() {
        assert_eq!(start_of(address(99_999, 7)), Some((99_999, 7)));
        assert_eq!(start_of("2001:db8::1".parse().unwrap()), None);
        let fleet = Fleet::new(10, 200, 20);
        assert_eq!(number_of(&format!("Workload/{}", fleet.name(123))), Some(123));
    }
}
