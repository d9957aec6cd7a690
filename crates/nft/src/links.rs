//! The one thing to be known of an interface: whether a bridge forwards its packets.

use std::io;

use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};

use crate::message::{Parsed, messages};

const RTM_NEWLINK: u16 = 16;
const RTM_GETLINK: u16 = 18;
const NLM_F_REQUEST: u16 = 1;
/// Message header, and `struct ifinfomsg`.
const HEADER: usize = 16;
const INFO: usize = 16;
const IFLA_LINKINFO: u16 = 18;
const IFLA_INFO_SLAVE_KIND: u16 = 4;

/// Whether an interface is a port of a bridge. One that does not exist is none.
pub(crate) fn is_bridge_port(ifindex: u32) -> io::Result<bool> {
    let mut socket = Socket::new(NETLINK_ROUTE)?;
    socket.bind_auto()?;
    let mut request = Vec::new();
    request.extend(((HEADER + INFO) as u32).to_ne_bytes());
    request.extend(RTM_GETLINK.to_ne_bytes());
    request.extend(NLM_F_REQUEST.to_ne_bytes());
    request.extend([0; 8]);
    request.extend([0; 4]);
    request.extend(ifindex.to_ne_bytes());
    request.extend([0; 8]);
    socket.send_to(&request, &SocketAddr::new(0, 0), 0)?;
    let (answer, _) = socket.recv_from_full()?;
    Ok(messages(&answer).filter(|message| message.kind == RTM_NEWLINK).any(|message| {
        let info = Parsed(message.body.get(INFO..).unwrap_or(&[])).nested(IFLA_LINKINFO);
        info.and_then(|info| info.text(IFLA_INFO_SLAVE_KIND)) == Some("bridge")
    }))
}
