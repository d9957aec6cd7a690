//! The agents' side: sessions, what they publish, their leases, and their flow reports.

mod inventory;
mod lease;
mod messages;
mod pace;
mod pump;
mod registry;
mod server;
mod session;

pub(crate) use lease::keep_leases;
pub(crate) use messages::packed;
pub(crate) use pace::Pace;
pub(crate) use registry::Registry;
pub(crate) use server::serve;
