//! What the tests share: a fleet with the example's components in it, and what to expect of it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Result, ensure};
use bulkhead_testbed::{
    AgentOptions, Bulkhead, Component, EXAMPLE, Family, Lab, Matrix, Outcome, Probe, Protocol, Server,
    Workload, eventually, expected, find_binary, matrix, probe,
};

/// How long a probe waits for an answer. All probes of a matrix wait at the same time.
pub(crate) const WAIT: Duration = Duration::from_millis(400);
/// The hosts of most labs.
pub(crate) const HOSTS: [&str; 3] = ["host-1", "host-2", "host-3"];
/// A port on which every workload serves and of which no policy of the example speaks.
pub(crate) const OTHER_PORT: u16 = 9999;

/// A lab with controller and agents.
pub(crate) fn start(prefix: &str, hosts: &[&str]) -> Bulkhead {
    start_with(prefix, hosts, &[])
}

/// As [`start`], every agent with more arguments.
pub(crate) fn start_with(prefix: &str, hosts: &[&str], arguments: &[&str]) -> Bulkhead {
    let options = AgentOptions {
        arguments: arguments.iter().map(|argument| (*argument).into()).collect(),
        ..AgentOptions::default()
    };
    let options: BTreeMap<String, AgentOptions> =
        hosts.iter().map(|host| ((*host).into(), options.clone())).collect();
    let binary = find_binary().unwrap();
    let lab = Lab::new(prefix, hosts).unwrap();
    Bulkhead::start(lab, &binary, &options).unwrap()
}

/// A workload with a server in it, registered and in force.
pub(crate) struct Member {
    pub(crate) workload: Workload,
    pub(crate) server: Server,
}

/// A workload with labels that serves on `ports`, in force when this answers.
pub(crate) fn member(
    bulkhead: &Bulkhead,
    host: &str,
    name: &str,
    labels: &[(&str, &str)],
    ports: &[u16],
) -> Member {
    let workload = bulkhead.lab.workload(host, name).unwrap();
    let server = Server::start(&workload.netns, ports).unwrap();
    bulkhead.register(&workload, labels).unwrap();
    bulkhead.wait_endpoint(&workload).unwrap();
    Member { workload, server }
}

/// The example, running.
pub(crate) struct Example {
    pub(crate) members: Vec<(Component, Member)>,
    pub(crate) bulkhead: Bulkhead,
}

impl Example {
    /// Three hosts and all components, with no policy.
    pub(crate) fn start(prefix: &str) -> Self {
        let bulkhead = start(prefix, &HOSTS);
        let members = EXAMPLE.iter().map(|component| {
            let ports = [component.port, OTHER_PORT];
            let labels = component.labels();
            (*component, member(&bulkhead, component.host, component.name, &labels, &ports))
        });
        Self { members: members.collect(), bulkhead }
    }

    /// Applies the example's policies.
    pub(crate) fn apply(&self) {
        self.bulkhead.apply(&[&example_directory()]).unwrap();
    }

    pub(crate) fn of(&self, name: &str) -> &Member {
        &self.members.iter().find(|(component, _)| component.name == name).unwrap().1
    }

    pub(crate) fn workload(&self, name: &str) -> &Workload {
        &self.of(name).workload
    }

    /// Probes everything from everywhere and says every difference to `expect`.
    pub(crate) fn check(
        &self,
        family: Family,
        protocol: impl Fn(&Component) -> Protocol + Sync,
        expect: impl Fn(&Component, &Component) -> bool,
    ) -> Result<()> {
        let all: Vec<&Workload> = self.members.iter().map(|(_, member)| &member.workload).collect();
        let of = |workload: &Workload| {
            let mut components = self.members.iter();
            components.find(|(_, member)| member.workload.name == workload.name).map_or(EXAMPLE[0], |c| c.0)
        };
        let Matrix { rows } = matrix(&all, &all, family, |workload| protocol(&of(workload)), WAIT)?;
        let mut differences = Vec::new();
        for ((from, _), row) in self.members.iter().zip(&rows) {
            for ((to, _), outcome) in self.members.iter().zip(row) {
                let Some(outcome) = outcome else { continue };
                let wanted = if expect(from, to) { Outcome::Reached } else { Outcome::Silent };
                if *outcome != wanted {
                    differences.push(format!("{} → {}: {outcome:?}, not {wanted:?}", from.name, to.name));
                }
            }
        }
        ensure!(differences.is_empty(), "{family:?}: {}", differences.join("\n"));
        Ok(())
    }

    /// The matrix of the example over TCP, until all members are known everywhere.
    pub(crate) fn wait_expected(&self) {
        eventually("everything is as the example expects", || {
            self.check(Family::V4, |component| Protocol::Tcp(component.port), expected)
        })
        .unwrap();
    }
}

/// The policies of the example.
pub(crate) fn example_directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/applications").canonicalize().unwrap()
}

/// One probe.
pub(crate) fn outcome(from: &Workload, to: &Workload, protocol: Protocol) -> Outcome {
    let target = Probe { address: to.v4.into(), protocol };
    probe(from, &[target], WAIT).unwrap()[0]
}

/// Waits until a probe ends so.
pub(crate) fn wait_outcome(from: &Workload, to: &Workload, protocol: Protocol, wanted: Outcome) {
    let what = format!("{} → {} {protocol:?} is {wanted:?}", from.name, to.name);
    eventually(&what, || {
        let found = outcome(from, to, protocol);
        ensure!(found == wanted, "{found:?}");
        Ok(())
    })
    .unwrap();
}
