//! A controller as its clients see it: over REST, and over gRPC with agents that are played by the tests.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod agents;
mod documentation;
mod doors;
// The same as in the store's own tests.
#[path = "../../../store/tests/store/etcd_server.rs"]
#[allow(dead_code, reason = "the store's tests use more of it")]
mod etcd_server;
mod flows;
mod foreign;
mod guard;
mod harness;
mod identity;
mod kubernetes;
mod leases;
mod objects;
mod oidc;
mod operators;
mod relay;
mod resume;
mod several;
