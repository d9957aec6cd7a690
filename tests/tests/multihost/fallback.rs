//! A host that cannot do eBPF.

use std::collections::BTreeMap;

use bulkhead_testbed::{AgentOptions, Bulkhead, Lab, Outcome, Protocol, find_binary};

use crate::common::{member, wait_outcome};

const POLICY: &str = "
apiVersion: bulkhead.dev/v1
kind: Policy
metadata: {name: server}
spec:
  appliesTo: role == 'server'
  ingress:
  - action: Allow
    from: {selector: role == 'client'}
    ports: [tcp/5000]
";

const HOST: &str = "
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
  ingress: [{action: Deny, ports: [tcp/5000]}, {action: Allow}]
";

#[test]
fn a_host_without_ebpf_enforces_with_nftables_and_says_why() {
    let lab = Lab::new("bt-nft", &["host-1", "host-2"]).unwrap();
    // On no BPF file system nothing can be pinned.
    let pins = Some(lab.directory().join("pins"));
    let arguments = vec!["--dataplane".to_owned(), "auto".to_owned()];
    let options = BTreeMap::from(["host-1", "host-2"].map(|host| {
        let options = AgentOptions { pins: pins.clone(), arguments: arguments.clone(), ..Default::default() };
        (host.to_owned(), options)
    }));
    let bulkhead = Bulkhead::start(lab, &find_binary().unwrap(), &options).unwrap();
    let status = bulkhead.agent("host-1").status().unwrap();
    assert_eq!(status["dataplane"], "nftables", "{status}");
    let because = status["dataplaneBecause"].as_str().unwrap();
    assert!(because.starts_with("not ebpf: bpffs is missing"), "{because}");
    let server = member(&bulkhead, "host-1", "server", &[("role", "server")], &[5000]);
    let client = member(&bulkhead, "host-2", "client", &[("role", "client")], &[5000]);
    let other = member(&bulkhead, "host-1", "other", &[("role", "other")], &[5000]);
    bulkhead.apply_text("server.yaml", POLICY).unwrap();
    wait_outcome(&client.workload, &server.workload, Protocol::Tcp(5000), Outcome::Reached);
    wait_outcome(&other.workload, &server.workload, Protocol::Tcp(5000), Outcome::Silent);
    wait_outcome(&server.workload, &client.workload, Protocol::Tcp(5000), Outcome::Reached);
    let file = bulkhead.lab.directory().join("host.yaml");
    std::fs::write(&file, HOST).unwrap();
    bulkhead.ok(&["apply", "-f", &file.display().to_string()]).unwrap();
    // What it forwards is judged as well.
    wait_outcome(&client.workload, &server.workload, Protocol::Tcp(5000), Outcome::Silent);
    wait_outcome(&server.workload, &client.workload, Protocol::Tcp(5000), Outcome::Reached);
    let status = bulkhead.agent("host-1").status().unwrap();
    assert_eq!(status["notEnforced"].as_array().map(Vec::len), Some(0), "{status}");
}
