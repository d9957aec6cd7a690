//! A Docker engine on one of the hosts.

use std::collections::BTreeMap;

use anyhow::ensure;
use bulkhead_testbed::{
    AgentOptions, Bulkhead, Docker, Lab, Outcome, Protocol, Workload, eventually, find_binary,
};

use crate::common::{member, wait_address};

const POLICY: &str = "
apiVersion: bulkhead.dev/v1
kind: Policy
metadata: {name: server}
spec:
  appliesTo: role == 'server' && has(image.name) && host.kernel >= version('5.10')
  ingress:
  - action: Allow
    from: {selector: role == 'client' && host.kernel >= version('5.10')}
    ports: [tcp/8000]
---
apiVersion: bulkhead.dev/v1
kind: Policy
metadata: {name: closed}
spec:
  appliesTo: role == 'closed'
  ingress: []
";

#[test]
fn the_container_file_makes_an_image_that_runs() {
    let lab = Lab::new("bt-image", &["host-1"]).unwrap();
    let docker = Docker::start(&lab, lab.host("host-1")).unwrap();
    let context = lab.directory().join("context");
    std::fs::create_dir_all(context.join("target/release")).unwrap();
    std::fs::copy(find_binary().unwrap(), context.join("target/release/bulkhead")).unwrap();
    let containerfile = concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/Containerfile");
    docker.import_system("bulkhead-base", &context.join("target/release/bulkhead")).unwrap();
    let context = context.display().to_string();
    let build = ["build", "--network", "none", "--build-arg", "BASE=bulkhead-base", "-f", containerfile];
    docker.run(&[&build[..], &["-t", "bulkhead", &context]].concat()).unwrap();
    let version = docker.run(&["run", "--rm", "--network", "none", "bulkhead", "--version"]).unwrap();
    assert!(version.starts_with("bulkhead "), "{version}");
    docker
        .run(&["run", "--detach", "--name", "repository", "--network", "none", "bulkhead", "controller"])
        .unwrap();
    eventually("the controller in the container answers", || {
        let me = docker.run(&["exec", "repository", "/usr/local/bin/bulkhead", "whoami"])?;
        ensure!(me.contains("bulkhead:admins"), "{me}");
        Ok(())
    })
    .unwrap();
    docker.run(&["stop", "repository"]).unwrap();
    let code = docker.run(&["inspect", "-f", "{{.State.ExitCode}}", "repository"]).unwrap();
    assert_eq!(code, "0", "{}", docker.run(&["logs", "repository"]).unwrap());
}

#[test]
fn containers_are_found_and_judged_by_their_labels() {
    let lab = Lab::new("bt-docker", &["host-1", "host-2"]).unwrap();
    let docker = Docker::start(&lab, lab.host("host-1")).unwrap();
    let options = AgentOptions { docker: Some(docker.socket().into()), ..AgentOptions::default() };
    let options = BTreeMap::from([("host-1".to_owned(), options)]);
    let bulkhead = Bulkhead::start(lab, &find_binary().unwrap(), &options).unwrap();
    let client = member(&bulkhead, "host-2", "client", &[("role", "client")], &[80]);
    let stranger = member(&bulkhead, "host-2", "stranger", &[("role", "stranger")], &[80]);
    bulkhead.apply_text("server.yaml", POLICY).unwrap();
    let (client, stranger) = (&client.workload, &stranger.workload);

    let address = docker.container("shop", &[("role", "server")], 8000).unwrap();
    wait_container(&bulkhead, "shop.host-1", "server");
    wait(client, &address, Outcome::Reached);
    wait(stranger, &address, Outcome::Silent);

    // Between containers of one host the bridge, not the routes, leads.
    docker.container("peer", &[("role", "client")], 8000).unwrap();
    wait_container(&bulkhead, "peer.host-1", "client");
    // (busybox's wget looks up names, which a static one cannot.)
    let ask = format!("printf 'GET /bin/none HTTP/1.0\r\n\r\n' | nc -w 2 {address} 8000 | grep -q HTTP");
    let fetch = |name: &str| docker.run(&["exec", name, "/bin/busybox", "sh", "-c", &ask]);
    eventually("a container with the label gets through", || fetch("peer")).unwrap();
    docker.container("thief", &[("role", "thief")], 8000).unwrap();
    wait_container(&bulkhead, "thief.host-1", "thief");
    assert!(fetch("thief").is_err(), "one without the label does not");

    // Stopped and started again, perhaps with another address.
    docker.run(&["stop", "-t", "0", "shop"]).unwrap();
    eventually("the stopped one is forgotten", || {
        let list = bulkhead.json(&["get", "workloads"])?.to_string();
        ensure!(!list.contains("shop.host-1"), "{list}");
        Ok(())
    })
    .unwrap();
    docker.run(&["start", "shop"]).unwrap();
    wait_container(&bulkhead, "shop.host-1", "server");
    let address = docker.address("shop").unwrap();
    wait(client, &address, Outcome::Reached);
    wait(stranger, &address, Outcome::Silent);

    // Made anew with other labels.
    docker.run(&["rm", "-f", "shop"]).unwrap();
    let address = docker.container("shop", &[("role", "closed")], 8000).unwrap();
    wait_container(&bulkhead, "shop.host-1", "closed");
    wait(client, &address, Outcome::Silent);
    drop(bulkhead_and(bulkhead, docker));
}

const PUBLISHED: &str = "
apiVersion: bulkhead.dev/v1
kind: Policy
metadata: {name: shop}
spec:
  appliesTo: role == 'shop'
  ingress:
  - action: Allow
    from: {selector: role == 'client' || role == 'customer'}
    ports: [tcp/8000]
---
apiVersion: bulkhead.dev/v1
kind: Policy
metadata: {name: clients}
spec:
  appliesTo: role == 'client'
  egress:
  - action: Allow
    to: {selector: role == 'shop'}
    ports: [tcp/8000]
";

/// Docker's published ports: policy speaks of the containers behind them, and never of the host's address.
#[test]
fn published_ports_are_judged_as_the_containers_behind_them() {
    let lab = Lab::new("bt-publish", &["host-1", "host-2"]).unwrap();
    let docker = Docker::start_rewriting(&lab, lab.host("host-1")).unwrap();
    let options = AgentOptions { docker: Some(docker.socket().into()), ..AgentOptions::default() };
    let options = BTreeMap::from([("host-1".to_owned(), options)]);
    let bulkhead = Bulkhead::start(lab, &find_binary().unwrap(), &options).unwrap();
    let client = member(&bulkhead, "host-2", "client", &[("role", "free")], &[80]);
    let stranger = member(&bulkhead, "host-2", "stranger", &[("role", "stranger")], &[80]);
    let (client, stranger) = (&client.workload, &stranger.workload);
    docker.published("shop", &[("role", "shop")], 8000, Some(8080)).unwrap();
    docker.published("vault", &[("role", "vault")], 8000, Some(8081)).unwrap();
    docker.container("peer", &[("role", "client")], 8000).unwrap();
    docker.container("thief", &[("role", "thief")], 8000).unwrap();
    for (name, role) in [("shop", "shop"), ("vault", "vault"), ("peer", "client"), ("thief", "thief")] {
        wait_container(&bulkhead, &format!("{name}.host-1"), role);
    }
    let wait = |from: &Workload, port, wanted| {
        wait_address(from, "10.200.0.10".parse().unwrap(), Protocol::Tcp(port), wanted);
    };
    wait(stranger, 8080, Outcome::Reached);
    bulkhead.apply_text("published.yaml", PUBLISHED).unwrap();
    wait(stranger, 8080, Outcome::Silent);
    wait(stranger, 8081, Outcome::Reached);
    bulkhead.register(client, &[("role", "customer")]).unwrap();
    wait(client, 8080, Outcome::Reached);
    // From containers of the same host, by the same address: hidden behind it, and known all the same. The client's own
    // policy never names the host, whose address it calls.
    let fetch = |name: &str, port: u16| {
        let ask = format!("printf 'GET /x HTTP/1.0\r\n\r\n' | nc -w 2 10.200.0.10 {port} | grep -q HTTP");
        docker.run(&["exec", name, "/bin/busybox", "sh", "-c", &ask])
    };
    eventually("the client gets through to the shop", || fetch("peer", 8080)).unwrap();
    assert!(fetch("peer", 8081).is_err(), "and to nothing else");
    assert!(fetch("thief", 8080).is_err(), "and nobody else to the shop");
    eventually("others are free", || fetch("thief", 8081)).unwrap();
    eventually("flows tell both addresses", || {
        let flows = bulkhead.ok(&["flows", "--limit", "500", "-o", "json"])?;
        ensure!(flows.contains("10.200.0.10:8080") && flows.contains("10.200.0.10:8081"), "{flows}");
        Ok(())
    })
    .unwrap();
    drop(bulkhead_and(bulkhead, docker));
}

/// The engine must end before the lab's namespaces go.
fn bulkhead_and(bulkhead: Bulkhead, docker: Docker) -> Bulkhead {
    drop(docker);
    bulkhead
}

fn wait_container(bulkhead: &Bulkhead, name: &str, role: &str) {
    eventually(&format!("{name} is in force as {role}"), || {
        let status = bulkhead.agent("host-1").status()?;
        let mut endpoints = status["endpoints"].as_array().into_iter().flatten();
        let found = endpoints.any(|end| end["workload"] == name && end["labels"]["role"] == role);
        ensure!(found, "{status}");
        Ok(())
    })
    .unwrap();
}

fn wait(from: &Workload, address: &str, wanted: Outcome) {
    wait_address(from, address.parse().unwrap(), Protocol::Tcp(8000), wanted);
}
