//! What a workload may claim, and what becomes of it when it goes.

use anyhow::ensure;
use bulkhead_testbed::{Outcome, Protocol, eventually, send_spoofed};

use crate::common::{CLIENT_TO_SERVER, member, outcome, start, start_with, wait_outcome};

#[test]
fn nobody_sends_with_an_address_that_is_not_its_own() {
    let bulkhead = start("bt-spoof", &["host-1", "host-2"]);
    let server = member(&bulkhead, "host-2", "server", &[("role", "server")], &[5000]);
    let client = member(&bulkhead, "host-1", "client", &[("role", "client")], &[5000]);
    let liar = member(&bulkhead, "host-1", "liar", &[("role", "liar")], &[5000]);
    bulkhead.apply_text("server.yaml", CLIENT_TO_SERVER).unwrap();
    let (server_workload, client, liar) = (&server.workload, &client.workload, &liar.workload);
    wait_outcome(client, server_workload, Protocol::Udp(5000), Outcome::Reached);
    assert_eq!(outcome(liar, server_workload, Protocol::Udp(5000)), Outcome::Silent);
    let before = server.server.datagrams(5000);
    let dropped = || {
        let status = bulkhead.agent("host-1").status().unwrap();
        status["drops"]["spoofed"].as_u64().unwrap_or(0)
    };
    let dropped_before = dropped();
    send_spoofed(liar, client.v4, server_workload.v4, 5000, 100).unwrap();
    eventually("all are counted", || {
        ensure!(dropped() - dropped_before == 100, "{}", dropped() - dropped_before);
        Ok(())
    })
    .unwrap();
    assert_eq!(server.server.datagrams(5000), before, "none arrived");
    // Its own address is not suspicious.
    send_spoofed(client, client.v4, server_workload.v4, 5000, 1).unwrap();
    eventually("the honest one arrives", || {
        ensure!(server.server.datagrams(5000) == before + 1);
        Ok(())
    })
    .unwrap();
}

#[test]
fn a_workload_that_is_taken_back_is_known_to_nobody() {
    let bulkhead = start("bt-remove", &["host-1", "host-2"]);
    let server = member(&bulkhead, "host-2", "server", &[("role", "server")], &[5000]);
    let client = member(&bulkhead, "host-1", "client", &[("role", "client")], &[5000]);
    bulkhead.apply_text("server.yaml", CLIENT_TO_SERVER).unwrap();
    wait_outcome(&client.workload, &server.workload, Protocol::Tcp(5000), Outcome::Reached);
    bulkhead.unregister(&client.workload).unwrap();
    wait_outcome(&client.workload, &server.workload, Protocol::Tcp(5000), Outcome::Silent);
    eventually("the repository forgets it", || {
        let list = bulkhead.json(&["get", "workloads"])?.to_string();
        ensure!(!list.contains("client.host-1") && list.contains("server.host-2"), "{list}");
        Ok(())
    })
    .unwrap();
    // Its interface belongs to workloads by its name: nobody claims it, so it stays closed.
    let other = member(&bulkhead, "host-1", "open", &[("role", "open")], &[5000]);
    assert_eq!(outcome(&client.workload, &other.workload, Protocol::Tcp(5000)), Outcome::Silent);
    // Registered again it is what it was.
    bulkhead.register(&client.workload, &[("role", "client")]).unwrap();
    wait_outcome(&client.workload, &server.workload, Protocol::Tcp(5000), Outcome::Reached);
    wait_outcome(&client.workload, &other.workload, Protocol::Tcp(5000), Outcome::Reached);
}

#[test]
fn an_interface_of_another_name_is_let_go_with_its_workload() {
    let bulkhead = start("bt-release", &["host-1", "host-2"]);
    let server = member(&bulkhead, "host-2", "server", &[("role", "server")], &[5000]);
    let odd = bulkhead.lab.workload_with_interface("host-1", "odd", "tap0").unwrap();
    // Nobody claims it, and it is no workload's by its name: left alone.
    wait_outcome(&odd, &server.workload, Protocol::Tcp(5000), Outcome::Reached);
    bulkhead.register(&odd, &[("role", "odd")]).unwrap();
    bulkhead.wait_endpoint(&odd).unwrap();
    let closed = "
apiVersion: bulkhead.dev/v1
kind: Policy
metadata: {name: odd}
spec:
  appliesTo: role == 'odd'
  egress: []
";
    bulkhead.apply_text("odd.yaml", closed).unwrap();
    wait_outcome(&odd, &server.workload, Protocol::Tcp(5000), Outcome::Silent);
    bulkhead.unregister(&odd).unwrap();
    wait_outcome(&odd, &server.workload, Protocol::Tcp(5000), Outcome::Reached);
}

#[test]
fn files_in_a_watched_directory_are_registrations() {
    let directory = std::env::temp_dir().join(format!("bulkhead-bt-watch-{}", std::process::id()));
    std::fs::create_dir_all(&directory).unwrap();
    let argument = directory.display().to_string();
    let bulkhead = start_with("bt-watch", &["host-1"], &["--workload-dir", &argument]);
    let workload = bulkhead.lab.workload("host-1", "filed").unwrap();
    let text = format!("name: filed\nlabels: {{role: web}}\nnetns: {}\n", workload.netns.path().display());
    std::fs::write(directory.join("filed.yaml"), text).unwrap();
    bulkhead.wait_endpoint(&workload).unwrap();
    std::fs::write(directory.join("broken.yaml"), "name: broken\nlable: {}\n").unwrap();
    eventually("the broken file is named", || {
        let status = bulkhead.agent("host-1").status()?;
        let complaints = status["notEnforced"].to_string();
        ensure!(complaints.contains("broken.yaml") && complaints.contains("labels"), "{complaints}");
        Ok(())
    })
    .unwrap();
    std::fs::remove_file(directory.join("filed.yaml")).unwrap();
    eventually("it is gone", || {
        let status = bulkhead.agent("host-1").status()?;
        ensure!(status["endpoints"].as_array().is_some_and(Vec::is_empty), "{status}");
        Ok(())
    })
    .unwrap();
    let _ = std::fs::remove_dir_all(&directory);
}
