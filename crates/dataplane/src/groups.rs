//! Control groups by the inodes of their directories.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use bulkhead_model::registration;

/// A control group of the unified hierarchy, open.
#[derive(Debug)]
pub struct ControlGroup {
    fd: OwnedFd,
    hierarchy: PathBuf,
}

impl ControlGroup {
    /// Opens the group whose directory has this inode.
    ///
    /// # Errors
    /// [`libc::ESTALE`] if there is none.
    pub fn open(inode: u32) -> io::Result<Self> {
        let mounts = fs::read_to_string("/proc/self/mounts")?;
        let missing = || io::Error::new(io::ErrorKind::NotFound, "no cgroup2 file system is mounted");
        let hierarchy = PathBuf::from(registration::unified_hierarchy(&mounts).ok_or_else(missing)?);
        let fd = open_inode(File::open(&hierarchy)?.as_fd(), inode.into())?;
        Ok(Self { fd, hierarchy })
    }

    /// Inodes from the group itself up to, and without, the root of the hierarchy: as many as its level.
    ///
    /// # Errors
    /// If the group has gone.
    pub fn line(&self) -> io::Result<Vec<u64>> {
        let path = fs::read_link(format!("/proc/self/fd/{}", self.fd.as_raw_fd()))?;
        let above = |path: &&Path| *path != self.hierarchy && path.starts_with(&self.hierarchy);
        let inodes = path.ancestors().take_while(above).map(|path| Ok(fs::metadata(path)?.ino()));
        inodes.collect()
    }
}

impl AsFd for ControlGroup {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Opens the directory of a file system like `mount` by its inode, as `open_by_handle_at(2)` does. Needs
/// CAP_DAC_READ_SEARCH.
fn open_inode(mount: BorrowedFd<'_>, inode: u64) -> io::Result<OwnedFd> {
    /// `struct file_handle` with `FILEID_KERNFS` (include/linux/exportfs.h).
    #[repr(C)]
    struct Handle {
        bytes: u32,
        kind: i32,
        inode: [u8; 8],
    }
    let mut handle = Handle { bytes: 8, kind: 0xfe, inode: inode.to_ne_bytes() };
    #[expect(unsafe_code, reason = "system call without a safe wrapper")]
    // SAFETY: the handle has as many bytes as it says, and outlives the call; the descriptor is ours alone.
    unsafe {
        let fd = libc::syscall(
            libc::SYS_open_by_handle_at,
            mount.as_raw_fd(),
            &raw mut handle,
            libc::O_RDONLY | libc::O_DIRECTORY | libc::O_CLOEXEC,
        );
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(OwnedFd::from_raw_fd(fd as i32))
    }
}
