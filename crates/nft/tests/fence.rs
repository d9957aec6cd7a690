//! An interface of a workload's name is closed from the moment it appears, whoever runs or does not.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails here")]

use std::net::UdpSocket;
use std::time::Duration;

use bulkhead_dataplane_testing::namespace::{Namespace, enter_new_namespace, ifindex, run};
use bulkhead_nft::Fence;

/// Whether a datagram comes through, from this host to a workload or back.
fn passes(to_workload: bool, workload: &Namespace, number: u8) -> bool {
    let (host, own) = (format!("10.0.{number}.1:0"), format!("10.0.{number}.2:0"));
    let from_host = UdpSocket::bind(host).unwrap();
    let at_workload = workload.exec(move || UdpSocket::bind(own).unwrap());
    let (from, to) = if to_workload { (&from_host, &at_workload) } else { (&at_workload, &from_host) };
    to.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    let address = to.local_addr().unwrap();
    // Neighbours have to be found first; who is closed finds none.
    (0..3).any(|_| from.send_to(b"?", address).is_ok() && to.recv(&mut [0; 8]).is_ok())
}

fn both(workload: &Namespace, number: u8) -> (bool, bool) {
    (passes(true, workload, number), passes(false, workload, number))
}

#[test]
fn what_appears_is_closed_until_somebody_is_in_charge_of_it() {
    enter_new_namespace();
    run("ip link set lo up");
    let (before, other) = (Namespace::workload("wl0", 1), Namespace::workload("eth0", 2));
    let mut fence = Fence::raise(&["wl*".into(), "tap7".into()], [ifindex("wl0")].into()).unwrap();
    assert!(Fence::is_there().unwrap());
    let (new, named) = (Namespace::workload("wl1", 3), Namespace::workload("tap7", 4));
    assert_eq!((both(&before, 1), both(&other, 2)), ((true, true), (true, true)));
    assert_eq!((both(&new, 3), both(&named, 4)), ((false, false), (false, false)));
    fence.open(ifindex("wl1")).unwrap();
    assert_eq!((both(&new, 3), both(&named, 4)), ((true, true), (false, false)));
    // Nobody runs.
    drop(fence);
    let meanwhile = Namespace::workload("wl2", 5);
    assert_eq!((both(&meanwhile, 5), both(&new, 3)), ((false, false), (true, true)));
    // The next one is in charge of what was open.
    let mut fence = Fence::raise(&["wl*".into()], [ifindex("wl0"), ifindex("wl1")].into()).unwrap();
    assert_eq!((both(&meanwhile, 5), both(&new, 3)), ((false, false), (true, true)));
    assert_eq!(both(&named, 4), (true, true), "it is nobody's by its name any more");
    // Somebody flushes everything, and an interface comes again under the name of one that was open.
    run("nft flush ruleset");
    assert_eq!(both(&meanwhile, 5), (true, true));
    fence.repair().unwrap();
    assert_eq!((both(&meanwhile, 5), both(&new, 3)), ((false, false), (true, true)));
    drop(new);
    let again = loop {
        // The kernel takes the old one away a moment later.
        if std::process::Command::new("ip").args(["link", "show", "wl1"]).output().unwrap().status.success() {
            std::thread::sleep(Duration::from_millis(5));
            continue;
        }
        break Namespace::workload("wl1", 6);
    };
    assert_eq!(both(&again, 6), (false, false));
    fence.open(ifindex("wl1")).unwrap();
    assert_eq!(both(&again, 6), (true, true));
    Fence::remove().unwrap();
    assert!(!Fence::is_there().unwrap());
    assert_eq!(both(&meanwhile, 5), (true, true));
}
