//! Rows and step functions by their content: what is equal is in the kernel once.

use std::collections::HashMap;
use std::sync::Arc;

use bulkhead_model::host_policy::{Column, Row};

use super::Changes;
use crate::elements;
use crate::schema::{STEPS, VARIANTS};

/// A number in use and by how many.
#[derive(Debug, Clone, Copy)]
struct Held {
    number: u32,
    by: usize,
}

/// Numbers of everything that rows in force refer to. One that has been given back is not given out again: a packet that
/// was on its way while tables changed must not find something else under it.
#[derive(Debug, Default)]
pub(crate) struct Numbers {
    steps: HashMap<Arc<[Column]>, Held>,
    variants: HashMap<Arc<Row>, Held>,
    /// Of the last one given out.
    last: u32,
    /// Step functions that tell somebody of a refusal.
    rejecting: usize,
    /// Elements in the kernel: steps, variants.
    pub(super) steps_used: u64,
    pub(super) variants_used: u64,
}

fn rejects(columns: &[Column]) -> bool {
    columns.iter().any(|column| column.cell.reject)
}

impl Numbers {
    /// Takes in what an earlier process left. Nobody holds it yet.
    pub(crate) fn found(&mut self, steps: HashMap<u32, Arc<[Column]>>, rows: HashMap<u32, Arc<Row>>) {
        for (number, columns) in steps {
            self.steps_used += columns.len() as u64;
            self.last = self.last.max(number);
            self.rejecting += usize::from(rejects(&columns));
            self.steps.insert(columns, Held { number, by: 0 });
        }
        for (number, row) in rows {
            self.variants_used += row.variants().len() as u64;
            self.last = self.last.max(number);
            self.hold_variants(&row);
            self.variants.insert(row, Held { number, by: 0 });
        }
    }

    /// One more holds a row that is known.
    pub(super) fn hold(&mut self, row: &Arc<Row>) {
        if row.reads_source_port() {
            self.variants.get_mut(row).into_iter().for_each(|held| held.by += 1);
        } else if let Some((_, columns)) = row.variants().next() {
            self.steps.get_mut(columns).into_iter().for_each(|held| held.by += 1);
        }
    }

    fn hold_variants(&mut self, row: &Row) {
        for (_, columns) in row.variants() {
            if let Some(held) = self.steps.get_mut(columns) {
                held.by += 1;
            }
        }
    }

    /// Whether some row asks for source ports.
    pub(super) fn has_variants(&self) -> bool {
        !self.variants.is_empty()
    }

    /// Whether some row tells of a refusal.
    pub(super) fn has_rejects(&self) -> bool {
        self.rejecting > 0
    }

    /// Steps and variants that these rows would add.
    pub(super) fn needed<'a>(&self, rows: impl Iterator<Item = &'a Arc<Row>>) -> (u64, u64) {
        let mut fresh: std::collections::HashSet<&[Column]> = std::collections::HashSet::new();
        let (mut steps, mut variants) = (0, 0);
        for row in rows {
            if row.reads_source_port() && !self.variants.contains_key(row) {
                variants += row.variants().len() as u64;
            }
            for (_, columns) in row.variants() {
                if !self.steps.contains_key(columns) && fresh.insert(columns) {
                    steps += columns.len() as u64;
                }
            }
        }
        (steps, variants)
    }

    /// The number under which a row is found; one more holds it.
    pub(super) fn acquire(&mut self, row: &Arc<Row>, changes: &mut Changes) -> u32 {
        if !row.reads_source_port() {
            let columns = row.variants().next().map(|(_, columns)| Arc::clone(columns));
            return self.acquire_steps(&columns.unwrap_or_else(|| Arc::from([])), changes);
        }
        if let Some(held) = self.variants.get_mut(row) {
            held.by += 1;
            return held.number;
        }
        let parts: Vec<_> =
            row.variants().map(|(first, columns)| (first, self.acquire_steps(columns, changes))).collect();
        self.last += 1;
        let number = self.last;
        self.variants.insert(Arc::clone(row), Held { number, by: 1 });
        self.variants_used += parts.len() as u64;
        elements::variants(number, &parts, changes.prepare(VARIANTS));
        number
    }

    fn acquire_steps(&mut self, columns: &Arc<[Column]>, changes: &mut Changes) -> u32 {
        if let Some(held) = self.steps.get_mut(columns) {
            held.by += 1;
            return held.number;
        }
        self.last += 1;
        let number = self.last;
        self.rejecting += usize::from(rejects(columns));
        self.steps.insert(Arc::clone(columns), Held { number, by: 1 });
        self.steps_used += columns.len() as u64;
        elements::steps(number, columns, changes.prepare(STEPS));
        number
    }

    /// One less holds a row.
    pub(super) fn release(&mut self, row: &Arc<Row>) {
        if row.reads_source_port() {
            if let Some(held) = self.variants.get_mut(row) {
                held.by = held.by.saturating_sub(1);
            }
        } else if let Some((_, columns)) = row.variants().next()
            && let Some(held) = self.steps.get_mut(columns)
        {
            held.by = held.by.saturating_sub(1);
        }
    }

    /// Forgets what nobody holds.
    pub(super) fn sweep(&mut self, changes: &mut Changes) {
        let gone: Vec<_> =
            self.variants.iter().filter(|(_, held)| held.by == 0).map(|(row, _)| Arc::clone(row)).collect();
        for row in gone {
            let Some(held) = self.variants.remove(&row) else { continue };
            let parts = row.variants().map(|(first, columns)| {
                let number = self.steps.get_mut(columns).map_or(0, |steps| {
                    steps.by = steps.by.saturating_sub(1);
                    steps.number
                });
                (first, number)
            });
            let parts: Vec<_> = parts.collect();
            self.variants_used -= parts.len() as u64;
            elements::variants(held.number, &parts, changes.drop_later(VARIANTS));
        }
        let (steps_used, rejecting) = (&mut self.steps_used, &mut self.rejecting);
        let later = changes.drop_later(STEPS);
        self.steps.retain(|columns, held| {
            if held.by == 0 {
                *steps_used -= columns.len() as u64;
                *rejecting -= usize::from(rejects(columns));
                elements::steps(held.number, columns, later);
            }
            held.by > 0
        });
    }
}
