//! Random states and the differences between them: everything that a dataplane can be told.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use bulkhead_model::Prefix;
use bulkhead_model::host_policy::{
    Attachment, Cell, ClassId, Column, CompiledId, CompiledPolicy, EndpointBinding, HostDelta, HostPolicy,
    Row, RuleId, Variant, merged,
};
use bulkhead_model::ports::Protocol;
use bulkhead_model::verdict::Verdict;

const PROTOCOLS: [Protocol; 6] =
    [Protocol::TCP, Protocol::UDP, Protocol::SCTP, Protocol::UDPLITE, Protocol::ICMP, Protocol::ICMPV6];
/// Where columns begin, or one before.
pub const PORTS: [u16; 6] = [1, 80, 443, 8000, 8001, 65535];
/// Where variants begin, or one before.
pub const SOURCE_PORTS: [u16; 8] = [0, 1, 53, 1023, 1024, 8000, 49_152, 65_534];
/// Workloads of a random state.
pub const INTERFACES: usize = 3;

/// xorshift64*: enough to choose with, and repeatable.
#[derive(Debug)]
pub struct Random(pub u64);

impl Random {
    /// A number below `limit`.
    pub fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % limit
    }

    /// True once in so many times.
    pub fn one_in(&mut self, chances: usize) -> bool {
        self.below(chances) == 0
    }

    /// Few distinct bits, so that blocks nest and meet.
    pub fn address(&mut self) -> IpAddr {
        let mut byte = || [0u8, 1, 2, 128, 255][self.below(5)];
        let tail = [byte(), byte(), byte()];
        if self.one_in(2) {
            Ipv4Addr::new(10, tail[0], tail[1], tail[2]).into()
        } else {
            let group = |byte: u8| u16::from(byte);
            Ipv6Addr::new(0xfd00, group(tail[0]), 0, 0, 0, group(tail[1]), 0, group(tail[2])).into()
        }
    }

    fn prefix(&mut self) -> Prefix {
        let address = self.address();
        let lengths: [u8; 7] =
            if address.is_ipv4() { [0, 8, 15, 16, 24, 31, 32] } else { [0, 1, 16, 32, 96, 127, 128] };
        Prefix::new(address, lengths[self.below(7)])
    }

    fn cell(&mut self) -> Cell {
        let mut verdict = || if self.one_in(2) { Verdict::Allow } else { Verdict::Deny };
        let (verdict, audit_verdict) = (verdict(), verdict());
        Cell {
            verdict,
            audit_verdict,
            rule: RuleId(16 + self.below(40) as u32),
            audit_rule: RuleId(16 + self.below(40) as u32),
            log: self.one_in(2),
            reject: verdict == Verdict::Deny && self.one_in(2),
            written: self.one_in(2),
        }
    }

    /// Usually without source ports; with them, some variants share their steps.
    fn row(&mut self) -> Arc<Row> {
        let some = self.columns();
        if !self.one_in(4) {
            return Arc::new(Row::by_source_port([Variant { first: 0, columns: some }]));
        }
        let mut starts = BTreeMap::from([(0, Arc::clone(&some))]);
        for _ in 0..self.below(12) {
            let port = SOURCE_PORTS[self.below(SOURCE_PORTS.len())];
            let columns = if self.one_in(3) { Arc::clone(&some) } else { self.columns() };
            starts.insert(port.saturating_add(self.below(2) as u16), columns);
        }
        Arc::new(Row::by_source_port(starts.into_iter().map(|(first, columns)| Variant { first, columns })))
    }

    fn columns(&mut self) -> Arc<[Column]> {
        let mut starts = BTreeMap::from([(0, self.cell())]);
        for _ in 0..self.below(40) {
            let protocol = PROTOCOLS[self.below(PROTOCOLS.len())];
            let key = protocol.key(PORTS[self.below(PORTS.len())]) + self.below(2) as u32;
            starts.insert(key, self.cell());
        }
        merged(starts.into_iter().map(|(first, cell)| Column { first, cell }))
    }

    fn compiled(&mut self, id: u32, classes: u32) -> CompiledPolicy {
        let classes: Vec<_> = (0..classes).filter(|_| !self.one_in(3)).collect();
        let rows = classes.into_iter().map(|class| (ClassId(class), self.row())).collect();
        CompiledPolicy { id: CompiledId(id), default_row: self.row(), rows }
    }
}

/// The address of a workload.
pub fn endpoint_address(interface: usize, v6: bool) -> IpAddr {
    if v6 {
        Ipv6Addr::new(0xfdee, 0, 0, 0, 0, 0, 0, interface as u16 + 1).into()
    } else {
        Ipv4Addr::new(172, 16, 0, interface as u8 + 1).into()
    }
}

/// Makes states for the same workloads.
#[derive(Debug)]
pub struct States {
    /// Where chances come from.
    pub random: Random,
    /// The workloads' interfaces.
    pub interfaces: Vec<u32>,
    next_id: u32,
}

impl States {
    /// States from a seed.
    pub fn new(seed: u64, interfaces: Vec<u32>) -> Self {
        Self { random: Random(seed), interfaces, next_id: 0 }
    }

    /// A state from nothing.
    pub fn whole(&mut self) -> HostPolicy {
        let classes = 1 + self.random.below(12) as u32;
        let addresses = (0..self.random.below(60))
            .map(|_| (self.random.prefix(), ClassId(self.random.below(classes as usize) as u32)))
            .collect();
        let mut policies = BTreeMap::new();
        for _ in 0..=self.random.below(4) {
            let id = self.fresh_id();
            policies.insert(CompiledId(id), self.random.compiled(id, classes));
        }
        let ids: Vec<_> = policies.keys().copied().collect();
        let endpoints = (0..INTERFACES)
            .filter(|_| !self.random.one_in(6))
            .collect::<Vec<_>>()
            .into_iter()
            .map(|interface| (name(interface), self.binding(interface, &ids)))
            .collect();
        HostPolicy { addresses, policies, endpoints, ..HostPolicy::default() }
    }

    fn fresh_id(&mut self) -> u32 {
        self.next_id += 1;
        self.next_id
    }

    fn binding(&mut self, interface: usize, ids: &[CompiledId]) -> EndpointBinding {
        let mut id = || match self.random.below(8) {
            0 => CompiledId::NONE,
            _ => ids[self.random.below(ids.len())],
        };
        EndpointBinding {
            attachment: Attachment::Interface(self.interfaces[interface]),
            addresses: vec![endpoint_address(interface, false), endpoint_address(interface, true)],
            ingress: id(),
            egress: id(),
        }
    }

    /// A difference to a state, which leads to another.
    pub fn delta(&mut self, state: &HostPolicy) -> HostDelta {
        let mut delta = HostDelta { revision: state.revision + 1, ..HostDelta::default() };
        let ids: Vec<_> = state.policies.keys().copied().collect();
        let class = ClassId(1000 + self.next_id);
        for id in &ids {
            if self.random.one_in(2) {
                delta.rows.push((*id, class, self.random.row()));
            }
        }
        for _ in 0..self.random.below(20) {
            let known = state.addresses.keys().nth(self.random.below(60)).copied();
            let prefix = known.filter(|_| self.random.one_in(2)).unwrap_or_else(|| self.random.prefix());
            let class = (!self.random.one_in(3)).then_some(class);
            delta.addresses.insert(prefix, class);
        }
        let new = self.fresh_id();
        delta.policies.push(self.random.compiled(new, 6));
        let mut rebound: Vec<_> = ids.clone();
        rebound.push(CompiledId(new));
        let gone = self.random.one_in(2).then(|| rebound.remove(0));
        for interface in 0..INTERFACES {
            let uses =
                |binding: &EndpointBinding| Some(binding.ingress) == gone || Some(binding.egress) == gone;
            let must = state.endpoints.get(&name(interface)).is_some_and(uses);
            if self.random.one_in(5) {
                delta.endpoints.insert(name(interface), None);
            } else if must || self.random.one_in(2) {
                let binding = self.binding(interface, &rebound);
                delta.endpoints.insert(name(interface), Some(binding));
            }
        }
        delta.removed_policies.extend(gone);
        if let Some(kept) = ids.iter().find(|id| Some(**id) != gone)
            && let Some(class) = state.policies[kept].rows.keys().next()
        {
            delta.removed_rows.push((*kept, *class));
        }
        delta
    }
}

/// A workload's name.
pub fn name(interface: usize) -> Arc<str> {
    format!("w{interface}").into()
}
