//! Versions, compared as people read them.
//!
//! Debian, RPM and semver agree on what matters and differ in corners; this rule takes what they share:
//!
//! 1. An epoch (`2:1.0`) counts first; none is 0. A `v` before the first digit is dropped.
//! 2. Then the numbers up to the first thing that is none, as numbers: `5.10` is after `5.9`. Missing ones
//!    are 0: `5.10` and `5.10.0` are one version.
//! 3. Then the rest, in runs of digits and of letters, run by run; anything between them just parts them. In each
//!    place `~` comes before a word that announces a release (`alpha`, `beta`, `rc` …), that before nothing at
//!    all, that before any other word, that before a number. So `6.1.0-rc1` is before `6.1.0`, and
//!    `5.10.0-21-amd64` after `5.10.0` and before `5.10.0-28-amd64`.
//!
//! Words compare by letter, in any case. A text that does not begin with a digit or has characters that
//! versions do not have (`latest`, `5.10 (custom)`) is no version.

use std::cmp::Ordering;
use std::iter;

/// Words that announce a release that is still to come.
const PRE_RELEASE: [&str; 8] = ["alpha", "beta", "dev", "nightly", "pre", "preview", "rc", "snapshot"];

/// A version: its text, taken apart only when it is compared.
#[derive(Debug, Clone, Copy)]
pub struct Version<'a> {
    epoch: &'a str,
    core: &'a str,
    rest: &'a str,
}

/// What stands in one place of the rest.
#[derive(Debug, Clone, Copy)]
enum Run<'a> {
    Tilde,
    PreRelease(&'a str),
    End,
    Word(&'a str),
    Number(&'a str),
}

impl<'a> Version<'a> {
    /// `None` if the text is no version.
    pub fn parse(text: &'a str) -> Option<Self> {
        let text = text.trim();
        let digits = |text: &str| text.bytes().take_while(u8::is_ascii_digit).count();
        let (epoch, text) = match text.split_once(':') {
            Some((epoch, text)) if !epoch.is_empty() && digits(epoch) == epoch.len() => (epoch, text),
            _ => ("", text),
        };
        let text = text.strip_prefix(['v', 'V']).unwrap_or(text);
        let known = |byte: u8| {
            byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_' | b'+' | b'~' | b':')
        };
        let mut end = digits(text);
        if end == 0 || !text.bytes().all(known) {
            return None;
        }
        while let Some(more) = text[end..].strip_prefix('.').map(digits).filter(|more| *more > 0) {
            end += 1 + more;
        }
        let (core, rest) = text.split_at(end);
        Some(Self { epoch, core, rest })
    }

    fn runs(self) -> impl Iterator<Item = Run<'a>> {
        let mut left = self.rest;
        iter::from_fn(move || {
            left = left.trim_start_matches(|c: char| !c.is_ascii_alphanumeric() && c != '~');
            let first = left.bytes().next()?;
            let same = |byte: &u8| {
                if first.is_ascii_digit() { byte.is_ascii_digit() } else { byte.is_ascii_alphabetic() }
            };
            let length = if first == b'~' { 1 } else { left.bytes().take_while(same).count() };
            let (run, more) = left.split_at(length);
            left = more;
            Some(match first {
                b'~' => Run::Tilde,
                b'0'..=b'9' => Run::Number(run),
                _ if PRE_RELEASE.iter().any(|word| run.eq_ignore_ascii_case(word)) => Run::PreRelease(run),
                _ => Run::Word(run),
            })
        })
    }
}

impl Run<'_> {
    fn rank(self) -> u8 {
        match self {
            Self::Tilde => 0,
            Self::PreRelease(_) => 1,
            Self::End => 2,
            Self::Word(_) => 3,
            Self::Number(_) => 4,
        }
    }

    fn compare(self, other: Run<'_>) -> Ordering {
        match (self, other) {
            (Self::Number(one), Run::Number(other)) => compare_digits(one, other),
            (Self::PreRelease(one), Run::PreRelease(other)) | (Self::Word(one), Run::Word(other)) => {
                let lower = |text: &str| text.to_ascii_lowercase();
                lower(one).cmp(&lower(other))
            }
            (one, other) => one.rank().cmp(&other.rank()),
        }
    }
}

/// Digits as a number of any length.
fn compare_digits(one: &str, other: &str) -> Ordering {
    let (one, other) = (one.trim_start_matches('0'), other.trim_start_matches('0'));
    one.len().cmp(&other.len()).then(one.cmp(other))
}

/// Place by place; where one has ended, `end` stands.
fn compare_places<T: Copy>(
    mut one: impl Iterator<Item = T>,
    mut other: impl Iterator<Item = T>,
    end: T,
    compare: impl Fn(T, T) -> Ordering,
) -> Ordering {
    loop {
        let ordering = match (one.next(), other.next()) {
            (None, None) => return Ordering::Equal,
            (one, other) => compare(one.unwrap_or(end), other.unwrap_or(end)),
        };
        if ordering.is_ne() {
            return ordering;
        }
    }
}

impl Ord for Version<'_> {
    fn cmp(&self, other: &Self) -> Ordering {
        compare_digits(self.epoch, other.epoch)
            .then_with(|| compare_places(self.core.split('.'), other.core.split('.'), "0", compare_digits))
            .then_with(|| compare_places(self.runs(), other.runs(), Run::End, Run::compare))
    }
}

impl PartialOrd for Version<'_> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Version<'_> {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Version<'_> {}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn version(text: &str) -> Version<'_> {
        Version::parse(text).unwrap_or_else(|| panic!("{text}"))
    }

    fn ascending(versions: &[&str]) {
        for (index, one) in versions.iter().enumerate() {
            for other in &versions[index + 1..] {
                assert!(version(one) < version(other), "{one} < {other}");
            }
        }
    }

    fn same(versions: &[&str]) {
        for other in versions {
            assert_eq!(version(versions[0]), version(other), "{other}");
        }
    }

    #[test]
    fn segments_are_numbers() {
        ascending(&["5.9", "5.10", "5.10.1", "5.11", "6", "10.0"]);
        ascending(&["1.18446744073709551616", "1.18446744073709551617"]);
    }

    #[test]
    fn missing_segments_are_zero() {
        same(&["5.10", "5.10.0", "5.10.0.0", "05.010", "v5.10", " 5.10 "]);
    }

    #[test]
    fn a_release_comes_after_what_announced_it() {
        ascending(&[
            "6.1.0-alpha1",
            "6.1.0-beta1",
            "6.1.0-beta2",
            "6.1.0-rc1",
            "6.1.0-rc2",
            "6.1.0-rc10",
            "6.1.0",
        ]);
        ascending(&["1.0.0-alpha", "1.0.0-alpha.1", "1.0.0-beta", "1.0.0-RC1", "1.0.0"]);
        ascending(&["3.14rc1", "3.14", "3.14.1rc1", "3.14.1"]);
    }

    #[test]
    fn a_tilde_comes_before_everything() {
        ascending(&["1.0~~", "1.0~rc1", "1.0~bpo11+1", "1.0-rc1", "1.0", "1.0-1"]);
    }

    #[test]
    fn a_distributions_suffix_comes_after_the_bare_version_and_counts_up() {
        ascending(&["5.9.16", "5.10", "5.10.0-9-amd64", "5.10.0-21-amd64", "5.10.0-28-amd64", "5.10.1"]);
        ascending(&["5.15.0", "5.15.0-91-generic", "5.15.0-101-generic", "5.15.1"]);
        ascending(&[
            "4.18.0-477.10.1.el8_8.x86_64",
            "4.18.0-553.el8_10.x86_64",
            "4.18.0-553.5.1.el8_10.x86_64",
        ]);
        ascending(&["5.15.153", "5.15.153.1-microsoft-standard-WSL2", "5.15.154"]);
    }

    #[test]
    fn letters_after_the_number_are_later_patches() {
        ascending(&["1.1.1", "1.1.1a", "1.1.1b", "1.1.1w", "1.1.2"]);
    }

    #[test]
    fn an_epoch_counts_first() {
        ascending(&["9.0", "1:0.5", "1:1.0", "2:0.1"]);
        same(&["0:1.0", "1.0"]);
    }

    #[test]
    fn case_and_separators_do_not_count() {
        same(&["6.1.0-rc1", "6.1.0-RC.1", "6.1.0_rc1", "6.1.0rc1"]);
        same(&["6.1.0+", "6.1.0"]);
    }

    #[test]
    fn what_does_not_begin_with_a_digit_is_no_version() {
        for text in
            ["", "latest", "v", "-1", "~1", ".5", "x1", "a:1", ":1", "5.10 (custom)", "5\"", "5é", "vv1"]
        {
            assert!(Version::parse(text).is_none(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn it_is_an_order(texts in prop::collection::vec("[01]{1,2}(\\.[01]){0,2}([-~.](rc|a|1|0)){0,2}", 3)) {
            let [a, b, c] = [&texts[0], &texts[1], &texts[2]].map(|text| version(text));
            prop_assert_eq!(a.cmp(&b), b.cmp(&a).reverse());
            if a <= b && b <= c {
                prop_assert!(a <= c);
            }
            if a == b {
                prop_assert_eq!(a.cmp(&c), b.cmp(&c));
            }
        }

        #[test]
        fn no_text_makes_it_panic(one in "[0-9a-z.:~+_-]{0,12}", other in "\\PC{0,8}") {
            if let (Some(one), Some(other)) = (Version::parse(&one), Version::parse(&other)) {
                prop_assert_eq!(one.cmp(&other), other.cmp(&one).reverse());
            }
        }
    }
}
