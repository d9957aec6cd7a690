//! The expressions that rules are made of, and their encoding (linux/netfilter/nf_tables.h).

use crate::message::Attributes;

/// One of the sixteen 32-bit registers, from 0.
pub(crate) type Register = u32;
/// `NFT_REG32_00`.
const FIRST_REGISTER: u32 = 8;
const VERDICT_REGISTER: u32 = 0;

/// What `meta` reads or writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Meta {
    /// Ethertype, in network order.
    Protocol = 1,
    Priority = 2,
    Mark = 3,
    InputInterface = 4,
    OutputInterface = 5,
    /// Its name: 16 bytes. Of none, zeros.
    InputName = 6,
    OutputName = 7,
    Family = 15,
    Transport = 16,
}

/// What `ct` reads or writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ct {
    /// As a bit: see [`RELATED`].
    State = 0,
    Direction = 1,
    Status = 2,
    Protocol = 10,
    SourcePort = 11,
    DestinationPort = 12,
    Labels = 13,
    Source4 = 19,
    Source6 = 21,
}

/// `NF_CT_STATE_BIT(IP_CT_RELATED)`, in the byte order of this machine.
pub(crate) const RELATED: u32 = 1 << 2;

/// Which of a connection's two tuples.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tuple {
    Original = 0,
    Reply = 1,
}

/// Where an offset into a packet counts from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Base {
    Network = 1,
    Transport = 2,
}

/// Where a rule leads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Verdict {
    Drop,
    Accept,
    /// To where the last jump came from.
    Return,
    Jump(String),
    Goto(String),
}

/// One expression. A rule is left at the first that does not hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Expression {
    Meta(Meta, Register),
    SetMeta(Meta, Register),
    Ct(Ct, Option<Tuple>, Register),
    /// Id of the control group at a level above the sender's or receiver's socket. There is none before the handshake
    /// has ended.
    Group {
        level: u32,
        to: Register,
    },
    /// Holds if a whole socket sends or receives this; into a byte that says nothing here.
    HasSocket(Register),
    SetCt(Ct, Register),
    Payload {
        base: Base,
        offset: u32,
        len: u32,
        to: Register,
    },
    Immediate(Register, Vec<u8>),
    Equal(Register, Vec<u8>),
    NotEqual(Register, Vec<u8>),
    Between(Register, Vec<u8>, Vec<u8>),
    Mask {
        from: Register,
        to: Register,
        mask: Vec<u8>,
    },
    Contains {
        set: &'static str,
        key: Register,
    },
    Lacks {
        set: &'static str,
        key: Register,
    },
    Get {
        map: &'static str,
        key: Register,
        to: Register,
    },
    /// Adds to a set of the packet path, unless it is there or there is no room.
    Add {
        map: &'static str,
        key: Register,
        data: Register,
    },
    Count(&'static str),
    /// Holds for packets beyond so many a second, after so many at once. Of all that meet this rule.
    Beyond {
        a_second: u64,
        at_once: u32,
    },
    /// Ends as a drop; the sender hears a TCP reset.
    Reset,
    /// Ends as a drop; the sender hears that this was forbidden.
    Forbid,
    Log {
        group: u16,
        prefix: &'static str,
    },
    Verdict(Verdict),
}

impl Expression {
    fn encode(&self) -> (&'static str, Attributes) {
        let mut a = Attributes::default();
        let name = match self {
            Self::Meta(key, to) => {
                a.number(1, register(*to)).number(2, *key as u32);
                "meta"
            }
            Self::SetMeta(key, from) => {
                a.number(2, *key as u32).number(3, register(*from));
                "meta"
            }
            Self::Ct(key, tuple, to) => {
                a.number(1, register(*to)).number(2, *key as u32);
                if let Some(tuple) = tuple {
                    a.bytes(3, &[*tuple as u8]);
                }
                "ct"
            }
            Self::Group { level, to } => {
                a.number(1, SOCKET_CGROUPV2).number(2, register(*to)).number(3, *level);
                "socket"
            }
            Self::HasSocket(to) => {
                a.number(1, SOCKET_WILDCARD).number(2, register(*to));
                "socket"
            }
            Self::SetCt(key, from) => {
                a.number(2, *key as u32).number(4, register(*from));
                "ct"
            }
            Self::Payload { base, offset, len, to } => {
                a.number(1, register(*to)).number(2, *base as u32).number(3, *offset).number(4, *len);
                "payload"
            }
            Self::Immediate(to, value) => {
                a.number(1, register(*to)).nest(2, &data(value));
                "immediate"
            }
            Self::Equal(from, value) => {
                a.number(1, register(*from)).number(2, 0).nest(3, &data(value));
                "cmp"
            }
            Self::NotEqual(from, value) => {
                a.number(1, register(*from)).number(2, 1).nest(3, &data(value));
                "cmp"
            }
            Self::Between(from, first, last) => {
                a.number(1, register(*from)).number(2, 0).nest(3, &data(first)).nest(4, &data(last));
                "range"
            }
            Self::Mask { from, to, mask } => {
                let len = u32::try_from(mask.len()).unwrap_or(u32::MAX);
                a.number(1, register(*from)).number(2, register(*to)).number(3, len);
                a.nest(4, &data(mask)).nest(5, &data(&vec![0; mask.len()]));
                "bitwise"
            }
            Self::Contains { set, key } => {
                a.text(1, set).number(2, register(*key));
                "lookup"
            }
            Self::Lacks { set, key } => {
                a.text(1, set).number(2, register(*key)).number(5, 1);
                "lookup"
            }
            Self::Get { map, key, to } => {
                a.text(1, map).number(2, register(*key)).number(3, register(*to));
                "lookup"
            }
            Self::Add { map, key, data } => {
                a.text(1, map).number(3, 0).number(4, register(*key)).number(5, register(*data));
                "dynset"
            }
            Self::Count(counter) => {
                a.number(1, OBJECT_COUNTER).text(2, counter);
                "objref"
            }
            Self::Beyond { a_second, at_once } => {
                a.bytes(1, &a_second.to_be_bytes()).bytes(2, &1u64.to_be_bytes()).number(3, *at_once);
                a.number(4, 0).number(5, LIMIT_INVERTED);
                "limit"
            }
            Self::Reset => {
                a.number(1, REJECT_TCP_RESET);
                "reject"
            }
            Self::Forbid => {
                a.number(1, REJECT_ICMPX).bytes(2, &[REJECT_ICMPX_PROHIBITED]);
                "reject"
            }
            Self::Log { group, prefix } => {
                a.bytes(1, &group.to_be_bytes()).text(2, prefix).number(3, LOG_BYTES);
                "log"
            }
            Self::Verdict(verdict) => {
                a.number(1, VERDICT_REGISTER).nest(2, &verdict_data(verdict));
                "immediate"
            }
        };
        (name, a)
    }
}

/// `NFT_SOCKET_WILDCARD` and `NFT_SOCKET_CGROUPV2`.
const SOCKET_WILDCARD: u32 = 2;
const SOCKET_CGROUPV2: u32 = 3;

/// `NFT_LIMIT_F_INV`.
const LIMIT_INVERTED: u32 = 1;
/// `NFT_REJECT_TCP_RST`, `NFT_REJECT_ICMPX_UNREACH` and `NFT_REJECT_ICMPX_ADMIN_PROHIBITED`.
const REJECT_TCP_RESET: u32 = 1;
const REJECT_ICMPX: u32 = 2;
const REJECT_ICMPX_PROHIBITED: u8 = 3;

/// `NFT_OBJECT_COUNTER`.
pub(crate) const OBJECT_COUNTER: u32 = 1;
/// Of each logged packet: headers of every layer up to the ports, with extension headers.
const LOG_BYTES: u32 = 192;

fn register(number: Register) -> u32 {
    FIRST_REGISTER + number
}

/// `nft_data_attributes` with a value.
pub(crate) fn data(value: &[u8]) -> Attributes {
    let mut a = Attributes::default();
    a.bytes(1, value);
    a
}

fn verdict_data(verdict: &Verdict) -> Attributes {
    let (code, chain) = match verdict {
        Verdict::Drop => (0, None),
        Verdict::Accept => (1, None),
        Verdict::Jump(chain) => (-3, Some(chain)),
        Verdict::Goto(chain) => (-4, Some(chain)),
        Verdict::Return => (-5, None),
    };
    let mut inner = Attributes::default();
    inner.bytes(1, &i32::to_be_bytes(code));
    if let Some(chain) = chain {
        inner.text(2, chain);
    }
    let mut outer = Attributes::default();
    outer.nest(2, &inner);
    outer
}

/// `NFTA_RULE_EXPRESSIONS`' content.
pub(crate) fn list(expressions: &[Expression]) -> Attributes {
    let mut list = Attributes::default();
    for expression in expressions {
        let (name, attributes) = expression.encode();
        let mut element = Attributes::default();
        element.text(1, name).nest(2, &attributes);
        list.nest(1, &element);
    }
    list
}
