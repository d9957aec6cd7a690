//! The eBPF dataplane: two tcx programs per workload interface, over tables that outlive the agent.
//!
//! The programs are in `bpf/`; `docs/design/001-first-path.md` says how the tables change while packets
//! flow. Everything is pinned in one directory of a BPF file system, so when this process ends the
//! kernel keeps enforcing, and the next process takes over without losing or leaking a packet.
#![deny(missing_docs)]

mod bank;
pub mod bench;
mod capacities;
mod cgroups;
mod dataplane;
mod endpoints;
mod events;
mod extent;
mod gates;
mod grace;
mod intern;
mod layout;
mod loader;
mod lookup;
mod mapping;
mod pins;
mod readback;
mod refusal;
pub mod requirements;
mod sweep;
mod sys;
mod tcx;
pub mod test_run;

pub use capacities::Capacities;
pub use dataplane::EbpfDataplane;
pub use layout::ABI_VERSION;
