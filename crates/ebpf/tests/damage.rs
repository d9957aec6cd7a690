//! Pins that somebody removes while packets flow.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails here")]

mod common;

use std::fs;

use bulkhead_dataplane::Dataplane;
use bulkhead_dataplane_testing::traffic::{Running, world_policy};
use bulkhead_ebpf::{ABI_VERSION, EbpfDataplane};
use bulkhead_model::verdict::Verdict::Allow;
use common::live::Namespace;
use common::{PinRoot, enter_new_namespace, interface, run, small};

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
