//! Chores of the project. `cargo xtask tidy` checks the house rules that no lint knows, `cargo xtask reference` writes
//! `docs/policy-reference.md`.

use std::path::Path;

use anyhow::{Context, Result, bail};

mod reference;
mod tidy;

fn main() -> Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("xtask lies in the workspace")?;
    match std::env::args().nth(1).as_deref() {
        Some("tidy") => tidy::run(root),
        Some("reference") => reference::write(root),
        other => bail!("expected a chore, one of: tidy, reference; found {other:?}"),
    }
}
