//! What stands in the store about controllers and sessions. Other processes write it, perhaps of another version, so
//! fields that are not known are passed over.

use serde::{Deserialize, Serialize};

/// What the keys of all of it begin with.
pub(super) const PREFIX: &str = "/bulkhead.dev/system/";
const CONTROLLERS: &str = "/bulkhead.dev/system/controllers/";
const SESSIONS: &str = "/bulkhead.dev/system/sessions/";
const EXPIRED: &str = "/bulkhead.dev/system/expired/";

/// A controller, under its lease.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct ControllerRecord {
    pub(crate) name: String,
    /// Where it serves operators, and the other controllers: `HOST:PORT`.
    pub(crate) api: String,
    /// Where it serves agents.
    pub(crate) agents: String,
    pub(crate) version: String,
    pub(crate) since_ms: u64,
    /// Which data directory it has: by that a controller knows what it left itself when it was killed.
    pub(crate) instance: String,
}

/// A session of a host, under the lease of the controller that holds it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct SessionRecord {
    pub(crate) controller: String,
    pub(crate) since_ms: u64,
    /// The controller's number of the session.
    pub(crate) session: u64,
    /// The agent's end of the connection, and the controller's; empty if they are not known.
    #[serde(default)]
    pub(crate) remote: String,
    #[serde(default)]
    pub(crate) local: String,
}

/// What stands under a key.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Key<'a> {
    Controller(&'a str),
    Session(&'a str),
    /// The workloads of a host were removed.
    Expired(&'a str),
}

pub(super) fn controller_key(name: &str) -> String {
    format!("{CONTROLLERS}{name}")
}

pub(super) fn session_key(host: &str) -> String {
    format!("{SESSIONS}{host}")
}

pub(super) fn expired_key(host: &str) -> String {
    format!("{EXPIRED}{host}")
}

/// Inverse of these.
pub(super) fn read_key(key: &str) -> Option<Key<'_>> {
    let session = key.strip_prefix(SESSIONS).map(Key::Session);
    let controller = || key.strip_prefix(CONTROLLERS).map(Key::Controller);
    session.or_else(controller).or_else(|| key.strip_prefix(EXPIRED).map(Key::Expired))
}

/// As it is written; text and numbers can always be.
pub(super) fn encode(record: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(record).unwrap_or_default()
}
