//! Questions to the kernel about the tables, and sentences about what it answers.

use std::collections::BTreeMap;
use std::ffi::CStr;
use std::io;

use crate::message::{Message, Parsed};
use crate::object::{Element, Set, Table};
use crate::skeleton::Counted;
use crate::socket::Talker;

/// An element with what it has counted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct CountedElement {
    pub(crate) key: Vec<u8>,
    pub(crate) data: Vec<u8>,
    pub(crate) packets: u64,
    pub(crate) bytes: u64,
}

/// What a table says of itself; `None` if there is none of that name.
pub(crate) fn user_data(talker: &mut Talker, table: Table) -> io::Result<Option<Vec<u8>>> {
    talker.one(&table.get(), |message| Some(message.attributes().get(6).unwrap_or_default().to_vec()))
}

/// All of a set.
pub(crate) fn elements(talker: &mut Talker, set: Set) -> io::Result<Vec<Element>> {
    talker.dump(&set.dump(), |message, all| {
        for_each_element(message, |attributes| all.extend(read_element(attributes)));
    })
}

/// Elements of a map, as pairs.
pub(crate) fn pairs(talker: &mut Talker, set: Set) -> io::Result<Vec<(Vec<u8>, Vec<u8>)>> {
    let elements = elements(talker, set)?;
    let pair = |element| match element {
        Element::Key { key, data } => Some((key, data)),
        Element::End { .. } | Element::Otherwise { .. } => None,
    };
    Ok(elements.into_iter().filter_map(pair).collect())
}

/// All of a set that counts.
pub(crate) fn counted_elements(talker: &mut Talker, set: Set) -> io::Result<Vec<CountedElement>> {
    talker.dump(&set.dump(), |message, all| {
        for_each_element(message, |attributes| {
            if let Some(Element::Key { key, data }) = read_element(attributes) {
                let counter = attributes.nested(7).and_then(|expression| expression.nested(2));
                let number = |kind| counter.and_then(|counter| counter.long(kind)).unwrap_or(0);
                all.push(CountedElement { key, data, bytes: number(1), packets: number(2) });
            }
        });
    })
}

/// Data of the element that a message is about.
pub(crate) fn data_of(message: &Message<'_>) -> Option<Vec<u8>> {
    let mut found = None;
    for_each_element(message, |attributes| match read_element(attributes) {
        Some(Element::Key { data, .. } | Element::Otherwise { data }) => found = Some(data),
        Some(Element::End { .. }) | None => {}
    });
    found
}

fn for_each_element<'a>(message: &Message<'a>, mut read: impl FnMut(Parsed<'a>)) {
    if let Some(list) = message.attributes().nested(3) {
        list.iter().for_each(|(_, element)| read(Parsed(element)));
    }
}

fn read_element(attributes: Parsed<'_>) -> Option<Element> {
    let value = |kind| attributes.nested(kind).and_then(|data| data.get(1)).map(<[u8]>::to_vec);
    let flags = attributes.number(3).unwrap_or(0);
    let data = value(2).unwrap_or_default();
    if flags & 2 != 0 {
        return Some(Element::Otherwise { data });
    }
    let key = value(1)?;
    Some(if flags & 1 != 0 { Element::End { key } } else { Element::Key { key, data } })
}

/// Packets by counter of a table.
pub(crate) fn counters(talker: &mut Talker, table: Table, into: &mut Counted) -> io::Result<()> {
    let all = talker.dump(&table.counters(), |message, all: &mut Vec<(String, u64)>| {
        let attributes = message.attributes();
        // The kernel lists those of every table of the family.
        if attributes.text(1) == Some(table.name)
            && let (Some(name), Some(data)) = (attributes.text(2), attributes.nested(4))
        {
            all.push((name.to_owned(), data.long(2).unwrap_or(0)));
        }
    })?;
    into.extend(all.into_iter().map(|(name, packets)| ((table, name), packets)));
    Ok(())
}

/// Number of the last transaction of anybody, in this network namespace.
pub(crate) fn generation(talker: &mut Talker) -> io::Result<u32> {
    let read = |message: &Message<'_>| message.attributes().number(1);
    Ok(talker.one(&crate::object::generation(), read)?.unwrap_or(0))
}

/// Names of a table's chains.
pub(crate) fn chains(talker: &mut Talker, table: Table) -> io::Result<Vec<String>> {
    talker.dump(&table.chains(), |message, all| {
        let attributes = message.attributes();
        if attributes.text(1) == Some(table.name) {
            all.extend(attributes.text(3).map(str::to_owned));
        }
    })
}

/// An interface's name.
pub(crate) fn interface_name(ifindex: u32) -> Option<String> {
    let mut name = [0; libc::IF_NAMESIZE];
    #[expect(unsafe_code, reason = "system call without a safe wrapper")]
    // SAFETY: the buffer has the size that the call asks for, and ends with a zero when it answers it.
    let name = unsafe {
        let answer = libc::if_indextoname(ifindex, name.as_mut_ptr());
        if answer.is_null() {
            return None;
        }
        CStr::from_ptr(answer)
    };
    name.to_str().ok().map(str::to_owned)
}

/// How many connections conntrack keeps; 0 if it does not say.
pub(crate) fn connections_max() -> u64 {
    let text = std::fs::read_to_string("/proc/sys/net/netfilter/nf_conntrack_max").unwrap_or_default();
    text.trim().parse().unwrap_or(0)
}

/// Size of conntrack's table; empty if it does not say.
pub(crate) fn conntrack_buckets() -> String {
    std::fs::read_to_string("/proc/sys/net/netfilter/nf_conntrack_buckets").unwrap_or_default()
}

/// Addresses of this host's own interfaces, each with its interface.
pub(crate) fn own_addresses() -> BTreeMap<std::net::IpAddr, u32> {
    let mut all = BTreeMap::new();
    let mut list: *mut libc::ifaddrs = std::ptr::null_mut();
    #[expect(unsafe_code, reason = "system call without a safe wrapper")]
    // SAFETY: the list stays as the call made it until it is given back below, and each address has the size of its
    // family's structure.
    unsafe {
        if libc::getifaddrs(&raw mut list) != 0 {
            return all;
        }
        // Each question to the kernel about an interface waits for its lock of all of them: one per interface.
        let mut indices: BTreeMap<&CStr, u32> = BTreeMap::new();
        let mut next = list;
        while let Some(entry) = next.as_ref() {
            if let Some(address) = entry.ifa_addr.as_ref() {
                let name = CStr::from_ptr(entry.ifa_name);
                let index = *indices.entry(name).or_insert_with(|| libc::if_nametoindex(entry.ifa_name));
                match i32::from(address.sa_family) {
                    libc::AF_INET => {
                        let v4 = entry.ifa_addr.cast::<libc::sockaddr_in>().read_unaligned();
                        let address = std::net::Ipv4Addr::from(u32::from_be(v4.sin_addr.s_addr));
                        all.insert(address.into(), index);
                    }
                    libc::AF_INET6 => {
                        let v6 = entry.ifa_addr.cast::<libc::sockaddr_in6>().read_unaligned();
                        all.insert(std::net::Ipv6Addr::from(v6.sin6_addr.s6_addr).into(), index);
                    }
                    _ => {}
                }
            }
            next = entry.ifa_next;
        }
        libc::freeifaddrs(list);
    }
    all
}

/// Settings of the kernel that this backend needs, in this network namespace.
pub(crate) mod settings {
    use std::fs;
    use std::io;

    /// Counters of connections, and conntrack's events (1: always; the default makes them when somebody listens).
    const NEEDED: [(&str, &str); 1] = [("net/netfilter/nf_conntrack_acct", "1")];
    /// So that what a bridge carries between two of its ports is seen by the tables as well.
    const FOR_BRIDGES: [(&str, &str); 2] =
        [("net/bridge/bridge-nf-call-iptables", "1"), ("net/bridge/bridge-nf-call-ip6tables", "1")];

    fn path(name: &str) -> String {
        format!("/proc/sys/{name}")
    }

    /// All of them, as they are: `name=value` with the last part of each name.
    pub(crate) fn now() -> String {
        let all = NEEDED.iter().chain(&FOR_BRIDGES).filter_map(|(name, _)| {
            let value = fs::read_to_string(path(name)).ok()?;
            Some(format!("{}={}", short(name), value.trim()))
        });
        all.collect::<Vec<_>>().join(" ")
    }

    fn short(name: &str) -> &str {
        name.rsplit_once('/').map_or(name, |(_, last)| last)
    }

    fn set(settings: &[(&str, &str)]) -> io::Result<()> {
        settings.iter().try_for_each(|(name, value)| {
            let path = path(name);
            if fs::read_to_string(&path)?.trim() == *value { Ok(()) } else { fs::write(&path, value) }
        })
    }

    pub(crate) fn set_needed() -> io::Result<()> {
        set(&NEEDED)
    }

    pub(crate) fn set_for_bridges() -> io::Result<()> {
        set(&FOR_BRIDGES)
    }

    /// As they were.
    pub(crate) fn restore(saved: &str) {
        for word in saved.split(' ') {
            let Some((name, value)) = word.split_once('=') else { continue };
            let known = NEEDED.iter().chain(&FOR_BRIDGES).find(|(long, _)| short(long) == name);
            if let Some((long, _)) = known {
                // Whoever took the right to it away in the meantime has their reasons.
                let _refused = fs::write(path(long), value);
            }
        }
    }
}

/// What counters have counted: packets by reason, those without an entry of their own, those that were not told of.
pub(crate) fn drops(counted: &Counted) -> (BTreeMap<bulkhead_model::flow::DropReason, u64>, u64, u64) {
    let (mut drops, mut unrecorded, mut untold) = (BTreeMap::new(), 0, 0);
    for ((_, name), packets) in counted.iter().filter(|(_, packets)| **packets > 0) {
        match crate::schema::COUNTERS.iter().find(|(known, _)| known == name) {
            Some((_, reason)) => *drops.entry(*reason).or_default() += packets,
            None if name == crate::schema::UNTOLD => untold += packets,
            None => unrecorded += packets,
        }
    }
    (drops, unrecorded, untold)
}
