//! What tests of every dataplane need: policies by hand and at random, packets, and namespaces to send them through.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails here")]

pub mod conformance;
pub mod connections;
pub mod differential;
pub mod frames;
pub mod machine;
pub mod namespace;
pub mod packet;
pub mod policy;
pub mod processes;
pub mod random;
pub mod stations;
pub mod traffic;
pub mod world;
