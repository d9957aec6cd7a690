//! Where the controller is, whom to trust there and who to be: from flags, the environment, and a file.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bulkhead_identity::{Credentials, tls};
use bulkhead_model::document;
use serde::{Deserialize, Serialize};

use crate::cli::Common;
use crate::failure::Failure;

/// The socket of a controller on this machine.
const SOCKET: &str = "/run/bulkhead/controller.sock";
/// For everybody on a machine.
const SYSTEM_FILE: &str = "/etc/bulkhead/client.yaml";
/// What is spoken inside TLS.
const PROTOCOL: &str = "http/1.1";

/// `client.yaml`: what an operator needs to reach a controller.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
pub(crate) struct ClientConfig {
    /// `https://HOST:PORT` or `unix:///PATH`.
    pub(crate) server: String,
    /// Whose controllers to trust, PEM.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(crate) authorities: String,
    /// Who to be, PEM.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(crate) certificate: String,
    /// PEM.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(crate) key: String,
    /// Instead of a certificate.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(crate) token: String,
}

/// A controller that can be asked.
#[derive(Debug, Clone)]
pub(crate) enum Server {
    /// On this machine.
    Unix(PathBuf),
    /// Anywhere.
    Tls {
        /// `HOST:PORT`.
        address: String,
        config: Arc<tls::ClientConfig>,
        token: Option<String>,
    },
}

impl fmt::Display for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix://{}", path.display()),
            Self::Tls { address, .. } => write!(f, "https://{address}"),
        }
    }
}

/// An operator's own file.
pub(crate) fn default_config_path() -> Option<PathBuf> {
    let below = |variable, rest: &str| std::env::var_os(variable).map(|home| PathBuf::from(home).join(rest));
    below("XDG_CONFIG_HOME", "bulkhead/client.yaml").or_else(|| below("HOME", ".config/bulkhead/client.yaml"))
}

/// Where to ask.
pub(super) fn find(common: &Common) -> Result<Server, Failure> {
    let config = client_config(common)?;
    let url = match (&common.server, config.server.as_str()) {
        (Some(url), _) => url.clone(),
        (None, "") if Path::new(SOCKET).exists() => return Ok(Server::Unix(SOCKET.into())),
        (None, "") => {
            return Err(Failure::Unreachable(format!(
                "there is no controller on this machine ({SOCKET}), and no client configuration names another\n\
                 start one with \"bulkhead standalone\", or have an administrator make you a client.yaml with \
                 \"bulkhead certificate create operator/NAME\""
            )));
        }
        (None, url) => url.to_owned(),
    };
    if let Some(path) = url.strip_prefix("unix://") {
        return Ok(Server::Unix(path.into()));
    }
    let address = url.strip_prefix("https://").unwrap_or(&url).trim_end_matches('/');
    if address.contains("://") {
        return Err(Failure::Usage(format!("{url}: expected https://HOST:PORT or unix:///PATH")));
    }
    if config.authorities.is_empty() {
        return Err(Failure::Usage(format!(
            "whom to trust at {url}? A client configuration says so: have an administrator make you one with \
             \"bulkhead certificate create operator/NAME\", and put it at {}",
            default_config_path().unwrap_or_else(|| SYSTEM_FILE.into()).display()
        )));
    }
    let token = common.token.clone().or_else(|| Some(config.token.clone()).filter(|token| !token.is_empty()));
    let ClientConfig { authorities, certificate, key, .. } = config;
    let own = Credentials { certificate, key, authorities };
    let shown = (!own.certificate.is_empty()).then_some(&own);
    let tls = tls::client_config(&own.authorities, shown, PROTOCOL);
    let tls = tls.map_err(|error| Failure::Usage(format!("the client configuration: {error}")))?;
    Ok(Server::Tls { address: address.to_owned(), config: tls, token })
}

/// The file that was named, or the first that there is.
pub(crate) fn client_config(common: &Common) -> Result<ClientConfig, Failure> {
    let file = match &common.client_config {
        Some(file) => Some(file.clone()),
        None => default_config_path().into_iter().chain([SYSTEM_FILE.into()]).find(|file| file.exists()),
    };
    let Some(file) = file else { return Ok(ClientConfig::default()) };
    let name = file.display().to_string();
    let text = std::fs::read_to_string(&file)
        .map_err(|error| Failure::Usage(format!("cannot read {name}: {error}")))?;
    let documents = document::read(&name, &text).map_err(|problem| Failure::Usage(problem.to_string()))?;
    match documents.as_slice() {
        [] => Ok(ClientConfig::default()),
        [config] => serde_json::from_value(config.to_json())
            .map_err(|error| Failure::Usage(format!("{name}: {error}"))),
        _ => Err(Failure::Usage(format!("{name}: expected one document"))),
    }
}
