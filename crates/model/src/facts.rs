//! Facts: what Bulkhead itself observed about hosts and workloads, in the same key space as labels.
//!
//! Agents publish facts, selectors read them like labels, and where an operator's label has the same key the
//! fact wins: nobody talks a kernel young. Values are texts that [`Number`] and [`Version`] know how to compare.
//!
//! The [`CATALOGUE`] says of which type a fact is, so that `host.kernel > 5` can be refused where it is written
//! (DESIGN 4.14). A key that is not in it is of no type and may be compared in any way.
//!
//! Adding a key to the catalogue can refuse a policy that is stored already: choose keys that nobody uses as labels.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::Value as Json;

use crate::document::{Decoder, Node, Value};
use crate::labels::{LABELS_MAX, LabelError, Labels};
use crate::suggest::{edits, nearest};

mod number;
mod version;

pub use number::Number;
pub use version::Version;

/// Most facts of one object.
pub const FACTS_MAX: usize = LABELS_MAX;

/// Release of the running kernel.
pub const HOST_KERNEL: &str = "host.kernel";
/// Architecture of the machine.
pub const HOST_ARCHITECTURE: &str = "host.architecture";
/// Distribution of the host.
pub const OS_ID: &str = "os.id";
/// Version of the distribution.
pub const OS_VERSION: &str = "os.version";
/// Name of a container's image.
pub const IMAGE_NAME: &str = "image.name";
/// Tag of a container's image.
pub const IMAGE_TAG: &str = "image.tag";
/// Digest of a container's image.
pub const IMAGE_DIGEST: &str = "image.digest";
/// Whether a container has all privileges.
pub const CONTAINER_PRIVILEGED: &str = "container.privileged";
/// Key of the directory of a process workload's control group; nobody else has it.
pub const PROCESS_GROUP: &str = "process.group";

/// How a fact's values compare.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FactType {
    /// As decimal numbers.
    Number,
    /// As versions.
    Version,
    /// As texts.
    Text,
    /// `true` or `false`, as texts.
    Boolean,
}

impl FactType {
    /// With its article, for messages.
    pub fn describe(self) -> &'static str {
        match self {
            Self::Number => "a number",
            Self::Version => "a version",
            Self::Text => "a text",
            Self::Boolean => "true or false",
        }
    }
}

/// A fact that Bulkhead knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KnownFact {
    /// Its key.
    pub key: &'static str,
    /// Its type.
    pub fact_type: FactType,
    /// What it says.
    pub meaning: &'static str,
}

/// Every fact that Bulkhead knows, by key.
pub const CATALOGUE: [KnownFact; 15] = [
    known(CONTAINER_PRIVILEGED, FactType::Boolean, "the container was started with all privileges"),
    known(HOST_ARCHITECTURE, FactType::Text, "architecture of the host, as uname has it"),
    known(HOST_KERNEL, FactType::Version, "release of the host's running kernel, as uname has it"),
    known(IMAGE_DIGEST, FactType::Text, "digest of the manifest of the container's image"),
    known(IMAGE_NAME, FactType::Text, "name of the container's image, as it was asked for"),
    known(IMAGE_TAG, FactType::Text, "tag of the container's image, as it was asked for"),
    known(OS_ID, FactType::Text, "distribution of the host: ID of os-release"),
    known(OS_VERSION, FactType::Version, "version of the distribution: VERSION_ID of os-release"),
    known(PROCESS_GROUP, FactType::Text, "directory of the control group that its processes are in"),
    known("process.path", FactType::Text, "path of the program that the workload runs"),
    known("vuln.critical", FactType::Number, "known critical vulnerabilities"),
    known("vuln.high", FactType::Number, "known vulnerabilities of high severity"),
    known("vuln.low", FactType::Number, "known vulnerabilities of low severity"),
    known("vuln.max_severity", FactType::Number, "highest CVSS score of a known vulnerability, 0 to 10"),
    known("vuln.medium", FactType::Number, "known vulnerabilities of medium severity"),
];

const fn known(key: &'static str, fact_type: FactType, meaning: &'static str) -> KnownFact {
    KnownFact { key, fact_type, meaning }
}

/// The known fact with this key.
pub fn find(key: &str) -> Option<&'static KnownFact> {
    CATALOGUE.iter().find(|fact| fact.key == key)
}

/// The known fact that a key is most likely meant to be: one typing error away, or two behind the same first
/// part (`host.`). Closer than suggestions usually are, since `app.version` is a fine label and no `os.version`.
pub fn near_miss(key: &str) -> Option<&'static str> {
    let first = |key: &str| key.split_once('.').map(|(first, _)| first.to_ascii_lowercase());
    // Two edits bridge two bytes of length at most; most keys need no closer look.
    let keys = CATALOGUE.iter().map(|fact| fact.key).filter(|known| known.len().abs_diff(key.len()) <= 2);
    nearest(key, keys)
        .filter(|known| *known != key && edits(key, known) <= if first(key) == first(known) { 2 } else { 1 })
}

/// Facts about one thing: acceptable as labels, and of the type that the catalogue says.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "BTreeMap<String, String>", into = "Labels")]
pub struct Facts(Labels);

/// Why something is no fact.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FactError {
    /// Its key or value could not be selected on.
    #[error(transparent)]
    Label(#[from] LabelError),
    /// Its value is not of its type.
    #[error("the fact {key} is {}, and {value:?} is not", fact_type.describe())]
    Type {
        /// Its key.
        key: &'static str,
        /// What the catalogue says.
        fact_type: FactType,
        /// The value.
        value: String,
    },
    /// There are too many.
    #[error("at most {FACTS_MAX} facts are allowed")]
    TooMany,
}

impl Facts {
    /// No facts.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds or replaces a fact. Numbers are kept in their shortest form, so that `== '5'` holds for `5.0`.
    ///
    /// # Errors
    /// If the key or the value is not acceptable, the value is not of the key's type, or there are too many.
    pub fn insert(&mut self, key: &str, value: &str) -> Result<(), FactError> {
        if self.0.len() >= FACTS_MAX && self.0.get(key).is_none() {
            return Err(FactError::TooMany);
        }
        let Some(fact) = find(key) else { return Ok(self.0.insert(key, value)?) };
        let (fits, value) = match fact.fact_type {
            FactType::Number => match Number::parse(value) {
                Some(number) => (true, number.to_string()),
                None => (false, value.to_owned()),
            },
            FactType::Version => (Version::parse(value).is_some(), value.trim().to_owned()),
            FactType::Text => (true, value.to_owned()),
            FactType::Boolean => (matches!(value, "true" | "false"), value.to_owned()),
        };
        if !fits {
            return Err(FactError::Type { key: fact.key, fact_type: fact.fact_type, value });
        }
        Ok(self.0.insert(key, &value)?)
    }

    /// As far as they are acceptable; with what is wrong with the others.
    pub fn from_observed<'a>(pairs: impl IntoIterator<Item = (&'a str, &'a str)>) -> (Self, Vec<FactError>) {
        let mut facts = Self::new();
        let refused = pairs.into_iter().filter_map(|(key, value)| facts.insert(key, value).err()).collect();
        (facts, refused)
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Value of a key.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key)
    }

    /// All pairs, by key.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter()
    }

    /// These, and those of `others` whose keys are not among them.
    #[must_use]
    pub fn with_fallback(&self, others: &Self) -> Self {
        Self(self.0.over(&others.0))
    }

    /// What selectors see of a thing with these labels: the facts, and each label whose key is no fact.
    pub fn over(&self, labels: &Labels) -> Labels {
        self.0.over(labels)
    }

    pub(crate) fn decode(decoder: &mut Decoder, node: &Node) -> Option<Self> {
        let Value::Mapping(entries) = &node.value else {
            return decoder.expected(node, "a mapping of keys to numbers, texts, true or false");
        };
        let mut facts = Self::new();
        for (key_node, value) in entries {
            let key = decoder.scalar_text(key_node)?;
            if facts.get(&key).is_some() {
                decoder.problem(key_node, format!("{key:?} is given twice"));
                continue;
            }
            decoder.within(&key, |decoder| {
                let version = find(&key).is_some_and(|fact| fact.fact_type == FactType::Version);
                // JSON knows no 5.10: as a number it is 5.1.
                if let (Value::Number(text), true) = (&value.value, version) {
                    let message = format!("a version stands in quotes: as a number, {text} loses its zeros");
                    decoder.problem_at(value.position, message, Some(format!("'{text}'")));
                    return;
                }
                let Some(text) = decoder.scalar_text(value) else { return };
                if let Err(error) = facts.insert(&key, &text) {
                    decoder.problem(value, error.to_string());
                }
            });
        }
        Some(facts)
    }

    pub(crate) fn to_json(&self) -> Json {
        self.iter().map(|(key, value)| (key.to_owned(), Json::from(value))).collect()
    }
}

impl From<Facts> for Labels {
    fn from(facts: Facts) -> Self {
        facts.0
    }
}

/// From what an agent remembers. The catalogue may have been another: what does not fit it is left out, and is
/// observed anew.
impl From<BTreeMap<String, String>> for Facts {
    fn from(pairs: BTreeMap<String, String>) -> Self {
        Self::from_observed(pairs.iter().map(|(key, value)| (key.as_str(), value.as_str()))).0
    }
}

impl fmt::Debug for Facts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_catalogue_is_sorted_and_its_keys_can_be_selected_on() {
        assert!(CATALOGUE.is_sorted_by_key(|fact| fact.key));
        assert!(CATALOGUE.iter().all(|fact| crate::labels::is_label_key(fact.key)));
    }

    #[test]
    fn a_typing_error_is_near_and_a_label_of_its_own_is_not() {
        for (key, fact) in [
            ("host.kernal", HOST_KERNEL),
            ("host.karnal", HOST_KERNEL),
            ("hots.kernel", HOST_KERNEL),
            ("Host.Kernel", HOST_KERNEL),
            ("vuln.critcal", "vuln.critical"),
            ("os_version", OS_VERSION),
        ] {
            assert_eq!(near_miss(key), Some(fact), "{key}");
        }
        for key in ["app.version", "db.version", "team.size", "os.age", "kernel", "host.kernel", "version"] {
            assert_eq!(near_miss(key), None, "{key}");
        }
    }

    #[test]
    fn a_fact_is_of_the_type_that_the_catalogue_says() {
        let mut facts = Facts::new();
        facts.insert("vuln.max_severity", "09.80").unwrap();
        facts.insert(HOST_KERNEL, " 5.10.0-21-amd64 ").unwrap();
        facts.insert(CONTAINER_PRIVILEGED, "false").unwrap();
        facts.insert("seats", "many").unwrap();
        assert_eq!(
            (facts.get("vuln.max_severity"), facts.get(HOST_KERNEL)),
            (Some("9.8"), Some("5.10.0-21-amd64"))
        );
        for (key, value) in
            [("vuln.high", "NaN"), (HOST_KERNEL, "none"), (CONTAINER_PRIVILEGED, "yes"), ("a b", "x")]
        {
            assert!(facts.insert(key, value).is_err(), "{key}={value}");
        }
        let error = facts.insert("vuln.high", "many").unwrap_err().to_string();
        assert_eq!(error, "the fact vuln.high is a number, and \"many\" is not");
        assert!(matches!(facts.insert("bulkhead.dev/kind", "Host"), Err(FactError::Label(_))));
    }

    #[test]
    fn the_number_of_facts_is_bounded() {
        let mut facts = Facts::new();
        for number in 0..FACTS_MAX {
            facts.insert(&format!("f{number}"), "x").unwrap();
        }
        assert_eq!(facts.insert("one-more", "x"), Err(FactError::TooMany));
        assert_eq!(facts.insert("f0", "y"), Ok(()));
    }

    #[test]
    fn own_facts_come_before_others_and_both_before_labels() {
        let facts = |pairs: &[(&str, &str)]| {
            let (facts, refused) = Facts::from_observed(pairs.iter().copied());
            assert_eq!(refused, []);
            facts
        };
        let all = facts(&[("a", "own")]).with_fallback(&facts(&[("a", "other"), ("b", "other")]));
        let (labels, _) = Labels::from_foreign([("b", "label"), ("c", "label")]);
        assert_eq!(all.over(&labels).to_string(), "a=own,b=other,c=label");
    }

    #[test]
    fn facts_survive_json() {
        let (facts, _) = Facts::from_observed([("vuln.low", "3"), ("os.id", "debian")]);
        let text = serde_json::to_string(&facts).unwrap();
        assert_eq!(text, r#"{"os.id":"debian","vuln.low":"3"}"#);
        assert_eq!(serde_json::from_str::<Facts>(&text).unwrap(), facts);
        let partly = serde_json::from_str::<Facts>(r#"{"vuln.low":"few","os.id":"debian"}"#).unwrap();
        assert_eq!((partly.get("vuln.low"), partly.get("os.id")), (None, Some("debian")));
    }
}
