//! Links between the programs and the hooks of interfaces, pinned so that they outlive us.

use std::collections::BTreeSet;
use std::os::fd::AsFd;
use std::path::Path;

use bulkhead_dataplane::DataplaneError;
use bulkhead_model::host_policy::Attachment;

use crate::loader::{Hook, Loaded};
use crate::pins::Pins;
use crate::sys;

impl Hook {
    /// Number of the attach type. The programs are loaded with none expected: the kernel compares it
    /// only for program arrays, and libbpf would refuse to pass it on.
    pub(crate) fn attach_type(self) -> u32 {
        match self {
            Self::FromWorkload => libbpf_sys::BPF_TCX_INGRESS,
            Self::ToWorkload => libbpf_sys::BPF_TCX_EGRESS,
        }
    }

    /// End of the pin's name.
    fn suffix(self) -> &'static str {
        match self {
            Self::FromWorkload => "from",
            Self::ToWorkload => "to",
        }
    }
}

/// Where they are pinned, under the directory of a layout.
const DIRECTORY: &str = "links";

/// The links pinned in one directory.
#[derive(Debug)]
pub(crate) struct Links {
    pins: Pins,
}

impl Links {
    pub(crate) fn open(dir: &Path) -> Result<Self, DataplaneError> {
        Ok(Self { pins: Pins::open(dir.join(DIRECTORY))? })
    }

    /// Those of an agent of another layout.
    pub(crate) fn of_another(dir: &Path) -> Self {
        Self { pins: Pins::of(dir.join(DIRECTORY)) }
    }

    /// Attaches both programs, or replaces those that are attached: each switch is one atomic store in
    /// the kernel, and no packet passes unjudged.
    pub(crate) fn attach(&mut self, loaded: &Loaded, ifindex: u32) -> Result<(), DataplaneError> {
        for hook in Hook::BOTH {
            let program = loaded.program(hook)?;
            let create = || sys::link_create(program.as_fd(), ifindex, hook.attach_type());
            self.pins.attach(ifindex, hook.suffix(), program.as_fd(), create).map_err(|error| match error
                .raw_os_error()
            {
                Some(libc::ENODEV) => DataplaneError::Gone { attachment: Attachment::Interface(ifindex) },
                _ => DataplaneError::io(format!("attach {} to interface {ifindex}", hook.program()), error),
            })?;
        }
        Ok(())
    }

    /// Puts our programs into the links of an earlier process. Forgets links whose interface is gone.
    pub(crate) fn take_over(&mut self, loaded: &Loaded) -> Result<(), DataplaneError> {
        for ifindex in self.attached()? {
            for hook in Hook::BOTH {
                self.pins.take_over(ifindex, hook.suffix(), loaded.program(hook)?.as_fd())?;
            }
        }
        Ok(())
    }

    /// Pins again what somebody has removed; answers how many there were.
    pub(crate) fn put_back(&self) -> Result<u64, DataplaneError> {
        self.pins.put_back()
    }

    pub(crate) fn detach(&mut self, ifindex: u32) -> Result<(), DataplaneError> {
        Hook::BOTH.into_iter().try_for_each(|hook| self.pins.detach(ifindex, hook.suffix()))
    }

    /// Interfaces with at least one link.
    pub(crate) fn attached(&self) -> Result<BTreeSet<u32>, DataplaneError> {
        self.pins.attached()
    }
}
