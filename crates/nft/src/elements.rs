//! Keys and data of the sets that policy fills, and what they mean.

use std::net::IpAddr;

use bulkhead_model::Prefix;
use bulkhead_model::address::address_from_bits;
use bulkhead_model::host_policy::{Attachment, ClassId, Column, CompiledId};
use bulkhead_model::ports::{PORT_KEY_END, PortKey};

use crate::object::Element;
use crate::schema::{DEFAULT_ROW, Words};
use crate::segments::Segment;

/// Bits of `::ffff:0:0`, under which IPv4 stands among the 128-bit addresses.
const MAPPED: u128 = 0xffff << 32;

/// An endpoint as keys have it: kind and number.
pub(crate) fn attachment_key(attachment: Attachment) -> Vec<u8> {
    let (kind, number) = match attachment {
        Attachment::Interface(index) => (0, index),
        Attachment::Host(index) => (1, index),
        Attachment::Cgroup(inode) => (2, inode),
        Attachment::Forwarded(index) => (3, index),
    };
    words(&[kind, number])
}

pub(crate) fn read_attachment(key: &[u8]) -> Option<Attachment> {
    let index = number(key.get(4..8)?)?;
    match number(key.get(..4)?)? {
        0 => Some(Attachment::Interface(index)),
        1 => Some(Attachment::Host(index)),
        2 => Some(Attachment::Cgroup(index)),
        3 => Some(Attachment::Forwarded(index)),
        _ => None,
    }
}

pub(crate) fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

pub(crate) fn address(octets: &[u8]) -> Option<IpAddr> {
    match octets.len() {
        4 => Some(IpAddr::from(<[u8; 4]>::try_from(octets).ok()?)),
        16 => Some(IpAddr::from(<[u8; 16]>::try_from(octets).ok()?)),
        _ => None,
    }
}

fn octets_of_bits(bits: u128, v6: bool) -> Vec<u8> {
    let bytes = bits.to_be_bytes();
    if v6 { bytes.to_vec() } else { bytes[12..].to_vec() }
}

pub(crate) fn bits_of_octets(octets: &[u8]) -> Option<u128> {
    match octets.len() {
        4 => Some(MAPPED | u128::from(u32::from_be_bytes(octets.try_into().ok()?))),
        16 => Some(u128::from_be_bytes(octets.try_into().ok()?)),
        _ => None,
    }
}

fn last_of_family(v6: bool) -> u128 {
    if v6 { u128::MAX } else { MAPPED | u128::from(u32::MAX) }
}

/// A range as its two ends. One that reaches the end of the space has none.
pub(crate) fn segment(segment: Segment, v6: bool, into: &mut Vec<Element>) {
    let key = octets_of_bits(segment.first, v6);
    into.push(Element::Key { key, data: segment.class.0.to_be_bytes().to_vec() });
    if segment.last < last_of_family(v6) {
        into.push(Element::End { key: octets_of_bits(segment.last + 1, v6) });
    }
}

/// The ranges that `elements` are.
pub(crate) fn segments(mut elements: Vec<Element>, v6: bool) -> Vec<Segment> {
    elements.sort_unstable_by(|left, right| order(left).cmp(&order(right)));
    let mut all: Vec<Segment> = Vec::new();
    for element in elements {
        match element {
            Element::Key { key, data } => {
                let (Some(first), Some(class)) = (bits_of_octets(&key), number(&data)) else { continue };
                all.push(Segment { first, last: last_of_family(v6), class: ClassId(class) });
            }
            Element::End { key } => {
                if let (Some(segment), Some(end)) = (all.last_mut(), bits_of_octets(&key)) {
                    segment.last = segment.last.min(end.saturating_sub(1));
                }
            }
            Element::Otherwise { .. } => {}
        }
    }
    all
}

/// Where an element stands: an end comes before a beginning at the same place.
pub(crate) fn order(element: &Element) -> (&[u8], bool) {
    match element {
        Element::Key { key, .. } => (key, true),
        Element::End { key } => (key, false),
        Element::Otherwise { .. } => (&[], false),
    }
}

/// A big-endian number.
pub(crate) fn number(bytes: &[u8]) -> Option<u32> {
    Some(u32::from_be_bytes(bytes.try_into().ok()?))
}

/// Where interface indices stand in host order, as the packet path has them.
pub(crate) fn index(bytes: &[u8]) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.try_into().ok()?))
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_be_bytes()).collect()
}

/// The class that a row is kept under: its own, or that of default rows.
pub(crate) fn row_class(class: Option<ClassId>) -> u32 {
    class.map_or(DEFAULT_ROW, |class| class.0)
}

pub(crate) fn row(policy: CompiledId, class: u32, number: u32) -> Element {
    Element::Key { key: row_key(policy, class), data: words(&[number]) }
}

pub(crate) fn row_key(policy: CompiledId, class: u32) -> Vec<u8> {
    words(&[0, policy.0, class])
}

/// Policy, class and number of a row.
pub(crate) fn read_row(key: &[u8], data: &[u8]) -> Option<(CompiledId, u32, u32)> {
    Some((CompiledId(number(key.get(4..8)?)?), number(key.get(8..12)?)?, number(data)?))
}

pub(crate) fn step_key(steps: u32, key: PortKey) -> Vec<u8> {
    let [_, protocol, high, low] = key.to_be_bytes();
    [&words(&[0, steps])[..], &[protocol, 0, 0, 0, high, low, 0, 0]].concat()
}

/// A step function as intervals side by side.
pub(crate) fn steps(number: u32, columns: &[Column], into: &mut Vec<Element>) {
    for (place, column) in columns.iter().enumerate() {
        let data = Words::of(&column.cell).bytes().to_vec();
        into.push(Element::Key { key: step_key(number, column.first), data });
        let end = columns.get(place + 1).map_or(step_key(number + 1, 0), |next| step_key(number, next.first));
        into.push(Element::End { key: end });
    }
}

/// Number of the steps and one of them.
pub(crate) fn read_step(key: &[u8], data: &[u8]) -> Option<(u32, Column)> {
    let [protocol, _, _, _, high, low, _, _] = *key.get(8..16)? else { return None };
    let first = u32::from_be_bytes([0, protocol, high, low]);
    debug_assert!(first < PORT_KEY_END, "three bytes");
    Some((number(key.get(4..8)?)?, Column { first, cell: Words::read(data)?.cell() }))
}

pub(crate) fn variant_key(number: u32, first: u16) -> Vec<u8> {
    let [high, low] = first.to_be_bytes();
    [&words(&[0, number])[..], &[high, low, 0, 0]].concat()
}

/// Source ports as intervals side by side, each with the number of its steps.
pub(crate) fn variants(number: u32, variants: &[(u16, u32)], into: &mut Vec<Element>) {
    for (place, (first, steps)) in variants.iter().enumerate() {
        into.push(Element::Key { key: variant_key(number, *first), data: words(&[*steps]) });
        let end =
            variants.get(place + 1).map_or(variant_key(number + 1, 0), |next| variant_key(number, next.0));
        into.push(Element::End { key: end });
    }
}

/// Number of the variants, a source port and the steps from there on.
pub(crate) fn read_variant(key: &[u8], data: &[u8]) -> Option<(u32, u16, u32)> {
    let port = u16::from_be_bytes(key.get(8..10)?.try_into().ok()?);
    Some((number(key.get(4..8)?)?, port, number(data)?))
}

pub(crate) fn single(address: IpAddr, class: ClassId) -> Element {
    Element::Key { key: octets(address), data: words(&[class.0]) }
}

/// A block as it was given.
pub(crate) fn prefix(prefix: Prefix, class: ClassId) -> Element {
    let mut key = vec![0, 0, 0, prefix.mapped_len()];
    key.extend(octets_of_bits(prefix.bits(), !prefix.is_v4()));
    Element::Key { key, data: words(&[class.0]) }
}

pub(crate) fn read_prefix(key: &[u8], data: &[u8]) -> Option<(Prefix, ClassId)> {
    let (len, bits) = (*key.get(3)?, bits_of_octets(key.get(4..)?)?);
    Some((Prefix::from_bits(bits, len), ClassId(number(data)?)))
}

pub(crate) fn read_single(key: &[u8], data: &[u8]) -> Option<(Prefix, ClassId)> {
    Some((Prefix::host(address_from_bits(bits_of_octets(key)?)), ClassId(number(data)?)))
}
