//! Who makes a request.

use std::fmt;
use std::sync::Arc;

use bulkhead_identity::{Holder, Identity};

use crate::guard::Ends;

/// The group whose members may do everything.
pub(crate) const ADMINS: &str = "bulkhead:admins";

/// Somebody, as far as is known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Who {
    /// Nobody that showed anything.
    Nobody,
    /// A process of this machine, by the kernel's word.
    Local {
        /// Its user.
        uid: u32,
    },
    /// An operator: by certificate or token.
    Operator(String),
    /// The agent of a host.
    Agent(String),
    /// Another controller.
    Controller(String),
    /// A relay: it has sessions for agents, and nothing to ask here.
    Relay(String),
}

/// Who makes a request, and from where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Caller {
    pub(crate) who: Who,
    pub(crate) groups: Arc<[String]>,
    /// The connection; `None`: the Unix socket.
    pub(crate) ends: Option<Ends>,
    /// What the connection was let in with.
    pub(crate) certificate: Option<Arc<Holder>>,
}

impl Caller {
    /// Somebody with or without a certificate, over TLS.
    pub(crate) fn over_tls(certificate: Option<Arc<Holder>>, ends: Ends) -> Self {
        let (who, groups) = match certificate.as_ref().map(|holder| &holder.identity) {
            None => (Who::Nobody, Vec::new()),
            Some(Identity::Agent(host)) => (Who::Agent(host.clone()), Vec::new()),
            Some(Identity::Controller(name)) => (Who::Controller(name.clone()), Vec::new()),
            Some(Identity::Relay(name)) => (Who::Relay(name.clone()), Vec::new()),
            Some(Identity::Operator { name, groups }) => (Who::Operator(name.clone()), groups.clone()),
        };
        Self { who, groups: groups.into(), ends: Some(ends), certificate }
    }

    /// A process of this machine. Root, and whoever the controller runs as, can read its files and so is an administrator.
    pub(crate) fn local(uid: u32, own_uid: u32) -> Self {
        let groups = if uid == 0 || uid == own_uid { vec![ADMINS.to_owned()] } else { Vec::new() };
        Self { who: Who::Local { uid }, groups: groups.into(), ends: None, certificate: None }
    }

    /// Who it is, without from where.
    pub(crate) fn name(&self) -> String {
        match &self.who {
            Who::Nobody => "nobody".into(),
            Who::Local { uid } => format!("local/{uid}"),
            Who::Operator(name) => format!("operator/{name}"),
            Who::Agent(host) => format!("agent/{host}"),
            Who::Controller(name) => format!("controller/{name}"),
            Who::Relay(name) => format!("relay/{name}"),
        }
    }

    /// From where it comes.
    pub(crate) fn from(&self) -> String {
        self.ends.map_or_else(|| "socket".into(), |ends| ends.remote.to_string())
    }

    pub(crate) fn is_admin(&self) -> bool {
        self.groups.iter().any(|group| group == ADMINS)
    }
}

/// As logs and the audit log name somebody.
impl fmt::Display for Caller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name())?;
        match self.ends {
            Some(ends) => write!(f, " from {}", ends.remote),
            None => Ok(()),
        }
    }
}
