//! The look-ups of the kernel programs, made from user space over the same tables.

use std::io;
use std::net::IpAddr;

use bulkhead_model::host_policy::{Cell, CompiledId};
use bulkhead_model::ports::PortKey;

use crate::bank::Outer;
use crate::layout::{
    Addr, CLASS_DEFAULT_ROW, CellEntry, ClassEntry, LpmKey, Plain, RowEntry, RowKey, Step, VariantEntry,
};
use crate::readback::meaning;
use crate::sys::Table;

/// The last of `len` elements that `begins` is true of: a binary search, the first counting as true. `None` if one is
/// missing.
fn last_from<T>(
    first: u32,
    len: u32,
    get: impl Fn(&u32) -> io::Result<Option<T>>,
    begins: impl Fn(&T) -> bool,
) -> io::Result<Option<T>> {
    let (mut low, mut high) = (0, len);
    while high - low > 1 {
        let middle = (low + high) / 2;
        let Some(element) = get(&(first + middle))? else { return Ok(None) };
        if begins(&element) { low = middle } else { high = middle }
    }
    get(&(first + low))
}

/// Reads one bank.
pub(crate) struct Reader<'a> {
    pub(crate) outer: &'a Outer,
    pub(crate) bank: u32,
}

impl Reader<'_> {
    fn table<K: Plain, V: Plain>(&self, position: usize) -> io::Result<Option<Table<K, V>>> {
        self.outer.inner(position, self.bank)?.map(Table::from_id).transpose()
    }

    fn class_of(&self, peer: IpAddr) -> io::Result<u32> {
        let addr = Addr::from(peer);
        if let Some(exact) = self.table::<Addr, ClassEntry>(0)?
            && let Some(entry) = exact.get(&addr)?
        {
            return Ok(entry.class);
        }
        let Some(lpm) = self.table::<LpmKey, ClassEntry>(1)? else { return Ok(0) };
        let found = lpm.get(&LpmKey { prefixlen: 128, addr })?;
        Ok(found.filter(|entry| peer.is_ipv6() || entry.tag >= 96).map_or(0, |entry| entry.class))
    }

    /// What `judge` of `bpf/judge.h` would find.
    pub(crate) fn cell(
        &self,
        compiled: CompiledId,
        peer: IpAddr,
        key: PortKey,
        source_port: u16,
    ) -> io::Result<Option<Cell>> {
        let (Some(rows), Some(steps), Some(cells), Some(variants)) = (
            self.table::<RowKey, RowEntry>(2)?,
            self.table::<u32, Step>(3)?,
            self.table::<u32, CellEntry>(4)?,
            self.table::<u32, VariantEntry>(5)?,
        ) else {
            return Ok(None);
        };
        let row_key = |class| RowKey { compiled: compiled.0, class };
        let own = rows.get(&row_key(self.class_of(peer)?))?;
        let Some(row) = own.map_or_else(|| rows.get(&row_key(CLASS_DEFAULT_ROW)), |row| Ok(Some(row)))?
        else {
            return Ok(None);
        };
        let row = match row.variants() {
            None => row,
            Some((first, len)) => {
                let source_port = u32::from(source_port);
                let Some(found) =
                    last_from(first, len, |at| variants.get(at), |v| v.first_source_port <= source_port)?
                else {
                    return Ok(None);
                };
                RowEntry { first: found.first, len: found.len }
            }
        };
        let Some(step) = last_from(row.first, row.len, |at| steps.get(at), |step| step.first_key <= key)?
        else {
            return Ok(None);
        };
        Ok(cells.get(&step.cell)?.map(meaning))
    }
}
