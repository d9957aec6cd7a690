//! Links between the programs and the hooks of interfaces, pinned so that they outlive us.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};

use bulkhead_dataplane::DataplaneError;
use bulkhead_model::host_policy::Attachment;

use crate::loader::{Hook, Loaded};
use crate::sys;

impl Hook {
    /// Number of the attach type. The programs are loaded with none expected: the kernel compares it
    /// only for program arrays, and libbpf would refuse to pass it on.
    fn attach_type(self) -> u32 {
        match self {
            Self::FromWorkload => libbpf_sys::BPF_TCX_INGRESS,
            Self::ToWorkload => libbpf_sys::BPF_TCX_EGRESS,
        }
    }

    fn pin_name(self, ifindex: u32) -> String {
        match self {
            Self::FromWorkload => format!("{ifindex}-from"),
            Self::ToWorkload => format!("{ifindex}-to"),
        }
    }
}

/// The links pinned in one directory.
#[derive(Debug)]
pub(crate) struct Links {
    dir: PathBuf,
}

impl Links {
    pub(crate) fn open(dir: &Path) -> Result<Self, DataplaneError> {
        let dir = dir.join("links");
        fs::create_dir_all(&dir)
            .map_err(|error| DataplaneError::io(format!("make pin directory {}", dir.display()), error))?;
        Ok(Self { dir })
    }

    /// Attaches both programs, or replaces those that are attached: each switch is one atomic store in
    /// the kernel, and no packet passes unjudged.
    pub(crate) fn attach(&self, loaded: &Loaded, ifindex: u32) -> Result<(), DataplaneError> {
        for hook in Hook::BOTH {
            let program = loaded.program(hook)?;
            let path = self.dir.join(hook.pin_name(ifindex));
            attach_one(&path, program.as_fd(), ifindex, hook).map_err(|error| {
                match error.raw_os_error() {
                    Some(libc::ENODEV) => DataplaneError::Gone { attachment: Attachment::Interface(ifindex) },
                    _ => {
                        DataplaneError::io(format!("attach {} to interface {ifindex}", hook.program()), error)
                    }
                }
            })?;
        }
        Ok(())
    }

    /// Puts our programs into the links of an earlier process. Forgets links whose interface is gone.
    pub(crate) fn take_over(&self, loaded: &Loaded) -> Result<(), DataplaneError> {
        for ifindex in self.attached()? {
            for hook in Hook::BOTH {
                let program = loaded.program(hook)?;
                let path = self.dir.join(hook.pin_name(ifindex));
                update_or_forget(&path, program.as_fd()).map_err(|error| {
                    DataplaneError::io(format!("take over link {}", path.display()), error)
                })?;
            }
        }
        Ok(())
    }

    pub(crate) fn detach(&self, ifindex: u32) -> Result<(), DataplaneError> {
        for hook in Hook::BOTH {
            let path = self.dir.join(hook.pin_name(ifindex));
            remove(&path)
                .map_err(|error| DataplaneError::io(format!("remove link {}", path.display()), error))?;
        }
        Ok(())
    }

    /// Interfaces with at least one link.
    pub(crate) fn attached(&self) -> Result<BTreeSet<u32>, DataplaneError> {
        let entries = fs::read_dir(&self.dir)
            .map_err(|error| DataplaneError::io(format!("list links in {}", self.dir.display()), error))?;
        Ok(entries
            .filter_map(Result::ok)
            .filter_map(|entry| entry.file_name().to_str()?.split_once('-')?.0.parse().ok())
            .collect())
    }
}

fn attach_one(path: &Path, program: BorrowedFd<'_>, ifindex: u32, hook: Hook) -> io::Result<()> {
    if update_or_forget(path, program)? {
        return Ok(());
    }
    let link = sys::link_create(program, ifindex, hook.attach_type())?;
    sys::pin(link.as_fd(), path)
}

/// Whether there was a live link, which now runs `program`. The pin of a dead one is removed.
pub(crate) fn update_or_forget(path: &Path, program: BorrowedFd<'_>) -> io::Result<bool> {
    let link = match sys::open_pin(path) {
        Ok(link) => link,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error),
    };
    match sys::link_update(link.as_fd(), program) {
        Ok(()) => Ok(true),
        // The interface has gone, and the link outlives it without use.
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
            // Its interface has gone already.
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
