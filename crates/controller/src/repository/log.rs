//! Which objects changed since when: a bounded list of names. What became of them is looked up.

use std::collections::{BTreeSet, VecDeque};

/// Names of changed objects, by revision.
#[derive(Debug)]
pub(crate) struct ChangeLog<K> {
    entries: VecDeque<(u64, K)>,
    /// The log knows every change after this revision.
    begins_after: u64,
    len_max: usize,
    /// Entries that are no longer there.
    dropped: u64,
}

impl<K: Ord + Clone> ChangeLog<K> {
    /// Knows every change after `begins_after`.
    pub(crate) fn new(begins_after: u64, len_max: usize) -> Self {
        Self { entries: VecDeque::new(), begins_after, len_max, dropped: 0 }
    }

    /// Notes a change; revisions must not fall.
    pub(crate) fn push(&mut self, revision: u64, key: K) {
        self.entries.push_back((revision, key));
        while self.entries.len() > self.len_max
            && let Some((dropped, _)) = self.entries.pop_front()
        {
            self.begins_after = dropped;
            self.dropped += 1;
        }
    }

    /// Revision of the last change, if one is known.
    pub(crate) fn newest(&self) -> u64 {
        self.entries.back().map_or(self.begins_after, |(revision, _)| *revision)
    }

    /// How many changes there were after `revision`; `None` if the log begins later.
    pub(crate) fn changes_since(&self, revision: u64) -> Option<usize> {
        let first = self.entries.partition_point(|(at, _)| *at <= revision);
        (revision >= self.begins_after).then(|| self.entries.len() - first)
    }

    /// Which entries are after `revision`, from the first to before the second; `None` if the log begins later. Entries are
    /// counted from the first that ever was: the same numbers always stand for the same entries.
    pub(crate) fn span_since(&self, revision: u64) -> Option<(u64, u64)> {
        let first = self.entries.partition_point(|(at, _)| *at <= revision);
        let count = |index: usize| self.dropped + index as u64;
        (revision >= self.begins_after).then(|| (count(first), count(self.entries.len())))
    }

    /// What changed after `revision`, each once; `None` if the log begins later.
    pub(crate) fn since(&self, revision: u64) -> Option<BTreeSet<K>> {
        if revision < self.begins_after {
            return None;
        }
        let first = self.entries.partition_point(|(at, _)| *at <= revision);
        Some(self.entries.range(first..).map(|(_, key)| key.clone()).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_each_name_once_until_it_has_forgotten() {
        let mut log = ChangeLog::new(4, 3);
        for (revision, key) in [(5, "a"), (6, "b"), (6, "a")] {
            log.push(revision, key);
        }
        assert_eq!((log.since(3), log.changes_since(3)), (None, None));
        assert_eq!(log.changes_since(5), Some(2));
        assert_eq!(log.since(4), Some(BTreeSet::from(["a", "b"])));
        assert_eq!(log.since(6), Some(BTreeSet::new()));
        log.push(7, "c");
        assert_eq!(log.since(4), None);
        assert_eq!(log.since(5), Some(BTreeSet::from(["a", "b", "c"])));
        assert_eq!(log.newest(), 7);
        assert_eq!(
            (log.span_since(4), log.span_since(5), log.span_since(7)),
            (None, Some((1, 4)), Some((4, 4)))
        );
    }
}
