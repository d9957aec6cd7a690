//! Arguments of what changes objects.

use std::path::PathBuf;

use clap::Args;

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
