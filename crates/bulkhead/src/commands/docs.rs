//! Completion scripts and manual pages, made from the command line's own description.

use std::path::Path;

use anyhow::Context;
use clap::CommandFactory;

use crate::cli::Cli;
use crate::failure::Failure;

pub(crate) fn completion(shell: clap_complete::Shell) {
    clap_complete::generate(shell, &mut Cli::command(), "bulkhead", &mut std::io::stdout());
}

pub(crate) fn man(directory: Option<&Path>) -> Result<(), Failure> {
    match directory {
        Some(directory) => {
            std::fs::create_dir_all(directory).with_context(|| directory.display().to_string())?;
            clap_mangen::generate_to(Cli::command(), directory)
                .with_context(|| directory.display().to_string())?;
        }
        None => clap_mangen::Man::new(Cli::command())
            .render(&mut std::io::stdout())
            .context("cannot write the manual page")?,
    }
    Ok(())
}
