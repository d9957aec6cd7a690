//! Controllers, over an etcd of three members or alone, while parts of it die, cannot reach each other, or have no room. After
//! each: every agent knows what the repository holds.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod disks;
// The same as in the store's own tests.
#[path = "../../../store/tests/store/etcd_server.rs"]
#[allow(dead_code, reason = "the store's tests use more of it")]
mod etcd_server;
mod fleet;
#[path = "../controller/harness.rs"]
#[allow(dead_code, unused_imports, unused_macros, reason = "the controller's tests use more of it")]
mod harness;
mod kills;
mod partitions;
mod process;
mod proxy;
mod reconnects;
mod relays;
mod slow;
// The same as in the store's own tests.
#[path = "../../../store/tests/store/small_disk.rs"]
mod small_disk;
