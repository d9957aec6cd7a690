//! Chores of the project. `cargo xtask tidy` checks the house rules that no lint knows.

use anyhow::{Result, bail};

mod tidy;

fn main() -> Result<()> {
    match std::env::args().nth(1).as_deref() {
        Some("tidy") => tidy::run(),
        other => bail!("expected a chore, one of: tidy; found {other:?}"),
    }
}
