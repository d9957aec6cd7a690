//! The controller goes, comes back, and was never there.

use std::collections::BTreeMap;

use anyhow::ensure;
use bulkhead_testbed::{
    Bulkhead, Example, Family, HOSTS, Lab, OTHER_PORT, Outcome, Protocol, Server, Workload, eventually,
    expected, find_binary,
};

use crate::common::{example, member, outcome, start, wait_outcome};
use crate::traffic::Traffic;

#[test]
fn without_a_controller_everything_stays_enforced_and_agents_resume() {
    let mut example = example("bt-ctl");
    example.apply().unwrap();
    example.wait_expected().unwrap();
    example.bulkhead.kill_controller();
    eventually("the agents notice", || {
        for host in HOSTS {
            let status = example.bulkhead.agent(host).status()?;
            ensure!(status["connected"] == false, "{status}");
        }
        Ok(())
    })
    .unwrap();
    example.check(Family::V4, |component| Protocol::Tcp(component.port), expected).unwrap();
    example.check(Family::V6, |component| Protocol::Tcp(component.port), expected).unwrap();

    // Nothing has happened meanwhile: nothing is told.
    example.bulkhead.start_controller().unwrap();
    example.bulkhead.wait_connected().unwrap();
    eventually("all is well", || {
        for host in HOSTS {
            let session = example.bulkhead.agent_session(host)?;
            ensure!(session["connected"] == true && session["enforcedRevision"] != 0, "{session}");
            ensure!(session["bytesSent"].as_u64() < Some(500), "told again: {session}");
        }
        Ok(())
    })
    .unwrap();
    example.bulkhead.kill_controller();

    // A second European credit check on host-1: its neighbours there know it, the policies for it are known.
    let second = new_one(&example, "credit-check-eu-2", &[("role", "creditCheck"), ("region", "eu")]);
    let of = |name: &str| example.workload(name);
    wait_outcome(&second.0, of("ip-map"), Protocol::Tcp(8084), Outcome::Reached);
    wait_outcome(&second.0, of("order-web"), Protocol::Tcp(OTHER_PORT), Outcome::Reached);
    wait_outcome(of("order-web"), &second.0, Protocol::Tcp(OTHER_PORT), Outcome::Reached);
    assert_eq!(outcome(&second.0, of("ip-map"), Protocol::Tcp(OTHER_PORT)), Outcome::Silent);
    // Other hosts cannot know it yet: that is refused, not guessed.
    assert_eq!(outcome(&second.0, of("credit-status"), Protocol::Tcp(8083)), Outcome::Silent);
    for stranger in ["customer-web-int", "customer-db", "ip-map", "geo-web", "customer-web"] {
        assert_eq!(
            outcome(of(stranger), &second.0, Protocol::Tcp(OTHER_PORT)),
            Outcome::Silent,
            "{stranger}"
        );
    }
    // A role that never ran on host-1: its policies wait for members that only the controller knows. Closed.
    let never = new_one(&example, "geo-check-2", &[("role", "geolocationCheck")]);
    for stranger in ["customer-web-int", "ip-map", "geo-web", "customer-web"] {
        assert_eq!(outcome(of(stranger), &never.0, Protocol::Tcp(OTHER_PORT)), Outcome::Silent, "{stranger}");
        assert_eq!(outcome(&never.0, of(stranger), Protocol::Tcp(OTHER_PORT)), Outcome::Silent, "{stranger}");
    }

    let written: Vec<u64> =
        HOSTS.map(|host| example.bulkhead.agent(host).entries_written().unwrap()).to_vec();
    example.bulkhead.start_controller().unwrap();
    example.bulkhead.wait_connected().unwrap();
    wait_outcome(&second.0, example.workload("credit-status"), Protocol::Tcp(8083), Outcome::Reached);
    wait_outcome(&never.0, example.workload("ip-map"), Protocol::Tcp(8084), Outcome::Reached);
    example.check(Family::V4, |component| Protocol::Tcp(component.port), expected).unwrap();
    for (host, before) in HOSTS.iter().zip(written) {
        let session = example.bulkhead.agent_session(host).unwrap();
        let bytes = session["bytesSent"].as_u64().unwrap();
        assert!(bytes < 2_500, "{host} was told only what is new: {session}");
        let after = example.bulkhead.agent(host).entries_written().unwrap();
        assert!(after - before <= 24, "{host} wrote {} entries", after - before);
    }
}

fn new_one(example: &Example, name: &str, labels: &[(&str, &str)]) -> (Workload, Server) {
    let workload = example.bulkhead.lab.workload("host-1", name).unwrap();
    let server = Server::start(&workload.netns, &[8083, OTHER_PORT]).unwrap();
    let labels: Vec<_> = [("application", "orderInput")].iter().chain(labels).copied().collect();
    example.bulkhead.register(&workload, &labels).unwrap();
    (workload, server)
}

#[test]
fn a_controller_that_goes_and_comes_back_under_traffic_costs_no_packet() {
    let mut example = example("bt-ctl-live");
    example.apply().unwrap();
    example.wait_expected().unwrap();
    let Example { members, bulkhead } = &mut example;
    let of = |name: &str| {
        let (_, member) = members.iter().find(|(component, _)| component.name == name).unwrap();
        &member.workload
    };
    let traffic = Traffic::start(of("order-web"), of("ip-map"), of("geo-check"), OTHER_PORT);
    for _ in 0..2 {
        bulkhead.kill_controller();
        traffic.goes_on();
        bulkhead.start_controller().unwrap();
        bulkhead.wait_connected().unwrap();
        traffic.goes_on();
    }
    traffic.end("controller lost");
}

#[test]
fn an_agent_that_nothing_concerns_hears_and_writes_nothing() {
    let bulkhead = start("bt-quiet", &HOSTS);
    let batch = [("application", "batch")];
    let first = member(&bulkhead, "host-1", "worker-0", &batch, &[80]);
    let peer = member(&bulkhead, "host-2", "ledger-0", &batch, &[80]);
    let bystander = member(&bulkhead, "host-3", "bystander", &[("application", "other")], &[80]);
    let policy = "apiVersion: bulkhead.dev/v1\nkind: Policy\nmetadata: {name: inside}\nspec:\n  \
                  appliesTo: has(application)\n  ingress:\n  - action: Allow\n    \
                  from: {sameLabels: [application]}\n";
    bulkhead.apply_text("inside.yaml", policy).unwrap();
    wait_outcome(&first.workload, &peer.workload, Protocol::Tcp(80), Outcome::Reached);
    wait_outcome(&first.workload, &bystander.workload, Protocol::Tcp(80), Outcome::Silent);
    let before = bulkhead.agent_session("host-3").unwrap();
    let concerned = bulkhead.agent_session("host-2").unwrap();
    let written = bulkhead.agent("host-3").entries_written().unwrap();
    let written_peer = bulkhead.agent("host-2").entries_written().unwrap();
    let more: Vec<_> =
        (1..6).map(|n| member(&bulkhead, "host-1", &format!("worker-{n}"), &batch, &[80])).collect();
    for new in &more {
        wait_outcome(&new.workload, &peer.workload, Protocol::Tcp(80), Outcome::Reached);
    }
    let after = bulkhead.agent_session("host-3").unwrap();
    assert_eq!(after["messagesSent"], before["messagesSent"], "{before} {after}");
    assert_eq!(after["bytesSent"], before["bytesSent"]);
    assert_eq!(bulkhead.agent("host-3").entries_written().unwrap(), written, "nothing written");
    let told = bulkhead.agent_session("host-2").unwrap();
    assert!(told["messagesSent"].as_u64() > concerned["messagesSent"].as_u64());
    let entries = bulkhead.agent("host-2").entries_written().unwrap() - written_peer;
    // Two addresses for each of five.
    assert!((10..=20).contains(&entries), "{entries} entries for five members");
}

#[test]
fn an_agent_without_a_controller_says_so_and_tries_again() {
    let lab = Lab::new("bt-alone", &["host-1"]).unwrap();
    let mut bulkhead = Bulkhead::without_processes(lab, &find_binary().unwrap(), &BTreeMap::new());
    bulkhead.start_agents().unwrap();
    let agent = bulkhead.agent("host-1");
    eventually("the agent says that it is alone", || {
        let status = agent.status()?;
        let why = status["disconnectedBecause"].as_str().unwrap_or_default();
        ensure!(status["connected"] == false && why.to_lowercase().contains("refused"), "{status}");
        let open = status["notEnforced"].to_string();
        ensure!(open.contains("no policy is known yet"), "{status}");
        Ok(())
    })
    .unwrap();
    assert!(agent.log().contains("no controller"), "{}", agent.log());
    let text = bulkhead.on_host("host-1", &["status"]).unwrap();
    assert!(text.contains("no controller") && text.contains("not in force yet"), "{text}");
    bulkhead.start_controller().unwrap();
    bulkhead.wait_connected().unwrap();
    let status = bulkhead.agent("host-1").status().unwrap();
    assert_eq!(status["notEnforced"].as_array().map(Vec::len), Some(0), "{status}");
}
