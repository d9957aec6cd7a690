//! `bulkhead-demo`: three applications on three hosts of one machine, and what label policies do for them. Every
//! figure is observed and compared with what is expected; the exit code says whether all were equal.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use bulkhead_testbed::{Example, Lab, Member, find_binary};

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
    let mut extras = Vec::new();
    let seen = run(&mut show, &mut example, &mut extras);
    if !keep {
        seen?;
        show.summary(started.elapsed());
        return Ok(show.all_as_expected());
    }
    if let Err(error) = seen {
        show.broken(&format!("{error:#}"));
    }
    show.summary(started.elapsed());
    keep::leave(example, &extras)?;
    Ok(show.all_as_expected())
}

/// All scenes. What they start beside the example stays up in `extras`.
fn run(show: &mut Show, example: &mut Example, extras: &mut Vec<Member>) -> Result<()> {
    policies::without(show, example)?;
    policies::with(show, example)?;
    extras.push(scale::new_instance(show, example)?);
    extras.extend(scale::one_to_twenty(show, example)?);
    policies::relabel(show, example)?;
    extras.push(resilience::controller(show, example)?);
    resilience::agent(show, example)?;
    policies::refused(show, example)
}
