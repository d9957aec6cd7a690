//! The file of a store that goes on when its disk is full. See [`super::room`].

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::EmbeddedOptions;
use super::file::StoreFile;
use super::room::lacks_room;
use crate::state::Shared;
use crate::types::{Commit, StoreError};

/// How often a file that has failed for want of room is opened again, at most: all of it is read and checked.
const OPENED_EVERY: Duration = Duration::from_secs(1);

/// Of what changes leave free, keys under leases leave this part: a controller must be able to start, and to say whom it serves,
/// on a disk that it has filled itself.
const LEASES_LEAVE: u64 = 4;

/// What a group must leave free.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Leaves {
    /// What changes leave.
    Reserve,
    /// What keys under leases, and their removal, leave.
    Part,
}

/// The file, with what readers are shown of it.
pub(super) struct Guarded {
    /// `None`: it has failed for want of room, and could not be opened again since.
    file: Option<StoreFile>,
    path: PathBuf,
    log_changes_max: usize,
    reserve_bytes: u64,
    shared: Arc<Shared>,
    /// What was being written when it failed: it is there or it is not, all of it.
    doubted: Vec<Commit>,
    /// When it was tried to open it again.
    tried: Option<Instant>,
}

impl Guarded {
    pub(super) fn new(file: StoreFile, path: &Path, options: &EmbeddedOptions, shared: Arc<Shared>) -> Self {
        let EmbeddedOptions { directory: _, log_changes_max, reserve_bytes } = *options;
        let path = path.to_owned();
        let doubted = Vec::new();
        Self { file: Some(file), path, log_changes_max, reserve_bytes, shared, doubted, tried: None }
    }

    fn lacks_room(&self, leaves: Leaves, bytes: u64) -> bool {
        let reserve = match leaves {
            Leaves::Reserve => self.reserve_bytes,
            Leaves::Part => self.reserve_bytes.div_ceil(LEASES_LEAVE),
        };
        lacks_room(&self.path, reserve, bytes)
    }

    /// Makes sure that it is open, and that there is room for a small change.
    pub(super) fn mend(&mut self, leaves: Leaves) -> Result<(), StoreError> {
        if self.lacks_room(leaves, 0) {
            return Err(self.full());
        }
        if self.file.is_some() {
            return Ok(());
        }
        if self.tried.is_some_and(|tried| tried.elapsed() < OPENED_EVERY) {
            return Err(self.full());
        }
        self.open_again()
    }

    fn full(&self) -> StoreError {
        StoreError::Full { path: self.path.clone() }
    }

    fn open_again(&mut self) -> Result<(), StoreError> {
        self.tried = Some(Instant::now());
        let (file, loaded) = StoreFile::open(&self.path, true, self.log_changes_max)?;
        self.file = Some(file);
        let (shown, found) = (self.shared.read().revision(), loaded.state.revision());
        let doubted = std::mem::take(&mut self.doubted);
        if found == shown {
            return Ok(());
        }
        if doubted.last().is_none_or(|last| last.revision != found) {
            let reason = format!("it is at revision {found} after its disk was full, and was at {shown}");
            return Err(StoreError::Corrupt { path: self.path.clone(), reason });
        }
        self.show(doubted);
        Ok(())
    }

    /// Writes commits durably, all or none, and shows them to readers.
    pub(super) fn write(&mut self, commits: Vec<Commit>, leaves: Leaves) -> Result<(), StoreError> {
        if commits.is_empty() {
            return Ok(());
        }
        let Some(file) = &self.file else { return Err(self.full()) };
        let bytes = file.bytes(&commits, &self.shared.read());
        if self.lacks_room(leaves, bytes) {
            return Err(self.full());
        }
        let Some(file) = &mut self.file else { return Err(self.full()) };
        // Nobody else changes it: readers are not kept waiting while the file is written.
        let written = file.write(&commits, &self.shared.read());
        match written {
            Ok(()) => {
                self.show(commits);
                Ok(())
            }
            Err(full @ StoreError::Full { .. }) => self.find_out(commits, full),
            Err(error) => Err(error),
        }
    }

    /// Whether commits are there whose writing has failed for want of room.
    fn find_out(&mut self, commits: Vec<Commit>, full: StoreError) -> Result<(), StoreError> {
        let before = self.shared.read().revision();
        self.doubted = commits;
        // Closed before it is opened: it is locked.
        self.file = None;
        match self.open_again() {
            Ok(()) if self.shared.read().revision() > before => Ok(()),
            Ok(()) => Err(full),
            Err(StoreError::Full { path }) => Err(StoreError::OutcomeUnknown {
                store: path.display().to_string(),
                reason: "its disk became full meanwhile, make room there".into(),
            }),
            Err(error) => Err(error),
        }
    }

    fn show(&mut self, commits: Vec<Commit>) {
        {
            let mut state = self.shared.write();
            for commit in commits {
                if let Some(dropped) = state.commit(commit)
                    && let Some(file) = &mut self.file
                {
                    file.forget(dropped);
                }
            }
        }
        self.shared.announce();
    }

    /// Closes it.
    pub(super) fn close(self) -> Result<(), StoreError> {
        self.file.map_or(Ok(()), StoreFile::close)
    }
}
