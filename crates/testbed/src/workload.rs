//! A workload: a namespace with one interface, routed by its host.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::Result;

use crate::lab::Host;
use crate::namespace::Netns;
use crate::probe::Family;

/// What every workload sends its packets to; on each host-side interface.
const GATEWAY_V4: &str = "169.254.1.1";
const GATEWAY_V6: &str = "fe80::1";

/// A workload's namespace and addresses.
#[derive(Debug)]
pub struct Workload {
    /// Name on its host.
    pub name: String,
    /// Its host.
    pub host: String,
    /// Its namespace.
    pub netns: Netns,
    /// Its host-side interface.
    pub interface: String,
    /// IPv4 address.
    pub v4: Ipv4Addr,
    /// IPv6 address.
    pub v6: Ipv6Addr,
}

impl Workload {
    pub(crate) fn new(prefix: &str, host: &Host, name: &str, interface: Option<&str>) -> Result<Self> {
        let (number, v4, v6) = host.next_addresses();
        let netns = Netns::new(&format!("{prefix}-w-{name}"))?;
        netns.sysctl(&[
            // Echo requests through unprivileged sockets: the kernel then sorts the answers.
            ("net.ipv4.ping_group_range", "0 2147483647"),
            ("net.ipv6.conf.default.accept_dad", "0"),
        ])?;
        let interface = interface.map_or_else(|| format!("wl{number}"), Into::into);
        Ok(Self { name: name.into(), host: host.name.clone(), netns, interface, v4, v6 })
    }

    /// The interface comes last inside: what is sent as soon as there is one finds everything else in place.
    pub(crate) fn join(&self, host: &Host) -> Result<()> {
        let Self { netns, interface, v4, v6, .. } = self;
        host.netns.ip(&[
            format!("link add {interface} type veth peer name eth0 netns {}", netns.name()),
            format!("addr add {GATEWAY_V4}/32 dev {interface}"),
            format!("addr add {GATEWAY_V6}/64 dev {interface} nodad"),
            format!("link set {interface} up"),
            format!("route add {v4}/32 dev {interface}"),
            format!("route add {v6}/128 dev {interface}"),
        ])?;
        netns.ip(&[
            "link set lo up".into(),
            format!("addr add {v4}/32 dev eth0"),
            format!("addr add {v6}/128 dev eth0 nodad"),
            "link set eth0 up".into(),
            format!("route add {GATEWAY_V4} dev eth0"),
            format!("route add default via {GATEWAY_V4}"),
            format!("route add default via {GATEWAY_V6} dev eth0"),
        ])
    }

    /// Its address of a family.
    pub fn address(&self, family: Family) -> IpAddr {
        match family {
            Family::V4 => self.v4.into(),
            Family::V6 => self.v6.into(),
        }
    }

    /// Its name in the repository.
    pub fn full_name(&self) -> String {
        format!("{}.{}", self.name, self.host)
    }
}
