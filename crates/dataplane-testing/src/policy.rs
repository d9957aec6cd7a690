//! Small policies by hand.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use bulkhead_model::Prefix;
use bulkhead_model::host_policy::{
    Attachment, Cell, ClassId, Column, CompiledId, CompiledPolicy, EndpointBinding, HostPolicy, Row, RuleId,
    Variant,
};
use bulkhead_model::ports::PortMatch;
use bulkhead_model::verdict::Verdict;

pub const INGRESS: CompiledId = CompiledId(1);
pub const EGRESS: CompiledId = CompiledId(2);
pub const DEFAULT_RULE: u32 = 99;

/// A rule: peers, ports, verdict and rule id. Written.
#[derive(Debug, Clone)]
pub struct Rule(pub &'static str, pub &'static str, pub Verdict, pub u32);

pub fn cell(verdict: Verdict, rule: u32, written: bool) -> Cell {
    Cell {
        verdict,
        rule: RuleId(rule),
        audit_verdict: verdict,
        audit_rule: RuleId(rule),
        log: false,
        reject: false,
        written,
    }
}

/// A row from rules in order, the first match deciding.
pub fn row(rules: &[(PortMatch, Cell)], default: Cell) -> Arc<Row> {
    let mut starts = BTreeSet::from([0]);
    for (ports, _) in rules {
        let (first, last) = ports.interval().unwrap();
        starts.extend([first, last + 1]);
    }
    let at = |key| rules.iter().find(|(ports, _)| ports.matches(key, &[])).map_or(default, |(_, cell)| *cell);
    let inside = starts.into_iter().filter(|key| *key < bulkhead_model::ports::PORT_KEY_END);
    Arc::new(Row::new(inside.map(|first| Column { first, cell: at(first) })))
}

/// A compiled policy over `prefixes` (class n+1 is the n-th), each matched by containment.
pub fn compile(id: CompiledId, prefixes: &[Prefix], rules: &[Rule], default: Cell) -> CompiledPolicy {
    let rows = prefixes.iter().zip(1u32..).map(|(prefix, class)| {
        let matching: Vec<_> = rules
            .iter()
            .filter(|rule| rule.0.parse::<Prefix>().unwrap().contains(*prefix))
            .map(|rule| (rule.1.parse().unwrap(), cell(rule.2, rule.3, true)))
            .collect();
        (ClassId(class), row(&matching, default))
    });
    CompiledPolicy { id, default_row: Arc::new(Row::uniform(default)), rows: rows.collect() }
}

/// Whoever is refused by any rule is told.
pub fn reject(policy: &mut HostPolicy) {
    let rejecting = |row: &Arc<Row>| {
        let variants = row.variants().map(|(first, columns)| {
            let columns = columns.iter().map(|column| {
                let reject = column.cell.verdict == Verdict::Deny;
                Column { cell: Cell { reject, ..column.cell }, ..*column }
            });
            Variant { first, columns: columns.collect() }
        });
        Arc::new(Row::by_source_port(variants))
    };
    for compiled in policy.policies.values_mut() {
        compiled.default_row = rejecting(&compiled.default_row);
        for row in compiled.rows.values_mut() {
            *row = rejecting(row);
        }
    }
}

/// One endpoint "w" with two rule lists, default deny unless said otherwise.
pub fn policy(
    ifindex: u32,
    addresses: &[IpAddr],
    ingress: &[Rule],
    egress: &[Rule],
    default: Verdict,
) -> HostPolicy {
    let prefixes: BTreeSet<Prefix> =
        ingress.iter().chain(egress).map(|rule| rule.0.parse().unwrap()).collect();
    let prefixes: Vec<_> = prefixes.into_iter().collect();
    let default = cell(default, DEFAULT_RULE, false);
    let binding = EndpointBinding {
        attachment: Attachment::Interface(ifindex),
        addresses: addresses.to_vec(),
        ingress: INGRESS,
        egress: EGRESS,
    };
    HostPolicy {
        revision: 1,
        addresses: prefixes.iter().copied().zip((1..).map(ClassId)).collect(),
        policies: BTreeMap::from([
            (INGRESS, compile(INGRESS, &prefixes, ingress, default)),
            (EGRESS, compile(EGRESS, &prefixes, egress, default)),
        ]),
        endpoints: BTreeMap::from([(Arc::from("w"), binding)]),
        rules: BTreeMap::new(),
    }
}
