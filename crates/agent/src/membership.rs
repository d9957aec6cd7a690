//! How this host is known to the controllers.

use bulkhead_identity::Identity;
use bulkhead_membership::{Membership, MembershipError, Place};

use crate::{AgentError, Config};

/// Name of the files of an agent's certificate and key, in [`Config::identity_directory`].
pub const IDENTITY_FILES: &str = "agent";

/// Reads the credentials, if there are any.
pub(crate) fn open(config: &Config) -> Result<Membership, AgentError> {
    let place = Place {
        identity: Identity::Agent(config.host.clone()),
        directory: config.identity_directory(),
        files: IDENTITY_FILES,
        token: config.join_token.clone(),
        controllers: config.controllers.clone(),
    };
    Membership::open(place).map_err(|error| match error {
        MembershipError::Credentials(error) => error.into(),
        MembershipError::Token(error) => error.into(),
        MembershipError::Other { holder } => AgentError::OtherHost { holder, host: config.host.clone() },
    })
}
