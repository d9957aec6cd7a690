//! The one binary: daemons and operator's commands.
//!
//! Exit codes: 0 done; 1 the answer is no (input refused, not found, differences found); 2 wrong usage;
//! 3 controller or agent cannot be reached; 4 anything else that failed. `test` and `lint` end with 1 for what they
//! found in policies, and with 2 for everything that kept them from looking.

use std::process::ExitCode;

use clap::Parser;

mod cli;
mod client;
mod commands;
mod daemons;
mod dataplanes;
mod failure;
mod junit;
mod logging;
mod manifests;
mod output;
mod sarif;
mod scenario;
mod suite;
mod supervisor;
mod yaml;

use cli::{Cli, Command};
use failure::Failure;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            output::error(&format!("cannot start: {error}"));
            return ExitCode::from(4);
        }
    };
    let result = runtime.block_on(run(cli));
    // A blocked read of a terminal or a kernel socket must not keep the process.
    runtime.shutdown_background();
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            if let Some(message) = failure.message() {
                output::error(message);
            }
            ExitCode::from(failure.code())
        }
    }
}

async fn run(cli: Cli) -> Result<(), Failure> {
    let Cli { common, command } = cli;
    output::choose_colour(common.color);
    match command {
        Command::Controller(args) => daemons::controller(&args).await,
        Command::Agent(args) => daemons::agent(&common, &args).await,
        Command::Relay(args) => match &args.command {
            None => daemons::relay(&args).await,
            Some(command) => commands::identities::relay(&common, command).await,
        },
        Command::Standalone(args) => daemons::standalone(&common, &args).await,
        Command::Init(args) => commands::identities::init(&common, &args),
        Command::Token(args) => commands::identities::token(&common, &args.command).await,
        Command::Certificate(args) => commands::identities::certificate(&common, &args.command).await,
        Command::Kubeconfig(args) => commands::kubeconfig::kubeconfig(&common, &args),
        Command::Whoami => commands::identities::who_am_i(&common).await,
        Command::Apply(args) => commands::apply::apply(&common, &args).await,
        Command::Delete(args) => commands::apply::delete(&common, &args).await,
        Command::Confirm(args) => commands::confirm::run(&common, &args).await,
        Command::Diff(args) => commands::apply::diff(&common, &args).await,
        Command::History(args) => commands::history::history(&common, &args).await,
        Command::Rollback(args) => commands::history::roll_back(&common, &args).await,
        Command::Audit(args) => commands::history::audit(&common, &args.command),
        Command::Get(args) => commands::get::get(&common, &args).await,
        Command::Describe(args) => commands::describe::describe(&common, &args).await,
        Command::Explain(args) => commands::explain::explain(&common, &args).await,
        Command::Decide(args) => commands::decide::decide(&common, &args),
        Command::Sim(args) => commands::sim::sim(&common, &args).await,
        Command::Test(args) => commands::test::test(&common, &args),
        Command::Lint(args) => commands::lint::lint(&common, &args),
        Command::Convert(args) => commands::convert::convert(&common, &args),
        Command::Flows(args) => commands::flows::flows(&common, &args).await,
        Command::Trace(args) => commands::trace::trace(&common, &args).await,
        Command::Status => commands::status::status(&common).await,
        Command::Store(args) => commands::store::run(&common, &args).await,
        Command::Workload(args) => commands::workload::workload(&common, &args).await,
        Command::Dataplane(args) => commands::dataplane::dataplane(&common, &args.command).await,
        Command::Plan => commands::status::plan(&common).await,
        Command::Completion { shell } => {
            commands::docs::completion(shell);
            Ok(())
        }
        Command::Man { directory } => commands::docs::man(directory.as_deref()),
    }
}
