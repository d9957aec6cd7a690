//! What stands in the kernel, and what a plan changes there. Pure: the caller writes it.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use bulkhead_dataplane::DataplaneError;
use bulkhead_model::Prefix;
use bulkhead_model::host_policy::{
    Attachment, Cell, ClassId, CompiledId, CompiledPolicy, EndpointBinding, HostDelta, HostPolicy, Row,
};

use crate::Capacities;
use crate::elements;
use crate::groups::Groups;
use crate::message::Request;
use crate::object::{Element, Set};
use crate::rules::Shape;
use crate::schema::{ASK_BLOCKS, FAMILIES, ROWS, RULE_END};
use crate::segments::{Difference, Segments};

pub(crate) mod endpoints;
pub(crate) mod numbers;

use endpoints::Content;
use numbers::Numbers;

/// Elements that a plan removes and adds, in three transactions: what nobody asks for yet, what packets meet, and the
/// removal of what nobody asks for any more. The kernel's transactions are not enough: a packet on its way asks one map
/// before and another after, and an interval map has what is new in it a moment later than the others.
#[derive(Debug, Default)]
pub(crate) struct Changes {
    prepared: BTreeMap<Set, Vec<Element>>,
    removed: BTreeMap<Set, Vec<Element>>,
    added: BTreeMap<Set, Vec<Element>>,
    removed_later: BTreeMap<Set, Vec<Element>>,
}

impl Changes {
    fn add(&mut self, set: Set) -> &mut Vec<Element> {
        self.added.entry(set).or_default()
    }

    fn prepare(&mut self, set: Set) -> &mut Vec<Element> {
        self.prepared.entry(set).or_default()
    }

    fn remove(&mut self, set: Set) -> &mut Vec<Element> {
        self.removed.entry(set).or_default()
    }

    fn drop_later(&mut self, set: Set) -> &mut Vec<Element> {
        self.removed_later.entry(set).or_default()
    }

    /// The three transactions' requests.
    pub(crate) fn requests(&self) -> [Vec<Request>; 3] {
        let mut all = [Vec::new(), Vec::new(), Vec::new()];
        self.prepared.iter().for_each(|(set, elements)| set.add(elements, &mut all[0]));
        self.removed.iter().for_each(|(set, elements)| set.remove(elements, &mut all[1]));
        self.added.iter().for_each(|(set, elements)| set.add(elements, &mut all[1]));
        self.removed_later.iter().for_each(|(set, elements)| set.remove(elements, &mut all[2]));
        all
    }

    /// Elements written, and deleted. What is only given another value counts as written.
    pub(crate) fn tally(&self) -> (u64, u64) {
        let count = |elements: &BTreeMap<Set, Vec<Element>>| -> u64 {
            let keys = elements.values().flatten().filter(|element| matches!(element, Element::Key { .. }));
            keys.count() as u64
        };
        let (added, removed) = (count(&self.added), count(&self.removed));
        (count(&self.prepared) + added, removed.saturating_sub(added) + count(&self.removed_later))
    }
}

/// The tables as they are, or will be once the changes that came out of them are written.
#[derive(Debug, Default)]
pub(crate) struct Image {
    policy: HostPolicy,
    attached: BTreeSet<u32>,
    groups: Groups,
    /// Number of every row: default rows under the class of their own.
    rows: HashMap<(CompiledId, u32), u32>,
    numbers: Numbers,
    blocks: [Segments; 2],
    endpoints: Content,
}

impl Image {
    /// What an earlier process left: see [`crate::readback`].
    pub(crate) fn found(
        policy: HostPolicy,
        attached: BTreeSet<u32>,
        rows: HashMap<(CompiledId, u32), u32>,
        numbers: Numbers,
        blocks: [Segments; 2],
        endpoints: Content,
    ) -> Self {
        let groups = endpoints::groups(&endpoints);
        Self { policy, attached, groups, rows, numbers, blocks, endpoints }
    }

    /// Counts who holds which number.
    pub(crate) fn hold_rows(&mut self) {
        for compiled in self.policy.policies.values() {
            rows_of(compiled).for_each(|(_, row)| self.numbers.hold(row));
        }
    }

    /// Whether all this is what it holds.
    pub(crate) fn holds(
        &self,
        addresses: &BTreeMap<Prefix, ClassId>,
        rows: &HashMap<(CompiledId, u32), u32>,
        blocks: &[Segments; 2],
        endpoints: &Content,
    ) -> bool {
        (addresses, rows, blocks) == (&self.policy.addresses, &self.rows, &self.blocks)
            && endpoints.iter().all(|(set, elements)| {
                self.endpoints.get(set).map_or(elements.is_empty(), |own| own == elements)
            })
    }

    /// The policy in force.
    pub(crate) fn policy(&self) -> &HostPolicy {
        &self.policy
    }

    pub(crate) fn attached(&self) -> &BTreeSet<u32> {
        &self.attached
    }

    /// What the rules must be able to ask.
    pub(crate) fn shape(&self) -> Shape {
        let host = |binding: &EndpointBinding| matches!(binding.attachment, Attachment::Host(_));
        let by_interface = |binding: &EndpointBinding| matches!(binding.attachment, Attachment::Host(1..));
        let forwarded = |binding: &EndpointBinding| matches!(binding.attachment, Attachment::Forwarded(_));
        Shape {
            variants: self.numbers.has_variants(),
            rejects: self.numbers.has_rejects(),
            host: self.policy.endpoints.values().any(host),
            by_interface: self.policy.endpoints.values().any(by_interface),
            forwarded: self.policy.endpoints.values().any(forwarded),
            levels: self.groups.values().fold(0, |levels, group| levels | 1 << group.level),
        }
    }

    /// The class of an address, as the maps have it.
    pub(crate) fn class_of(&self, address: std::net::IpAddr) -> ClassId {
        let single = self.policy.addresses.get(&Prefix::host(address)).copied();
        let bits = bulkhead_model::address::address_bits(address);
        single.unwrap_or_else(|| self.blocks[usize::from(address.is_ipv6())].class_of(bits))
    }

    /// What a policy says. `None` if there is no such policy.
    pub(crate) fn cell(
        &self,
        policy: CompiledId,
        peer: std::net::IpAddr,
        key: bulkhead_model::ports::PortKey,
        source_port: u16,
    ) -> Option<Cell> {
        Some(self.policy.policies.get(&policy)?.cell(self.class_of(peer), key, source_port))
    }

    pub(crate) fn groups(&self) -> &Groups {
        &self.groups
    }

    /// Other control groups are in charge.
    pub(crate) fn set_groups(&mut self, groups: Groups) -> Changes {
        let mut changes = Changes::default();
        self.groups = groups;
        self.follow_endpoints(&mut changes);
        changes
    }

    /// Other interfaces are in charge.
    pub(crate) fn set_attached(&mut self, attached: BTreeSet<u32>) -> Changes {
        let mut changes = Changes::default();
        self.attached = attached;
        self.follow_endpoints(&mut changes);
        changes
    }

    /// Everything, into tables that hold nothing yet.
    pub(crate) fn rebuild(policy: &HostPolicy, attached: BTreeSet<u32>, groups: Groups) -> (Self, Changes) {
        let mut image = Self { attached, groups, ..Self::default() };
        let changes = image.replace(policy);
        (image, changes)
    }

    /// Puts a whole state in the place of what is there.
    pub(crate) fn replace(&mut self, policy: &HostPolicy) -> Changes {
        let mut changes = Changes::default();
        let mut rows = HashMap::new();
        for compiled in policy.policies.values() {
            for (class, row) in rows_of(compiled) {
                rows.insert((compiled.id, class), self.numbers.acquire(row, &mut changes));
            }
        }
        for compiled in self.policy.policies.values() {
            rows_of(compiled).for_each(|(_, row)| self.numbers.release(row));
        }
        for (key, number) in &self.rows {
            match rows.get(key) {
                None => changes.drop_later(ROWS).push(elements::row(key.0, key.1, *number)),
                Some(new) if new != number => {
                    changes.remove(ROWS).push(elements::row(key.0, key.1, *number));
                }
                Some(_) => {}
            }
        }
        for (key, number) in &rows {
            let element = || elements::row(key.0, key.1, *number);
            match self.rows.get(key) {
                None => changes.prepare(ROWS).push(element()),
                Some(old) if old != number => changes.add(ROWS).push(element()),
                Some(_) => {}
            }
        }
        self.rows = rows;
        self.replace_addresses(policy, &mut changes);
        self.policy = policy.clone();
        // Names and meanings of rules are for people; the kernel has their ids.
        self.policy.rules.clear();
        self.follow_endpoints(&mut changes);
        self.numbers.sweep(&mut changes);
        changes
    }

    /// Follows a difference.
    pub(crate) fn apply(&mut self, delta: &HostDelta) -> Changes {
        let mut changes = Changes::default();
        for (policy, class, row) in &delta.rows {
            if self.policy.policies.contains_key(policy) {
                self.put_row(*policy, class.0, row, &mut changes);
                let old = self
                    .policy
                    .policies
                    .get_mut(policy)
                    .and_then(|compiled| compiled.rows.insert(*class, Arc::clone(row)));
                old.iter().for_each(|row| self.numbers.release(row));
            }
        }
        for compiled in &delta.policies {
            for (class, row) in rows_of(compiled) {
                self.put_row(compiled.id, class, row, &mut changes);
            }
            let old = self.policy.policies.insert(compiled.id, compiled.clone());
            old.iter().flat_map(rows_of).for_each(|(_, row)| self.numbers.release(row));
        }
        self.apply_addresses(&delta.addresses, &mut changes);
        for (name, binding) in &delta.endpoints {
            match binding {
                Some(binding) => self.policy.endpoints.insert(Arc::clone(name), binding.clone()),
                None => self.policy.endpoints.remove(name),
            };
        }
        for (policy, class) in &delta.removed_rows {
            let compiled = self.policy.policies.get_mut(policy);
            if let Some(row) = compiled.and_then(|compiled| compiled.rows.remove(class)) {
                self.drop_row(*policy, class.0, &row, &mut changes);
            }
        }
        for id in &delta.removed_policies {
            if let Some(compiled) = self.policy.policies.remove(id) {
                rows_of(&compiled).for_each(|(class, row)| self.drop_row(*id, class, row, &mut changes));
            }
        }
        self.policy.revision = delta.revision;
        if !delta.endpoints.is_empty() || !delta.rows.is_empty() || !delta.policies.is_empty() {
            self.follow_endpoints(&mut changes);
        }
        let fewer = !delta.removed_rows.is_empty() || !delta.removed_policies.is_empty();
        if fewer || !delta.rows.is_empty() || !delta.policies.is_empty() {
            self.numbers.sweep(&mut changes);
        }
        changes
    }

    fn put_row(&mut self, policy: CompiledId, class: u32, row: &Arc<Row>, changes: &mut Changes) {
        let number = self.numbers.acquire(row, changes);
        match self.rows.insert((policy, class), number) {
            Some(old) if old == number => {}
            Some(old) => {
                changes.remove(ROWS).push(elements::row(policy, class, old));
                changes.add(ROWS).push(elements::row(policy, class, number));
            }
            None => changes.prepare(ROWS).push(elements::row(policy, class, number)),
        }
    }

    fn drop_row(&mut self, policy: CompiledId, class: u32, row: &Arc<Row>, changes: &mut Changes) {
        if let Some(number) = self.rows.remove(&(policy, class)) {
            changes.drop_later(ROWS).push(elements::row(policy, class, number));
        }
        self.numbers.release(row);
    }

    fn replace_addresses(&mut self, policy: &HostPolicy, changes: &mut Changes) {
        let (old, new) = (&self.policy.addresses, &policy.addresses);
        for (prefix, class) in old.iter().filter(|(prefix, class)| new.get(prefix) != Some(class)) {
            put_prefix(*prefix, *class, |set, element| changes.remove(set).push(element));
        }
        for (prefix, class) in new.iter().filter(|(prefix, class)| old.get(prefix) != Some(class)) {
            put_prefix(*prefix, *class, |set, element| changes.add(set).push(element));
        }
        for v6 in [false, true] {
            let blocks = new.iter().filter(|(prefix, _)| !prefix.is_host() && prefix.is_v4() != v6);
            let blocks = Segments::of(blocks);
            let before = std::mem::replace(&mut self.blocks[usize::from(v6)], blocks);
            let new = self.blocks[usize::from(v6)].iter().collect();
            let difference = Difference { gone: before.iter().collect(), new }.net();
            put_segments(&difference, v6, changes);
        }
    }

    fn apply_addresses(&mut self, delta: &BTreeMap<Prefix, Option<ClassId>>, changes: &mut Changes) {
        let mut blocks = Vec::new();
        for (prefix, class) in delta {
            let addresses = &mut self.policy.addresses;
            let old = match class {
                Some(class) => addresses.insert(*prefix, *class),
                None => addresses.remove(prefix),
            };
            if old == *class {
                continue;
            }
            if let Some(old) = old {
                put_prefix(*prefix, old, |set, element| changes.remove(set).push(element));
            }
            if let Some(class) = class {
                put_prefix(*prefix, *class, |set, element| changes.add(set).push(element));
            }
            if !prefix.is_host() {
                blocks.push(*prefix);
            }
        }
        if blocks.is_empty() {
            return;
        }
        for v6 in [false, true] {
            let mut difference = Difference::default();
            for block in blocks.iter().filter(|block| block.is_v4() != v6) {
                self.blocks[usize::from(v6)].update(*block, &self.policy.addresses, &mut difference);
            }
            put_segments(&difference.net(), v6, changes);
        }
    }

    fn follow_endpoints(&mut self, changes: &mut Changes) {
        let new = endpoints::content(&self.policy, &self.attached, &self.groups);
        for (set, elements) in &new {
            let nothing = BTreeMap::new();
            let old = self.endpoints.get(set).unwrap_or(&nothing);
            for (key, data) in old.iter().filter(|(key, data)| elements.get(*key) != Some(data)) {
                changes.remove(*set).push(endpoints::element(key, data));
            }
            for (key, data) in elements.iter().filter(|(key, data)| old.get(*key) != Some(data)) {
                changes.add(*set).push(endpoints::element(key, data));
            }
        }
        self.endpoints = new;
    }

    /// Whether a difference fits beside what is there.
    pub(crate) fn check_delta(
        &self,
        delta: &HostDelta,
        capacities: &Capacities,
    ) -> Result<(), DataplaneError> {
        let rows = delta.rows.iter().map(|(_, _, row)| row);
        let rows = rows.chain(delta.policies.iter().flat_map(|policy| rows_of(policy).map(|(_, row)| row)));
        let rows: Vec<_> = rows.collect();
        let (steps, variants) = self.numbers.needed(rows.iter().copied());
        capacities.fits("rows", self.rows.len() + rows.len(), capacities.rows)?;
        capacities.fits("steps", (self.numbers.steps_used + steps) as usize, capacities.steps)?;
        capacities.fits("variants", (self.numbers.variants_used + variants) as usize, capacities.variants)?;
        let added = delta
            .addresses
            .iter()
            .filter(|(prefix, class)| class.is_some() && !self.policy.addresses.contains_key(prefix));
        capacities.fits("addresses", self.policy.addresses.len() + added.count(), capacities.addresses)?;
        let added = delta
            .endpoints
            .iter()
            .filter(|(name, binding)| binding.is_some() && !self.policy.endpoints.contains_key(*name));
        capacities.fits("endpoints", self.policy.endpoints.len() + added.count(), capacities.endpoints)?;
        check_numbers(
            delta.policies.iter().map(|policy| policy.id),
            delta.addresses.values().flatten().copied(),
            rows.into_iter(),
        )
    }

    /// Whether a whole state fits.
    pub(crate) fn check_policy(policy: &HostPolicy, capacities: &Capacities) -> Result<(), DataplaneError> {
        let rows: Vec<_> = policy.policies.values().flat_map(|p| rows_of(p).map(|(_, row)| row)).collect();
        let (steps, variants) = Numbers::default().needed(rows.iter().copied());
        capacities.fits("rows", rows.len(), capacities.rows)?;
        capacities.fits("steps", steps as usize, capacities.steps)?;
        capacities.fits("variants", variants as usize, capacities.variants)?;
        capacities.fits("addresses", policy.addresses.len(), capacities.addresses)?;
        capacities.fits("endpoints", policy.endpoints.len(), capacities.endpoints)?;
        check_numbers(policy.policies.keys().copied(), policy.addresses.values().copied(), rows.into_iter())
    }

    /// Tables and how full they are: name, used.
    pub(crate) fn usage(&self) -> [(&'static str, u64); 6] {
        let segments = self.blocks.iter().map(Segments::len).sum::<usize>();
        [
            ("addresses", self.policy.addresses.len() as u64),
            ("ranges", segments as u64),
            ("rows", self.rows.len() as u64),
            ("steps", self.numbers.steps_used),
            ("variants", self.numbers.variants_used),
            ("endpoints", self.policy.endpoints.len() as u64),
        ]
    }
}

/// Rules carry ids in fewer than 32 bits.
fn check_numbers<'a>(
    mut policies: impl Iterator<Item = CompiledId>,
    mut classes: impl Iterator<Item = ClassId>,
    rows: impl Iterator<Item = &'a Arc<Row>>,
) -> Result<(), DataplaneError> {
    let too_large = |what| DataplaneError::Inconsistent(format!("an id of a {what} is too large"));
    if policies.any(|id| id.0 >= ASK_BLOCKS) {
        return Err(too_large("policy"));
    }
    if classes.any(|class| class.0 >= ASK_BLOCKS) {
        return Err(too_large("class"));
    }
    let mut cells = rows.flat_map(|row| row.variants()).flat_map(|(_, columns)| columns.iter());
    if cells.any(|column| column.cell.rule.0 >= RULE_END || column.cell.audit_rule.0 >= RULE_END) {
        return Err(too_large("rule"));
    }
    Ok(())
}

/// Rows of a policy, the default row among them, with the class that each is kept under.
fn rows_of(compiled: &CompiledPolicy) -> impl Iterator<Item = (u32, &Arc<Row>)> {
    let own = compiled.rows.iter().map(|(class, row)| (elements::row_class(Some(*class)), row));
    std::iter::once((elements::row_class(None), &compiled.default_row)).chain(own)
}

/// Where a block stands as itself: a single address in the map that is asked first.
fn put_prefix(prefix: Prefix, class: ClassId, mut put: impl FnMut(Set, Element)) {
    let family = &FAMILIES[usize::from(!prefix.is_v4())];
    if prefix.is_host() {
        put(family.classes, elements::single(prefix.address(), class));
    } else {
        put(family.prefixes, elements::prefix(prefix, class));
    }
}

fn put_segments(difference: &Difference, v6: bool, changes: &mut Changes) {
    let set = FAMILIES[usize::from(v6)].blocks;
    for segment in &difference.gone {
        elements::segment(*segment, v6, changes.remove(set));
    }
    for segment in &difference.new {
        elements::segment(*segment, v6, changes.add(set));
    }
}
