//! Processes of a host as workloads: by control group, as systemd units are.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::ensure;
use bulkhead_model::registration::unified_hierarchy;
use bulkhead_testbed::{Bulkhead, Outcome, Process, Protocol, Workload, eventually};

use crate::common::{member, start, wait_address};

const POLICY: &str = "
apiVersion: bulkhead.dev/v1
kind: Policy
metadata: {name: billing}
spec:
  appliesTo: role == 'billing'
  ingress:
  - action: Allow
    from: {selector: role == 'client'}
    ports: [tcp/9000]
  - action: Allow
    from: {selector: role == 'ledger'}
  egress: []
---
apiVersion: bulkhead.dev/v1
kind: Policy
metadata: {name: ledger}
spec:
  appliesTo: role == 'ledger'
  ingress: []
";

const SERVER: &str = "
import socket, sys
t = socket.socket(); t.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
t.bind(('0.0.0.0', int(sys.argv[1]))); t.listen()
while True: t.accept()[0].close()
";

/// A control group named like a unit, and a server in it.
struct Unit {
    path: PathBuf,
    server: Option<Process>,
}

impl Unit {
    fn start(bulkhead: &Bulkhead, host: &str, name: &str, port: u16) -> Self {
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        let mount = unified_hierarchy(&mounts).unwrap();
        let path = PathBuf::from(mount).join(name);
        fs::create_dir(&path).unwrap();
        let enter = format!("echo $$ > {}/cgroup.procs; exec python3 -c \"$0\" {port}", path.display());
        let mut command = Command::new("sh");
        command.args(["-c", &enter, SERVER]);
        let log = bulkhead.lab.directory().join(format!("{name}.log"));
        let server =
            Process::start(&bulkhead.host(host).netns, command, &log, &bulkhead.lab.ledger()).unwrap();
        Self { path, server: Some(server) }
    }
}

impl Drop for Unit {
    fn drop(&mut self) {
        drop(self.server.take());
        for _ in 0..200 {
            if fs::remove_dir(&self.path).is_ok() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
    }
}

fn wait(from: &Workload, port: u16, wanted: Outcome) {
    wait_address(from, "10.200.0.11".parse().unwrap(), Protocol::Tcp(port), wanted);
}

#[test]
fn two_units_of_one_host_have_policies_of_their_own() {
    let mut bulkhead = start("bt-unit", &["host-1", "host-2"]);
    let client = member(&bulkhead, "host-1", "client", &[("role", "client")], &[5000]);
    let name = |unit: &str| format!("bt-{}-{unit}.service", std::process::id());
    let billing = Unit::start(&bulkhead, "host-2", &name("billing"), 9000);
    let ledger = Unit::start(&bulkhead, "host-2", &name("ledger"), 9001);
    let client = &client.workload;
    for port in [9000, 9001] {
        wait(client, port, Outcome::Reached);
    }
    for unit in ["billing", "ledger"] {
        let label = format!("role={unit}");
        let added = ["workload", "add", unit, "--cgroup", &name(unit), "--label", &label];
        bulkhead.on_host("host-2", &added).unwrap();
    }
    bulkhead.apply_text("units.yaml", POLICY).unwrap();
    wait(client, 9000, Outcome::Reached);
    wait(client, 9001, Outcome::Silent);
    let table = bulkhead.on_host("host-2", &["workload", "list"]).unwrap();
    assert!(table.contains(&billing.path.display().to_string()) && table.contains("10.200.0.11"), "{table}");
    // Nobody who does not know labels can tell who may: another label is another verdict.
    bulkhead.register(client, &[("role", "stranger")]).unwrap();
    wait(client, 9000, Outcome::Silent);
    bulkhead.register(client, &[("role", "client")]).unwrap();
    wait(client, 9000, Outcome::Reached);
    eventually("the flow is told with the unit's name", || {
        let flows = bulkhead.ok(&["flows", "--verdict", "deny", "--limit", "500", "-o", "json"])?;
        ensure!(flows.contains("ledger.host-2"), "{flows}");
        Ok(())
    })
    .unwrap();
    // Enforced without the agent, found again when the unit is another group of the same name.
    bulkhead.kill_agent("host-2");
    wait(client, 9001, Outcome::Silent);
    bulkhead.start_agent("host-2").unwrap();
    drop(ledger);
    let ledger = Unit::start(&bulkhead, "host-2", &name("ledger"), 9001);
    wait(client, 9001, Outcome::Silent);
    wait(client, 9000, Outcome::Reached);
    bulkhead.on_host("host-2", &["workload", "remove", "ledger"]).unwrap();
    wait(client, 9001, Outcome::Reached);
    drop((billing, ledger));
}
