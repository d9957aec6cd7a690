//! The words of Bulkhead as values.
//!
//! Pure: no clock, no IO, no async. Everything here is constructed valid or not at all, compares,
//! prints and serialises. Other crates act on these values; none of them acts here.
#![deny(missing_docs)]

pub mod address;
pub mod document;
pub mod entity;
pub mod facts;
pub mod flow;
pub mod host_policy;
pub mod kubernetes;
pub mod labels;
pub mod policy;
pub mod ports;
pub mod registration;
pub mod resource;
pub mod selector;
pub mod suggest;
pub mod verdict;

pub use address::Prefix;
pub use document::Problem;
pub use entity::Entity;
pub use facts::Facts;
pub use labels::Labels;
pub use resource::{Kind, ObjectKey, Resource};
pub use selector::Selector;
pub use verdict::{Builtin, Direction, RuleRef, Verdict};
