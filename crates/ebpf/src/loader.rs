//! Opens the compiled programs over pinned maps, creating what is not there yet.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use bulkhead_dataplane::DataplaneError;
use libbpf_rs::{MapCore, Object, ObjectBuilder};

use crate::capacities::Capacities;
use crate::layout::{Plain, StorageKey};
use crate::pins;
use crate::sys::{self, Table};

/// Compiled from `bpf/policy.bpf.c`.
static POLICY: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/policy.bpf.o"));
/// Compiled from `bpf/gate.bpf.c`.
static GATE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/gate.bpf.o"));

/// Compiled from `bpf/process.bpf.c`.
static PROCESS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/process.bpf.o"));

/// A map that every object has for itself.
const PRIVATE_MAP: &str = "scratch";
/// The programs at netfilter's hooks, by `enum gate`: one array for agents of all layouts.
const GATES_MAP: &str = "gates";

/// Where what agents of all layouts share is pinned.
pub(crate) fn gates_directory(root: &Path) -> PathBuf {
    root.join("gates")
}

/// Programs for the two hooks of a workload's interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Hook {
    /// Packets from the workload.
    FromWorkload,
    /// Packets to the workload.
    ToWorkload,
}

impl Hook {
    pub(crate) const BOTH: [Self; 2] = [Self::FromWorkload, Self::ToWorkload];

    pub(crate) fn program(self) -> &'static str {
        match self {
            Self::FromWorkload => "from_workload",
            Self::ToWorkload => "to_workload",
        }
    }
}

/// The loaded programs and their maps.
pub(crate) struct Loaded {
    policy: Object,
    gate: Object,
    process: Object,
}

impl std::fmt::Debug for Loaded {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Loaded")
    }
}

#[expect(unsafe_code, reason = "libbpf objects have no thread affinity")]
// SAFETY: `Object` holds pointers that nobody else has; libbpf keeps no thread-local state about them.
unsafe impl Send for Loaded {}

pub(crate) fn libbpf_error(context: impl Into<String>, error: &libbpf_rs::Error) -> DataplaneError {
    DataplaneError::io(context, io::Error::other(error.to_string()))
}

impl Loaded {
    /// Loads the programs over the maps pinned in `dir`, or over new ones that are pinned there. Where
    /// a map exists, its size counts and `capacities` is corrected.
    pub(crate) fn open(dir: &Path, capacities: &mut Capacities) -> Result<Self, DataplaneError> {
        for dir in [dir, &gates_directory(dir.parent().unwrap_or(dir))] {
            fs::create_dir_all(dir).map_err(|error| {
                DataplaneError::io(format!("make pin directory {}", dir.display()), error)
            })?;
        }
        let policy = load(POLICY, dir, capacities)?;
        let gate = load(GATE, dir, capacities)?;
        let process = load(PROCESS, dir, capacities)?;
        Ok(Self { policy, gate, process })
    }

    pub(crate) fn program(&self, hook: Hook) -> Result<libbpf_rs::ProgramMut<'_>, DataplaneError> {
        named(&self.policy, hook.program())
    }

    /// A program at netfilter's hooks.
    pub(crate) fn gate_program(&self, name: &str) -> Result<libbpf_rs::ProgramMut<'_>, DataplaneError> {
        named(&self.gate, name)
    }

    /// A program of control groups.
    pub(crate) fn process_program(&self, name: &str) -> Result<libbpf_rs::ProgramMut<'_>, DataplaneError> {
        named(&self.process, name)
    }

    /// Which endpoint each attached control group is.
    pub(crate) fn groups(&self) -> Result<Table<StorageKey, u32>, DataplaneError> {
        own_map(&self.process, "groups").map(Table::from_fd)
    }

    /// The array of programs that those attached to netfilter's hooks jump through.
    pub(crate) fn gates(&self) -> Result<Table<u32, u32>, DataplaneError> {
        own_map(&self.gate, GATES_MAP).map(Table::from_fd)
    }

    /// The array of programs that those go on with.
    pub(crate) fn inner_gates(&self) -> Result<Table<u32, u32>, DataplaneError> {
        own_map(&self.gate, "inner_gates").map(Table::from_fd)
    }

    /// An own descriptor of a map.
    pub(crate) fn map(&self, name: &'static str) -> Result<OwnedFd, DataplaneError> {
        own_map(&self.policy, name)
    }

    /// Pins again the maps whose pins somebody has removed; answers how many there were.
    pub(crate) fn put_back(&self) -> Result<u64, DataplaneError> {
        let mut count = 0;
        for map in [&self.policy, &self.gate, &self.process].into_iter().flat_map(Object::maps) {
            if let Some(path) = map.get_pin_path() {
                count += u64::from(pins::put_back(Path::new(path), map.as_fd())?);
            }
        }
        Ok(count)
    }

    pub(crate) fn table<K: Plain, V: Plain>(
        &self,
        name: &'static str,
    ) -> Result<Table<K, V>, DataplaneError> {
        self.map(name).map(Table::from_fd)
    }
}

fn load(object: &[u8], dir: &Path, capacities: &mut Capacities) -> Result<Object, DataplaneError> {
    let mut open = ObjectBuilder::default()
        .name("bulkhead")
        .and_then(|builder| builder.open_memory(object))
        .map_err(|error| libbpf_error("open the kernel programs", &error))?;
    for mut map in open.maps_mut() {
        let name = map.name().to_string_lossy().into_owned();
        if name == PRIVATE_MAP || name.contains('.') {
            continue;
        }
        let path = match (name.as_str(), dir.parent()) {
            (GATES_MAP, Some(root)) => gates_directory(root).join(&name),
            _ => dir.join(&name),
        };
        if let Some(size) = size_slot(capacities, &name) {
            if let Some(pinned) = pinned_size(&path)? {
                *size = pinned;
            }
            map.set_max_entries(*size).map_err(|error| libbpf_error(format!("size map {name}"), &error))?;
        }
        map.set_pin_path(&path).map_err(|error| libbpf_error(format!("pin map {name}"), &error))?;
    }
    open.load().map_err(|error| {
        libbpf_error(format!("load the kernel programs with pins in {}", dir.display()), &error)
    })
}

pub(crate) fn named<'a>(object: &'a Object, name: &str) -> Result<libbpf_rs::ProgramMut<'a>, DataplaneError> {
    object
        .progs_mut()
        .find(|program| program.name() == name)
        .ok_or_else(|| DataplaneError::Inconsistent(format!("no program {name}")))
}

fn own_map(object: &Object, name: &str) -> Result<OwnedFd, DataplaneError> {
    let duplicate = |fd: BorrowedFd<'_>| {
        fd.try_clone_to_owned()
            .map_err(|error| DataplaneError::io(format!("duplicate the descriptor of map {name}"), error))
    };
    object
        .maps()
        .find(|map| map.name() == name)
        .ok_or_else(|| DataplaneError::Inconsistent(format!("no map {name}")))
        .and_then(|map| duplicate(map.as_fd()))
}

/// Where the size of a map that is not in a bank comes from.
fn size_slot<'a>(capacities: &'a mut Capacities, map: &str) -> Option<&'a mut u32> {
    Some(match map {
        "endpoints" | "bindings" | "half_open" | "refusals" => &mut capacities.endpoints,
        "endpoint_addrs" | "owners" => &mut capacities.endpoint_addrs,
        "conns" => &mut capacities.conns,
        "denials" => &mut capacities.denials,
        "frags" => &mut capacities.frags,
        "events" => &mut capacities.events_bytes,
        _ => return None,
    })
}

fn pinned_size(path: &Path) -> Result<Option<u32>, DataplaneError> {
    let context = || format!("open pinned map {}", path.display());
    match sys::open_pin(path) {
        Ok(map) => {
            sys::max_entries(map.as_fd()).map(Some).map_err(|error| DataplaneError::io(context(), error))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(DataplaneError::io(context(), error)),
    }
}

/// Removes a pin directory with everything in it. Links that are pinned only here detach.
pub(crate) fn remove_pins(dir: &Path) -> Result<(), DataplaneError> {
    let io_error = |path: &Path, error| DataplaneError::io(format!("remove pin {}", path.display()), error);
    let mut paths: Vec<PathBuf> = Vec::new();
    match fs::read_dir(dir) {
        Ok(entries) => paths.extend(entries.filter_map(Result::ok).map(|entry| entry.path())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(io_error(dir, error)),
    }
    for path in paths {
        if path.is_dir() {
            remove_pins(&path)?;
        } else {
            fs::remove_file(&path).map_err(|error| io_error(&path, error))?;
        }
    }
    fs::remove_dir(dir).map_err(|error| io_error(dir, error))
}
