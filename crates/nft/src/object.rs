//! Tables, chains, rules, sets and their elements as requests.

use crate::expression::{self, Expression, OBJECT_COUNTER, data};
use crate::message::{APPEND, Attributes, CREATE, DUMP, Request, SUBSYSTEM_NFTABLES};

/// Families of linux/netfilter.h.
pub(crate) const INET: u8 = 1;
pub(crate) const NETDEV: u8 = 5;

pub(crate) const NEW_TABLE: u16 = 0;
const GET_TABLE: u16 = 1;
pub(crate) const DELETE_TABLE: u16 = 2;
pub(crate) const NEW_CHAIN: u16 = 3;
const GET_CHAIN: u16 = 4;
pub(crate) const DELETE_CHAIN: u16 = 5;
const NEW_RULE: u16 = 6;
const DELETE_RULE: u16 = 8;
const NEW_SET: u16 = 9;
pub(crate) const NEW_ELEMENT: u16 = 12;
const GET_ELEMENT: u16 = 13;
pub(crate) const DELETE_ELEMENT: u16 = 14;
const GET_GENERATION: u16 = 16;
const NEW_OBJECT: u16 = 18;
const GET_OBJECT: u16 = 19;

/// Flags of a set.
pub(crate) const SET_INTERVAL: u32 = 0x4;
pub(crate) const SET_MAP: u32 = 0x8;
pub(crate) const SET_DYNAMIC: u32 = 0x20;

const ELEMENT_INTERVAL_END: u32 = 1;
const ELEMENT_CATCHALL: u32 = 2;

/// Elements of one message: an attribute's length has 16 bits.
const ELEMENTS_BYTES_MAX: usize = 48 << 10;

/// A table of ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Table {
    pub(crate) family: u8,
    pub(crate) name: &'static str,
}

/// A set or map.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Set {
    pub(crate) table: Table,
    pub(crate) name: &'static str,
    pub(crate) flags: u32,
    /// For whoever lists it: types of `nft`, six bits each.
    pub(crate) key_type: u32,
    pub(crate) key_len: u32,
    pub(crate) data_type: u32,
    pub(crate) data_len: u32,
    /// Of a dynamic one: how many fit.
    pub(crate) size: Option<u32>,
}

/// An element. Of an interval set: where an interval begins, or ends, or what holds outside of all.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Element {
    Key { key: Vec<u8>, data: Vec<u8> },
    End { key: Vec<u8> },
    Otherwise { data: Vec<u8> },
}

impl Element {
    fn encode(&self) -> Attributes {
        let mut a = Attributes::default();
        match self {
            Self::Key { key, data: value } => {
                a.nest(1, &data(key));
                if !value.is_empty() {
                    a.nest(2, &data(value));
                }
            }
            Self::End { key } => {
                a.nest(1, &data(key)).number(3, ELEMENT_INTERVAL_END);
            }
            Self::Otherwise { data: value } => {
                a.number(3, ELEMENT_CATCHALL);
                if !value.is_empty() {
                    a.nest(2, &data(value));
                }
            }
        }
        a
    }
}

/// Asks for the number of the last transaction of anybody.
pub(crate) fn generation() -> Request {
    let attributes = Attributes::default();
    Request {
        subsystem: SUBSYSTEM_NFTABLES,
        kind: GET_GENERATION,
        flags: 0,
        family: 0,
        resource: 0,
        attributes,
    }
}

/// Where a base chain is called.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Devices<'a> {
    /// Of other families than netdev.
    All,
    One(&'a str),
    /// Those that there are and will be: names, or with `*` at their end beginnings of names.
    Matching(&'a [String]),
}

/// `NFTA_DEVICE_NAME` and `NFTA_DEVICE_PREFIX`.
const DEVICE_NAME: u16 = 1;
const DEVICE_PREFIX: u16 = 2;

impl Table {
    fn request(self, kind: u16, flags: u16, attributes: Attributes) -> Request {
        Request { subsystem: SUBSYSTEM_NFTABLES, kind, flags, family: self.family, resource: 0, attributes }
    }

    fn named(self, attribute: u16) -> Attributes {
        let mut a = Attributes::default();
        a.text(attribute, self.name);
        a
    }

    pub(crate) fn create(self, user_data: &[u8]) -> Request {
        let mut a = self.named(1);
        a.bytes(6, user_data);
        self.request(NEW_TABLE, CREATE, a)
    }

    pub(crate) fn delete(self) -> Request {
        self.request(DELETE_TABLE, 0, self.named(1))
    }

    pub(crate) fn get(self) -> Request {
        self.request(GET_TABLE, 0, self.named(1))
    }

    pub(crate) fn chain(self, name: &str) -> Request {
        let mut a = self.named(1);
        a.text(3, name);
        self.request(NEW_CHAIN, CREATE, a)
    }

    /// A chain that the kernel calls.
    pub(crate) fn base_chain(self, name: &str, hook: u32, priority: i32, devices: Devices<'_>) -> Request {
        let mut hooked = Attributes::default();
        hooked.number(1, hook).bytes(2, &priority.to_be_bytes());
        match devices {
            Devices::All => {}
            Devices::One(device) => {
                hooked.text(3, device);
            }
            Devices::Matching(patterns) => {
                let mut devices = Attributes::default();
                for pattern in patterns {
                    match pattern.strip_suffix('*') {
                        Some(start) => devices.text(DEVICE_PREFIX, start),
                        None => devices.text(DEVICE_NAME, pattern),
                    };
                }
                hooked.nest(4, &devices);
            }
        }
        let mut a = self.named(1);
        a.text(3, name).nest(4, &hooked).number(5, 1).text(7, "filter");
        self.request(NEW_CHAIN, CREATE, a)
    }

    pub(crate) fn delete_chain(self, name: &str) -> Request {
        let mut a = self.named(1);
        a.text(3, name);
        self.request(DELETE_CHAIN, 0, a)
    }

    pub(crate) fn rule(self, chain: &str, expressions: &[Expression]) -> Request {
        let mut a = self.named(1);
        a.text(2, chain).nest(4, &expression::list(expressions));
        self.request(NEW_RULE, CREATE | APPEND, a)
    }

    /// Removes every rule of a chain.
    pub(crate) fn flush_chain(self, chain: &str) -> Request {
        let mut a = self.named(1);
        a.text(2, chain);
        self.request(DELETE_RULE, 0, a)
    }

    /// A named counter with what it counted before.
    pub(crate) fn counter(self, name: &str, packets: u64) -> Request {
        let mut counted = Attributes::default();
        counted.bytes(1, &0u64.to_be_bytes()).bytes(2, &packets.to_be_bytes());
        let mut a = self.named(1);
        a.text(2, name).number(3, OBJECT_COUNTER).nest(4, &counted);
        self.request(NEW_OBJECT, CREATE, a)
    }

    pub(crate) fn chains(self) -> Request {
        self.request(GET_CHAIN, DUMP, Attributes::default())
    }

    pub(crate) fn counters(self) -> Request {
        let mut a = self.named(1);
        a.number(3, OBJECT_COUNTER);
        self.request(GET_OBJECT, DUMP, a)
    }
}

impl Set {
    /// `id`: any number, different for every set of the transaction.
    pub(crate) fn create(self, id: u32) -> Request {
        let mut a = self.table.named(1);
        a.text(2, self.name).number(3, self.flags).number(4, self.key_type).number(5, self.key_len);
        if self.data_len > 0 {
            a.number(6, self.data_type).number(7, self.data_len);
        }
        if let Some(size) = self.size {
            let mut description = Attributes::default();
            description.number(1, size);
            a.nest(9, &description);
        }
        a.number(10, id);
        if self.flags & SET_DYNAMIC != 0 {
            let mut counter = Attributes::default();
            counter.text(1, "counter").nest(2, &Attributes::default());
            a.nest(17, &counter);
        }
        self.table.request(NEW_SET, CREATE, a)
    }

    fn elements(self, kind: u16, flags: u16, elements: &[Element], into: &mut Vec<Request>) {
        let mut list = Attributes::default();
        let mut put = |list: &mut Attributes| {
            let mut a = self.table.named(1);
            a.text(2, self.name).nest(3, &std::mem::take(list));
            into.push(self.table.request(kind, flags, a));
        };
        for element in elements {
            list.nest(1, &element.encode());
            if list.0.len() > ELEMENTS_BYTES_MAX {
                put(&mut list);
            }
        }
        if !list.0.is_empty() {
            put(&mut list);
        }
    }

    pub(crate) fn add(self, elements: &[Element], into: &mut Vec<Request>) {
        self.elements(NEW_ELEMENT, CREATE, elements, into);
    }

    pub(crate) fn remove(self, elements: &[Element], into: &mut Vec<Request>) {
        self.elements(DELETE_ELEMENT, 0, elements, into);
    }

    /// Asks for the element of a key, or the interval around it.
    pub(crate) fn get(self, key: &[u8]) -> Request {
        let (mut element, mut list) = (Attributes::default(), Attributes::default());
        element.nest(1, &data(key));
        list.nest(1, &element);
        let mut a = self.table.named(1);
        a.text(2, self.name).nest(3, &list);
        self.table.request(GET_ELEMENT, 0, a)
    }

    pub(crate) fn dump(self) -> Request {
        let mut a = self.table.named(1);
        a.text(2, self.name);
        self.table.request(GET_ELEMENT, DUMP, a)
    }
}
