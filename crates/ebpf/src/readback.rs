//! The tables in force, read back from the kernel as what they mean.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;
use std::sync::Arc;

use bulkhead_dataplane::DataplaneError;
use bulkhead_model::Prefix;
use bulkhead_model::host_policy::{
    Cell, ClassId, Column, CompiledId, CompiledPolicy, EndpointBinding, HostPolicy, Row, RuleId, Variant,
};

use crate::bank::Outer;
use crate::endpoints::Endpoints;
use crate::events::verdict;
use crate::layout::{
    Addr, CELL_LOG, CELL_REJECT, CELL_WRITTEN, CLASS_DEFAULT_ROW, CellEntry, ClassEntry, LpmKey, Plain,
    RowEntry, RowKey, Step, VariantEntry, attachment_of,
};
use crate::sys::Table;

/// Everything that programs can reach from the bindings. Endpoints are named by their attachment, and rule ids
/// have no meaning here: the kernel knows neither names nor rules.
pub(crate) fn read_back(outer: &Outer, endpoints: &Endpoints) -> Result<HostPolicy, DataplaneError> {
    let failed = |error| DataplaneError::io("read the tables back", error);
    let mut policy = HostPolicy::default();
    let mut banks: BTreeMap<u32, BTreeSet<CompiledId>> = BTreeMap::new();
    for (subject, addresses) in endpoints.addresses_in_force().map_err(failed)? {
        let Some(word) = endpoints.binding(subject).map_err(failed)? else { continue };
        let attachment = attachment_of(subject);
        banks.entry(word.bank).or_default().extend([word.ingress, word.egress]);
        let binding = EndpointBinding { attachment, addresses, ingress: word.ingress, egress: word.egress };
        policy.endpoints.insert(attachment.to_string().into(), binding);
    }
    for (bank, compiled) in banks {
        let contents = Contents::read(outer, bank).map_err(failed)?;
        policy.addresses.extend(contents.addresses()?);
        for id in compiled.into_iter().filter(|id| *id != CompiledId::NONE) {
            policy.policies.insert(id, contents.policy(id)?);
        }
    }
    Ok(policy)
}

/// All that one bank holds.
struct Contents {
    exact: Vec<(Addr, ClassEntry)>,
    lpm: Vec<(LpmKey, ClassEntry)>,
    rows: BTreeMap<u32, Vec<(u32, RowEntry)>>,
    steps: Table<u32, Step>,
    cells: Table<u32, CellEntry>,
    variants: Table<u32, VariantEntry>,
}

impl Contents {
    fn read(outer: &Outer, bank: u32) -> io::Result<Self> {
        let mut rows: BTreeMap<u32, Vec<(u32, RowEntry)>> = BTreeMap::new();
        for (key, row) in table::<RowKey, RowEntry>(outer, 2, bank)?.entries()? {
            rows.entry(key.compiled).or_default().push((key.class, row));
        }
        Ok(Self {
            exact: table(outer, 0, bank)?.entries()?,
            lpm: table(outer, 1, bank)?.entries()?,
            rows,
            steps: table(outer, 3, bank)?,
            cells: table(outer, 4, bank)?,
            variants: table(outer, 5, bank)?,
        })
    }

    fn addresses(&self) -> Result<BTreeMap<Prefix, ClassId>, DataplaneError> {
        let mut addresses = BTreeMap::new();
        for (addr, entry) in &self.exact {
            let address = addr.address();
            if entry.tag != addr.tag() {
                return Err(damaged(format!("the entry of {address} belongs to another address")));
            }
            addresses.insert(Prefix::host(address), ClassId(entry.class));
        }
        for (key, entry) in &self.lpm {
            addresses.insert(block(key.addr.address(), key.prefixlen)?, ClassId(entry.class));
        }
        Ok(addresses)
    }

    fn policy(&self, id: CompiledId) -> Result<CompiledPolicy, DataplaneError> {
        let mut default_row = None;
        let mut rows = BTreeMap::new();
        for (class, entry) in self.rows.get(&id.0).into_iter().flatten() {
            let row = Arc::new(self.row(*entry)?);
            if *class == CLASS_DEFAULT_ROW {
                default_row = Some(row);
            } else {
                rows.insert(ClassId(*class), row);
            }
        }
        let default_row =
            default_row.ok_or_else(|| damaged(format!("the compiled policy {} has no default row", id.0)))?;
        Ok(CompiledPolicy { id, default_row, rows })
    }

    fn row(&self, entry: RowEntry) -> Result<Row, DataplaneError> {
        let Some((first, len)) = entry.variants() else {
            return Ok(Row::new(self.columns(entry.first, entry.len)?));
        };
        let mut variants: Vec<Variant> = Vec::new();
        for index in first..first + len {
            let found = element(&self.variants, index, "variant")?;
            let first = u16::try_from(found.first_source_port).ok();
            let first = first.filter(|first| variants.last().map_or(*first == 0, |last| last.first < *first));
            let first = first.ok_or_else(|| damaged("variants do not ascend from 0".into()))?;
            variants.push(Variant { first, columns: self.columns(found.first, found.len)?.into() });
        }
        if variants.is_empty() {
            return Err(damaged("a row has no variants".into()));
        }
        Ok(Row::by_source_port(variants))
    }

    fn columns(&self, first: u32, len: u32) -> Result<Vec<Column>, DataplaneError> {
        let mut columns: Vec<Column> = Vec::new();
        for index in first..first + len {
            let step = element(&self.steps, index, "step")?;
            if columns.last().map_or(step.first_key != 0, |last| last.first >= step.first_key) {
                return Err(damaged("steps do not ascend from 0".into()));
            }
            let cell = element(&self.cells, step.cell, "cell")?;
            columns.push(Column { first: step.first_key, cell: meaning(cell) });
        }
        if columns.is_empty() {
            return Err(damaged("a row has no steps".into()));
        }
        Ok(columns)
    }
}

/// What a cell of the kernel says.
pub(crate) fn meaning(cell: CellEntry) -> Cell {
    Cell {
        verdict: verdict(cell.verdict),
        rule: RuleId(cell.rule),
        audit_verdict: verdict(cell.audit),
        audit_rule: RuleId(cell.audit_rule),
        log: cell.flags & CELL_LOG != 0,
        reject: cell.flags & CELL_REJECT != 0,
        written: cell.flags & CELL_WRITTEN != 0,
    }
}

fn table<K: Plain, V: Plain>(outer: &Outer, position: usize, bank: u32) -> io::Result<Table<K, V>> {
    let id = outer.inner(position, bank)?;
    let id =
        id.ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, format!("bank {bank} is not there")))?;
    Table::from_id(id)
}

fn element<V: Plain>(table: &Table<u32, V>, index: u32, what: &str) -> Result<V, DataplaneError> {
    let found =
        table.get(&index).map_err(|error| DataplaneError::io(format!("read {what} {index}"), error))?;
    found.ok_or_else(|| damaged(format!("{what} {index} is not there")))
}

/// A block by its length among 128 bits.
fn block(address: IpAddr, prefixlen: u32) -> Result<Prefix, DataplaneError> {
    let offset = if address.is_ipv4() { 96 } else { 0 };
    let len = prefixlen.checked_sub(offset).and_then(|len| u8::try_from(len).ok());
    let len = len.filter(|len| *len <= 128);
    Ok(Prefix::new(address, len.ok_or_else(|| damaged(format!("{address} has length {prefixlen}")))?))
}

fn damaged(what: String) -> DataplaneError {
    DataplaneError::Inconsistent(what)
}
