//! Who somebody is: the fleet's certificate authority, the names in its certificates, join tokens, and TLS with them.
//!
//! Both listeners of the controller, the agent and the command line use the same few things:
//!
//! * [`Identity`]: an agent of one host, a controller, a relay, or an operator with groups; in certificates a SPIFFE ID.
//! * [`Authority`]: signs. It never takes a name from a request, only its public key.
//! * [`Credentials`]: what a holder has: its certificate, its key and the authorities that it trusts.
//! * [`JoinToken`]: how a machine that has nothing yet recognises the controller and is recognised by it.
//! * [`tls`]: connections made of these. A client trusts whoever has a certificate of the authority for
//!   [`tls::CONTROLLER_NAME`], under whatever address it was reached. Relays have that name too; only [`tls::connect_as_agent`]
//!   takes one for a controller.

mod authority;
mod certificate;
mod credentials;
pub mod door;
mod files;
mod name;
pub mod tls;
mod token;

pub use authority::{Authority, AuthorityError, LIFETIME, LIFETIME_MAX};
pub use certificate::{CertificateError, Holder};
pub use credentials::{Credentials, CredentialsError, Key, proves};
pub use files::{FileError, read_text, write_private, write_public};
pub use name::{GROUPS_MAX, Identity, NameError};
pub use token::{JoinToken, Secret, SecretDigest, TokenError};
