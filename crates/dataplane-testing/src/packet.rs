//! Builds frames.

use std::net::IpAddr;

use bulkhead_model::ports::Protocol;

pub const SYN: u8 = 0x02;
pub const ACK: u8 = 0x10;
pub const FIN: u8 = 0x01;
pub const RST: u8 = 0x04;

#[derive(Debug, Clone)]
pub struct Packet {
    pub src: IpAddr,
    pub dst: IpAddr,
    pub protocol: Protocol,
    pub l4: Vec<u8>,
    /// Identification, offset in bytes, more fragments.
    pub fragment: Option<(u16, u16, bool)>,
    pub hop_limit: u8,
    pub vlans: usize,
}

impl Packet {
    pub fn new(src: IpAddr, dst: IpAddr, protocol: Protocol, l4: Vec<u8>) -> Self {
        Self { src, dst, protocol, l4, fragment: None, hop_limit: 64, vlans: 0 }
    }

    pub fn tcp(src: IpAddr, sport: u16, dst: IpAddr, dport: u16, flags: u8) -> Self {
        let mut l4 = ports(sport, dport);
        l4.extend([0; 8]);
        l4.extend([0x50, flags, 1, 0, 0, 0, 0, 0]);
        Self::new(src, dst, Protocol::TCP, l4)
    }

    pub fn udp(src: IpAddr, sport: u16, dst: IpAddr, dport: u16) -> Self {
        let mut l4 = ports(sport, dport);
        l4.extend([0, 12, 0, 0, 1, 2, 3, 4]);
        Self::new(src, dst, Protocol::UDP, l4)
    }

    /// The message type is that of the address family's own ICMP.
    pub fn icmp(src: IpAddr, dst: IpAddr, kind: u8, code: u8, id: u16) -> Self {
        let protocol = if src.is_ipv4() { Protocol::ICMP } else { Protocol::ICMPV6 };
        let mut l4 = vec![kind, code, 0, 0];
        l4.extend(id.to_be_bytes());
        l4.extend([0, 1, 9, 9, 9, 9]);
        Self::new(src, dst, protocol, l4)
    }

    /// "Unreachable", quoting a packet.
    pub fn unreachable(src: IpAddr, dst: IpAddr, about: &Self) -> Self {
        let mut packet = Self::icmp(src, dst, if src.is_ipv4() { 3 } else { 1 }, 1, 0);
        packet.l4.truncate(8);
        packet.l4.extend(about.ip());
        packet
    }

    /// From the IP header on.
    pub fn ip(&self) -> Vec<u8> {
        match (self.src, self.dst) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => {
                let (id, offset, more) = self.fragment.unwrap_or((0, 0, false));
                let word = (offset / 8) | (u16::from(more) << 13);
                let mut bytes = vec![0x45, 0];
                bytes.extend((20 + self.l4.len() as u16).to_be_bytes());
                bytes.extend(id.to_be_bytes());
                bytes.extend(word.to_be_bytes());
                bytes.extend([self.hop_limit, self.protocol.0, 0, 0]);
                bytes.extend(src.octets());
                bytes.extend(dst.octets());
                bytes.extend(&self.l4);
                bytes
            }
            (IpAddr::V6(src), IpAddr::V6(dst)) => {
                let mut rest = Vec::new();
                let mut next = self.protocol.0;
                if let Some((id, offset, more)) = self.fragment {
                    rest.extend([next, 0]);
                    rest.extend(((offset & !7) | u16::from(more)).to_be_bytes());
                    rest.extend(u32::from(id).to_be_bytes());
                    next = 44;
                }
                rest.extend(&self.l4);
                let mut bytes = vec![0x60, 0, 0, 0];
                bytes.extend((rest.len() as u16).to_be_bytes());
                bytes.extend([next, self.hop_limit]);
                bytes.extend(src.octets());
                bytes.extend(dst.octets());
                bytes.extend(rest);
                bytes
            }
            _ => panic!("one family per packet"),
        }
    }

    pub fn frame(&self) -> Vec<u8> {
        let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
        for _ in 0..self.vlans {
            frame.extend([0x81, 0, 0, 7]);
        }
        frame.extend(if self.src.is_ipv4() { [8, 0] } else { [0x86, 0xdd] });
        frame.extend(self.ip());
        frame
    }
}

fn ports(sport: u16, dport: u16) -> Vec<u8> {
    [sport.to_be_bytes(), dport.to_be_bytes()].concat()
}

/// An ARP request.
pub fn arp(sender: std::net::Ipv4Addr) -> Vec<u8> {
    let mut frame = vec![255; 6];
    frame.extend([2, 0, 0, 0, 0, 2, 8, 6, 0, 1, 8, 0, 6, 4, 0, 1, 2, 0, 0, 0, 0, 2]);
    frame.extend(sender.octets());
    frame.extend([0, 0, 0, 0, 0, 0, 10, 0, 0, 1]);
    frame
}
