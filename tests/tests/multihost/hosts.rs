//! Hosts as endpoints of their own.

use anyhow::ensure;
use bulkhead_testbed::{Bulkhead, Outcome, Protocol, Server, Workload, eventually};

use crate::common::{member, start, wait_address};

const POLICY: &str = "
apiVersion: bulkhead.dev/v1
kind: HostEndpoint
metadata: {name: host-2-uplink, labels: {role: machine}}
spec: {host: host-2, interface: uplink, addresses: [10.200.0.11]}
---
apiVersion: bulkhead.dev/v1
kind: Policy
metadata: {name: machines}
spec:
  appliesTo: role == 'machine'
  ingress:
  - action: Allow
    from: {selector: role == 'client'}
    ports: [tcp/9000]
  egress: []
";

const NOWHERE: &str = "
apiVersion: bulkhead.dev/v1
kind: HostEndpoint
metadata: {name: host-2-nowhere}
spec: {host: host-2, interface: eth7, addresses: [10.200.0.99]}
";

fn wait(from: &Workload, port: u16, wanted: Outcome) {
    wait_address(from, "10.200.0.11".parse().unwrap(), Protocol::Tcp(port), wanted);
}

fn wait_for_both(bulkhead: &Bulkhead) {
    eventually("the agent of host-2 is connected and says what it cannot enforce", || {
        let status = bulkhead.agent("host-2").status()?;
        ensure!(status["connected"] == true, "{status}");
        let endpoint = status["endpoints"].to_string();
        ensure!(endpoint.contains("HostEndpoint/host-2-uplink"), "{endpoint}");
        let complaints = status["notEnforced"].to_string();
        ensure!(complaints.contains("no interface eth7 on this host"), "{complaints}");
        Ok(())
    })
    .unwrap();
}

#[test]
fn a_host_is_guarded_and_keeps_its_controller() {
    let mut bulkhead = start("bt-host", &["host-1", "host-2"]);
    let client = member(&bulkhead, "host-1", "client", &[("role", "client")], &[5000]);
    let other = member(&bulkhead, "host-1", "other", &[("role", "other")], &[5000]);
    let server = Server::start(&bulkhead.host("host-2").netns, &[9000, 9001]).unwrap();
    wait(&other.workload, 9001, Outcome::Reached);
    bulkhead.apply_text("machines.yaml", POLICY).unwrap();
    let (client, other) = (&client.workload, &other.workload);
    wait(client, 9001, Outcome::Silent);
    wait(other, 9000, Outcome::Silent);
    wait(client, 9000, Outcome::Reached);
    let file = bulkhead.file("nowhere.yaml", NOWHERE).unwrap();
    bulkhead.ok(&["apply", "-f", &file.display().to_string()]).unwrap();
    // All its egress is denied, but for the ports without which nobody could take that back.
    wait_for_both(&bulkhead);
    eventually("the flow of the refused one is told with names", || {
        let flows = bulkhead.ok(&["flows", "--verdict", "deny", "--limit", "500", "-o", "json"])?;
        ensure!(flows.contains("host-2-uplink") && flows.contains("other.host-1"), "{flows}");
        Ok(())
    })
    .unwrap();
    // Without anybody: no agent, no controller.
    bulkhead.kill_agent("host-2");
    wait(other, 9000, Outcome::Silent);
    bulkhead.kill_controller();
    bulkhead.start_agent("host-2").unwrap();
    eventually("the tables are in force again", || {
        let status = bulkhead.agent("host-2").status()?;
        ensure!(status["programmed"] == true, "{status}");
        Ok(())
    })
    .unwrap();
    wait(other, 9000, Outcome::Silent);
    wait(client, 9000, Outcome::Reached);
    bulkhead.start_controller().unwrap();
    wait_for_both(&bulkhead);
    // Who is a client is a matter of labels here as well.
    bulkhead.register(other, &[("role", "client")]).unwrap();
    wait(other, 9000, Outcome::Reached);
    bulkhead.ok(&["delete", "hostendpoint", "host-2-uplink"]).unwrap();
    wait(client, 9001, Outcome::Reached);
    drop(server);
}

const FORWARDED: &str = "
apiVersion: bulkhead.dev/v1
kind: HostEndpoint
metadata: {name: host-1-uplink, labels: {role: gateway}}
spec: {host: host-1, interface: uplink, addresses: [10.200.0.10]}
---
apiVersion: bulkhead.dev/v1
kind: Policy
metadata: {name: gateways}
spec:
  appliesTo: role == 'gateway'
  applyOnForward: true
  ingress:
  - action: Allow
    from: {selector: role == 'client'}
  - action: Deny
    reject: true
";

#[test]
fn what_a_host_forwards_is_judged_at_its_interface() {
    let bulkhead = start("bt-fwd", &["host-1", "host-2"]);
    let server = member(&bulkhead, "host-1", "server", &[("role", "server")], &[5000]);
    let neighbour = member(&bulkhead, "host-1", "neighbour", &[("role", "other")], &[5000]);
    let client = member(&bulkhead, "host-2", "client", &[("role", "client")], &[5000]);
    let other = member(&bulkhead, "host-2", "other", &[("role", "other")], &[5000]);
    let wait = |from: &Workload, to: &Workload, wanted| {
        wait_address(from, to.v4.into(), Protocol::Tcp(5000), wanted);
    };
    let (server, neighbour, client, other) =
        (&server.workload, &neighbour.workload, &client.workload, &other.workload);
    wait(other, server, Outcome::Reached);
    bulkhead.apply_text("gateways.yaml", FORWARDED).unwrap();
    // Told, as the rule says, and nothing but what comes in through that interface.
    wait(other, server, Outcome::Refused);
    wait(client, server, Outcome::Reached);
    wait(neighbour, server, Outcome::Reached);
    wait(server, other, Outcome::Reached);
    eventually("the flow of the refused one is told with the names of both ends", || {
        let flows = bulkhead.ok(&["flows", "--verdict", "deny", "--limit", "500", "-o", "json"])?;
        let rule = flows.contains("gateways") && flows.contains("other.host-2");
        ensure!(rule && flows.contains("server.host-1"), "{flows}");
        Ok(())
    })
    .unwrap();
    // Who is a client is a matter of labels here as well.
    bulkhead.register(other, &[("role", "client")]).unwrap();
    wait(other, server, Outcome::Reached);
    bulkhead.register(other, &[("role", "other")]).unwrap();
    wait(other, server, Outcome::Refused);
    bulkhead.ok(&["delete", "policy", "gateways"]).unwrap();
    wait(other, server, Outcome::Reached);
}
