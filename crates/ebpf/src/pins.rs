//! Links of programs, pinned in a directory so that they outlive us: one file for each number (of an interface, of a control
//! group) and end of a name.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use bulkhead_dataplane::DataplaneError;

use crate::sys;

/// The links pinned in one directory.
#[derive(Debug)]
pub(crate) struct Pins {
    dir: PathBuf,
}

impl Pins {
    /// Those in a directory, which may not be there.
    pub(crate) fn of(dir: PathBuf) -> Self {
        Self { dir }
    }

    /// Opens the directory, made if it is not there.
    pub(crate) fn open(dir: PathBuf) -> Result<Self, DataplaneError> {
        fs::create_dir_all(&dir)
            .map_err(|error| DataplaneError::io(format!("make pin directory {}", dir.display()), error))?;
        Ok(Self::of(dir))
    }

    /// Where the link of a number is pinned.
    pub(crate) fn path(&self, number: u32, suffix: &str) -> PathBuf {
        self.dir.join(format!("{number}-{suffix}"))
    }

    /// Puts a program into the link of an earlier process. Whether there was a live one; a dead one is forgotten.
    pub(crate) fn take_over(
        &self,
        number: u32,
        suffix: &str,
        program: BorrowedFd<'_>,
    ) -> Result<bool, DataplaneError> {
        let path = self.path(number, suffix);
        update_or_forget(&path, program)
            .map_err(|error| DataplaneError::io(format!("take over link {}", path.display()), error))
    }

    /// Takes the link of a number off its hook.
    pub(crate) fn detach(&self, number: u32, suffix: &str) -> Result<(), DataplaneError> {
        let path = self.path(number, suffix);
        remove(&path).map_err(|error| DataplaneError::io(format!("remove link {}", path.display()), error))
    }

    /// Numbers with at least one link.
    pub(crate) fn attached(&self) -> Result<BTreeSet<u32>, DataplaneError> {
        let entries = match fs::read_dir(&self.dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(BTreeSet::new()),
            entries => entries,
        };
        let entries = entries
            .map_err(|error| DataplaneError::io(format!("list links in {}", self.dir.display()), error))?;
        Ok(entries
            .filter_map(Result::ok)
            .filter_map(|entry| entry.file_name().to_str()?.split_once('-')?.0.parse().ok())
            .collect())
    }

    /// Puts a program into a link that is there, or pins the one that `create` makes.
    pub(crate) fn attach(
        &self,
        number: u32,
        suffix: &str,
        program: BorrowedFd<'_>,
        create: impl FnOnce() -> io::Result<OwnedFd>,
    ) -> io::Result<()> {
        let path = self.path(number, suffix);
        if update_or_forget(&path, program)? {
            return Ok(());
        }
        sys::pin(create()?.as_fd(), &path)
    }
}

/// Whether there was a live link, which now runs `program`. The pin of a dead one is removed.
fn update_or_forget(path: &Path, program: BorrowedFd<'_>) -> io::Result<bool> {
    let link = match sys::open_pin(path) {
        Ok(link) => link,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error),
    };
    match sys::link_update(link.as_fd(), program) {
        Ok(()) => Ok(true),
        // What it was attached to has gone, and the link outlives it without use.
        Err(error) if error.raw_os_error() == Some(libc::ENOLINK) => remove(path).map(|()| false),
        Err(error) => Err(error),
    }
}

/// Takes a link off its hook and forgets it. Removing the pin alone would detach too, but some time later
/// (the kernel frees links from a work queue), and a caller who was told that traffic is no longer judged may
/// rely on it at once.
pub(crate) fn remove(path: &Path) -> io::Result<()> {
    match sys::open_pin(path) {
        Ok(link) => match sys::link_detach(link.as_fd()) {
            // What it was attached to has gone already.
            Err(error) if error.raw_os_error() == Some(libc::ENOLINK) => {}
            other => other?,
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}
