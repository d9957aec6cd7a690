//! Neighbours of a host that send and hear whole frames, each in a namespace behind an interface of its own.

use crate::frames::Frames;
use crate::namespace::{Namespace, ifindex, run};

/// The hardware address of interface `d{number}` of the host, or of whoever is behind it.
pub fn station(number: usize, host: bool) -> [u8; 6] {
    [2, 0, 0, 0, u8::from(host), number as u8 + 1]
}

/// As it is written.
pub fn text(station: [u8; 6]) -> String {
    station.map(|byte| format!("{byte:02x}")).join(":")
}

/// A namespace behind interface `d{number}` of the host, in which nothing is sent but by the test.
#[derive(Debug)]
pub struct Station {
    _namespace: Namespace,
    /// What comes out there, and can be sent from there.
    pub frames: Frames,
}

impl Station {
    /// Makes the interface in this thread's namespace.
    pub fn new(number: usize) -> Self {
        let namespace = Namespace::new();
        let (host, other) = (text(station(number, true)), text(station(number, false)));
        run(&format!("ip link add d{number} address {host} type veth peer name p{number} address {other}"));
        run(&format!("ip link set p{number} netns {}", namespace.tid));
        run(&format!("ip link set d{number} up"));
        let frames = namespace.exec(move || {
            run("sysctl -qw net.ipv6.conf.all.disable_ipv6=1");
            run(&format!("ip link set p{number} up"));
            Frames::open(ifindex(&format!("p{number}"))).unwrap()
        });
        Self { _namespace: namespace, frames }
    }
}
