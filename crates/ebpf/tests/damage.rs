//! Pins that somebody removes while packets flow and while nobody is there, and what comes of connections from before.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails here")]

mod common;

use std::fs;

use bulkhead_dataplane::Dataplane;
use bulkhead_dataplane_testing::traffic::{Running, world_policy};
use bulkhead_ebpf::{ABI_VERSION, EbpfDataplane};
use bulkhead_model::host_policy::HostPolicy;
use bulkhead_model::verdict::Verdict::{self, Allow, Deny};
use common::live::Namespace;
use common::packet::{ACK, Packet, SYN};
use common::{Bench, PinRoot, Rule, enter_new_namespace, interface, policy, run, small};

#[test]
fn no_pin_that_somebody_removes_opens_or_closes_anything() {
    enter_new_namespace();
    run("ip link set lo up");
    run("sysctl -qw net.ipv4.ip_forward=1");
    let (a, b) = (Namespace::workload("wa", 1), Namespace::workload("wb", 2));
    let root = PinRoot::new();
    let mut dataplane = EbpfDataplane::open(root.path(), small()).unwrap();
    dataplane.replace(&world_policy(Allow, 0)).unwrap();
    ["wa", "wb"].iter().for_each(|name| dataplane.attach(interface(name)).unwrap());
    let running = Running::start(&a, &b);
    let pins = files(root.path());
    assert!(pins.len() > 30, "{pins:?}");
    for (number, pin) in pins.iter().enumerate() {
        fs::remove_file(pin).unwrap();
        if number % 8 == 0 {
            running.goes_on();
        }
        let swept = dataplane.sweep(0, &mut |_flow| ()).unwrap();
        assert_eq!((swept.put_back, files(root.path())), (1, pins.clone()), "{}", pin.display());
    }
    drop(PinRoot(root.path().to_owned()));
    assert!(!root.path().exists());
    running.goes_on();
    let swept = dataplane.sweep(0, &mut |_flow| ()).unwrap();
    assert_eq!((swept.put_back, files(root.path())), (pins.len() as u64, pins));
    drop(dataplane);
    running.goes_on();
    let mut next = EbpfDataplane::open(root.path(), small()).unwrap();
    next.replace(&world_policy(Allow, 1)).unwrap();
    running.goes_on();
    let [sent, received, tried, leaked] = running.end();
    println!("allowed {received} of {sent}, leaked {leaked} of {tried}");
    assert_eq!((received, leaked), (sent, 0), "{:?}", next.stats());
}

fn files(directory: &std::path::Path) -> Vec<std::path::PathBuf> {
    let entries = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    let (directories, mut found): (Vec<_>, Vec<_>) = entries.partition(|path| path.is_dir());
    found.extend(directories.iter().flat_map(|directory| files(directory)));
    found.sort();
    found
}

/// A connection that has been silent since it was allowed is judged again, whichever pins have gone meanwhile.
#[test]
fn a_connection_from_before_gets_through_by_no_revision_that_begins_anew() {
    let mut bench = Bench::new();
    let state = |verdict: Verdict| -> HostPolicy {
        let rules = [Rule("10.0.1.0/24", "tcp/80", verdict, 1)];
        policy(bench.ifindex, &["172.16.0.1".parse().unwrap()], &rules, &[], Deny)
    };
    let (allowed, refused) = (state(Allow), state(Deny));
    let packet = |flags| Packet::tcp([10, 0, 1, 7].into(), 40_000, [172, 16, 0, 1].into(), 80, flags);
    bench.dataplane.attach(interface("w")).unwrap();
    bench.dataplane.replace(&allowed).unwrap();
    assert!(bench.to(&packet(SYN)));
    assert!(bench.to(&packet(ACK)));
    bench.dataplane.replace(&refused).unwrap();
    fs::remove_file(bench.root.path().join(format!("v{ABI_VERSION}/config"))).unwrap();
    bench.reopen().unwrap();
    bench.dataplane.replace(&refused).unwrap();
    assert!(!bench.to(&packet(ACK)));
}
