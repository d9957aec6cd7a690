//! Labels and policies that change while connections live, and workloads that appear.

use std::net::SocketAddr;
use std::path::Path;

use anyhow::ensure;
use bulkhead_testbed::{
    Example, Family, HOSTS, OTHER_PORT, Outcome, PingPong, Protocol, Server, UdpStream, Workload, eventually,
    expected,
};

use crate::common::{example, member, outcome, start, start_with, wait_address, wait_outcome};

#[test]
fn live_connections_end_with_the_label_or_the_policy_that_allowed_them() {
    let example = example("bt-cut");
    example.apply().unwrap();
    example.wait_expected().unwrap();
    let (european, map) = (example.workload("credit-check-eu"), example.workload("ip-map"));
    let to = SocketAddr::new(map.v4.into(), 8084);

    // A label that made the difference.
    let live = PingPong::start(european, to).unwrap();
    let geolocation = PingPong::start(example.workload("geo-check"), to).unwrap();
    eventually("both talk", || {
        ensure!(live.round_trips() > 50 && geolocation.round_trips() > 50);
        Ok(())
    })
    .unwrap();
    let american = [("application", "orderInput"), ("role", "creditCheck"), ("region", "us")];
    example.bulkhead.register(european, &american).unwrap();
    wait_stalled(&live);
    let other = geolocation.round_trips();
    eventually("the other connection goes on", || {
        ensure!(geolocation.round_trips() > other + 50);
        Ok(())
    })
    .unwrap();
    assert!(live.finish().broken.is_some());
    assert_eq!(outcome(european, map, Protocol::Tcp(8084)), Outcome::Silent);

    // And back: reachable again, at the other end too.
    let back = [("application", "orderInput"), ("role", "creditCheck"), ("region", "eu")];
    example.bulkhead.register(european, &back).unwrap();
    wait_outcome(european, map, Protocol::Tcp(8084), Outcome::Reached);

    // A policy that allowed it.
    let live = PingPong::start(european, to).unwrap();
    example.bulkhead.ok(&["delete", "policies", "european-credit-check"]).unwrap();
    wait_stalled(&live);
    let report = geolocation.finish();
    assert_eq!(report.broken, None, "a connection that is still allowed never noticed");
    assert!(live.finish().broken.is_some());
    assert_eq!(outcome(european, map, Protocol::Tcp(8084)), Outcome::Silent);
}

fn wait_stalled(live: &PingPong) {
    eventually("the connection is cut", || {
        ensure!(live.has_stalled(), "{} round trips", live.round_trips());
        Ok(())
    })
    .unwrap();
}

#[test]
fn a_new_workload_is_protected_before_its_first_packet_and_needs_no_policy() {
    let example = example("bt-new");
    // A place that no policy protects: whatever the new one gets out arrives there.
    let lab = &example.bulkhead.lab;
    let sink = lab.workload("host-2", "sink").unwrap();
    example.bulkhead.register(&sink, &[("role", "sink")]).unwrap();
    example.bulkhead.wait_endpoint(&sink).unwrap();
    example.apply().unwrap();
    example.wait_expected().unwrap();

    let written: Vec<u64> = entries_written(&example);
    let second = lab.unjoined_workload("host-1", "credit-status-2").unwrap();
    // Sending goes on before it has an interface, so the first packet leaves with the first instant of it.
    let out = UdpStream::start(&second, &sink, sink.v4.into(), 7001, 1000, 4).unwrap();
    let web = example.workload("customer-db");
    let towards = UdpStream::start(web, &second, second.v4.into(), 7002, 500, 4).unwrap();
    let forbidden =
        UdpStream::start(example.workload("geo-web"), &second, second.v4.into(), 7003, 1000, 4).unwrap();
    lab.join(&second).unwrap();
    let server = Server::start(&second.netns, &[8083, OTHER_PORT]).unwrap();
    eventually("much was sent", || {
        ensure!(out.so_far().sent > 300 && forbidden.so_far().sent > 300);
        Ok(())
    })
    .unwrap();
    // Nobody has said whose it is: even its own application does not reach it.
    let early = (out.so_far().received, towards.so_far().received, forbidden.so_far().received);
    assert_eq!(early, (0, 0, 0), "before it is registered nothing passes");

    let labels = [("application", "customerRecord"), ("role", "creditStatus")];
    example.bulkhead.register(&second, &labels).unwrap();
    wait_outcome(example.workload("credit-check-us"), &second, Protocol::Tcp(8083), Outcome::Reached);
    wait_outcome(example.workload("credit-check-eu"), &second, Protocol::Tcp(8083), Outcome::Reached);
    wait_outcome(web, &second, Protocol::Tcp(OTHER_PORT), Outcome::Reached);
    for stranger in ["geo-check", "geo-web", "order-web", "ip-map"] {
        let found = outcome(example.workload(stranger), &second, Protocol::Tcp(8083));
        assert_eq!(found, Outcome::Silent, "{stranger}");
    }
    let found = outcome(example.workload("credit-check-us"), &second, Protocol::Tcp(OTHER_PORT));
    assert_eq!(found, Outcome::Silent, "another port");
    let (out, forbidden, towards) = (out.finish(), forbidden.finish(), towards.finish());
    assert_eq!((out.received, forbidden.received), (0, 0), "leaked: {out:?} {forbidden:?}");
    assert!(towards.received > 0, "its own application reaches it: {towards:?}");
    assert!(server.accepted() >= 3);
    let after: Vec<u64> = entries_written(&example);
    assert!(out.refused > 0, "it sent before it had an interface: {out:?}");
    for (before, after) in written.iter().zip(&after) {
        assert!(after - before < 40, "a workload costs few entries: {written:?} → {after:?}");
    }
    example.check(Family::V6, |component| Protocol::Tcp(component.port), expected).unwrap();
}

/// The instant between the appearance of an interface and its closing, again and again.
#[test]
fn interfaces_that_appear_are_closed_before_a_packet_passes() {
    let bulkhead = start("bt-first", &["host-1", "host-2"]);
    let sink = member(&bulkhead, "host-2", "sink", &[("role", "sink")], &[80]);
    let lab = &bulkhead.lab;
    let (mut sent, mut leaked) = (0, 0);
    for number in 0..12 {
        let new = lab.unjoined_workload("host-1", &format!("new-{number}")).unwrap();
        let out = UdpStream::start(&new, &sink.workload, sink.workload.v4.into(), 7001, 4000, 4).unwrap();
        eventually("it tries before it can", || {
            ensure!(out.so_far().refused > 20);
            Ok(())
        })
        .unwrap();
        lab.join(&new).unwrap();
        eventually("it has sent", || {
            ensure!(out.so_far().sent > 100);
            Ok(())
        })
        .unwrap();
        let report = out.so_far();
        sent += report.sent;
        leaked += report.received;
    }
    assert_eq!(leaked, 0, "of {sent} packets of twelve workloads that nobody claimed");
}

#[test]
fn interfaces_that_appear_while_no_agent_runs_are_kept_back_by_the_fence() {
    let mut bulkhead = start_with("bt-fence", &["host-1", "host-2"], &["--fence"]);
    let sink = member(&bulkhead, "host-2", "sink", &[("role", "sink")], &[5000]);
    let old = member(&bulkhead, "host-1", "old", &[("role", "old")], &[5000]);
    bulkhead.kill_agent("host-1");
    let new = bulkhead.lab.workload("host-1", "new").unwrap();
    let reaches = |from: &Workload, wanted| {
        wait_address(from, sink.workload.v4.into(), Protocol::Tcp(5000), wanted);
    };
    reaches(&old.workload, Outcome::Reached);
    let out = UdpStream::start(&new, &sink.workload, sink.workload.v4.into(), 7001, 4000, 4).unwrap();
    eventually("it has sent", || {
        ensure!(out.so_far().sent > 500);
        Ok(())
    })
    .unwrap();
    let report = out.so_far();
    assert_eq!(report.received, 0, "{report:?}");
    bulkhead.start_agent("host-1").unwrap();
    bulkhead.register(&new, &[("role", "new")]).unwrap();
    reaches(&new, Outcome::Reached);
    reaches(&old.workload, Outcome::Reached);
}

fn entries_written(example: &Example) -> Vec<u64> {
    HOSTS.iter().map(|host| example.bulkhead.agent(host).entries_written().unwrap()).collect()
}

#[test]
fn the_example_explains_itself_as_it_behaves() {
    let example = example("bt-explain");
    example.apply().unwrap();
    for (from, source) in &example.members {
        for (to, destination) in &example.members {
            if from.name == to.name {
                continue;
            }
            let (from_name, to_name) = (source.workload.full_name(), destination.workload.full_name());
            let port = format!("tcp%2F{}", to.port);
            let path = format!("/apis/bulkhead.dev/v1/explain?from={from_name}&to={to_name}&port={port}");
            let answer = eventually("the controller knows both", || example.bulkhead.get(&path)).unwrap();
            let verdict = answer["explanation"]["verdict"].as_str().unwrap_or("?").to_owned();
            let wanted = if expected(from, to) { "allow" } else { "deny" };
            assert_eq!(verdict, wanted, "{from_name} → {to_name}: {answer}");
        }
    }
    let text = example
        .bulkhead
        .ok(&["explain", "--from", "geo-web", "--to", "map-db", "--port", "tcp/5432"])
        .unwrap();
    assert!(text.contains("dmz-to-restricted") && text.contains("zones"), "{text}");
    let directory: &Path = &Example::policies().unwrap();
    let before = example.bulkhead.status().unwrap()["controller"]["revision"].clone();
    example.bulkhead.apply(&[directory]).unwrap();
    let after = example.bulkhead.status().unwrap()["controller"]["revision"].clone();
    assert_eq!(before, after, "what is the same already changes nothing");
}
