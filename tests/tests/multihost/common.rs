//! What the tests share: a fleet with the example's components in it, and what to expect of it.

use std::collections::BTreeMap;
use std::net::IpAddr;

use anyhow::ensure;
use bulkhead_testbed::{
    AgentOptions, Bulkhead, Example, Lab, Member, Outcome, PROBE_WAIT, Probe, Protocol, Workload, eventually,
    find_binary, probe,
};

/// The server lets the client in, and nobody else.
pub(crate) const CLIENT_TO_SERVER: &str = "
apiVersion: bulkhead.dev/v1
kind: Policy
metadata: {name: server}
spec:
  appliesTo: role == 'server'
  ingress:
  - action: Allow
    from: {selector: role == 'client'}
";

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

/// A workload with labels that serves on `ports`, in force when this answers.
pub(crate) fn member(
    bulkhead: &Bulkhead,
    host: &str,
    name: &str,
    labels: &[(&str, &str)],
    ports: &[u16],
) -> Member {
    Member::start(bulkhead, host, name, labels, ports).unwrap()
}

/// The example, running, with no policy.
pub(crate) fn example(prefix: &str) -> Example {
    Example::start(prefix, &find_binary().unwrap()).unwrap()
}

/// One probe.
pub(crate) fn outcome(from: &Workload, to: &Workload, protocol: Protocol) -> Outcome {
    let target = Probe { address: to.v4.into(), protocol };
    probe(from, &[target], PROBE_WAIT).unwrap()[0]
}

/// Waits until a probe ends so.
pub(crate) fn wait_outcome(from: &Workload, to: &Workload, protocol: Protocol, wanted: Outcome) {
    wait_address(from, to.v4.into(), protocol, wanted);
}

/// Waits until a probe of an address ends so.
pub(crate) fn wait_address(from: &Workload, address: IpAddr, protocol: Protocol, wanted: Outcome) {
    eventually(&format!("{} → {address} {protocol:?} is {wanted:?}", from.name), || {
        let found = probe(from, &[Probe { address, protocol }], PROBE_WAIT)?[0];
        ensure!(found == wanted, "{found:?}");
        Ok(())
    })
    .unwrap();
}
