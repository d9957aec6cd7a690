//! `reject`: tells whoever was refused, in the name of the other end.
//!
//! The programs cannot: netfilter's may only drop, and it is there that most new connections are judged. They report
//! whom to tell, within a limit, and these sockets send it: to TCP a reset (RFC 9293, 3.10.7.1), to everything else that
//! it is administratively prohibited (RFC 1812, 5.2.7.1; RFC 4443, 3.1). Without an agent, who is refused waits in vain.

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use bulkhead_model::host_policy::Attachment;
use bulkhead_model::ports::Protocol;

use crate::layout::{PRIORITY_REFUSAL, Refusal, attachment_of};

/// Room for a header of either family and a message.
const PACKET_MAX: usize = 40 + 8 + 40 + 8;
const IPV4_HEADER: usize = 20;
const TCP_HEADER: usize = 20;
const HOP_LIMIT: u8 = 64;
const FIN: u8 = 1;
const SYN: u8 = 2;
const RST: u8 = 4;
const ACK: u8 = 16;

/// The sockets, one per family; a family that the host does not have has none.
#[derive(Debug)]
pub(crate) struct Refuser {
    sockets: [Option<OwnedFd>; 2],
    /// What could not be sent.
    pub(crate) untold: u64,
}

impl Refuser {
    /// In the network namespace of the calling thread.
    pub(crate) fn open() -> Self {
        Self { sockets: [libc::AF_INET, libc::AF_INET6].map(|family| open(family).ok()), untold: 0 }
    }

    /// By which the programs know packets of these sockets; 0: none.
    pub(crate) fn cookies(&self) -> [u64; 2] {
        self.sockets.each_ref().map(|socket| socket.as_ref().and_then(|fd| cookie(fd).ok()).unwrap_or(0))
    }

    /// Tells the sender of a refused packet; of a connection that was alive, the other end too.
    pub(crate) fn tell(&mut self, refusal: &Refusal) {
        let scope = match attachment_of(refusal.key.subject) {
            Attachment::Interface(index) | Attachment::Host(index) | Attachment::Forwarded(index) => index,
            Attachment::Cgroup(_) => 0,
        };
        for (to, packet) in packets(refusal) {
            let socket = &self.sockets[usize::from(to.is_ipv6())];
            let sent = socket.as_ref().is_some_and(|socket| send(socket, to, scope, &packet).is_ok());
            self.untold += u64::from(!sent);
        }
    }
}

fn open(family: libc::c_int) -> io::Result<OwnedFd> {
    let priority = PRIORITY_REFUSAL;
    let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    #[expect(unsafe_code, reason = "system calls without a safe wrapper")]
    // SAFETY: the new descriptor is owned by nobody else, and the option outlives its call.
    unsafe {
        // With this protocol a socket sends whole packets and receives nothing (raw(7)).
        let fd = libc::socket(family, kind, libc::IPPROTO_RAW);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        let socket = OwnedFd::from_raw_fd(fd);
        let size = size_of_val(&priority) as libc::socklen_t;
        let value = (&raw const priority).cast();
        if libc::setsockopt(fd, libc::SOL_SOCKET, libc::SO_PRIORITY, value, size) != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(socket)
    }
}

fn cookie(socket: &OwnedFd) -> io::Result<u64> {
    let mut cookie = 0u64;
    let mut size = size_of_val(&cookie) as libc::socklen_t;
    #[expect(unsafe_code, reason = "system call without a safe wrapper")]
    // SAFETY: the option is a u64 that outlives the call.
    let result = unsafe {
        let value = (&raw mut cookie).cast();
        libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_COOKIE, value, &raw mut size)
    };
    if result == 0 { Ok(cookie) } else { Err(io::Error::last_os_error()) }
}

fn send(socket: &OwnedFd, to: IpAddr, scope: u32, packet: &[u8]) -> io::Result<()> {
    #[expect(unsafe_code, reason = "system call without a safe wrapper")]
    // SAFETY: zero is a value of these structures, and they outlive the call, as the packet does.
    let sent = unsafe {
        let mut v4: libc::sockaddr_in = std::mem::zeroed();
        let mut v6: libc::sockaddr_in6 = std::mem::zeroed();
        let (address, size) = match to {
            IpAddr::V4(to) => {
                v4.sin_family = libc::AF_INET as libc::sa_family_t;
                v4.sin_addr.s_addr = u32::from_ne_bytes(to.octets());
                ((&raw const v4).cast(), size_of_val(&v4))
            }
            IpAddr::V6(to) => {
                v6.sin6_family = libc::AF_INET6 as libc::sa_family_t;
                v6.sin6_addr.s6_addr = to.octets();
                v6.sin6_scope_id = if to.is_unicast_link_local() { scope } else { 0 };
                ((&raw const v6).cast(), size_of_val(&v6))
            }
        };
        let bytes = packet.as_ptr().cast();
        libc::sendto(socket.as_raw_fd(), bytes, packet.len(), 0, address, size as libc::socklen_t)
    };
    if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// One end of the refused packet.
type End = (IpAddr, u16);

/// Whom to tell, and the packets.
fn packets(refusal: &Refusal) -> impl Iterator<Item = (IpAddr, Vec<u8>)> {
    let key = refusal.key;
    let local = (key.local.address(), key.local_port);
    let peer = (key.peer.address(), key.peer_port);
    let (source, destination) = if refusal.direction == 0 { (peer, local) } else { (local, peer) };
    let one_to_one = |end: IpAddr| match end {
        IpAddr::V4(end) => !end.is_multicast() && !end.is_broadcast() && !end.is_unspecified(),
        IpAddr::V6(end) => !end.is_multicast() && !end.is_unspecified(),
    };
    let packets = if !(one_to_one(source.0) && one_to_one(destination.0)) {
        [None, None]
    } else if Protocol(key.protocol) == Protocol::TCP {
        resets(refusal, source, destination)
    } else {
        [prohibited(refusal, source, destination), None]
    };
    packets.into_iter().flatten()
}

fn word(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).map_or(0, u32::from_be_bytes)
}

/// For the sender, as if the receiver had no such connection. For the receiver of a live connection, as if the sender
/// had given up: with the number that comes next, or it would only ask (RFC 5961, 3.2).
fn resets(refusal: &Refusal, source: End, destination: End) -> [Option<(IpAddr, Vec<u8>)>; 2] {
    let header = &refusal.l4;
    let (sequence, acknowledged, flags) = (word(header, 4), word(header, 8), header[13]);
    let payload = refusal.len.saturating_sub(u32::from(header[12] >> 4) * 4);
    let to_sender = if flags & ACK != 0 {
        tcp(destination, source, acknowledged, 0, RST)
    } else {
        let taken = payload + u32::from(flags & SYN != 0) + u32::from(flags & FIN != 0);
        tcp(destination, source, 0, sequence.wrapping_add(taken), RST | ACK)
    };
    let other_end = refusal.live != 0 && flags & (SYN | ACK) == ACK;
    let to_receiver =
        other_end.then(|| tcp(source, destination, sequence, acknowledged, RST | ACK)).flatten();
    [to_sender.map(|packet| (source.0, packet)), to_receiver.map(|packet| (destination.0, packet))]
}

fn tcp(from: End, to: End, sequence: u32, acknowledged: u32, flags: u8) -> Option<Vec<u8>> {
    let mut segment = [0; TCP_HEADER];
    segment[..2].copy_from_slice(&from.1.to_be_bytes());
    segment[2..4].copy_from_slice(&to.1.to_be_bytes());
    segment[4..8].copy_from_slice(&sequence.to_be_bytes());
    segment[8..12].copy_from_slice(&acknowledged.to_be_bytes());
    segment[12] = (TCP_HEADER as u8 / 4) << 4;
    segment[13] = flags;
    let sum = checksum(pseudo_header(from.0, to.0, Protocol::TCP, TCP_HEADER) + sum_of(&segment));
    segment[16..18].copy_from_slice(&sum.to_be_bytes());
    let mut packet = header(from.0, to.0, Protocol::TCP, TCP_HEADER)?;
    packet.extend(segment);
    Some(packet)
}

/// An ICMP error, with as much of the refused packet as its sender needs to know which one it was.
fn prohibited(refusal: &Refusal, source: End, destination: End) -> Option<(IpAddr, Vec<u8>)> {
    let protocol = Protocol(refusal.key.protocol);
    let mut quoted = header(source.0, destination.0, protocol, refusal.len as usize)?;
    let start = quoted.len();
    quoted.extend(&refusal.l4[..8]);
    if protocol.has_ports() {
        // As the sender wrote them: they may have been rewritten since.
        quoted[start..start + 2].copy_from_slice(&source.1.to_be_bytes());
        quoted[start + 2..start + 4].copy_from_slice(&destination.1.to_be_bytes());
    }
    let (own, kind, code) =
        if source.0.is_ipv4() { (Protocol::ICMP, 3, 13) } else { (Protocol::ICMPV6, 1, 1) };
    let mut message = vec![kind, code, 0, 0, 0, 0, 0, 0];
    message.extend(quoted);
    let pseudo =
        if source.0.is_ipv4() { 0 } else { pseudo_header(destination.0, source.0, own, message.len()) };
    let sum = checksum(pseudo + sum_of(&message));
    message[2..4].copy_from_slice(&sum.to_be_bytes());
    let mut packet = header(destination.0, source.0, own, message.len())?;
    packet.extend(message);
    Some((source.0, packet))
}

/// An IP header; `None` for two addresses of different families.
fn header(from: IpAddr, to: IpAddr, protocol: Protocol, len: usize) -> Option<Vec<u8>> {
    let mut header = Vec::with_capacity(PACKET_MAX);
    match (from, to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            let total = u16::try_from(len + IPV4_HEADER).unwrap_or(u16::MAX);
            header.extend([0x45, 0]);
            header.extend(total.to_be_bytes());
            header.extend([0, 0, 0, 0, HOP_LIMIT, protocol.0, 0, 0]);
            header.extend(from.octets());
            header.extend(to.octets());
            let sum = checksum(sum_of(&header));
            header[10..12].copy_from_slice(&sum.to_be_bytes());
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            header.extend([0x60, 0, 0, 0]);
            header.extend(u16::try_from(len).unwrap_or(u16::MAX).to_be_bytes());
            header.extend([protocol.0, HOP_LIMIT]);
            header.extend(from.octets());
            header.extend(to.octets());
        }
        _ => return None,
    }
    Some(header)
}

/// RFC 9293, 3.1 and RFC 8200, 8.1.
fn pseudo_header(from: IpAddr, to: IpAddr, protocol: Protocol, len: usize) -> u32 {
    let octets = |address: IpAddr| match address {
        IpAddr::V4(address) => sum_of(&address.octets()),
        IpAddr::V6(address) => sum_of(&address.octets()),
    };
    octets(from) + octets(to) + u32::from(protocol.0) + len as u32
}

/// Of 16-bit words, not yet folded. At most some hundred bytes.
fn sum_of(bytes: &[u8]) -> u32 {
    bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0))).sum()
}

/// RFC 1071.
fn checksum(sum: u32) -> u16 {
    let folded = (sum & 0xffff) + (sum >> 16);
    !((folded & 0xffff) + (folded >> 16)) as u16
}
