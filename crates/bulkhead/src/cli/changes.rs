//! Arguments of what changes objects.

use std::path::PathBuf;

use clap::{Args, Subcommand};

#[derive(Debug, Args)]
pub(crate) struct FileArgs {
    /// Files or directories of YAML or JSON; - is standard input
    #[arg(short, long = "filename", required = true, value_name = "FILE")]
    pub(crate) filename: Vec<PathBuf>,
    /// Check everything, change nothing
    #[arg(long)]
    pub(crate) dry_run: bool,
}

#[derive(Debug, Args)]
pub(crate) struct ApplyArgs {
    #[command(flatten)]
    pub(crate) files: FileArgs,
    #[command(flatten)]
    pub(crate) change: ChangeArgs,
}

#[derive(Debug, Args)]
pub(crate) struct DeleteArgs {
    /// Kind of the object; KIND or KIND/NAME
    #[arg(required_unless_present = "filename", conflicts_with = "filename")]
    pub(crate) kind: Option<String>,
    /// Name of the object
    pub(crate) name: Option<String>,
    /// Delete what these files name
    #[arg(short, long = "filename", value_name = "FILE")]
    pub(crate) filename: Vec<PathBuf>,
    /// Check everything, change nothing
    #[arg(long)]
    pub(crate) dry_run: bool,
    #[command(flatten)]
    pub(crate) change: ChangeArgs,
}

#[derive(Debug, Args)]
pub(crate) struct ChangeArgs {
    /// Do it even if it cuts this session or an agent off from the controller
    #[arg(long)]
    pub(crate) force: bool,
    /// Undo it by itself unless "bulkhead confirm" comes in time, like 90s, 2m or 1h (1s to 24h)
    #[arg(long, value_name = "TIME")]
    pub(crate) confirm_within: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct DiffArgs {
    /// Files or directories of YAML or JSON; - is standard input
    #[arg(short, long = "filename", required_unless_present = "revision", value_name = "FILE")]
    pub(crate) filename: Vec<PathBuf>,
    /// Show what changed between two revisions instead: A..B, or A.. for what changed since
    #[arg(long, value_name = "A..B", conflicts_with = "filename", value_parser = revisions)]
    pub(crate) revision: Option<(u64, Option<u64>)>,
}

fn revisions(text: &str) -> Result<(u64, Option<u64>), String> {
    let expected =
        || format!("expected A..B or A.. with revisions as \"bulkhead history\" shows them, found {text:?}");
    let (from, to) = text.split_once("..").ok_or_else(expected)?;
    let number = |text: &str| text.parse::<u64>().map_err(|_not_one| expected());
    Ok((number(from)?, if to.is_empty() { None } else { Some(number(to)?) }))
}

#[derive(Debug, Args)]
pub(crate) struct HistoryArgs {
    /// Only changes of this object: KIND/NAME or KIND/NAMESPACE/NAME
    pub(crate) object: Option<String>,
    /// How many of the newest
    #[arg(long, default_value_t = 20, value_name = "COUNT")]
    pub(crate) limit: usize,
}

#[derive(Debug, Args)]
pub(crate) struct RollbackArgs {
    /// The revision to go back to, as "bulkhead history" shows it: everything that operators changed after it is undone
    #[arg(long, value_name = "REVISION")]
    pub(crate) to: u64,
    /// Check and show, change nothing
    #[arg(long)]
    pub(crate) dry_run: bool,
    #[command(flatten)]
    pub(crate) change: ChangeArgs,
}

#[derive(Debug, Args)]
pub(crate) struct AuditArgs {
    #[command(subcommand)]
    pub(crate) command: AuditCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum AuditCommand {
    /// Check that no line of a controller's audit log was changed or taken out
    Verify {
        /// Where the log is
        #[arg(default_value = "/var/lib/bulkhead/controller/audit", value_name = "DIRECTORY")]
        directory: PathBuf,
    },
}

#[derive(Debug, Args)]
pub(crate) struct ConfirmArgs {
    /// Which change; may be left out if only one waits
    pub(crate) id: Option<String>,
    /// Show what waits, and what was rolled back lately
    #[arg(long, conflicts_with_all = ["id", "rollback"])]
    pub(crate) list: bool,
    /// Undo it at once
    #[arg(long)]
    pub(crate) rollback: bool,
}
