//! What this process holds.

use std::fs;

use anyhow::{Context, anyhow};

/// Bytes per megabyte, as published numbers count them.
const MEGABYTE: f64 = 1e6;

/// Megabytes that are resident now; the peak starts here.
pub(crate) fn start() -> anyhow::Result<f64> {
    fs::write("/proc/self/clear_refs", "5").context("cannot reset the peak of memory")?;
    field("VmRSS:")
}

/// Most megabytes that were resident since [`start`].
pub(crate) fn peak() -> anyhow::Result<f64> {
    field("VmHWM:")
}

fn field(name: &str) -> anyhow::Result<f64> {
    let status = fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix(name));
    let kib: f64 = line
        .and_then(|line| line.split_whitespace().next())
        .and_then(|number| number.parse().ok())
        .ok_or_else(|| anyhow!("the kernel does not tell {name}"))?;
    Ok(kib * 1024.0 / MEGABYTE)
}
