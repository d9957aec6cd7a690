//! Links of programs, pinned in a directory so that they outlive us: one file for each number (of an interface, of a control
//! group) and end of a name.
//!
//! The kernel takes a link off its hook when nobody refers to it any more. Their descriptors are therefore kept open
//! too: a pin that somebody removes opens nothing as long as this process lives, and it puts the pin back.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use bulkhead_dataplane::DataplaneError;

use crate::sys;

/// Descriptors of what is pinned, by path.
#[derive(Debug, Default)]
pub(crate) struct Held(BTreeMap<PathBuf, OwnedFd>);

impl Held {
    pub(crate) fn keep(&mut self, path: PathBuf, object: OwnedFd) {
        self.0.insert(path, object);
    }

    /// Pins again what is pinned no more; answers how many there were.
    pub(crate) fn put_back(&self) -> Result<u64, DataplaneError> {
        let mut count = 0;
        for (path, object) in &self.0 {
            count += u64::from(put_back(path, object.as_fd())?);
        }
        Ok(count)
    }
}

/// Pins an object again if there is nothing at its path; whether there was not.
pub(crate) fn put_back(path: &Path, object: BorrowedFd<'_>) -> Result<bool, DataplaneError> {
    if path.exists() {
        return Ok(false);
    }
    let pin = || {
        path.parent().map_or(Ok(()), fs::create_dir_all)?;
        sys::pin(object, path)
    };
    pin().map_err(|error| DataplaneError::io(format!("put back the pin {}", path.display()), error))?;
    Ok(true)
}

/// The links pinned in one directory.
#[derive(Debug)]
pub(crate) struct Pins {
    dir: PathBuf,
    held: Held,
}

impl Pins {
    /// Those in a directory, which may not be there.
    pub(crate) fn of(dir: PathBuf) -> Self {
        Self { dir, held: Held::default() }
    }

    /// Pins again what somebody has removed; answers how many there were.
    pub(crate) fn put_back(&self) -> Result<u64, DataplaneError> {
        self.held.put_back()
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
        &mut self,
        number: u32,
        suffix: &str,
        program: BorrowedFd<'_>,
    ) -> Result<bool, DataplaneError> {
        let path = self.path(number, suffix);
        let link = update_or_forget(&path, program)
            .map_err(|error| DataplaneError::io(format!("take over link {}", path.display()), error))?;
        let live = link.is_some();
        link.into_iter().for_each(|link| self.held.keep(path.clone(), link));
        Ok(live)
    }

    /// Takes the link of a number off its hook.
    pub(crate) fn detach(&mut self, number: u32, suffix: &str) -> Result<(), DataplaneError> {
        let path = self.path(number, suffix);
        // Without its pin it would not be found.
        if let Some(link) = self.held.0.remove(&path) {
            put_back(&path, link.as_fd())?;
        }
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
        &mut self,
        number: u32,
        suffix: &str,
        program: BorrowedFd<'_>,
        create: impl FnOnce() -> io::Result<OwnedFd>,
    ) -> io::Result<()> {
        let path = self.path(number, suffix);
        let link = match update_or_forget(&path, program)? {
            Some(link) => link,
            None => {
                let link = create()?;
                sys::pin(link.as_fd(), &path)?;
                link
            }
        };
        self.held.keep(path, link);
        Ok(())
    }
}

/// The live link, if there is one, which now runs `program`. The pin of a dead one is removed.
fn update_or_forget(path: &Path, program: BorrowedFd<'_>) -> io::Result<Option<OwnedFd>> {
    let link = match sys::open_pin(path) {
        Ok(link) => link,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    match sys::link_update(link.as_fd(), program) {
        Ok(()) => Ok(Some(link)),
        // What it was attached to has gone, and the link outlives it without use.
        Err(error) if error.raw_os_error() == Some(libc::ENOLINK) => remove(path).map(|()| None),
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
