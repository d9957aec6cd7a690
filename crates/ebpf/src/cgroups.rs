//! Links between the programs and control groups, pinned so that they outlive us.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;

use bulkhead_dataplane::{ControlGroup, DataplaneError};
use bulkhead_model::host_policy::Attachment;

use crate::layout::{StorageKey, subject_of};
use crate::loader::Loaded;
use crate::pins::Pins;
use crate::sys::{self, Table};

/// Name of the program, number of its attach type, end of the pin's name.
const HOOKS: [(&str, u32, &str); 2] = [
    ("to_process", libbpf_sys::BPF_CGROUP_INET_INGRESS, "to"),
    ("from_process", libbpf_sys::BPF_CGROUP_INET_EGRESS, "from"),
];

/// Where they are pinned, under the directory of a layout.
const DIRECTORY: &str = "group-links";

/// The links pinned in one directory.
#[derive(Debug)]
pub(crate) struct Groups {
    pins: Pins,
}

impl Groups {
    pub(crate) fn open(dir: &Path) -> Result<Self, DataplaneError> {
        Ok(Self { pins: Pins::open(dir.join(DIRECTORY))? })
    }

    /// Those of an agent of another layout.
    pub(crate) fn of_another(dir: &Path) -> Self {
        Self { pins: Pins::of(dir.join(DIRECTORY)) }
    }

    /// Attaches both programs, or replaces those that are attached. Until the group has been named to them they refuse
    /// everything.
    pub(crate) fn attach(&mut self, loaded: &Loaded, inode: u32) -> Result<(), DataplaneError> {
        let attachment = Attachment::Cgroup(inode);
        let failed = |error| DataplaneError::io(format!("attach to {attachment}"), error);
        let group = ControlGroup::open(inode).map_err(|error| match error.raw_os_error() {
            Some(libc::ESTALE) => DataplaneError::Gone { attachment },
            _ => failed(error),
        })?;
        let names = loaded.groups()?;
        for (name, hook, suffix) in HOOKS {
            let program = loaded.process_program(name)?;
            let create = || sys::cgroup_link_create(program.as_fd(), group.as_fd(), hook);
            self.pins.attach(inode, suffix, program.as_fd(), create).map_err(failed)?;
            name_group(&names, inode, hook).map_err(failed)?;
        }
        Ok(())
    }

    /// Puts our programs into the links of an earlier process. Forgets links whose group is gone.
    pub(crate) fn take_over(&mut self, loaded: &Loaded) -> Result<(), DataplaneError> {
        let names = loaded.groups()?;
        for inode in self.attached()? {
            for (name, hook, suffix) in HOOKS {
                if self.pins.take_over(inode, suffix, loaded.process_program(name)?.as_fd())? {
                    let what = format!("name {} to its programs", Attachment::Cgroup(inode));
                    name_group(&names, inode, hook).map_err(|error| DataplaneError::io(what, error))?;
                }
            }
        }
        Ok(())
    }

    /// Pins again what somebody has removed; answers how many there were.
    pub(crate) fn put_back(&self) -> Result<u64, DataplaneError> {
        self.pins.put_back()
    }

    pub(crate) fn detach(&mut self, inode: u32) -> Result<(), DataplaneError> {
        HOOKS.into_iter().try_for_each(|(_, _, suffix)| self.pins.detach(inode, suffix))
    }

    /// Groups with at least one link.
    pub(crate) fn attached(&self) -> Result<BTreeSet<u32>, DataplaneError> {
        self.pins.attached()
    }
}

/// Tells the programs whose packets they see.
fn name_group(names: &Table<StorageKey, u32>, inode: u32, attach_type: u32) -> io::Result<()> {
    let key = StorageKey { cgroup: inode.into(), attach_type, pad: 0 };
    names.put(&key, &subject_of(Attachment::Cgroup(inode)))
}
