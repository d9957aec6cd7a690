//! An agent takes over from one whose tables have another layout, an older one or, after a downgrade, a newer one: pins of
//! another number, of which it can read nothing. Traffic is counted all the while.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails here")]

mod common;

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use bulkhead_dataplane::Dataplane;
use bulkhead_dataplane_testing::traffic::{Running, world_policy};
use bulkhead_ebpf::{ABI_VERSION, EbpfDataplane};
use bulkhead_model::verdict::Verdict::Allow;
use common::live::Namespace;
use common::{PinRoot, enter_new_namespace, interface, run, small};

/// What another version is known by: nothing but the number in the path of its pins.
fn become_another(root: &PinRoot, version: u32) {
    let path = |version| root.path().join(format!("v{version}"));
    fs::rename(path(ABI_VERSION), path(version)).unwrap();
}

/// Numbered messages over one connection, each sent when the one before has come back, until told to stop: how many.
fn talk(from: &Namespace, to: &Namespace, stop: Arc<AtomicBool>) -> std::thread::JoinHandle<u64> {
    let listener = to.exec(|| TcpListener::bind("10.0.2.2:5001").unwrap());
    let mut caller = from.exec(|| TcpStream::connect("10.0.2.2:5001").unwrap());
    let (mut called, _) = listener.accept().unwrap();
    std::thread::spawn(move || {
        let mut answer = called.try_clone().unwrap();
        std::io::copy(&mut called, &mut answer).unwrap();
    });
    std::thread::spawn(move || {
        caller.set_nodelay(true).unwrap();
        let mut number = 0u64;
        while !stop.load(Relaxed) {
            caller.write_all(&number.to_be_bytes()).unwrap();
            let mut answer = [0; 8];
            caller.read_exact(&mut answer).unwrap();
            assert_eq!(u64::from_be_bytes(answer), number);
            number += 1;
            std::thread::sleep(Duration::from_micros(300));
        }
        number
    })
}

/// A connection that is not allowed comes to nothing. Nobody listens there: a SYN that arrived would be refused.
fn knock(from: &Namespace) {
    let to = "10.0.2.2:5002".parse().unwrap();
    let failed = from.exec(move || TcpStream::connect_timeout(&to, Duration::from_millis(50)).unwrap_err());
    assert_eq!(failed.kind(), ErrorKind::TimedOut, "{failed}");
}

fn hand_over(from: u32) {
    enter_new_namespace();
    run("ip link set lo up");
    run("sysctl -qw net.ipv4.ip_forward=1");
    let (a, b) = (Namespace::workload("wa", 1), Namespace::workload("wb", 2));
    // Behind it is nobody that the next agent knows.
    let _unknown = Namespace::workload("wc", 3);
    let all = [interface("wa"), interface("wb"), interface("wc")];
    let root = PinRoot::new();
    let mut before = EbpfDataplane::open(root.path(), small()).unwrap();
    before.replace(&world_policy(Allow, 0)).unwrap();
    all.into_iter().for_each(|attachment| before.attach(attachment).unwrap());
    let running = Running::start(&a, &b);
    let stop = Arc::new(AtomicBool::new(false));
    let talking = talk(&a, &b, Arc::clone(&stop));
    drop(before);
    become_another(&root, from);
    for _ in 0..3 {
        // As often as it is killed before it has its first tables.
        let next = EbpfDataplane::open(root.path(), small()).unwrap();
        running.goes_on();
        knock(&a);
        assert_eq!(next.attached().unwrap(), all.into(), "whatever was in charge of them");
    }
    let mut next = EbpfDataplane::open(root.path(), small()).unwrap();
    next.replace(&world_policy(Allow, 1)).unwrap();
    running.goes_on();
    knock(&a);
    all.into_iter().for_each(|attachment| next.attach(attachment).unwrap());
    running.goes_on();
    stop.store(true, Relaxed);
    let talked = talking.join().unwrap();
    let [sent, received, tried, leaked] = running.end();
    println!("from {from}: allowed {received} of {sent}, leaked {leaked} of {tried}, {talked} over TCP");
    assert!(talked > 100);
    assert_eq!((received, leaked), (sent, 0), "{:?}", next.stats());
    let pins: Vec<_> = fs::read_dir(root.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(!pins.contains(&format!("v{from}").into()), "nothing is left of it: {pins:?}");
    assert_eq!(next.attached().unwrap(), all.into());
    assert!(!next.read_back().unwrap().endpoints.values().any(|binding| binding.attachment == all[2]));
    next.detach(all[2]).unwrap();
    assert_eq!(next.attached().unwrap(), all[..2].iter().copied().collect());
}

/// One after the other: each needs the machine for its traffic.
#[test]
fn nothing_is_lost_or_leaked_when_an_older_or_newer_layout_is_taken_over() {
    for from in [ABI_VERSION - 1, ABI_VERSION + 1] {
        hand_over(from);
    }
}

#[test]
fn what_another_layout_has_in_charge_can_be_let_go() {
    enter_new_namespace();
    run("ip link set lo up");
    run("ip link add w type veth peer name wp");
    let root = PinRoot::new();
    let mut before = EbpfDataplane::open(root.path(), small()).unwrap();
    before.attach(interface("w")).unwrap();
    drop(before);
    become_another(&root, ABI_VERSION - 1);
    let mut next = EbpfDataplane::open(root.path(), small()).unwrap();
    next.detach(interface("w")).unwrap();
    assert!(next.attached().unwrap().is_empty());
    next.cleanup().unwrap();
    assert!(!root.path().exists());
}
