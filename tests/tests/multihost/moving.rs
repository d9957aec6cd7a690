//! Agents that a stopping controller sends to another one, under traffic.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use anyhow::ensure;
use bulkhead_testbed::{AgentOptions, Bulkhead, Lab, Outcome, Process, Protocol, eventually, find_binary};

use crate::common::{CLIENT_TO_SERVER, member, wait_outcome};
use crate::traffic::Traffic;

/// In the fabric, beside the controller that every lab has.
const STORE: &str = "etcd://127.0.0.1:2379/bulkhead";
const OTHER_API: &str = "10.200.0.1:7450";
const OTHER_AGENTS: &str = "10.200.0.1:7451";
const HOSTS: [&str; 4] = ["v1", "v2", "v3", "v4"];

/// Something that runs in the fabric.
fn start(lab: &Lab, name: &str, command: Command) -> Process {
    Process::start(&lab.fabric, command, &lab.directory().join(format!("{name}.log")), &lab.ledger()).unwrap()
}

fn start_etcd(lab: &Lab) -> Process {
    let mut command = Command::new("etcd");
    command.args(["--listen-client-urls", "http://127.0.0.1:2379"]);
    command.args(["--advertise-client-urls", "http://127.0.0.1:2379", "--max-txn-ops", "10000"]);
    command.arg("--data-dir").arg(lab.directory().join("etcd"));
    let etcd = start(lab, "etcd", command);
    eventually("etcd answers", || {
        let mut asked = Command::new("etcdctl");
        asked.args(["--endpoints", "127.0.0.1:2379", "endpoint", "health"]);
        let answer = lab.fabric.run(|| Ok(asked.output()?))?;
        ensure!(answer.status.success(), "{}", String::from_utf8_lossy(&answer.stderr));
        Ok(())
    })
    .unwrap();
    etcd
}

/// The second controller, and where it is reached without the network.
fn start_other(lab: &Lab, binary: &Path) -> (Process, String) {
    let directory = lab.directory();
    let socket = directory.join("other.sock");
    let mut command = Command::new(binary);
    command.args(["controller", "--name", "other", "--store", STORE]);
    command.args(["--listen", OTHER_API, "--listen-agents", OTHER_AGENTS]);
    command.arg("--data-dir").arg(directory.join("other"));
    command.arg("--identity-dir").arg(directory.join("identity")).arg("--socket").arg(&socket);
    (start(lab, "other", command), format!("unix://{}", socket.display()))
}

/// A command at the second controller.
fn ask(binary: &Path, server: &str, arguments: &[&str]) -> anyhow::Result<()> {
    let output = Command::new(binary).args(arguments).args(["--server", server]).output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

#[test]
fn agents_that_are_sent_elsewhere_lose_and_leak_no_packet() {
    let binary = find_binary().unwrap();
    let lab = Lab::new("bt-mov", &HOSTS).unwrap();
    let _etcd = start_etcd(&lab);
    let options = AgentOptions {
        arguments: vec!["--controller".into(), format!("https://{OTHER_AGENTS}")],
        ..AgentOptions::default()
    };
    let options: BTreeMap<_, _> = HOSTS.map(|host| (host.to_owned(), options.clone())).into();
    let mut bulkhead = Bulkhead::without_processes(lab, &binary, &options);
    bulkhead.controller_arguments = ["--name", "one", "--store", STORE].map(Into::into).to_vec();
    bulkhead.start_controller().unwrap();
    let (_other, other) = start_other(&bulkhead.lab, &binary);
    eventually("the other controller serves", || ask(&binary, &other, &["whoami"])).unwrap();
    bulkhead.start_agents().unwrap();
    bulkhead.wait_connected().unwrap();
    let at = |bulkhead: &Bulkhead, host: &str| {
        let status = bulkhead.agent(host).status().unwrap();
        (status["controller"].as_str().unwrap().to_owned(), status["connected"] == true)
    };
    // Each host has an order of its own; with these names there is one at either.
    let leaving: Vec<_> = HOSTS.iter().filter(|host| at(&bulkhead, host).0 != OTHER_AGENTS).collect();
    assert!(!leaving.is_empty() && leaving.len() < HOSTS.len(), "{leaving:?}");

    bulkhead.apply_text("policy.yaml", CLIENT_TO_SERVER).unwrap();
    let labels = |role| [("role", role)];
    // Both ends, and who is refused, on hosts whose agents leave, as far as there are so many.
    let of = |number: usize| *leaving[number % leaving.len()];
    let server = member(&bulkhead, of(0), "server", &labels("server"), &[5000]);
    let client = member(&bulkhead, of(1), "client", &labels("client"), &[]);
    let stranger = member(&bulkhead, of(2), "stranger", &labels("stranger"), &[]);
    wait_outcome(&client.workload, &server.workload, Protocol::Tcp(5000), Outcome::Reached);
    wait_outcome(&stranger.workload, &server.workload, Protocol::Tcp(5000), Outcome::Silent);
    let traffic = Traffic::start(&client.workload, &stranger.workload, &server.workload, 5000);
    assert!(bulkhead.stop_controller(), "it ends by itself");
    eventually("all agents are at the other controller", || {
        for host in HOSTS {
            let (controller, connected) = at(&bulkhead, host);
            ensure!(connected && controller == OTHER_AGENTS, "{host} is at {controller}, {connected}");
        }
        Ok(())
    })
    .unwrap();
    traffic.goes_on();
    traffic.end("agents sent elsewhere");
    // And they hear there what is changed.
    let closed = CLIENT_TO_SERVER.replace("role == 'client'", "role == 'nobody'");
    let file = bulkhead.file("closed.yaml", &closed).unwrap();
    ask(&binary, &other, &["apply", "-f", file.to_str().unwrap()]).unwrap();
    wait_outcome(&client.workload, &server.workload, Protocol::Tcp(5000), Outcome::Silent);
}
