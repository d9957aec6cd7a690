//! A disk that is full: noticed beforehand where that is possible, and told apart from worse where it is not.
//!
//! Before each group the writer looks whether [`RESERVE_BYTES`] are left and some for the group. So a store that fills its disk stops in good order, and
//! what is left is enough to open it again, and for the audit log to say what was refused. Others may fill the disk in
//! between, and a quota is not seen that way: then a write fails in the middle of a transaction. redb does nothing more with
//! a file after that, so it is opened again, which tells whether the transaction is there.
//!
//! That is sound for a write or a change of length that was refused for want of room: what the system says of the file is
//! what it will bring to the disk. It is not after a failed sync, whatever the reason: Linux takes pages for written then that
//! are not, and a file that is opened again is read from them. [`Troubles`] keeps the two apart.

use std::fs::File;
use std::io;
use std::ops::Bound;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use redb::backends::FileBackend;
use redb::{BackendError, StorageBackend};

/// Bytes that the store leaves to a file system.
pub const RESERVE_BYTES: u64 = 4 << 20;
/// The file takes so many times the bytes of what is written, rows of the log and of objects: once for themselves, and pages around
/// them. What a page is written anew for that has little on it, the reserve is for.
const BYTES_PER_BYTE: u64 = 3;

/// Bytes that whoever runs us may still write to the file system of a path; `None` if it does not say.
pub fn free_bytes(path: &Path) -> Option<u64> {
    let found = rustix::fs::statvfs(path).ok()?;
    // Some that are made of others have no number.
    (found.f_blocks > 0).then(|| found.f_bavail.saturating_mul(found.f_frsize))
}

/// Whether changes of so many bytes would leave less than `reserve`; never, if that is 0.
pub(super) fn lacks_room(path: &Path, reserve: u64, bytes: u64) -> bool {
    let needed = reserve.saturating_add(bytes.saturating_mul(BYTES_PER_BYTE));
    reserve > 0 && free_bytes(path).is_some_and(|free| free < needed)
}

/// Whether an error means that there is no room.
pub fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// What has gone wrong with a file since it was opened.
#[derive(Debug, Default)]
pub(super) struct Troubles {
    full: AtomicBool,
    worse: AtomicBool,
}

impl Troubles {
    /// Whether there was no room, and nothing else.
    pub(super) fn only_full(&self) -> bool {
        self.full.load(Relaxed) && !self.worse.load(Relaxed)
    }

    fn note<T>(&self, result: io::Result<T>) -> io::Result<T> {
        result.inspect_err(|error| {
            let which = if is_full(error) { &self.full } else { &self.worse };
            which.store(true, Relaxed);
        })
    }
}

/// A file that notes what goes wrong.
#[derive(Debug)]
pub(super) struct Noted {
    file: FileBackend,
    troubles: Arc<Troubles>,
}

impl Noted {
    /// A file that exists and is not empty: redb would begin anew in one that is.
    pub(super) fn open(path: &Path, troubles: &Arc<Troubles>) -> Result<Self, redb::Error> {
        let file = File::options().read(true).write(true).open(path)?;
        if file.metadata()?.len() == 0 {
            return Err(redb::Error::Corrupted("the file is empty".into()));
        }
        Ok(Self { file: FileBackend::new(file)?, troubles: Arc::clone(troubles) })
    }
}

impl StorageBackend for Noted {
    fn len(&self) -> io::Result<u64> {
        self.troubles.note(self.file.len())
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.troubles.note(self.file.read(offset, out))
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.troubles.note(self.file.set_len(len))
    }

    fn sync_data(&self) -> io::Result<()> {
        self.file.sync_data().inspect_err(|_any| self.troubles.worse.store(true, Relaxed))
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.troubles.note(self.file.write(offset, data))
    }

    fn close(&self) -> io::Result<()> {
        self.file.close()
    }

    fn try_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
        self.file.try_lock_range(start, end)
    }

    fn try_lock_shared_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
        self.file.try_lock_shared_range(start, end)
    }

    fn lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.file.lock_range(start, end)
    }

    fn lock_shared_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.file.lock_shared_range(start, end)
    }

    fn unlock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.file.unlock_range(start, end)
    }

    fn query_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
        self.file.query_lock_range(start, end)
    }
}
