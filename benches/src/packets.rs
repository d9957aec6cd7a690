//! What one packet costs, by the kernel's own test runs.

use std::path::Path;
use std::time::Duration;

use bulkhead_ebpf::bench::{PacketCost, packet_cost};

use crate::report::Line;
use crate::stats::{median, paired_ratio};
use crate::{Effort, progress};

/// Peers, each with a rule of its own.
const SIZES: [u32; 3] = [10, 1_000, 100_000];

/// One of the times that were measured.
type Kind = fn(&PacketCost) -> Duration;

/// Measures all sizes in interleaved rounds.
pub(crate) fn measure(effort: Effort) -> anyhow::Result<Vec<Line>> {
    let rounds = effort.pick(7, 3);
    let repeat = effort.pick(1_000_000, 300_000);
    let root = format!("/sys/fs/bpf/bulkhead-bench-{}-packets", std::process::id());
    let mut costs: [Vec<PacketCost>; 3] = Default::default();
    for round in 0..rounds {
        progress(&format!("packets: round {} of {rounds}", round + 1));
        for (costs, size) in costs.iter_mut().zip(SIZES) {
            costs.push(packet_cost(Path::new(&root), size, repeat)?);
        }
    }
    let mut lines = Vec::new();
    let over_empty = |what: Kind, costs: &[PacketCost]| -> Vec<f64> {
        costs.iter().map(|cost| (what(cost).saturating_sub(cost.empty)).as_secs_f64() * 1e9).collect()
    };
    for (costs, size) in costs.iter().zip(SIZES) {
        let empty: Vec<f64> = costs.iter().map(|cost| cost.empty.as_secs_f64() * 1e9).collect();
        let established = over_empty(|cost| cost.established, costs);
        let line = Line::new(format!("established packet: {size} rules"), "ns", median(&established));
        lines.push(line.beside("empty program", median(&empty)));
    }
    let opened = |cost: &PacketCost| cost.opened + cost.empty;
    let kinds: [(&str, Kind); 3] = [
        ("new connection, judged only", |cost| cost.judged),
        ("refused packet", |cost| cost.denied),
        ("new connection, with entry and event", opened),
    ];
    for (name, what) in kinds {
        let [small, middle, large] = costs.each_ref().map(|costs| over_empty(what, costs));
        let ratio = paired_ratio(&large, &small);
        lines.push(
            Line::new(format!("{name}: 100 000 rules"), "ns", median(&large))
                .beside("10 rules", median(&small))
                .beside("1000 rules", median(&middle))
                .ratio(ratio)
                .budget("flat: 0.95 to 1.05 of 10 rules", (0.95..=1.05).contains(&ratio)),
        );
    }
    Ok(lines)
}
