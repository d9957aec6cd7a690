//! `bulkhead-bench`: measures what the design promises (DESIGN 12), side by side with what it is compared to.
//!
//! Everything runs in one go, as root, in network namespaces of its own; nothing outside them is touched but
//! the pins below `/sys/fs/bpf/bulkhead-bench-*`, which are removed again. `docs/benchmarks.md` says what
//! each line means.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::bail;
use clap::Parser;

mod change;
mod chart;
mod child;
mod customers;
mod engine_speed;
mod entries;
mod fixtures;
mod fleet;
mod flood;
mod guard_speed;
mod index_speed;
mod load;
mod memory;
mod netns;
mod packets;
mod plan;
mod report;
mod resolve;
mod scale;
mod small;
mod stats;
mod text;
mod traffic;

use report::{Line, Machine};

/// Measures everything and compares it with the budgets.
#[derive(Debug, Parser)]
#[command(name = "bulkhead-bench")]
struct Arguments {
    /// Fewer and shorter rounds: less than a minute, and noisier.
    #[arg(long)]
    quick: bool,
    /// Only this measurement (may be repeated): small, guard, entries, text, resolve, index, engine, customers, fleet,
    /// packets, plan, change, flood, scale, traffic; fleet-full only by this.
    #[arg(long, value_name = "NAME")]
    only: Vec<String>,
    /// Where the numbers go.
    #[arg(long, value_name = "FILE", default_value = "target/bench.json")]
    output: PathBuf,
    /// Measures nothing: draws what `scale` has measured, from the file of numbers, as SVG.
    #[arg(long, value_name = "FILE")]
    chart: Option<PathBuf>,
    /// What to log of controller and agent while changes are measured, for instance `bulkhead_agent=debug`.
    #[arg(long, value_name = "FILTER")]
    log: Option<String>,
    /// One measurement in this process, as JSON to standard output: memory is counted per process.
    #[arg(long, value_name = "NAME", hide = true)]
    child: Option<String>,
}

/// How thorough to be.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Effort {
    /// Fewer and shorter rounds.
    pub(crate) quick: bool,
}

impl Effort {
    /// One of two values.
    pub(crate) fn pick<T>(self, full: T, quick: T) -> T {
        if self.quick { quick } else { full }
    }
}

/// What runs in processes of its own.
const BODIES: &[&[(&str, child::Body)]] =
    &[text::BODIES, resolve::BODIES, index_speed::BODIES, engine_speed::BODIES, customers::BODIES];

/// What takes too long to be among the others: measured only by name.
const BY_NAME: [(&str, Measurement); 1] = [("fleet-full", fleet::measure_full)];

type Measurement = fn(Effort) -> anyhow::Result<Vec<Line>>;

/// Quick ones first, so that a mistake shows early.
const MEASUREMENTS: [(&str, Measurement); 15] = [
    ("small", small::measure),
    ("guard", guard_speed::measure),
    ("entries", entries::measure),
    ("text", text::measure),
    ("resolve", resolve::measure),
    ("index", index_speed::measure),
    ("engine", engine_speed::measure),
    ("customers", customers::measure),
    ("fleet", fleet::measure),
    ("packets", packets::measure),
    ("plan", plan::measure),
    ("change", change::measure),
    ("flood", flood::measure),
    ("scale", scale::measure),
    ("traffic", traffic::measure),
];

/// Says what is under way.
pub(crate) fn progress(text: &str) {
    eprintln!("   {text}");
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let result = match (&arguments.child, &arguments.chart) {
        (Some(name), _) => child::here(name, BODIES),
        (None, Some(picture)) => chart::draw(&arguments.output, picture),
        (None, None) => all(&arguments),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bulkhead-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn all(arguments: &Arguments) -> anyhow::Result<()> {
    let known = |name: &String| MEASUREMENTS.iter().chain(&BY_NAME).any(|(known, _)| known == name);
    if let Some(unknown) = arguments.only.iter().find(|name| !known(name)) {
        let names: Vec<_> = MEASUREMENTS.iter().chain(&BY_NAME).map(|(name, _)| *name).collect();
        bail!("there is no measurement {unknown:?}: there are {}", names.join(", "));
    }
    if !rustix::process::geteuid().is_root() {
        bail!("this must run as root: it loads eBPF programs and makes network namespaces");
    }
    if let Some(filter) = &arguments.log {
        let filter = tracing_subscriber::EnvFilter::try_new(filter)?;
        tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    }
    let effort = Effort { quick: arguments.quick };
    let (mut lines, mut failed) = (Vec::new(), Vec::new());
    let started = Instant::now();
    let named = |name: &str| arguments.only.iter().any(|only| only == name);
    let by_name = BY_NAME.into_iter().filter(|(name, _)| named(name));
    let others = MEASUREMENTS.into_iter().filter(|(name, _)| arguments.only.is_empty() || named(name));
    for (name, measure) in others.chain(by_name) {
        eprintln!("{name} ({:.0} s so far)", started.elapsed().as_secs_f64());
        match measure(effort) {
            Ok(measured) => lines.extend(measured),
            Err(error) => {
                eprintln!("   could not be measured: {error:#}");
                failed.push(name);
            }
        }
    }
    let machine = Machine::here();
    report::print(&machine, &lines);
    report::write(&arguments.output, &machine, &lines)?;
    let over = lines.iter().filter(|line| line.within == Some(false)).count();
    println!(
        "\n{} numbers in {:.0} s, {over} over budget, written to {}",
        lines.len(),
        started.elapsed().as_secs_f64(),
        arguments.output.display()
    );
    if failed.is_empty() {
        return Ok(());
    }
    bail!("could not be measured: {}", failed.join(", "))
}
