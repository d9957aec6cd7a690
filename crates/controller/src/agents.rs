//! The agents' side: sessions, what they publish, and their flow reports.

mod gate;
mod inventory;
mod messages;
mod pace;
mod pump;
mod registry;
mod server;
mod session;

pub(crate) use gate::Enrolling;
pub(crate) use inventory::published_by;
pub(crate) use messages::packed;
pub(crate) use pace::Pace;
pub(crate) use registry::Registry;
pub(crate) use server::serve;
pub(crate) use session::DRAIN_TIME_MAX;
