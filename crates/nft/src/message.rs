//! Netlink messages of the netfilter subsystems, as bytes: attributes, batches, and reading them back.
//!
//! Only what this crate says. `netlink-packet-netfilter` carries set elements, but neither chains nor rules nor
//! expressions, which are most of it.

/// `NFNL_SUBSYS_NFTABLES`, `NFNL_SUBSYS_CTNETLINK`, `NFNL_SUBSYS_ULOG` of linux/netfilter/nfnetlink.h.
pub(crate) const SUBSYSTEM_NFTABLES: u16 = 10;
pub(crate) const SUBSYSTEM_CONNTRACK: u16 = 1;
pub(crate) const SUBSYSTEM_LOG: u16 = 4;

const BATCH_BEGIN: u16 = 16;
const BATCH_END: u16 = 17;
/// Message header and `struct nfgenmsg`.
const HEADER: usize = 16;
const GENERIC: usize = 4;
const NESTED: u16 = 1 << 15;
const TYPE_MASK: u16 = 0x3fff;

const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
/// `NLM_F_CREATE`.
pub(crate) const CREATE: u16 = 0x400;
/// `NLM_F_APPEND`.
pub(crate) const APPEND: u16 = 0x800;
/// `NLM_F_DUMP`.
pub(crate) const DUMP: u16 = 0x300;

/// Attributes being written.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct Attributes(pub(crate) Vec<u8>);

impl Attributes {
    pub(crate) fn bytes(&mut self, kind: u16, value: &[u8]) -> &mut Self {
        let length = u16::try_from(4 + value.len()).expect("attributes are cut before they are that long");
        self.0.extend(length.to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }

    pub(crate) fn text(&mut self, kind: u16, value: &str) -> &mut Self {
        let mut bytes = value.as_bytes().to_vec();
        bytes.push(0);
        self.bytes(kind, &bytes)
    }

    pub(crate) fn number(&mut self, kind: u16, value: u32) -> &mut Self {
        self.bytes(kind, &value.to_be_bytes())
    }

    pub(crate) fn nest(&mut self, kind: u16, inner: &Self) -> &mut Self {
        self.bytes(kind | NESTED, &inner.0)
    }
}

/// A message to the kernel, without its sequence number.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Request {
    pub(crate) subsystem: u16,
    pub(crate) kind: u16,
    pub(crate) flags: u16,
    pub(crate) family: u8,
    /// What the header says besides: the group of a log request.
    pub(crate) resource: u16,
    pub(crate) attributes: Attributes,
}

impl Request {
    pub(crate) fn encode(&self, sequence: u32, acknowledge: bool, into: &mut Vec<u8>) {
        let flags = NLM_F_REQUEST | self.flags | if acknowledge { NLM_F_ACK } else { 0 };
        let kind = self.subsystem << 8 | self.kind;
        header(into, kind, flags, sequence, self.family, self.resource, self.attributes.0.len());
        into.extend(&self.attributes.0);
    }
}

fn header(
    into: &mut Vec<u8>,
    kind: u16,
    flags: u16,
    sequence: u32,
    family: u8,
    resource: u16,
    payload: usize,
) {
    let length = u32::try_from(HEADER + GENERIC + payload).unwrap_or(u32::MAX);
    into.extend(length.to_ne_bytes());
    into.extend(kind.to_ne_bytes());
    into.extend(flags.to_ne_bytes());
    into.extend(sequence.to_ne_bytes());
    into.extend([0; 4]);
    into.extend([family, 0]);
    into.extend(resource.to_be_bytes());
}

/// One transaction's bytes: everything or nothing. The last request is acknowledged, with number `len`.
pub(crate) fn batch(requests: &[Request]) -> Vec<u8> {
    let mut bytes = Vec::new();
    header(&mut bytes, BATCH_BEGIN, NLM_F_REQUEST, 0, 0, SUBSYSTEM_NFTABLES, 0);
    for (request, sequence) in requests.iter().zip(1u32..) {
        request.encode(sequence, sequence as usize == requests.len(), &mut bytes);
    }
    header(&mut bytes, BATCH_END, NLM_F_REQUEST, 0, 0, SUBSYSTEM_NFTABLES, 0);
    bytes
}

/// A message from the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Message<'a> {
    pub(crate) kind: u16,
    pub(crate) flags: u16,
    pub(crate) sequence: u32,
    /// Of whoever caused it.
    pub(crate) port: u32,
    /// After the message header.
    pub(crate) body: &'a [u8],
}

impl<'a> Message<'a> {
    pub(crate) fn subsystem(&self) -> u16 {
        self.kind >> 8
    }

    /// Number within the subsystem.
    pub(crate) fn number(&self) -> u16 {
        self.kind & 0xff
    }

    pub(crate) fn family(&self) -> u8 {
        self.body.first().copied().unwrap_or(0)
    }

    pub(crate) fn attributes(&self) -> Parsed<'a> {
        Parsed(self.body.get(GENERIC..).unwrap_or(&[]))
    }
}

/// The messages of one datagram. What is cut off ends the walk.
pub(crate) fn messages(mut bytes: &[u8]) -> impl Iterator<Item = Message<'_>> {
    std::iter::from_fn(move || {
        let word = |at: usize| Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
        let half = |at: usize| Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?));
        let length = word(0)? as usize;
        let message = Message {
            kind: half(4)?,
            flags: half(6)?,
            sequence: word(8)?,
            port: word(12)?,
            body: bytes.get(HEADER..length)?,
        };
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or(&[]);
        Some(message)
    })
}

/// Attributes being read. Whatever is malformed is taken for absent.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Parsed<'a>(pub(crate) &'a [u8]);

impl<'a> Parsed<'a> {
    pub(crate) fn iter(self) -> impl Iterator<Item = (u16, &'a [u8])> {
        let mut bytes = self.0;
        std::iter::from_fn(move || {
            let length = usize::from(u16::from_ne_bytes(bytes.get(..2)?.try_into().ok()?));
            let kind = u16::from_ne_bytes(bytes.get(2..4)?.try_into().ok()?) & TYPE_MASK;
            let value = bytes.get(4..length)?;
            bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or(&[]);
            Some((kind, value))
        })
    }

    pub(crate) fn get(self, kind: u16) -> Option<&'a [u8]> {
        self.iter().find_map(|(other, value)| (other == kind).then_some(value))
    }

    pub(crate) fn nested(self, kind: u16) -> Option<Self> {
        self.get(kind).map(Self)
    }

    pub(crate) fn text(self, kind: u16) -> Option<&'a str> {
        let bytes = self.get(kind)?;
        std::str::from_utf8(bytes.strip_suffix(&[0]).unwrap_or(bytes)).ok()
    }

    pub(crate) fn byte(self, kind: u16) -> Option<u8> {
        self.get(kind)?.first().copied()
    }

    pub(crate) fn half(self, kind: u16) -> Option<u16> {
        Some(u16::from_be_bytes(self.get(kind)?.try_into().ok()?))
    }

    pub(crate) fn number(self, kind: u16) -> Option<u32> {
        Some(u32::from_be_bytes(self.get(kind)?.try_into().ok()?))
    }

    pub(crate) fn long(self, kind: u16) -> Option<u64> {
        Some(u64::from_be_bytes(self.get(kind)?.try_into().ok()?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_it_wrote() {
        let mut inner = Attributes::default();
        inner.number(7, 0x0102_0304);
        let mut attributes = Attributes::default();
        attributes.text(1, "bulkhead").nest(2, &inner);
        let request = Request {
            subsystem: SUBSYSTEM_NFTABLES,
            kind: 3,
            flags: CREATE,
            family: 1,
            resource: 0,
            attributes,
        };
        let bytes = batch(&[request.clone(), request]);
        let all: Vec<_> = messages(&bytes).collect();
        assert_eq!(all.iter().map(|message| message.sequence).collect::<Vec<_>>(), [0, 1, 2, 0]);
        assert_eq!((all[1].flags & NLM_F_ACK, all[2].flags & NLM_F_ACK), (0, NLM_F_ACK));
        let read = all[1].attributes();
        assert_eq!((all[1].subsystem(), all[1].number(), all[1].family()), (SUBSYSTEM_NFTABLES, 3, 1));
        assert_eq!(read.text(1), Some("bulkhead"));
        assert_eq!(read.nested(2).and_then(|inner| inner.number(7)), Some(0x0102_0304));
    }

    #[test]
    fn whatever_is_cut_off_is_absent() {
        let mut attributes = Attributes::default();
        attributes.number(1, 5).number(2, 6);
        for length in 0..attributes.0.len() {
            let read = Parsed(&attributes.0[..length]);
            assert_eq!(read.number(2), None);
            assert_eq!(read.number(1).is_some(), length >= 8);
        }
    }
}
