//! A fleet on one machine: hosts and workloads made of network namespaces, the product's real processes in
//! them, and real traffic between them. Development only; knows the product by its binary and its APIs.
//!
//! ```text
//!   PREFIX-fabric ── br0 10.200.0.1, fd00:200::1 ─ controller
//!      │up         │up          │up
//!   PREFIX-HOST 10.200.0.(10+n): agent, routes to every other host's 10.(100+n).0.0/16 and fd00:(100+n)::/64
//!      │wl1  │wl2 …              host-side interfaces, routed
//!   PREFIX-w-NAME: eth0 10.(100+n).0.x/32, fd00:(100+n)::x/128
//! ```
//!
//! [`Lab`] owns namespaces, [`Bulkhead`] the processes. Both clean up when dropped, and [`Lab::new`] removes
//! what a crashed run of the same prefix left: namespaces, pins, and the processes of its ledger.

mod applications;
mod bulkhead;
mod docker;
mod http;
mod knock;
mod lab;
mod namespace;
mod probe;
mod process;
mod server;
mod spoof;
mod stream;
mod wait;
mod workload;

pub use applications::{Component, EXAMPLE, Example, HOSTS, Member, OTHER_PORT, PROBE_WAIT, expected};
pub use bulkhead::{Agent, AgentOptions, Bulkhead, Output, find_binary};
pub use docker::Docker;
pub use knock::{KnockReport, Knocks};
pub use lab::{Host, Lab};
pub use namespace::Netns;
pub use probe::{Family, Matrix, Outcome, Probe, Protocol, matrix, probe};
pub use process::Process;
pub use server::Server;
pub use spoof::send_spoofed;
pub use stream::{PingPong, PingPongReport, UdpReport, UdpStream};
pub use wait::{eventually, eventually_within};
pub use workload::Workload;
