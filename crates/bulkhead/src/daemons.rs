//! Wiring of the daemons: settings, log, signals, and which dataplane enforces.

use std::path::{Path, PathBuf};
use std::time::SystemTime;

use anyhow::{Context, anyhow};
use bulkhead_agent::DataplaneChoice;
use bulkhead_identity::Credentials;
use bulkhead_model::{Verdict, document};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use crate::cli::{
    AgentArgs, AgentSettings, Common, ControllerArgs, ControllerSettings, DataplaneName, Posture, RelayArgs,
    StandaloneArgs,
};
use crate::dataplanes;
use crate::failure::Failure;
use crate::{logging, supervisor};

/// Where a Docker engine listens unless told otherwise.
const DOCKER_SOCKET: &str = "/var/run/docker.sock";
/// Host-side interfaces that Docker makes.
const DOCKER_INTERFACES: &str = "veth*";
/// Directory below which the kernel's tables are pinned.
const PIN_ROOT: &str = "/sys/fs/bpf/bulkhead";

/// `--config` of standalone.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct StandaloneConfig {
    controller: bulkhead_controller::Config,
    agent: bulkhead_agent::Config,
}

pub(crate) async fn controller(args: &ControllerArgs) -> Result<(), Failure> {
    let _traces = logging::start(&args.log, "bulkhead-controller")?;
    let config = controller_config(read(args.config.as_deref())?, &args.settings);
    let shutdown = stop_signal()?;
    let mut running = bulkhead_controller::start(config).await.map_err(describe)?;
    supervisor::tell("READY=1");
    let result = tokio::select! {
        () = wait(shutdown) => Ok(()),
        error = running.failed() => {
            tracing::error!(%error, "the controller stops");
            Err(describe(error))
        }
    };
    supervisor::tell("STOPPING=1");
    let stopped = running.shutdown().await.map_err(describe);
    result.and(stopped)
}

pub(crate) async fn agent(common: &Common, args: &AgentArgs) -> Result<(), Failure> {
    let _traces = logging::start(&args.log, "bulkhead-agent")?;
    let mut config = agent_config(read(args.config.as_deref())?, common, &args.settings)?;
    if !args.controller.is_empty() {
        config.controllers.clone_from(&args.controller);
    }
    if let Some(token) = given_token(args.join_token.as_ref(), args.join_token_file.as_deref())? {
        config.join_token = Some(token);
    }
    let pins = pin_directory(&args.settings, &config.host);
    if args.cleanup {
        dataplanes::cleanup(&pins).map_err(describe)?;
        // What an agent makes besides, and leaves, lest it takes away that of its successor. The directory stays if
        // another agent of this kernel has its pins there.
        let _not_there = std::fs::remove_file(&config.socket);
        let _not_empty = std::fs::remove_dir(PIN_ROOT);
        return Ok(());
    }
    let dataplane = dataplanes::open(config.dataplane, config.fence, &pins).map_err(describe)?;
    bulkhead_agent::run(config, dataplane, stop_signal()?, supervisor::beat).await.map_err(describe)
}

pub(crate) async fn relay(args: &RelayArgs) -> Result<(), Failure> {
    let _traces = logging::start(&args.log, "bulkhead-relay")?;
    let config = relay_config(read(args.config.as_deref())?, args)?;
    let shutdown = stop_signal()?;
    // It may wait for a controller that lets it join.
    let mut running = tokio::select! {
        running = bulkhead_controller::relay::start(config) => running.map_err(describe)?,
        () = wait(shutdown.clone()) => return Ok(()),
    };
    supervisor::tell("READY=1");
    let result = tokio::select! {
        () = wait(shutdown) => Ok(()),
        error = running.failed() => {
            tracing::error!(%error, "the relay stops");
            Err(describe(error))
        }
    };
    supervisor::tell("STOPPING=1");
    let stopped = running.shutdown().await.map_err(describe);
    result.and(stopped)
}

fn relay_config(
    mut config: bulkhead_controller::relay::Config,
    args: &RelayArgs,
) -> Result<bulkhead_controller::relay::Config, Failure> {
    if let Some(name) = &args.name {
        config.name.clone_from(name);
    }
    if !args.upstream.is_empty() {
        config.upstreams.clone_from(&args.upstream);
    }
    if let Some(token) = given_token(args.join_token.as_ref(), args.join_token_file.as_deref())? {
        config.join_token = Some(token);
    }
    if let Some(address) = args.listen_agents {
        config.listen_agents = address;
    }
    if args.advertise_agents.is_some() {
        config.advertise_agents.clone_from(&args.advertise_agents);
    }
    match args.listen_probes.as_deref() {
        None => {}
        Some("none") => config.listen_probes = None,
        Some(address) => {
            let address = address.parse().map_err(|_no_address| {
                Failure::Usage(format!("--listen-probes: expected ADDRESS:PORT or none, found {address:?}"))
            })?;
            config.listen_probes = Some(address);
        }
    }
    if let Some(directory) = &args.state_dir {
        config.state_directory.clone_from(directory);
    }
    Ok(config)
}

/// The token that flags give, or name a file with.
fn given_token(token: Option<&String>, file: Option<&Path>) -> Result<Option<String>, Failure> {
    let Some(file) = file else { return Ok(token.cloned()) };
    let text = std::fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
    Ok(Some(text.trim().to_owned()))
}

pub(crate) async fn standalone(common: &Common, args: &StandaloneArgs) -> Result<(), Failure> {
    let _traces = logging::start(&args.log, "bulkhead-standalone")?;
    let StandaloneConfig { controller, agent } = read(args.config.as_deref())?;
    let controller = controller_config(controller, &args.controller);
    let mut agent = agent_config(agent, common, &args.agent)?;
    // Whatever the kernel lacks is said before anything runs.
    let pins = pin_directory(&args.agent, &agent.host);
    let dataplane = dataplanes::open(agent.dataplane, agent.fence, &pins).map_err(describe)?;
    let shutdown = stop_signal()?;
    let mut running = bulkhead_controller::start(controller).await.map_err(describe)?;
    agent.controllers = vec![format!("https://{}", running.agents)];
    join(&running, &agent)?;
    let agent = bulkhead_agent::run(agent, dataplane, shutdown, supervisor::beat);
    let result = tokio::select! {
        result = agent => result.map_err(describe),
        error = running.failed() => Err(describe(error)),
    };
    let stopped = running.shutdown().await.map_err(describe);
    result.and(stopped)
}

/// The controller and the agent of one process know each other: no token is needed between them.
fn join(controller: &bulkhead_controller::Controller, agent: &bulkhead_agent::Config) -> Result<(), Failure> {
    let directory = agent.identity_directory();
    let known = Credentials::load(&directory, bulkhead_agent::IDENTITY_FILES).ok().flatten();
    let usable = known.is_some_and(|own| {
        let is_this_host = own.holder().is_ok_and(|own| own.identity.name() == agent.host);
        // One of an authority before is of no use.
        let is_trusted = own.authorities == controller.authorities();
        is_this_host && is_trusted && own.valid_at(SystemTime::now()).unwrap_or(false)
    });
    if usable {
        return Ok(());
    }
    let credentials = controller.agent_credentials(&agent.host).map_err(describe)?;
    credentials.save(&directory, bulkhead_agent::IDENTITY_FILES).map_err(describe)
}

fn controller_config(
    mut config: bulkhead_controller::Config,
    settings: &ControllerSettings,
) -> bulkhead_controller::Config {
    let ControllerSettings {
        listen,
        listen_agents,
        data_dir,
        identity_dir,
        socket,
        known_as,
        name,
        advertise,
        advertise_agents,
        store,
    } = settings;
    if let Some(name) = name {
        config.name.clone_from(name);
    }
    if advertise.is_some() {
        config.advertise_api.clone_from(advertise);
    }
    if advertise_agents.is_some() {
        config.advertise_agents.clone_from(advertise_agents);
    }
    if let Some(address) = listen {
        config.listen_api = *address;
    }
    if let Some(address) = listen_agents {
        config.listen_agents = *address;
    }
    if let Some(directory) = data_dir {
        config.data_directory.clone_from(directory);
    }
    if identity_dir.is_some() {
        config.identity_directory.clone_from(identity_dir);
    }
    match socket {
        Some(none) if none.as_os_str() == "none" => config.socket = None,
        Some(socket) => config.socket = Some(socket.clone()),
        None => {}
    }
    config.known_as.extend(known_as.iter().cloned());
    if let Some(location) = &store.store {
        config.set_location(location.clone());
    }
    config.set_location(store.etcd.complete(config.location()));
    config
}

fn agent_config(
    mut config: bulkhead_agent::Config,
    common: &Common,
    settings: &AgentSettings,
) -> Result<bulkhead_agent::Config, Failure> {
    let AgentSettings {
        host,
        state_dir,
        docker,
        workload_dir,
        workload_interfaces,
        fence,
        default_posture,
        sweep_interval_ms,
        dataplane,
        pin_dir: _,
    } = settings;
    if let Some(host) = host {
        config.host.clone_from(host);
    }
    if !bulkhead_model::resource::is_name(&config.host) {
        let message = format!("{:?} cannot be the name of a host: give another with --host", config.host);
        return Err(Failure::Usage(message));
    }
    // The flag always has a value: only another than the default was meant, and wins over the file.
    if common.agent_socket != bulkhead_agent::Config::default().socket {
        config.socket.clone_from(&common.agent_socket);
    }
    if let Some(directory) = state_dir {
        config.state_directory.clone_from(directory);
    }
    match docker {
        Some(none) if none.as_os_str() == "none" => config.docker_socket = None,
        Some(socket) => config.docker_socket = Some(socket.clone()),
        None if config.docker_socket.is_none() && Path::new(DOCKER_SOCKET).exists() => {
            config.docker_socket = Some(DOCKER_SOCKET.into());
        }
        None => {}
    }
    if let Some(directory) = workload_dir {
        config.workload_directory = Some(directory.clone());
    }
    config.workload_interfaces.extend(workload_interfaces.iter().cloned());
    if config.workload_interfaces.is_empty() && config.docker_socket.is_some() {
        config.workload_interfaces.push(DOCKER_INTERFACES.into());
    }
    config.fence |= fence;
    match default_posture {
        Some(Posture::Allow) => config.default_posture = Verdict::Allow,
        Some(Posture::Deny) => config.default_posture = Verdict::Deny,
        None => {}
    }
    match dataplane {
        Some(DataplaneName::Auto) => config.dataplane = DataplaneChoice::Auto,
        Some(DataplaneName::Ebpf) => config.dataplane = DataplaneChoice::Ebpf,
        Some(DataplaneName::Nftables) => config.dataplane = DataplaneChoice::Nftables,
        None => {}
    }
    if let Some(interval) = sweep_interval_ms {
        config.sweep_interval_ms = *interval;
    }
    Ok(config)
}

fn pin_directory(settings: &AgentSettings, host: &str) -> PathBuf {
    settings.pin_dir.clone().unwrap_or_else(|| Path::new(PIN_ROOT).join(host.replace('.', "_")))
}

/// Settings from a file of YAML, or the defaults.
fn read<T: Default + DeserializeOwned>(file: Option<&Path>) -> Result<T, Failure> {
    let Some(file) = file else { return Ok(T::default()) };
    let name = file.display().to_string();
    let text = std::fs::read_to_string(file).with_context(|| format!("cannot read {name}"))?;
    let documents = document::read(&name, &text).map_err(|problem| Failure::no(problem.to_string()))?;
    match documents.as_slice() {
        [] => Ok(T::default()),
        [settings] => serde_json::from_value(settings.to_json())
            .map_err(|error| Failure::no(format!("{name}: {error}"))),
        _ => Err(Failure::no(format!("{name}: expected one document of settings"))),
    }
}

/// Turns true at SIGTERM or SIGINT.
fn stop_signal() -> Result<watch::Receiver<bool>, Failure> {
    let (sender, receiver) = watch::channel(false);
    let mut terminate = signal(SignalKind::terminate()).context("cannot listen for signals")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot listen for signals")?;
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::info!("stopping; what is enforced stays in force");
        sender.send_replace(true);
        // Held until the process ends, so that nobody takes a dropped sender for a signal.
        std::future::pending::<()>().await;
    });
    Ok(receiver)
}

async fn wait(mut shutdown: watch::Receiver<bool>) {
    // A dropped sender counts as a signal.
    let _ = shutdown.wait_for(|stop| *stop).await;
}

fn describe(error: impl std::error::Error + Send + Sync + 'static) -> Failure {
    Failure::from(anyhow!(error))
}
