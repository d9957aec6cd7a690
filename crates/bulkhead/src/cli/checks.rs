//! The flags of `test` and `lint`.

use std::path::PathBuf;

use bulkhead_model::time::Timestamp;
use clap::Args;

#[derive(Debug, Args)]
#[command(after_help = "\
Exit codes: 0 every test passed, 1 a test failed, 2 a file or the tool is wrong, or there is no test.

A test file says which manifests it is about and what is expected of them:

  manifests: [policies/, inventory.yaml]
  tests:
  - {from: workload:web.h1, to: workload:db.h2, port: tcp/5432, verdict: allow, by: orders-db}
  - {from: workload:stranger.h3, to: workload:db.h2, port: tcp/5432, verdict: deny}")]
pub(crate) struct TestArgs {
    /// Test files, directories to look for *.test.yaml and *.test.yml in, or patterns in quotes
    #[arg(default_value = ".", value_name = "FILE")]
    pub(crate) files: Vec<String>,
    /// Only tests whose file, suite or name contains this
    #[arg(long, value_name = "TEXT")]
    pub(crate) filter: Option<String>,
    /// Stop at the first test that fails
    #[arg(long)]
    pub(crate) fail_fast: bool,
    /// Write the results as JUnit XML too
    #[arg(long, value_name = "FILE")]
    pub(crate) junit: Option<PathBuf>,
    /// Write what failed as SARIF 2.1.0 too
    #[arg(long, value_name = "FILE")]
    pub(crate) sarif: Option<PathBuf>,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Exit codes: 0 nothing of severity warning or above, 1 findings, 2 the manifests cannot be read.")]
pub(crate) struct LintArgs {
    /// Manifests of any kind: files, directories, or - for standard input
    #[arg(short = 'f', long, required_unless_present_any = ["list", "explain"], value_name = "FILE")]
    pub(crate) filename: Vec<PathBuf>,
    /// Do not report this code; may be given several times
    #[arg(long, value_name = "CODE")]
    pub(crate) allow: Vec<String>,
    /// Report this code as an error; may be given several times
    #[arg(long, value_name = "CODE")]
    pub(crate) deny: Vec<String>,
    /// What time it is, for policies that end; default: now
    #[arg(long, value_name = "TIME")]
    pub(crate) at: Option<Timestamp>,
    /// Write the findings as SARIF 2.1.0 too
    #[arg(long, value_name = "FILE")]
    pub(crate) sarif: Option<PathBuf>,
    /// List all codes
    #[arg(long, conflicts_with_all = ["filename", "explain"])]
    pub(crate) list: bool,
    /// Say what a code means
    #[arg(long, value_name = "CODE", conflicts_with = "filename")]
    pub(crate) explain: Option<String>,
}
