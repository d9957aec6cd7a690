//! The agents' side: sessions, what they publish, and their flow reports.

mod controller;
mod desk;
mod gate;
mod inventory;
mod messages;
mod pace;
mod pump;
mod registry;
mod server;
mod session;
mod source;
mod stream;

pub(crate) use desk::{Begin, Caller, Desk, FlowStreams, Part, Publication, Published, Sessions, Speaker};
pub(crate) use gate::Enrolling;
pub(crate) use inventory::{name_in, published_by};
pub(crate) use messages::{joining, packed};
pub(crate) use pace::Pace;
#[cfg(test)]
pub(crate) use pump::Pump;
pub(crate) use pump::RELAY_SUBSCRIPTIONS_MAX;
pub(crate) use registry::Registry;
pub(crate) use server::{RELAY_AGENTS_MAX, serve};
pub(crate) use session::DRAIN_TIME_MAX;
pub(crate) use source::{Answers, Source};
