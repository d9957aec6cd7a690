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
use bulkhead_model::facts::{self, Facts};
use bulkhead_model::ports::{NamedPort, PortMatch, is_port_name};
use bulkhead_model::registration::Identity;
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

/// Container label that names its namespace.
const NAMESPACE_LABEL: &str = "io.bulkhead.namespace";
/// Container label that names its service account.
const SERVICE_ACCOUNT_LABEL: &str = "io.bulkhead.serviceaccount";
/// Container label that gives names to ports: `http=tcp/8080,dns=udp/53`.
const PORTS_LABEL: &str = "io.bulkhead.ports";
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
    let facts = observed(&name, &container);
    let config = container.config.unwrap_or_default();
    let own = config.labels.unwrap_or_default();
    let image = config.image.as_deref().map(|image| (IMAGE_LABEL, image));
    let pairs = image.into_iter().chain(own.iter().map(|(key, value)| (key.as_str(), value.as_str())));
    let (labels, refused) = Labels::from_foreign(pairs);
    if refused > 0 {
        tracing::warn!(workload = name, refused, "labels that selectors could not name were left out");
    }
    let identity = match identity(&labels) {
        Ok(identity) => identity,
        Err(reason) => return (name, Err(reason)),
    };
    let interfaces = namespace.interfaces;
    let workload =
        FoundWorkload { name: name.clone(), labels, addresses, interfaces, group: None, facts, identity };
    (name, Ok(workload))
}

/// What a container's labels say of its namespace, service account and named ports. A wrong one is not left out: the
/// container would be somebody else to policy than it was meant to be.
fn identity(labels: &Labels) -> Result<Identity, String> {
    let name = |label: &str| match labels.get(label) {
        Some(text) if !is_name(text) => Err(format!("label {label}: {text:?} is no name")),
        text => Ok(text.map(ToOwned::to_owned)),
    };
    let mut ports = Vec::new();
    for entry in labels.get(PORTS_LABEL).into_iter().flat_map(|list| list.split(',')) {
        let wrong = || format!("label {PORTS_LABEL}: expected NAME=tcp/PORT,…, found {entry:?}");
        let (port_name, port) = entry.trim().split_once('=').ok_or_else(wrong)?;
        let Ok(PortMatch::Ports { protocol, first, last }) = port.parse() else { return Err(wrong()) };
        if first != last || !is_port_name(port_name) {
            return Err(wrong());
        }
        ports.push(NamedPort { name: port_name.to_owned(), protocol, port: first });
    }
    Ok(Identity { namespace: name(NAMESPACE_LABEL)?, service_account: name(SERVICE_ACCOUNT_LABEL)?, ports })
}

/// What the engine tells about a container and its image.
fn observed(name: &str, container: &ContainerInspectResponse) -> Facts {
    let reference = container.config.as_ref().and_then(|config| config.image.as_deref()).unwrap_or_default();
    let image = Image::parse(reference);
    let manifest =
        container.image_manifest_descriptor.as_ref().and_then(|descriptor| descriptor.digest.as_deref());
    let privileged = container.host_config.as_ref().and_then(|config| config.privileged);
    let observed = [
        (facts::IMAGE_NAME, image.name),
        (facts::IMAGE_TAG, image.tag),
        (facts::IMAGE_DIGEST, manifest.or(image.digest)),
        (facts::CONTAINER_PRIVILEGED, privileged.map(|yes| if yes { "true" } else { "false" })),
    ];
    let (facts, refused) =
        Facts::from_observed(observed.into_iter().filter_map(|(key, value)| Some((key, value?))));
    if let Some(first) = refused.first() {
        tracing::warn!(workload = name, %first, "facts that selectors could not name were left out");
    }
    facts
}

/// The parts of an image reference, as it was written: `NAME[:TAG][@DIGEST]`.
#[derive(Debug, Default, PartialEq, Eq)]
struct Image<'a> {
    name: Option<&'a str>,
    tag: Option<&'a str>,
    digest: Option<&'a str>,
}

impl<'a> Image<'a> {
    fn parse(reference: &'a str) -> Self {
        // An image can be asked for by its id alone; that names no image.
        let id = reference.strip_prefix("sha256:").unwrap_or(reference);
        if reference.is_empty() || (id.len() >= 12 && id.bytes().all(|byte| byte.is_ascii_hexdigit())) {
            return Self::default();
        }
        let (tagged, digest) = match reference.split_once('@') {
            Some((tagged, digest)) => (tagged, Some(digest)),
            None => (reference, None),
        };
        // A colon before a slash is that of the registry's port.
        let (name, tag) = match tagged.rsplit_once(':') {
            Some((name, tag)) if !tag.contains('/') => (name, Some(tag)),
            _ => (tagged, None),
        };
        // What the engine itself takes.
        let tag = tag.or(if digest.is_none() { Some("latest") } else { None });
        Self { name: Some(name), tag, digest }
    }
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

    #[test]
    fn an_image_reference_has_a_name_a_tag_and_a_digest() {
        let image = |name, tag, digest| Image { name, tag, digest };
        for (reference, expected) in [
            ("nginx", image(Some("nginx"), Some("latest"), None)),
            ("nginx:1.25", image(Some("nginx"), Some("1.25"), None)),
            ("r.example:5000/a/b", image(Some("r.example:5000/a/b"), Some("latest"), None)),
            ("r.example:5000/a/b:1", image(Some("r.example:5000/a/b"), Some("1"), None)),
            ("a/b@sha256:00", image(Some("a/b"), None, Some("sha256:00"))),
            ("a/b:1@sha256:00", image(Some("a/b"), Some("1"), Some("sha256:00"))),
            ("sha256:0123456789abcdef", image(None, None, None)),
            ("0123456789ab", image(None, None, None)),
            ("", image(None, None, None)),
        ] {
            assert_eq!(Image::parse(reference), expected, "{reference}");
        }
    }
}
