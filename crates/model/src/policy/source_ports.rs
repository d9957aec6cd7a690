//! Source ports in rules: reading them, and how many of them tables can tell apart.

use std::collections::BTreeSet;

use serde_json::{Map, Value as Json};

use super::{Rule, non_empty};
use crate::document::{Decoder, Fields, Node, Value};
use crate::ports::{PortMatch, PortRange};

/// Most entries in one list of source ports. The two lists of one rule together stay within [`SOURCE_PORT_PARTS_MAX`].
pub const SOURCE_PORTS_MAX: usize = 255;
/// Most parts into which all the rules of an endpoint in one direction may cut the source ports. Each part can cost
/// a peer class a list of steps of its own.
pub const SOURCE_PORT_PARTS_MAX: usize = 1024;

/// What a rule asks of the source port. Such a rule matches protocols with ports only.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SourcePorts {
    /// It must be in one of these; empty means any.
    pub wanted: Vec<PortRange>,
    /// It must be in none of these.
    pub excluded: Vec<PortRange>,
}

impl SourcePorts {
    /// `sourcePorts` and `notSourcePorts` of a rule, if it has either.
    pub(super) fn decode(decoder: &mut Decoder, fields: &mut Fields<'_>) -> Option<Box<Self>> {
        let wanted = fields.optional(decoder, "sourcePorts", list).unwrap_or_default();
        let excluded = fields.optional(decoder, "notSourcePorts", list).unwrap_or_default();
        // Neither list may be written empty.
        let asked = !wanted.is_empty() || !excluded.is_empty();
        asked.then(|| Box::new(Self { wanted, excluded }))
    }

    pub(super) fn write(&self, rule: &mut Map<String, Json>) {
        for (name, ports) in [("sourcePorts", &self.wanted), ("notSourcePorts", &self.excluded)] {
            if !ports.is_empty() {
                rule.insert(name.into(), ports.iter().map(|ports| ports.to_json()).collect());
            }
        }
    }
}

/// Into how many parts these rules cut the source ports: within a part, they cannot tell one port from another.
pub fn source_port_parts<'a>(rules: impl IntoIterator<Item = &'a Rule>) -> usize {
    let asked = rules.into_iter().filter_map(|rule| rule.source_ports.as_deref());
    let ranges = asked.flat_map(|asked| asked.wanted.iter().chain(&asked.excluded));
    let starts: BTreeSet<u16> =
        ranges.flat_map(|range| [Some(range.first), range.last.checked_add(1)]).flatten().collect();
    1 + starts.into_iter().filter(|start| *start > 0).count()
}

/// One entry or a list of them.
fn list(decoder: &mut Decoder, node: &Node) -> Option<Vec<PortRange>> {
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
    let Some(asked) = rule.source_ports.as_ref().filter(|_| portless) else { return Some(()) };
    let name = if asked.wanted.is_empty() { "notSourcePorts" } else { "sourcePorts" };
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
