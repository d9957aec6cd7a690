//! The house rules: who may depend on whom, how long files may be, and that tables kept in two places agree.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use bulkhead_model::flow::DropReason;
use serde_json::Value;

/// How git marks what it could not merge.
const MERGE_MARKS: [&str; 2] = ["<<<<<<< ", ">>>>>>> "];

/// Longest source file that is no test, in lines.
const FILE_LINES_MAX: usize = 500;

/// The allowed directions. A crate that is not listed may depend on none of ours.
const MAY_DEPEND_ON: [(&str, &[&str]); 12] = [
    ("bulkhead-engine", &["bulkhead-model"]),
    ("bulkhead-wire", &["bulkhead-model"]),
    ("bulkhead-membership", &["bulkhead-identity", "bulkhead-wire"]),
    ("bulkhead-dataplane", &["bulkhead-model"]),
    ("bulkhead-ebpf", &["bulkhead-model", "bulkhead-dataplane"]),
    ("bulkhead-nft", &["bulkhead-model", "bulkhead-dataplane"]),
    ("bulkhead-discover", &["bulkhead-model"]),
    (
        "bulkhead-controller",
        &[
            "bulkhead-model",
            "bulkhead-engine",
            "bulkhead-identity",
            "bulkhead-membership",
            "bulkhead-store",
            "bulkhead-wire",
        ],
    ),
    (
        "bulkhead-agent",
        &[
            "bulkhead-model",
            "bulkhead-engine",
            "bulkhead-dataplane",
            "bulkhead-discover",
            "bulkhead-identity",
            "bulkhead-membership",
            "bulkhead-wire",
        ],
    ),
    ("bulkhead-sim", &["bulkhead-model", "bulkhead-engine", "bulkhead-identity", "bulkhead-wire"]),
    (
        "bulkhead",
        &[
            "bulkhead-model",
            "bulkhead-engine",
            "bulkhead-agent",
            "bulkhead-controller",
            "bulkhead-dataplane",
            "bulkhead-ebpf",
            "bulkhead-identity",
            "bulkhead-nft",
            "bulkhead-sim",
            "bulkhead-store",
        ],
    ),
    ("xtask", &["bulkhead-model"]),
];

/// Development packages, which may look at anything.
const UNBOUND: [&str; 4] =
    ["bulkhead-bench", "bulkhead-dataplane-testing", "bulkhead-tests", "bulkhead-testbed"];

/// Crates that decide: no clock, no files, no network, no processes.
const PURE: [&str; 2] = ["crates/model", "crates/engine"];
const IMPURE: [&str; 8] = [
    "std::fs",
    "std::net::Tcp",
    "std::net::Udp",
    "std::process",
    "std::thread",
    "SystemTime",
    "Instant::now",
    "tokio",
];

pub(crate) fn run(root: &Path) -> Result<()> {
    let mut problems = Vec::new();
    dependencies(root, &mut problems)?;
    for file in tracked(root)? {
        source_file(root, &file, &mut problems)?;
    }
    drop_reasons(root, &mut problems)?;
    examples(root, &mut problems)?;
    crate::reference::check(root, &mut problems)?;
    for problem in &problems {
        eprintln!("{problem}");
    }
    if problems.is_empty() {
        println!("tidy");
        Ok(())
    } else {
        bail!("{} things to tidy", problems.len())
    }
}

fn output(root: &Path, program: &str, arguments: &[&str]) -> Result<String> {
    let output =
        Command::new(program).args(arguments).current_dir(root).output().context(program.to_owned())?;
    if !output.status.success() {
        bail!("{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(String::from_utf8(output.stdout)?)
}

fn tracked(root: &Path) -> Result<Vec<PathBuf>> {
    Ok(output(root, "git", &["ls-files"])?.lines().map(PathBuf::from).collect())
}

fn dependencies(root: &Path, problems: &mut Vec<String>) -> Result<()> {
    let text = output(root, "cargo", &["metadata", "--format-version", "1", "--no-deps", "--locked"])?;
    let metadata: Value = serde_json::from_str(&text)?;
    let packages = metadata["packages"].as_array().context("packages")?;
    let ours: BTreeSet<&str> = packages.iter().filter_map(|package| package["name"].as_str()).collect();
    let allowed: BTreeMap<&str, &[&str]> = MAY_DEPEND_ON.into_iter().collect();
    for package in packages {
        let name = package["name"].as_str().unwrap_or_default();
        if UNBOUND.contains(&name) {
            continue;
        }
        for dependency in package["dependencies"].as_array().into_iter().flatten() {
            let on = dependency["name"].as_str().unwrap_or_default();
            let development = dependency["kind"] == "dev";
            let may = allowed.get(name).is_some_and(|list| list.contains(&on));
            if ours.contains(on) && !may && !development {
                problems.push(format!("{name} must not depend on {on}: see ARCHITECTURE.md"));
            }
        }
    }
    Ok(())
}

fn source_file(root: &Path, file: &Path, problems: &mut Vec<String>) -> Result<()> {
    let name = file.display().to_string();
    // Cargo takes tests/foo.rs for a test binary of its own, so shared helpers of tests are the exception.
    if file.file_name().is_some_and(|name| name == "mod.rs") && !name.contains("tests/") {
        problems.push(format!("{name}: modules are foo.rs beside foo/, never mod.rs"));
    }
    let is = |kinds: &[&str]| {
        file.extension().is_some_and(|extension| kinds.iter().any(|kind| extension == *kind))
    };
    if !is(&["rs", "c", "h", "md", "toml", "yaml", "yml", "json"]) {
        return Ok(());
    }
    let text = std::fs::read_to_string(root.join(file)).with_context(|| name.clone())?;
    for (number, line) in text.lines().enumerate() {
        if MERGE_MARKS.iter().any(|mark| line.starts_with(mark)) {
            problems.push(format!("{name}:{}: a merge was left half done", number + 1));
        }
    }
    if !is(&["rs", "c", "h"]) {
        return Ok(());
    }
    let test = name.contains("tests") || name.starts_with("benches/");
    let lines = text.lines().count();
    if lines > FILE_LINES_MAX && !test {
        problems.push(format!("{name}: {lines} lines, {FILE_LINES_MAX} at most: what could stand alone?"));
    }
    let pure = PURE.iter().any(|pure| name.starts_with(pure)) && !test;
    for (number, line) in text.lines().enumerate() {
        let line_number = number + 1;
        let comment = line.trim_start().starts_with("//");
        if pure
            && !comment
            && let Some(what) = IMPURE.iter().find(|what| line.contains(*what))
        {
            problems.push(format!("{name}:{line_number}: {what} in a crate that only computes"));
        }
        if comment && (line.contains("TODO") || line.contains("FIXME")) {
            problems.push(format!("{name}:{line_number}: open ends belong into an issue"));
        }
    }
    Ok(())
}

/// Every manifest that documentation shows and every file of examples is one that Bulkhead takes.
fn examples(root: &Path, problems: &mut Vec<String>) -> Result<()> {
    let mut found = 0;
    for file in tracked(root)? {
        let name = file.display().to_string();
        // Policy tests are no resources; the binary's own tests run those of the examples.
        let policy_test = name.ends_with(".test.yaml");
        let manifest = ["examples/", "docs/reference/"].iter().any(|folder| name.starts_with(folder))
            && name.ends_with(".yaml")
            && !policy_test;
        if !manifest && !name.ends_with(".md") {
            continue;
        }
        let text = std::fs::read_to_string(root.join(&file)).with_context(|| name.clone())?;
        let texts = if manifest { vec![text] } else { fenced_manifests(&text) };
        for text in texts {
            match bulkhead_model::document::parse(&name, &text) {
                Ok(documents) => found += documents.len(),
                Err(list) => problems.extend(list.iter().map(|problem| format!("in an example: {problem}"))),
            }
        }
    }
    if found == 0 {
        problems.push("no example was found at all: has the check gone blind?".into());
    }
    Ok(())
}

/// Blocks between ```yaml and ``` that hold resources, and no policy tests: those are read by the binary's own tests.
fn fenced_manifests(text: &str) -> Vec<String> {
    let blocks = text.split("```yaml\n").skip(1).filter_map(|rest| rest.split("```").next());
    let manifests = blocks.filter(|block| block.contains("apiVersion:") && !block.contains("\ntests:\n"));
    manifests.map(ToOwned::to_owned).collect()
}

/// The reasons for drops stand in Rust, in C and in the documentation.
fn drop_reasons(root: &Path, problems: &mut Vec<String>) -> Result<()> {
    for (file, shape) in [("docs/drop-reasons.md", false), ("crates/ebpf/bpf/abi.h", true)] {
        let text = std::fs::read_to_string(root.join(file)).context(file)?;
        for reason in DropReason::ALL {
            let word = serde_json::to_value(reason)?.as_str().unwrap_or_default().to_owned();
            let there = if shape {
                let constant = format!("REASON_{}", word.to_uppercase().replace('-', "_"));
                text.lines()
                    .any(|line| line.contains(&constant) && line.contains(&(reason as u8).to_string()))
            } else {
                reason == DropReason::None || text.contains(&format!("`{word}`"))
            };
            if !there {
                problems.push(format!("{file}: drop reason {word} ({}) is missing", reason as u8));
            }
        }
    }
    Ok(())
}
