//! Everything that reaches the reconcile loop, and the tasks that send it.

use std::sync::Arc;

use bulkhead_discover::links::{LinkChange, LinkWatch};
use bulkhead_discover::{Found, directory, docker};
use tokio::sync::{mpsc, oneshot};

use crate::api::Request;
use crate::session::SessionEvent;
use crate::{AgentError, Config};

/// Name of the Docker source.
pub(crate) const DOCKER: &str = "docker";
/// Name of the watched directory as a source.
pub(crate) const DIRECTORY: &str = "directory";
/// Name of the registrations made through the socket, as a source.
pub(crate) const MANUAL: &str = "manual";

/// One thing to react to.
#[derive(Debug)]
pub(crate) enum Input {
    /// What a source sees now.
    Found(&'static str, Found),
    /// Interfaces came or went.
    Links(Vec<LinkChange>),
    /// From the controller.
    Session(SessionEvent),
    /// From the socket.
    Request(Request, oneshot::Sender<serde_json::Value>),
}

/// The sources that this configuration has.
pub(crate) fn sources(config: &Config) -> Vec<&'static str> {
    let mut sources = vec![MANUAL];
    sources.extend(config.docker_socket.is_some().then_some(DOCKER));
    sources.extend(config.workload_directory.is_some().then_some(DIRECTORY));
    sources
}

/// Starts one task per source and one for interfaces.
pub(crate) fn spawn_sources(
    config: &Arc<Config>,
    input: &mpsc::Sender<Input>,
    nudged: mpsc::Receiver<()>,
) -> Result<(), AgentError> {
    let watch = LinkWatch::new().map_err(AgentError::Links)?;
    let links = input.clone();
    std::thread::Builder::new()
        .name("links".into())
        .spawn(move || {
            loop {
                match watch.next() {
                    Ok(changes) if changes.is_empty() => {}
                    Ok(changes) => {
                        if links.blocking_send(Input::Links(changes)).is_err() {
                            return;
                        }
                    }
                    Err(error) => {
                        tracing::error!(%error, "interfaces are no longer watched");
                        return;
                    }
                }
            }
        })
        .map_err(AgentError::Links)?;
    let forward = |name: &'static str| {
        let (sender, mut receiver) = mpsc::channel(1);
        let input = input.clone();
        tokio::spawn(async move {
            while let Some(found) = receiver.recv().await {
                if input.send(Input::Found(name, found)).await.is_err() {
                    return;
                }
            }
        });
        sender
    };
    tokio::spawn(directory::watch(config.registrations(), nudged, forward(MANUAL)));
    if let Some(path) = &config.workload_directory {
        let (_never, nudge) = mpsc::channel(1);
        tokio::spawn(directory::watch(path.clone(), nudge, forward(DIRECTORY)));
    }
    if let Some(socket) = &config.docker_socket {
        tokio::spawn(docker::watch(socket.clone(), forward(DOCKER)));
    }
    Ok(())
}
