//! 100 000 connections and floods beside legitimate requests, on one host, with the default sizes of the tables.

use std::collections::BTreeMap;
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, ensure};
use bulkhead_dataplane::Dataplane;
use bulkhead_discover::links;
use bulkhead_ebpf::{Capacities, EbpfDataplane};
use bulkhead_model::Verdict;
use bulkhead_model::flow::DropReason;
use bulkhead_model::host_policy::{
    Attachment, Cell, CompiledId, CompiledPolicy, EndpointBinding, HostPolicy, Row, RuleId,
};

use crate::netns::{Namespace, host, run};
use crate::report::Line;
use crate::stats::median;
use crate::{Effort, progress};

const EVERYTHING: CompiledId = CompiledId(1);
const NOTHING: CompiledId = CompiledId(2);
const ECHO_PORT: u16 = 7001;
const WAIT_PORT: u16 = 7003;
const ACK: u8 = 0x10;
const SYN: u8 = 0x02;
/// Calls that wait for their answer while a flood goes on.
const WAITING: usize = 1000;
/// Longest that a request may take: what takes longer is lost.
const PATIENCE: Duration = Duration::from_secs(2);
/// TCP sends again what is not acknowledged by then: something was lost, or the machine had no time.
const RETRANSMITTED_AFTER: Duration = Duration::from_millis(200);
/// Source ports of raw packets.
const PORTS: u32 = 50_000;

/// Measures connections, a flood and memory in one world.
pub(crate) fn measure(effort: Effort) -> anyhow::Result<Vec<Line>> {
    host()?.exec(move || World::new()?.measure(effort))?
}

/// 10.0.N.2.
fn own(number: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 0, number, 2)
}

/// Who is here: a client and its server, two flooders and their victim.
struct World {
    client: Namespace,
    server: Namespace,
    flooder: Namespace,
    /// Nobody asks it anything; it only has to be there.
    _victim: Namespace,
    dataplane: EbpfDataplane,
}

const NAMES: [&str; 4] = ["client", "server", "flooder", "victim"];

impl World {
    fn new() -> anyhow::Result<Self> {
        let workload = |number: u8| Namespace::workload(NAMES[usize::from(number) - 1], number);
        let (client, server, flooder, victim) = (workload(1)?, workload(2)?, workload(3)?, workload(4)?);
        for namespace in [&server, &victim] {
            // What raw packets began, no kernel knows: it must not end it.
            namespace.exec(|| run("iptables -A OUTPUT -p tcp --tcp-flags RST RST -j DROP"))??;
        }
        let root = PathBuf::from(format!("/sys/fs/bpf/bulkhead-bench-{}-flood", std::process::id()));
        let mut dataplane = EbpfDataplane::open(&root, Capacities::default())?;
        dataplane.replace(&policy()?)?;
        for name in NAMES {
            dataplane.attach(Attachment::Interface(links::interface(name)?))?;
        }
        Ok(Self { client, server, flooder, _victim: victim, dataplane })
    }

    fn measure(mut self, effort: Effort) -> anyhow::Result<Vec<Line>> {
        progress("flood: 100 000 connections");
        let quiet = self.requests(effort, None)?;
        let connections = effort.pick(100_000, 20_000);
        self.client.exec(move || send(own(1), own(2), connections, ACK))??;
        let held = self.connections()?;
        let beside = self.requests(effort, None)?;
        progress("flood: half-open connections");
        let waiting = self.wait_for_answers()?;
        let flooded = self.requests(effort, Some(own(3)))?;
        let answered = waiting.answers()?;
        progress("flood: spoofed sources");
        let spoofed = self.requests(effort, Some(Ipv4Addr::new(10, 9, 9, 9)))?;
        let after = self.connections()?;
        let drops = self.dataplane.stats()?.drops;
        let refused = drops.get(&DropReason::Spoofed).copied().unwrap_or(0);
        // Before there were tables: neighbour discovery.
        let known = [DropReason::Spoofed, DropReason::Unprogrammed];
        let wrongly: u64 =
            drops.iter().filter(|(reason, _)| !known.contains(reason)).map(|(_, count)| count).sum();
        ensure!(refused > 0 && flooded.sent > 0, "no flood took place");
        let megabytes = memory()?;
        self.dataplane.cleanup()?;
        let wanted = 2 * u64::from(connections);
        let line = |name: &str, requests: &Requests| {
            Line::new(format!("requests beside {name}"), "µs", requests.median)
                .beside("nothing else", quiet.median)
                .beside("99th percentile", requests.high)
                .beside("lost", requests.lost as f64)
                .beside("later than 200 ms", requests.late as f64)
                .budget("none lost", requests.lost == 0)
        };
        Ok(vec![
            Line::new(format!("entries of {connections} connections, one at each end"), "", held as f64)
                .beside("wanted", wanted as f64)
                .budget("all of them", held >= wanted),
            line(&format!("{connections} connections"), &beside),
            line("a flood of SYNs", &flooded).beside("SYNs per second", flooded.rate),
            line("a flood of spoofed SYNs", &spoofed).beside("SYNs per second", spoofed.rate),
            Line::new("calls answered after the flood of SYNs", "", answered as f64)
                .beside("waiting", WAITING as f64)
                .budget("all of them", answered == WAITING),
            Line::new("packets refused that should have passed", "", wrongly as f64)
                .beside("spoofed, refused", refused as f64)
                .budget("none", wrongly == 0),
            Line::new("entries of connections after both floods", "", after as f64)
                .beside("capacity", f64::from(Capacities::default().conns)),
            Line::new("memory of all tables, default sizes", "MB", megabytes),
        ])
    }

    /// Live entries of all endpoints.
    fn connections(&mut self) -> anyhow::Result<u64> {
        self.dataplane.poll(&mut |_flow| {})?;
        self.dataplane.sweep(now_ns(), &mut |_flow| {})?;
        let tables = self.dataplane.stats()?.tables;
        let conns = tables.iter().find(|table| table.table == "conns");
        conns.map(|conns| conns.used).ok_or_else(|| anyhow!("no table of connections"))
    }

    /// Requests on one connection, each tenth on a connection of its own, meanwhile perhaps a flood.
    fn requests(&self, effort: Effort, flood_from: Option<Ipv4Addr>) -> anyhow::Result<Requests> {
        let listener = self.server.exec(|| TcpListener::bind((own(2), ECHO_PORT)))??;
        let stop = Arc::new(AtomicBool::new(false));
        let echo = std::thread::spawn({
            let stop = Arc::clone(&stop);
            move || serve(&listener, &stop)
        });
        let flood = flood_from.map(|from| {
            let stop = Arc::clone(&stop);
            let path = self.flooder.path();
            std::thread::spawn(move || -> anyhow::Result<(u64, f64)> {
                enter(&path)?;
                let (started, mut sent) = (Instant::now(), 0);
                while !stop.load(Ordering::Relaxed) {
                    send_from(from, own(4), sent, 1000, SYN)?;
                    sent += 1000;
                }
                Ok((u64::from(sent), f64::from(sent) / started.elapsed().as_secs_f64()))
            })
        });
        let time = Duration::from_millis(effort.pick(5000, 700));
        let measured = self.client.exec(move || ask(time));
        stop.store(true, Ordering::Relaxed);
        let flood = flood.map(|flood| flood.join().map_err(|_panic| anyhow!("the flooder panicked"))?);
        // Wakes the listener, which then sees that it is over.
        self.client.exec(|| drop(TcpStream::connect((own(2), ECHO_PORT))))?;
        let _panicked = echo.join();
        let (sent, rate) = flood.transpose()?.unwrap_or((0, 0.0));
        Ok(Requests { sent, rate, ..measured?? })
    }

    /// Calls that only their own entries let the answers of through.
    fn wait_for_answers(&self) -> anyhow::Result<Waiting> {
        let server = self.server.exec(|| UdpSocket::bind((own(2), WAIT_PORT)))??;
        server.set_read_timeout(Some(PATIENCE))?;
        let inbox = server.try_clone()?;
        let called = self.client.exec(move || -> anyhow::Result<Vec<(UdpSocket, SocketAddr)>> {
            let call = |_| {
                let socket = UdpSocket::bind((own(1), 0))?;
                socket.connect((own(2), WAIT_PORT))?;
                socket.set_read_timeout(Some(Duration::from_millis(100)))?;
                socket.send(b"?")?;
                let (_, caller) = inbox.recv_from(&mut [0; 8]).context("a call did not arrive")?;
                Ok((socket, caller))
            };
            (0..WAITING).map(call).collect()
        })??;
        let (clients, callers) = called.into_iter().unzip();
        Ok(Waiting { server, clients, callers })
    }
}

struct Waiting {
    server: UdpSocket,
    clients: Vec<UdpSocket>,
    callers: Vec<SocketAddr>,
}

impl Waiting {
    fn answers(self) -> anyhow::Result<usize> {
        for caller in &self.callers {
            self.server.send_to(b"!", caller)?;
        }
        Ok(self.clients.iter().filter(|client| client.recv(&mut [0; 8]).is_ok()).count())
    }
}

/// What became of requests; times in µs.
struct Requests {
    median: f64,
    high: f64,
    lost: u64,
    late: u64,
    sent: u64,
    rate: f64,
}

fn ask(time: Duration) -> anyhow::Result<Requests> {
    let open = || -> std::io::Result<TcpStream> {
        let stream = TcpStream::connect_timeout(&(own(2), ECHO_PORT).into(), PATIENCE)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(stream)
    };
    let exchange = |stream: &mut TcpStream| -> std::io::Result<()> {
        stream.write_all(&[0])?;
        stream.read_exact(&mut [0])
    };
    let (mut standing, mut times, mut lost, mut late) = (open()?, Vec::new(), 0, 0);
    let started = Instant::now();
    for number in 0_u32.. {
        if started.elapsed() >= time {
            break;
        }
        let begun = Instant::now();
        let done = if number % 10 == 0 {
            open().and_then(|mut stream| exchange(&mut stream))
        } else {
            exchange(&mut standing)
        };
        let taken = begun.elapsed();
        if done.is_err() {
            lost += 1;
            standing = open()?;
            continue;
        }
        late += u64::from(taken > RETRANSMITTED_AFTER);
        if number % 10 != 0 {
            times.push(taken.as_secs_f64() * 1e6);
        }
    }
    times.sort_by(f64::total_cmp);
    let high = times.get(times.len() * 99 / 100).copied().unwrap_or_default();
    Ok(Requests { median: median(&times), high, lost, late, sent: 0, rate: 0.0 })
}

fn serve(listener: &TcpListener, stop: &AtomicBool) {
    for stream in listener.incoming().flatten() {
        if stop.load(Ordering::Relaxed) {
            return;
        }
        std::thread::spawn(move || {
            let mut stream = stream;
            // The client complains of what breaks.
            let _ = stream.set_nodelay(true);
            let mut byte = [0];
            while matches!(stream.read(&mut byte), Ok(1)) {
                if stream.write_all(&byte).is_err_and(|error| error.kind() != ErrorKind::Interrupted) {
                    return;
                }
            }
        });
    }
}

/// All may do everything; but the client may only call.
fn policy() -> anyhow::Result<HostPolicy> {
    let cell = |verdict, rule| Cell {
        verdict,
        rule: RuleId(rule),
        audit_verdict: verdict,
        audit_rule: RuleId(rule),
        log: false,
        reject: false,
        written: true,
    };
    let policies = [(EVERYTHING, Verdict::Allow), (NOTHING, Verdict::Deny)].map(|(id, verdict)| {
        let default_row = Arc::new(Row::uniform(cell(verdict, 100 + id.0)));
        (id, CompiledPolicy { id, default_row, rows: BTreeMap::new() })
    });
    let mut endpoints = BTreeMap::new();
    for (name, number) in NAMES.into_iter().zip(1..) {
        let binding = EndpointBinding {
            attachment: Attachment::Interface(links::interface(name)?),
            addresses: vec![IpAddr::V4(own(number))],
            ingress: if name == "client" { NOTHING } else { EVERYTHING },
            egress: EVERYTHING,
        };
        endpoints.insert(Arc::from(name), binding);
    }
    Ok(HostPolicy { policies: BTreeMap::from(policies), endpoints, ..HostPolicy::default() })
}

fn send(from: Ipv4Addr, to: Ipv4Addr, count: u32, flags: u8) -> anyhow::Result<()> {
    send_from(from, to, 0, count, flags)
}

/// Raw TCP packets from the calling thread's namespace, each of another connection.
#[expect(unsafe_code, reason = "raw sockets have no safe wrapper")]
fn send_from(from: Ipv4Addr, to: Ipv4Addr, first: u32, count: u32, flags: u8) -> anyhow::Result<()> {
    // SAFETY: numbers only; the descriptor is ours.
    let socket = unsafe {
        let fd = libc::socket(libc::AF_INET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, libc::IPPROTO_RAW);
        ensure!(fd >= 0, "no raw socket: {}", std::io::Error::last_os_error());
        OwnedFd::from_raw_fd(fd)
    };
    // SAFETY: plain bytes, of which zero is a value.
    let mut address: libc::sockaddr_in = unsafe { std::mem::zeroed() };
    address.sin_family = u16::try_from(libc::AF_INET)?;
    address.sin_addr.s_addr = u32::from_ne_bytes(to.octets());
    for number in first..first + count {
        let ports = (1024 + u16::try_from(number % PORTS)?, 8000 + u16::try_from(number / PORTS % PORTS)?);
        let packet = packet(from, to, ports, flags);
        // SAFETY: packet and address outlive the call.
        let sent = unsafe {
            libc::sendto(
                socket.as_raw_fd(),
                packet.as_ptr().cast(),
                packet.len(),
                0,
                (&raw const address).cast(),
                u32::try_from(size_of::<libc::sockaddr_in>())?,
            )
        };
        // A queue that is full is no mistake of a flood.
        if sent < 0 && std::io::Error::last_os_error().raw_os_error() != Some(libc::ENOBUFS) {
            return Err(std::io::Error::last_os_error()).context("cannot send a raw packet");
        }
    }
    Ok(())
}

fn packet(from: Ipv4Addr, to: Ipv4Addr, (source, port): (u16, u16), flags: u8) -> [u8; 40] {
    let mut packet = [0; 40];
    packet[..4].copy_from_slice(&[0x45, 0, 0, 40]);
    packet[8..10].copy_from_slice(&[64, 6]);
    packet[12..16].copy_from_slice(&from.octets());
    packet[16..20].copy_from_slice(&to.octets());
    packet[20..22].copy_from_slice(&source.to_be_bytes());
    packet[22..24].copy_from_slice(&port.to_be_bytes());
    packet[32..36].copy_from_slice(&[0x50, flags, 1, 0]);
    packet
}

/// Moves the calling thread into a namespace.
#[expect(unsafe_code, reason = "system call without a safe wrapper")]
fn enter(path: &str) -> anyhow::Result<()> {
    let file = std::fs::File::open(path)?;
    // SAFETY: affects the calling thread only.
    let result = unsafe { libc::setns(file.as_raw_fd(), libc::CLONE_NEWNET) };
    ensure!(result == 0, "cannot enter {path}: {}", std::io::Error::last_os_error());
    Ok(())
}

fn now_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    u64::try_from(now.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0)
}

/// What the kernel charges for the maps that this process has open, each counted once.
fn memory() -> anyhow::Result<f64> {
    let mut maps: BTreeMap<u64, u64> = BTreeMap::new();
    for entry in std::fs::read_dir("/proc/self/fdinfo")? {
        let text = std::fs::read_to_string(entry?.path()).unwrap_or_default();
        let field = |name: &str| -> Option<u64> {
            text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok())
        };
        if let (Some(id), Some(bytes)) = (field("map_id:"), field("memlock:")) {
            maps.insert(id, bytes);
        }
    }
    ensure!(maps.len() > 10, "only {} maps are open", maps.len());
    Ok(maps.values().sum::<u64>() as f64 / 1e6)
}
