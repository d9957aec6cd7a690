//! Datagrams that lie about where they come from.

use std::net::{Ipv4Addr, SocketAddr};

use anyhow::Result;
use rustix::net::{AddressFamily, Protocol, SendFlags, SocketFlags, SocketType, sendto, socket_with};

use crate::workload::Workload;

/// Sends `count` UDP datagrams from a workload with another's source address.
///
/// # Errors
/// If the socket cannot be opened or the kernel takes one not.
pub fn send_spoofed(from: &Workload, claimed: Ipv4Addr, to: Ipv4Addr, port: u16, count: u32) -> Result<()> {
    from.netns.run(|| {
        // IPPROTO_RAW (255): we write the IP header, the kernel fills in checksum and identification.
        let raw = std::num::NonZeroU32::new(255).map(Protocol::from_raw);
        let socket = socket_with(AddressFamily::INET, SocketType::RAW, SocketFlags::CLOEXEC, raw)?;
        let packet = packet(claimed, to, port);
        for _ in 0..count {
            sendto(&socket, &packet, SendFlags::empty(), &SocketAddr::new(to.into(), 0))?;
        }
        Ok(())
    })
}

fn packet(source: Ipv4Addr, destination: Ipv4Addr, port: u16) -> Vec<u8> {
    let body = b"spoofed!";
    let udp_len = 8 + body.len();
    let total = 20 + udp_len;
    let mut packet = vec![0x45, 0];
    packet.extend(u16::try_from(total).unwrap_or(u16::MAX).to_be_bytes());
    packet.extend([0, 0, 0, 0, 64, 17, 0, 0]);
    packet.extend(source.octets());
    packet.extend(destination.octets());
    packet.extend(40_000u16.to_be_bytes());
    packet.extend(port.to_be_bytes());
    packet.extend(u16::try_from(udp_len).unwrap_or(u16::MAX).to_be_bytes());
    // Checksum 0: none, which UDP over IPv4 allows.
    packet.extend([0, 0]);
    packet.extend(body);
    packet
}
