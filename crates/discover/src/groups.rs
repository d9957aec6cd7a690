//! Control groups of the unified hierarchy, by path or by the name of a systemd unit.

use std::collections::VecDeque;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use bulkhead_model::registration;

/// Directories looked at for a unit's name at most; systemd keeps units some three levels deep.
const DIRECTORIES_MAX: usize = 20_000;
/// `CGROUP2_SUPER_MAGIC` of linux/magic.h.
const CGROUP2_MAGIC: u64 = 0x6367_7270;
/// Inodes above this have no number among endpoints.
const INODE_MAX: u64 = (1 << 30) - 1;

/// A control group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Group {
    /// Inode of its directory.
    pub inode: u32,
    /// Its directory.
    pub path: PathBuf,
}

/// Finds a group by the absolute path of its directory, or by the name of that directory, as systemd names those of its
/// units.
///
/// # Errors
/// A sentence, if there is none, or it is in no unified hierarchy.
pub fn find(text: &str) -> Result<Group, String> {
    let path = if text.starts_with('/') { PathBuf::from(text) } else { by_name(text)? };
    let metadata =
        fs::metadata(&path).map_err(|error| format!("control group {}: {error}", path.display()))?;
    let file_system = rustix::fs::statfs(&path).map_err(|error| format!("{}: {error}", path.display()))?;
    if u64::try_from(file_system.f_type).ok() != Some(CGROUP2_MAGIC) || !metadata.is_dir() {
        return Err(format!("{} is no control group of the unified hierarchy (cgroup2)", path.display()));
    }
    match u32::try_from(metadata.ino()) {
        Ok(inode) if metadata.ino() <= INODE_MAX => Ok(Group { inode, path }),
        _ => Err(format!("control group {} has inode {}: too large", path.display(), metadata.ino())),
    }
}

fn by_name(name: &str) -> Result<PathBuf, String> {
    let mounts = fs::read_to_string("/proc/self/mounts").map_err(|error| error.to_string())?;
    let root = registration::unified_hierarchy(&mounts).ok_or("no cgroup2 file system is mounted")?;
    let mut waiting = VecDeque::from([PathBuf::from(root)]);
    for _ in 0..DIRECTORIES_MAX {
        let Some(directory) = waiting.pop_front() else {
            return Err(format!("no control group is named {name}: is the unit running?"));
        };
        let entries = fs::read_dir(&directory).into_iter().flatten().flatten();
        for entry in entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())) {
            if entry.file_name() == *name {
                return Ok(entry.path());
            }
            waiting.push_back(entry.path());
        }
    }
    Err(format!("more than {DIRECTORIES_MAX} control groups: give the path of {name}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_group_is_refused_by_name() {
        assert!(find("/tmp").unwrap_err().contains("no control group of the unified hierarchy"));
        assert!(find("/sys/fs/cgroup/none/such").unwrap_err().contains("No such file"));
        assert!(find("no-such-unit.service").unwrap_err().contains("is the unit running?"));
    }
}
