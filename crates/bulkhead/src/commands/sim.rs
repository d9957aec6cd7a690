//! `sim`: a fleet of simulated agents.

use anyhow::Context;
use bulkhead_sim::{Config, Target};
use serde_json::json;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use crate::cli::{Common, SimArgs, SimStore};
use crate::failure::Failure;
use crate::output;

pub(crate) async fn sim(common: &Common, args: &SimArgs) -> Result<(), Failure> {
    let SimArgs {
        agents,
        workloads,
        policies,
        activations_per_second,
        duration,
        seed,
        store,
        controller,
        identity_dir,
    } = args;
    let target = match controller {
        Some(controller) => {
            let address =
                |url: &str| url.strip_prefix("https://").unwrap_or(url).trim_end_matches('/').to_owned();
            let server = common.server.as_deref().filter(|url| !url.starts_with("unix:"));
            let server = server
                .ok_or_else(|| Failure::Usage("name its API with --server https://HOST:PORT".into()))?;
            let identity = identity_dir.clone().unwrap_or_default();
            Target::Running { server: address(server), controller: address(controller), identity }
        }
        None => {
            let binary = std::env::current_exe().context("cannot find this program")?;
            let store = match store {
                SimStore::Embedded => "embedded",
                SimStore::Memory => "memory",
            };
            Target::Start { binary, store: store.into() }
        }
    };
    let config = Config {
        agents: *agents,
        workloads: *workloads,
        policies: *policies,
        activations_per_second: *activations_per_second,
        duration: *duration,
        seed: *seed,
        target,
        progress: true,
    };
    let (stop, stopped) = watch::channel(false);
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot listen for signals")?;
    let mut terminate = signal(SignalKind::terminate()).context("cannot listen for signals")?;
    let simulation = bulkhead_sim::run(config, stopped);
    tokio::pin!(simulation);
    let mut asked = false;
    let report = loop {
        tokio::select! {
            report = &mut simulation => break report?,
            // The controller ends with the simulation.
            _ = terminate.recv() => return Err(Failure::No(None)),
            _ = interrupt.recv() => {
                if asked {
                    return Err(Failure::No(None));
                }
                asked = true;
                eprintln!("stopping; once more to end at once");
                stop.send_replace(true);
            }
        }
    };
    output::show(common.output, &json!(report), || Ok(report.table()))?;
    if report.differences.is_empty() { Ok(()) } else { Err(Failure::No(None)) }
}
