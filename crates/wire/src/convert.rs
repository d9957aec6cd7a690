//! Conversions between wire and model. To the wire never fails; from the wire is checked.

use std::net::IpAddr;

use bulkhead_model::Prefix;
use bulkhead_model::ports::{NamedPort, Protocol};

use crate::proto;

/// A prefix on the wire that is none.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidPrefix {
    /// Neither 4 nor 16 bytes.
    #[error("an address has 4 or 16 bytes, not {0}")]
    AddressBytes(usize),
    /// Longer than the family allows.
    #[error("/{length} is too long for {address}")]
    Length {
        /// The address it stood beside.
        address: IpAddr,
        /// The length given.
        length: u32,
    },
}

/// A prefix as sent.
pub fn prefix_to_wire(prefix: Prefix) -> proto::Prefix {
    let (address, length) = match prefix.address() {
        IpAddr::V4(v4) => (v4.octets().to_vec(), prefix.mapped_len() - 96),
        IpAddr::V6(v6) => (v6.octets().to_vec(), prefix.mapped_len()),
    };
    proto::Prefix { address: address.into(), length: length.into() }
}

/// An address as sent: 4 or 16 bytes.
pub fn address_to_wire(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

/// An address as received; `None` if it is of neither length.
pub fn address_from_wire(bytes: &[u8]) -> Option<IpAddr> {
    match bytes.len() {
        4 => <[u8; 4]>::try_from(bytes).ok().map(IpAddr::from),
        16 => <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from),
        _ => None,
    }
}

/// A named port as sent.
pub fn port_to_wire(port: &NamedPort) -> proto::NamedPort {
    proto::NamedPort { name: port.name.clone(), protocol: port.protocol.0.into(), port: port.port.into() }
}

/// A named port as received; `None` if its numbers are out of range.
pub fn port_from_wire(port: &proto::NamedPort) -> Option<NamedPort> {
    let protocol = Protocol(u8::try_from(port.protocol).ok()?);
    Some(NamedPort { name: port.name.clone(), protocol, port: u16::try_from(port.port).ok()? })
}

/// A prefix as received.
///
/// # Errors
/// If the address or the length is of no family.
pub fn prefix_from_wire(prefix: &proto::Prefix) -> Result<Prefix, InvalidPrefix> {
    let address =
        address_from_wire(&prefix.address).ok_or(InvalidPrefix::AddressBytes(prefix.address.len()))?;
    let width = if address.is_ipv4() { 32 } else { 128 };
    match u8::try_from(prefix.length) {
        Ok(length) if length <= width => Ok(Prefix::new(address, length)),
        _ => Err(InvalidPrefix::Length { address, length: prefix.length }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes_survive_the_wire() {
        for text in ["10.0.0.0/8", "192.0.2.1/32", "2001:db8::/32", "0.0.0.0/0", "::/0"] {
            let prefix: Prefix = text.parse().unwrap();
            assert_eq!(prefix_from_wire(&prefix_to_wire(prefix)), Ok(prefix));
        }
    }

    #[test]
    fn nonsense_is_refused() {
        let wire = proto::Prefix { address: vec![1, 2, 3].into(), length: 8 };
        assert_eq!(prefix_from_wire(&wire), Err(InvalidPrefix::AddressBytes(3)));
        let wire = proto::Prefix { address: vec![10, 0, 0, 0].into(), length: 33 };
        assert!(matches!(prefix_from_wire(&wire), Err(InvalidPrefix::Length { length: 33, .. })));
    }
}
