//! How to reach an etcd cluster.

use std::path::{Path, PathBuf};

use etcd_client::{Certificate, ConnectOptions, Identity, TlsOptions};

use crate::types::StoreError;

use super::cluster::{CONNECT_TIME_MAX, KEEP_ALIVE_EVERY, KEEP_ALIVE_TIME_MAX};

/// Keys asked for at a time in a list: with objects of 600 bytes a page is some 600 KiB, and with the largest that etcd
/// takes (1.5 MiB) below the 2 GiB that a message may have.
const PAGE_KEYS: i64 = 1000;

/// How to open an [`super::Etcd`] store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EtcdOptions {
    /// The members, as `HOST:PORT`. If one does not answer, the next is asked.
    pub endpoints: Vec<String>,
    /// What all keys of the store begin with.
    pub prefix: String,
    /// Who we are to etcd, if it asks; with `password_file`.
    pub user: Option<String>,
    /// File with the user's password. White space at its end does not count.
    pub password_file: Option<PathBuf>,
    /// Authority (PEM) that the members' certificates must be of. Given, TLS is used; etcd is not reached over TLS
    /// without it, since no public authorities are built in.
    pub ca_file: Option<PathBuf>,
    /// Our certificate (PEM), if etcd asks for one; with `key_file`.
    pub cert_file: Option<PathBuf>,
    /// Our certificate's key (PEM).
    pub key_file: Option<PathBuf>,
    /// Keys asked for at a time in a list.
    pub page_keys: i64,
}

impl EtcdOptions {
    /// With the defaults.
    pub fn new(endpoints: Vec<String>, prefix: impl Into<String>) -> Self {
        Self {
            endpoints,
            prefix: prefix.into(),
            user: None,
            password_file: None,
            ca_file: None,
            cert_file: None,
            key_file: None,
            page_keys: PAGE_KEYS,
        }
    }

    /// As errors name the store.
    pub(crate) fn name(&self) -> String {
        format!("etcd://{}{}", self.endpoints.join(","), self.prefix)
    }

    /// The members as the client takes them.
    pub(super) fn urls(&self) -> Vec<String> {
        let scheme = if self.ca_file.is_some() { "https" } else { "http" };
        self.endpoints.iter().map(|endpoint| format!("{scheme}://{endpoint}")).collect()
    }

    /// Reads the files.
    pub(super) fn connect_options(&self) -> Result<ConnectOptions, StoreError> {
        let refused = |reason: String| StoreError::Refused { store: self.name(), reason };
        if self.endpoints.is_empty() || self.endpoints.iter().any(String::is_empty) {
            return Err(refused("its address must name at least one member as HOST:PORT".into()));
        }
        if let Some(endpoint) = self.endpoints.iter().find(|endpoint| endpoint.contains("://")) {
            return Err(refused(format!(
                "{endpoint:?} must be HOST:PORT; with a CA file it is asked over TLS"
            )));
        }
        if !self.prefix.starts_with('/') || self.prefix.ends_with('/') {
            return Err(refused(format!("prefix {:?} must begin with / and not end with one", self.prefix)));
        }
        let mut options = ConnectOptions::new()
            .with_connect_timeout(CONNECT_TIME_MAX)
            .with_keep_alive(KEEP_ALIVE_EVERY, KEEP_ALIVE_TIME_MAX)
            .with_keep_alive_while_idle(true)
            // A member without a leader must say so, instead of keeping watches that hear nothing.
            .with_require_leader(true)
            .with_auto_token_refresh(true);
        match (&self.user, &self.password_file) {
            (Some(user), Some(file)) => {
                let password = String::from_utf8_lossy(&self.read(file)?).trim_end().to_owned();
                options = options.with_user(user, password);
            }
            (None, None) => {}
            _ => return Err(refused("a user needs a password file, and the other way round".into())),
        }
        match (&self.ca_file, &self.cert_file, &self.key_file) {
            (None, None, None) => {}
            (None, ..) => {
                return Err(refused("TLS needs the CA file that the members are checked by".into()));
            }
            (Some(ca), None, None) => {
                options =
                    options.with_tls(TlsOptions::new().ca_certificate(Certificate::from_pem(self.read(ca)?)));
            }
            (Some(ca), Some(cert), Some(key)) => {
                let tls = TlsOptions::new()
                    .ca_certificate(Certificate::from_pem(self.read(ca)?))
                    .identity(Identity::from_pem(self.read(cert)?, self.read(key)?));
                options = options.with_tls(tls);
            }
            _ => return Err(refused("a certificate needs its key file, and the other way round".into())),
        }
        Ok(options)
    }

    fn read(&self, file: &Path) -> Result<Vec<u8>, StoreError> {
        std::fs::read(file)
            .map_err(|error| StoreError::Io { path: file.to_owned(), reason: error.to_string() })
    }
}
