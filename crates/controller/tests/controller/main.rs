//! A controller as its clients see it: over REST, and over gRPC with agents that are played by the tests.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod agents;
mod documentation;
mod flows;
mod foreign;
mod guard;
mod harness;
mod identity;
mod leases;
mod objects;
mod operators;
mod resume;
