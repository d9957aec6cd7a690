//! From conntrack's connections and from refused packets to what a dataplane reports. Pure: no kernel, no clock.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;

use bulkhead_dataplane::SweepStats;
use bulkhead_model::flow::{ConnectionKey, Counters, DropReason, FlowEvent, RawFlow};
use bulkhead_model::host_policy::{Attachment, Cell, CompiledId, EndpointBinding, RuleId};
use bulkhead_model::ports::PortKey;
use bulkhead_model::verdict::{Builtin, Direction, Verdict};

use crate::conntrack::{Connection, Report};
use crate::groups::Group;
use crate::image::Image;
use crate::schema::{self, Kind, Words, from_host};

mod denials;

pub(crate) use denials::Denials;

/// An endpoint, found by its address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Endpoint {
    attachment: Attachment,
    ingress: CompiledId,
    egress: CompiledId,
}

/// What connections are judged by, as user space has it.
#[derive(Debug, Default)]
pub(crate) struct Judge {
    /// Workloads, by address.
    workloads: HashMap<IpAddr, Endpoint>,
    /// The host as an endpoint: by address, and by interface (0: every other).
    hosts: HashMap<IpAddr, Endpoint>,
    interfaces: BTreeMap<u32, Endpoint>,
    /// Control groups by number, each with those around it that are in charge, from the inside out; and endpoints for what is
    /// forwarded by theirs.
    groups: HashMap<u32, Vec<Endpoint>>,
    /// Addresses of the host itself, and the interface that each is at.
    own: BTreeMap<IpAddr, u32>,
}

/// One endpoint's view of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Side {
    attachment: Attachment,
    direction: Direction,
    cell: Cell,
    /// Who is really at the other end, where an address of the connection does not say that.
    peer: Option<IpAddr>,
}

fn builtin(rule: Builtin, verdict: Verdict) -> Cell {
    Words::builtin(rule, verdict).cell()
}

impl Judge {
    pub(crate) fn of(image: &Image, own: BTreeMap<IpAddr, u32>) -> Self {
        let mut judge = Self { own, ..Self::default() };
        let mut bound = BTreeMap::new();
        let mut bindings: Vec<_> = image.policy().endpoints.values().collect();
        bindings.sort_unstable_by_key(|binding| binding.attachment);
        for EndpointBinding { attachment, addresses, ingress, egress } in bindings {
            let endpoint = Endpoint { attachment: *attachment, ingress: *ingress, egress: *egress };
            let all = addresses.iter().map(|address| (*address, endpoint));
            match attachment {
                Attachment::Interface(index) if image.attached().contains(index) => {
                    judge.workloads.extend(all)
                }
                Attachment::Host(index) => {
                    judge.interfaces.insert(*index, endpoint);
                    judge.hosts.extend(all);
                }
                Attachment::Cgroup(inode) => {
                    bound.insert(*inode, endpoint);
                }
                Attachment::Forwarded(index) => {
                    judge.groups.insert(schema::forwarded_number(*index), vec![endpoint]);
                }
                Attachment::Interface(_) => {}
            }
        }
        for inode in image.groups().keys() {
            let line = Group::line(*inode, image.groups()).into_iter();
            let endpoints = line.map(|inode| {
                let (attachment, none) = (Attachment::Cgroup(inode), CompiledId::NONE);
                bound.get(&inode).copied().unwrap_or(Endpoint { attachment, ingress: none, egress: none })
            });
            judge.groups.insert(schema::group_number(*inode), endpoints.collect());
        }
        judge
    }

    /// Whether the host's addresses are those that it knows.
    pub(crate) fn knows(&self, own: &BTreeMap<IpAddr, u32>) -> bool {
        self.own == *own
    }

    /// The endpoint that the host is with an address of its own, or one that it shares with others.
    fn host_with(&self, own: IpAddr) -> Option<&Endpoint> {
        let by_interface = || {
            let index = self.own.get(&own).or_else(|| {
                // Of what is for groups, conntrack does not know the interface.
                let only = || self.interfaces.keys().next().filter(|_| self.interfaces.len() == 1);
                self.interfaces.get_key_value(&0).map(|(index, _)| index).or_else(only)
            })?;
            self.interfaces.get(index).or_else(|| self.interfaces.get(&0))
        };
        self.hosts.get(&own).or_else(by_interface)
    }

    /// The endpoint of one end of a connection, and whether that is the host.
    fn end(&self, own: IpAddr, peer: IpAddr) -> Option<(&Endpoint, bool)> {
        if let Some(workload) = self.workloads.get(&own) {
            return Some((workload, false));
        }
        // What the host says to itself is its own business, and so is what it only forwards.
        if !self.own.contains_key(&own) || self.own.contains_key(&peer) {
            return None;
        }
        self.host_with(own).map(|endpoint| (endpoint, true))
    }

    /// The endpoint whose policy has refused something.
    fn refused_by(&self, kind: Kind, group: u32, own: IpAddr) -> Option<&Endpoint> {
        match kind {
            Kind::Workload => self.workloads.get(&own),
            Kind::Host => self.host_with(own),
            Kind::Group => self.groups.get(&group)?.first(),
        }
    }

    /// What each of its endpoints makes of a connection; what the packet path has decided goes before what tables say
    /// now.
    fn sides(&self, image: &Image, report: &Report) -> Vec<Side> {
        let Report { connection, decisions, reversed, .. } = report;
        let (caller, source_port) = connection.caller(*reversed);
        let (called, port) = connection.called(*reversed);
        let key = connection.protocol.key(port);
        let source_port = if connection.is_icmp() { 0 } else { source_port };
        let (begins, receives) = (self.end(caller, called), self.end(called, caller));
        let own = begins.is_some() && begins.map(|e| e.0.attachment) == receives.map(|e| e.0.attachment);
        let groups = report.groups.map(|number| number.filter(|_| !reversed));
        // A process's decision is none of its host's.
        let decided =
            |side: usize| decisions[side].filter(|_| !reversed && groups[side].is_none()).map(Words::cell);
        let (out, to) = (decided(0), decided(1));
        let mut sides = Vec::new();
        let mut put = |endpoint: &Endpoint, direction, cell| {
            let cell = if own { builtin(Builtin::SelfTraffic, Verdict::Allow) } else { cell };
            sides.push(Side { attachment: endpoint.attachment, direction, cell, peer: None });
        };
        let none = builtin(Builtin::Unprogrammed, Verdict::Deny);
        if let Some((endpoint, _)) = begins {
            let cell = out.or_else(|| image.cell(endpoint.egress, called, key, source_port));
            put(endpoint, Direction::Egress, cell.unwrap_or(none));
        }
        if let Some((endpoint, is_host)) = receives.filter(|_| !own) {
            let cell = to.or_else(|| image.cell(endpoint.ingress, caller, key, source_port)).unwrap_or(none);
            // The label is written of what was let through: what it does not allow, came from the host.
            let begun_here = begins.is_none_or(|(_, host)| host);
            let hosts = !is_host && begun_here && (self.own.contains_key(&caller) || to.is_some());
            put(endpoint, Direction::Ingress, if hosts { from_host(cell) } else { cell });
        }
        // Between processes of this host names stand for addresses.
        let local = |address: IpAddr| self.own.contains_key(&address) || address.is_loopback();
        let inside = local(caller) && local(called);
        let decided = |side: usize, place: usize| {
            decisions[side].filter(|_| place == 0).map(|words| Words(words.0, words.0).cell())
        };
        for (place, endpoint) in
            groups[0].and_then(|number| self.groups.get(&number)).into_iter().flatten().enumerate()
        {
            let cell = if called.is_loopback() {
                builtin(Builtin::SelfTraffic, Verdict::Allow)
            } else {
                agreed(decided(0, place), image.cell(endpoint.egress, called, key, source_port))
            };
            sides.push(Side {
                attachment: endpoint.attachment,
                direction: Direction::Egress,
                cell,
                peer: None,
            });
        }
        for (place, endpoint) in
            groups[1].and_then(|number| self.groups.get(&number)).into_iter().flatten().enumerate()
        {
            let named =
                groups[0].and_then(|number| self.groups.get(&number)?.last()?.attachment.own_address());
            let peer = inside.then(|| named.unwrap_or(schema::NO_PROCESS));
            let cell = image.cell(endpoint.ingress, peer.unwrap_or(caller), key, source_port);
            let cell = agreed(decided(1, place), cell);
            let cell = if inside && named.is_none() { from_host(cell) } else { cell };
            sides.push(Side { attachment: endpoint.attachment, direction: Direction::Ingress, cell, peer });
        }
        sides
    }

    /// What tables say of a refused packet: its audit verdict does not come with the message.
    fn audit(
        &self,
        image: &Image,
        (caller, called): (IpAddr, IpAddr),
        (endpoint, direction): (Option<&Endpoint>, Direction),
        key: PortKey,
        source_port: u16,
    ) -> Option<Cell> {
        let peer = if direction == Direction::Egress { called } else { caller };
        let endpoint = endpoint?;
        let compiled = if direction == Direction::Egress { endpoint.egress } else { endpoint.ingress };
        image.cell(compiled, peer, key, source_port)
    }
}

/// What the packet path has decided, with the audit rule of tables that still say so.
fn agreed(decided: Option<Cell>, table: Option<Cell>) -> Cell {
    let table = table.unwrap_or(builtin(Builtin::Unprogrammed, Verdict::Deny));
    decided.filter(|cell| cell.rule != table.rule).unwrap_or(table)
}

/// A connection that has been told.
#[derive(Debug, Clone)]
struct Told {
    sides: Vec<Side>,
    groups: [Option<u32>; 2],
    counters: Counters,
    reversed: bool,
    closed: bool,
    opened_ns: u64,
    last_ns: u64,
    /// Seen by the sweep of this number.
    seen: u64,
}

/// Connections of our endpoints.
#[derive(Debug, Default)]
pub(crate) struct Flows {
    told: HashMap<Connection, Told>,
    sweeps: u64,
    /// Whether what was there before this process has been taken in.
    started: bool,
}

type Sink<'a> = &'a mut dyn FnMut(RawFlow);

impl Flows {
    pub(crate) fn connections(&self) -> u64 {
        self.told.len() as u64
    }

    /// Takes in an event. `count` asks the kernel for the counters of a connection that is over.
    pub(crate) fn event(
        &mut self,
        report: &Report,
        (judge, image): (&Judge, &Image),
        now_ns: u64,
        count: impl FnOnce(&Connection) -> Option<Counters>,
        sink: Sink<'_>,
    ) {
        let connection = &report.connection;
        if report.last {
            if let Some(mut told) = self.told.remove(connection) {
                told.count(report.counters, now_ns);
                if !told.closed {
                    told.tell(FlowEvent::Close, connection, sink);
                }
            }
            return;
        }
        if !self.told.contains_key(connection) {
            if report.first {
                self.open(report, (judge, image), now_ns, sink);
            }
            return;
        }
        let Some(told) = self.told.get_mut(connection) else { return };
        told.hear_of_processes(report, (judge, image), sink);
        if report.over && !told.closed {
            told.count(count(connection), now_ns);
            told.closed = true;
            told.tell(FlowEvent::Close, connection, sink);
        }
    }

    fn open(&mut self, report: &Report, (judge, image): (&Judge, &Image), now_ns: u64, sink: Sink<'_>) {
        let sides = judge.sides(image, report);
        if sides.is_empty() {
            return;
        }
        let told = Told {
            sides,
            groups: report.groups,
            counters: report.counters.unwrap_or(Counters { packets_forward: 1, ..Counters::default() }),
            reversed: report.reversed,
            closed: report.over,
            opened_ns: now_ns,
            last_ns: now_ns,
            seen: self.sweeps,
        };
        // Of what was there before this process, somebody else has told.
        if self.started && told.sides.iter().all(|side| side.cell.verdict == Verdict::Allow) {
            told.tell(FlowEvent::Open, &report.connection, sink);
        }
        self.told.insert(report.connection, told);
    }

    /// Takes in all connections that there are.
    pub(crate) fn sweep(
        &mut self,
        reports: Vec<Report>,
        (judge, image): (&Judge, &Image),
        now_ns: u64,
        sink: Sink<'_>,
    ) -> SweepStats {
        let mut stats = SweepStats::default();
        self.sweeps += 1;
        for report in reports {
            let connection = &report.connection;
            if !self.told.contains_key(connection) {
                self.open(&report, (judge, image), now_ns, sink);
                let opened = u64::from(self.told.contains_key(connection));
                stats.updated += if self.started { opened } else { 0 };
                stats.connections += opened;
                continue;
            }
            let Some(told) = self.told.get_mut(connection) else { continue };
            told.seen = self.sweeps;
            stats.connections += 1;
            let before = told.counters;
            told.count(report.counters, now_ns);
            if report.over && !told.closed {
                told.closed = true;
                told.tell(FlowEvent::Close, connection, sink);
            } else if told.counters != before && !told.closed {
                told.tell(FlowEvent::Update, connection, sink);
                stats.updated += 1;
            }
        }
        let (sweeps, first) = (self.sweeps, !self.started);
        self.told.retain(|connection, told| {
            let there = told.seen == sweeps || first;
            if !there {
                stats.closed += 1;
                if !told.closed {
                    told.tell(FlowEvent::Close, connection, sink);
                }
            }
            there
        });
        self.started = true;
        stats
    }

    /// Tells which connections are judged otherwise now.
    pub(crate) fn judge_again(&mut self, judge: &Judge, image: &Image, sink: Sink<'_>) {
        for (connection, told) in &mut self.told {
            let (connection, reversed) = (*connection, told.reversed);
            let report = Report {
                connection,
                first: false,
                last: false,
                over: false,
                counters: None,
                decisions: [None; 2],
                groups: told.groups,
                reversed,
                epochs: 0,
                zone: None,
            };
            let sides = judge.sides(image, &report);
            if sides == told.sides {
                continue;
            }
            let before = std::mem::replace(&mut told.sides, sides);
            if told.closed {
                continue;
            }
            let changed = told.sides.iter().filter(|side| {
                let old = before
                    .iter()
                    .find(|old| (old.attachment, old.direction) == (side.attachment, side.direction));
                old.is_some_and(|old| differs(&old.cell, &side.cell))
            });
            changed.for_each(|side| sink(told.flow(FlowEvent::Change, &connection, side)));
        }
    }
}

fn differs(old: &Cell, new: &Cell) -> bool {
    let told = |cell: &Cell| (cell.verdict, cell.rule, cell.audit_verdict, cell.audit_rule);
    told(old) != told(new)
}

impl Told {
    /// What comes back to this host by the loopback interface has been told before anybody knew who gets it.
    fn hear_of_processes(&mut self, report: &Report, (judge, image): (&Judge, &Image), sink: Sink<'_>) {
        if report.groups == self.groups || report.groups == [None; 2] {
            return;
        }
        self.groups = report.groups;
        for side in judge.sides(image, report) {
            let known = |old: &Side| (old.attachment, old.direction) == (side.attachment, side.direction);
            if !self.sides.iter().any(known) {
                sink(self.flow(FlowEvent::Open, &report.connection, &side));
                self.sides.push(side);
            }
        }
    }

    fn count(&mut self, counters: Option<Counters>, now_ns: u64) {
        if let Some(counters) = counters
            && counters != self.counters
        {
            self.counters = counters;
            self.last_ns = now_ns;
        }
    }

    fn tell(&self, event: FlowEvent, connection: &Connection, sink: Sink<'_>) {
        self.sides.iter().for_each(|side| sink(self.flow(event, connection, side)));
    }

    fn flow(&self, event: FlowEvent, connection: &Connection, side: &Side) -> RawFlow {
        let (caller, called) = (connection.caller(self.reversed), connection.called(self.reversed));
        let Counters { packets_forward, bytes_forward, packets_reverse, bytes_reverse } = self.counters;
        let counters = if self.reversed {
            Counters {
                packets_forward: packets_reverse,
                bytes_forward: bytes_reverse,
                packets_reverse: packets_forward,
                bytes_reverse: bytes_forward,
            }
        } else {
            self.counters
        };
        let denied = side.cell.verdict == Verdict::Deny;
        let mut key = key(connection.is_icmp(), connection.protocol, side, caller, called);
        let (peer, peer_port) = (side.peer.unwrap_or(key.peer), key.peer_port);
        (key.peer, key.peer_port) = connection.seen_by(side.direction == Direction::Egress, self.reversed);
        RawFlow {
            event,
            key,
            peer,
            peer_port,
            direction: side.direction,
            verdict: side.cell.verdict,
            rule: side.cell.rule,
            audit_verdict: side.cell.audit_verdict,
            audit_rule: side.cell.audit_rule,
            reason: if denied { DropReason::Revoked } else { DropReason::None },
            counters,
            opened_ns: self.opened_ns,
            last_ns: self.last_ns,
        }
    }
}

/// A connection as one side sees it.
fn key(
    icmp: bool,
    protocol: bulkhead_model::ports::Protocol,
    side: &Side,
    (caller, caller_port): (IpAddr, u16),
    (called, called_port): (IpAddr, u16),
) -> ConnectionKey {
    let egress = side.direction == Direction::Egress;
    let (local, peer) = if egress { (caller, called) } else { (called, caller) };
    // ICMP has the identifier here and the message there, whoever began.
    let forward = egress || icmp;
    let (local_port, peer_port) =
        if forward { (caller_port, called_port) } else { (called_port, caller_port) };
    ConnectionKey { attachment: side.attachment, protocol, local, local_port, peer, peer_port }
}

/// By rule, as the maps have it.
pub(crate) fn rule_of(word: u32) -> RuleId {
    Words(word, 0).cell().rule
}
