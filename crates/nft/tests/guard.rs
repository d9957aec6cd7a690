//! Interfaces of workloads that nobody is in charge of yet: closed by their names, whoever reacts how late.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails here")]

mod common;

use std::collections::BTreeSet;
use std::net::UdpSocket;
use std::time::Duration;

use bulkhead_dataplane::Dataplane;
use bulkhead_dataplane_testing::namespace::{Namespace, enter_new_namespace, ifindex, interface, run};
use bulkhead_dataplane_testing::world::{EVERYTHING, End, tables};
use bulkhead_model::flow::DropReason;
use bulkhead_nft::{Capacities, NftDataplane};
use common::listing;

fn named(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

/// Whether a datagram gets from one to the other.
fn gets(from: &Namespace, to: &Namespace, address: &'static str) -> bool {
    let socket = to.exec(move || UdpSocket::bind((address, 7001)).unwrap());
    socket.set_read_timeout(Some(Duration::from_millis(150))).unwrap();
    from.exec(move || {
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        let _refused = socket.send_to(b"?", (address, 7001));
    });
    socket.recv(&mut [0; 8]).is_ok()
}

fn host_gets(from: &Namespace, address: &'static str) -> bool {
    let socket = UdpSocket::bind((address, 7002)).unwrap();
    socket.set_read_timeout(Some(Duration::from_millis(150))).unwrap();
    from.exec(move || {
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        socket.send_to(b"?", (address, 7002)).unwrap();
    });
    socket.recv(&mut [0; 8]).is_ok()
}

#[test]
fn what_has_a_workloads_name_is_closed_before_anybody_is_in_charge() {
    enter_new_namespace();
    run("ip link set lo up");
    run("sysctl -qw net.ipv4.ip_forward=1");
    let older = Namespace::workload("wl0", 4);
    let (foreign, other) = (Namespace::workload("fo1", 1), Namespace::workload("fo2", 2));
    let mut dataplane = NftDataplane::open(Capacities::default()).unwrap();
    let names = named(&["wl*", "tap0"]);
    dataplane.guard(&names, &BTreeSet::from([ifindex("wl0")])).unwrap();
    // Nobody attaches it.
    let new = Namespace::workload("wl1", 3);
    assert!(!gets(&new, &foreign, "10.0.1.2"), "what it sends");
    assert!(!gets(&foreign, &new, "10.0.3.2"), "what is sent to it");
    assert!(!host_gets(&new, "10.0.3.1"), "what it says to the host");
    assert!(
        gets(&foreign, &other, "10.0.2.2") && host_gets(&foreign, "10.0.1.1"),
        "others' traffic is others'"
    );
    assert!(gets(&older, &foreign, "10.0.1.2"), "what was there first is left alone");
    assert!(dataplane.stats().unwrap().drops[&DropReason::Unprogrammed] >= 3);
    let text = listing();
    assert!(text.contains("chain guard") && text.contains("set spared"), "nft can print it: {text}");
    // Whoever takes over, or repairs, knows of it.
    let mut dataplane = NftDataplane::open(Capacities::default()).unwrap();
    for damage in ["nft add table inet somebody", "nft delete table netdev bulkhead", "nft flush ruleset"] {
        assert!(!gets(&new, &foreign, "10.0.1.2"), "before {damage}");
        assert!(gets(&older, &foreign, "10.0.1.2"), "before {damage}");
        run(damage);
        dataplane.poll(&mut |_| ()).unwrap();
        dataplane.guard(&names, &BTreeSet::from([ifindex("wl0")])).unwrap();
    }
    run("nft flush set inet bulkhead guarded");
    assert!(gets(&new, &foreign, "10.0.1.2"), "it is this that closes");
    dataplane.poll(&mut |_| ()).unwrap();
    assert!(!gets(&new, &foreign, "10.0.1.2"), "repaired");
    // In charge, its policy decides.
    let policy = tables(&[End(interface("wl1"), &["10.0.3.2"], &[], EVERYTHING)]);
    dataplane.replace(&policy).unwrap();
    assert!(!gets(&new, &foreign, "10.0.1.2"), "not yet in charge");
    dataplane.attach(interface("wl1")).unwrap();
    assert!(gets(&new, &foreign, "10.0.1.2") && !gets(&foreign, &new, "10.0.3.2"));
    dataplane.detach(interface("wl1")).unwrap();
    assert!(!gets(&new, &foreign, "10.0.1.2"), "and nobody's again");
    dataplane.guard(&[], &BTreeSet::new()).unwrap();
    assert!(gets(&new, &foreign, "10.0.1.2"), "not a workload's any more");
}
