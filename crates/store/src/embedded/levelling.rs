//! Which rows of the objects are written when.
//!
//! The log alone makes a commit last: it is written at its end, where a page takes many commits. An object's row is
//! somewhere in the middle of its table, and a page must be written for it alone. So rows are written later, those of many
//! commits together and in the order of their keys: a page is then written once for all that has changed on it, and an
//! object that has changed ten times once. Until then the log says what the row does not, and is read again at the start.

use std::collections::BTreeSet;
use std::sync::Arc;

use crate::types::{Commit, Revision};

/// Rows that are written in a round for each change in the commits that they are written with: so a round ends before half as
/// many changes have come as it has rows.
const ROWS_FOR_A_CHANGE: usize = 2;

/// Keys whose rows are behind the log.
#[derive(Debug)]
pub(super) struct Levelling {
    /// Changes from which on a round begins.
    changes_max: usize,
    /// The rows say what the log says up to this revision.
    level: Revision,
    /// Keys that have changed since the round began.
    later: BTreeSet<Arc<str>>,
    later_changes: usize,
    /// Keys whose rows this round still has to write.
    round: BTreeSet<Arc<str>>,
    /// What the round brings the rows up to.
    round_level: Revision,
}

impl Levelling {
    /// With a file whose rows are as of `level`, and where `ahead` changed since.
    pub(super) fn new(
        changes_max: usize,
        level: Revision,
        ahead: impl IntoIterator<Item = Arc<str>>,
    ) -> Self {
        let later: BTreeSet<_> = ahead.into_iter().collect();
        Self {
            changes_max,
            level,
            later_changes: later.len(),
            later,
            round: BTreeSet::new(),
            round_level: level,
        }
    }

    /// The rows say what the log says up to this revision, once those that [`Levelling::next`] named are written.
    pub(super) fn level(&self) -> Revision {
        self.level
    }

    /// A commit is being written.
    pub(super) fn changed(&mut self, commit: &Commit) {
        self.later.extend(commit.changes.iter().map(|change| Arc::clone(&change.key)));
        self.later_changes += commit.changes.len();
    }

    /// Keys that [`Levelling::next`] would name with commits of so many changes.
    pub(super) fn rows(&self, changes: usize) -> impl Iterator<Item = &Arc<str>> {
        let begins = self.round.is_empty() && self.later_changes > self.changes_max;
        let round = if begins { &self.later } else { &self.round };
        round.iter().take(changes.saturating_mul(ROWS_FOR_A_CHANGE))
    }

    /// Keys whose rows are to be written, as of `revision`, together with commits of so many changes after it.
    pub(super) fn next(&mut self, changes: usize, revision: Revision) -> Vec<Arc<str>> {
        if self.round.is_empty() && self.later_changes > self.changes_max {
            self.round = std::mem::take(&mut self.later);
            self.later_changes = 0;
            self.round_level = revision;
        }
        let mut rows = Vec::new();
        while rows.len() < changes.saturating_mul(ROWS_FOR_A_CHANGE)
            && let Some(key) = self.round.pop_first()
        {
            rows.push(key);
        }
        if self.round.is_empty() {
            // Nothing is behind but what has changed since the round began.
            self.level = self.round_level;
        }
        rows
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::Change;

    fn commit(revision: u64, keys: &[&str]) -> Commit {
        let changes = keys.iter().map(|key| Change { key: (*key).into(), object: None }).collect();
        Commit { revision: Revision(revision), changes }
    }

    #[test]
    fn rows_are_written_in_rounds_by_key_and_the_level_rises_when_a_round_is_done() {
        let mut levelling = Levelling::new(3, Revision(0), []);
        let mut written = Vec::new();
        let mut levels = Vec::new();
        let commits = [
            commit(1, &["d", "b"]),
            commit(2, &["c", "b"]),
            commit(3, &["a"]),
            commit(4, &["b"]),
            commit(5, &["e"]),
        ];
        for commit in &commits {
            let before = Revision(commit.revision.0 - 1);
            let expected: Vec<_> = levelling.rows(commit.changes.len()).cloned().collect();
            let at = written.len();
            written.extend(levelling.next(commit.changes.len(), before));
            assert_eq!(written[at..], expected);
            levelling.changed(commit);
            levels.push(levelling.level().0);
        }
        // A round of b, c, d as of revision 2 goes along with the third and fourth commit. What came meanwhile waits.
        assert_eq!(written, ["b", "c", "d"].map(Arc::from));
        assert_eq!(levels, [0, 0, 0, 2, 2]);
        assert_eq!(levelling.later.len(), 3);
    }
}
