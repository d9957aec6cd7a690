//! The cases as they lie in files: one JSON line per cluster state.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::Path;
use std::process::Command;

use bulkhead_model::document::from_value;
use bulkhead_model::resource::{Metadata, NameTable};
use bulkhead_model::settings::NameTableSpec;
use bulkhead_model::{ObjectKey, Resource};
use serde::Deserialize;
use serde_json::{Value, json};

type Labels = BTreeMap<String, String>;

/// One state of a cluster, and what is expected of connections in it.
#[derive(Debug, Deserialize)]
pub struct State {
    /// Its name.
    pub id: String,
    /// States of one group follow each other in one cluster.
    pub group: String,
    /// Why its expectation is doubted, if it is.
    #[serde(default)]
    disputed: Option<String>,
    #[serde(default)]
    namespaces: Option<BTreeMap<String, Labels>>,
    #[serde(default)]
    nodes: Option<BTreeMap<String, Node>>,
    pub(super) pods: Vec<Pod>,
    #[serde(default)]
    policies: Option<Vec<Value>>,
    #[serde(default)]
    dns: BTreeMap<String, Vec<IpAddr>>,
    pub(super) probes: Vec<Expectation>,
}

#[derive(Debug, Deserialize)]
struct Node {
    #[serde(default)]
    labels: Option<Labels>,
    #[serde(default)]
    ips: Option<Vec<IpAddr>>,
}

#[derive(Debug, Deserialize)]
pub(super) struct Pod {
    pub(super) namespace: String,
    pub(super) name: String,
    #[serde(default)]
    labels: Option<Labels>,
    pub(super) ip: IpAddr,
    #[serde(default)]
    node: Option<String>,
    #[serde(default)]
    pub(super) host_network: bool,
    #[serde(default)]
    ports: Option<Vec<Port>>,
}

#[derive(Debug, Deserialize)]
struct Port {
    port: u16,
    proto: String,
    #[serde(default)]
    name: Option<String>,
}

#[derive(Debug, Clone, Deserialize)]
pub(super) struct Expectation {
    pub(super) from: String,
    pub(super) to: String,
    pub(super) port: u16,
    pub(super) proto: String,
    pub(super) expect: String,
    #[serde(default)]
    pub(super) loopback: bool,
}

impl Pod {
    pub(super) fn path(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }

    fn manifest(&self) -> Value {
        let port = |port: &Port| {
            let mut value = json!({ "containerPort": port.port, "protocol": port.proto });
            if let Some(name) = port.name.as_ref().filter(|name| !name.is_empty()) {
                value["name"] = json!(name);
            }
            value
        };
        let ports: Vec<_> = self.ports.iter().flatten().map(port).collect();
        json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": { "name": self.name, "namespace": self.namespace, "labels": self.labels.clone().unwrap_or_default() },
            "spec": {
                "nodeName": self.node.as_deref().unwrap_or("node-1"),
                "hostNetwork": self.host_network,
                "containers": [{ "name": "c", "image": "none", "ports": ports }],
            },
            "status": { "podIP": self.ip, "podIPs": [{ "ip": self.ip }], "phase": "Running" },
        })
    }
}

impl State {
    /// The objects, or those that are no policies.
    ///
    /// # Panics
    /// If an object is refused: the cases were all accepted before.
    pub fn objects(&self, with_policies: bool) -> BTreeMap<ObjectKey, Resource> {
        let mut manifests = Vec::new();
        for (name, labels) in self.namespaces.iter().flatten() {
            let metadata = json!({ "name": name, "labels": labels });
            manifests.push(json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": metadata }));
        }
        for (name, node) in self.nodes.iter().flatten() {
            let ips = node.ips.iter().flatten();
            let addresses: Vec<_> = ips.map(|ip| json!({ "type": "InternalIP", "address": ip })).collect();
            manifests.push(json!({
                "apiVersion": "v1", "kind": "Node",
                "metadata": { "name": name, "labels": node.labels.clone().unwrap_or_default() },
                "status": { "addresses": addresses },
            }));
        }
        manifests.extend(self.pods.iter().map(Pod::manifest));
        if with_policies {
            manifests.extend(self.policies.iter().flatten().cloned());
        }
        let read = |manifest: &Value| from_value(&self.id, manifest).unwrap_or_else(|e| panic!("{e:?}"));
        let mut objects: BTreeMap<ObjectKey, Resource> =
            manifests.iter().map(read).map(|resource| (resource.key(), resource)).collect();
        if !self.dns.is_empty() {
            let metadata = Metadata { name: "given".into(), ..Metadata::default() };
            let names = NameTable { metadata, spec: NameTableSpec { names: self.dns.clone() } };
            let names = Resource::NameTable(names);
            objects.insert(names.key(), names);
        }
        objects
    }
}

/// Every group of every file in a folder, in the order of the files; without what is disputed.
///
/// # Panics
/// If a file cannot be read.
pub fn groups(folder: &Path) -> Vec<Vec<State>> {
    let mut files: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.retain(|file| file.to_string_lossy().ends_with(".jsonl.gz"));
    files.sort();
    let mut groups: Vec<Vec<State>> = Vec::new();
    for file in files {
        let output = Command::new("gzip").arg("-dc").arg(&file).output().unwrap();
        assert!(output.status.success(), "{file:?}");
        for line in output.stdout.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
            let state: State = serde_json::from_slice(line).unwrap_or_else(|e| panic!("{file:?}: {e}"));
            if state.disputed.is_some() {
                continue;
            }
            match groups.last_mut().filter(|group| group[0].group == state.group) {
                Some(group) => group.push(state),
                None => groups.push(vec![state]),
            }
        }
    }
    groups
}
