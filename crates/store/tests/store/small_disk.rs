//! A small file system of its own, which can be filled and emptied.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

/// Mounted until dropped.
pub(crate) struct SmallDisk {
    directory: TempDir,
}

impl SmallDisk {
    /// With so many bytes.
    pub(crate) fn new(bytes: u64) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let options = format!("size={bytes}");
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &options, "bulkhead-small-disk"])
            .arg(directory.path())
            .status();
        assert!(mounted.unwrap().success(), "mounting takes root");
        Self { directory }
    }

    pub(crate) fn path(&self) -> &Path {
        self.directory.path()
    }

    fn ballast(&self) -> PathBuf {
        self.path().join("ballast")
    }

    /// Somebody else takes all that is left but so many bytes, a page more or less.
    pub(crate) fn fill(&self, left: u64) {
        let mut ballast = File::options().create(true).append(true).open(self.ballast()).unwrap();
        let page = [1; 4096];
        while bulkhead_store::free_bytes(self.path()).unwrap() > left {
            if ballast.write_all(&page).is_err() {
                return;
            }
        }
    }

    /// And gives it back.
    pub(crate) fn make_room(&self) {
        std::fs::remove_file(self.ballast()).unwrap();
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Lazily: what a test that failed has open must not keep it.
        let _ = Command::new("umount").arg("-l").arg(self.path()).status();
    }
}
