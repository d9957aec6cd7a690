//! nftables behind the dataplane trait: for hosts without the eBPF that Bulkhead needs, or where it is not wanted.
//!
//! Two tables of one name, `inet bulkhead` and `netdev bulkhead`; nothing else is touched. Rules are constant
//! ([`rules`]); what policy says stands in sets and maps ([`schema`], [`image`]), which each plan changes in one
//! transaction, written as netlink messages. Connections are conntrack's.
//!
//! `docs/design/004-nftables.md` has the decisions and where this differs from eBPF.
#![deny(missing_docs)]

mod capacities;
mod conntrack;
mod dataplane;
mod elements;
mod expression;
mod fence;
mod flows;
mod fresh;
mod groups;
mod guard;
mod image;
mod kernel;
mod links;
mod log;
mod lookup;
mod message;
mod object;
mod readback;
pub mod requirements;
mod rules;
mod schema;
mod segments;
mod skeleton;
mod socket;

pub use capacities::Capacities;
pub use dataplane::NftDataplane;
pub use fence::{Fence, Fenced};
