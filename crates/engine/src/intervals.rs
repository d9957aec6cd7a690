//! Sets of port keys as disjoint intervals, made for being eaten up piece by piece.

use std::collections::BTreeMap;

use bulkhead_model::ports::{PORT_KEY_END, PortKey};

/// Disjoint intervals, both ends included.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Intervals(BTreeMap<PortKey, PortKey>);

impl Intervals {
    /// Every port key.
    pub(crate) fn full() -> Self {
        Self(BTreeMap::from([(0, PORT_KEY_END - 1)]))
    }

    /// These intervals, or every port key if there are none; they may overlap.
    pub(crate) fn of(intervals: &[(PortKey, PortKey)]) -> Self {
        let mut rest = Self::full();
        if intervals.is_empty() {
            return rest;
        }
        Self(intervals.iter().flat_map(|(first, last)| rest.take(*first, *last)).collect())
    }

    /// These intervals and nothing else; they must be disjoint.
    pub(crate) fn exactly(intervals: &[(PortKey, PortKey)]) -> Self {
        Self(intervals.iter().copied().collect())
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (PortKey, PortKey)> {
        self.0.iter().map(|(first, last)| (*first, *last))
    }

    /// Removes what lies between `first` and `last` and answers the pieces.
    pub(crate) fn take(&mut self, first: PortKey, last: PortKey) -> Vec<(PortKey, PortKey)> {
        let touched = self.touching(first, last);
        let mut pieces = Vec::with_capacity(touched.len());
        for (low, high) in touched {
            self.0.remove(&low);
            if low < first {
                self.0.insert(low, first - 1);
            }
            if high > last {
                self.0.insert(last + 1, high);
            }
            pieces.push((low.max(first), high.min(last)));
        }
        pieces
    }

    /// The pieces that [`Intervals::take`] would remove.
    pub(crate) fn within(&self, first: PortKey, last: PortKey) -> Vec<(PortKey, PortKey)> {
        let clip = |(low, high): (PortKey, PortKey)| (low.max(first), high.min(last));
        self.touching(first, last).into_iter().map(clip).collect()
    }

    fn touching(&self, first: PortKey, last: PortKey) -> Vec<(PortKey, PortKey)> {
        // The one that begins before `first` may reach into it; disjointness leaves no other.
        let before = self.0.range(..first).next_back().filter(|(_, high)| **high >= first);
        before.into_iter().chain(self.0.range(first..=last)).map(|(low, high)| (*low, *high)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn taking_splits_what_it_touches() {
        let mut set = Intervals::full();
        assert_eq!(set.take(10, 20), [(10, 20)]);
        assert_eq!(set.take(5, 30), [(5, 9), (21, 30)]);
        assert_eq!(set.within(0, 40), [(0, 4), (31, 40)]);
        assert!(set.take(5, 30).is_empty());
        assert_eq!(set.iter().collect::<Vec<_>>(), [(0, 4), (31, PORT_KEY_END - 1)]);
    }
}
