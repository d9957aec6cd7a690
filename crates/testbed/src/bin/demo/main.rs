//! `bulkhead-demo`: three applications on three hosts of one machine, and what label policies do for them. Every
//! figure is observed and compared with what is expected; the exit code says whether all were equal.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use bulkhead_testbed::{Example, Lab, find_binary};

mod keep;
mod paint;
mod policies;
mod resilience;
mod scale;

use paint::Show;

/// What names of this demo's namespaces begin with.
const PREFIX: &str = "demo";

const HELP: &str = "\
Shows Bulkhead on three hosts made of network namespaces. Needs root.

Usage: bulkhead-demo [--bulkhead PATH] [--keep]
       bulkhead-demo --clean

  --bulkhead PATH  the product's binary [default: BULKHEAD_BIN, or next to this one]
  --keep           leave it running to play with
  --clean          remove what --keep left

Exit code: 0 everything was as expected, 1 something was not, 2 it could not be shown.";

enum Task {
    Show { binary: Option<PathBuf>, keep: bool },
    Clean,
    Serve(PathBuf),
    Help,
}

fn task() -> Result<Task> {
    let (mut binary, mut keep) = (None, false);
    let mut arguments = std::env::args_os().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.to_str() {
            Some("--bulkhead") => binary = Some(arguments.next().context("--bulkhead needs a path")?.into()),
            Some("--keep") => keep = true,
            Some("--clean") => return Ok(Task::Clean),
            Some("--serve") => {
                return Ok(Task::Serve(arguments.next().context("--serve needs a file")?.into()));
            }
            Some("--help" | "-h") => return Ok(Task::Help),
            _ => bail!("unknown argument {}\n\n{HELP}", argument.display()),
        }
    }
    Ok(Task::Show { binary, keep })
}

fn main() -> ExitCode {
    let result = task().and_then(|task| match task {
        Task::Show { binary, keep } => show(binary, keep),
        Task::Clean => {
            Lab::clean(PREFIX);
            Ok(true)
        }
        Task::Serve(file) => keep::serve(&file).map(|()| true),
        Task::Help => {
            println!("{HELP}");
            Ok(true)
        }
    });
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn show(binary: Option<PathBuf>, keep: bool) -> Result<bool> {
    let started = Instant::now();
    let binary = binary.map_or_else(find_binary, Ok)?.canonicalize()?;
    let mut show = Show::new();
    show.title("Bulkhead: labels in, kernel enforcement out");
    let mut example = Example::start(PREFIX, &binary)?;
    show.note(&format!(
        "A controller, {} hosts with an agent each, {} workloads of 3 applications; up in {:.1} s.",
        example.bulkhead.lab.hosts.len(),
        example.members.len(),
        started.elapsed().as_secs_f64()
    ));
    let seen = run(&mut show, &mut example);
    if keep {
        if let Err(error) = &seen {
            show.broken(&format!("{error:#}"));
        }
        show.summary(started.elapsed());
        keep::leave(example)?;
    } else {
        seen?;
        show.summary(started.elapsed());
    }
    Ok(show.all_as_expected())
}

fn run(show: &mut Show, example: &mut Example) -> Result<()> {
    policies::without(show, example)?;
    policies::with(show, example)?;
    let second = scale::new_instance(show, example)?;
    let crowd = scale::one_to_twenty(show, example)?;
    policies::relabel(show, example)?;
    resilience::controller(show, example)?;
    resilience::agent(show, example)?;
    policies::refused(show, example)?;
    // What the scenes started stays up until here: removing workloads is no part of the show.
    drop((second, crowd));
    Ok(())
}
