//! Servers and callers with real sockets, all of which one thread waits for.

use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bulkhead_model::ports::Protocol;

use crate::frames::{sctp_checksum, sctp_init};

/// How long a refused connection must stay silent.
const SILENCE: Duration = Duration::from_millis(300);
/// How long an allowed one has.
const PATIENCE: Duration = Duration::from_secs(8);
/// How often what may be lost is said again.
const AGAIN: Duration = Duration::from_millis(400);

/// Where a server listens.
pub(super) type Service = (Protocol, SocketAddr);

enum Server {
    Tcp(TcpListener),
    Udp(UdpSocket),
    /// No SCTP in the kernel is needed: associations are begun and answered by hand, on real packets.
    Sctp(OwnedFd, IpAddr, Vec<u16>),
}

/// Servers that answer until dropped.
#[derive(Debug)]
pub(super) struct Servers {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// Opens servers in this thread's namespace, to be given to [`Servers::start`].
pub(super) fn listen(services: &[Service]) -> Vec<Listening> {
    let mut opened = Vec::new();
    let mut associations: Vec<(IpAddr, Vec<u16>)> = Vec::new();
    for (protocol, address) in services {
        match *protocol {
            Protocol::TCP => {
                let listener = TcpListener::bind(address).unwrap();
                listener.set_nonblocking(true).unwrap();
                opened.push(Listening(Server::Tcp(listener)));
            }
            Protocol::UDP => {
                let socket = UdpSocket::bind(address).unwrap();
                socket.set_nonblocking(true).unwrap();
                opened.push(Listening(Server::Udp(socket)));
            }
            Protocol::SCTP => match associations.iter_mut().find(|(ip, _)| *ip == address.ip()) {
                Some((_, ports)) => ports.push(address.port()),
                None => associations.push((address.ip(), vec![address.port()])),
            },
            other => panic!("no server for {other}"),
        }
    }
    let sctp = |(ip, ports)| Listening(Server::Sctp(raw(ip, None), ip, ports));
    opened.extend(associations.into_iter().map(sctp));
    opened
}

/// An open server.
pub(super) struct Listening(Server);

impl Servers {
    pub(super) fn start(servers: Vec<Listening>) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let fds: Vec<RawFd> = servers.iter().map(|server| server.fd()).collect();
            while !stopped.load(Relaxed) {
                for index in ready(&fds, Duration::from_millis(20)) {
                    servers[index].serve();
                }
            }
        });
        Self { stop, thread: Some(thread) }
    }
}

impl Drop for Servers {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
        if let Some(thread) = self.thread.take() {
            let _panicked = thread.join();
        }
    }
}

impl Listening {
    fn fd(&self) -> RawFd {
        match &self.0 {
            Server::Tcp(listener) => listener.as_raw_fd(),
            Server::Udp(socket) => socket.as_raw_fd(),
            Server::Sctp(socket, ..) => socket.as_raw_fd(),
        }
    }

    /// Answers all that has come. An answer that cannot be sent is the caller's to miss.
    fn serve(&self) {
        match &self.0 {
            Server::Tcp(listener) => {
                while let Ok((mut stream, _)) = listener.accept() {
                    let _ = stream.write_all(b"y");
                }
            }
            Server::Udp(socket) => {
                let mut buffer = [0; 64];
                while let Ok((_, from)) = socket.recv_from(&mut buffer) {
                    let _ = socket.send_to(b"y", from);
                }
            }
            Server::Sctp(socket, own, ports) => {
                while let Some((from, packet)) = receive(socket) {
                    let [called, caller] = [&packet[2..4], &packet[..2]];
                    let port = u16::from_be_bytes([called[0], called[1]]);
                    if packet[12] == INIT && ports.contains(&port) {
                        let back = u16::from_be_bytes([caller[0], caller[1]]);
                        send(socket, from, &answer(*own, port, from, back));
                    }
                }
            }
        }
    }
}

const INIT: u8 = 1;
const INIT_ACK: u8 = 2;

/// An INIT ACK, with the tag that [`sctp_init`] asks for.
fn answer(own: IpAddr, port: u16, peer: IpAddr, back: u16) -> Vec<u8> {
    let mut packet = sctp_init(own, port, peer, back).l4;
    packet[4..8].copy_from_slice(&[0, 0, 0, 9]);
    packet[12] = INIT_ACK;
    sctp_checksum(&mut packet);
    packet
}

/// A raw socket for SCTP, on an address of this namespace.
fn raw(own: IpAddr, peer: Option<IpAddr>) -> OwnedFd {
    let family = if own.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    let kind = libc::SOCK_RAW | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    #[expect(unsafe_code, reason = "system call without a safe wrapper")]
    // SAFETY: takes no pointer, and the new descriptor is owned by nobody else.
    let socket = unsafe {
        let fd = libc::socket(family, kind, libc::IPPROTO_SCTP);
        assert!(fd >= 0, "{}", io::Error::last_os_error());
        OwnedFd::from_raw_fd(fd)
    };
    with(SocketAddr::new(own, 0), |address, len| {
        #[expect(unsafe_code, reason = "system call without a safe wrapper")]
        // SAFETY: the address has the length that is given.
        let result = unsafe { libc::bind(socket.as_raw_fd(), address, len) };
        assert_eq!(result, 0, "{own}: {}", io::Error::last_os_error());
    });
    if let Some(peer) = peer {
        with(SocketAddr::new(peer, 0), |address, len| {
            #[expect(unsafe_code, reason = "system call without a safe wrapper")]
            // SAFETY: the address has the length that is given.
            let result = unsafe { libc::connect(socket.as_raw_fd(), address, len) };
            assert_eq!(result, 0, "{peer}: {}", io::Error::last_os_error());
        });
    }
    socket
}

/// Hands over an address as the kernel wants it.
fn with<T>(address: SocketAddr, call: impl FnOnce(*const libc::sockaddr, libc::socklen_t) -> T) -> T {
    match address {
        SocketAddr::V4(v4) => {
            let raw = libc::sockaddr_in {
                sin_family: libc::AF_INET as libc::sa_family_t,
                sin_port: v4.port().to_be(),
                sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes(v4.ip().octets()) },
                sin_zero: [0; 8],
            };
            call((&raw const raw).cast(), size_of_val(&raw) as libc::socklen_t)
        }
        SocketAddr::V6(v6) => {
            let raw = libc::sockaddr_in6 {
                sin6_family: libc::AF_INET6 as libc::sa_family_t,
                sin6_port: v6.port().to_be(),
                sin6_flowinfo: 0,
                sin6_addr: libc::in6_addr { s6_addr: v6.ip().octets() },
                sin6_scope_id: 0,
            };
            call((&raw const raw).cast(), size_of_val(&raw) as libc::socklen_t)
        }
    }
}

fn send(socket: &OwnedFd, to: IpAddr, packet: &[u8]) {
    with(SocketAddr::new(to, 0), |address, len| {
        let (fd, data) = (socket.as_raw_fd(), packet.as_ptr().cast());
        #[expect(unsafe_code, reason = "system call without a safe wrapper")]
        // SAFETY: both buffers have the lengths that are given.
        let _lost = unsafe { libc::sendto(fd, data, packet.len(), 0, address, len) };
    });
}

/// The next packet, from its SCTP header on: at least one chunk's head.
fn receive(socket: &OwnedFd) -> Option<(IpAddr, Vec<u8>)> {
    loop {
        let mut packet = vec![0; 256];
        #[expect(unsafe_code, reason = "system calls without a safe wrapper")]
        // SAFETY: every buffer has the length that is given, and all zeros is a valid address.
        let (len, from) = unsafe {
            let mut from: libc::sockaddr_storage = std::mem::zeroed();
            let mut size = size_of_val(&from) as libc::socklen_t;
            let (fd, at) = (socket.as_raw_fd(), (&raw mut from).cast());
            (libc::recvfrom(fd, packet.as_mut_ptr().cast(), packet.len(), 0, at, &raw mut size), from)
        };
        packet.truncate(usize::try_from(len).ok()?);
        let from: IpAddr = if i32::from(from.ss_family) == libc::AF_INET {
            // IPv4 comes with its header.
            let source: [u8; 4] = packet.get(12..16)?.try_into().ok()?;
            packet.drain(..usize::from(packet[0] & 15) * 4);
            source.into()
        } else {
            #[expect(unsafe_code, reason = "one structure seen as another")]
            // SAFETY: the kernel says that it is an IPv6 address, and the storage is large enough and aligned.
            let from = unsafe { &*(&raw const from).cast::<libc::sockaddr_in6>() };
            from.sin6_addr.s6_addr.into()
        };
        if packet.len() >= 16 {
            return Some((from, packet));
        }
    }
}

/// Which of these can be read or are broken, after waiting for the first.
fn ready(fds: &[RawFd], patience: Duration) -> Vec<usize> {
    let poll = |fd: &RawFd| libc::pollfd { fd: *fd, events: libc::POLLIN, revents: 0 };
    let mut polls: Vec<_> = fds.iter().map(poll).collect();
    let timeout = patience.as_millis() as libc::c_int;
    #[expect(unsafe_code, reason = "system call without a safe wrapper")]
    // SAFETY: the list has the length that is given.
    let found = unsafe { libc::poll(polls.as_mut_ptr(), polls.len() as libc::nfds_t, timeout) };
    if found <= 0 {
        return Vec::new();
    }
    (0..polls.len()).filter(|index| polls[*index].revents != 0).collect()
}

/// A connection to try.
#[derive(Debug, Clone)]
pub(super) struct Probe {
    pub(super) from: IpAddr,
    pub(super) to: SocketAddr,
    pub(super) protocol: Protocol,
    pub(super) expected: bool,
}

/// What came of one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Fate {
    Answered,
    Silent,
    /// Somebody said no: a reset, or an ICMP error.
    Refused(String),
}

enum Caller {
    Tcp(TcpStream),
    Udp(UdpSocket),
    Sctp(OwnedFd, u16),
}

/// A connection that has begun.
pub(super) struct Calling {
    probe: Probe,
    caller: Result<Caller, String>,
}

/// Begins connections from this thread's namespace.
pub(super) fn call(probes: Vec<Probe>) -> Vec<Calling> {
    let begin = |(number, probe): (usize, Probe)| {
        let caller = match probe.protocol {
            Protocol::TCP => connect(&probe).map(Caller::Tcp),
            Protocol::UDP => UdpSocket::bind((probe.from, 0)).and_then(|socket| {
                socket.connect(probe.to)?;
                socket.set_nonblocking(true)?;
                Ok(Caller::Udp(socket))
            }),
            // Above what anybody listens on.
            _ => Ok(Caller::Sctp(raw(probe.from, Some(probe.to.ip())), 40_000 + number as u16)),
        };
        let calling = Calling { probe, caller: caller.map_err(|error| error.to_string()) };
        calling.say();
        calling
    };
    probes.into_iter().enumerate().map(begin).collect()
}

fn connect(probe: &Probe) -> io::Result<TcpStream> {
    let family = if probe.from.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    let kind = libc::SOCK_STREAM | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    #[expect(unsafe_code, reason = "system call without a safe wrapper")]
    // SAFETY: takes no pointer, and the new descriptor is owned by nobody else.
    let socket = unsafe {
        let fd = libc::socket(family, kind, 0);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        OwnedFd::from_raw_fd(fd)
    };
    // Reset at the end: thousands of connections must not wait for late packets.
    let linger = libc::linger { l_onoff: 1, l_linger: 0 };
    let fd = socket.as_raw_fd();
    #[expect(unsafe_code, reason = "system calls without a safe wrapper")]
    // SAFETY: option and addresses have the lengths that are given.
    let result = unsafe {
        let (value, len) = ((&raw const linger).cast(), size_of_val(&linger) as libc::socklen_t);
        libc::setsockopt(fd, libc::SOL_SOCKET, libc::SO_LINGER, value, len);
        with(SocketAddr::new(probe.from, 0), |address, len| libc::bind(fd, address, len)) == 0
            && with(probe.to, |address, len| libc::connect(fd, address, len)) == 0
    };
    let error = io::Error::last_os_error();
    if result || error.raw_os_error() == Some(libc::EINPROGRESS) {
        #[expect(unsafe_code, reason = "the descriptor changes its owner")]
        // SAFETY: it is owned by nobody else.
        return Ok(unsafe { TcpStream::from_raw_fd(socket.into_raw_fd()) });
    }
    Err(error)
}

impl Calling {
    fn fd(&self) -> Option<RawFd> {
        Some(match self.caller.as_ref().ok()? {
            Caller::Tcp(stream) => stream.as_raw_fd(),
            Caller::Udp(socket) => socket.as_raw_fd(),
            Caller::Sctp(socket, _) => socket.as_raw_fd(),
        })
    }

    /// Says what waits for an answer, perhaps again; TCP does that by itself.
    fn say(&self) {
        let Probe { from, to, .. } = self.probe;
        match &self.caller {
            Ok(Caller::Udp(socket)) => {
                // An earlier refusal is heard by whoever receives.
                let _ = socket.send(b"?");
            }
            Ok(Caller::Sctp(socket, port)) => {
                let mut packet = sctp_init(from, *port, to.ip(), to.port()).l4;
                sctp_checksum(&mut packet);
                send(socket, to.ip(), &packet);
            }
            Ok(Caller::Tcp(_)) | Err(_) => {}
        }
    }

    /// What has come, if anything.
    fn hear(&mut self) -> Option<Fate> {
        let mut buffer = [0; 8];
        let heard = match &mut self.caller {
            Err(error) => return Some(Fate::Refused(error.clone())),
            Ok(Caller::Tcp(stream)) => stream.read(&mut buffer),
            Ok(Caller::Udp(socket)) => socket.recv(&mut buffer),
            Ok(Caller::Sctp(socket, own)) => {
                let ports = [self.probe.to.port().to_be_bytes(), own.to_be_bytes()].concat();
                let ours = |(_, packet): &(IpAddr, Vec<u8>)| packet[..4] == ports && packet[12] == INIT_ACK;
                return std::iter::from_fn(|| receive(socket)).find(ours).map(|_| Fate::Answered);
            }
        };
        match heard {
            Ok(1..) => Some(Fate::Answered),
            Ok(0) => Some(Fate::Refused("ended without an answer".into())),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => None,
            Err(error) => Some(Fate::Refused(error.to_string())),
        }
    }
}

/// What becomes of connections: waits until all that are expected to be answered are, and all others have been silent for
/// long enough.
pub(super) fn outcomes(mut calls: Vec<Calling>) -> Vec<(Probe, Fate)> {
    let began = Instant::now();
    let mut fates: Vec<Option<Fate>> = calls.iter().map(|_| None).collect();
    let mut said = began;
    loop {
        let open: Vec<usize> = (0..calls.len()).filter(|index| fates[*index].is_none()).collect();
        for index in &open {
            if calls[*index].caller.is_err() {
                fates[*index] = calls[*index].hear();
            }
        }
        let missing = open.iter().any(|index| calls[*index].probe.expected && fates[*index].is_none());
        let elapsed = began.elapsed();
        if !missing && elapsed >= SILENCE || elapsed >= PATIENCE {
            break;
        }
        if said.elapsed() >= AGAIN {
            said = Instant::now();
            open.iter().filter(|index| calls[**index].probe.expected).for_each(|i| calls[*i].say());
        }
        let polled: Vec<(usize, RawFd)> =
            open.iter().filter_map(|index| Some((*index, calls[*index].fd()?))).collect();
        let fds: Vec<RawFd> = polled.iter().map(|(_, fd)| *fd).collect();
        for ready in ready(&fds, Duration::from_millis(20)) {
            let index = polled[ready].0;
            fates[index] = calls[index].hear();
        }
    }
    let fates = fates.into_iter().map(|fate| fate.unwrap_or(Fate::Silent));
    calls.into_iter().map(|calling| calling.probe).zip(fates).collect()
}
