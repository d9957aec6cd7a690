//! Rows and cells by content: equal ones are stored once.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Arc;

use bulkhead_dataplane::DataplaneError;
use bulkhead_model::host_policy::{Cell, Row};
use bulkhead_model::verdict::Verdict;

use crate::capacities::Capacities;
use crate::extent::Extents;
use crate::layout::{CELL_LOG, CELL_WRITTEN, CellEntry, RowEntry, Step};
use crate::mapping::Mapping;

#[derive(Debug, Clone, Copy)]
struct Stored {
    entry: RowEntry,
    references: u32,
}

#[derive(Debug, Clone, Copy)]
struct StoredCell {
    index: u32,
    references: u32,
}

/// The `steps` and `cells` of a bank.
///
/// What is released goes to limbo first: a program may be in the middle of reading it. It is free for
/// others after [`Interner::settle`], which the caller calls after a grace period.
#[derive(Debug)]
pub(crate) struct Interner {
    rows: HashMap<Arc<Row>, Stored>,
    cells: HashMap<Cell, StoredCell>,
    free_steps: Extents,
    free_cells: Extents,
    limbo: Vec<RowEntry>,
    limbo_cells: Vec<u32>,
    capacity: (u32, u32),
    steps: Mapping<Step>,
    contents: Mapping<CellEntry>,
}

impl Interner {
    pub(crate) fn new(capacities: &Capacities, steps: Mapping<Step>, contents: Mapping<CellEntry>) -> Self {
        Self {
            rows: HashMap::new(),
            cells: HashMap::new(),
            free_steps: Extents::new(capacities.steps),
            free_cells: Extents::new(capacities.cells),
            limbo: Vec::new(),
            limbo_cells: Vec::new(),
            capacity: (capacities.steps, capacities.cells),
            steps,
            contents,
        }
    }

    /// Steps and cells in use.
    pub(crate) fn used(&self) -> (u32, u32) {
        (self.free_steps.used(), self.free_cells.used())
    }

    /// Where the row is stored; stores it if it is new. Counts one reference.
    pub(crate) fn intern(&mut self, row: &Arc<Row>) -> Result<RowEntry, DataplaneError> {
        if let Some(stored) = self.rows.get_mut(row) {
            stored.references += 1;
            return Ok(stored.entry);
        }
        let columns = row.columns();
        let len = columns.len() as u32;
        let Some(first) = self.free_steps.allocate(len) else {
            return Err(DataplaneError::Capacity {
                table: "steps",
                needed: u64::from(self.free_steps.used()) + u64::from(len),
                capacity: u64::from(self.capacity.0),
            });
        };
        for (position, column) in (0u32..).zip(columns) {
            match self.intern_cell(column.cell) {
                Ok(cell) => self.steps.set(first + position, Step { first_key: column.first, cell }),
                Err(error) => {
                    for column in &columns[..position as usize] {
                        self.release_cell(column.cell, true);
                    }
                    self.free_steps.release(first, len);
                    return Err(error);
                }
            }
        }
        let entry = RowEntry { first, len };
        self.rows.insert(Arc::clone(row), Stored { entry, references: 1 });
        Ok(entry)
    }

    fn intern_cell(&mut self, cell: Cell) -> Result<u32, DataplaneError> {
        let slot = match self.cells.entry(cell) {
            Entry::Occupied(mut stored) => {
                stored.get_mut().references += 1;
                return Ok(stored.get().index);
            }
            Entry::Vacant(slot) => slot,
        };
        let Some(index) = self.free_cells.allocate(1) else {
            let capacity = u64::from(self.capacity.1);
            return Err(DataplaneError::Capacity { table: "cells", needed: capacity + 1, capacity });
        };
        slot.insert(StoredCell { index, references: 1 });
        self.contents.set(index, cell_entry(cell));
        Ok(index)
    }

    /// Drops one reference. `unseen`: no table ever named it, so it is free at once.
    pub(crate) fn release(&mut self, row: &Arc<Row>, unseen: bool) {
        let Some(stored) = self.rows.get_mut(row) else { return };
        stored.references -= 1;
        if stored.references > 0 {
            return;
        }
        let entry = stored.entry;
        self.rows.remove(row);
        for column in row.columns() {
            self.release_cell(column.cell, unseen);
        }
        if unseen {
            self.free_steps.release(entry.first, entry.len);
        } else {
            self.limbo.push(entry);
        }
    }

    fn release_cell(&mut self, cell: Cell, unseen: bool) {
        let Some(stored) = self.cells.get_mut(&cell) else { return };
        stored.references -= 1;
        if stored.references > 0 {
            return;
        }
        let index = stored.index;
        self.cells.remove(&cell);
        if unseen {
            self.free_cells.release(index, 1);
        } else {
            self.limbo_cells.push(index);
        }
    }

    /// A grace period has passed: what was released before it is free.
    pub(crate) fn settle(&mut self) {
        for entry in self.limbo.drain(..) {
            self.free_steps.release(entry.first, entry.len);
        }
        for index in self.limbo_cells.drain(..) {
            self.free_cells.release(index, 1);
        }
    }
}

fn cell_entry(cell: Cell) -> CellEntry {
    let bit = |set: bool, bit: u8| if set { bit } else { 0 };
    CellEntry {
        rule: cell.rule.0,
        audit_rule: cell.audit_rule.0,
        verdict: u8::from(cell.verdict == Verdict::Allow),
        audit: u8::from(cell.audit_verdict == Verdict::Allow),
        flags: bit(cell.log, CELL_LOG) | bit(cell.written, CELL_WRITTEN),
        pad: [0; 5],
    }
}
