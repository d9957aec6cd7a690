//! Where a store is, as one line of text: `embedded:///DIRECTORY`, `etcd://HOST:PORT,HOST:PORT/PREFIX` or `memory:`.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;

use crate::etcd::{Etcd, EtcdOptions};
use crate::types::StoreError;
use crate::{Embedded, Memory, Store};

/// What keys in etcd begin with unless told otherwise.
pub const ETCD_PREFIX: &str = "/bulkhead";

/// Where a store is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Location {
    /// In this process, and gone with it.
    Memory,
    /// In files of a directory.
    Embedded(PathBuf),
    /// In an etcd cluster.
    Etcd(EtcdOptions),
}

/// A text that is no location.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no store: expected embedded:///DIRECTORY, etcd://HOST:PORT,…/PREFIX or memory:")]
pub struct NoLocation(String);

impl FromStr for Location {
    type Err = NoLocation;

    fn from_str(text: &str) -> Result<Self, NoLocation> {
        let wrong = || NoLocation(text.to_owned());
        if text == "memory:" {
            return Ok(Self::Memory);
        }
        if let Some(directory) = text.strip_prefix("embedded://") {
            return if directory.starts_with('/') {
                Ok(Self::Embedded(directory.into()))
            } else {
                Err(wrong())
            };
        }
        let rest = text.strip_prefix("etcd://").ok_or_else(wrong)?;
        let (members, prefix) = match rest.find('/') {
            Some(at) => rest.split_at(at),
            None => (rest, ""),
        };
        let prefix = match prefix.trim_end_matches('/') {
            "" => ETCD_PREFIX,
            prefix => prefix,
        };
        let endpoints: Vec<_> = members.split(',').map(ToOwned::to_owned).collect();
        if endpoints.iter().any(|endpoint| !endpoint.contains(':')) {
            return Err(wrong());
        }
        Ok(Self::Etcd(EtcdOptions::new(endpoints, prefix)))
    }
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Memory => f.write_str("memory:"),
            Self::Embedded(directory) => write!(f, "embedded://{}", directory.display()),
            Self::Etcd(options) => f.write_str(&options.name()),
        }
    }
}

impl Location {
    /// Whether there is a store. Makes none.
    ///
    /// # Errors
    /// If etcd does not answer, or refuses.
    pub async fn exists(&self) -> Result<bool, StoreError> {
        match self {
            Self::Memory => Ok(false),
            Self::Embedded(directory) => Ok(Embedded::exists(directory)),
            Self::Etcd(options) => Etcd::exists(options).await,
        }
    }

    /// Opens the store there, or makes one.
    ///
    /// # Errors
    /// As the engine's own `open`.
    pub async fn open(&self) -> Result<Arc<dyn Store>, StoreError> {
        match self {
            Self::Memory => Ok(Arc::new(Memory::new())),
            Self::Embedded(directory) => {
                let path = directory.clone();
                let opened = tokio::task::spawn_blocking(move || Embedded::open(path)).await;
                let failed = |error: tokio::task::JoinError| StoreError::Io {
                    path: directory.clone(),
                    reason: error.to_string(),
                };
                Ok(Arc::new(opened.map_err(failed)??))
            }
            Self::Etcd(options) => Ok(Arc::new(Etcd::open(options).await?)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn locations_are_read_and_written() {
        for (text, again) in [
            ("memory:", "memory:"),
            ("embedded:///var/lib/x", "embedded:///var/lib/x"),
            ("etcd://a:1", "etcd://a:1/bulkhead"),
            ("etcd://a:1,b:2/", "etcd://a:1,b:2/bulkhead"),
            ("etcd://[::1]:1/x/y/", "etcd://[::1]:1/x/y"),
        ] {
            let location: Location = text.parse().unwrap();
            assert_eq!(location.to_string(), again);
            assert_eq!(again.parse(), Ok(location));
        }
        for text in
            ["", "memory", "embedded://x", "/var/lib/x", "etcd://", "etcd://a", "etcd://a:1,/x", "http://a:1"]
        {
            assert_eq!(text.parse::<Location>(), Err(NoLocation(text.into())));
        }
    }
}
