//! Real traffic between two workloads while tables change and agents come and go.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails here")]

mod common;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bulkhead_dataplane::Dataplane;
use bulkhead_ebpf::EbpfDataplane;
use bulkhead_model::flow::FlowEvent;
use bulkhead_model::host_policy::Attachment;
use bulkhead_model::host_policy::{ClassId, CompiledId, EndpointBinding, HostDelta, HostPolicy};
use bulkhead_model::verdict::Verdict::{self, Allow, Deny};
use common::live::{Namespace, enlarge};
use common::{PinRoot, Rule, enter_new_namespace, ifindex, interface, policy, run, small};

const SOCKETS: usize = 32;

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

/// `wb` may be called on port 5001 by 10.0.1.0/24, and not on 5002. The shift makes ids and classes differ
/// between two policies of the same meaning.
fn world_policy(tcp: Verdict, shift: u32) -> HostPolicy {
    let rules = [
        Rule("10.0.1.0/24", "udp/5001", Allow, 20 + shift),
        Rule("10.0.1.0/24", "tcp/5001", tcp, 21 + shift),
        Rule("10.0.1.0/24", "udp/5002", Deny, 22 + shift),
    ];
    let mut whole = policy(ifindex("wb"), &["10.0.2.2".parse().unwrap()], &rules, &[], Deny);
    if shift > 0 {
        // Another class for the same peers, and a longer prefix that says the same.
        let host = "10.0.1.2/32".parse().unwrap();
        whole.addresses.insert(host, ClassId(7));
        for compiled in whole.policies.values_mut() {
            let row = Arc::clone(&compiled.rows[&ClassId(1)]);
            compiled.rows.insert(ClassId(7), row);
        }
    }
    let free = common::compile(CompiledId(5), &[], &[], common::cell(Allow, 60, false));
    whole.policies.insert(CompiledId(5), free);
    let binding = EndpointBinding {
        attachment: interface("wa"),
        addresses: vec!["10.0.1.2".parse().unwrap()],
        ingress: CompiledId(5),
        egress: CompiledId(5),
    };
    whole.endpoints.insert("a".into(), binding);
    whole
}

/// Counts of a continuous exchange.
#[derive(Default)]
struct Traffic {
    stop: AtomicBool,
    stop_receiving: AtomicBool,
    sent: AtomicU64,
    denied_sent: AtomicU64,
    received: AtomicU64,
    leaked: AtomicU64,
}

fn receive(socket: UdpSocket, traffic: Arc<Traffic>, counter: fn(&Traffic) -> &AtomicU64) -> JoinHandle<()> {
    enlarge(&socket);
    socket.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
    std::thread::spawn(move || {
        let mut buffer = [0; 64];
        while !traffic.stop_receiving.load(Relaxed) {
            if socket.recv(&mut buffer).is_ok() {
                counter(&traffic).fetch_add(1, Relaxed);
            }
        }
    })
}

/// Sends to both ports from changing source ports, so that old and new connections are on the way.
fn send(world: &World, traffic: Arc<Traffic>) -> JoinHandle<()> {
    let open =
        || -> Vec<UdpSocket> { (0..SOCKETS).map(|_| UdpSocket::bind("10.0.1.2:0").unwrap()).collect() };
    let mut sockets = world.a.exec(open);
    let renew = {
        let (requests, inbox) = std::sync::mpsc::channel::<std::sync::mpsc::Sender<UdpSocket>>();
        let bind = move || {
            inbox.into_iter().for_each(|reply| reply.send(UdpSocket::bind("10.0.1.2:0").unwrap()).unwrap())
        };
        let tid = world.a.tid;
        std::thread::spawn(move || {
            let path = format!("/proc/self/task/{tid}/ns/net");
            let file = std::fs::File::open(path).unwrap();
            #[expect(unsafe_code, reason = "system call without a safe wrapper")]
            // SAFETY: affects this thread only.
            let result = unsafe { libc::setns(std::os::fd::AsRawFd::as_raw_fd(&file), libc::CLONE_NEWNET) };
            assert_eq!(result, 0);
            bind();
        });
        requests
    };
    std::thread::spawn(move || {
        let mut round = 0usize;
        while !traffic.stop.load(Relaxed) {
            let slot = round % SOCKETS;
            if round.is_multiple_of(7) {
                let (reply, answer) = std::sync::mpsc::channel();
                renew.send(reply).unwrap();
                sockets[slot] = answer.recv().unwrap();
            }
            sockets[slot].send_to(b"yes", "10.0.2.2:5001").unwrap();
            traffic.sent.fetch_add(1, Relaxed);
            sockets[slot].send_to(b"no", "10.0.2.2:5002").unwrap();
            traffic.denied_sent.fetch_add(1, Relaxed);
            round += 1;
            let behind = || traffic.sent.load(Relaxed).saturating_sub(traffic.received.load(Relaxed)) > 500;
            let started = Instant::now();
            while behind() && started.elapsed() < Duration::from_millis(100) {
                std::thread::yield_now();
            }
        }
    })
}

/// Waits for a condition; false at the deadline.
fn wait(condition: impl Fn() -> bool) -> bool {
    let deadline = Instant::now() + Duration::from_secs(10);
    while Instant::now() < deadline {
        if condition() {
            return true;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    false
}

fn warm_up(world: &World) -> (UdpSocket, UdpSocket) {
    let bind = |port: u16| world.b.exec(move || UdpSocket::bind(("10.0.2.2", port)).unwrap());
    let (allowed, denied) = (bind(5001), bind(5002));
    allowed.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    let probe = world.a.exec(|| UdpSocket::bind("10.0.1.2:0").unwrap());
    let deadline = Instant::now() + Duration::from_secs(10);
    // Neighbours have to be resolved first.
    while Instant::now() < deadline {
        probe.send_to(b"hello", "10.0.2.2:5001").unwrap();
        if allowed.recv(&mut [0; 8]).is_ok() {
            while allowed.recv(&mut [0; 8]).is_ok() {}
            return (allowed, denied);
        }
    }
    panic!("no packet arrived: {:?}", world.dataplane.stats());
}

#[test]
fn nothing_is_lost_or_leaked_while_tables_and_agents_change() {
    let mut world = World::new();
    world.dataplane.replace(&world_policy(Allow, 0)).unwrap();
    let (allowed, denied) = warm_up(&world);
    let traffic = Arc::new(Traffic::default());
    let mut threads = vec![
        receive(allowed, Arc::clone(&traffic), |traffic| &traffic.received),
        receive(denied, Arc::clone(&traffic), |traffic| &traffic.leaked),
    ];
    let sender = send(&world, Arc::clone(&traffic));
    let mut longest = Duration::ZERO;
    for round in 0..200 {
        let applied = world.dataplane.replace(&world_policy(Allow, (round + 1) % 2)).unwrap();
        longest = longest.max(applied.duration);
    }
    println!("replace: longest {longest:?}");
    for round in 0..200u32 {
        world.dataplane.apply(&rebinding(round)).unwrap();
        world.dataplane.poll(&mut |_flow| ()).unwrap();
    }
    for _ in 0..20 {
        let before = traffic.received.load(Relaxed);
        let ended =
            std::mem::replace(&mut world.dataplane, EbpfDataplane::open(world.root.path(), small()).unwrap());
        drop(ended);
        assert!(wait(|| traffic.received.load(Relaxed) > before + 100), "enforced without an agent");
        world.dataplane.replace(&world_policy(Allow, 0)).unwrap();
    }
    finish(&traffic, sender, &mut threads);
    let (sent, received) = (traffic.sent.load(Relaxed), traffic.received.load(Relaxed));
    let (tried, leaked) = (traffic.denied_sent.load(Relaxed), traffic.leaked.load(Relaxed));
    println!("allowed {received} of {sent}, leaked {leaked} of {tried}");
    assert!(sent > 10_000);
    assert_eq!((received, leaked), (sent, 0), "{:?}", world.dataplane.stats());
}

/// Binds `wb` to a copy of its policy under another id, and removes the one before.
fn rebinding(round: u32) -> HostDelta {
    let whole = world_policy(Allow, 0);
    let old = if round == 0 { common::INGRESS } else { CompiledId(100 + round - 1) };
    let new = CompiledId(100 + round);
    let mut compiled = whole.policies[&common::INGRESS].clone();
    compiled.id = new;
    // The class of the peer changes with it: a new row first, then the address.
    let class = ClassId(1000 + round);
    let row = Arc::clone(&compiled.rows[&ClassId(1)]);
    compiled.rows.insert(class, row);
    let mut binding = whole.endpoints["w"].clone();
    binding.ingress = new;
    HostDelta {
        rows: vec![(old, class, Arc::clone(&compiled.rows[&class]))],
        policies: vec![compiled],
        addresses: [("10.0.1.2/32".parse().unwrap(), Some(class))].into(),
        endpoints: [("w".into(), Some(binding))].into(),
        removed_policies: vec![old],
        ..HostDelta::default()
    }
}

/// Stops the sender, lets the last packets arrive, then stops the receivers.
fn finish(traffic: &Arc<Traffic>, sender: JoinHandle<()>, receivers: &mut Vec<JoinHandle<()>>) {
    traffic.stop.store(true, Relaxed);
    sender.join().unwrap();
    let _arrived = wait(|| traffic.received.load(Relaxed) >= traffic.sent.load(Relaxed));
    traffic.stop_receiving.store(true, Relaxed);
    for receiver in receivers.drain(..) {
        receiver.join().unwrap();
    }
}

#[test]
fn revocation_cuts_a_live_tcp_connection() {
    let mut world = World::new();
    world.dataplane.replace(&world_policy(Allow, 0)).unwrap();
    let _warm = warm_up(&world);
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
        Err(bulkhead_dataplane::DataplaneError::InterfaceGone { ifindex }) if ifindex == gone
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
    let _warm = warm_up(&world);
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
