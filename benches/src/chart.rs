//! The picture of `docs/benchmarks.md`: cost by the number of rules, drawn from measured numbers.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::path::Path;

use anyhow::{Context, ensure};

use crate::report::Line;
use crate::scale::KINDS;

/// Of one panel, in pixels: without margins, and with them.
const PANEL: (f64, f64) = (360.0, 260.0);
const MARGIN: (f64, f64) = (70.0, 60.0);
const OURS: &str = "bulkhead";

/// Who is drawn, and how. The paler, the less it is about.
const STYLES: [(&str, &str, &str); 6] = [
    ("no policy", "#999999", "4 4"),
    ("nftables set", "#2a78b8", ""),
    ("ipset", "#3a9a5b", ""),
    ("iptables", "#d06a1e", ""),
    ("bulkhead over nftables", "#7d3c98", ""),
    (OURS, "#b0124a", ""),
];

/// Draws the numbers in `numbers` into `picture`.
pub(crate) fn draw(numbers: &Path, picture: &Path) -> anyhow::Result<()> {
    let text =
        std::fs::read_to_string(numbers).with_context(|| format!("cannot read {}", numbers.display()))?;
    let lines: Vec<Line> = serde_json::from_str(&text)?;
    let svg = svg(&lines)?;
    std::fs::write(picture, svg).with_context(|| format!("cannot write {}", picture.display()))
}

/// Nanoseconds by the number of rules, by who.
type Curves = BTreeMap<String, BTreeMap<u32, f64>>;

fn curves(lines: &[Line], kind: &str) -> Curves {
    let mut curves = Curves::new();
    for line in lines {
        let size = line.name.strip_prefix(kind).and_then(|rest| rest.strip_prefix(": "));
        let size = size.and_then(|rest| rest.strip_suffix(" rules")?.parse().ok());
        let Some(size) = size else { continue };
        let others = line.others.iter().map(|(name, value)| (name.as_str(), *value));
        for (name, value) in others.chain([(OURS, line.ours)]) {
            curves.entry(name.to_owned()).or_default().insert(size, value);
        }
    }
    curves
}

fn svg(lines: &[Line]) -> anyhow::Result<String> {
    let panels = KINDS.map(|kind| curves(lines, kind));
    let values = || panels.iter().flat_map(BTreeMap::values).flat_map(BTreeMap::iter);
    let sizes: BTreeSet<u32> = values().map(|(size, _)| *size).collect();
    ensure!(sizes.len() > 1, "no numbers to draw: run with --only scale first");
    let (low, high) =
        values().fold((f64::MAX, 0.0_f64), |(low, high), (_, value)| (low.min(*value), high.max(*value)));
    let scale = Scale {
        sizes: (f64::from(*sizes.first().context("no size")?), f64::from(*sizes.last().context("no size")?)),
        values: (10_f64.powf(low.log10().floor()), 10_f64.powf(high.log10().ceil())),
    };
    let (width, height) = (2.0 * (PANEL.0 + MARGIN.0) + 130.0, PANEL.1 + 2.0 * MARGIN.1);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width:.0} {height:.0}\" font-family=\"sans-serif\" \
         font-size=\"12\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
    );
    for (number, (curves, kind)) in panels.iter().zip(KINDS).enumerate() {
        let left = MARGIN.0 + number as f64 * (PANEL.0 + MARGIN.0);
        panel(&mut svg, &scale, &sizes, curves, kind, left)?;
    }
    let left = 2.0 * (PANEL.0 + MARGIN.0) + 15.0;
    for (number, (name, colour, dash)) in STYLES.into_iter().rev().enumerate() {
        let y = MARGIN.1 + 20.0 * number as f64;
        writeln!(
            svg,
            "<line x1=\"{left}\" y1=\"{y}\" x2=\"{}\" y2=\"{y}\" stroke=\"{colour}\" stroke-width=\"2\" \
             stroke-dasharray=\"{dash}\"/><text x=\"{}\" y=\"{}\">{name}</text>",
            left + 20.0,
            left + 26.0,
            y + 4.0
        )?;
    }
    svg += "</svg>\n";
    Ok(svg)
}

/// Both axes are logarithmic.
struct Scale {
    sizes: (f64, f64),
    values: (f64, f64),
}

impl Scale {
    fn place(value: f64, (low, high): (f64, f64)) -> f64 {
        (value / low).log10() / (high / low).log10()
    }

    fn x(&self, left: f64, size: u32) -> f64 {
        left + PANEL.0 * Self::place(f64::from(size), self.sizes)
    }

    fn y(&self, value: f64) -> f64 {
        MARGIN.1 + PANEL.1 * (1.0 - Self::place(value, self.values))
    }
}

fn panel(
    svg: &mut String,
    scale: &Scale,
    sizes: &BTreeSet<u32>,
    curves: &Curves,
    title: &str,
    left: f64,
) -> anyhow::Result<()> {
    let (right, bottom) = (left + PANEL.0, MARGIN.1 + PANEL.1);
    writeln!(svg, "<text x=\"{left:.0}\" y=\"{:.0}\" font-weight=\"bold\">{title}</text>", MARGIN.1 - 20.0)?;
    let mut value = scale.values.0;
    while value <= scale.values.1 * 1.01 {
        let y = scale.y(value);
        writeln!(
            svg,
            "<line x1=\"{left:.1}\" y1=\"{y:.1}\" x2=\"{right:.1}\" y2=\"{y:.1}\" stroke=\"#e5e5e5\"/>\
             <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
            left - 6.0,
            y + 4.0,
            time(value)
        )?;
        value *= 10.0;
    }
    for size in sizes {
        let x = scale.x(left, *size);
        writeln!(
            svg,
            "<text x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
            bottom + 18.0,
            grouped(*size)
        )?;
    }
    writeln!(
        svg,
        "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">rules</text>",
        f64::midpoint(left, right),
        bottom + 38.0
    )?;
    for (name, colour, dash) in STYLES {
        let Some(curve) = curves.get(name) else { continue };
        let points: Vec<String> = curve
            .iter()
            .map(|(size, value)| format!("{:.1},{:.1}", scale.x(left, *size), scale.y(*value)))
            .collect();
        writeln!(
            svg,
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\" stroke-dasharray=\"{dash}\"/>",
            points.join(" ")
        )?;
    }
    Ok(())
}

fn time(nanoseconds: f64) -> String {
    match nanoseconds {
        ns if ns >= 1e6 => format!("{:.0} ms", ns / 1e6),
        ns if ns >= 1e3 => format!("{:.0} µs", ns / 1e3),
        ns => format!("{ns:.0} ns"),
    }
}

fn grouped(number: u32) -> String {
    if number < 1000 { number.to_string() } else { format!("{} {:03}", number / 1000, number % 1000) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_is_drawn_where_it_belongs() {
        let line = |kind: &str, size: u32, ours: f64| {
            Line::new(format!("{kind}: {size} rules"), "ns", ours).beside("iptables", ours * 10.0)
        };
        let lines: Vec<Line> =
            KINDS.iter().flat_map(|kind| [line(kind, 10, 100.0), line(kind, 100_000, 1000.0)]).collect();
        let svg = svg(&lines).unwrap();
        assert_eq!(svg.matches("<polyline").count(), 4);
        // From the lowest value at the left to the middle at the right, and from there to the highest.
        let (left, right, bottom) = (MARGIN.0, MARGIN.0 + PANEL.0, MARGIN.1 + PANEL.1);
        let middle = MARGIN.1 + PANEL.1 / 2.0;
        assert!(svg.contains(&format!("{left:.1},{bottom:.1} {right:.1},{middle:.1}")), "{svg}");
        assert!(svg.contains(&format!("{left:.1},{middle:.1} {right:.1},{:.1}", MARGIN.1)), "{svg}");
        assert!(super::svg(&lines[..1]).is_err());
    }
}
