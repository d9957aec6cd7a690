//! Tokens and revocations as they stand in the store.

use bulkhead_identity::{Holder, Identity};
use serde::{Deserialize, Serialize};
use std::time::{SystemTime, UNIX_EPOCH};

use super::hosts::HostPatterns;

/// What all their keys begin with. No resource is there.
pub(super) const PREFIX: &str = "/bulkhead.dev/system/";
const TOKENS: &str = "/bulkhead.dev/system/tokens/";
const JOINED: &str = "/bulkhead.dev/system/joined/";
const RELAYS: &str = "/bulkhead.dev/system/relays/";
const REVOCATIONS: &str = "/bulkhead.dev/system/revocations/";

/// What a token is good for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) enum Grant {
    /// A machine gets a certificate for its agent.
    Join {
        /// Only of this host, also if it has joined before; `None`: of any that never has.
        host: Option<String>,
    },
    /// A relay gets a certificate.
    Relay {
        /// Its name.
        name: String,
    },
    /// Requests are this operator's.
    Operator {
        /// Name.
        name: String,
        /// Groups.
        groups: Vec<String>,
    },
}

/// A token. Its secret is not kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct Token {
    pub(crate) id: String,
    /// Digest of its secret.
    pub(crate) digest: String,
    pub(crate) grant: Grant,
    /// How many machines may still join with it; operators' tokens: 0, and not counted.
    pub(crate) uses_left: u32,
    pub(crate) created_ms: u64,
    pub(crate) expires_ms: u64,
    /// Who made it.
    pub(crate) by: String,
}

/// A relay: what it may do stands here, whatever it joined with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct Relay {
    pub(crate) name: String,
    /// For which hosts it may speak.
    pub(crate) hosts: HostPatterns,
    pub(crate) since_ms: u64,
    /// Who said so.
    pub(crate) by: String,
}

/// A host that has joined: nobody else joins under its name by a token that is not for it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct Joined {
    /// Id of the token.
    pub(crate) token: String,
    /// Digest of the key that it joined with. If the answer was lost, whoever has that key may ask again.
    pub(crate) key: String,
    pub(crate) joined_ms: u64,
}

/// Whose certificates are refused.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) enum Revoked {
    /// One certificate.
    Serial(String),
    /// All that somebody (`agent/HOST`, `relay/NAME`, `operator/NAME`) had until then; operators' tokens too.
    Holder(String),
}

/// A revocation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct Revocation {
    pub(crate) of: Revoked,
    /// Certificates that began before are refused.
    pub(crate) since_ms: u64,
    /// Who revoked.
    pub(crate) by: String,
    pub(crate) reason: String,
}

impl Revocation {
    /// Whether it is about a certificate.
    pub(crate) fn covers(&self, holder: &Holder) -> bool {
        match &self.of {
            Revoked::Serial(serial) => *serial == holder.serial,
            Revoked::Holder(name) => {
                *name == holder.identity.to_string() && milliseconds(holder.not_before) < self.since_ms
            }
        }
    }

    /// Whether it is about whoever has a token that was made then.
    pub(super) fn covers_token(&self, operator: &str, created_ms: u64) -> bool {
        matches!(&self.of, Revoked::Holder(name) if name.strip_prefix("operator/") == Some(operator))
            && created_ms < self.since_ms
    }
}

/// A moment as milliseconds since 1970.
pub(super) fn milliseconds(time: SystemTime) -> u64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// Where a token stands.
pub(super) fn token_key(id: &str) -> String {
    format!("{TOKENS}{id}")
}

/// Where a relay stands.
pub(super) fn relay_key(name: &str) -> String {
    format!("{RELAYS}{name}")
}

/// Where it stands that a host has joined.
pub(super) fn joined_key(host: &str) -> String {
    format!("{JOINED}{host}")
}

/// Where a revocation stands.
pub(super) fn revocation_key(of: &Revoked) -> String {
    match of {
        Revoked::Serial(serial) => format!("{REVOCATIONS}serial/{serial}"),
        Revoked::Holder(name) => format!("{REVOCATIONS}holder/{name}"),
    }
}

/// Which revocation a holder's name would be under.
pub(super) fn of_holder(identity: &Identity) -> Revoked {
    Revoked::Holder(identity.to_string())
}

/// The same of an operator, by name.
pub(super) fn of_operator(name: &str) -> Revoked {
    Revoked::Holder(format!("operator/{name}"))
}

/// What stands under a key.
#[derive(Debug)]
pub(super) enum Key<'a> {
    Token(&'a str),
    Relay(&'a str),
    Revocation(Revoked),
}

/// Inverse of [`token_key`] and [`revocation_key`].
pub(super) fn read_key(key: &str) -> Option<Key<'_>> {
    if let Some(id) = key.strip_prefix(TOKENS) {
        return Some(Key::Token(id));
    }
    if let Some(name) = key.strip_prefix(RELAYS) {
        return Some(Key::Relay(name));
    }
    let rest = key.strip_prefix(REVOCATIONS)?;
    let (what, name) = rest.split_once('/')?;
    match what {
        "serial" => Some(Key::Revocation(Revoked::Serial(name.into()))),
        "holder" => Some(Key::Revocation(Revoked::Holder(name.into()))),
        _ => None,
    }
}
