//! The host and its neighbours: interfaces for a few workloads, and one behind which everything else is.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use bulkhead_dataplane::Dataplane;
use bulkhead_model::flow::DropReason;
use bulkhead_model::host_policy::{Attachment, HostPolicy};

use crate::connections::forget_connections;
use crate::frames::{Frames, number_of};
use crate::namespace::{Namespace, enter_new_namespace, ifindex, ip, now_ns, run};

/// Workloads at most.
pub(super) const SLOTS: usize = 4;
/// Behind which all others are.
pub(super) const OUTSIDE: usize = SLOTS;
/// How long a packet or a report may take that is on its way, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(3);
/// The same while one failing case after the other is tried.
const HURRIED: Duration = Duration::from_millis(250);
/// Longer than any connection that nobody has answered may be idle.
const IDLE_NS: u64 = 1_000_000_000_000;

type Open = Box<dyn Fn() -> Box<dyn Dataplane>>;

/// A dataplane on a host with workloads, in the namespace of the thread that made it.
pub struct World {
    pub(super) dataplane: Box<dyn Dataplane>,
    open: Open,
    stations: Vec<Station>,
    interfaces: Vec<u32>,
    routes: BTreeMap<IpAddr, usize>,
    /// How long what is missing is waited for.
    pub(super) patience: Duration,
    /// Of the last packet: never the same twice in a row of thousands.
    pub(super) number: u16,
    /// How far the clock of sweeps is ahead.
    ahead_ns: u64,
}

impl std::fmt::Debug for World {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("World").field("routes", &self.routes).finish_non_exhaustive()
    }
}

pub(super) fn station(number: usize, host: bool) -> [u8; 6] {
    [2, 0, 0, 0, u8::from(host), number as u8 + 1]
}

fn text(station: [u8; 6]) -> String {
    station.map(|byte| format!("{byte:02x}")).join(":")
}

/// A namespace behind interface `d{number}` of the host.
struct Station {
    _namespace: Namespace,
    frames: Frames,
}

impl Station {
    fn new(number: usize) -> Self {
        let namespace = Namespace::new();
        let (host, other) = (text(station(number, true)), text(station(number, false)));
        run(&format!("ip link add d{number} address {host} type veth peer name p{number} address {other}"));
        run(&format!("ip link set p{number} netns {}", namespace.tid));
        run(&format!("ip link set d{number} up"));
        let frames = namespace.exec(move || {
            // Nothing but what the test sends.
            run("sysctl -qw net.ipv6.conf.all.disable_ipv6=1");
            run(&format!("ip link set p{number} up"));
            Frames::open(ifindex(&format!("p{number}"))).unwrap()
        });
        Self { _namespace: namespace, frames }
    }
}

impl World {
    /// Moves this thread into a namespace of its own, and opens dataplanes there.
    pub fn new(open: impl Fn() -> Box<dyn Dataplane> + 'static) -> Self {
        enter_new_namespace();
        run("ip link set lo up");
        for setting in ["ipv4.ip_forward", "ipv6.conf.all.forwarding"] {
            run(&format!("sysctl -qw net.{setting}=1"));
        }
        let stations: Vec<_> = (0..=OUTSIDE).map(Station::new).collect();
        let (dev, other) = (format!("d{OUTSIDE}"), text(station(OUTSIDE, false)));
        ip(&[
            format!("addr add 172.31.0.1/24 dev {dev}"),
            format!("neigh add 172.31.0.2 lladdr {other} dev {dev} nud permanent"),
            format!("route add default via 172.31.0.2 dev {dev}"),
            format!("addr add fddd::1/64 dev {dev} nodad"),
            format!("neigh add fddd::2 lladdr {other} dev {dev} nud permanent"),
            format!("route add default via fddd::2 dev {dev}"),
        ]);
        let interfaces: Vec<_> = (0..SLOTS).map(|number| ifindex(&format!("d{number}"))).collect();
        let mut dataplane = open();
        for interface in &interfaces {
            dataplane.attach(Attachment::Interface(*interface)).unwrap();
        }
        dataplane.poll(&mut |_| ()).unwrap();
        Self {
            dataplane,
            open: Box::new(open),
            stations,
            interfaces,
            routes: BTreeMap::new(),
            patience: PATIENCE,
            number: 0,
            ahead_ns: 0,
        }
    }

    /// From now on, what is missing is not waited for so long: when it is known that something will be.
    pub fn hurry(&mut self) {
        self.patience = HURRIED;
    }

    /// The interface of a workload.
    pub(super) fn interface(&self, slot: usize) -> u32 {
        self.interfaces[slot]
    }

    /// Another process takes over.
    pub(super) fn reopen(&mut self) {
        self.dataplane = (self.open)();
        // What was lost while nobody listened is no concern of this test.
        self.dataplane.poll(&mut |_| ()).unwrap();
    }

    /// Where the frames of an address come from and go to.
    pub(super) fn place(&self, address: IpAddr) -> usize {
        self.routes.get(&address).copied().unwrap_or(OUTSIDE)
    }

    /// The host's routes follow the addresses of its workloads.
    pub(super) fn route(&mut self, policy: &HostPolicy) {
        let mut wanted = BTreeMap::new();
        for binding in policy.endpoints.values() {
            let slot = self.interfaces.iter().position(|i| Attachment::Interface(*i) == binding.attachment);
            let slot = slot.expect("bound to one of ours");
            wanted.extend(binding.addresses.iter().map(|address| (*address, slot)));
        }
        let gone = self.routes.iter().filter(|(address, _)| !wanted.contains_key(*address));
        let mut commands: Vec<_> = gone.map(|(address, _)| format!("route del {address}")).collect();
        for (address, slot) in
            wanted.iter().filter(|(address, slot)| self.routes.get(*address) != Some(*slot))
        {
            let other = text(station(*slot, false));
            commands.push(format!("route replace {address} dev d{slot}"));
            commands.push(format!("neigh replace {address} lladdr {other} dev d{slot} nud permanent"));
        }
        if !commands.is_empty() {
            ip(&commands);
        }
        self.routes = wanted;
    }

    pub(super) fn send(&self, from: usize, frame: &[u8]) {
        self.stations[from].frames.send(frame).unwrap();
    }

    /// Where numbered frames have arrived by now.
    pub(super) fn hear(&self, arrived: &mut BTreeSet<(usize, u16)>) {
        for (number, station) in self.stations.iter().enumerate() {
            let frames = std::iter::from_fn(|| station.frames.next());
            // The kernel's own (listener reports) are for others.
            let ours = frames.filter(|frame| frame[..6] == self::station(number, false));
            arrived.extend(ours.filter_map(|frame| Some((number, number_of(&frame)?))));
        }
    }

    /// Packets that a policy has refused so far.
    pub(super) fn refused(&self) -> u64 {
        let stats = self.dataplane.stats();
        stats.ok().and_then(|stats| stats.drops.get(&DropReason::Policy).copied()).unwrap_or(0)
    }

    /// Every connection is a new one from now on.
    pub(super) fn forget(&mut self) -> Result<(), bulkhead_dataplane::DataplaneError> {
        forget_connections();
        // Twice, and later each time: what only this sweep tells of has been used at this sweep's time.
        for _ in 0..2 {
            self.ahead_ns += IDLE_NS;
            self.dataplane.sweep(now_ns() + self.ahead_ns, &mut |_| ())?;
        }
        Ok(())
    }
}
