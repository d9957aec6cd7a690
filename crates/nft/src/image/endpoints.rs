//! What the sets hold of endpoints: few, so they are computed whole and compared.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use bulkhead_model::host_policy::{Attachment, CompiledId, CompiledPolicy, EndpointBinding, HostPolicy};
use bulkhead_model::verdict::Verdict;

use crate::elements::octets;
use crate::object::{Element, Set};
use crate::schema::{BOUND, FAMILIES, Family, OPEN_RECEIVERS, OPEN_SENDERS, RECEIVERS, SENDERS};

/// Elements by set.
pub(crate) type Content = BTreeMap<Set, BTreeMap<Vec<u8>, Vec<u8>>>;

/// Every set that this fills.
pub(crate) fn sets() -> Vec<Set> {
    let by_family = FAMILIES.iter().flat_map(|f| [f.ours, f.selves, f.egress, f.ingress, f.own]);
    by_family.chain([BOUND, SENDERS, RECEIVERS, OPEN_SENDERS, OPEN_RECEIVERS]).collect()
}

/// Whether a policy refuses nothing: then nothing has to be known of a packet to let it through.
fn is_open(policy: &CompiledPolicy) -> bool {
    let rows = std::iter::once(&policy.default_row).chain(policy.rows.values());
    rows.into_iter()
        .flat_map(|row| row.variants())
        .flat_map(|(_, columns)| columns.iter())
        .all(|column| column.cell.verdict == Verdict::Allow)
}

/// The content for the endpoints of interfaces in charge.
pub(crate) fn content(policy: &HostPolicy, attached: &BTreeSet<u32>) -> Content {
    let mut content: Content = sets().into_iter().map(|set| (set, BTreeMap::new())).collect();
    let mut open: BTreeMap<CompiledId, bool> = BTreeMap::new();
    let mut is_open =
        |id: CompiledId| *open.entry(id).or_insert_with(|| policy.policies.get(&id).is_some_and(is_open));
    // By index: of two interfaces that claim one address, the newer has it.
    let mut bindings: Vec<(u32, &EndpointBinding)> = policy
        .endpoints
        .values()
        .filter_map(|binding| match binding.attachment {
            Attachment::Interface(index) => Some((index, binding)),
            Attachment::Host(_) | Attachment::Forwarded(_) | Attachment::Cgroup(_) => None,
        })
        .filter(|(index, _)| attached.contains(index))
        .collect();
    bindings.sort_unstable_by_key(|(index, _)| *index);
    for (index, binding) in bindings {
        let mut put = |set: Set, key: Vec<u8>, data: Vec<u8>| {
            content.entry(set).or_default().insert(key, data);
        };
        let interface = index.to_ne_bytes().to_vec();
        let policies = [binding.ingress.0.to_be_bytes(), binding.egress.0.to_be_bytes()].concat();
        put(BOUND, interface.clone(), policies);
        let sides = [(binding.egress, SENDERS, OPEN_SENDERS), (binding.ingress, RECEIVERS, OPEN_RECEIVERS)];
        for (compiled, some, all) in sides {
            if compiled != CompiledId::NONE {
                put(some, interface.clone(), Vec::new());
                if is_open(compiled) {
                    put(all, interface.clone(), Vec::new());
                }
            }
        }
        for address in &binding.addresses {
            let family = family_of(*address);
            let bytes = octets(*address);
            put(family.own, [&interface[..], &bytes].concat(), Vec::new());
            put(family.ours, bytes.clone(), Vec::new());
            put(family.egress, bytes.clone(), binding.egress.0.to_be_bytes().to_vec());
            put(family.ingress, bytes.clone(), binding.ingress.0.to_be_bytes().to_vec());
            if binding.egress != CompiledId::NONE && binding.ingress != CompiledId::NONE {
                let others = binding.addresses.iter().filter(|other| other.is_ipv6() == address.is_ipv6());
                for other in others {
                    put(family.selves, [&bytes[..], &octets(*other)].concat(), Vec::new());
                }
            }
        }
    }
    content
}

pub(crate) fn family_of(address: IpAddr) -> &'static Family {
    &FAMILIES[usize::from(address.is_ipv6())]
}

pub(crate) fn element(key: &[u8], data: &[u8]) -> Element {
    Element::Key { key: key.to_vec(), data: data.to_vec() }
}
