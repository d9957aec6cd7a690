//! Nested blocks as what an interval map takes: ranges side by side.

use std::collections::BTreeMap;

use bulkhead_model::Prefix;
use bulkhead_model::host_policy::ClassId;

/// A range of addresses of one class, both ends included.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Segment {
    pub(crate) first: u128,
    pub(crate) last: u128,
    pub(crate) class: ClassId,
}

/// What a change of blocks changes.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Difference {
    pub(crate) gone: Vec<Segment>,
    pub(crate) new: Vec<Segment>,
}

/// One family's segments: a function of the blocks, whatever their history. Neighbours of one class are one, and
/// what is of class [`ClassId::NOBODY`] is in none.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct Segments(BTreeMap<u128, Segment>);

impl Segments {
    pub(crate) fn from_segments(segments: impl IntoIterator<Item = Segment>) -> Self {
        Self(segments.into_iter().map(|segment| (segment.first, segment)).collect())
    }

    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = Segment> {
        self.0.values().copied()
    }

    pub(crate) fn class_of(&self, bits: u128) -> ClassId {
        let below = self.0.range(..=bits).next_back();
        below
            .filter(|(_, segment)| bits <= segment.last)
            .map_or(ClassId::NOBODY, |(_, segment)| segment.class)
    }

    /// From blocks of one family.
    pub(crate) fn of<'a>(blocks: impl Iterator<Item = (&'a Prefix, &'a ClassId)>) -> Self {
        let mut pieces = Vec::new();
        flatten(blocks.map(|(prefix, class)| (*prefix, *class)), None, &mut pieces);
        Self::from_segments(merged(pieces))
    }

    /// Follows a change within `block`: it appeared, went or has another class. `blocks` is how they are now; single
    /// addresses among them stand elsewhere and cut nothing.
    pub(crate) fn update(
        &mut self,
        block: Prefix,
        blocks: &BTreeMap<Prefix, ClassId>,
        into: &mut Difference,
    ) {
        let (first, last) = (block.bits(), block.last_bits());
        let mut pieces: Vec<Segment> = Vec::new();
        // What reaches in from the left, or touches; what reaches out to the right, or touches.
        let from = first.saturating_sub(1);
        let start = self.0.range(..=from).next_back().map_or(from, |(start, _)| *start);
        let mut touched: Vec<Segment> = self.0.range(start..=last).map(|(_, segment)| *segment).collect();
        touched.retain(|segment| segment.last >= from);
        if let Some(next) = last.checked_add(1)
            && let Some(segment) = self.0.get(&next)
        {
            touched.push(*segment);
        }
        for segment in touched.iter().filter(|segment| segment.first < first) {
            pieces.push(Segment { last: segment.last.min(from), ..*segment });
        }
        let inside = blocks.range(block..).map(|(prefix, class)| (*prefix, *class));
        let inside = inside.take_while(|(prefix, _)| prefix.bits() <= last);
        let inside = inside.filter(|(prefix, _)| block.contains(*prefix) && !prefix.is_host());
        let around = (0..=block.mapped_len()).rev().map(|len| block.truncate(len));
        let around = around.filter(|outer| outer.contains(block));
        let class = around.into_iter().find_map(|outer| blocks.get(&outer)).copied();
        flatten(inside, Some((block, class.unwrap_or(ClassId::NOBODY))), &mut pieces);
        for segment in touched.iter().filter(|segment| segment.last > last) {
            pieces.push(Segment { first: segment.first.max(last + 1), ..*segment });
        }
        let new = merged(pieces);
        for segment in &touched {
            if !new.contains(segment) {
                self.0.remove(&segment.first);
                into.gone.push(*segment);
            }
        }
        for segment in new {
            if self.0.insert(segment.first, segment) != Some(segment) {
                into.new.push(segment);
            }
        }
    }
}

impl Difference {
    /// Of a series of updates: what came and went in between does not count.
    pub(crate) fn net(mut self) -> Self {
        self.gone.sort_unstable();
        self.new.sort_unstable();
        let (mut gone, mut new) = (Vec::new(), Vec::new());
        let (mut left, mut right) = (self.gone.into_iter().peekable(), self.new.into_iter().peekable());
        loop {
            match (left.peek(), right.peek()) {
                (Some(one), Some(other)) if one == other => {
                    left.next();
                    right.next();
                }
                (Some(one), Some(other)) if one < other => gone.extend(left.next()),
                (Some(_), None) => gone.extend(left.next()),
                (_, Some(_)) => new.extend(right.next()),
                (None, None) => return Self { gone, new },
            }
        }
    }
}

/// Cuts nested blocks, which come in order, into ranges side by side. `base` is around all of them.
fn flatten(
    blocks: impl Iterator<Item = (Prefix, ClassId)>,
    base: Option<(Prefix, ClassId)>,
    into: &mut Vec<Segment>,
) {
    // Blocks that are open, outermost first; `at` is where the innermost goes on.
    let mut open: Vec<(u128, ClassId)> = Vec::new();
    let mut at = 0u128;
    let mut emit = |first: u128, last: u128, class: ClassId| {
        if first <= last && class != ClassId::NOBODY {
            into.push(Segment { first, last, class });
        }
    };
    let base = base.into_iter();
    for (prefix, class) in base.chain(blocks) {
        let (first, last) = (prefix.bits(), prefix.last_bits());
        while let Some((end, outer)) = open.last().copied().filter(|(end, _)| *end < first) {
            emit(at, end, outer);
            open.pop();
            at = at.max(end.saturating_add(1));
        }
        if let Some((_, outer)) = open.last()
            && first > at
        {
            emit(at, first - 1, *outer);
        }
        at = first;
        open.push((last, class));
    }
    let mut done = false;
    while let Some((end, class)) = open.pop() {
        if !done {
            emit(at, end, class);
        }
        // The space ends here; nothing can follow.
        done |= end == u128::MAX;
        at = at.max(end.saturating_add(1));
    }
}

/// Neighbours of one class joined.
fn merged(pieces: Vec<Segment>) -> Vec<Segment> {
    let mut all: Vec<Segment> = Vec::new();
    for piece in pieces {
        match all.last_mut() {
            Some(last) if last.class == piece.class && last.last.checked_add(1) == Some(piece.first) => {
                last.last = piece.last;
            }
            _ => all.push(piece),
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr};

    use bulkhead_model::address::address_bits;

    use super::*;

    fn class_of(blocks: &BTreeMap<Prefix, ClassId>, address: IpAddr) -> ClassId {
        let host = Prefix::host(address);
        let around = (0..=128).rev().map(|len| host.truncate(len)).filter(|block| block.contains(host));
        around.into_iter().find_map(|block| blocks.get(&block).copied()).unwrap_or(ClassId::NOBODY)
    }

    #[test]
    fn random_changes_lead_where_the_blocks_lead() {
        let mut state = 0x1234_5678_u64;
        let mut below = |limit: u64| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 20) % limit
        };
        for _ in 0..50 {
            let mut blocks = BTreeMap::new();
            let mut segments = Segments::default();
            for _ in 0..60 {
                let byte = |number| [0u8, 1, 2, 127, 128, 255][number as usize];
                let mut byte = || byte(below(6));
                let (a, b) = (byte(), byte());
                let address = Ipv4Addr::new(if byte() > 2 { 255 } else { 0 }, 0, a, b);
                let len = [0, 1, 8, 16, 22, 24, 25, 30, 31, 31][below(10) as usize];
                let block = Prefix::new(address.into(), len);
                if below(3) == 0 {
                    blocks.remove(&block);
                } else {
                    blocks.insert(block, ClassId(below(4) as u32));
                }
                let before = segments.clone();
                let mut difference = Difference::default();
                segments.update(block, &blocks, &mut difference);
                let larger = blocks.iter().filter(|(prefix, _)| !prefix.is_host());
                assert_eq!(segments, Segments::of(larger), "{block} in {blocks:?}");
                let mut replayed = before;
                for gone in &difference.gone {
                    assert_eq!(replayed.0.remove(&gone.first), Some(*gone));
                }
                replayed.0.extend(difference.new.iter().map(|segment| (segment.first, *segment)));
                assert_eq!(replayed, segments);
                for third in [0, 1, 2, 3, 126, 127, 128, 129, 254, 255] {
                    for first in [0, 255] {
                        let address = Ipv4Addr::new(first, 0, third, third).into();
                        let found = segments.class_of(address_bits(address));
                        assert_eq!(found, class_of(&blocks, address), "{address} in {blocks:?}");
                    }
                }
            }
        }
    }
}
