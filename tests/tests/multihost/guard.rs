//! Who would lock somebody out is told so first, and what was forced undoes itself.
//!
//! The hosts are virtual machines here: the fabric has an agent of its own, to which each host's cable is a workload. So
//! one policy can cut a host's agent off, with real packets, and the one who enforces it still hears the controller.

use std::net::{SocketAddr, TcpStream};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use bulkhead_testbed::{Bulkhead, Lab, Output, Process, eventually};
use serde_json::Value;

use crate::common::start;

/// Cuts host-1 off from everything.
const SHUT: &str = "apiVersion: bulkhead.dev/v1\nkind: Policy\nmetadata: {name: shut-vm1}\nspec:\n  \
                    appliesTo: machine == 'vm1'\n  egress: []\n";

/// An agent in the fabric, to which the cables of hosts are workloads.
struct Hypervisor {
    process: Process,
    directory: std::path::PathBuf,
}

impl Hypervisor {
    fn start(bulkhead: &Bulkhead) -> Result<Self> {
        let directory = bulkhead.lab.directory().to_owned();
        let mut command = Command::new(bulkhead.binary());
        command.args([
            "agent",
            "--host",
            "fabric",
            "--controller",
            "https://10.200.0.1:7441",
            "--docker",
            "none",
        ]);
        let state = directory.join("fabric.state");
        command.args(bulkhead.invite("fabric", &state)?).arg("--state-dir").arg(state);
        command.arg("--pin-dir").arg(bulkhead.lab.pin_directory("fabric"));
        command.arg("--agent-socket").arg(directory.join("fabric.sock"));
        let log = directory.join("fabric.log");
        let process = Process::start(&bulkhead.lab.fabric, command, &log, &bulkhead.lab.ledger())?;
        let hypervisor = Self { process, directory };
        eventually("the fabric's agent is connected", || {
            let session = bulkhead.agent_session("fabric")?;
            ensure!(session["connected"] == true, "{session} {}", hypervisor.process.log());
            Ok(())
        })?;
        Ok(hypervisor)
    }

    fn add(&self, bulkhead: &Bulkhead, name: &str, interface: &str, address: &str) -> Result<()> {
        let mut command = Command::new(bulkhead.binary());
        command.args(["workload", "add", name, "--interface", interface, "--address", address]);
        command.args(["--label", &format!("machine={name}"), "--agent-socket"]);
        command.arg(self.directory.join("fabric.sock"));
        let output = command.output()?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        eventually("the controller knows it", || {
            bulkhead.get(&format!("/apis/bulkhead.dev/v1/workloads/{name}.fabric")).map(drop)
        })
    }
}

/// The product's command line on a host, against the controller.
fn from_host(lab: &Lab, bulkhead: &Bulkhead, host: &str, arguments: &[&str]) -> Output {
    let mut command = Command::new(bulkhead.binary());
    command
        .args(arguments)
        .arg("--client-config")
        .arg(bulkhead.administrator().unwrap())
        .env("NO_COLOR", "1");
    let output = lab.host(host).netns.run(|| Ok(command.output()?)).unwrap();
    Output {
        code: output.status.code().unwrap_or(-1),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

/// Whether a host's agent could connect anew.
fn reaches_controller(lab: &Lab, host: &str) -> bool {
    let address: SocketAddr = "10.200.0.1:7441".parse().unwrap();
    let tried =
        lab.host(host).netns.run(|| Ok(TcpStream::connect_timeout(&address, Duration::from_millis(500))?));
    tried.is_ok()
}

fn waiting(bulkhead: &Bulkhead) -> Vec<Value> {
    let list = bulkhead.json(&["confirm", "--list"]).unwrap();
    let items = list["items"].as_array().unwrap().iter();
    items.filter(|item| item["standing"] == "waiting").cloned().collect()
}

#[test]
fn a_change_that_cuts_an_agent_off_needs_force_and_takes_itself_back() {
    let bulkhead = start("bt-guard", &["host-1", "host-2"]);
    let hypervisor = Hypervisor::start(&bulkhead).unwrap();
    hypervisor.add(&bulkhead, "vm1", "h0", "10.200.0.10").unwrap();
    hypervisor.add(&bulkhead, "vm2", "h1", "10.200.0.11").unwrap();
    let file = bulkhead.file("shut.yaml", SHUT).unwrap();
    let file = file.to_str().unwrap();
    assert!(reaches_controller(&bulkhead.lab, "host-1"));

    // Refused, by name, and nothing has changed.
    let refused = bulkhead.cli(&["apply", "-f", file]).unwrap();
    assert_eq!(refused.code, 1, "{refused:?}");
    for part in
        ["the agent of host-1", "shut-vm1", "egress of Workload/vm1.fabric", "--force", "nothing was changed"]
    {
        assert!(refused.stderr.contains(part), "{part}: {refused:?}");
    }
    assert!(!refused.stderr.contains("host-2") && !refused.stderr.contains("your own"), "{refused:?}");
    assert!(bulkhead.get("/apis/bulkhead.dev/v1/policies/shut-vm1").is_err());
    // Of an operator on that machine, his own session too.
    let refused = from_host(&bulkhead.lab, &bulkhead, "host-1", &["apply", "-f", file]);
    assert!(refused.code == 1 && refused.stderr.contains("your own session"), "{refused:?}");
    let dry = bulkhead.cli(&["apply", "--dry-run", "-f", file]).unwrap();
    assert!(dry.code == 0 && dry.stderr.contains("warning: the agent of host-1"), "{dry:?}");

    // Forced from there, it really cuts: the packets of that machine, and nobody else's. It is not waited for: its own
    // answer may be cut, and it may give up only after the roll-back.
    let mut forced = Command::new(bulkhead.binary());
    forced.args(["apply", "--force", "--confirm-within", "8s", "-f", file, "--client-config"]);
    forced.arg(bulkhead.administrator().unwrap());
    forced.env("NO_COLOR", "1").stdout(Stdio::piped()).stderr(Stdio::piped());
    let begun = Instant::now();
    let forced = bulkhead.lab.host("host-1").netns.run(|| Ok(forced.spawn()?)).unwrap();
    eventually("host-1 is cut off", || {
        ensure!(!reaches_controller(&bulkhead.lab, "host-1"));
        Ok(())
    })
    .unwrap();
    assert!(begun.elapsed() < Duration::from_secs(7), "cut off too late to say: {:?}", begun.elapsed());
    assert!(reaches_controller(&bulkhead.lab, "host-2"));

    // Nobody confirms.
    eventually("host-1 is back", || {
        ensure!(reaches_controller(&bulkhead.lab, "host-1"));
        Ok(())
    })
    .unwrap();
    assert!(begun.elapsed() >= Duration::from_secs(8), "rolled back early: {:?}", begun.elapsed());
    let forced = forced.wait_with_output().unwrap();
    assert!(matches!(forced.status.code(), Some(0 | 3)), "{forced:?}");
    assert_eq!(waiting(&bulkhead), Vec::<Value>::new());
    assert!(bulkhead.get("/apis/bulkhead.dev/v1/policies/shut-vm1").is_err());
    assert!(bulkhead.controller_log().contains("a change was rolled back"), "{}", bulkhead.controller_log());
    // And its agent hears of what comes next.
    let next = SHUT.replace("shut-vm1", "next").replace("vm1", "nobody");
    bulkhead.apply_text("next.yaml", &next).unwrap();

    // Confirmed, it stays; and as it cuts nobody off who is not, no force is needed.
    let harmless =
        bulkhead.file("harmless.yaml", &SHUT.replace("egress: []", "egress: [{action: Allow}]")).unwrap();
    let kept = ["apply", "--confirm-within", "2s", "-f", harmless.to_str().unwrap()];
    let kept = from_host(&bulkhead.lab, &bulkhead, "host-1", &kept);
    assert!(kept.code == 0 && kept.stdout.contains("bulkhead confirm "), "{kept:?}");
    assert_eq!(waiting(&bulkhead).len(), 1);
    let confirmed = from_host(&bulkhead.lab, &bulkhead, "host-1", &["confirm"]);
    assert!(confirmed.code == 0 && confirmed.stdout.contains("Policy/shut-vm1"), "{confirmed:?}");
    assert_eq!(waiting(&bulkhead), Vec::<Value>::new());
    let deleted = bulkhead.ok(&["delete", "policy", "shut-vm1", "--confirm-within", "1h"]).unwrap();
    assert!(deleted.contains("Policy/shut-vm1 deleted"), "{deleted}");
    let undone = bulkhead.ok(&["confirm", "--rollback"]).unwrap();
    assert!(undone.contains("is rolled back: Policy/shut-vm1"), "{undone}");
    bulkhead.get("/apis/bulkhead.dev/v1/policies/shut-vm1").unwrap();
    drop(hypervisor);
}
