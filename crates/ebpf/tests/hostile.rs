//! Frames that somebody made to get past: tens of thousands of mutations of valid ones, through the real programs.
//!
//! What a frame is, is said by an independent receiver that is as lenient as any that there may be: it believes no
//! length that stands in its way, walks any chain of headers, and puts fragments together in both of the ways in which
//! receivers treat overlaps. Nothing that it takes for a forbidden connection may have passed.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails here")]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use bulkhead_dataplane::Dataplane;
use bulkhead_ebpf::test_run::TestPacket;
use bulkhead_model::Direction;
use bulkhead_model::flow::DropReason;
use bulkhead_model::verdict::Verdict::{Allow, Deny};
use common::packet::{ACK, Packet, SYN};
use common::{Bench, Rule, policy, small};

const TCP: u8 = 6;
const UDP: u8 = 17;
const FRAGMENT: u8 = 44;
const DESTINATION_OPTIONS: u8 = 60;
/// Headers that a receiver may walk over, each with the rest of the packet behind it.
const EXTENSIONS: [u8; 8] = [0, 43, FRAGMENT, 51, DESTINATION_OPTIONS, 135, 139, 140];

/// A receiver's reading of one frame.
mod receiver {
    use super::*;

    /// What a packet is to a receiver.
    #[derive(Debug, Clone, PartialEq, Eq)]
    pub(crate) enum Reading {
        /// Nothing that reaches anybody.
        Nothing,
        /// It is sent on from its destination, to where nobody has judged.
        SentOn,
        /// A whole datagram: addresses, protocol, what follows the headers.
        Whole(IpAddr, IpAddr, u8, Vec<u8>),
        /// A part of one: whose, where it begins, whether more follow, the header that it begins with, its bytes.
        Part { of: (IpAddr, IpAddr, u32), at: usize, more: bool, header: u8, bytes: Vec<u8> },
    }

    pub(crate) fn read(frame: &[u8]) -> Reading {
        let mut at = 12;
        loop {
            let Some(kind) = frame.get(at..at + 2) else { return Reading::Nothing };
            match (kind[0], kind[1]) {
                (0x81, 0) | (0x88, 0xa8) | (0x91, 0) | (0x92, 0) => at += 4,
                (8, 0) => return v4(&frame[at + 2..]),
                (0x86, 0xdd) => return v6(&frame[at + 2..]),
                _ => return Reading::Nothing,
            }
        }
    }

    fn v4(ip: &[u8]) -> Reading {
        if ip.len() < 20 || ip[0] >> 4 != 4 {
            return Reading::Nothing;
        }
        let word = |at: usize| usize::from(ip[at]) << 8 | usize::from(ip[at + 1]);
        let (header, total) = (usize::from(ip[0] & 15) * 4, word(2));
        if header < 20 || total < header || total > ip.len() {
            return Reading::Nothing;
        }
        let mut option = 20;
        while option < header {
            match ip[option] {
                0 => break,
                1 => option += 1,
                131 | 137 => return Reading::SentOn,
                _ if option + 1 < header && ip[option + 1] >= 2 => option += usize::from(ip[option + 1]),
                _ => break,
            }
        }
        let address = |at: usize| IpAddr::from(<[u8; 4]>::try_from(&ip[at..at + 4]).unwrap());
        let (from, to, bytes) = (address(12), address(16), ip[header..total].to_vec());
        let (at, more) = ((word(6) & 0x1fff) * 8, word(6) & 0x2000 != 0);
        if at == 0 && !more {
            return Reading::Whole(from, to, ip[9], bytes);
        }
        let id = (word(4) as u32) << 8 | u32::from(ip[9]);
        Reading::Part { of: (from, to, id), at, more, header: ip[9], bytes }
    }

    fn v6(ip: &[u8]) -> Reading {
        if ip.len() < 40 || ip[0] >> 4 != 6 {
            return Reading::Nothing;
        }
        let payload = usize::from(ip[4]) << 8 | usize::from(ip[5]);
        if 40 + payload > ip.len() {
            return Reading::Nothing;
        }
        let address = |at: usize| IpAddr::from(<[u8; 16]>::try_from(&ip[at..at + 16]).unwrap());
        follow(address(8), address(24), ip[6], &ip[40..40 + payload])
    }

    /// Walks over extension headers to a protocol or into a fragment.
    pub(crate) fn follow(from: IpAddr, to: IpAddr, mut next: u8, mut rest: &[u8]) -> Reading {
        while EXTENSIONS.contains(&next) {
            if rest.len() < 8 {
                return Reading::Nothing;
            }
            if next == FRAGMENT {
                let word = usize::from(rest[2]) << 8 | usize::from(rest[3]);
                let (at, more) = (word & !7, word & 1 != 0);
                if at != 0 || more {
                    let id = u32::from_be_bytes([rest[4], rest[5], rest[6], rest[7]]);
                    let bytes = rest[8..].to_vec();
                    return Reading::Part { of: (from, to, id), at, more, header: rest[0], bytes };
                }
            }
            if next == 43 && rest[3] != 0 {
                return Reading::SentOn;
            }
            let len = match next {
                FRAGMENT => 8,
                51 => (usize::from(rest[1]) + 2) * 4,
                _ => (usize::from(rest[1]) + 1) * 8,
            };
            if rest.len() < len {
                return Reading::Nothing;
            }
            (next, rest) = (rest[0], &rest[len..]);
        }
        Reading::Whole(from, to, next, rest.to_vec())
    }

    /// Puts fragments together. `last_wins`: of bytes that come twice.
    #[derive(Debug, Default)]
    pub(crate) struct Assembly {
        pub(crate) last_wins: bool,
        pub(crate) parts: BTreeMap<(IpAddr, IpAddr, u32), Datagram>,
    }

    #[derive(Debug, Default)]
    pub(crate) struct Datagram {
        header: Option<u8>,
        bytes: BTreeMap<usize, u8>,
        end: Option<usize>,
    }

    impl Assembly {
        /// A datagram, if this part makes it whole; it may be made whole again, otherwise, by a further one.
        pub(crate) fn take(&mut self, reading: &Reading) -> Option<Reading> {
            let Reading::Part { of, at, more, header, bytes } = reading else { return None };
            let datagram = self.parts.entry(*of).or_default();
            if *at == 0 && (datagram.header.is_none() || self.last_wins) {
                datagram.header = Some(*header);
            }
            for (place, byte) in (*at..).zip(bytes) {
                if self.last_wins || !datagram.bytes.contains_key(&place) {
                    datagram.bytes.insert(place, *byte);
                }
            }
            if !more {
                datagram.end = Some(at + bytes.len());
            }
            let (header, end) = (datagram.header?, datagram.end?);
            let whole: Option<Vec<u8>> = (0..end).map(|place| datagram.bytes.get(&place).copied()).collect();
            let (from, to, _) = *of;
            Some(match from {
                IpAddr::V4(_) => Reading::Whole(from, to, header, whole?),
                IpAddr::V6(_) => follow(from, to, header, &whole?),
            })
        }
    }
}

use receiver::{Assembly, Reading, read};

/// xorshift64*: enough to choose with, and repeatable.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % limit
    }

    fn one<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len())]
    }
}

#[derive(Debug, Clone, Copy)]
struct Cast {
    own: IpAddr,
    friend: IpAddr,
    stranger: IpAddr,
    friends: &'static str,
}

fn families() -> [Cast; 2] {
    let ip = |text: &str| text.parse().unwrap();
    [
        Cast {
            own: ip("10.0.0.2"),
            friend: ip("10.0.1.7"),
            stranger: ip("192.0.2.9"),
            friends: "10.0.1.0/24",
        },
        Cast {
            own: ip("fd00::2"),
            friend: ip("fd00:1::7"),
            stranger: ip("2001:db8::9"),
            friends: "fd00:1::/64",
        },
    ]
}

/// Of friends only: they may call tcp/80, the workload may call their tcp/443 and udp/53. Nothing else. To which of its
/// addresses a packet is that comes to the workload's interface makes no difference.
fn is_allowed(cast: Cast, direction: Direction, peer: IpAddr, protocol: u8, port: u16) -> bool {
    let friends: bulkhead_model::Prefix = cast.friends.parse().unwrap();
    let ports: &[(u8, u16)] = match direction {
        Direction::Egress => &[(TCP, 443), (UDP, 53)],
        Direction::Ingress => &[(TCP, 80)],
    };
    friends.contains_address(peer) && ports.contains(&(protocol, port))
}

/// Why a datagram must not have passed; `None`: it may.
fn why_forbidden(cast: Cast, direction: Direction, reading: &Reading) -> Option<String> {
    if *reading == Reading::SentOn {
        return Some("sent on from its destination".into());
    }
    let Reading::Whole(from, to, protocol, bytes) = reading else { return None };
    let (from, to, protocol) = (*from, *to, *protocol);
    let other = if direction == Direction::Egress { Direction::Ingress } else { Direction::Egress };
    let port = |at: usize| bytes.get(at..at + 2).map(|port| u16::from_be_bytes([port[0], port[1]]));
    let icmp = if from.is_ipv4() { 1 } else { 58 };
    let told = || format!("{from} to {to}, protocol {protocol}, ports {:?} {:?}", port(0), port(2));
    if protocol == icmp {
        // Errors pass with the connection that they quote, discovery passes always; neither begins anything.
        let harmless: &[u8] = if from.is_ipv4() {
            &[3, 4, 5, 11, 12]
        } else {
            &[1, 2, 3, 4, 130, 131, 132, 133, 134, 135, 136, 137, 143]
        };
        return match bytes.first() {
            Some(kind) if !harmless.contains(kind) => Some(told()),
            _ => None,
        };
    }
    if protocol != TCP && protocol != UDP {
        return Some(told());
    }
    // Who cannot read the ports delivers to nobody.
    let (source, destination) = (port(0)?, port(2)?);
    let client = if from.is_ipv4() { (68, 67) } else { (546, 547) };
    let dhcp = if direction == Direction::Egress { client } else { (client.1, client.0) };
    if protocol == UDP && (source, destination) == dhcp {
        return None;
    }
    let peer = if direction == Direction::Egress { to } else { from };
    if direction == Direction::Egress && from != cast.own {
        return Some(told());
    }
    if is_allowed(cast, direction, peer, protocol, destination) {
        return None;
    }
    // A reply. To TCP, whatever has a SYN and no ACK begins.
    let begins = protocol == TCP && bytes.get(13).is_some_and(|flags| flags & (SYN | ACK) == SYN);
    if !begins && is_allowed(cast, other, peer, protocol, source) {
        return None;
    }
    Some(told())
}

/// A bench with the policy, what has passed, and what was dropped.
struct Trial {
    bench: Bench,
    cast: Cast,
    assemblies: [Assembly; 4],
    passed: u64,
    dropped: u64,
}

impl Trial {
    fn new(cast: Cast) -> Self {
        let mut bench = Bench::with(bulkhead_ebpf::Capacities { frags: 65_536, denials: 65_536, ..small() });
        let ingress = [Rule(cast.friends, "tcp/80", Allow, 20)];
        let egress = [Rule(cast.friends, "tcp/443", Allow, 30), Rule(cast.friends, "udp/53", Allow, 31)];
        let policy = policy(bench.ifindex, &[cast.own], &ingress, &egress, Deny);
        bench.dataplane.replace(&policy).unwrap();
        let assembly = |last_wins| Assembly { last_wins, ..Assembly::default() };
        let assemblies = [assembly(false), assembly(true), assembly(false), assembly(true)];
        Self { bench, cast, assemblies, passed: 0, dropped: 0 }
    }

    fn drops(&self) -> u64 {
        let drops = self.bench.dataplane.stats().unwrap().drops;
        drops.iter().filter(|(reason, _)| **reason != DropReason::None).map(|(_, count)| count).sum()
    }

    /// Sends a frame; fails if it passes and is, or completes, what is forbidden. `None`: the kernel runs no such frame.
    fn send(&mut self, direction: Direction, frame: &[u8]) -> Option<bool> {
        let packet = TestPacket { direction, ifindex: self.bench.ifindex, ingress_ifindex: 1, frame };
        // The kernel runs nothing that is shorter than its own header.
        let passed = match self.bench.dataplane.test_run(packet, 1) {
            Ok((passed, _)) => passed,
            Err(error) if frame.len() < 14 + 40 => {
                assert!(error.to_string().contains("nvalid argument"), "{error}");
                return None;
            }
            Err(error) => panic!("{error} of {} bytes", frame.len()),
        };
        if !passed {
            self.dropped += 1;
            return Some(false);
        }
        self.passed += 1;
        let reading = read(frame);
        if let Some(why) = why_forbidden(self.cast, direction, &reading) {
            panic!("passed {direction}: {why}\n{frame:02x?}");
        }
        let side = if direction == Direction::Egress { 0 } else { 2 };
        for assembly in &mut self.assemblies[side..side + 2] {
            if let Some(why) =
                assembly.take(&reading).and_then(|whole| why_forbidden(self.cast, direction, &whole))
            {
                panic!("put together {direction} (last wins: {}): {why}\n{frame:02x?}", assembly.last_wins);
            }
        }
        Some(true)
    }

    /// Every frame that did not pass is counted under a reason, once.
    fn finish(self, least: u64) {
        assert_eq!(self.drops(), self.dropped, "drops counted, frames dropped");
        println!("{:?}: {} passed, {} dropped", self.cast.own, self.passed, self.dropped);
        assert!(self.passed >= least, "only {} passed: has the test gone blind?", self.passed);
    }
}

/// Packets as they should be: some allowed, some not.
fn packets(cast: Cast) -> Vec<(Direction, Packet, bool)> {
    let Cast { own, friend, stranger, .. } = cast;
    let (out, into) = (Direction::Egress, Direction::Ingress);
    vec![
        (out, Packet::tcp(own, 40_000, friend, 443, SYN), true),
        (out, Packet::udp(own, 40_001, friend, 53), true),
        (into, Packet::tcp(friend, 40_002, own, 80, SYN), true),
        (out, Packet::tcp(own, 80, friend, 40_002, SYN | ACK), true),
        (out, Packet::tcp(own, 40_000, friend, 22, SYN), false),
        (out, Packet::udp(own, 40_001, friend, 54), false),
        (out, Packet::tcp(own, 40_000, stranger, 443, SYN), false),
        (out, Packet::tcp(stranger, 40_000, friend, 443, SYN), false),
        (into, Packet::tcp(friend, 40_003, own, 22, SYN), false),
        (into, Packet::tcp(stranger, 40_003, own, 80, SYN), false),
        (into, Packet::udp(friend, 40_003, own, 53), false),
        (out, Packet::icmp(own, friend, if own.is_ipv4() { 8 } else { 128 }, 0, 7), false),
    ]
}

/// An extension header of a kind, `words` units of eight bytes beyond the first.
fn extension(kind: u8, next: u8, words: u8) -> Vec<u8> {
    let len = if kind == 51 { (usize::from(words) + 2) * 4 } else { (usize::from(words) + 1) * 8 };
    let mut bytes = vec![0; len.max(8)];
    (bytes[0], bytes[1]) = (next, words);
    bytes
}

/// Puts headers between an IPv6 header and what follows it; the length is made to fit.
fn with_extensions(frame: &[u8], kinds: &[(u8, u8)]) -> Vec<u8> {
    let mut next = frame[20];
    let mut chain = Vec::new();
    for (kind, words) in kinds.iter().rev() {
        let mut header = extension(*kind, next, *words);
        header.append(&mut chain);
        (chain, next) = (header, *kind);
    }
    let mut framed = frame[..54].to_vec();
    framed[20] = next;
    framed.extend(chain);
    framed.extend(&frame[54..]);
    let payload = (framed.len() - 54) as u16;
    framed[18..20].copy_from_slice(&payload.to_be_bytes());
    framed
}

/// Puts options behind an IPv4 header.
fn with_options(frame: &[u8], options: &[u8]) -> Vec<u8> {
    let mut framed = frame[..34].to_vec();
    framed.extend(options);
    framed.extend(&frame[34..]);
    framed[14] = 0x40 | (5 + options.len() / 4) as u8;
    let total = (framed.len() - 14) as u16;
    framed[16..18].copy_from_slice(&total.to_be_bytes());
    framed
}

fn with_tags(frame: &[u8], tags: &[[u8; 2]]) -> Vec<u8> {
    let mut framed = frame[..12].to_vec();
    for tag in tags {
        framed.extend(tag);
        framed.extend([0, 7]);
    }
    framed.extend(&frame[12..]);
    framed
}

/// One mutation.
fn mutate(random: &mut Random, frame: &mut Vec<u8>) {
    if frame.len() < 15 {
        return;
    }
    // Where the headers are, mostly.
    let place = |random: &mut Random, len: usize| {
        if random.below(4) == 0 { random.below(len) } else { 12 + random.below((len - 12).min(60)) }
    };
    match random.below(9) {
        0 => {
            let at = place(random, frame.len());
            frame[at] ^= 1 << random.below(8);
        }
        1 => {
            let at = place(random, frame.len());
            frame[at] = random.one(&[0, 1, 4, 6, 17, 44, 51, 58, 60, 0x45, 0x60, 0x81, 0xff, random.0 as u8]);
        }
        2 => frame.truncate(14 + random.below(frame.len() - 14)),
        3 => frame.extend((0..random.below(64)).map(|byte| byte as u8)),
        4 => {
            let at = 12 + random.below(frame.len() - 12);
            frame.insert(at, random.0 as u8);
        }
        5 => {
            let at = 12 + random.below(frame.len() - 12);
            frame.remove(at);
        }
        6 => *frame = with_tags(frame, &[random.one(&[[0x81, 0], [0x88, 0xa8], [0x91, 0]])]),
        // The lengths.
        7 => {
            let at = random.one(&[16, 17, 18, 19]);
            if let Some(byte) = frame.get_mut(at) {
                *byte = byte.wrapping_add(random.one(&[1, 4, 8, 255, 252, 248]));
            }
        }
        // Fragment bits and offsets.
        _ => {
            let at = random.one(&[20, 21, 56, 57]);
            if let Some(byte) = frame.get_mut(at) {
                *byte ^= random.one(&[0x20, 1, 2, 8, 0x40, 0x80]);
            }
        }
    }
}

#[test]
fn no_mutation_of_a_frame_gets_past_the_policy() {
    for cast in families() {
        let mut trial = Trial::new(cast);
        let mut random = Random(0x5eed_0001);
        let packets = packets(cast);
        for (direction, packet, allowed) in &packets {
            assert_eq!(trial.send(*direction, &packet.frame()), Some(*allowed), "{packet:?}");
        }
        // Cut at each byte.
        for (direction, packet, _) in &packets {
            let frame = packet.frame();
            for len in 0..frame.len() {
                let passed = trial.send(*direction, &frame[..len]);
                assert_ne!(passed, Some(true), "cut to {len}: {packet:?}");
            }
        }
        for round in 0..50_000 {
            let (direction, packet, _) = &packets[round % packets.len()];
            let mut packet = packet.clone();
            if random.below(6) == 0 {
                let id = random.below(4) as u16;
                packet.fragment = Some((id, random.below(5) as u16 * 8, random.below(2) == 0));
            }
            let mut frame = packet.frame();
            if random.below(4) == 0 {
                let chain: Vec<(u8, u8)> = (0..random.below(12))
                    .map(|_| (random.one(&EXTENSIONS), random.one(&[0, 0, 0, 1, 2, 30])))
                    .collect();
                frame = match cast.own {
                    IpAddr::V6(_) => with_extensions(&frame, &chain),
                    IpAddr::V4(_) => {
                        let options: Vec<u8> =
                            (0..random.below(11) * 4).map(|_| random.below(256) as u8).collect();
                        with_options(&frame, &options)
                    }
                };
            }
            for _ in 0..random.below(4) {
                mutate(&mut random, &mut frame);
            }
            trial.send(*direction, &frame);
        }
        trial.finish(2_000);
    }
}

#[test]
fn valid_frames_pass_behind_tags_options_and_extension_headers() {
    for cast in families() {
        let mut trial = Trial::new(cast);
        for (direction, packet, allowed) in packets(cast) {
            let frame = packet.frame();
            let mut frames =
                vec![with_tags(&frame, &[[0x81, 0]]), with_tags(&frame, &[[0x88, 0xa8], [0x81, 0]])];
            match cast.own {
                IpAddr::V4(_) => {
                    frames.extend((0..=10).map(|words| with_options(&frame, &vec![1; words * 4])))
                }
                IpAddr::V6(_) => {
                    for kinds in [
                        &[(0, 0)][..],
                        &[(DESTINATION_OPTIONS, 3)],
                        &[(0, 0), (DESTINATION_OPTIONS, 1), (FRAGMENT, 0)],
                        &[(0, 0), (43, 2), (51, 4), (DESTINATION_OPTIONS, 0)],
                        &[(DESTINATION_OPTIONS, 200)],
                        &[(DESTINATION_OPTIONS, 0); 8],
                    ] {
                        frames.push(with_extensions(&frame, kinds));
                    }
                }
            }
            for frame in frames {
                assert_eq!(trial.send(direction, &frame), Some(allowed), "{packet:?}\n{frame:02x?}");
            }
            // Frames are padded to 60 bytes on a wire.
            let padded: Vec<u8> = frame.iter().copied().chain([0xee; 40]).collect();
            assert_eq!(trial.send(direction, &padded), Some(allowed), "padded: {packet:?}");
        }
        trial.finish(1);
    }
}

/// A datagram over IPv6 or IPv4, cut into parts at the given places: offset, bytes, more.
fn part(cast: Cast, id: u16, header: u8, at: usize, bytes: &[u8], more: bool, padding: &[u8]) -> Vec<u8> {
    let mut packet = Packet::udp(cast.own, 0, cast.friend, 0);
    packet.protocol = bulkhead_model::ports::Protocol(header);
    packet.l4 = bytes.to_vec();
    packet.fragment = Some((id, at as u16, more));
    let mut frame = packet.frame();
    frame.extend(padding);
    frame
}

fn tcp(port: u16, flags: u8) -> Vec<u8> {
    let ip = IpAddr::from([0, 0, 0, 0]);
    Packet::tcp(ip, 40_000, ip, port, flags).l4
}

#[test]
fn whole_datagrams_pass_in_parts() {
    for cast in families() {
        let mut trial = Trial::new(cast);
        let mut datagram = tcp(443, SYN);
        datagram.extend([7; 44]);
        for (id, cut) in [(1, 24), (2, 32), (3, 56)] {
            assert_eq!(
                trial.send(Direction::Egress, &part(cast, id, TCP, 0, &datagram[..cut], true, &[])),
                Some(true)
            );
            let rest = part(cast, id, TCP, cut, &datagram[cut..], false, &[]);
            assert_eq!(trial.send(Direction::Egress, &rest), Some(true));
        }
        trial.finish(6);
    }
}

/// The first part ends before the ports, which stand in the padding as the filter would like them; the next part brings
/// others.
#[test]
fn ports_are_not_read_from_behind_the_end_of_a_packet() {
    for cast in families() {
        let mut trial = Trial::new(cast);
        // IPv4 has nothing that could stand before the ports.
        if cast.own.is_ipv6() {
            for words in 0..3 {
                let before = extension(DESTINATION_OPTIONS, TCP, words);
                let at = before.len();
                for header in [TCP, DESTINATION_OPTIONS, UDP] {
                    let id = u16::from(words) * 16 + u16::from(header);
                    let first = part(cast, id, DESTINATION_OPTIONS, 0, &before, true, &tcp(443, SYN));
                    assert_eq!(trial.send(Direction::Egress, &first), Some(false));
                    trial.send(Direction::Egress, &part(cast, id, header, at, &tcp(22, SYN), false, &[]));
                }
            }
        }
        for (id, len) in (200..).zip([0, 4, 8, 12, 16]) {
            let whole = tcp(443, SYN);
            let first = part(cast, id, TCP, 0, &whole[..len], true, &whole[len..]);
            assert_eq!(trial.send(Direction::Egress, &first), Some(false), "{len} bytes of a header");
            trial.send(Direction::Egress, &part(cast, id, TCP, 8, &tcp(22, SYN)[8..], false, &[]));
        }
        trial.finish(0);
    }
}

/// A later part begins within what was judged, wherever that stands.
#[test]
fn a_later_part_rewrites_nothing_that_was_judged() {
    for cast in families() {
        let mut trial = Trial::new(cast);
        let chains: &[&[u8]] = if cast.own.is_ipv4() { &[&[]] } else { &[&[], &[0], &[1], &[5]] };
        let mut id = 0;
        for chain in chains {
            let before: Vec<u8> =
                chain.iter().flat_map(|words| extension(DESTINATION_OPTIONS, TCP, *words)).collect();
            let kind = if chain.is_empty() { TCP } else { DESTINATION_OPTIONS };
            // A call elsewhere, and what began as the middle of a connection.
            for (good, bad) in
                [(tcp(443, SYN), tcp(22, SYN)), (tcp(443, ACK), tcp(443, SYN)), (tcp(443, SYN), tcp(22, ACK))]
            {
                let (mut first, mut second) = (before.clone(), before.clone());
                first.extend(good);
                first.resize(first.len().next_multiple_of(8), 0);
                second.extend(bad);
                second.resize(second.len().next_multiple_of(8) + 24, 0);
                for at in (8..first.len()).step_by(8) {
                    for header in [TCP, DESTINATION_OPTIONS, 0] {
                        id += 1;
                        let whole = part(cast, id, kind, 0, &first, true, &[]);
                        assert_eq!(trial.send(Direction::Egress, &whole), Some(true), "a first part, {at}");
                        let rewriting = part(cast, id, header, at, &second[at..], false, &[]);
                        let passed = trial.send(Direction::Egress, &rewriting);
                        assert_eq!(passed, Some(false), "from {at} of {}", first.len());
                    }
                }
            }
        }
        trial.finish(1);
    }
}

#[test]
fn sources_that_are_not_the_workloads_own_are_dropped_and_named() {
    for cast in families() {
        let mut trial = Trial::new(cast);
        let mut random = Random(0x5eed_0002);
        let mut seen = BTreeSet::new();
        for _ in 0..500 {
            let noise = random.0 as u32;
            let source: IpAddr = match cast.own {
                IpAddr::V4(own) => Ipv4Addr::from_bits(own.to_bits() ^ (1 << random.below(32))).into(),
                IpAddr::V6(own) => Ipv6Addr::from_bits(own.to_bits() ^ (1 << random.below(128))).into(),
            };
            let port = 1024 + (noise % 60_000) as u16;
            seen.insert(source);
            assert_eq!(
                trial.send(Direction::Egress, &Packet::tcp(source, port, cast.friend, 443, SYN).frame()),
                Some(false),
                "{source}"
            );
        }
        assert_eq!(trial.bench.drops(DropReason::Spoofed), 500);
        let named: BTreeSet<IpAddr> = trial
            .bench
            .events()
            .into_iter()
            .filter(|event| event.reason == DropReason::Spoofed)
            .map(|event| event.key.local)
            .collect();
        assert_eq!(named, seen, "each source is told by its address");
        trial.finish(0);
    }
}
