//! Protocols and ports, and the one ordered key space that compiled tables use for both.
//!
//! A [`PortKey`] is `protocol << 16 | port`; for ICMP the "port" is `type << 8 | code`, for other
//! protocols without ports it is 0. Any set of (protocol, port) pairs is thus a set of intervals.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// `protocol << 16 | port`, below [`PORT_KEY_END`].
pub type PortKey = u32;

/// One past the largest port key.
pub const PORT_KEY_END: PortKey = 1 << 24;

/// What a question about a connection means if it does not say where the connection comes from: an ephemeral port, so
/// that rules on well-known source ports do not match by accident.
pub const USUAL_SOURCE_PORT: u16 = 50_000;

/// An IP protocol number (IANA "Assigned Internet Protocol Numbers").
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Protocol(pub u8);

impl Protocol {
    /// ICMP for IPv4.
    pub const ICMP: Self = Self(1);
    /// TCP.
    pub const TCP: Self = Self(6);
    /// UDP.
    pub const UDP: Self = Self(17);
    /// ICMP for IPv6.
    pub const ICMPV6: Self = Self(58);
    /// SCTP.
    pub const SCTP: Self = Self(132);
    /// UDP-Lite (RFC 3828).
    pub const UDPLITE: Self = Self(136);

    /// Names accepted in policy, with their numbers.
    pub const NAMES: [(&'static str, Self); 6] = [
        ("tcp", Self::TCP),
        ("udp", Self::UDP),
        ("sctp", Self::SCTP),
        ("udplite", Self::UDPLITE),
        ("icmp", Self::ICMP),
        ("icmpv6", Self::ICMPV6),
    ];

    /// Whether its packets carry a destination port.
    pub fn has_ports(self) -> bool {
        matches!(self, Self::TCP | Self::UDP | Self::SCTP | Self::UDPLITE)
    }

    /// Whether its packets carry a type and a code.
    pub fn is_icmp(self) -> bool {
        matches!(self, Self::ICMP | Self::ICMPV6)
    }

    /// The protocol that a port key is of.
    pub fn of_key(key: PortKey) -> Self {
        Self(u8::try_from(key >> 16).unwrap_or(u8::MAX))
    }

    /// The key of a destination port (or ICMP `type << 8 | code`) under this protocol.
    pub fn key(self, port: u16) -> PortKey {
        u32::from(self.0) << 16 | u32::from(port)
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match Self::NAMES.iter().find(|(_, protocol)| protocol == self) {
            Some((name, _)) => f.write_str(name),
            None => write!(f, "{}", self.0),
        }
    }
}

impl fmt::Debug for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A port that a workload gives a name to.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct NamedPort {
    /// Its name.
    pub name: String,
    /// Its protocol, one with ports.
    pub protocol: Protocol,
    /// Its number.
    pub port: u16,
}

/// Whether a text can name a port: letters, digits and `-`, at least one letter (RFC 6335 section 5.1, with any length
/// up to 63 as Kubernetes and Calico have it).
pub fn is_port_name(text: &str) -> bool {
    (1..=63).contains(&text.len())
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.'))
        && text.bytes().any(|byte| byte.is_ascii_alphabetic())
}

/// One entry of a rule's `ports`: `tcp/5432`, `tcp/8000-8100`, `tcp/http`, `udp`, `icmp/8/0`, `any`, `any/http`.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum PortMatch {
    /// Every protocol and port.
    Any,
    /// Every port (or type and code) of one protocol.
    Protocol(Protocol),
    /// Destination ports from `first` to `last`, both included.
    Ports {
        /// A protocol with ports.
        protocol: Protocol,
        /// Lowest port.
        first: u16,
        /// Highest port, never below `first`.
        last: u16,
    },
    /// ICMP messages of one type and, if given, one code.
    Icmp {
        /// ICMP or ICMPv6.
        protocol: Protocol,
        /// Message type.
        kind: u8,
        /// Message code; absent means every code.
        code: Option<u8>,
    },
    /// Ports that the destination itself gives this name to, so that one name can mean other numbers elsewhere.
    Named {
        /// Only if the named port has this protocol; absent means any with ports.
        protocol: Option<Protocol>,
        /// The name.
        name: String,
    },
}

/// Why a text is not a port match. `expected` completes "expected …".
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a port match: expected {expected}")]
pub struct PortMatchError {
    /// What was written.
    pub text: String,
    /// What would have been right at the place that failed.
    pub expected: String,
}

impl PortMatch {
    /// First and last port key that match, both included; `None` for a named port, which has none of its own.
    pub fn interval(&self) -> Option<(PortKey, PortKey)> {
        let interval = match *self {
            Self::Named { .. } => return None,
            Self::Any => (0, PORT_KEY_END - 1),
            Self::Protocol(protocol) => (protocol.key(0), protocol.key(u16::MAX)),
            Self::Ports { protocol, first, last } => (protocol.key(first), protocol.key(last)),
            Self::Icmp { protocol, kind, code: Some(code) } => {
                let key = protocol.key(u16::from_be_bytes([kind, code]));
                (key, key)
            }
            Self::Icmp { protocol, kind, code: None } => (
                protocol.key(u16::from_be_bytes([kind, 0])),
                protocol.key(u16::from_be_bytes([kind, u8::MAX])),
            ),
        };
        Some(interval)
    }

    /// Its port key, if it means a single port or message.
    pub fn single(&self) -> Option<PortKey> {
        match self {
            // Without a code it stands for code 0, which is what most messages have.
            Self::Icmp { .. } => self.interval().map(|(first, _)| first),
            Self::Protocol(protocol) if !protocol.has_ports() => self.interval().map(|(first, _)| first),
            Self::Ports { first, last, .. } if first == last => self.interval().map(|(first, _)| first),
            _ => None,
        }
    }

    /// Whether it matches a packet with this key to a destination that names these ports.
    pub fn matches(&self, key: PortKey, destination: &[NamedPort]) -> bool {
        match self {
            Self::Named { .. } => destination.iter().any(|port| self.names(port) && port.key() == key),
            _ => self.interval().is_some_and(|(first, last)| first <= key && key <= last),
        }
    }

    /// Whether nothing that has a source port can match.
    pub fn is_portless(&self) -> bool {
        match self {
            Self::Icmp { .. } => true,
            Self::Protocol(protocol) => !protocol.has_ports(),
            Self::Any | Self::Ports { .. } | Self::Named { .. } => false,
        }
    }

    /// Whether it is this port's name and protocol.
    pub fn names(&self, port: &NamedPort) -> bool {
        match self {
            Self::Named { protocol, name } => {
                *name == port.name && protocol.is_none_or(|protocol| protocol == port.protocol)
            }
            Self::Any | Self::Protocol(_) | Self::Ports { .. } | Self::Icmp { .. } => false,
        }
    }
}

/// One entry of a rule's `sourcePorts`: `53` or `1024-65535`, of any protocol that has ports.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PortRange {
    /// Lowest port.
    pub first: u16,
    /// Highest port, never below `first`.
    pub last: u16,
}

/// Why a text is not a range of source ports. `expected` completes "expected …".
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a source port: expected {expected}")]
pub struct PortRangeError {
    /// What was written.
    pub text: String,
    /// What would have been right.
    pub expected: String,
}

impl PortRange {
    /// Whether a port lies in it.
    pub fn contains(self, port: u16) -> bool {
        self.first <= port && port <= self.last
    }

    /// A number if it is a single port, else a text.
    pub(crate) fn to_json(self) -> serde_json::Value {
        if self.first == self.last { self.first.into() } else { self.to_string().into() }
    }
}

impl fmt::Display for PortRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { first, last } = self;
        if first == last { write!(f, "{first}") } else { write!(f, "{first}-{last}") }
    }
}

impl fmt::Debug for PortRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for PortRange {
    type Err = PortRangeError;

    fn from_str(text: &str) -> Result<Self, PortRangeError> {
        let fail = |expected: &str| PortRangeError { text: text.into(), expected: expected.into() };
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        let port = |text: &str| {
            // The parser of numbers would take a sign.
            let digits = text.bytes().all(|byte| byte.is_ascii_digit());
            let port = text.parse::<u16>().ok().filter(|_| digits);
            port.ok_or_else(|| fail("a port from 0 to 65535 or a range of them like 1024-65535, no protocol"))
        };
        let (first, last) = (port(first)?, port(last)?);
        if first > last {
            return Err(fail(&format!("the lower port first, like {last}-{first}")));
        }
        Ok(Self { first, last })
    }
}

impl NamedPort {
    /// The key of packets to it.
    pub fn key(&self) -> PortKey {
        self.protocol.key(self.port)
    }
}

impl fmt::Display for PortMatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Named { protocol: Some(protocol), ref name } => write!(f, "{protocol}/{name}"),
            Self::Named { protocol: None, ref name } => write!(f, "any/{name}"),
            Self::Any => f.write_str("any"),
            Self::Protocol(protocol) => write!(f, "{protocol}"),
            Self::Ports { protocol, first, last } if first == last => write!(f, "{protocol}/{first}"),
            Self::Ports { protocol, first, last } => write!(f, "{protocol}/{first}-{last}"),
            Self::Icmp { protocol, kind, code: Some(code) } => write!(f, "{protocol}/{kind}/{code}"),
            Self::Icmp { protocol, kind, code: None } => write!(f, "{protocol}/{kind}"),
        }
    }
}

impl fmt::Debug for PortMatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl From<PortMatch> for String {
    fn from(ports: PortMatch) -> Self {
        ports.to_string()
    }
}

impl TryFrom<String> for PortMatch {
    type Error = PortMatchError;

    fn try_from(text: String) -> Result<Self, PortMatchError> {
        text.parse()
    }
}

impl FromStr for PortMatch {
    type Err = PortMatchError;

    fn from_str(text: &str) -> Result<Self, PortMatchError> {
        let fail = |expected: &str| PortMatchError { text: text.into(), expected: expected.into() };
        let lower = text.to_ascii_lowercase();
        let (name, rest) = match lower.split_once('/') {
            Some((name, rest)) => (name, Some(rest)),
            None => (lower.as_str(), None),
        };
        if name == "any" {
            return match rest {
                None => Ok(Self::Any),
                Some(rest) if is_port_name(rest) => Ok(Self::Named {
                    protocol: None,
                    name: text.get(text.len() - rest.len()..).unwrap_or(rest).into(),
                }),
                Some(_) => Err(fail("the name of a port after \"any/\"")),
            };
        }
        let protocol = parse_protocol(name).ok_or_else(|| {
            let known: Vec<_> = Protocol::NAMES.iter().map(|(name, _)| *name).collect();
            let hint = crate::suggest::nearest(name, known.iter().copied())
                .map(|near| format!(" (did you mean {near:?}?)"))
                .unwrap_or_default();
            fail(&format!("any, a protocol number from 1 to 255, or one of {}{hint}", known.join(", ")))
        })?;
        match rest {
            None => Ok(Self::Protocol(protocol)),
            // The original spelling: names of ports have upper and lower case.
            Some(rest) if protocol.has_ports() && is_port_name(rest) => {
                let name = text.get(text.len() - rest.len()..).unwrap_or(rest).to_owned();
                Ok(Self::Named { protocol: Some(protocol), name })
            }
            Some(rest) if protocol.has_ports() => {
                let (first, last) = rest.split_once('-').unwrap_or((rest, rest));
                let port = |text: &str| {
                    text.parse::<u16>().ok().filter(|port| *port > 0).ok_or_else(|| {
                        fail("a port from 1 to 65535, a range of them like 8000-8100, or a port's name")
                    })
                };
                let (first, last) = (port(first)?, port(last)?);
                if first > last {
                    return Err(fail(&format!("the lower port first, like {last}-{first}")));
                }
                Ok(Self::Ports { protocol, first, last })
            }
            Some(rest) if protocol.is_icmp() => {
                let (kind, code) = match rest.split_once('/') {
                    Some((kind, code)) => (kind, Some(code)),
                    None => (rest, None),
                };
                let byte = |text: &str, what: &str| {
                    text.parse::<u8>().map_err(|_unhelpful| fail(&format!("a {what} from 0 to 255")))
                };
                let kind = byte(kind, "message type")?;
                let code = code.map(|code| byte(code, "message code")).transpose()?;
                Ok(Self::Icmp { protocol, kind, code })
            }
            Some(_) => Err(fail(&format!("no port, since protocol {protocol} has none"))),
        }
    }
}

fn parse_protocol(name: &str) -> Option<Protocol> {
    Protocol::NAMES.iter().find(|(known, _)| *known == name).map(|(_, protocol)| *protocol).or_else(|| {
        // 0 is IPv6 hop-by-hop options, an extension header and no protocol of its own.
        name.parse::<u8>().ok().filter(|number| *number > 0).map(Protocol)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ports(text: &str) -> PortMatch {
        text.parse().unwrap()
    }

    #[test]
    fn prints_what_it_parsed() {
        for text in [
            "any",
            "tcp",
            "tcp/80",
            "tcp/8000-8100",
            "udp/53",
            "sctp/9000",
            "icmp/8/0",
            "icmpv6/128",
            "47",
            "tcp/serve-80-tcp",
            "any/Web",
        ] {
            assert_eq!(ports(text).to_string(), text);
        }
        assert_eq!(ports("TCP/80"), ports("tcp/80-80"));
        assert_eq!(ports("6"), ports("tcp"));
    }

    #[test]
    fn errors_say_what_was_expected() {
        let error = |text: &str| text.parse::<PortMatch>().unwrap_err().expected;
        assert!(error("tcp/70000").contains("1 to 65535"));
        assert!(error("tpc/80").contains("did you mean \"tcp\"?"));
        assert!(error("tcp/90-80").contains("80-90"));
        assert!(error("tcp/ht tp").contains("a port's name"));
        assert!(error("icmp/300").contains("0 to 255"));
        assert!(error("47/1").contains("has none"));
        assert!(error("tcp/0").contains("1 to 65535"));
    }

    #[test]
    fn source_ports_are_numbers_and_ranges_of_them() {
        for text in ["0", "53", "1024-65535", "0-65535"] {
            assert_eq!(text.parse::<PortRange>().unwrap().to_string(), text);
        }
        assert_eq!("53-53".parse::<PortRange>().unwrap().to_string(), "53");
        let error = |text: &str| text.parse::<PortRange>().unwrap_err().expected;
        assert!(error("90-80").contains("80-90"));
        for text in ["65536", "tcp/53", "", "-", "+5", "1-2-3", "dns"] {
            assert!(error(text).contains("0 to 65535"), "{text}");
        }
    }

    #[test]
    fn icmp_type_without_code_covers_every_code() {
        assert!(ports("icmp/3").matches(Protocol::ICMP.key(0x0304), &[]));
        assert!(!ports("icmp/3").matches(Protocol::ICMP.key(0x0400), &[]));
        assert!(!ports("icmp/3").matches(Protocol::ICMPV6.key(0x0304), &[]));
    }
}
