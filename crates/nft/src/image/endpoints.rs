//! What the sets hold of endpoints: few, so they are computed whole and compared.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use bulkhead_model::host_policy::{Attachment, CompiledId, CompiledPolicy, EndpointBinding, HostPolicy};
use bulkhead_model::verdict::Verdict;

use crate::elements::{self, octets};
use crate::groups::{Group, Groups};
use crate::object::{Element, Set};
use crate::schema::{
    self, BOUND, FAMILIES, FORWARDED, FORWARDED_EGRESS, FORWARDED_INGRESS, FORWARDED_NUMBERS, Family,
    GROUP_EGRESS, GROUP_INGRESS, GROUP_NUMBERS, GROUPS, HOST_EGRESS, HOST_INGRESS, HOST_INTERFACES, NAMED,
    NAMED_INGRESS, NAMES, OPEN_RECEIVERS, OPEN_SENDERS, RECEIVERS, SENDERS,
};

/// Key of what holds for all others.
const OTHERWISE: &[u8] = &[];

/// Elements by set.
pub(crate) type Content = BTreeMap<Set, BTreeMap<Vec<u8>, Vec<u8>>>;

/// Whether a policy refuses nothing: then nothing has to be known of a packet to let it through.
fn is_open(policy: &CompiledPolicy) -> bool {
    let rows = std::iter::once(&policy.default_row).chain(policy.rows.values());
    rows.into_iter()
        .flat_map(|row| row.variants())
        .flat_map(|(_, columns)| columns.iter())
        .all(|column| column.cell.verdict == Verdict::Allow)
}

/// The content for the endpoints in charge: the host itself always is.
pub(crate) fn content(policy: &HostPolicy, attached: &BTreeSet<u32>, groups: &Groups) -> Content {
    let mut content: Content = schema::endpoint_sets().map(|set| (set, BTreeMap::new())).collect();
    let mut open: BTreeMap<CompiledId, bool> = BTreeMap::new();
    let mut is_open =
        |id: CompiledId| *open.entry(id).or_insert_with(|| policy.policies.get(&id).is_some_and(is_open));
    // By index: of two endpoints that claim one address, the newer has it.
    let mut bindings: Vec<&EndpointBinding> = policy.endpoints.values().collect();
    bindings.sort_unstable_by_key(|binding| binding.attachment);
    for (inode, group) in groups {
        let mut put = |set: Set, key: Vec<u8>, data: Vec<u8>| {
            content.entry(set).or_default().insert(key, data);
        };
        let (id, number) = (schema::group_id(*inode), group_key(*inode));
        let outermost = Group::line(*inode, groups).last().copied().unwrap_or(*inode);
        put(GROUPS, id.clone(), Vec::new());
        put(GROUP_NUMBERS, id, [&number[..], &group.level.to_be_bytes()].concat());
        put(NAMED, number.clone(), Vec::new());
        put(NAMES, number, outermost.to_be_bytes().to_vec());
    }
    for binding in bindings {
        let mut put = |set: Set, key: Vec<u8>, data: Vec<u8>| {
            content.entry(set).or_default().insert(key, data);
        };
        match binding.attachment {
            Attachment::Interface(index) if attached.contains(&index) => {
                put_workload(index, binding, &mut is_open, &mut put);
            }
            Attachment::Host(index) => put_host(index, binding, &mut put),
            Attachment::Cgroup(inode) if groups.contains_key(&inode) => put_group(inode, binding, &mut put),
            Attachment::Forwarded(index) => put_forwarded(index, binding, &mut put),
            Attachment::Interface(_) | Attachment::Cgroup(_) => continue,
        }
        let policies = [binding.ingress.0.to_be_bytes(), binding.egress.0.to_be_bytes()].concat();
        put(BOUND, elements::attachment_key(binding.attachment), policies);
    }
    content
}

fn put_workload(
    index: u32,
    binding: &EndpointBinding,
    is_open: &mut dyn FnMut(CompiledId) -> bool,
    put: &mut dyn FnMut(Set, Vec<u8>, Vec<u8>),
) {
    let interface = index.to_ne_bytes().to_vec();
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

/// As labels and priorities have it.
fn group_key(inode: u32) -> Vec<u8> {
    (schema::GROUP | schema::group_number(inode)).to_be_bytes().to_vec()
}

fn put_group(inode: u32, binding: &EndpointBinding, put: &mut dyn FnMut(Set, Vec<u8>, Vec<u8>)) {
    let id = schema::group_id(inode);
    let ingress = binding.ingress.0.to_be_bytes().to_vec();
    put(GROUP_EGRESS, id.clone(), binding.egress.0.to_be_bytes().to_vec());
    put(GROUP_INGRESS, id, ingress.clone());
    put(NAMED_INGRESS, group_key(inode), ingress);
    for address in &binding.addresses {
        let key = [&elements::attachment_key(binding.attachment)[..], &octets(*address)].concat();
        put(family_of(*address).held, key, Vec::new());
    }
}

/// `index` 0: every interface that has none of its own.
fn put_forwarded(index: u32, binding: &EndpointBinding, put: &mut dyn FnMut(Set, Vec<u8>, Vec<u8>)) {
    let key = index.to_ne_bytes().to_vec();
    let number = schema::GROUP | schema::forwarded_number(index);
    put(FORWARDED, key.clone(), Vec::new());
    put(FORWARDED_EGRESS, key.clone(), binding.egress.0.to_be_bytes().to_vec());
    put(FORWARDED_INGRESS, key.clone(), binding.ingress.0.to_be_bytes().to_vec());
    put(FORWARDED_NUMBERS, key, number.to_be_bytes().to_vec());
    for address in &binding.addresses {
        let key = [&elements::attachment_key(binding.attachment)[..], &octets(*address)].concat();
        put(family_of(*address).held, key, Vec::new());
    }
}

/// The control groups that stand there.
pub(crate) fn groups(content: &Content) -> Groups {
    let read = |(id, data): (&Vec<u8>, &Vec<u8>)| {
        let inode = u32::try_from(u64::from_ne_bytes(id.as_slice().try_into().ok()?)).ok()?;
        let level = elements::number(data.get(4..)?)?;
        Some((inode, Group::find(inode).unwrap_or(Group { level, around: Vec::new() })))
    };
    content.get(&GROUP_NUMBERS).into_iter().flatten().filter_map(read).collect()
}

/// `index` 0: every interface that no other endpoint has.
fn put_host(index: u32, binding: &EndpointBinding, put: &mut dyn FnMut(Set, Vec<u8>, Vec<u8>)) {
    let (egress, ingress) = (binding.egress.0.to_be_bytes(), binding.ingress.0.to_be_bytes());
    let keys = match index {
        0 => vec![OTHERWISE.to_vec()],
        _ => [true, false].map(|incoming| schema::host_interface(index, incoming)).into(),
    };
    for key in keys {
        put(HOST_INTERFACES, key.clone(), Vec::new());
        put(HOST_EGRESS, key.clone(), egress.to_vec());
        put(HOST_INGRESS, key, ingress.to_vec());
    }
    for address in &binding.addresses {
        let family = family_of(*address);
        let bytes = octets(*address);
        put(family.host_own, bytes.clone(), Vec::new());
        put(family.host_egress, bytes.clone(), egress.to_vec());
        put(family.host_ingress, bytes.clone(), ingress.to_vec());
        put(family.held, [&elements::attachment_key(binding.attachment)[..], &bytes].concat(), Vec::new());
    }
}

pub(crate) fn family_of(address: IpAddr) -> &'static Family {
    &FAMILIES[usize::from(address.is_ipv6())]
}

pub(crate) fn element(key: &[u8], data: &[u8]) -> Element {
    let data = data.to_vec();
    if key == OTHERWISE { Element::Otherwise { data } } else { Element::Key { key: key.to_vec(), data } }
}

/// The elements of one of these sets, as they were put.
pub(crate) fn pairs(elements: Vec<Element>) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let pair = |element| match element {
        Element::Key { key, data } => Some((key, data)),
        Element::Otherwise { data } => Some((OTHERWISE.to_vec(), data)),
        Element::End { .. } => None,
    };
    elements.into_iter().filter_map(pair).collect()
}
