//! Who may come in: certificates, tokens, revocations, and who a caller is.
//!
//! * [`Trust`] holds the authority and this controller's own certificate.
//! * [`Grants`] is what the repository says about tokens and revocations, kept current by [`follow`], so that every controller
//!   of a repository knows a revocation as soon as it is written.
//! * [`Caller`] is who makes a request, made by the listeners and asked by whatever they serve.

mod caller;
mod connections;
mod enrollment;
mod grants;
mod oidc;
mod records;
mod roles;
mod trust;

pub(crate) use caller::{Caller, Who};
pub(crate) use connections::{AgentConnection, agents, operators, unix_listener};
pub(crate) use enrollment::{EnrollmentError, certify, enroll, renew};
pub(crate) use grants::{Grants, follow, operator_token};
pub(crate) use oidc::Oidc;
pub use oidc::OidcConfig;
pub(crate) use records::{Grant, Revocation, Revoked, Token};
pub(crate) use roles::Permissions;
pub use trust::TrustError;
pub(crate) use trust::{Trust, keep_certificate};
