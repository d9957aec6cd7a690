//! What was measured, as a table for people and as JSON for programs.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::Context;
use serde::{Deserialize, Serialize};

/// One measured number beside what it is compared to.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Line {
    /// What was measured; unique.
    pub(crate) name: String,
    /// Of `ours` and of every number in `others`.
    pub(crate) unit: String,
    /// Bulkhead's number.
    pub(crate) ours: f64,
    /// What it is compared to, by name.
    pub(crate) others: BTreeMap<String, f64>,
    /// `ours` by the first of `others`, or what the budget speaks of: the median of paired rounds.
    pub(crate) ratio: Option<f64>,
    /// What the design promises.
    pub(crate) budget: Option<String>,
    /// Whether it is kept.
    pub(crate) within: Option<bool>,
}

impl Line {
    /// A number that stands alone.
    pub(crate) fn new(name: impl Into<String>, unit: &str, ours: f64) -> Self {
        let (name, unit) = (name.into(), unit.to_owned());
        Self { name, unit, ours, others: BTreeMap::new(), ratio: None, budget: None, within: None }
    }

    /// Beside another's number.
    pub(crate) fn beside(mut self, peer: &str, number: f64) -> Self {
        self.others.insert(peer.to_owned(), number);
        self
    }

    /// With the ratio of paired rounds.
    pub(crate) fn ratio(mut self, ratio: f64) -> Self {
        self.ratio = Some(ratio);
        self
    }

    /// With a promise, and whether it is kept.
    pub(crate) fn budget(mut self, budget: impl Into<String>, within: bool) -> Self {
        self.budget = Some(budget.into());
        self.within = Some(within);
        self
    }
}

/// On what it was measured.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Machine {
    /// Release of the kernel.
    pub(crate) kernel: String,
    /// Logical processors.
    pub(crate) cores: usize,
    /// Model of the processor.
    pub(crate) processor: String,
    /// Commit of the source tree, with `-dirty` if it was changed.
    pub(crate) commit: String,
    /// Versions of what is compared to.
    pub(crate) peers: Vec<String>,
}

impl Machine {
    /// This one.
    pub(crate) fn here() -> Self {
        let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let model = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
        let first_line = |command: &[&str]| said(command).lines().next().unwrap_or_default().to_owned();
        Self {
            kernel: rustix::system::uname().release().to_string_lossy().into_owned(),
            cores: std::thread::available_parallelism().map_or(1, Into::into),
            processor: model.map_or_else(String::new, |(_, model)| model.trim().to_owned()),
            commit: said(&["git", "describe", "--always", "--dirty", "--exclude=*"]).trim().to_owned(),
            peers: [["iptables", "--version"], ["nft", "--version"], ["ipset", "--version"]]
                .iter()
                .map(|command| first_line(command))
                .filter(|version| !version.is_empty())
                .collect(),
        }
    }
}

fn said(command: &[&str]) -> String {
    let output = Command::new(command[0]).args(&command[1..]).output();
    output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default()
}

/// Prints the table.
pub(crate) fn print(machine: &Machine, lines: &[Line]) {
    let Machine { kernel, cores, processor, commit, peers } = machine;
    println!("\nkernel {kernel}, {cores} cores ({processor}), commit {commit}, {}\n", peers.join(", "));
    println!("| what | unit | bulkhead | beside | ratio | budget | |");
    println!("|---|---|---:|---|---:|---|---|");
    for line in lines {
        let others: Vec<_> =
            line.others.iter().map(|(peer, value)| format!("{peer}: {}", number(*value))).collect();
        let within = match line.within {
            None => "",
            Some(true) => "ok",
            Some(false) => "OVER",
        };
        println!(
            "| {} | {} | {} | {} | {} | {} | {within} |",
            line.name,
            line.unit,
            number(line.ours),
            others.join(", "),
            line.ratio.map_or_else(String::new, |ratio| format!("{ratio:.3}")),
            line.budget.as_deref().unwrap_or_default(),
        );
    }
}

/// Three or four significant digits.
fn number(value: f64) -> String {
    match value.abs() {
        v if v >= 100.0 || v == v.trunc() => format!("{value:.0}"),
        v if v >= 10.0 => format!("{value:.1}"),
        v if v >= 1.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

/// Writes the lines to `path`, and the machine beside them.
pub(crate) fn write(path: &Path, machine: &Machine, lines: &[Line]) -> anyhow::Result<()> {
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory).with_context(|| format!("cannot make {}", directory.display()))?;
    }
    let save = |path: &Path, text: String| {
        fs::write(path, text + "\n").with_context(|| format!("cannot write {}", path.display()))
    };
    save(path, serde_json::to_string_pretty(lines)?)?;
    save(&path.with_extension("machine.json"), serde_json::to_string_pretty(machine)?)
}
