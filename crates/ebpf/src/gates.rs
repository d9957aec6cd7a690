//! Links between the programs and netfilter's hooks, pinned so that they outlive us.
//!
//! The kernel gives such a link no other program, and takes no two programs of one priority. So what is linked only jumps
//! to what stands in an array, and a new process, even of another layout, changes the array: no packet passes unjudged,
//! and none meets two generations.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use bulkhead_dataplane::DataplaneError;

use crate::loader::{Loaded, gates_directory, remove_pins};
use crate::pins::{Held, remove};
use crate::sys::{self, NetfilterHook, Table};

/// After every rewriting of destinations (also IPVS, which takes its packets at 98) and before sources are hidden
/// (`NF_IP_PRI_NAT_SRC` of include/uapi/linux/netfilter_ipv4.h).
const PRIORITY: i32 = 99;
/// `NFPROTO_IPV4` and `NFPROTO_IPV6`.
const FAMILIES: [(u32, &str); 2] = [(2, "v4"), (10, "v6")];
/// Number of the hook in `enum nf_inet_hooks`, what is linked there, and what that jumps to at which index.
const HOOKS: [(u32, &str); 3] = [(1, "enter_local_in"), (2, "enter_forward"), (3, "enter_local_out")];
/// `enum gate` of `bpf/gate.bpf.c`, by index.
const PROGRAMS: [&str; 3] = ["forward", "local_in", "local_out"];
/// `enum inner_gate`, by index: what those go on with.
const INNER_PROGRAMS: [&str; 3] = ["host_in", "forwarded_in", "forwarded_out"];

/// How often and how long to wait for a place at a hook.
const BUSY_TRIES: u32 = 200;
const BUSY_WAIT: Duration = Duration::from_millis(5);

/// The links pinned in one directory, which agents of all layouts share.
#[derive(Debug)]
pub(crate) struct Gates {
    dir: PathBuf,
    links: Held,
    /// Whether the programs in force are this process's.
    installed: bool,
}

impl Gates {
    /// Links the hooks if they are not linked yet. What is in force stays in force until [`Self::install`].
    pub(crate) fn open(root: &Path, loaded: &Loaded) -> Result<Self, DataplaneError> {
        let mut gates = Self { dir: gates_directory(root), links: Held::default(), installed: false };
        gates.link(loaded).map_err(|error| match error.raw_os_error() {
            Some(libc::EINVAL | libc::EOPNOTSUPP) => DataplaneError::Requirement {
                feature: "netfilter links",
                advice: "policy speaks of addresses as they are after the host's own rewriting, which programs at netfilter's \
                         hooks see: Linux 6.4 with CONFIG_NETFILTER_BPF_LINK"
                    .into(),
            },
            Some(libc::EBUSY) => DataplaneError::Requirement {
                feature: "a place at netfilter's hooks",
                advice: "another agent, with pins elsewhere, enforces in this network namespace: stop it and remove what it \
                         left with `bulkhead agent --cleanup --pin-dir ITS-DIRECTORY`"
                    .into(),
            },
            _ => DataplaneError::io("link programs to netfilter's hooks", error),
        })?;
        Ok(gates)
    }

    fn link(&mut self, loaded: &Loaded) -> io::Result<()> {
        let array = loaded.gates().map_err(io::Error::other)?;
        // What is linked jumps to the array that it was loaded with. If somebody has removed that one, all are made anew.
        let fresh = array.get(&0)?.is_none();
        if fresh {
            // Linked before there is something to jump to, it would refuse what workloads send.
            write(&array, loaded)?;
        }
        for (family, suffix) in FAMILIES {
            for (hook, name) in HOOKS {
                let path = self.dir.join(format!("{name}-{suffix}"));
                if fresh {
                    // At once, lest its place is still taken when the next one comes.
                    remove(&path)?;
                } else if let Ok(link) = sys::open_pin(&path) {
                    self.links.keep(path, link);
                    continue;
                }
                let program = loaded.gate_program(name).map_err(io::Error::other)?;
                let at = NetfilterHook { family, hook, priority: PRIORITY };
                let link = create(program.as_fd(), at)?;
                sys::pin(link.as_fd(), &path)?;
                self.links.keep(path, link);
            }
        }
        Ok(())
    }

    /// Puts this process's programs into force.
    pub(crate) fn install(&mut self, loaded: &Loaded) -> Result<(), DataplaneError> {
        // The kernel rewrites code that jumps through the array: far too slow to do for nothing.
        if !self.installed {
            write(&loaded.gates()?, loaded)
                .map_err(|error| DataplaneError::io("change the programs at netfilter's hooks", error))?;
            self.installed = true;
        }
        Ok(())
    }

    /// Pins again what somebody has removed; answers how many there were.
    pub(crate) fn put_back(&self) -> Result<u64, DataplaneError> {
        self.links.put_back()
    }

    /// Takes everything off the hooks.
    pub(crate) fn remove(root: &Path) -> Result<(), DataplaneError> {
        let dir = gates_directory(root);
        for entry in fs::read_dir(&dir).into_iter().flatten().flatten() {
            if let Ok(link) = sys::open_pin(&entry.path()) {
                // The array is no link.
                let _ = sys::link_detach(link.as_fd());
            }
        }
        remove_pins(&dir)
    }
}

/// Links a program. A link whose pin somebody has removed keeps its place until the kernel gets round to freeing it.
fn create(program: BorrowedFd<'_>, at: NetfilterHook) -> io::Result<OwnedFd> {
    let mut tries = 0;
    loop {
        match sys::netfilter_link_create(program, at) {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) && tries < BUSY_TRIES => {
                tries += 1;
                std::thread::sleep(BUSY_WAIT);
            }
            result => return result,
        }
    }
}

/// What programs go on with first.
fn write(array: &Table<u32, u32>, loaded: &Loaded) -> io::Result<()> {
    let inner = loaded.inner_gates().map_err(io::Error::other)?;
    for (array, programs) in [(&inner, INNER_PROGRAMS), (array, PROGRAMS)] {
        for (index, name) in (0..).zip(programs) {
            let program = loaded.gate_program(name).map_err(io::Error::other)?;
            array.put(&index, &program.as_fd().as_raw_fd().cast_unsigned())?;
        }
    }
    Ok(())
}
