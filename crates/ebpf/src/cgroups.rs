//! Links between the programs and control groups, pinned so that they outlive us.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use bulkhead_dataplane::DataplaneError;
use bulkhead_model::host_policy::Attachment;

use crate::layout::{StorageKey, subject_of};
use crate::loader::Loaded;
use crate::sys::{self, Table};
use crate::tcx::{remove, update_or_forget};

/// Name of the program, number of its attach type, end of the pin's name.
const HOOKS: [(&str, u32, &str); 2] = [
    ("to_process", libbpf_sys::BPF_CGROUP_INET_INGRESS, "to"),
    ("from_process", libbpf_sys::BPF_CGROUP_INET_EGRESS, "from"),
];

/// The links pinned in one directory.
#[derive(Debug)]
pub(crate) struct Groups {
    dir: PathBuf,
}

impl Groups {
    pub(crate) fn open(dir: &Path) -> Result<Self, DataplaneError> {
        let dir = dir.join("group-links");
        fs::create_dir_all(&dir)
            .map_err(|error| DataplaneError::io(format!("make pin directory {}", dir.display()), error))?;
        Ok(Self { dir })
    }

    /// Attaches both programs, or replaces those that are attached. Until the group has been named to them they refuse
    /// everything.
    pub(crate) fn attach(&self, loaded: &Loaded, inode: u32) -> Result<(), DataplaneError> {
        let attachment = Attachment::Cgroup(inode);
        let failed = |error| DataplaneError::io(format!("attach to {attachment}"), error);
        let group = open_group(inode).map_err(|error| match error.raw_os_error() {
            Some(libc::ESTALE) => DataplaneError::Gone { attachment },
            _ => failed(error),
        })?;
        let names = loaded.groups()?;
        for (name, hook, suffix) in HOOKS {
            let program = loaded.process_program(name)?;
            let path = self.dir.join(format!("{inode}-{suffix}"));
            attach_one(&path, program.as_fd(), group.as_fd(), hook).map_err(failed)?;
            name_group(&names, inode, hook).map_err(failed)?;
        }
        Ok(())
    }

    /// Puts our programs into the links of an earlier process. Forgets links whose group is gone.
    pub(crate) fn take_over(&self, loaded: &Loaded) -> Result<(), DataplaneError> {
        let names = loaded.groups()?;
        for inode in self.attached()? {
            for (name, hook, suffix) in HOOKS {
                let program = loaded.process_program(name)?;
                let path = self.dir.join(format!("{inode}-{suffix}"));
                update_or_forget(&path, program.as_fd())
                    .and_then(|lives| if lives { name_group(&names, inode, hook) } else { Ok(()) })
                    .map_err(|error| {
                        DataplaneError::io(format!("take over link {}", path.display()), error)
                    })?;
            }
        }
        Ok(())
    }

    pub(crate) fn detach(&self, inode: u32) -> Result<(), DataplaneError> {
        for (_, _, suffix) in HOOKS {
            let path = self.dir.join(format!("{inode}-{suffix}"));
            remove(&path)
                .map_err(|error| DataplaneError::io(format!("remove link {}", path.display()), error))?;
        }
        Ok(())
    }

    /// Groups with at least one link.
    pub(crate) fn attached(&self) -> Result<BTreeSet<u32>, DataplaneError> {
        let entries = fs::read_dir(&self.dir)
            .map_err(|error| DataplaneError::io(format!("list links in {}", self.dir.display()), error))?;
        Ok(entries
            .filter_map(Result::ok)
            .filter_map(|entry| entry.file_name().to_str()?.split_once('-')?.0.parse().ok())
            .collect())
    }
}

fn attach_one(path: &Path, program: BorrowedFd<'_>, group: BorrowedFd<'_>, hook: u32) -> io::Result<()> {
    if update_or_forget(path, program)? {
        return Ok(());
    }
    let link = sys::cgroup_link_create(program, group, hook)?;
    sys::pin(link.as_fd(), path)
}

/// Tells the programs whose packets they see.
fn name_group(names: &Table<StorageKey, u32>, inode: u32, attach_type: u32) -> io::Result<()> {
    let key = StorageKey { cgroup: inode.into(), attach_type, pad: 0 };
    names.put(&key, &subject_of(Attachment::Cgroup(inode)))
}

fn open_group(inode: u32) -> io::Result<OwnedFd> {
    sys::open_inode(File::open(hierarchy()?)?.as_fd(), inode.into())
}

/// Where the unified hierarchy is mounted.
fn hierarchy() -> io::Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    let unified = mounts.lines().find_map(|line| {
        let mut fields = line.split(' ').skip(1);
        let path = fields.next()?;
        (fields.next()? == "cgroup2").then(|| PathBuf::from(path))
    });
    unified.ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "no cgroup2 file system is mounted"))
}
