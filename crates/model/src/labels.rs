//! Labels: validated key/value pairs, and the label sets that selectors are evaluated on.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// Longest label key, in bytes (the selector language's limit).
pub const LABEL_KEY_LEN_MAX: usize = 512;
/// Longest label value, in bytes.
pub const LABEL_VALUE_LEN_MAX: usize = 1024;
/// Most labels on one object.
pub const LABELS_MAX: usize = 256;

/// Automatic label: the kind of the object, e.g. `Workload` or `NetworkSet`.
pub const KIND_LABEL: &str = "bulkhead.dev/kind";
/// Automatic label: the object's name.
pub const NAME_LABEL: &str = "bulkhead.dev/name";
/// Automatic label: the object's namespace, if it has one.
pub const NAMESPACE_LABEL: &str = "bulkhead.dev/namespace";
/// Automatic label: the host on which a workload runs.
pub const HOST_LABEL: &str = "bulkhead.dev/host";
/// Automatic label: the service account of a workload, if it has one.
pub const SERVICE_ACCOUNT_LABEL: &str = "bulkhead.dev/serviceaccount";
/// Prefix of the automatic labels that carry a namespace's labels to what is in it.
pub const NAMESPACE_LABELS_PREFIX: &str = "bulkhead.dev/namespace.";
/// Prefix of the automatic labels that carry a service account's labels to what runs under it.
pub const SERVICE_ACCOUNT_LABELS_PREFIX: &str = "bulkhead.dev/serviceaccount.";
/// Prefix of the automatic labels that name the profiles of an endpoint (Calico), followed by the place in its list.
pub const PROFILE_LABELS_PREFIX: &str = "bulkhead.dev/profile.";
/// Automatic label: the service whose backends an entity stands for.
pub const SERVICE_LABEL: &str = "bulkhead.dev/service";
/// Automatic label: the DNS name whose addresses an entity stands for.
pub const DOMAIN_LABEL: &str = "bulkhead.dev/domain";
/// Prefix of the automatic labels that carry a workload's named ports: `PREFIX` `PROTOCOL` `.` `NAME` = number.
pub const PORT_LABELS_PREFIX: &str = "bulkhead.dev/port.";
/// Prefix of labels that only Bulkhead itself sets.
pub const RESERVED_PREFIX: &str = "bulkhead.dev/";

/// Key/value pairs, ordered by key.
#[derive(Clone, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Labels(BTreeMap<Arc<str>, Arc<str>>);

/// Why a label is not acceptable.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LabelError {
    /// The key is empty, too long, or has a character that selectors cannot name.
    #[error("label key {0:?} must be 1 to {LABEL_KEY_LEN_MAX} characters from A-Z a-z 0-9 _ . / -")]
    Key(String),
    /// The value is too long, has a control character, or has both kinds of quotes, so that no selector could
    /// name it.
    #[error(
        "the value of label {key:?} must be at most {LABEL_VALUE_LEN_MAX} bytes without control characters \
         and with one kind of quote at most"
    )]
    Value {
        /// Key of the label.
        key: String,
    },
    /// The key is one that only Bulkhead sets.
    #[error("label key {0:?} is reserved: labels under {RESERVED_PREFIX} are set by Bulkhead itself")]
    Reserved(String),
}

/// Whether a text can be a label key: the LABEL token of the selector grammar.
pub fn is_label_key(text: &str) -> bool {
    (1..=LABEL_KEY_LEN_MAX).contains(&text.len()) && text.bytes().all(is_label_byte)
}

/// Whether a byte can stand in a label key.
pub(crate) fn is_label_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'/' | b'-')
}

impl Labels {
    /// No labels.
    pub fn new() -> Self {
        Self::default()
    }

    /// Value of a key.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key).map(AsRef::as_ref)
    }

    /// Number of labels.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// All pairs, by key.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(key, value)| (key.as_ref(), value.as_ref()))
    }

    /// Adds or replaces a label that a user may set.
    ///
    /// # Errors
    /// If key or value is not acceptable, or the key is reserved.
    pub fn insert(&mut self, key: &str, value: &str) -> Result<(), LabelError> {
        if key.starts_with(RESERVED_PREFIX) {
            return Err(LabelError::Reserved(key.into()));
        }
        self.insert_any(key, value)
    }

    /// Adds or replaces a label, an automatic one too.
    ///
    /// # Errors
    /// If key or value is not acceptable.
    pub fn insert_any(&mut self, key: &str, value: &str) -> Result<(), LabelError> {
        if !is_label_key(key) {
            return Err(LabelError::Key(key.into()));
        }
        let unnameable = value.contains('"') && value.contains('\'');
        if value.len() > LABEL_VALUE_LEN_MAX || value.chars().any(char::is_control) || unnameable {
            return Err(LabelError::Value { key: key.into() });
        }
        self.0.insert(key.into(), value.into());
        Ok(())
    }

    /// The same with `prefix` before every key; keys that are too long then are left out.
    #[must_use]
    pub fn with_prefix(&self, prefix: &str) -> Self {
        let mut labels = Self::new();
        for (key, value) in self.iter() {
            let _ = labels.insert_any(&format!("{prefix}{key}"), value);
        }
        labels
    }

    /// Takes over labels whose keys are not here yet.
    pub fn inherit(&mut self, other: &Self) {
        for (key, value) in &other.0 {
            self.0.entry(Arc::clone(key)).or_insert_with(|| Arc::clone(value));
        }
    }

    /// These, and those of `others` whose keys are not among them.
    #[must_use]
    pub fn over(&self, others: &Self) -> Self {
        let mut all = others.0.clone();
        all.extend(self.0.iter().map(|(key, value)| (Arc::clone(key), Arc::clone(value))));
        Self(all)
    }

    /// These labels but for some keys.
    #[must_use]
    pub fn without(&self, keys: &[&str]) -> Self {
        let keep = |(key, _): &(&Arc<str>, &Arc<str>)| !keys.contains(&&***key);
        Self(self.0.iter().filter(keep).map(|(key, value)| (Arc::clone(key), Arc::clone(value))).collect())
    }

    /// The labels that people set: the automatic ones are left out.
    #[must_use]
    pub fn without_reserved(&self) -> Self {
        let keep = |(key, _): &(&Arc<str>, &Arc<str>)| !key.starts_with(RESERVED_PREFIX);
        Self(self.0.iter().filter(keep).map(|(key, value)| (Arc::clone(key), Arc::clone(value))).collect())
    }

    /// Labels from pairs that are known to be acceptable; others are left out. For orchestrators' labels,
    /// whose authors never heard of our rules: answers how many were left out.
    pub fn from_foreign<'a>(pairs: impl IntoIterator<Item = (&'a str, &'a str)>) -> (Self, usize) {
        let mut labels = Self::new();
        let mut refused = 0;
        for (key, value) in pairs {
            if labels.len() >= LABELS_MAX || labels.insert(key, value).is_err() {
                refused += 1;
            }
        }
        (labels, refused)
    }
}

impl fmt::Debug for Labels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for Labels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, (key, value)) in self.iter().enumerate() {
            write!(f, "{}{key}={value}", if index == 0 { "" } else { "," })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_what_selectors_could_not_name() {
        let mut labels = Labels::new();
        assert!(matches!(labels.insert("", "x"), Err(LabelError::Key(_))));
        assert!(matches!(labels.insert("a b", "x"), Err(LabelError::Key(_))));
        assert!(matches!(labels.insert("a", "x\ny"), Err(LabelError::Value { .. })));
        assert!(matches!(labels.insert(KIND_LABEL, "x"), Err(LabelError::Reserved(_))));
        labels.insert("app.kubernetes.io/name", "web server").unwrap();
        assert_eq!(labels.to_string(), "app.kubernetes.io/name=web server");
    }

    #[test]
    fn foreign_labels_are_taken_as_far_as_they_go() {
        let (labels, refused) = Labels::from_foreign([("role", "web"), ("bad key", "x")]);
        assert_eq!((labels.to_string().as_str(), refused), ("role=web", 1));
    }
}
