//! What the kernel programs and user space share: the mirror of `bpf/abi.h`.
//!
//! Both sides assert sizes and offsets at compile time. A change of any layout raises [`ABI_VERSION`].

use std::mem::{offset_of, size_of};
use std::net::IpAddr;

use bulkhead_model::address::address_bits;
use bulkhead_model::host_policy::{Attachment, CompiledId};

/// Part of the pin path, so that programs of one layout never meet maps of another.
pub const ABI_VERSION: u32 = 4;

/// Slots in each map of maps.
pub(crate) const BANKS: u32 = 8;
/// `COUNTER_UNRECORDED` of `abi.h`.
pub(crate) const COUNTER_UNRECORDED: u32 = 8;
/// `COUNTER_LOST_EVENTS` of `abi.h`.
pub(crate) const COUNTER_LOST_EVENTS: u32 = 16;
/// `COUNTER_UNTOLD` of `abi.h`.
pub(crate) const COUNTER_UNTOLD: u32 = 17;
/// `EVENT_REFUSE` of `abi.h`.
pub(crate) const EVENT_REFUSE: u8 = 5;
/// `PRIORITY_REFUSAL` of `abi.h`.
pub(crate) const PRIORITY_REFUSAL: u32 = 0x4275_6c6b;
/// Key of a compiled policy's default row.
pub(crate) const CLASS_DEFAULT_ROW: u32 = u32::MAX;

/// `ROW_BY_SOURCE_PORT` of `abi.h`.
const ROW_BY_SOURCE_PORT: u32 = 1 << 31;

pub(crate) const CELL_LOG: u8 = 1;
pub(crate) const CELL_WRITTEN: u8 = 2;
pub(crate) const CELL_REJECT: u8 = 4;

pub(crate) const CONN_REPLIED: u32 = 1;
pub(crate) const CONN_FIN_FORWARD: u32 = 1 << 1;
pub(crate) const CONN_FIN_REVERSE: u32 = 1 << 2;
pub(crate) const CONN_RST: u32 = 1 << 3;
pub(crate) const CONN_OPEN_REPORTED: u32 = 1 << 5;
pub(crate) const CONN_CLOSE_REPORTED: u32 = 1 << 6;
pub(crate) const CONN_REVOKED: u32 = 1 << 8;

const SECOND_NS: u64 = 1_000_000_000;
pub(crate) const TIMEOUT_TCP_SYN: u64 = 60 * SECOND_NS;
pub(crate) const TIMEOUT_TCP_ESTABLISHED: u64 = 24 * 3600 * SECOND_NS;
pub(crate) const TIMEOUT_TCP_CLOSING: u64 = 10 * SECOND_NS;
pub(crate) const TIMEOUT_UDP_UNREPLIED: u64 = 60 * SECOND_NS;
pub(crate) const TIMEOUT_UDP_REPLIED: u64 = 180 * SECOND_NS;
pub(crate) const TIMEOUT_ICMP: u64 = 30 * SECOND_NS;
pub(crate) const TIMEOUT_OTHER: u64 = 300 * SECOND_NS;
/// `HALF_OPEN_SPAN` of `abi.h`.
pub(crate) const HALF_OPEN_SPAN: u64 = 60 * SECOND_NS;
pub(crate) const TIMEOUT_REVOKED_TCP: u64 = 300 * SECOND_NS;
pub(crate) const TIMEOUT_REVOKED_OTHER: u64 = 60 * SECOND_NS;

/// Types that may cross the kernel boundary as bytes.
///
/// # Safety
/// `repr(C)` without padding bytes, and every bit pattern is a value.
#[expect(unsafe_code, reason = "implementors promise that they are plain bytes")]
pub(crate) unsafe trait Plain: Copy + Default {}

macro_rules! plain {
    ($($(#[$doc:meta])* struct $name:ident($size:literal) { $($field:ident: $type:ty,)* })*) => {$(
        $(#[$doc])*
        #[repr(C)]
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
        pub(crate) struct $name { $(pub(crate) $field: $type,)* }
        const _: () = assert!(size_of::<$name>() == $size);
        // The fields fill the struct: no padding.
        const _: () = assert!(0 $(+ size_of::<$type>())* == $size);
        #[expect(unsafe_code, reason = "repr(C), all fields plain, no padding (asserted above)")]
        // SAFETY: as asserted above.
        unsafe impl Plain for $name {}
    )*};
}

plain! {
    /// `struct conn_key`.
    struct ConnKey(44) {
        subject: u32,
        protocol: u8,
        pad: [u8; 3],
        local: Addr,
        peer: Addr,
        local_port: u16,
        peer_port: u16,
    }
    /// `struct addr`, in network order.
    struct Addr(16) { bytes: [u8; 16], }
    /// `struct conn`.
    struct Conn(88) {
        rule: u32,
        audit_rule: u32,
        revision: u32,
        flags: u32,
        direction: u8,
        audit: u8,
        peer_port: u16,
        pad: [u8; 4],
        peer: Addr,
        opened_ns: u64,
        last_ns: u64,
        packets: [u64; 2],
        bytes: [u64; 2],
    }
    /// `struct denial_key`.
    struct DenialKey(48) { conn: ConnKey, direction: u8, pad: [u8; 3], }
    /// `struct denial`.
    struct Denial(72) {
        rule: u32,
        audit_rule: u32,
        reason: u8,
        audit: u8,
        peer_port: u16,
        reported_packets: u32,
        peer: Addr,
        reported_bytes: u64,
        packets: u64,
        bytes: u64,
        first_ns: u64,
        last_ns: u64,
    }
    /// `struct event`.
    struct Event(128) {
        key: ConnKey,
        kind: u8,
        direction: u8,
        verdict: u8,
        audit: u8,
        rule: u32,
        audit_rule: u32,
        reason: u8,
        pad: u8,
        peer_port: u16,
        more_pad: [u8; 4],
        peer: Addr,
        opened_ns: u64,
        last_ns: u64,
        packets: [u64; 2],
        bytes: [u64; 2],
    }
    /// `struct refusal`.
    struct Refusal(72) {
        key: ConnKey,
        kind: u8,
        direction: u8,
        live: u8,
        pad: u8,
        len: u32,
        l4: [u8; 20],
    }
    /// `struct bpf_cgroup_storage_key` of linux/bpf.h.
    struct StorageKey(16) { cgroup: u64, attach_type: u32, pad: u32, }
    /// `struct class_entry`.
    struct ClassEntry(8) { class: u32, tag: u32, }
    /// `struct lpm_key`.
    struct LpmKey(20) { prefixlen: u32, addr: Addr, }
    /// `struct row_key`.
    struct RowKey(8) { compiled: u32, class: u32, }
    /// `struct row`.
    struct RowEntry(8) { first: u32, len: u32, }
    /// `struct variant`.
    struct VariantEntry(16) { first_source_port: u32, first: u32, len: u32, pad: u32, }
    /// `struct step`.
    struct Step(8) { first_key: u32, cell: u32, }
    /// `struct cell`.
    struct CellEntry(16) { rule: u32, audit_rule: u32, verdict: u8, audit: u8, flags: u8, pad: [u8; 5], }
    /// `struct endpoint_addr_key`.
    struct EndpointAddrKey(20) { subject: u32, addr: Addr, }
}

const _: () = assert!(offset_of!(Conn, opened_ns) == 40);
const _: () = assert!(offset_of!(Denial, packets) == 40);
const _: () = assert!(offset_of!(Event, rule) == 48);
const _: () = assert!(offset_of!(Event, opened_ns) == 80);

const _: () = assert!(offset_of!(Event, kind) == offset_of!(Refusal, kind));

macro_rules! plain_number {
    ($($type:ty),*) => {$(
        #[expect(unsafe_code, reason = "an integer")]
        // SAFETY: integers have neither padding nor invalid bit patterns.
        unsafe impl Plain for $type {}
    )*};
}
plain_number!(u32, u64);

impl From<IpAddr> for Addr {
    fn from(address: IpAddr) -> Self {
        Self::from_bits(address_bits(address))
    }
}

impl Addr {
    pub(crate) fn from_bits(bits: u128) -> Self {
        Self { bytes: bits.to_be_bytes() }
    }

    pub(crate) fn address(self) -> IpAddr {
        bulkhead_model::address::address_from_bits(u128::from_be_bytes(self.bytes))
    }

    /// `addr_tag` of `bpf/judge.h`.
    pub(crate) fn tag(self) -> u32 {
        const FACTORS: [u32; 4] = [0x9e37_79b1, 0x85eb_ca77, 0xc2b2_ae3d, 0x27d4_eb2f];
        let (words, _) = self.bytes.as_chunks::<4>();
        words
            .iter()
            .zip(FACTORS)
            .fold(0x1656_67b1, |tag, (word, factor)| tag ^ u32::from_ne_bytes(*word).wrapping_mul(factor))
    }
}

impl RowEntry {
    /// A row of `len` variants, the first at this index of `variants`.
    pub(crate) fn by_source_port(first: u32, len: u32) -> Self {
        Self { first, len: len | ROW_BY_SOURCE_PORT }
    }

    /// Index of the first variant and their number, if the row asks for the source port.
    pub(crate) fn variants(self) -> Option<(u32, u32)> {
        (self.len & ROW_BY_SOURCE_PORT != 0).then_some((self.first, self.len & !ROW_BY_SOURCE_PORT))
    }
}

/// `SUBJECT_HOST` of `abi.h`.
const SUBJECT_HOST: u32 = 1 << 31;
/// `SUBJECT_FORWARDED` of `abi.h`.
const SUBJECT_FORWARDED: u32 = 1 << 30;
/// `SUBJECT_CGROUP` of `abi.h`.
const SUBJECT_CGROUP: u32 = 3 << 30;
/// What is left for the number of an interface or control group.
pub(crate) const SUBJECT_NUMBER_MAX: u32 = (1 << 30) - 1;

/// The number by which the kernel programs know an endpoint.
pub(crate) fn subject_of(attachment: Attachment) -> u32 {
    match attachment {
        Attachment::Interface(index) => index,
        Attachment::Host(index) => SUBJECT_HOST | index,
        Attachment::Forwarded(index) => SUBJECT_FORWARDED | index,
        Attachment::Cgroup(inode) => SUBJECT_CGROUP | inode,
    }
}

/// The reverse of [`subject_of`].
pub(crate) fn attachment_of(subject: u32) -> Attachment {
    let number = subject & SUBJECT_NUMBER_MAX;
    match subject & SUBJECT_CGROUP {
        SUBJECT_CGROUP => Attachment::Cgroup(number),
        SUBJECT_HOST => Attachment::Host(number),
        SUBJECT_FORWARDED => Attachment::Forwarded(number),
        _ => Attachment::Interface(number),
    }
}

/// An endpoint's switch in one word; see `BINDING_*` in `bpf/abi.h`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct BindingWord {
    pub(crate) ingress: CompiledId,
    pub(crate) egress: CompiledId,
    pub(crate) bank: u32,
}

impl BindingWord {
    /// Largest compiled id that fits.
    pub(crate) const MAX_ID: u32 = (1 << 30) - 1;

    pub(crate) fn encode(self) -> u64 {
        u64::from(self.ingress.0)
            | u64::from(self.egress.0) << 30
            | u64::from(self.bank % BANKS) << 60
            | 1 << 63
    }

    pub(crate) fn decode(word: u64) -> Option<Self> {
        let id = |shift: u32| CompiledId((word >> shift) as u32 & Self::MAX_ID);
        (word >> 63 == 1).then(|| Self { ingress: id(0), egress: id(30), bank: (word >> 60) as u32 % BANKS })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_binding_survives_its_word() {
        let binding =
            BindingWord { ingress: CompiledId(BindingWord::MAX_ID), egress: CompiledId(7), bank: 5 };
        assert_eq!(BindingWord::decode(binding.encode()), Some(binding));
        assert_eq!(BindingWord::decode(0), None);
    }
}
