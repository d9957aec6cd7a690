//! Source ports in rules: reading them, and how many of them tables can tell apart.

use std::collections::BTreeSet;

use super::{Rule, non_empty};
use crate::document::{Decoder, Node, Value};
use crate::ports::{PortMatch, PortRange};

/// Most entries in one list of source ports. The two lists of one rule together stay within [`SOURCE_PORT_PARTS_MAX`].
pub const SOURCE_PORTS_MAX: usize = 255;
/// Most parts into which all the rules of an endpoint in one direction may cut the source ports. Each part can cost
/// a peer class a list of steps of its own.
pub const SOURCE_PORT_PARTS_MAX: usize = 1024;

impl Rule {
    /// Whether it asks for the source port, and so matches protocols with ports only.
    pub fn reads_source_port(&self) -> bool {
        !self.source_ports.is_empty() || !self.not_source_ports.is_empty()
    }
}

/// Into how many parts these rules cut the source ports: within a part, they cannot tell one port from another.
pub fn source_port_parts<'a>(rules: impl IntoIterator<Item = &'a Rule>) -> usize {
    let ranges = rules.into_iter().flat_map(|rule| rule.source_ports.iter().chain(&rule.not_source_ports));
    let starts: BTreeSet<u16> =
        ranges.flat_map(|range| [Some(range.first), range.last.checked_add(1)]).flatten().collect();
    1 + starts.into_iter().filter(|start| *start > 0).count()
}

/// One entry or a list of them.
pub(super) fn list(decoder: &mut Decoder, node: &Node) -> Option<Vec<PortRange>> {
    match &node.value {
        Value::Sequence(_) => {
            let ranges = decoder.list(node, SOURCE_PORTS_MAX, Decoder::parsed)?;
            non_empty(decoder, node, ranges)
        }
        _ => decoder.parsed(node).map(|range| vec![range]),
    }
}

/// Refuses a rule that asks for the source port of what has none.
pub(super) fn possible(decoder: &mut Decoder, node: &Node, rule: &Rule) -> Option<()> {
    let portless = !rule.ports.is_empty() && rule.ports.iter().all(PortMatch::is_portless);
    if !rule.reads_source_port() || !portless {
        return Some(());
    }
    let name = if rule.source_ports.is_empty() { "notSourcePorts" } else { "sourcePorts" };
    let at = node.child(name).unwrap_or(node);
    let message = "the rule would never match: nothing in its \"ports\" has source ports, only tcp, udp, sctp and udplite do";
    decoder.within(name, |decoder| decoder.problem(at, message));
    None
}

/// Refuses rules that alone ask for more than tables can tell apart.
pub(super) fn bounded(decoder: &mut Decoder, node: &Node, rules: Option<Vec<Rule>>) -> Option<Vec<Rule>> {
    let rules = rules?;
    let parts = source_port_parts(&rules);
    if parts > SOURCE_PORT_PARTS_MAX {
        decoder.problem(
            node,
            format!(
                "these rules cut the source ports into {parts} parts, and {SOURCE_PORT_PARTS_MAX} at most are possible"
            ),
        );
        return None;
    }
    Some(rules)
}
