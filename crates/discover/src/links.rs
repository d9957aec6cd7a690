//! Interfaces and addresses, by rtnetlink, in this network namespace or another.

use std::fs::File;
use std::io;
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use netlink_packet_core::{
    NLM_F_DUMP, NLM_F_REQUEST, NetlinkDeserializable, NetlinkHeader, NetlinkMessage, NetlinkPayload,
    NetlinkSerializable,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use netlink_packet_route::link::{LinkAttribute, LinkMessage};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// RTMGRP_LINK of linux/rtnetlink.h: notifications about interfaces.
const GROUP_LINK: u32 = 1;

/// Why interfaces could not be read.
#[derive(Debug, thiserror::Error)]
pub enum LinksError {
    /// The namespace's file could not be opened or entered.
    #[error("cannot enter network namespace {path}: {source}")]
    Enter {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The kernel refused or the socket broke.
    #[error("cannot read interfaces from the kernel: {0}")]
    Netlink(#[from] io::Error),
    /// No interface of that namespace leads to this one.
    #[error("no interface in network namespace {0} is joined to one of this host")]
    NotJoined(PathBuf),
    /// No such control group.
    #[error("{0}")]
    NoGroup(String),
    /// No interface of that name.
    #[error("there is no interface {0:?} on this host")]
    NoInterface(String),
}

impl LinksError {
    /// Whether trying again may well succeed: nothing was found out about what was asked for.
    pub fn is_passing(&self) -> bool {
        match self {
            Self::Enter { source, .. } => source.kind() != io::ErrorKind::NotFound,
            Self::Netlink(_) => true,
            Self::NotJoined(_) | Self::NoInterface(_) | Self::NoGroup(_) => false,
        }
    }
}

/// An interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// Its index, unique in its namespace.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Index of the other end of a veth pair, in the other end's namespace.
    pub peer: Option<u32>,
}

/// All interfaces of the calling thread's namespace.
///
/// # Errors
/// If the kernel refuses.
pub fn links() -> io::Result<Vec<Link>> {
    let mut links = Vec::new();
    dump(RouteNetlinkMessage::GetLink(LinkMessage::default()), |message| {
        if let RouteNetlinkMessage::NewLink(message) = message {
            links.push(link(&message));
        }
    })?;
    Ok(links)
}

/// All addresses of the calling thread's namespace that others can reach, with their interface's index.
/// Loopback and link-local addresses are left out.
///
/// # Errors
/// If the kernel refuses.
pub fn addresses() -> io::Result<Vec<(u32, IpAddr)>> {
    let mut addresses = Vec::new();
    dump(RouteNetlinkMessage::GetAddress(AddressMessage::default()), |message| {
        if let RouteNetlinkMessage::NewAddress(message) = message {
            // On a point-to-point interface ADDRESS is the other end's and LOCAL is ours.
            let find = |local: bool| {
                message.attributes.iter().find_map(|attribute| match attribute {
                    AddressAttribute::Local(address) if local => Some(*address),
                    AddressAttribute::Address(address) if !local => Some(*address),
                    _ => None,
                })
            };
            if let Some(address) = find(true).or_else(|| find(false)).filter(is_reachable) {
                addresses.push((message.header.index, address));
            }
        }
    })?;
    Ok(addresses)
}

fn is_reachable(address: &IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => !v4.is_loopback() && !v4.is_link_local(),
        IpAddr::V6(v6) => !v6.is_loopback() && !v6.is_unicast_link_local(),
    }
}

/// What another namespace looks like from this one: the host-side interfaces that lead to it, and the
/// addresses in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Namespace {
    /// Index and name of each interface on this side.
    pub interfaces: Vec<(u32, String)>,
    /// Addresses on the other side, sorted.
    pub addresses: Vec<IpAddr>,
}

/// Looks into the network namespace at `path`.
///
/// # Errors
/// If it cannot be entered, or nothing in it leads here.
pub fn namespace(path: &Path) -> Result<Namespace, LinksError> {
    namespace_among(path, &links()?)
}

/// As [`namespace`], with the interfaces of this side already at hand: who looks into many namespaces asks
/// for them once.
///
/// # Errors
/// If it cannot be entered, or nothing in it leads here.
pub fn namespace_among(path: &Path, here: &[Link]) -> Result<Namespace, LinksError> {
    let (inside, mut addresses) = within(path, || Ok((links()?, addresses()?)))??;
    let mut interfaces = Vec::new();
    let mut joined = Vec::new();
    for inner in &inside {
        // Peer indexes are of the peer's namespace, which need not be this one: the peer must point back.
        let outer =
            here.iter().find(|outer| Some(outer.index) == inner.peer && outer.peer == Some(inner.index));
        if let Some(outer) = outer {
            interfaces.push((outer.index, outer.name.clone()));
            joined.push(inner.index);
        }
    }
    if interfaces.is_empty() {
        return Err(LinksError::NotJoined(path.into()));
    }
    addresses.retain(|(index, _)| joined.contains(index));
    let mut addresses: Vec<_> = addresses.into_iter().map(|(_, address)| address).collect();
    addresses.sort_unstable();
    addresses.dedup();
    Ok(Namespace { interfaces, addresses })
}

/// The index of an interface of this namespace.
///
/// # Errors
/// If there is none of that name.
pub fn interface(name: &str) -> Result<u32, LinksError> {
    let found = links()?.into_iter().find(|link| link.name == name);
    found.map(|link| link.index).ok_or_else(|| LinksError::NoInterface(name.into()))
}

/// Runs `work` on a thread of its own in the network namespace at `path`.
fn within<T: Send>(
    path: &Path,
    work: impl FnOnce() -> io::Result<T> + Send,
) -> Result<io::Result<T>, LinksError> {
    let enter = |source| LinksError::Enter { path: path.into(), source };
    let file = File::open(path).map_err(enter)?;
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))?;
            Ok(work())
        });
        thread.join().unwrap_or_else(|_| Err(io::Error::other("the thread in the namespace panicked")))
    })
    .map_err(enter)
}

fn link(message: &LinkMessage) -> Link {
    let mut link = Link { index: message.header.index, name: String::new(), peer: None };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name.clone_from(name),
            LinkAttribute::Link(peer) => link.peer = Some(*peer),
            _ => {}
        }
    }
    link
}

/// Asks for a dump and hands over each message.
fn dump(request: RouteNetlinkMessage, mut each: impl FnMut(RouteNetlinkMessage)) -> io::Result<()> {
    let mut socket = Socket::new(NETLINK_ROUTE)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_DUMP | NLM_F_REQUEST;
    let mut message = NetlinkMessage::new(header, NetlinkPayload::from(request));
    message.finalize();
    let mut buffer = vec![0; message.buffer_len()];
    message.serialize(&mut buffer);
    socket.send(&buffer, 0)?;
    loop {
        let (bytes, _) = socket.recv_from_full()?;
        let mut done = false;
        for payload in payloads::<RouteNetlinkMessage>(&bytes) {
            match payload? {
                NetlinkPayload::InnerMessage(message) => each(message),
                NetlinkPayload::Done(_) => done = true,
                NetlinkPayload::Error(error) if error.code.is_some() => return Err(error.to_io()),
                _ => {}
            }
        }
        if done {
            return Ok(());
        }
    }
}

/// The messages of one datagram.
fn payloads<M: NetlinkDeserializable + NetlinkSerializable>(
    bytes: &[u8],
) -> impl Iterator<Item = io::Result<NetlinkPayload<M>>> {
    let mut rest = bytes;
    std::iter::from_fn(move || {
        let header: [u8; 4] = rest.get(..4)?.try_into().ok()?;
        // Messages are aligned to four bytes (NLMSG_ALIGN).
        let length = usize::try_from(u32::from_ne_bytes(header)).ok()?;
        let message = rest.get(..length).filter(|message| message.len() >= 16)?;
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        let parsed = NetlinkMessage::<M>::deserialize(message);
        Some(parsed.map(|message| message.payload).map_err(|error| io::Error::other(error.to_string())))
    })
}

/// An interface came or went.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LinkChange {
    /// It is there (new, or something about it changed).
    There(Link),
    /// It is gone.
    Gone(Link),
    /// Notifications were lost: look at everything again.
    Lost,
}

/// Hears of interfaces as they come and go.
pub struct LinkWatch {
    socket: Socket,
}

impl std::fmt::Debug for LinkWatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LinkWatch").finish_non_exhaustive()
    }
}

impl LinkWatch {
    /// Begins to listen in the calling thread's namespace.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn new() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind(&SocketAddr::new(0, GROUP_LINK))?;
        Ok(Self { socket })
    }

    /// Blocks until something happens.
    ///
    /// # Errors
    /// If the socket breaks. An overrun of the kernel's buffer is no error but [`LinkChange::Lost`].
    pub fn next(&self) -> io::Result<Vec<LinkChange>> {
        let bytes = match self.socket.recv_from_full() {
            Ok((bytes, _)) => bytes,
            Err(error) if error.raw_os_error() == Some(rustix::io::Errno::NOBUFS.raw_os_error()) => {
                return Ok(vec![LinkChange::Lost]);
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Ok(Vec::new()),
            Err(error) => return Err(error),
        };
        let changes = payloads(&bytes).filter_map(|payload| match payload {
            Ok(NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewLink(message))) => {
                Some(LinkChange::There(link(&message)))
            }
            Ok(NetlinkPayload::InnerMessage(RouteNetlinkMessage::DelLink(message))) => {
                Some(LinkChange::Gone(link(&message)))
            }
            Ok(_) => None,
            // What cannot be read may have been anything.
            Err(_) => Some(LinkChange::Lost),
        });
        Ok(changes.collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loopback_interface_is_there_and_its_addresses_are_left_out() {
        assert!(links().unwrap().iter().any(|link| link.name == "lo"));
        assert!(addresses().unwrap().iter().all(|(_, address)| !address.is_loopback()));
        assert!(matches!(interface("no-such-if"), Err(LinksError::NoInterface(_))));
    }

    #[test]
    fn a_missing_namespace_is_named() {
        let error = namespace(Path::new("/run/netns/no-such-namespace")).unwrap_err();
        assert!(error.to_string().contains("/run/netns/no-such-namespace"), "{error}");
    }
}
