//! Addresses and prefixes of both families in one ordered key space.
//!
//! IPv4 is kept as IPv4-mapped IPv6 (RFC 4291 section 2.5.5.2), so that one table, one key width
//! and one comparison serve both families, here and in the kernel maps. A v4 prefix never contains
//! a v6 address, since the mapped range `::ffff:0:0/96` is never legal on the wire.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Bits before the IPv4 address in its mapped form.
const V4_OFFSET: u8 = 96;

/// An address block in canonical form (no host bits set), of either family.
///
/// Ordering is by first address, then by length, so that everything inside a prefix follows it
/// directly in a sorted map.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Prefix {
    /// Big-endian, which orders like the number, and takes half the room of an aligned number in tables of
    /// hundreds of thousands.
    bytes: [u8; 16],
    len: u8,
}

/// Why a text is not a prefix.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PrefixError {
    /// The part before the slash is no address.
    #[error("{0:?} is not an IP address")]
    Address(String),
    /// The part after the slash is no length of that family.
    #[error("{text:?} is not a prefix length between 0 and {max}")]
    Length {
        /// What was written after the slash.
        text: String,
        /// Longest prefix of that family.
        max: u8,
    },
    /// Bits are set beyond the prefix length; the second text is the block that was meant.
    #[error("{0:?} has bits set beyond its prefix length; did you mean {1}?")]
    HostBits(String, String),
}

/// The address as 128 bits, IPv4 in mapped form.
pub fn address_bits(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().to_bits(),
        IpAddr::V6(v6) => v6.to_bits(),
    }
}

/// The inverse of [`address_bits`].
pub fn address_from_bits(bits: u128) -> IpAddr {
    let v6 = Ipv6Addr::from_bits(bits);
    v6.to_ipv4_mapped().map_or(IpAddr::V6(v6), IpAddr::V4)
}

impl Prefix {
    /// The block that holds exactly this address.
    pub fn host(address: IpAddr) -> Self {
        Self { bytes: address_bits(address).to_be_bytes(), len: 128 }
    }

    /// The block of `len` bits (in the address's own family) around `address`, host bits cleared.
    /// `len` is capped at the family's width.
    pub fn new(address: IpAddr, len: u8) -> Self {
        let len = match address {
            IpAddr::V4(_) => len.min(32) + V4_OFFSET,
            IpAddr::V6(_) => len.min(128),
        };
        Self::from_bits(address_bits(address), len)
    }

    /// From the mapped 128-bit form; `len` counts from the first of the 128 bits.
    pub fn from_bits(bits: u128, len: u8) -> Self {
        let len = len.min(128);
        Self { bytes: (bits & mask(len)).to_be_bytes(), len }
    }

    /// First address as 128 bits, IPv4 mapped.
    pub fn bits(self) -> u128 {
        u128::from_be_bytes(self.bytes)
    }

    /// Length in the mapped 128-bit space (an IPv4 /24 answers 120).
    pub fn mapped_len(self) -> u8 {
        self.len
    }

    /// Last address as 128 bits, IPv4 mapped.
    pub fn last_bits(self) -> u128 {
        self.bits() | !mask(self.len)
    }

    /// First address.
    pub fn address(self) -> IpAddr {
        if self.is_v4() { address_from_bits(self.bits()) } else { Ipv6Addr::from_bits(self.bits()).into() }
    }

    /// Whether it is a single address.
    pub fn is_host(self) -> bool {
        self.len == 128
    }

    /// Whether it is an IPv4 block.
    pub fn is_v4(self) -> bool {
        self.len >= V4_OFFSET && self.bits() >> 32 == 0xffff
    }

    /// Whether `other` lies inside this block (a block contains itself).
    pub fn contains(self, other: Self) -> bool {
        self.len <= other.len && other.bits() & mask(self.len) == self.bits() && self.is_v4() == other.is_v4()
    }

    /// Whether the address lies inside this block.
    pub fn contains_address(self, address: IpAddr) -> bool {
        self.contains(Self::host(address))
    }

    /// The enclosing block with `len` bits of the mapped space.
    pub fn truncate(self, len: u8) -> Self {
        Self::from_bits(self.bits(), len.min(self.len))
    }
}

fn mask(len: u8) -> u128 {
    if len == 0 { 0 } else { u128::MAX << (128 - u32::from(len)) }
}

impl FromStr for Prefix {
    type Err = PrefixError;

    fn from_str(text: &str) -> Result<Self, PrefixError> {
        let (address_text, len_text) = match text.split_once('/') {
            Some((address, len)) => (address, Some(len)),
            None => (text, None),
        };
        let address: IpAddr =
            address_text.parse().map_err(|_unhelpful| PrefixError::Address(address_text.into()))?;
        let max = if address.is_ipv4() { 32 } else { 128 };
        let len = match len_text {
            None => max,
            Some(len_text) => len_text
                .parse::<u8>()
                .ok()
                .filter(|len| *len <= max)
                .ok_or_else(|| PrefixError::Length { text: len_text.into(), max })?,
        };
        let prefix = Self::new(address, len);
        if prefix.bits() != address_bits(address) {
            return Err(PrefixError::HostBits(text.into(), prefix.to_string()));
        }
        Ok(prefix)
    }
}

impl Prefix {
    /// As [`FromStr`], but bits beyond the length do not count, as in Kubernetes and Calico.
    ///
    /// # Errors
    /// If it is no block of addresses.
    pub fn parse_masked(text: &str) -> Result<Self, PrefixError> {
        match text.parse() {
            Err(PrefixError::HostBits(_, masked)) => masked.parse(),
            other => other,
        }
    }
}

impl fmt::Display for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_v4() {
            let low = u32::try_from(self.bits() & u128::from(u32::MAX)).unwrap_or_default();
            write!(f, "{}/{}", Ipv4Addr::from_bits(low), self.len - V4_OFFSET)
        } else {
            write!(f, "{}/{}", Ipv6Addr::from_bits(self.bits()), self.len)
        }
    }
}

impl fmt::Debug for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl From<Prefix> for String {
    fn from(prefix: Prefix) -> Self {
        prefix.to_string()
    }
}

impl TryFrom<String> for Prefix {
    type Error = PrefixError;

    fn try_from(text: String) -> Result<Self, PrefixError> {
        text.parse()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prefix(text: &str) -> Prefix {
        text.parse().unwrap()
    }

    #[test]
    fn prints_what_it_parsed_in_both_families() {
        for text in ["10.0.0.0/8", "0.0.0.0/0", "192.0.2.7/32", "2001:db8::/32", "::/0", "::1/128"] {
            assert_eq!(prefix(text).to_string(), text);
        }
        assert_eq!(prefix("10.1.2.3"), prefix("10.1.2.3/32"));
    }

    #[test]
    fn a_block_of_one_family_never_contains_the_other() {
        assert!(!prefix("::/0").contains_address("10.0.0.1".parse().unwrap()));
        assert!(!prefix("0.0.0.0/0").contains_address("2001:db8::1".parse().unwrap()));
        assert!(prefix("0.0.0.0/0").contains_address("10.0.0.1".parse().unwrap()));
    }

    #[test]
    fn errors_name_what_was_meant() {
        assert_eq!(
            "10.0.0.1/8".parse::<Prefix>().unwrap_err().to_string(),
            "\"10.0.0.1/8\" has bits set beyond its prefix length; did you mean 10.0.0.0/8?"
        );
        assert!(matches!("10.0.0.0/33".parse::<Prefix>(), Err(PrefixError::Length { max: 32, .. })));
        assert!(matches!("web/8".parse::<Prefix>(), Err(PrefixError::Address(_))));
    }

    #[test]
    fn everything_inside_a_block_follows_it_in_order() {
        let outer = prefix("10.0.0.0/8");
        let inner = prefix("10.0.0.0/24");
        let host = prefix("10.255.255.255/32");
        assert!(outer < inner && inner < host && host < prefix("11.0.0.0/8"));
        assert!(host.bits() <= outer.last_bits());
    }
}
