//! Sets of ports as intervals, and which of them a rule leaves over for those after it.

use bulkhead_model::policy::{Rule, SourcePorts};
use bulkhead_model::ports::{PORT_KEY_END, PortKey, PortMatch, PortRange, Protocol};

/// First and last, both included.
type Interval = (u32, u32);

/// The ports that a rule matches, or what is left of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct PortSet<'a> {
    numbers: Vec<Interval>,
    names: Vec<&'a PortMatch>,
}

impl<'a> PortSet<'a> {
    /// What a rule matches at most: names that it excludes are not taken away.
    pub(super) fn of(rule: &'a Rule) -> Self {
        let mut numbers = numbers_of(&rule.ports);
        for (first, last) in rule.not_ports.iter().filter_map(PortMatch::interval) {
            numbers = without(&numbers, (first, last));
        }
        if rule.source_ports.is_some() {
            numbers = ported().flat_map(|ported| within(&numbers, ported)).collect();
        }
        Self { numbers, names: rule.ports.iter().filter(|port| is_named(port)).collect() }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.numbers.is_empty() && self.names.is_empty()
    }

    /// Whether a connection may be in both; a name may be any port.
    pub(super) fn meets(&self, other: &Self) -> bool {
        let meet = |one: &Interval| other.numbers.iter().any(|two| one.0 <= two.1 && two.0 <= one.1);
        self.numbers.iter().any(meet) || !self.names.is_empty() || !other.names.is_empty()
    }

    /// Takes away what an earlier rule surely matches of it; `owner` is the rule whose ports these are.
    pub(super) fn take(&mut self, earlier: &Rule, owner: &Rule) {
        // What both exclude does not matter.
        let mut excluded = earlier.not_ports.iter().filter(|port| !owner.not_ports.contains(port));
        if excluded.clone().any(is_named) {
            return;
        }
        let excluded: Vec<Interval> = excluded.by_ref().filter_map(PortMatch::interval).collect();
        let mut taken = numbers_of(&earlier.ports);
        for interval in &excluded {
            taken = without(&taken, *interval);
        }
        self.names.retain(|name| !takes_name(&taken, &excluded, &earlier.ports, name));
        for interval in taken {
            self.numbers = without(&self.numbers, interval);
        }
    }
}

fn is_named(port: &PortMatch) -> bool {
    matches!(port, PortMatch::Named { .. })
}

/// A name is taken by itself, by the name under any protocol, and by every port of its protocols. By name only if none
/// of the numbers that it may mean is excluded.
fn takes_name(taken: &[Interval], excluded: &[Interval], ports: &[PortMatch], wanted: &PortMatch) -> bool {
    let PortMatch::Named { protocol, name } = wanted else { return false };
    let by_name = ports.iter().any(|port| match port {
        PortMatch::Named { protocol: over, name: other } => {
            other == name && (over.is_none() || over == protocol)
        }
        _ => false,
    });
    let possible: Vec<Interval> = match protocol {
        Some(protocol) => vec![interval_of(*protocol)],
        None => ported().collect(),
    };
    (by_name && without_all(&possible, excluded) == possible) || without_all(&possible, taken).is_empty()
}

/// The protocols that have ports.
fn ported() -> impl Iterator<Item = Interval> {
    let ported = Protocol::NAMES.iter().map(|(_, protocol)| *protocol).filter(|one| one.has_ports());
    ported.map(interval_of)
}

fn interval_of(protocol: Protocol) -> Interval {
    (protocol.key(0), protocol.key(u16::MAX))
}

fn numbers_of(ports: &[PortMatch]) -> Vec<Interval> {
    if ports.is_empty() {
        return vec![(0, PORT_KEY_END - 1)];
    }
    ports.iter().filter_map(PortMatch::interval).collect()
}

/// What of `intervals` lies outside of one.
fn without(intervals: &[Interval], (first, last): (PortKey, PortKey)) -> Vec<Interval> {
    let mut rest = Vec::with_capacity(intervals.len());
    for &(from, to) in intervals {
        if to < first || last < from {
            rest.push((from, to));
            continue;
        }
        if from < first {
            rest.push((from, first - 1));
        }
        if last < to {
            rest.push((last + 1, to));
        }
    }
    rest
}

fn without_all(intervals: &[Interval], taken: &[Interval]) -> Vec<Interval> {
    taken.iter().fold(intervals.to_vec(), |rest, interval| without(&rest, *interval))
}

fn within(intervals: &[Interval], (first, last): Interval) -> Vec<Interval> {
    let clipped = intervals.iter().map(|(from, to)| (*from.max(&first), *to.min(&last)));
    clipped.filter(|(from, to)| from <= to).collect()
}

/// Whether every connection that `narrow` matches by its source port is matched by `wide`.
pub(super) fn source_ports_within(narrow: &Rule, wide: &Rule) -> bool {
    let Some(wide) = wide.source_ports.as_deref() else { return true };
    let Some(narrow) = narrow.source_ports.as_deref() else { return false };
    without_all(&sources(narrow), &sources(wide)).is_empty()
}

fn sources(asked: &SourcePorts) -> Vec<Interval> {
    let pair = |range: &PortRange| (u32::from(range.first), u32::from(range.last));
    let wanted = match asked.wanted.as_slice() {
        [] => vec![(0, u32::from(u16::MAX))],
        wanted => wanted.iter().map(pair).collect(),
    };
    let excluded: Vec<Interval> = asked.excluded.iter().map(pair).collect();
    without_all(&wanted, &excluded)
}

/// Whether a rule asks nothing of ports at either end.
pub(super) fn any_port(rule: &Rule) -> bool {
    let every = rule.ports.is_empty() || rule.ports.contains(&PortMatch::Any);
    every && rule.not_ports.is_empty() && rule.source_ports.is_none()
}

#[cfg(test)]
mod tests {
    use bulkhead_model::policy::Action;

    use super::*;

    fn rule(ports: &[&str], not_ports: &[&str]) -> Rule {
        let read = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect();
        Rule { ports: read(ports), not_ports: read(not_ports), ..Rule::new(Action::Allow) }
    }

    fn left(owner: &Rule, earlier: &[Rule]) -> bool {
        let mut ports = PortSet::of(owner);
        earlier.iter().for_each(|rule| ports.take(rule, owner));
        !ports.is_empty()
    }

    #[test]
    fn several_rules_together_leave_nothing() {
        let owner = rule(&["tcp/80-90"], &[]);
        assert!(left(&owner, &[rule(&["tcp/80-85"], &[])]));
        assert!(!left(&owner, &[rule(&["tcp/80-85"], &[]), rule(&["tcp/86-100"], &[])]));
        assert!(left(&owner, &[rule(&["tcp"], &["tcp/90"])]));
        assert!(!left(&rule(&["tcp/80-90"], &["tcp/90"]), &[rule(&["tcp"], &["tcp/90"])]));
        assert!(left(&rule(&[], &[]), &[rule(&["tcp"], &[]), rule(&["udp"], &[])]));
        assert!(!left(&rule(&[], &[]), &[rule(&["any"], &[])]));
    }

    #[test]
    fn names_are_taken_by_names_and_by_whole_protocols() {
        assert!(!left(&rule(&["tcp/http"], &[]), &[rule(&["tcp/http"], &[])]));
        assert!(!left(&rule(&["tcp/http"], &[]), &[rule(&["any/http"], &[])]));
        assert!(!left(&rule(&["tcp/http"], &[]), &[rule(&["tcp"], &[])]));
        assert!(left(&rule(&["any/http"], &[]), &[rule(&["tcp"], &[])]));
        assert!(left(&rule(&["tcp/http"], &[]), &[rule(&["tcp/80"], &[])]));
        assert!(left(&rule(&["tcp/80"], &[]), &[rule(&["tcp/http"], &[])]));
        assert!(left(&rule(&["tcp/80"], &[]), &[rule(&["tcp"], &["tcp/http"])]));
        // The number that the name means may be the one that is excluded.
        assert!(left(&rule(&["tcp/http"], &[]), &[rule(&["tcp/http"], &["tcp/80"])]));
        assert!(!left(&rule(&["tcp/http"], &[]), &[rule(&["tcp/http"], &["udp"])]));
    }

    #[test]
    fn a_rule_that_asks_for_the_source_port_takes_only_from_one_that_does() {
        let from = |wanted: &str| {
            let wanted = vec![wanted.parse().unwrap()];
            let asked = SourcePorts { wanted, excluded: vec![] };
            Rule { source_ports: Some(Box::new(asked)), ..rule(&[], &[]) }
        };
        assert!(source_ports_within(&from("53"), &from("0-1023")));
        assert!(!source_ports_within(&from("0-1023"), &from("53")));
        assert!(!source_ports_within(&rule(&[], &[]), &from("0-65535")));
        assert!(source_ports_within(&from("53"), &rule(&[], &[])));
        // ICMP has no source port, so nothing of it is asked for.
        assert!(!left(&from("53"), &[rule(&["tcp", "udp", "sctp", "udplite"], &[])]));
    }
}
