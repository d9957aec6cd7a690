//! Whole frames through an interface, with the checksums that a real kernel looks at.

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use bulkhead_model::ports::Protocol;

use crate::packet::Packet;

/// A packet socket on one interface, in the namespace of the thread that opened it.
#[derive(Debug)]
pub struct Frames(OwnedFd);

const PACKET_IGNORE_OUTGOING: libc::c_int = 23;

impl Frames {
    /// On the interface of this index: hears what comes in.
    pub fn open(ifindex: u32) -> io::Result<Self> {
        let protocol = (libc::ETH_P_ALL as u16).to_be();
        #[expect(unsafe_code, reason = "system calls without a safe wrapper")]
        // SAFETY: the new descriptor is owned by nobody else, and every structure outlives its call.
        unsafe {
            let kind = libc::SOCK_RAW | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
            let fd = libc::socket(libc::AF_PACKET, kind, i32::from(protocol));
            if fd < 0 {
                return Err(io::Error::last_os_error());
            }
            let socket = Self(OwnedFd::from_raw_fd(fd));
            let mut address: libc::sockaddr_ll = std::mem::zeroed();
            address.sll_family = libc::AF_PACKET as u16;
            address.sll_protocol = protocol;
            address.sll_ifindex = ifindex as i32;
            let len = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
            if libc::bind(fd, (&raw const address).cast(), len) != 0 {
                return Err(io::Error::last_os_error());
            }
            for (level, option, value) in [
                (libc::SOL_PACKET, PACKET_IGNORE_OUTGOING, 1i32),
                (libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, 64 << 20),
            ] {
                let len = size_of::<i32>() as libc::socklen_t;
                if libc::setsockopt(fd, level, option, (&raw const value).cast(), len) != 0 {
                    return Err(io::Error::last_os_error());
                }
            }
            Ok(socket)
        }
    }

    /// Sends one frame.
    pub fn send(&self, frame: &[u8]) -> io::Result<()> {
        #[expect(unsafe_code, reason = "system call without a safe wrapper")]
        // SAFETY: the buffer has the length that is given.
        let sent = unsafe { libc::send(self.0.as_raw_fd(), frame.as_ptr().cast(), frame.len(), 0) };
        if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// The next frame that has come; `None` if there is none.
    pub fn next(&self) -> Option<Vec<u8>> {
        let mut frame = vec![0; 2048];
        #[expect(unsafe_code, reason = "system call without a safe wrapper")]
        // SAFETY: the buffer has the length that is given.
        let len = unsafe { libc::recv(self.0.as_raw_fd(), frame.as_mut_ptr().cast(), frame.len(), 0) };
        frame.truncate(usize::try_from(len).ok()?);
        Some(frame)
    }
}

/// A packet as a frame between two stations, recognisable by a number: the identification of IPv4, the flow label of
/// IPv6.
pub fn numbered(packet: &Packet, from: [u8; 6], to: [u8; 6], number: u16) -> Vec<u8> {
    let mut frame = packet.frame();
    frame[..6].copy_from_slice(&to);
    frame[6..12].copy_from_slice(&from);
    let v6 = packet.src.is_ipv6();
    let l4 = if v6 { 54 } else { 34 };
    if v6 {
        frame[16..18].copy_from_slice(&number.to_be_bytes());
    } else {
        frame[18..20].copy_from_slice(&number.to_be_bytes());
        let sum = checksum(0, &frame[14..34]);
        frame[24..26].copy_from_slice(&sum.to_be_bytes());
    }
    let at = match packet.protocol {
        Protocol::TCP => Some(16),
        Protocol::UDP => Some(6),
        Protocol::ICMP | Protocol::ICMPV6 => Some(2),
        _ => None,
    };
    if packet.protocol == Protocol::SCTP {
        sctp_checksum(&mut frame[l4..]);
    }
    if let Some(at) = at {
        let pseudo = if packet.protocol == Protocol::ICMP { 0 } else { pseudo_header(packet) };
        let sum = checksum(pseudo, &frame[l4..]);
        frame[l4 + at..l4 + at + 2].copy_from_slice(&sum.to_be_bytes());
    }
    frame
}

/// The number of a frame; `None` if it is none of these.
pub fn number_of(frame: &[u8]) -> Option<u16> {
    let at = match frame.get(12..14)? {
        [0x08, 0x00] => 18,
        [0x86, 0xdd] => 16,
        _ => return None,
    };
    Some(u16::from_be_bytes(frame.get(at..at + 2)?.try_into().ok()?))
}

/// An SCTP packet that begins an association.
pub fn sctp_init(src: IpAddr, sport: u16, dst: IpAddr, dport: u16) -> Packet {
    let mut l4 = [sport.to_be_bytes(), dport.to_be_bytes()].concat();
    l4.extend([0; 8]);
    // INIT of 20 bytes: tag, window, streams, sequence number.
    l4.extend([1, 0, 0, 20, 0, 0, 0, 9, 0, 1, 0, 0, 0, 1, 0, 1, 0, 0, 0, 1]);
    Packet::new(src, dst, Protocol::SCTP, l4)
}

/// Writes the checksum of an SCTP packet, which begins with its header.
pub fn sctp_checksum(packet: &mut [u8]) {
    packet[8..12].fill(0);
    let sum = crc32c(packet);
    packet[8..12].copy_from_slice(&sum.to_le_bytes());
}

fn pseudo_header(packet: &Packet) -> u32 {
    let octets = |address: IpAddr| match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    };
    let addresses = [octets(packet.src), octets(packet.dst)].concat();
    sum(0, &addresses) + u32::from(packet.protocol.0) + packet.l4.len() as u32
}

fn sum(start: u32, bytes: &[u8]) -> u32 {
    bytes
        .chunks(2)
        .fold(start, |sum, pair| sum + (u32::from(pair[0]) << 8 | pair.get(1).copied().map_or(0, u32::from)))
}

fn checksum(start: u32, bytes: &[u8]) -> u16 {
    let mut sum = sum(start, bytes);
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

fn crc32c(bytes: &[u8]) -> u32 {
    let mut crc = u32::MAX;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 };
        }
    }
    !crc
}
