//! Labels: validated key/value pairs, and the label sets that selectors are evaluated on.

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::fmt;

use serde::ser::SerializeMap as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

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
///
/// There may be hundreds of thousands of these, each with twenty labels or more. So all texts of one stand in one piece
/// of memory: a quarter of the room of a map of strings, and quicker to copy, to hash and to search.
#[derive(Clone, Default, PartialEq, Eq, Hash)]
pub struct Labels {
    /// Key and value, next key and value, and so on.
    text: String,
    /// Where in the text the key ends, and where its value.
    ends: Vec<(u32, u32)>,
}

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
        self.find(key).ok().map(|index| self.pair(index).1)
    }

    /// Number of labels.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// All pairs, by key.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.pairs()
    }

    fn pairs(&self) -> impl Iterator<Item = (&str, &str)> + Clone {
        (0..self.len()).map(|index| self.pair(index))
    }

    /// Where a pair begins in the text.
    fn start(&self, index: usize) -> usize {
        index.checked_sub(1).map_or(0, |before| self.ends[before].1 as usize)
    }

    fn pair(&self, index: usize) -> (&str, &str) {
        let (key, value) = self.ends[index];
        (&self.text[self.start(index)..key as usize], &self.text[key as usize..value as usize])
    }

    /// Where a key stands, or where it would.
    fn find(&self, key: &str) -> Result<usize, usize> {
        let (mut low, mut high) = (0, self.len());
        while low < high {
            let middle = low.midpoint(high);
            match self.pair(middle).0.cmp(key) {
                Ordering::Less => low = middle + 1,
                Ordering::Equal => return Ok(middle),
                Ordering::Greater => high = middle,
            }
        }
        Err(low)
    }

    /// Sets a label, whatever it is.
    fn set(&mut self, key: &str, value: &str) {
        let (index, old) = match self.find(key) {
            Ok(index) => (index, self.start(index)..self.ends.remove(index).1 as usize),
            Err(index) => (index, self.start(index)..self.start(index)),
        };
        let (start, gone) = (old.start, length(old.len()));
        self.text.replace_range(old, value);
        self.text.insert_str(start, key);
        let added = length(key.len() + value.len());
        for (key, value) in &mut self.ends[index..] {
            *key = *key - gone + added;
            *value = *value - gone + added;
        }
        self.ends.insert(index, (length(start + key.len()), length(start + key.len() + value.len())));
    }

    /// From pairs in the order of their keys.
    fn from_sorted<'a>(pairs: impl Iterator<Item = (&'a str, &'a str)> + Clone) -> Self {
        let (count, bytes) =
            pairs.clone().fold((0, 0), |(count, bytes), (k, v)| (count + 1, bytes + k.len() + v.len()));
        let mut labels = Self { text: String::with_capacity(bytes), ends: Vec::with_capacity(count) };
        for (key, value) in pairs {
            labels.text.push_str(key);
            let end = length(labels.text.len());
            labels.text.push_str(value);
            labels.ends.push((end, length(labels.text.len())));
        }
        labels
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
        self.set(key, value);
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
        for (key, value) in other.iter() {
            if self.find(key).is_err() {
                self.set(key, value);
            }
        }
    }

    /// These, and those of `others` whose keys are not among them.
    #[must_use]
    pub fn over(&self, others: &Self) -> Self {
        let mut all = self.clone();
        all.inherit(others);
        all
    }

    /// These labels but for some keys.
    #[must_use]
    pub fn without(&self, keys: &[&str]) -> Self {
        Self::from_sorted(self.pairs().filter(|(key, _)| !keys.contains(key)))
    }

    /// Whether these are [`Labels::without`] of others.
    pub fn are_those_without(&self, others: &Self, keys: &[&str]) -> bool {
        self.pairs().eq(others.pairs().filter(|(key, _)| !keys.contains(key)))
    }

    /// The labels that people set: the automatic ones are left out.
    #[must_use]
    pub fn without_reserved(&self) -> Self {
        Self::from_sorted(self.pairs().filter(|(key, _)| !key.starts_with(RESERVED_PREFIX)))
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

/// A place in the text of labels.
fn length(bytes: usize) -> u32 {
    u32::try_from(bytes).expect("labels are bounded in number and size, far below 4 GiB")
}

impl PartialOrd for Labels {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Labels {
    fn cmp(&self, other: &Self) -> Ordering {
        self.iter().cmp(other.iter())
    }
}

impl Serialize for Labels {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.len()))?;
        for (key, value) in self.iter() {
            map.serialize_entry(key, value)?;
        }
        map.end()
    }
}

impl<'de> Deserialize<'de> for Labels {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let map = BTreeMap::<String, String>::deserialize(deserializer)?;
        Ok(Self::from_sorted(map.iter().map(|(key, value)| (key.as_str(), value.as_str()))))
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
    use proptest::prelude::*;

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

    proptest! {
        #[test]
        fn labels_are_a_map(
            pairs in proptest::collection::vec(("[abc]{1,2}", "[xy]{0,3}"), 0..12),
            others in proptest::collection::vec(("[abc]{1,2}", "[xy]{0,3}"), 0..6),
        ) {
            let make = |pairs: &[(String, String)]| {
                let mut labels = Labels::new();
                pairs.iter().for_each(|(key, value)| labels.insert(key, value).unwrap());
                let map: BTreeMap<String, String> = pairs.iter().cloned().collect();
                (labels, map)
            };
            let list = |map: &BTreeMap<String, String>| map.clone().into_iter().collect::<Vec<_>>();
            let listed = |labels: &Labels| {
                labels.iter().map(|(key, value)| (key.to_owned(), value.to_owned())).collect::<Vec<_>>()
            };
            let ((labels, map), (other, other_map)) = (make(&pairs), make(&others));
            prop_assert_eq!(listed(&labels), list(&map));
            prop_assert_eq!(labels.len(), map.len());
            for key in ["a", "b", "ab", "cc", "d"] {
                prop_assert_eq!(labels.get(key), map.get(key).map(String::as_str));
            }
            prop_assert_eq!(labels.cmp(&other), map.cmp(&other_map));
            prop_assert_eq!(labels == other, map == other_map);
            let mut over = other_map;
            over.extend(map.clone());
            prop_assert_eq!(listed(&labels.over(&other)), list(&over));
            let mut without = map.clone();
            without.remove("ab");
            prop_assert_eq!(listed(&labels.without(&["ab"])), list(&without));
            let json = serde_json::to_string(&labels).unwrap();
            prop_assert_eq!(&json, &serde_json::to_string(&map).unwrap());
            prop_assert_eq!(serde_json::from_str::<Labels>(&json).unwrap(), labels);
        }
    }

    #[test]
    fn foreign_labels_are_taken_as_far_as_they_go() {
        let (labels, refused) = Labels::from_foreign([("role", "web"), ("bad key", "x")]);
        assert_eq!((labels.to_string().as_str(), refused), ("role=web", 1));
    }
}
