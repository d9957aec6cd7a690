//! Names in certificates: `spiffe://bulkhead/agent/HOST`, `…/controller/NAME`, `…/relay/NAME`,
//! `…/operator/NAME`.
//!
//! SPIFFE's form (<https://spiffe.io/docs/latest/spiffe-about/spiffe-concepts/>) in the certificate's URI, so that other tools
//! can read it. An operator's groups are the organisations of the subject as in Kubernetes, or one with commas between.

use std::fmt;

/// Most groups of an operator.
pub const GROUPS_MAX: usize = 64;
/// Longest name or group, in bytes.
const NAME_BYTES_MAX: usize = 253;
const PREFIX: &str = "spiffe://bulkhead/";

/// Somebody.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Identity {
    /// The agent of a host.
    Agent(String),
    /// A controller.
    Controller(String),
    /// A relay, which is a controller to the agents of its site and speaks for their hosts to a controller.
    Relay(String),
    /// A person or a program that uses the API.
    Operator {
        /// Name.
        name: String,
        /// Groups, at most [`GROUPS_MAX`].
        groups: Vec<String>,
    },
}

/// A name that cannot be in a certificate.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} cannot be a name: expected 1 to 253 letters, digits, '.', '-', '_', '@' or ':'")]
pub struct NameError(pub String);

impl Identity {
    /// The agent of a host.
    ///
    /// # Errors
    /// If it cannot be a name.
    pub fn agent(host: &str) -> Result<Self, NameError> {
        checked(host).map(Self::Agent)
    }

    /// A controller.
    ///
    /// # Errors
    /// If it cannot be a name.
    pub fn controller(name: &str) -> Result<Self, NameError> {
        checked(name).map(Self::Controller)
    }

    /// A relay.
    ///
    /// # Errors
    /// If it cannot be a name.
    pub fn relay(name: &str) -> Result<Self, NameError> {
        checked(name).map(Self::Relay)
    }

    /// An operator.
    ///
    /// # Errors
    /// If a name cannot be one, or there are more than [`GROUPS_MAX`] groups.
    pub fn operator(name: &str, groups: &[String]) -> Result<Self, NameError> {
        if groups.len() > GROUPS_MAX {
            return Err(NameError(format!("{} groups", groups.len())));
        }
        let groups = groups.iter().map(|group| checked(group)).collect::<Result<_, _>>()?;
        Ok(Self::Operator { name: checked(name)?, groups })
    }

    /// The name without what it is a name of.
    pub fn name(&self) -> &str {
        match self {
            Self::Agent(name)
            | Self::Controller(name)
            | Self::Relay(name)
            | Self::Operator { name, groups: _ } => name,
        }
    }

    /// Groups; only operators have any.
    pub fn groups(&self) -> &[String] {
        match self {
            Self::Operator { name: _, groups } => groups,
            Self::Agent(_) | Self::Controller(_) | Self::Relay(_) => &[],
        }
    }

    /// The SPIFFE ID.
    pub fn uri(&self) -> String {
        format!("{PREFIX}{self}")
    }

    /// Inverse of [`Identity::uri`], with the groups of the subject.
    pub(crate) fn from_uri(uri: &str, groups: &[String]) -> Option<Self> {
        let (what, name) = uri.strip_prefix(PREFIX)?.split_once('/')?;
        match what {
            "agent" => Self::agent(name).ok(),
            "controller" => Self::controller(name).ok(),
            "relay" => Self::relay(name).ok(),
            "operator" => Self::operator(name, groups).ok(),
            _ => None,
        }
    }
}

/// `agent/HOST`, `controller/NAME`, `relay/NAME` or `operator/NAME`: how people and files name somebody.
impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = match self {
            Self::Agent(_) => "agent",
            Self::Controller(_) => "controller",
            Self::Relay(_) => "relay",
            Self::Operator { .. } => "operator",
        };
        write!(f, "{what}/{}", self.name())
    }
}

fn checked(name: &str) -> Result<String, NameError> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_' | b'@' | b':');
    let good = !name.is_empty() && name.len() <= NAME_BYTES_MAX && name.bytes().all(allowed);
    if good { Ok(name.to_owned()) } else { Err(NameError(name.to_owned())) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uris_are_read_back_and_others_are_not_ours() {
        let groups = vec!["net".to_owned()];
        for identity in [
            Identity::agent("h1.example").unwrap(),
            Identity::controller("c1").unwrap(),
            Identity::relay("site1").unwrap(),
            Identity::operator("ann@example.org", &groups).unwrap(),
        ] {
            assert_eq!(Identity::from_uri(&identity.uri(), &groups), Some(identity));
        }
        for uri in [
            "spiffe://bulkhead/agent/",
            "spiffe://bulkhead/agent/a/b",
            "spiffe://bulkhead/root/a",
            "spiffe://other/agent/a",
            "https://bulkhead/agent/a",
        ] {
            assert_eq!(Identity::from_uri(uri, &[]), None, "{uri}");
        }
        assert!(Identity::agent("a/b").is_err() && Identity::agent("").is_err());
    }
}
