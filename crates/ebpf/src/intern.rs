//! Rows, steps and cells by content: equal ones are stored once.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Arc;

use bulkhead_dataplane::DataplaneError;
use bulkhead_model::host_policy::{Cell, Column, Row};
use bulkhead_model::verdict::Verdict;

use crate::capacities::Capacities;
use crate::extent::Extents;
use crate::layout::{CELL_LOG, CELL_REJECT, CELL_WRITTEN, CellEntry, RowEntry, Step, VariantEntry};
use crate::mapping::Mapping;

/// Elements of an array, one after the other.
#[derive(Debug, Clone, Copy)]
struct Run {
    first: u32,
    len: u32,
}

#[derive(Debug, Clone, Copy)]
struct Stored {
    run: Run,
    references: u32,
}

#[derive(Debug, Clone, Copy)]
struct StoredCell {
    index: u32,
    references: u32,
}

/// The arrays themselves.
#[derive(Debug)]
pub(crate) struct Memory {
    pub(crate) steps: Mapping<Step>,
    pub(crate) cells: Mapping<CellEntry>,
    pub(crate) variants: Mapping<VariantEntry>,
}

/// The `steps`, `cells` and `variants` of a bank.
///
/// What is released goes to limbo first: a program may be in the middle of reading it. It is free for
/// others after [`Interner::settle`], which the caller calls after a grace period.
#[derive(Debug)]
pub(crate) struct Interner {
    /// Rows that ask for the source port: their variants. The others are their steps and nothing more.
    rows: HashMap<Arc<Row>, Stored>,
    steps: HashMap<Arc<[Column]>, Stored>,
    cells: HashMap<Cell, StoredCell>,
    free_steps: Extents,
    free_cells: Extents,
    free_variants: Extents,
    limbo_steps: Vec<Run>,
    limbo_cells: Vec<u32>,
    limbo_variants: Vec<Run>,
    capacities: Capacities,
    memory: Memory,
}

impl Interner {
    pub(crate) fn new(capacities: &Capacities, memory: Memory) -> Self {
        Self {
            rows: HashMap::new(),
            steps: HashMap::new(),
            cells: HashMap::new(),
            free_steps: Extents::new(capacities.steps),
            free_cells: Extents::new(capacities.cells),
            free_variants: Extents::new(capacities.variants),
            limbo_steps: Vec::new(),
            limbo_cells: Vec::new(),
            limbo_variants: Vec::new(),
            capacities: *capacities,
            memory,
        }
    }

    /// Steps, cells and variants in use.
    pub(crate) fn used(&self) -> [u32; 3] {
        [self.free_steps.used(), self.free_cells.used(), self.free_variants.used()]
    }

    /// Where the row is stored; stores it if it is new. Counts one reference.
    pub(crate) fn intern(&mut self, row: &Arc<Row>) -> Result<RowEntry, DataplaneError> {
        if !row.reads_source_port() {
            let mut only = row.variants();
            let (_, columns) =
                only.next().ok_or_else(|| DataplaneError::Inconsistent("a row without steps".to_owned()))?;
            let Run { first, len } = self.intern_steps(columns)?;
            return Ok(RowEntry { first, len });
        }
        if let Some(stored) = self.rows.get_mut(row) {
            stored.references += 1;
            return Ok(RowEntry::by_source_port(stored.run.first, stored.run.len));
        }
        let len = row.variants().len() as u32;
        let run = allocate(&mut self.free_variants, len, "variants", self.capacities.variants)?;
        for (position, (from, columns)) in (0u32..).zip(row.variants()) {
            match self.intern_steps(columns) {
                Ok(Run { first, len }) => {
                    let variant = VariantEntry { first_source_port: u32::from(from), first, len, pad: 0 };
                    self.memory.variants.set(run.first + position, variant);
                }
                Err(error) => {
                    for (_, columns) in row.variants().take(position as usize) {
                        self.release_steps(columns, true);
                    }
                    self.free_variants.release(run.first, run.len);
                    return Err(error);
                }
            }
        }
        self.rows.insert(Arc::clone(row), Stored { run, references: 1 });
        Ok(RowEntry::by_source_port(run.first, run.len))
    }

    fn intern_steps(&mut self, columns: &Arc<[Column]>) -> Result<Run, DataplaneError> {
        if let Some(stored) = self.steps.get_mut(columns) {
            stored.references += 1;
            return Ok(stored.run);
        }
        let len = columns.len() as u32;
        let run = allocate(&mut self.free_steps, len, "steps", self.capacities.steps)?;
        for (position, column) in (0u32..).zip(columns.iter()) {
            match self.intern_cell(column.cell) {
                Ok(cell) => {
                    let step = Step { first_key: column.first, cell };
                    self.memory.steps.set(run.first + position, step);
                }
                Err(error) => {
                    for column in &columns[..position as usize] {
                        self.release_cell(column.cell, true);
                    }
                    self.free_steps.release(run.first, run.len);
                    return Err(error);
                }
            }
        }
        self.steps.insert(Arc::clone(columns), Stored { run, references: 1 });
        Ok(run)
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
            let capacity = u64::from(self.capacities.cells);
            return Err(DataplaneError::Capacity { table: "cells", needed: capacity + 1, capacity });
        };
        slot.insert(StoredCell { index, references: 1 });
        self.memory.cells.set(index, cell_entry(cell));
        Ok(index)
    }

    /// Drops one reference. `unseen`: no table ever named it, so it is free at once.
    pub(crate) fn release(&mut self, row: &Arc<Row>, unseen: bool) {
        if row.reads_source_port() {
            let Some(stored) = self.rows.get_mut(row) else { return };
            stored.references -= 1;
            if stored.references > 0 {
                return;
            }
            let run = stored.run;
            self.rows.remove(row);
            if unseen {
                self.free_variants.release(run.first, run.len);
            } else {
                self.limbo_variants.push(run);
            }
        }
        for (_, columns) in row.variants() {
            self.release_steps(columns, unseen);
        }
    }

    fn release_steps(&mut self, columns: &Arc<[Column]>, unseen: bool) {
        let Some(stored) = self.steps.get_mut(columns) else { return };
        stored.references -= 1;
        if stored.references > 0 {
            return;
        }
        let run = stored.run;
        self.steps.remove(columns);
        for column in columns.iter() {
            self.release_cell(column.cell, unseen);
        }
        if unseen {
            self.free_steps.release(run.first, run.len);
        } else {
            self.limbo_steps.push(run);
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
        for run in self.limbo_steps.drain(..) {
            self.free_steps.release(run.first, run.len);
        }
        for run in self.limbo_variants.drain(..) {
            self.free_variants.release(run.first, run.len);
        }
        for index in self.limbo_cells.drain(..) {
            self.free_cells.release(index, 1);
        }
    }
}

fn allocate(free: &mut Extents, len: u32, table: &'static str, capacity: u32) -> Result<Run, DataplaneError> {
    let needed = u64::from(free.used()) + u64::from(len);
    let first = free.allocate(len).ok_or(DataplaneError::Capacity {
        table,
        needed,
        capacity: u64::from(capacity),
    })?;
    Ok(Run { first, len })
}

fn cell_entry(cell: Cell) -> CellEntry {
    let bit = |set: bool, bit: u8| if set { bit } else { 0 };
    CellEntry {
        rule: cell.rule.0,
        audit_rule: cell.audit_rule.0,
        verdict: u8::from(cell.verdict == Verdict::Allow),
        audit: u8::from(cell.audit_verdict == Verdict::Allow),
        flags: bit(cell.log, CELL_LOG) | bit(cell.written, CELL_WRITTEN) | bit(cell.reject, CELL_REJECT),
        pad: [0; 5],
    }
}
