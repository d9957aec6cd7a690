//! Multi-host tests: the product's real processes on hosts made of network namespaces, and real traffic.
//!
//! Run as root, after `cargo build -p bulkhead`; see `crates/testbed` for what a lab looks like. Every test has
//! namespaces of its own prefix, so they can run at the same time.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails here")]

mod common;
mod traffic;

mod addresses;
mod agents;
mod changes;
mod containers;
mod controller;
mod damage;
mod endpoints;
mod fallback;
mod flows;
mod guard;
mod hosts;
mod inputs;
mod interfaces;
mod language;
mod moving;
mod processes;
mod reachability;
mod uninstall;
