//! A flood of half-open connections by one endpoint, beside others that want to be left in peace. Real traffic.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails here")]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bulkhead_dataplane::Dataplane;
use bulkhead_ebpf::EbpfDataplane;
use bulkhead_model::flow::DropReason;
use bulkhead_model::host_policy::{CompiledId, EndpointBinding, HostPolicy};
use bulkhead_model::verdict::Verdict::{Allow, Deny};
use common::live::Namespace;
use common::packet::{Packet, SYN};
use common::{PinRoot, cell, compile, enter_new_namespace, interface, run, small};

/// Connections that wait for their answer while the flood goes on.
const WAITING: usize = 200;
/// Half-open connections that are tried: some five times what the whole table holds.
const FLOOD: u32 = 20_000;
const PATIENCE: Duration = Duration::from_secs(5);

const EVERYTHING: CompiledId = CompiledId(5);
const NOTHING: CompiledId = CompiledId(6);

fn own(number: u8) -> IpAddr {
    [10, 0, number, 2].into()
}

/// The flooder, its victim and the server may do everything; the client may call, and be answered, and nothing else.
fn everybody() -> HostPolicy {
    let policies = [(EVERYTHING, Allow), (NOTHING, Deny)];
    let policies = policies.map(|(id, verdict)| (id, compile(id, &[], &[], cell(verdict, 60 + id.0, true))));
    let binding = |name: &str, number, ingress| {
        let attachment = interface(name);
        let binding =
            EndpointBinding { attachment, addresses: vec![own(number)], ingress, egress: EVERYTHING };
        (Arc::from(name), binding)
    };
    let endpoints = [
        binding("wa", 1, EVERYTHING),
        binding("wb", 2, EVERYTHING),
        binding("wc", 3, NOTHING),
        binding("wd", 4, EVERYTHING),
    ];
    HostPolicy {
        policies: BTreeMap::from(policies),
        endpoints: BTreeMap::from(endpoints),
        ..HostPolicy::default()
    }
}

/// Sends SYNs, each of a connection of its own, from the calling thread's namespace.
fn flood(from: IpAddr, to: IpAddr, count: u32) {
    #[expect(unsafe_code, reason = "raw socket")]
    // SAFETY: numbers only; the descriptor is ours.
    let socket = unsafe {
        let fd = libc::socket(libc::AF_INET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, libc::IPPROTO_RAW);
        assert!(fd >= 0, "{}", std::io::Error::last_os_error());
        OwnedFd::from_raw_fd(fd)
    };
    let IpAddr::V4(target) = to else { unreachable!("IPv4") };
    #[expect(unsafe_code, reason = "raw socket")]
    // SAFETY: plain bytes, of which zero is a value.
    let mut address: libc::sockaddr_in = unsafe { std::mem::zeroed() };
    address.sin_family = libc::AF_INET as libc::sa_family_t;
    address.sin_addr.s_addr = u32::from_ne_bytes(target.octets());
    for number in 0..count {
        let (source, port) = (1024 + (number % 60_000) as u16, 6000 + (number / 60_000) as u16);
        let packet = Packet::tcp(from, source, to, port, SYN).ip();
        #[expect(unsafe_code, reason = "raw socket")]
        // SAFETY: packet and address outlive the call.
        let sent = unsafe {
            libc::sendto(
                socket.as_raw_fd(),
                packet.as_ptr().cast(),
                packet.len(),
                0,
                (&raw const address).cast(),
                size_of::<libc::sockaddr_in>() as libc::socklen_t,
            )
        };
        assert_eq!(usize::try_from(sent).unwrap(), packet.len(), "{}", std::io::Error::last_os_error());
    }
}

#[test]
fn a_flood_of_one_endpoint_costs_no_other_its_connections() {
    enter_new_namespace();
    run("ip link set lo up");
    run("sysctl -qw net.ipv4.ip_forward=1");
    let [a, b, c, d] =
        [("wa", 1), ("wb", 2), ("wc", 3), ("wd", 4)].map(|(name, number)| Namespace::workload(name, number));
    let root = PinRoot::new();
    let mut dataplane = EbpfDataplane::open(root.path(), small()).unwrap();
    for name in ["wa", "wb", "wc", "wd"] {
        dataplane.attach(interface(name)).unwrap();
    }
    dataplane.replace(&everybody()).unwrap();
    // Nobody in there answers the flood: it stays half-open.
    b.exec(|| run("iptables -A OUTPUT -p tcp --tcp-flags RST RST -j DROP"));

    let server = d.exec(|| UdpSocket::bind("10.0.4.2:5001").unwrap());
    server.set_read_timeout(Some(PATIENCE)).unwrap();
    let clients: Vec<UdpSocket> = c.exec(|| {
        (0..WAITING)
            .map(|_| {
                let socket = UdpSocket::bind("10.0.3.2:0").unwrap();
                socket.connect("10.0.4.2:5001").unwrap();
                socket.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
                socket.send(b"?").unwrap();
                socket
            })
            .collect()
    });
    let mut buffer = [0; 8];
    let callers: BTreeSet<SocketAddr> =
        (0..WAITING).map(|_| server.recv_from(&mut buffer).unwrap().1).collect();
    assert_eq!(callers.len(), WAITING);
    let listener = d.exec(|| TcpListener::bind("10.0.4.2:5002").unwrap());
    let mut caller = c.exec(|| TcpStream::connect("10.0.4.2:5002").unwrap());
    let (mut called, _) = listener.accept().unwrap();
    caller.set_read_timeout(Some(PATIENCE)).unwrap();

    a.exec(|| flood(own(1), own(2), FLOOD));
    // Spoofed by the same workload: dropped, named, and no connection of anybody's.
    a.exec(|| flood([10, 0, 9, 9].into(), own(2), FLOOD / 2));

    // Whoever waits for an answer gets it.
    for caller in &callers {
        server.send_to(b"!", caller).unwrap();
    }
    let answered = clients.iter().filter(|socket| socket.recv(&mut [0; 8]).is_ok()).count();
    assert_eq!(answered, WAITING, "answers that arrived");
    // A connection that is there goes on, and a new one comes about.
    for _ in 0..50 {
        caller.write_all(b"?").unwrap();
        called.read_exact(&mut buffer[..1]).unwrap();
        called.write_all(b"!").unwrap();
        caller.read_exact(&mut buffer[..1]).unwrap();
    }
    let begun = Instant::now();
    c.exec(|| TcpStream::connect_timeout(&"10.0.4.2:5002".parse().unwrap(), PATIENCE).unwrap());
    // The flooder and its victim, too: what has no entry yet gets one with its answer.
    let victim = b.exec(|| TcpListener::bind("10.0.2.2:5003").unwrap());
    let mut flooder =
        a.exec(|| TcpStream::connect_timeout(&"10.0.2.2:5003".parse().unwrap(), PATIENCE).unwrap());
    let (mut accepted, _) = victim.accept().unwrap();
    flooder.write_all(b"?").unwrap();
    accepted.read_exact(&mut buffer[..1]).unwrap();
    assert!(begun.elapsed() < Duration::from_secs(1), "a SYN was lost: {:?}", begun.elapsed());

    let mut stats = dataplane.stats().unwrap();
    // Of the time before there were tables: neighbour discovery.
    stats.drops.remove(&DropReason::Unprogrammed);
    assert_eq!(stats.drops.get(&DropReason::Spoofed).copied(), Some(u64::from(FLOOD / 2)));
    assert_eq!(stats.drops.len(), 1, "{:?}", stats.drops);
    // What got no entry was told to nobody, and is counted as that.
    assert!(stats.lost_events > u64::from(FLOOD), "{} of both ends", stats.lost_events);
}
