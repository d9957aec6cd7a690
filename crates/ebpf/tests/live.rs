//! Real traffic between two workloads while tables change and agents come and go.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails here")]

mod common;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use bulkhead_dataplane::Dataplane;
use bulkhead_dataplane_testing::traffic::{Running, change_often, warm_up, world_policy};
use bulkhead_ebpf::EbpfDataplane;
use bulkhead_model::flow::FlowEvent;
use bulkhead_model::host_policy::Attachment;
use bulkhead_model::verdict::Verdict::{Allow, Deny};
use common::live::Namespace;
use common::{PinRoot, enter_new_namespace, ifindex, interface, run, small};

/// Two workloads `wa` (10.0.1.2) and `wb` (10.0.2.2) on a host that routes.
struct World {
    a: Namespace,
    b: Namespace,
    root: PinRoot,
    dataplane: EbpfDataplane,
}

impl World {
    fn new() -> Self {
        enter_new_namespace();
        run("ip link set lo up");
        run("sysctl -qw net.ipv4.ip_forward=1");
        let (a, b) = (Namespace::workload("wa", 1), Namespace::workload("wb", 2));
        let root = PinRoot::new();
        let mut dataplane = EbpfDataplane::open(root.path(), small()).unwrap();
        dataplane.attach(interface("wa")).unwrap();
        dataplane.attach(interface("wb")).unwrap();
        Self { a, b, root, dataplane }
    }
}

#[test]
fn nothing_is_lost_or_leaked_while_tables_and_agents_change() {
    let mut world = World::new();
    world.dataplane.replace(&world_policy(Allow, 0)).unwrap();
    let running = Running::start(&world.a, &world.b);
    change_often(&mut world.dataplane);
    for _ in 0..20 {
        let next = EbpfDataplane::open(world.root.path(), small()).unwrap();
        drop(std::mem::replace(&mut world.dataplane, next));
        running.goes_on();
        world.dataplane.replace(&world_policy(Allow, 0)).unwrap();
    }
    let [sent, received, tried, leaked] = running.end();
    println!("allowed {received} of {sent}, leaked {leaked} of {tried}");
    assert!(sent > 10_000);
    assert_eq!((received, leaked), (sent, 0), "{:?}", world.dataplane.stats());
}

#[test]
fn revocation_cuts_a_live_tcp_connection() {
    let mut world = World::new();
    world.dataplane.replace(&world_policy(Allow, 0)).unwrap();
    let _warm = warm_up(&world.a, &world.b);
    let listener = world.b.exec(|| TcpListener::bind("10.0.2.2:5001").unwrap());
    let mut caller = world.a.exec(|| TcpStream::connect("10.0.2.2:5001").unwrap());
    let (mut called, _) = listener.accept().unwrap();
    called.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    let mut buffer = [0; 16];
    caller.write_all(b"one").unwrap();
    assert_eq!(called.read(&mut buffer).unwrap(), 3);
    world.dataplane.replace(&world_policy(Deny, 0)).unwrap();
    caller.write_all(b"two").unwrap();
    assert!(called.read(&mut buffer).is_err(), "cut");
    called.write_all(b"and the other way").unwrap();
    caller.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    assert!(caller.read(&mut buffer).is_err(), "cut both ways");
    let mut kinds = Vec::new();
    world.dataplane.poll(&mut |flow| kinds.push((flow.event, flow.key.attachment))).unwrap();
    assert!(kinds.contains(&(FlowEvent::Change, interface("wb"))), "{kinds:?}");
    world.dataplane.replace(&world_policy(Allow, 0)).unwrap();
    called.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    assert_eq!(called.read(&mut buffer).unwrap(), 3, "allowed again, retransmission arrives");
}

#[test]
fn an_interface_that_goes_is_forgotten() {
    let mut world = World::new();
    let gone = ifindex("wb");
    assert_eq!(world.dataplane.attached().unwrap().len(), 2);
    run("ip link del wb");
    let again = EbpfDataplane::open(world.root.path(), small()).unwrap();
    world.dataplane = again;
    assert_eq!(world.dataplane.attached().unwrap(), [interface("wa")].into());
    assert!(matches!(
        world.dataplane.attach(Attachment::Interface(gone)),
        Err(bulkhead_dataplane::DataplaneError::Gone { attachment: Attachment::Interface(index) }) if index == gone
    ));
    world.dataplane.detach(Attachment::Interface(gone)).unwrap();
    world.dataplane.cleanup().unwrap();
    assert!(!world.root.path().exists());
}

#[test]
fn a_large_transfer_of_merged_segments_is_counted() {
    const BYTES: usize = 16 << 20;
    let mut world = World::new();
    world.dataplane.replace(&world_policy(Allow, 0)).unwrap();
    let _warm = warm_up(&world.a, &world.b);
    let listener = world.b.exec(|| TcpListener::bind("10.0.2.2:5001").unwrap());
    let mut caller = world.a.exec(|| TcpStream::connect("10.0.2.2:5001").unwrap());
    let (mut called, _) = listener.accept().unwrap();
    let sender = std::thread::spawn(move || caller.write_all(&vec![7; BYTES]).unwrap());
    let mut received = Vec::new();
    called.read_to_end(&mut received).unwrap();
    assert_eq!(received.len(), BYTES);
    sender.join().unwrap();
    drop(called);
    let wb = interface("wb");
    let mut closed = Vec::new();
    let deadline = Instant::now() + Duration::from_secs(10);
    while closed.is_empty() && Instant::now() < deadline {
        let mut keep = |flow: bulkhead_model::flow::RawFlow| {
            if flow.event == FlowEvent::Close && flow.key.attachment == wb {
                closed.push(flow);
            }
        };
        world.dataplane.poll(&mut keep).unwrap();
    }
    let counters = closed[0].counters;
    assert!(counters.bytes_forward > BYTES as u64, "{counters:?}");
    // Merged segments count one by one: no packet is larger than the interface carries.
    assert!(counters.packets_forward > (BYTES / 1500) as u64, "{counters:?}");
}
