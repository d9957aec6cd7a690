//! For which hosts a relay may speak: names and patterns.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// Most patterns of a relay.
pub(crate) const PATTERNS_MAX: usize = 1000;
/// Longest pattern, in bytes: as long as a host's name may be.
const PATTERN_BYTES_MAX: usize = 253;

/// Names of hosts; `*` stands for any number of any characters, none too.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub(crate) struct HostPatterns(Arc<[String]>);

/// A list that cannot be one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum InvalidPatterns {
    #[error("expected 1 to {PATTERNS_MAX} names or patterns of hosts, found {0}")]
    Number(usize),
    #[error(
        "{0:?} matches no host: expected letters, digits, '.', '-', '_' and '*', at most {PATTERN_BYTES_MAX}"
    )]
    Pattern(String),
}

impl HostPatterns {
    pub(crate) fn new(patterns: Vec<String>) -> Result<Self, InvalidPatterns> {
        if !(1..=PATTERNS_MAX).contains(&patterns.len()) {
            return Err(InvalidPatterns::Number(patterns.len()));
        }
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_' | b'*');
        let good = |pattern: &String| {
            (1..=PATTERN_BYTES_MAX).contains(&pattern.len()) && pattern.bytes().all(allowed)
        };
        match patterns.iter().find(|pattern| !good(pattern)) {
            Some(wrong) => Err(InvalidPatterns::Pattern(wrong.clone())),
            None => Ok(Self(patterns.into())),
        }
    }

    pub(crate) fn covers(&self, host: &str) -> bool {
        self.0.iter().any(|pattern| matches(pattern.as_bytes(), host.as_bytes()))
    }
}

/// In time of both lengths multiplied at most: on a mismatch only the last `*` is tried again, one character longer.
fn matches(pattern: &[u8], name: &[u8]) -> bool {
    let (mut at, mut seen) = (0, 0);
    let mut last_star = None;
    while seen < name.len() {
        match pattern.get(at) {
            Some(b'*') => {
                last_star = Some((at, seen));
                at += 1;
            }
            Some(wanted) if *wanted == name[seen] => (at, seen) = (at + 1, seen + 1),
            _ => {
                let Some((star, from)) = last_star else { return false };
                last_star = Some((star, from + 1));
                (at, seen) = (star + 1, from + 1);
            }
        }
    }
    pattern[at..].iter().all(|rest| *rest == b'*')
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn patterns(all: &[&str]) -> HostPatterns {
        HostPatterns::new(all.iter().map(ToString::to_string).collect()).unwrap()
    }

    #[test]
    fn names_are_whole_and_stars_stand_for_anything() {
        let site = patterns(&["site1-*", "gate", "*.example.*"]);
        for host in ["site1-", "site1-h1", "gate", "a.example.org", ".example."] {
            assert!(site.covers(host), "{host}");
        }
        for host in ["site10-h1", "gate1", "agate", "", "example.org", "Site1-h1"] {
            assert!(!site.covers(host), "{host}");
        }
        let strange = patterns(&["a*b*c"]);
        assert!(strange.covers("abbcbc") && !strange.covers("abbcb") && patterns(&["*"]).covers("x"));
    }

    #[test]
    fn lists_are_bounded_and_hold_what_can_be_a_host() {
        let new = |one: &str| HostPatterns::new(vec![one.into()]);
        assert!(new("").is_err() && new("a/b").is_err() && new(&"a".repeat(254)).is_err());
        assert!(HostPatterns::new(Vec::new()).is_err());
        assert!(HostPatterns::new(vec!["a".into(); PATTERNS_MAX + 1]).is_err());
    }

    proptest! {
        #[test]
        fn a_pattern_is_what_its_parts_in_order_are(pattern in "[ab*]{0,6}", name in "[ab]{0,8}") {
            fn slow(pattern: &[u8], name: &[u8]) -> bool {
                match pattern.split_first() {
                    None => name.is_empty(),
                    Some((b'*', rest)) => (0..=name.len()).any(|skip| slow(rest, &name[skip..])),
                    Some((one, rest)) => name.first() == Some(one) && slow(rest, &name[1..]),
                }
            }
            prop_assert_eq!(matches(pattern.as_bytes(), name.as_bytes()), slow(pattern.as_bytes(), name.as_bytes()));
        }
    }
}
