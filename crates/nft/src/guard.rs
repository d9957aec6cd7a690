//! Interfaces that are workloads' by their names, closed before this process has heard of them.
//!
//! Whoever reacts to an interface that appears, reacts late: the process waits for a processor, or for the kernel's lock
//! of all interfaces, and meanwhile packets pass. So the tables know the names, and refuse what is routed from and to an
//! interface that has one, until it is in charge or said to be left alone. (What a bridge carries from one port to another
//! has the bridge's name there: it is closed when the interface is taken charge of.)

use std::collections::BTreeSet;

use crate::elements;
use crate::object::{Element, Set};
use crate::schema::{GUARDED, SPARED};

/// Name of the chain that refuses.
pub(crate) const CHAIN: &str = "guard";

/// `IFNAMSIZ`: a name ends with a zero.
const NAME_BYTES: usize = 16;

/// What the agent has said.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Guard {
    /// Names as numbers: first and last of each range, apart from each other.
    names: Vec<(u128, u128)>,
    spared: BTreeSet<u32>,
}

fn range(pattern: &str) -> Option<(u128, u128)> {
    let start = pattern.strip_suffix('*');
    let bytes = start.unwrap_or(pattern).as_bytes();
    if bytes.len() >= NAME_BYTES || (bytes.is_empty() && start.is_none()) {
        return None;
    }
    let filled = |with: u8| {
        let mut name = [with; NAME_BYTES];
        name[..bytes.len()].copy_from_slice(bytes);
        u128::from_be_bytes(name)
    };
    // No name is what a packet has that comes from nowhere.
    let first = filled(0).max(1);
    Some((first, if start.is_some() { filled(u8::MAX) } else { first }))
}

impl Guard {
    /// `names`: each whole, or with `*` for anything at its end.
    pub(crate) fn new(names: &[String], spared: &BTreeSet<u32>) -> Self {
        let mut ranges: Vec<_> = names.iter().filter_map(|name| range(name)).collect();
        ranges.sort_unstable();
        let mut names: Vec<(u128, u128)> = Vec::new();
        for (first, last) in ranges {
            match names.last_mut() {
                Some(before) if first <= before.1.saturating_add(1) => before.1 = before.1.max(last),
                _ => names.push((first, last)),
            }
        }
        Self { names, spared: spared.clone() }
    }

    /// What the sets hold, in the order in which the kernel takes it: one range after the other.
    pub(crate) fn elements(&self) -> [(Set, Vec<Element>); 2] {
        let key = |key: Vec<u8>| Element::Key { key, data: Vec::new() };
        let bytes = |number: u128| number.to_be_bytes().to_vec();
        let names = self.names.iter().flat_map(|(first, last)| {
            let end = last.checked_add(1).map(|end| Element::End { key: bytes(end) });
            std::iter::once(key(bytes(*first))).chain(end)
        });
        let spared = self.spared.iter().map(|index| key(index.to_ne_bytes().to_vec()));
        [(GUARDED, names.collect()), (SPARED, spared.collect())]
    }
}

/// What the kernel has listed, in that order.
pub(crate) fn in_order(mut elements: Vec<Element>) -> Vec<Element> {
    elements.sort_unstable_by(|left, right| elements::order(left).cmp(&elements::order(right)));
    elements
}

#[cfg(test)]
mod tests {
    use super::*;

    fn covers(patterns: &[&str], name: &str) -> bool {
        let patterns: Vec<_> = patterns.iter().map(|pattern| (*pattern).to_owned()).collect();
        let mut bytes = [0; NAME_BYTES];
        bytes[..name.len()].copy_from_slice(name.as_bytes());
        let number = u128::from_be_bytes(bytes);
        let guard = Guard::new(&patterns, &BTreeSet::new());
        guard.names.iter().any(|(first, last)| (*first..=*last).contains(&number))
    }

    #[test]
    fn ranges_cover_the_names_that_patterns_match() {
        for name in ["veth", "veth0", "veth\u{7f}", "vethfifteenchars"[..15].into()] {
            assert!(covers(&["veth*"], name), "{name}");
            assert!(covers(&["tap0", "veth*", "veth1*"], name), "{name}");
        }
        for name in ["", "vet", "vetg", "veti", "eth0", "tap", "tap01"] {
            assert!(!covers(&["veth*", "tap0"], name), "{name}");
        }
        assert!(covers(&["tap0"], "tap0") && covers(&["*"], "eth0"));
        assert!(
            !covers(&["*"], "") && !covers(&[""], "") && !covers(&["a name that is far too long"], "a name")
        );
        let whole = Guard::new(&["*".to_owned()], &BTreeSet::new());
        assert_eq!(whole.elements()[0].1.len(), 1, "no end of what has none");
    }
}
