//! What one host must enforce: the boundary value between the engine and the dataplanes.
//!
//! The engine resolves order, tiers, Pass, negation and ranges; what is left is three look-ups:
//!
//! 1. address → [`ClassId`] (exact address first, then the longest prefix, else [`ClassId::NOBODY`]),
//! 2. ([`CompiledId`], class) → [`Row`] (the policy's default row where none is written),
//! 3. (row, source port, port key) → [`Cell`]; nearly every row is the same for all source ports.
//!
//! INVARIANT: an id never changes its meaning. A class id stands for one set of matching peer
//! selectors and CIDR lists, a compiled id for one content, a rule id for one [`RuleRef`], for as
//! long as any table or connection may hold it. So entries may be written before they are used and
//! deleted after they are not, and no reader ever sees a mixture.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::address::Prefix;
use crate::ports::{PORT_KEY_END, PortKey};
use crate::verdict::{RuleRef, Verdict};

macro_rules! id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub u32);
    };
}

id! {
    /// A peer class: the addresses that nothing in force on this host can tell apart.
    ClassId
}
id! {
    /// One compiled policy: everything that applies to a subject class in one direction.
    CompiledId
}
id! {
    /// A decision's author on this host; see [`RuleRef`].
    RuleId
}

impl ClassId {
    /// The class of an address that matches nothing in force here.
    pub const NOBODY: Self = Self(0);
}

impl CompiledId {
    /// "No tables yet": everything is denied with [`crate::flow::DropReason::Unprogrammed`].
    pub const NONE: Self = Self(0);
}

/// The answer for one peer class and port class.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Cell {
    /// What is enforced.
    pub verdict: Verdict,
    /// Who decided it.
    pub rule: RuleId,
    /// What would be enforced if every Audit policy were enforced.
    pub audit_verdict: Verdict,
    /// Who would have decided that.
    pub audit_rule: RuleId,
    /// Whether a matching rule asked for the connection to be logged.
    pub log: bool,
    /// Whether whoever is refused is told so (`reject` of the rule that refuses).
    pub reject: bool,
    /// Whether `rule` is a written rule, not a tier's default action or the default posture.
    /// The host may reach its own workloads unless a written rule forbids it (DESIGN 4.10).
    pub written: bool,
}

/// One step of a [`Row`]: from `first` up to the next column's `first`, the answer is `cell`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Column {
    /// Lowest port key of this port class.
    pub first: PortKey,
    /// The answer there.
    pub cell: Cell,
}

/// The answers for one peer class: a step function over the port keys; or several, each for a range of source ports.
///
/// Columns belong to the row and not to the whole policy, so a port range costs its two boundaries
/// only in the rows that it touches. Likewise, source ports cost only the rows whose rules ask for them.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Row {
    /// From source port 0 on.
    columns: Arc<[Column]>,
    /// From other source ports on, ascending. Usually empty.
    later: Box<[Variant]>,
}

/// What a [`Row`] says from one source port up to the next variant's.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Variant {
    /// The lowest source port.
    pub first: u16,
    /// The steps, ascending, the first at key 0; neighbours differ. Variants with equal steps may share them.
    pub columns: Arc<[Column]>,
}

impl Row {
    /// A row from its steps, the same for every source port. Neighbours with equal cells are merged.
    ///
    /// # Panics
    /// If the steps do not start at key 0 or do not ascend: only the compiler makes rows.
    pub fn new(columns: impl IntoIterator<Item = Column>) -> Self {
        Self { columns: merged(columns), later: Box::default() }
    }

    /// A row from what it says from each of these source ports on. Neighbours with equal steps are merged.
    ///
    /// # Panics
    /// If the variants do not start at source port 0 or do not ascend: only the compiler makes rows.
    pub fn by_source_port(variants: impl IntoIterator<Item = Variant>) -> Self {
        let mut variants = variants.into_iter();
        let first = variants.next().filter(|variant| variant.first == 0);
        let columns = first.expect("a row covers every source port").columns;
        let mut later: Vec<Variant> = Vec::new();
        let mut before = 0;
        for variant in variants {
            assert!(before < variant.first, "variants ascend");
            before = variant.first;
            if later.last().map_or(&columns, |last| &last.columns) != &variant.columns {
                later.push(variant);
            }
        }
        Self { columns, later: later.into() }
    }

    /// A row with one answer for everything.
    pub fn uniform(cell: Cell) -> Self {
        Self::new([Column { first: 0, cell }])
    }

    /// What it says from source port 0 on, and from each source port at which that changes. Usually one variant.
    pub fn variants(&self) -> impl ExactSizeIterator<Item = (u16, &Arc<[Column]>)> {
        Variants { first: Some(&self.columns), later: self.later.iter() }
    }

    /// Whether source ports matter.
    pub fn reads_source_port(&self) -> bool {
        !self.later.is_empty()
    }

    /// The answer for one port key and source port (0 for protocols without).
    pub fn cell(&self, key: PortKey, source_port: u16) -> Cell {
        let after = self.later.partition_point(|variant| variant.first <= source_port);
        let later = after.checked_sub(1).and_then(|index| self.later.get(index));
        let columns = later.map_or(&self.columns, |variant| &variant.columns);
        let after = columns.partition_point(|column| column.first <= key);
        columns[after - 1].cell
    }
}

struct Variants<'a> {
    first: Option<&'a Arc<[Column]>>,
    later: std::slice::Iter<'a, Variant>,
}

impl<'a> Iterator for Variants<'a> {
    type Item = (u16, &'a Arc<[Column]>);

    fn next(&mut self) -> Option<Self::Item> {
        match self.first.take() {
            Some(columns) => Some((0, columns)),
            None => self.later.next().map(|variant| (variant.first, &variant.columns)),
        }
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        let len = usize::from(self.first.is_some()) + self.later.len();
        (len, Some(len))
    }
}

impl ExactSizeIterator for Variants<'_> {}

/// Steps with equal neighbours merged.
///
/// # Panics
/// If they do not start at key 0 or do not ascend: only the compiler makes them.
pub fn merged(columns: impl IntoIterator<Item = Column>) -> Arc<[Column]> {
    let mut merged: Vec<Column> = Vec::new();
    for column in columns {
        match merged.last() {
            None => assert_eq!(column.first, 0, "a row covers every port key"),
            Some(last) => assert!(last.first < column.first, "columns ascend"),
        }
        assert!(column.first < PORT_KEY_END, "port keys have 24 bits");
        if merged.last().is_none_or(|last| last.cell != column.cell) {
            merged.push(column);
        }
    }
    assert!(!merged.is_empty(), "a row covers every port key");
    merged.into()
}

/// Everything that applies to one subject class in one direction, resolved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CompiledPolicy {
    /// Its id; see the module's invariant.
    pub id: CompiledId,
    /// For every class without a row of its own, [`ClassId::NOBODY`] among them.
    pub default_row: Arc<Row>,
    /// Rows that differ from the default.
    pub rows: BTreeMap<ClassId, Arc<Row>>,
}

impl CompiledPolicy {
    /// The answer for a peer class, a port key and a source port (0 for protocols without).
    pub fn cell(&self, class: ClassId, key: PortKey, source_port: u16) -> Cell {
        self.rows.get(&class).unwrap_or(&self.default_row).cell(key, source_port)
    }
}

/// Where a dataplane meets an endpoint's packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Attachment {
    /// Host-side interface of a workload, by index.
    Interface(u32),
    /// The host itself behind one of its interfaces, by index; 0: behind every one that has no binding of its own.
    Host(u32),
    /// What the host forwards through one of its interfaces, by index; 0: through every one that has no binding of its
    /// own and is no workload's.
    Forwarded(u32),
    /// The processes of a control group and of those below it, by the inode of its directory in the unified hierarchy.
    Cgroup(u32),
}

impl Attachment {
    /// Whether it is the host that is met there, itself or as the one who forwards: bound only when both directions are
    /// known, lest it loses itself or its network.
    pub fn is_of_host(self) -> bool {
        matches!(self, Self::Host(_) | Self::Forwarded(_))
    }

    /// The address that stands for a process workload and nothing else, so that two on one host can be told apart though
    /// they share its addresses: 100::/64 of RFC 6666, which is never on a wire, with the inode.
    pub fn own_address(self) -> Option<IpAddr> {
        let Self::Cgroup(inode) = self else { return None };
        Some(std::net::Ipv6Addr::from_bits(0x0100 << 112 | u128::from(inode)).into())
    }
}

impl std::fmt::Display for Attachment {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Interface(index) => write!(f, "interface {index}"),
            Self::Host(0) => f.write_str("the host"),
            Self::Host(index) => write!(f, "the host behind interface {index}"),
            Self::Forwarded(0) => f.write_str("what the host forwards"),
            Self::Forwarded(index) => write!(f, "what the host forwards through interface {index}"),
            Self::Cgroup(id) => write!(f, "control group {id}"),
        }
    }
}

/// One local endpoint and the tables it is bound to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EndpointBinding {
    /// Where its packets are met.
    pub attachment: Attachment,
    /// The addresses it may use, sorted.
    pub addresses: Vec<IpAddr>,
    /// Tables for connections towards it; [`CompiledId::NONE`] denies all.
    pub ingress: CompiledId,
    /// Tables for connections from it; [`CompiledId::NONE`] denies all.
    pub egress: CompiledId,
}

/// Everything one host must enforce.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HostPolicy {
    /// Repository revision that this was computed from.
    pub revision: u64,
    /// Class of every block that is not of class [`ClassId::NOBODY`] or that carves an exception
    /// out of a larger block. The longest matching block counts.
    pub addresses: BTreeMap<Prefix, ClassId>,
    /// Compiled policies in use.
    pub policies: BTreeMap<CompiledId, CompiledPolicy>,
    /// Local endpoints by workload name.
    pub endpoints: BTreeMap<Arc<str>, EndpointBinding>,
    /// Meaning of every rule id in use, and of those that live connections may still carry.
    pub rules: BTreeMap<RuleId, RuleRef>,
}

impl HostPolicy {
    /// The class of an address, by the longest matching block.
    pub fn class_of(&self, address: IpAddr) -> ClassId {
        let host = Prefix::host(address);
        (0..=128u8)
            .rev()
            .map(|len| host.truncate(len))
            .filter(|block| block.contains(host))
            .find_map(|block| self.addresses.get(&block).copied())
            .unwrap_or(ClassId::NOBODY)
    }

    /// The answer for a connection of one endpoint in one direction: what the kernel would say.
    /// `None` if the endpoint is unknown or has no tables for that direction.
    pub fn lookup(
        &self,
        endpoint: &str,
        direction: crate::verdict::Direction,
        peer: IpAddr,
        key: PortKey,
        source_port: u16,
    ) -> Option<Cell> {
        let binding = self.endpoints.get(endpoint)?;
        let compiled = match direction {
            crate::verdict::Direction::Ingress => binding.ingress,
            crate::verdict::Direction::Egress => binding.egress,
        };
        Some(self.policies.get(&compiled)?.cell(self.class_of(peer), key, source_port))
    }
}

/// The difference between two [`HostPolicy`] values that a dataplane can apply in place.
///
/// A dataplane applies the fields in this order, so that every packet meets either the old or the
/// new state of whatever it asks: rules, `rows` and `policies` first (nobody refers to them yet),
/// then `addresses`, then `endpoints` (the switch), and the removals last.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HostDelta {
    /// Revision of the new state.
    pub revision: u64,
    /// New rule ids.
    pub rules: BTreeMap<RuleId, RuleRef>,
    /// Rows for new classes in policies that already exist.
    pub rows: Vec<(CompiledId, ClassId, Arc<Row>)>,
    /// New compiled policies, whole.
    pub policies: Vec<CompiledPolicy>,
    /// Blocks with a new class, or none any more.
    pub addresses: BTreeMap<Prefix, Option<ClassId>>,
    /// Endpoints that are new, bound anew, or gone.
    pub endpoints: BTreeMap<Arc<str>, Option<EndpointBinding>>,
    /// Rows of classes that no address has any more.
    pub removed_rows: Vec<(CompiledId, ClassId)>,
    /// Compiled policies that no endpoint uses any more.
    pub removed_policies: Vec<CompiledId>,
    /// Rule ids that no table holds any more.
    pub removed_rules: Vec<RuleId>,
}

impl HostDelta {
    /// Whether applying it would change nothing but the revision.
    pub fn is_empty(&self) -> bool {
        let Self {
            revision: _,
            rules,
            rows,
            policies,
            addresses,
            endpoints,
            removed_rows,
            removed_policies,
            removed_rules,
        } = self;
        rules.is_empty()
            && rows.is_empty()
            && policies.is_empty()
            && addresses.is_empty()
            && endpoints.is_empty()
            && removed_rows.is_empty()
            && removed_policies.is_empty()
            && removed_rules.is_empty()
    }

    /// Number of kernel table entries that applying it writes (not the deletions): what P2 of the
    /// design promises to keep proportional to classes.
    pub fn entries_written(&self) -> usize {
        let policy_rows: usize = self.policies.iter().map(|policy| policy.rows.len() + 1).sum();
        policy_rows
            + self.rows.len()
            + self.addresses.values().filter(|class| class.is_some()).count()
            + self.endpoints.values().filter(|endpoint| endpoint.is_some()).count()
    }
}

impl HostPolicy {
    /// Brings this value to the state that `delta` leads to.
    pub fn apply(&mut self, delta: &HostDelta) {
        self.revision = delta.revision;
        self.rules.extend(delta.rules.iter().map(|(id, rule)| (*id, rule.clone())));
        for (policy, class, row) in &delta.rows {
            if let Some(policy) = self.policies.get_mut(policy) {
                policy.rows.insert(*class, Arc::clone(row));
            }
        }
        for policy in &delta.policies {
            self.policies.insert(policy.id, policy.clone());
        }
        if self.addresses.is_empty() {
            // All at once: faster, and in half the room.
            let present = delta.addresses.iter().filter_map(|(prefix, class)| Some((*prefix, (*class)?)));
            self.addresses = present.collect();
        } else {
            for (prefix, class) in &delta.addresses {
                match class {
                    Some(class) => self.addresses.insert(*prefix, *class),
                    None => self.addresses.remove(prefix),
                };
            }
        }
        for (name, binding) in &delta.endpoints {
            match binding {
                Some(binding) => self.endpoints.insert(Arc::clone(name), binding.clone()),
                None => self.endpoints.remove(name),
            };
        }
        for (policy, class) in &delta.removed_rows {
            if let Some(policy) = self.policies.get_mut(policy) {
                policy.rows.remove(class);
            }
        }
        for id in &delta.removed_policies {
            self.policies.remove(id);
        }
        for id in &delta.removed_rules {
            self.rules.remove(id);
        }
    }
}
