//! Workloads of a Docker engine: its containers with addresses of their own.

use std::collections::HashMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::time::Duration;

use bollard::Docker;
use bollard::models::ContainerInspectResponse;
use bollard::query_parameters::{
    EventsOptionsBuilder, InspectContainerOptions, ListContainersOptionsBuilder,
};
use bulkhead_model::Labels;
use bulkhead_model::resource::is_name;
use futures::StreamExt;
use tokio::sync::mpsc;

use crate::{Found, FoundWorkload, NotManaged, links};

/// How long one request to the engine may take, in seconds.
const REQUEST_TIMEOUT_S: u64 = 30;
/// First and longest wait before an engine that does not answer is asked again.
const RETRY_MIN: Duration = Duration::from_millis(200);
const RETRY_MAX: Duration = Duration::from_secs(10);
/// Everything is asked again this often, for whatever events did not tell.
const RESYNC_INTERVAL: Duration = Duration::from_secs(60);

/// Label of the image reference that a container was made from.
pub const IMAGE_LABEL: &str = "docker.image";

/// Watches the engine behind `socket` and sends what runs there, at once and after every change, until nobody
/// listens. While the engine is away nothing is sent: what was known stays.
pub async fn watch(socket: PathBuf, found: mpsc::Sender<Found>) {
    let mut wait = RETRY_MIN;
    loop {
        match follow(&socket, &found, &mut wait).await {
            Ok(()) => return,
            Err(error) => {
                tracing::warn!(socket = %socket.display(), %error, retry_ms = wait.as_millis(), "docker engine is away");
                tokio::time::sleep(wait).await;
                wait = (wait * 2).min(RETRY_MAX);
            }
        }
    }
}

/// One conversation with the engine. `Ok` when nobody listens any more.
async fn follow(
    socket: &Path,
    found: &mpsc::Sender<Found>,
    wait: &mut Duration,
) -> Result<(), bollard::errors::Error> {
    let path = socket.to_string_lossy();
    let docker = Docker::connect_with_unix(&path, REQUEST_TIMEOUT_S, bollard::API_DEFAULT_VERSION)?
        .negotiate_version()
        .await?;
    let filters = HashMap::from([("type", vec!["container", "network"])]);
    let options = EventsOptionsBuilder::default().filters(&filters).build();
    // Listen first, list then: nothing that happens in between is missed.
    let mut events = pin!(docker.events(Some(options)));
    let mut last: Option<Found> = None;
    loop {
        let mut now = list(&docker).await?;
        *wait = RETRY_MIN;
        if let Some(last) = &last {
            now.keep_from(last);
        }
        // What could not be looked at is looked at again soon.
        let again = if !now.unseen.is_empty() { RETRY_MIN } else { RESYNC_INTERVAL };
        if last.as_ref() != Some(&now) {
            last = Some(now.clone());
            if found.send(now).await.is_err() {
                return Ok(());
            }
        }
        loop {
            match tokio::time::timeout(again, events.next()).await {
                Err(_elapsed) => break,
                Ok(None) => {
                    let ended = std::io::Error::from(std::io::ErrorKind::UnexpectedEof);
                    return Err(ended.into());
                }
                Ok(Some(event)) => {
                    if concerns_us(event?.action.as_deref().unwrap_or_default()) {
                        break;
                    }
                }
            }
        }
    }
}

fn concerns_us(action: &str) -> bool {
    matches!(action, "start" | "die" | "destroy" | "rename" | "connect" | "disconnect" | "restart" | "update")
}

async fn list(docker: &Docker) -> Result<Found, bollard::errors::Error> {
    let options = ListContainersOptionsBuilder::default().build();
    let mut found = Found::default();
    for summary in docker.list_containers(Some(options)).await? {
        let Some(id) = summary.id else { continue };
        let container = match docker.inspect_container(&id, None::<InspectContainerOptions>).await {
            Ok(container) => container,
            // It ended since it was listed.
            Err(bollard::errors::Error::DockerResponseServerError { status_code: 404, .. }) => continue,
            Err(error) => return Err(error),
        };
        let (name, result) = workload(container, &mut found.unseen).await;
        match result {
            Ok(workload) => found.workloads.push(workload),
            Err(reason) => found.not_managed.push(NotManaged { subject: name, reason }),
        }
    }
    found.workloads.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(found)
}

async fn workload(
    container: ContainerInspectResponse,
    unseen: &mut Vec<String>,
) -> (String, Result<FoundWorkload, String>) {
    let name = workload_name(container.name.as_deref().unwrap_or_default());
    let host_network = container
        .host_config
        .as_ref()
        .and_then(|config| config.network_mode.as_deref())
        .is_some_and(|mode| mode == "host" || mode.starts_with("container:"));
    if host_network {
        let reason = "it shares another network namespace (host or container) and has no address of its own";
        return (name, Err(reason.into()));
    }
    let Some(netns) = namespace_path(&container) else {
        return (name, Err("it has no network namespace".into()));
    };
    let namespace = match tokio::task::spawn_blocking(move || links::namespace(&netns)).await {
        Ok(Ok(namespace)) => namespace,
        Ok(Err(error)) => {
            if error.is_passing() {
                unseen.push(name.clone());
            }
            return (name, Err(error.to_string()));
        }
        Err(error) => return (name, Err(error.to_string())),
    };
    // The engine's word and what is in the namespace: addresses added by hand count too.
    let mut addresses = namespace.addresses;
    addresses.extend(engine_addresses(&container));
    addresses.sort_unstable();
    addresses.dedup();
    let config = container.config.unwrap_or_default();
    let own = config.labels.unwrap_or_default();
    let image = config.image.as_deref().map(|image| (IMAGE_LABEL, image));
    let pairs = image.into_iter().chain(own.iter().map(|(key, value)| (key.as_str(), value.as_str())));
    let (labels, refused) = Labels::from_foreign(pairs);
    if refused > 0 {
        tracing::warn!(workload = name, refused, "labels that selectors could not name were left out");
    }
    let workload = FoundWorkload { name: name.clone(), labels, addresses, interfaces: namespace.interfaces };
    (name, Ok(workload))
}

fn namespace_path(container: &ContainerInspectResponse) -> Option<PathBuf> {
    let sandbox = container.network_settings.as_ref().and_then(|settings| settings.sandbox_key.as_ref());
    if let Some(path) = sandbox.filter(|path| !path.is_empty() && Path::new(path).exists()) {
        return Some(path.into());
    }
    let pid = container.state.as_ref().and_then(|state| state.pid).filter(|pid| *pid > 0)?;
    Some(format!("/proc/{pid}/ns/net").into())
}

fn engine_addresses(container: &ContainerInspectResponse) -> Vec<IpAddr> {
    let networks = container.network_settings.as_ref().and_then(|settings| settings.networks.as_ref());
    networks
        .into_iter()
        .flat_map(HashMap::values)
        .flat_map(|network| [&network.ip_address, &network.global_ipv6_address])
        .filter_map(|address| address.as_ref()?.parse().ok())
        .collect()
}

/// A container's name as an object's name: lower case, what is not allowed turned into `-`.
fn workload_name(name: &str) -> String {
    let name = name.trim_start_matches('/').to_ascii_lowercase();
    if is_name(&name) {
        return name;
    }
    let clean: String =
        name.chars().map(|c| if c.is_ascii_lowercase() || c.is_ascii_digit() { c } else { '-' }).collect();
    let clean = clean.trim_matches('-').to_owned();
    if is_name(&clean) { clean } else { "unnamed".into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn container_names_become_object_names() {
        assert_eq!(workload_name("/web-1"), "web-1");
        assert_eq!(workload_name("/My_App.1"), "my-app-1");
        assert_eq!(workload_name("/__"), "unnamed");
    }
}
