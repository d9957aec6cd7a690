//! The words of Bulkhead as values.
//!
//! Pure: no clock, no IO, no async. Everything here is constructed valid or not at all, compares,
//! prints and serialises. Other crates act on these values; none of them acts here.
#![deny(missing_docs)]

pub mod address;
pub mod calico;
pub mod columns;
pub mod convert;
pub mod document;
pub mod entity;
pub mod facts;
pub mod flow;
pub mod foreign;
pub mod host_policy;
pub mod kind;
pub mod kubernetes;
pub mod labels;
pub mod meaning;
pub mod policy;
pub mod ports;
pub mod registration;
pub mod resource;
pub mod roles;
pub mod selector;
pub mod settings;
pub mod suggest;
pub mod time;
pub mod verdict;

pub use address::Prefix;
pub use document::Problem;
pub use entity::Entity;
pub use facts::Facts;
pub use kind::Kind;
pub use labels::Labels;
pub use meaning::Meaning;
pub use resource::{ObjectKey, Resource};
pub use selector::Selector;
pub use verdict::{Builtin, Direction, RuleRef, Verdict};
