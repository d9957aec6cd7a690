//! One complete set of look-up tables. Programs use the bank that an endpoint's binding names.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use bulkhead_dataplane::{DataplaneError, TableUse};
use bulkhead_model::Prefix;
use bulkhead_model::host_policy::{ClassId, CompiledId, CompiledPolicy, HostDelta, HostPolicy, Row};

use crate::capacities::{Capacities, fits};
use crate::intern::{Interner, Memory};
use crate::layout::{
    Addr, BindingWord, CLASS_DEFAULT_ROW, CellEntry, ClassEntry, LpmKey, RowEntry, RowKey, Step, VariantEntry,
};
use crate::loader::Loaded;
use crate::mapping::Mapping;
use crate::sys::{Table, TableSpec};

/// Counts of what an operation did.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Tally {
    pub(crate) written: u64,
    pub(crate) deleted: u64,
}

/// The maps of maps that hold the banks.
#[derive(Debug)]
pub(crate) struct Outer {
    tables: [(&'static str, Table<u32, u32>); 6],
}

impl Outer {
    pub(crate) fn open(loaded: &Loaded) -> Result<Self, DataplaneError> {
        let open = |name| Ok::<_, DataplaneError>((name, loaded.table(name)?));
        let names = ["addr_exact", "addr_lpm", "rows", "steps", "cells", "variants"];
        let [exact, lpm, rows, steps, cells, variants] = names.map(open);
        Ok(Self { tables: [exact?, lpm?, rows?, steps?, cells?, variants?] })
    }

    fn install(&self, bank: &Bank) -> Result<(), DataplaneError> {
        let inner = [
            bank.exact.fd().as_raw_fd(),
            bank.lpm.fd().as_raw_fd(),
            bank.rows.fd().as_raw_fd(),
            bank.steps.fd().as_raw_fd(),
            bank.cells.fd().as_raw_fd(),
            bank.variants.fd().as_raw_fd(),
        ];
        for ((name, table), fd) in self.tables.iter().zip(inner) {
            // For a map of maps the value is a descriptor when writing, and an id when reading.
            table.put(&bank.slot, &fd.cast_unsigned()).map_err(|error| {
                DataplaneError::io(format!("put table {name} into bank {}", bank.slot), error)
            })?;
        }
        Ok(())
    }

    /// Frees a bank that nobody uses any more.
    pub(crate) fn clear(&self, slot: u32) -> Result<(), DataplaneError> {
        for (name, table) in &self.tables {
            table
                .delete(&slot)
                .map_err(|error| DataplaneError::io(format!("free table {name} of bank {slot}"), error))?;
        }
        Ok(())
    }

    /// Id of an inner map, by the outer's position in [`Self::open`].
    pub(crate) fn inner(&self, table: usize, slot: u32) -> io::Result<Option<u32>> {
        self.tables[table].1.get(&slot)
    }
}

/// A bank and the mirror of its contents.
#[derive(Debug)]
pub(crate) struct Bank {
    pub(crate) slot: u32,
    capacities: Capacities,
    exact: Table<Addr, ClassEntry>,
    lpm: Table<LpmKey, ClassEntry>,
    rows: Table<RowKey, RowEntry>,
    steps: Table<u32, Step>,
    cells: Table<u32, CellEntry>,
    variants: Table<u32, VariantEntry>,
    interner: Interner,
    addresses: HashMap<Prefix, ClassId>,
    hosts: u64,
    policies: HashMap<CompiledId, BTreeMap<u32, Arc<Row>>>,
    row_count: u64,
    /// Elements were deleted since the last grace period: the kernel's allocator would recycle them.
    unsettled: bool,
}

type KeyedRow = (RowKey, Arc<Row>);

impl Bank {
    /// A new bank with these contents, in a slot that no binding names.
    pub(crate) fn build(
        slot: u32,
        capacities: &Capacities,
        policy: &HostPolicy,
        outer: &Outer,
    ) -> Result<(Self, Tally), DataplaneError> {
        let hosts = policy.addresses.keys().filter(|prefix| prefix.is_host()).count() as u64;
        fits("addresses", hosts, capacities.addresses)?;
        fits("prefixes", policy.addresses.len() as u64 - hosts, capacities.prefixes)?;
        let rows = policy.policies.values().flat_map(rows_of).collect::<Vec<_>>();
        fits("rows", rows.len() as u64, capacities.rows)?;
        let mut bank = Self::create(slot, capacities)
            .map_err(|error| DataplaneError::io(format!("create the tables of bank {slot}"), error))?;
        let mut tally = Tally::default();
        bank.write_rows(&rows, &mut tally)?;
        let addresses: Vec<_> = policy.addresses.iter().map(|(prefix, class)| (*prefix, *class)).collect();
        bank.write_addresses(addresses, &mut tally)?;
        outer.install(&bank)?;
        Ok((bank, tally))
    }

    fn create(slot: u32, capacities: &Capacities) -> io::Result<Self> {
        let spec = |name, kind, flags, entries| TableSpec { name, kind, flags, entries };
        let hash =
            |name, entries| spec(name, libbpf_sys::BPF_MAP_TYPE_HASH, libbpf_sys::BPF_F_NO_PREALLOC, entries);
        let array = |name, entries| {
            let flags = libbpf_sys::BPF_F_MMAPABLE | libbpf_sys::BPF_F_INNER_MAP;
            spec(name, libbpf_sys::BPF_MAP_TYPE_ARRAY, flags, entries)
        };
        let lpm = libbpf_sys::BPF_MAP_TYPE_LPM_TRIE;
        let steps = Table::<u32, Step>::create(array("steps", capacities.steps))?;
        let cells = Table::<u32, CellEntry>::create(array("cells", capacities.cells))?;
        let variants = Table::<u32, VariantEntry>::create(array("variants", capacities.variants))?;
        let memory = Memory {
            steps: Mapping::new(steps.fd(), capacities.steps)?,
            cells: Mapping::new(cells.fd(), capacities.cells)?,
            variants: Mapping::new(variants.fd(), capacities.variants)?,
        };
        Ok(Self {
            slot,
            capacities: *capacities,
            exact: Table::create(hash("addr_exact", capacities.addresses))?,
            lpm: Table::create(spec("addr_lpm", lpm, libbpf_sys::BPF_F_NO_PREALLOC, capacities.prefixes))?,
            rows: Table::create(hash("rows", capacities.rows))?,
            steps,
            cells,
            variants,
            interner: Interner::new(capacities, memory),
            addresses: HashMap::new(),
            hosts: 0,
            policies: HashMap::new(),
            row_count: 0,
            unsettled: false,
        })
    }

    /// Whether a grace period must pass before anything is written.
    pub(crate) fn is_unsettled(&self) -> bool {
        self.unsettled
    }

    /// A grace period has passed since the last removal.
    pub(crate) fn settle(&mut self) {
        self.interner.settle();
        self.unsettled = false;
    }

    /// The first half of a delta: rows and policies, then addresses. Nothing is written if it does not
    /// fit.
    pub(crate) fn extend(&mut self, delta: &HostDelta, tally: &mut Tally) -> Result<(), DataplaneError> {
        let changed = || delta.addresses.iter().filter_map(|(prefix, class)| Some((*prefix, (*class)?)));
        let added = changed().filter(|(prefix, _)| !self.addresses.contains_key(prefix));
        let (hosts, blocks): (Vec<_>, Vec<_>) = added.partition(|(prefix, _)| prefix.is_host());
        fits("addresses", self.hosts + hosts.len() as u64, self.capacities.addresses)?;
        let known_blocks = self.addresses.len() as u64 - self.hosts;
        fits("prefixes", known_blocks + blocks.len() as u64, self.capacities.prefixes)?;
        let mut rows = Vec::new();
        for (compiled, class, row) in &delta.rows {
            rows.push((RowKey { compiled: compiled.0, class: class.0 }, Arc::clone(row)));
        }
        rows.extend(delta.policies.iter().flat_map(rows_of));
        let new_rows = rows.iter().filter(|(key, _)| self.row(*key).is_none()).count() as u64;
        fits("rows", self.row_count + new_rows, self.capacities.rows)?;
        // What is there already is not written again: the kernel would recycle the overwritten element
        // while a program may still look at it.
        rows.retain(|(key, row)| self.row(*key) != Some(row));
        self.write_rows(&rows, tally)?;
        self.write_addresses(changed().collect(), tally)?;
        self.delete_addresses(delta, tally)
    }

    fn row(&self, key: RowKey) -> Option<&Arc<Row>> {
        self.policies.get(&CompiledId(key.compiled))?.get(&key.class)
    }

    fn write_rows(&mut self, rows: &[KeyedRow], tally: &mut Tally) -> Result<(), DataplaneError> {
        let mut keys = Vec::with_capacity(rows.len());
        let mut entries = Vec::with_capacity(rows.len());
        for (position, (key, row)) in rows.iter().enumerate() {
            match check_ids(*key).and_then(|()| self.interner.intern(row)) {
                Ok(entry) => entries.push(entry),
                Err(error) => {
                    rows[..position].iter().for_each(|(_, row)| self.interner.release(row, true));
                    return Err(error);
                }
            }
            keys.push(*key);
        }
        self.rows.put_all(&keys, &entries).map_err(|error| DataplaneError::io("write rows", error))?;
        tally.written += rows.len() as u64;
        for (key, row) in rows {
            let policy = self.policies.entry(CompiledId(key.compiled)).or_default();
            match policy.insert(key.class, Arc::clone(row)) {
                None => self.row_count += 1,
                Some(old) => {
                    self.interner.release(&old, false);
                    self.unsettled = true;
                }
            }
        }
        Ok(())
    }

    /// New classes, single addresses first and longer blocks before shorter ones: no address ever falls
    /// through to the class of a surrounding block that is not its own.
    fn write_addresses(
        &mut self,
        mut addresses: Vec<(Prefix, ClassId)>,
        tally: &mut Tally,
    ) -> Result<(), DataplaneError> {
        addresses.sort_by_key(|(prefix, _)| std::cmp::Reverse(prefix.mapped_len()));
        let hosts = addresses.partition_point(|(prefix, _)| prefix.is_host());
        let (single, blocks) = addresses.split_at(hosts);
        let (keys, values): (Vec<_>, Vec<_>) =
            single.iter().map(|(prefix, class)| exact_entry(*prefix, *class)).unzip();
        self.exact.put_all(&keys, &values).map_err(|error| DataplaneError::io("write addresses", error))?;
        let (keys, values): (Vec<_>, Vec<_>) =
            blocks.iter().map(|(prefix, class)| lpm_entry(*prefix, *class)).unzip();
        self.lpm.put_all(&keys, &values).map_err(|error| DataplaneError::io("write prefixes", error))?;
        tally.written += addresses.len() as u64;
        for (prefix, class) in addresses {
            if self.addresses.insert(prefix, class).is_none() && prefix.is_host() {
                self.hosts += 1;
            }
        }
        Ok(())
    }

    /// Removals in the opposite order, for the same reason.
    fn delete_addresses(&mut self, delta: &HostDelta, tally: &mut Tally) -> Result<(), DataplaneError> {
        let mut gone: Vec<Prefix> =
            delta.addresses.iter().filter(|(_, class)| class.is_none()).map(|(prefix, _)| *prefix).collect();
        gone.sort_by_key(|prefix| prefix.mapped_len());
        for prefix in gone {
            if self.addresses.remove(&prefix).is_none() {
                continue;
            }
            let addr = Addr::from_bits(prefix.bits());
            let deleted = if prefix.is_host() {
                self.hosts -= 1;
                self.exact.delete(&addr)
            } else {
                self.lpm.delete(&LpmKey { prefixlen: u32::from(prefix.mapped_len()), addr })
            };
            deleted.map_err(|error| DataplaneError::io(format!("delete the class of {prefix}"), error))?;
            tally.deleted += 1;
            self.unsettled = true;
        }
        Ok(())
    }

    /// The second half of a delta, after a grace period: what nobody refers to any more.
    pub(crate) fn shrink(&mut self, delta: &HostDelta, tally: &mut Tally) -> Result<(), DataplaneError> {
        for (compiled, class) in &delta.removed_rows {
            self.delete_row(*compiled, class.0, tally)?;
        }
        for compiled in &delta.removed_policies {
            let classes: Vec<u32> =
                self.policies.get(compiled).map(|rows| rows.keys().copied().collect()).unwrap_or_default();
            for class in classes {
                self.delete_row(*compiled, class, tally)?;
            }
            self.policies.remove(compiled);
        }
        Ok(())
    }

    fn delete_row(
        &mut self,
        compiled: CompiledId,
        class: u32,
        tally: &mut Tally,
    ) -> Result<(), DataplaneError> {
        let Some(row) = self.policies.get_mut(&compiled).and_then(|rows| rows.remove(&class)) else {
            return Ok(());
        };
        self.rows
            .delete(&RowKey { compiled: compiled.0, class })
            .map_err(|error| DataplaneError::io("delete a row", error))?;
        self.interner.release(&row, false);
        self.row_count -= 1;
        self.unsettled = true;
        tally.deleted += 1;
        Ok(())
    }

    pub(crate) fn usage(&self) -> [TableUse; 6] {
        let [steps, cells, variants] = self.interner.used();
        let entry = |table, used, capacity| TableUse { table, used, capacity: u64::from(capacity) };
        [
            entry("addresses", self.hosts, self.capacities.addresses),
            entry("prefixes", self.addresses.len() as u64 - self.hosts, self.capacities.prefixes),
            entry("rows", self.row_count, self.capacities.rows),
            entry("steps", u64::from(steps), self.capacities.steps),
            entry("cells", u64::from(cells), self.capacities.cells),
            entry("variants", u64::from(variants), self.capacities.variants),
        ]
    }
}

fn rows_of(policy: &CompiledPolicy) -> impl Iterator<Item = KeyedRow> + '_ {
    let key = |class| RowKey { compiled: policy.id.0, class };
    let default = (key(CLASS_DEFAULT_ROW), Arc::clone(&policy.default_row));
    policy.rows.iter().map(move |(class, row)| (key(class.0), Arc::clone(row))).chain([default])
}

fn check_ids(key: RowKey) -> Result<(), DataplaneError> {
    if key.compiled == CompiledId::NONE.0 || key.compiled > BindingWord::MAX_ID {
        return Err(DataplaneError::Inconsistent(format!(
            "compiled policy id {} is out of range",
            key.compiled
        )));
    }
    Ok(())
}

fn exact_entry(prefix: Prefix, class: ClassId) -> (Addr, ClassEntry) {
    let addr = Addr::from_bits(prefix.bits());
    (addr, ClassEntry { class: class.0, tag: addr.tag() })
}

fn lpm_entry(prefix: Prefix, class: ClassId) -> (LpmKey, ClassEntry) {
    let prefixlen = u32::from(prefix.mapped_len());
    (
        LpmKey { prefixlen, addr: Addr::from_bits(prefix.bits()) },
        ClassEntry { class: class.0, tag: prefixlen },
    )
}
