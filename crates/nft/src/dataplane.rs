//! [`NftDataplane`]: the parts put together.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::Instant;

use bulkhead_dataplane::{Applied, Dataplane, DataplaneError, DataplaneStats, SweepStats, TableUse};
use bulkhead_model::Direction;
use bulkhead_model::flow::RawFlow;
use bulkhead_model::host_policy::{Attachment, Cell, HostDelta, HostPolicy};
use bulkhead_model::ports::PortKey;

use crate::flows::{Denials, Flows, Judge};
use crate::image::{Changes, Image};
use crate::message::{Request, SUBSYSTEM_NFTABLES, messages};
use crate::object::Element;
use crate::readback;
use crate::schema::{ATTACHED, DENIED_MAX, EDGE, FAMILIES, FENCE, JUDGE, LOG_GROUP};
use crate::skeleton::{self, Counted};
use crate::socket::{Listener, Refused, Talker};
use crate::{Capacities, conntrack, kernel, links, log, requirements};

/// `NFNLGRP_NFTABLES`: whatever anybody changes in any table.
const GROUP_TABLES: u32 = 7;
/// Far longer than a packet takes through the rules.
const GRACE: std::time::Duration = std::time::Duration::from_millis(20);
/// The only key of the fence.
const FENCE_KEY: [u8; 4] = [0, 0, 0, 1];

/// Enforces with nftables in the network namespace of the thread that opens it.
#[derive(Debug)]
pub struct NftDataplane {
    talker: Talker,
    tables: Listener,
    connections: Listener,
    refused: Listener,
    wait: OwnedFd,
    capacities: Capacities,
    image: Image,
    /// Whether the kernel's tables have this layout.
    ours: bool,
    /// Whether a whole state has been put into force by this process.
    replaced: bool,
    /// Whether somebody else has changed the tables.
    disturbed: bool,
    /// Whether the rules in the kernel ask for source ports.
    variants: bool,
    /// Whether refused packets are told to us: one process at a time can listen.
    listening: bool,
    settings: String,
    /// Whether the kernel has been told to show us what bridges carry.
    bridged: bool,
    judge: Judge,
    /// Whether connections have to be judged again.
    unsettled: bool,
    flows: Flows,
    denials: Denials,
    lost_events: u64,
    counted: Counted,
    generation: u64,
}

fn failed(context: &'static str) -> impl Fn(io::Error) -> DataplaneError {
    move |error| DataplaneError::io(context, error)
}

impl NftDataplane {
    /// Takes charge of the tables that are there, or makes them, closed. Whoever was in charge before is fenced off; what
    /// they applied stays in force until the first [`Dataplane::replace`].
    ///
    /// # Errors
    /// If the kernel lacks something, or refuses.
    pub fn open(capacities: Capacities) -> Result<Self, DataplaneError> {
        requirements::check()?;
        let open = |groups: &[u32]| Listener::open(groups).map_err(failed("open a netlink socket"));
        let mut talker = Talker::open().map_err(failed("open a netlink socket"))?;
        let (tables, connections, refused) = (open(&[])?, open(&conntrack::GROUPS)?, open(&[])?);
        let wait = epoll(&[tables.as_fd(), connections.as_fd(), refused.as_fd()])
            .map_err(failed("watch netlink sockets"))?;
        let user_data = user_data(&mut talker)?;
        let saved = user_data.as_deref().and_then(skeleton::settings).map(str::to_owned);
        let mut dataplane = Self {
            ours: saved.is_some(),
            settings: saved.unwrap_or_else(kernel::settings::now),
            talker,
            tables,
            connections,
            refused,
            wait,
            capacities,
            image: Image::default(),
            replaced: false,
            disturbed: false,
            variants: false,
            listening: false,
            bridged: false,
            judge: Judge::default(),
            unsettled: true,
            flows: Flows::default(),
            denials: Denials::default(),
            lost_events: 0,
            counted: Counted::new(),
            generation: 0,
        };
        dataplane.take_over(user_data.is_some())?;
        kernel::settings::set_needed().map_err(failed("turn the counters of connections on"))?;
        let mut nothing = |_flow| ();
        dataplane.sweep_connections(0, &mut nothing)?;
        Ok(dataplane)
    }

    /// Whether there are tables of this name in the network namespace of the thread.
    ///
    /// # Errors
    /// If the kernel does not answer.
    pub fn is_there() -> Result<bool, DataplaneError> {
        // A kernel without nftables has none.
        let Ok(mut talker) = Talker::open() else { return Ok(false) };
        Ok(user_data(&mut talker).is_ok_and(|found| found.is_some()))
    }

    /// Raises the fence and learns what is there, or makes it.
    fn take_over(&mut self, exists: bool) -> Result<(), DataplaneError> {
        if !self.ours {
            // Tables of another layout go on until the first replacement.
            self.generation = 1;
            self.variants = false;
            return if exists { Ok(()) } else { self.rebuild(&HostPolicy::default(), &BTreeSet::new()) };
        }
        let before = self.fence()?.unwrap_or(0);
        self.generation = before + 1;
        let mut requests = Vec::new();
        FENCE.remove(&[fence_element(before)], &mut requests);
        FENCE.add(&[fence_element(self.generation)], &mut requests);
        self.transact(&requests)?;
        self.image = readback::read(&mut self.talker)?.image();
        // Rules that ask for source ports say the same of rows that do not.
        self.variants = true;
        Ok(())
    }

    /// Generation in the kernel; `None` if there is none.
    fn fence(&mut self) -> Result<Option<u64>, DataplaneError> {
        let pairs = kernel::pairs(&mut self.talker, FENCE).map_err(failed("read the generation"))?;
        Ok(pairs.first().and_then(|(_, data)| Some(u64::from_be_bytes(data.as_slice().try_into().ok()?))))
    }

    fn check_fence(&mut self) -> Result<(), DataplaneError> {
        match self.fence()? {
            Some(current) if current > self.generation => {
                Err(DataplaneError::Fenced { current, own: self.generation })
            }
            _ => Ok(()),
        }
    }

    /// One transaction, which the kernel refuses if somebody has taken over.
    fn write(&mut self, requests: Vec<Request>) -> Result<(), DataplaneError> {
        if requests.is_empty() {
            return Ok(());
        }
        let mut fenced = Vec::with_capacity(requests.len() + 1);
        FENCE.add(&[fence_element(self.generation)], &mut fenced);
        fenced.extend(requests);
        self.transact(&fenced)
    }

    fn transact(&mut self, requests: &[Request]) -> Result<(), DataplaneError> {
        // What we change ourselves would come back, element by element.
        let quiet = failed("listen to changes of tables");
        self.tables.leave(GROUP_TABLES).map_err(&quiet)?;
        let result = self.talker.transact(requests);
        self.tables.join(GROUP_TABLES).map_err(&quiet)?;
        result.map_err(|refused| self.describe(&refused))
    }

    fn describe(&mut self, refused: &Refused) -> DataplaneError {
        let code = refused.error.raw_os_error();
        if refused.index == 0 && matches!(code, Some(libc::EBUSY | libc::EEXIST)) {
            let current = self.fence().ok().flatten().unwrap_or(self.generation + 1);
            return DataplaneError::Fenced { current, own: self.generation };
        }
        // Something that must be there is not.
        self.disturbed |= code == Some(libc::ENOENT);
        let error = io::Error::from_raw_os_error(code.unwrap_or(libc::EIO));
        DataplaneError::io(format!("change the tables (request {})", refused.index), error)
    }

    /// Everything anew, in one transaction: whatever is there under our name goes in the same moment.
    fn rebuild(&mut self, policy: &HostPolicy, attached: &BTreeSet<u32>) -> Result<(), DataplaneError> {
        let context = failed("read the tables");
        for table in [JUDGE, EDGE] {
            kernel::counters(&mut self.talker, table, &mut self.counted).map_err(&context)?;
        }
        let (image, changes) = Image::rebuild(policy, attached.clone());
        let mut requests = Vec::new();
        for table in [JUDGE, EDGE] {
            if kernel::user_data(&mut self.talker, table).map_err(&context)?.is_some() {
                requests.push(table.delete());
            }
        }
        let user_data = skeleton::user_data(&self.settings);
        requests.extend(skeleton::create(&user_data, &self.counted, image.has_variants()));
        FENCE.add(&[fence_element(self.generation)], &mut requests);
        for (ifindex, name) in named(attached) {
            requests.extend(skeleton::hook(ifindex, &name));
            ATTACHED.add(&[interface_element(ifindex)], &mut requests);
        }
        requests.extend(changes.requests().into_iter().flatten());
        self.transact(&requests)?;
        (self.variants, self.ours, self.disturbed) = (image.has_variants(), true, false);
        self.set_image(image);
        Ok(())
    }

    fn set_image(&mut self, image: Image) {
        self.image = image;
        self.judge = Judge::of(&self.image, kernel::own_addresses());
        self.unsettled = true;
    }

    /// Writes what the image has become.
    fn commit(&mut self, changes: &Changes) -> Result<(), DataplaneError> {
        let [mut first, second, mut last] = changes.requests();
        let wanted = self.image.has_variants();
        if wanted && !self.variants {
            first.extend(skeleton::rewrite(true));
        } else if !wanted && self.variants {
            last.extend(skeleton::rewrite(false));
        }
        let written = [first, second, last].into_iter().try_for_each(|requests| self.write(requests));
        self.judge = Judge::of(&self.image, kernel::own_addresses());
        self.unsettled = true;
        self.see_bridges()?;
        match written {
            Ok(()) => {
                self.variants = wanted;
                Ok(())
            }
            Err(error) => {
                // What is there is not what we take it for, until a replacement has read it.
                self.replaced = false;
                Err(error)
            }
        }
    }

    fn replace_all(&mut self, policy: &HostPolicy) -> Result<Changes, DataplaneError> {
        self.check_fence()?;
        Image::check_policy(policy, &self.capacities)?;
        let attached = self.image.attached().clone();
        let there =
            |table, talker: &mut Talker| kernel::user_data(talker, table).map_err(failed("read the tables"));
        let whole = there(JUDGE, &mut self.talker)?.is_some() && there(EDGE, &mut self.talker)?.is_some();
        if !self.ours || !whole || self.disturbed {
            self.rebuild(policy, &attached)?;
            self.replaced = true;
            return Ok(Image::rebuild(policy, attached).1);
        }
        if !self.replaced {
            self.image = readback::read(&mut self.talker)?.image();
        }
        let changes = self.image.replace(policy);
        self.commit(&changes)?;
        self.replaced = true;
        Ok(changes)
    }

    fn put_attached(
        &mut self,
        attached: BTreeSet<u32>,
        mut requests: Vec<Request>,
    ) -> Result<(), DataplaneError> {
        let changes = self.image.set_attached(attached);
        requests.extend(changes.requests().into_iter().flatten());
        self.write(requests)?;
        self.judge = Judge::of(&self.image, kernel::own_addresses());
        self.unsettled = true;
        Ok(())
    }

    /// Has the kernel show us what bridges carry, once an interface in charge is a port of one. It may have become one
    /// after it was taken charge of: that is how containers come.
    fn see_bridges(&mut self) -> Result<(), DataplaneError> {
        if self.bridged {
            return Ok(());
        }
        for ifindex in self.image.attached() {
            self.bridged |= links::is_bridge_port(*ifindex).map_err(failed("look at an interface"))?;
        }
        if self.bridged {
            kernel::settings::set_for_bridges().map_err(|error| {
                let advice = format!("what a bridge carries is not seen without br_netfilter ({error})");
                requirements::missing("bridge-nf-call-iptables", advice)
            })?;
        }
        Ok(())
    }

    /// Puts back what somebody else has taken away or changed.
    fn repair(&mut self) -> Result<(), DataplaneError> {
        self.check_fence()?;
        let (policy, attached) = (self.image.policy().clone(), self.image.attached().clone());
        self.rebuild(&policy, &attached)
    }

    /// Whether somebody else has changed a table of ours.
    fn watch(&mut self) -> Result<(), DataplaneError> {
        loop {
            match self.tables.next() {
                Ok(None) => return Ok(()),
                Ok(Some(bytes)) => {
                    self.disturbed |= messages(&bytes).any(|message| {
                        message.subsystem() == SUBSYSTEM_NFTABLES
                            && [JUDGE, EDGE].iter().any(|table| {
                                message.family() == table.family
                                    && message.attributes().text(1) == Some(table.name)
                            })
                    });
                }
                // More has happened than we could follow.
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => self.disturbed = true,
                Err(error) => return Err(DataplaneError::io("hear of changes of tables", error)),
            }
        }
    }

    fn listen(&mut self) {
        if !self.listening {
            // Whoever was in charge before may still hold the group; it is asked for again.
            self.listening = log::listen(LOG_GROUP).iter().all(|request| self.refused.ask(request).is_ok());
        }
    }

    fn read_refused(&mut self, now_ns: u64, sink: &mut dyn FnMut(RawFlow)) -> Result<(), DataplaneError> {
        loop {
            match self.refused.next() {
                Ok(None) => return Ok(()),
                Ok(Some(bytes)) => {
                    for refused in messages(&bytes).filter_map(|message| log::read(&message)) {
                        self.denials.event(&refused, (&self.judge, &self.image), now_ns, sink);
                    }
                }
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => self.lost_events += 1,
                Err(error) => return Err(DataplaneError::io("hear of refused packets", error)),
            }
        }
    }

    fn read_connections(&mut self, now_ns: u64, sink: &mut dyn FnMut(RawFlow)) -> Result<(), DataplaneError> {
        loop {
            match self.connections.next() {
                Ok(None) => return Ok(()),
                Ok(Some(bytes)) => {
                    for report in messages(&bytes).filter_map(|message| conntrack::read(&message)) {
                        let talker = &mut self.talker;
                        let count = |connection: &conntrack::Connection| {
                            let question = conntrack::get(connection);
                            let answer = talker.one(&question, conntrack::read).ok().flatten();
                            answer.and_then(|report| report.counters)
                        };
                        self.flows.event(&report, (&self.judge, &self.image), now_ns, count, sink);
                    }
                }
                // The connections are still there: the next sweep tells of them.
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => self.lost_events += 1,
                Err(error) => return Err(DataplaneError::io("hear of connections", error)),
            }
        }
    }

    fn sweep_connections(
        &mut self,
        now_ns: u64,
        sink: &mut dyn FnMut(RawFlow),
    ) -> Result<SweepStats, DataplaneError> {
        let reports = self
            .talker
            .dump(&conntrack::dump(), |message, all| all.extend(conntrack::read(message)))
            .map_err(failed("read connections"))?;
        Ok(self.flows.sweep(reports, (&self.judge, &self.image), now_ns, sink))
    }

    fn sweep_denials(
        &mut self,
        now_ns: u64,
        stats: &mut SweepStats,
        sink: &mut dyn FnMut(RawFlow),
    ) -> Result<(), DataplaneError> {
        let sets = FAMILIES.iter().flat_map(|family| [family.denied, family.edge_denied]);
        let sets: Vec<_> = sets.collect();
        let mut all = Vec::new();
        for set in &sets {
            let entries = kernel::counted_elements(&mut self.talker, *set);
            all.push(entries.map_err(failed("read refused connections"))?);
        }
        let mut requests = Vec::new();
        let gone = self.denials.sweep(all.into_iter().flatten().collect(), &self.judge, now_ns, stats, sink);
        for (set, table) in sets.iter().map(|set| (*set, set.table)) {
            let mine = gone.iter().filter(|element| {
                // At the edge, and only there, the interface is part of the key.
                let at_edge = element.key.get(4..8).is_some_and(|index| index != [0; 4]);
                element.key.len() == set.key_len as usize && at_edge == (table == EDGE)
            });
            let elements: Vec<_> =
                mine.map(|element| Element::Key { key: element.key.clone(), data: Vec::new() }).collect();
            set.remove(&elements, &mut requests);
        }
        self.write(requests)
    }
}

fn user_data(talker: &mut Talker) -> Result<Option<Vec<u8>>, DataplaneError> {
    let context = failed("read the tables");
    let judge = kernel::user_data(talker, JUDGE).map_err(&context)?;
    let edge = kernel::user_data(talker, EDGE).map_err(&context)?;
    Ok(match (judge, edge) {
        (Some(judge), Some(edge)) if judge == edge => Some(judge),
        (None, None) => None,
        // Half of something.
        _ => Some(Vec::new()),
    })
}

fn fence_element(generation: u64) -> Element {
    Element::Key { key: FENCE_KEY.to_vec(), data: generation.to_be_bytes().to_vec() }
}

fn interface_element(ifindex: u32) -> Element {
    Element::Key { key: ifindex.to_ne_bytes().to_vec(), data: Vec::new() }
}

/// Those of the interfaces that exist, with their names.
fn named(interfaces: &BTreeSet<u32>) -> BTreeMap<u32, String> {
    interfaces.iter().filter_map(|index| Some((*index, kernel::interface_name(*index)?))).collect()
}

/// One descriptor that is readable when one of these is.
fn epoll(watched: &[BorrowedFd<'_>]) -> io::Result<OwnedFd> {
    #[expect(unsafe_code, reason = "system calls without a safe wrapper")]
    // SAFETY: the new descriptor is owned by nobody else; the event outlives the call that reads it.
    unsafe {
        let fd = libc::epoll_create1(libc::EPOLL_CLOEXEC);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        let wait = OwnedFd::from_raw_fd(fd);
        for fd in watched {
            let mut event = libc::epoll_event { events: libc::EPOLLIN as u32, u64: 0 };
            let result =
                libc::epoll_ctl(wait.as_raw_fd(), libc::EPOLL_CTL_ADD, fd.as_raw_fd(), &raw mut event);
            if result < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(wait)
    }
}

/// Nanoseconds of CLOCK_MONOTONIC.
fn monotonic_ns() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    #[expect(unsafe_code, reason = "system call without a safe wrapper")]
    // SAFETY: the struct outlives the call.
    unsafe {
        libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time);
    }
    u64::try_from(time.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(time.tv_nsec).unwrap_or(0)
}

fn applied(started: Instant, changes: &Changes) -> Applied {
    let (entries_written, entries_deleted) = changes.tally();
    Applied { entries_written, entries_deleted, duration: started.elapsed() }
}

/// The interface of an attachment, the only kind that this backend knows.
fn interface(attachment: Attachment) -> Result<u32, DataplaneError> {
    match attachment {
        Attachment::Interface(ifindex) => Ok(ifindex),
        Attachment::Host(_) | Attachment::Cgroup(_) => Err(requirements::missing(
            "eBPF",
            format!("the nftables dataplane cannot enforce at {attachment}, only at workloads' interfaces"),
        )),
    }
}

impl Dataplane for NftDataplane {
    fn name(&self) -> &'static str {
        "nftables"
    }

    fn attach(&mut self, attachment: Attachment) -> Result<(), DataplaneError> {
        let ifindex = interface(attachment)?;
        self.check_fence()?;
        let name = kernel::interface_name(ifindex).ok_or(DataplaneError::InterfaceGone { ifindex })?;
        if self.image.attached().contains(&ifindex) {
            return Ok(());
        }
        let mut requests = skeleton::hook(ifindex, &name);
        ATTACHED.add(&[interface_element(ifindex)], &mut requests);
        let mut attached = self.image.attached().clone();
        attached.insert(ifindex);
        self.put_attached(attached, requests)?;
        self.see_bridges()
    }

    fn detach(&mut self, attachment: Attachment) -> Result<(), DataplaneError> {
        let ifindex = interface(attachment)?;
        self.check_fence()?;
        if !self.image.attached().contains(&ifindex) {
            return Ok(());
        }
        let chains = kernel::chains(&mut self.talker, EDGE).map_err(failed("list chains"))?;
        let own = skeleton::hook_chains(ifindex);
        let mut requests: Vec<_> =
            own.iter().filter(|name| chains.contains(name)).map(|name| EDGE.delete_chain(name)).collect();
        ATTACHED.remove(&[interface_element(ifindex)], &mut requests);
        let mut attached = self.image.attached().clone();
        attached.remove(&ifindex);
        self.put_attached(attached, requests)
    }

    fn attached(&self) -> Result<BTreeSet<Attachment>, DataplaneError> {
        Ok(named(self.image.attached()).into_keys().map(Attachment::Interface).collect())
    }

    fn replace(&mut self, policy: &HostPolicy) -> Result<Applied, DataplaneError> {
        let started = Instant::now();
        let changes = self.replace_all(policy)?;
        Ok(applied(started, &changes))
    }

    fn apply(&mut self, delta: &HostDelta) -> Result<Applied, DataplaneError> {
        let started = Instant::now();
        self.check_fence()?;
        if delta.is_empty() {
            return Ok(applied(started, &Changes::default()));
        }
        if !self.replaced {
            let why = "a difference came before the first whole state";
            return Err(DataplaneError::Inconsistent(why.to_owned()));
        }
        self.image.check_delta(delta, &self.capacities)?;
        let changes = self.image.apply(delta);
        self.commit(&changes)?;
        Ok(applied(started, &changes))
    }

    fn poll(&mut self, sink: &mut dyn FnMut(RawFlow)) -> Result<(), DataplaneError> {
        // Two readers would take each other's events.
        self.check_fence()?;
        self.watch()?;
        if self.disturbed {
            self.repair()?;
        }
        self.listen();
        let now_ns = monotonic_ns();
        self.read_connections(now_ns, sink)?;
        self.read_refused(now_ns, sink)?;
        if std::mem::take(&mut self.unsettled) {
            self.flows.judge_again(&self.judge, &self.image, sink);
        }
        Ok(())
    }

    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.wait.as_fd())
    }

    fn sweep(&mut self, now_ns: u64, sink: &mut dyn FnMut(RawFlow)) -> Result<SweepStats, DataplaneError> {
        self.poll(sink)?;
        let mut stats = self.sweep_connections(now_ns, sink)?;
        self.sweep_denials(now_ns, &mut stats, sink)?;
        // Somebody's flush takes the counters with it: they go on from here.
        for table in [JUDGE, EDGE] {
            kernel::counters(&mut self.talker, table, &mut self.counted).map_err(failed("read counters"))?;
        }
        self.see_bridges()?;
        Ok(stats)
    }

    fn stats(&self) -> Result<DataplaneStats, DataplaneError> {
        // A socket of its own: this does not change anything, and must not wait for what does.
        let mut talker = Talker::open().map_err(failed("open a netlink socket"))?;
        let mut counted = self.counted.clone();
        for table in [JUDGE, EDGE] {
            kernel::counters(&mut talker, table, &mut counted).map_err(failed("read counters"))?;
        }
        let (drops, unrecorded_denials) = kernel::drops(&counted);
        let entry = |(table, used)| TableUse { table, used, capacity: self.capacities.of(table) };
        let mut tables: Vec<_> = self.image.usage().map(entry).into();
        let denials = u64::from(DENIED_MAX) * 2 * FAMILIES.len() as u64;
        tables.push(TableUse { table: "denials", used: self.denials.entries, capacity: denials });
        tables.push(TableUse {
            table: "conns",
            used: self.flows.connections(),
            capacity: kernel::connections_max(),
        });
        Ok(DataplaneStats { drops, unrecorded_denials, lost_events: self.lost_events, tables })
    }

    fn lookup(
        &self,
        attachment: Attachment,
        direction: Direction,
        peer: IpAddr,
        key: PortKey,
        source_port: u16,
    ) -> Result<Option<Cell>, DataplaneError> {
        let mut talker = Talker::open().map_err(failed("open a netlink socket"))?;
        crate::lookup::cell(&mut talker, attachment, direction, (peer, key, source_port))
            .map_err(failed("look up a decision"))
    }

    fn read_back(&self) -> Result<HostPolicy, DataplaneError> {
        let mut talker = Talker::open().map_err(failed("open a netlink socket"))?;
        Ok(readback::read(&mut talker)?.policy())
    }

    fn generation(&self) -> u64 {
        self.generation
    }

    fn cleanup(&mut self) -> Result<(), DataplaneError> {
        self.check_fence()?;
        // First nothing is asked any more; tables that go in the same moment would refuse what is on its way.
        let mut requests = Vec::new();
        for table in [JUDGE, EDGE] {
            let chains = kernel::chains(&mut self.talker, table).map_err(failed("list chains"))?;
            let called = chains.iter().filter(|name| skeleton::is_called(name));
            requests.extend(called.map(|name| table.flush_chain(name)));
        }
        self.transact(&requests)?;
        std::thread::sleep(GRACE);
        let mut requests = Vec::new();
        for table in [JUDGE, EDGE] {
            let there = kernel::user_data(&mut self.talker, table).map_err(failed("read the tables"))?;
            requests.extend(there.map(|_| table.delete()));
        }
        self.transact(&requests)?;
        kernel::settings::restore(&self.settings);
        self.image = Image::default();
        self.replaced = false;
        Ok(())
    }
}
