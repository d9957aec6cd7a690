//! What somebody else does to the tables and pins of the eBPF dataplane, under traffic.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::ensure;
use bulkhead_testbed::{Bulkhead, Outcome, Protocol, eventually};
use libbpf_rs::{MapCore, MapHandle};

use crate::common::{CLIENT_TO_SERVER, member, outcome, start_with, wait_outcome};
use crate::traffic::Traffic;

const HOSTS: [&str; 2] = ["host-1", "host-2"];
const SERVED: u16 = 5000;

/// Pins are eBPF's, whatever the other tests run over.
fn start(prefix: &str) -> Bulkhead {
    start_with(prefix, &HOSTS, &["--dataplane", "ebpf"])
}

/// All files below a directory.
fn files(directory: &Path) -> BTreeSet<PathBuf> {
    let mut found = BTreeSet::new();
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            found.extend(files(&path));
        } else {
            found.insert(path);
        }
    }
    found
}

#[test]
fn pins_that_somebody_removes_are_put_back_and_nothing_is_lost_or_leaked() {
    let mut bulkhead = start("bt-pins");
    let server = member(&bulkhead, "host-2", "server", &[("role", "server")], &[SERVED]);
    let client = member(&bulkhead, "host-1", "client", &[("role", "client")], &[SERVED]);
    let stranger = member(&bulkhead, "host-1", "stranger", &[("role", "stranger")], &[SERVED]);
    bulkhead.apply_text("server.yaml", CLIENT_TO_SERVER).unwrap();
    wait_outcome(&client.workload, &server.workload, Protocol::Tcp(SERVED), Outcome::Reached);
    wait_outcome(&stranger.workload, &server.workload, Protocol::Tcp(SERVED), Outcome::Silent);
    let traffic = Traffic::start(&client.workload, &stranger.workload, &server.workload, SERVED);
    for host in ["host-2", "host-1"] {
        let pins = bulkhead.lab.pin_directory(host);
        let before = files(&pins);
        // A table, the link of a program of an interface, that of one of netfilter's hooks; then all of them.
        let named = |part: &str| before.iter().find(|path| path.to_string_lossy().contains(part)).unwrap();
        let parts = [named("/addr_lpm"), named("-to"), named("/gates/enter_forward")];
        for part in parts {
            std::fs::remove_file(part).unwrap();
        }
        wait_files(&pins, &before);
        traffic.goes_on();
        std::fs::remove_dir_all(&pins).unwrap();
        traffic.goes_on();
        wait_files(&pins, &before);
        // They are the same tables and links: the next agent takes them over.
        bulkhead.kill_agent(host);
        traffic.goes_on();
        bulkhead.start_agent(host).unwrap();
        bulkhead.wait_connected().unwrap();
        traffic.goes_on();
        assert!(bulkhead.agent(host).log().contains("put back"), "{}", bulkhead.agent(host).log());
        bulkhead.on_host(host, &["dataplane", "status"]).unwrap();
    }
    traffic.end("pins removed");
}

fn wait_files(directory: &Path, wanted: &BTreeSet<PathBuf>) {
    eventually("the pins are back", || {
        let found = files(directory);
        ensure!(found == *wanted, "missing: {:?}", wanted.difference(&found).collect::<Vec<_>>());
        Ok(())
    })
    .unwrap();
}

#[test]
fn tables_that_somebody_empties_close_are_told_of_and_filled_by_the_next_agent() {
    let mut bulkhead = start("bt-empty");
    let server = member(&bulkhead, "host-2", "server", &[("role", "server")], &[SERVED]);
    let client = member(&bulkhead, "host-1", "client", &[("role", "client")], &[SERVED]);
    let stranger = member(&bulkhead, "host-1", "stranger", &[("role", "stranger")], &[SERVED]);
    bulkhead.apply_text("server.yaml", CLIENT_TO_SERVER).unwrap();
    let (server, client, stranger) = (&server.workload, &client.workload, &stranger.workload);
    wait_outcome(client, server, Protocol::Tcp(SERVED), Outcome::Reached);
    wait_outcome(stranger, server, Protocol::Tcp(SERVED), Outcome::Silent);
    let traffic = Traffic::start(client, stranger, server, SERVED);
    let status = |bulkhead: &Bulkhead| bulkhead.on_host("host-2", &["dataplane", "status"]);
    let pins = bulkhead.lab.pin_directory("host-2");
    for table in ["endpoints", "addr_exact", "rows", "cells", "conns"] {
        status(&bulkhead).unwrap();
        let emptied = empty(&pins, table);
        assert!(emptied > 0, "{table} had no entries");
        // What is forbidden is tried often enough.
        for _ in 0..10 {
            assert_eq!(outcome(stranger, server, Protocol::Udp(SERVED)), Outcome::Silent, "{table} emptied");
        }
        traffic.assert_nothing_leaked();
        // A connection that is forgotten is judged again; all else is missed.
        assert_eq!(status(&bulkhead).is_err(), table != "conns", "{table}: {:?}", status(&bulkhead));
        if let Err(difference) = status(&bulkhead) {
            let text = difference.to_string();
            assert!(text.contains("difference") || text.contains("cannot be read back"), "{table}: {text}");
        }
        bulkhead.kill_agent("host-2");
        bulkhead.start_agent("host-2").unwrap();
        bulkhead.wait_connected().unwrap();
        wait_outcome(client, server, Protocol::Tcp(SERVED), Outcome::Reached);
        eventually("all is as it should be", || status(&bulkhead)).unwrap();
        traffic.assert_nothing_leaked();
        traffic.goes_on();
    }
    traffic.assert_nothing_leaked();
}

/// Deletes every entry of a table, in all of its banks; answers how many there were.
fn empty(pins: &Path, table: &str) -> usize {
    let version = std::fs::read_dir(pins).unwrap().map(|entry| entry.unwrap().path());
    let version = version.filter(|path| path.file_name().unwrap().to_string_lossy().starts_with('v'));
    let path = version.map(|version| version.join(table)).next().unwrap();
    let map = MapHandle::from_pinned_path(path).unwrap();
    let keys: Vec<Vec<u8>> = map.keys().collect();
    keys.iter().filter(|key| map.delete(key).is_ok()).count()
}
