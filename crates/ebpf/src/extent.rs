//! Hands out runs of array elements.

use std::collections::{BTreeMap, BTreeSet};

/// Free runs of an array, by their start; neighbours are always merged.
#[derive(Debug)]
pub(crate) struct Extents {
    free: BTreeMap<u32, u32>,
    used: u32,
}

impl Extents {
    pub(crate) fn new(capacity: u32) -> Self {
        let free = if capacity > 0 { BTreeMap::from([(0, capacity)]) } else { BTreeMap::new() };
        Self { free, used: 0 }
    }

    /// With single elements handed out already.
    pub(crate) fn with_taken(capacity: u32, taken: &BTreeSet<u32>) -> Self {
        let mut extents = Self { free: BTreeMap::new(), used: 0 };
        let mut start = 0;
        for &element in taken.iter().filter(|element| **element < capacity) {
            if element > start {
                extents.free.insert(start, element - start);
            }
            start = element + 1;
            extents.used += 1;
        }
        if start < capacity {
            extents.free.insert(start, capacity - start);
        }
        extents
    }

    /// Elements handed out.
    pub(crate) fn used(&self) -> u32 {
        self.used
    }

    /// The lowest run of `len` elements, or `None` if no free run is that long.
    pub(crate) fn allocate(&mut self, len: u32) -> Option<u32> {
        let (start, free) =
            self.free.iter().find(|(_, free)| **free >= len).map(|(start, free)| (*start, *free))?;
        self.free.remove(&start);
        if free > len {
            self.free.insert(start + len, free - len);
        }
        self.used += len;
        Some(start)
    }

    /// Takes a run back.
    pub(crate) fn release(&mut self, start: u32, len: u32) {
        self.used -= len;
        let (mut start, mut len) = (start, len);
        if let Some(after) = self.free.remove(&(start + len)) {
            len += after;
        }
        if let Some((before, before_len)) = self.free.range(..start).next_back().map(|(s, l)| (*s, *l))
            && before + before_len == start
        {
            start = before;
            len += before_len;
        }
        self.free.insert(start, len);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn released_runs_merge_with_both_neighbours() {
        let mut extents = Extents::new(30);
        let runs: Vec<_> = (0..3).map(|_| extents.allocate(10).unwrap()).collect();
        assert_eq!(extents.allocate(1), None);
        extents.release(runs[0], 10);
        extents.release(runs[2], 10);
        assert_eq!(extents.allocate(11), None);
        extents.release(runs[1], 10);
        assert_eq!(extents.used(), 0);
        assert_eq!(extents.allocate(30), Some(0));
    }
}
