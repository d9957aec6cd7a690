//! [`NftDataplane`]: the parts put together.

use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use bulkhead_dataplane::{
    Applied, Dataplane, DataplaneError, DataplaneStats, SweepStats, TableUse, grace_period,
};
use bulkhead_model::Direction;
use bulkhead_model::flow::RawFlow;
use bulkhead_model::host_policy::{Attachment, Cell, HostDelta, HostPolicy};
use bulkhead_model::ports::PortKey;

use crate::flows::{Denials, Flows, Judge};
use crate::fresh::Epochs;
use crate::groups::Group;
use crate::guard::Guard;
use crate::image::{Changes, Image};
use crate::rules::Shape;
use crate::schema::{ATTACHED, DENIED_MAX, EDGE, FAMILIES, JUDGE};
use crate::skeleton::{self, Counted};
use crate::socket::{Listener, Talker};
use crate::{Capacities, conntrack, kernel, readback, requirements};

mod epochs;
mod hearing;
mod tables;

use epochs::Settling;
use hearing::{Listening, epoll, monotonic_ns};
use tables::{interface_element, named, user_data};

/// Far longer than a packet takes through the rules.
const GRACE: Duration = Duration::from_millis(20);

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
    /// What is closed before it is in charge; `None`: nobody has said.
    guard: Option<Guard>,
    /// Whether the kernel's tables have this layout.
    ours: bool,
    /// Whether a whole state has been put into force by this process.
    replaced: bool,
    /// Whether somebody else has changed the tables.
    disturbed: bool,
    /// Whether somebody else may have.
    suspicious: bool,
    /// What the rules in the kernel can ask; `None`: at least what they must.
    shape: Option<Shape>,
    listening: Listening,
    settings: String,
    /// Whether the kernel has been told to show us what bridges carry.
    bridged: bool,
    judge: Judge,
    /// Whether connections have to be judged again.
    unsettled: bool,
    /// In which judged connections are not judged again; `None`: to be read.
    epochs: Option<Epochs>,
    /// How long ago tables changed.
    settling: Settling,
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
            guard: None,
            replaced: false,
            disturbed: false,
            suspicious: false,
            shape: None,
            listening: Listening::Not,
            bridged: false,
            judge: Judge::default(),
            unsettled: true,
            epochs: None,
            settling: Settling::Over,
            flows: Flows::default(),
            denials: Denials::default(),
            lost_events: 0,
            counted: Counted::new(),
            generation: 0,
        };
        dataplane.take_over(user_data.is_some())?;
        kernel::settings::set_needed().map_err(failed("turn the counters of connections on"))?;
        // Whatever an earlier process has changed just now.
        grace_period().map_err(failed("wait for packets on their way"))?;
        dataplane.settling = Settling::Over;
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
}

fn applied(started: Instant, changes: &Changes) -> Applied {
    let (entries_written, entries_deleted) = changes.tally();
    Applied { entries_written, entries_deleted, duration: started.elapsed() }
}

impl Dataplane for NftDataplane {
    fn name(&self) -> &'static str {
        "nftables"
    }

    fn guard(&mut self, names: &[String], spared: &BTreeSet<u32>) -> Result<(), DataplaneError> {
        self.guard = Some(Guard::new(names, spared));
        self.put_guard()
    }

    fn attach(&mut self, attachment: Attachment) -> Result<(), DataplaneError> {
        self.check_fence()?;
        let ifindex = match attachment {
            Attachment::Interface(ifindex) => ifindex,
            // It is judged wherever it is bound.
            Attachment::Host(_) | Attachment::Forwarded(_) => return Ok(()),
            Attachment::Cgroup(inode) => {
                let groups = Group::add(inode, self.image.groups())?;
                return if groups == *self.image.groups() { Ok(()) } else { self.put_groups(groups) };
            }
        };
        let name = kernel::interface_name(ifindex).ok_or(DataplaneError::Gone { attachment })?;
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
        self.check_fence()?;
        let ifindex = match attachment {
            Attachment::Interface(ifindex) => ifindex,
            Attachment::Host(_) | Attachment::Forwarded(_) => return Ok(()),
            Attachment::Cgroup(inode) => {
                let mut groups = self.image.groups().clone();
                return if groups.remove(&inode).is_some() { self.put_groups(groups) } else { Ok(()) };
            }
        };
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
        let interfaces = named(self.image.attached()).into_keys().map(Attachment::Interface);
        let groups = self.image.groups().keys().filter(|inode| Group::find(**inode).is_ok());
        Ok(interfaces.chain(groups.copied().map(Attachment::Cgroup)).collect())
    }

    fn replace(&mut self, policy: &HostPolicy) -> Result<Applied, DataplaneError> {
        let started = Instant::now();
        let changes = self.replace_all(policy)?;
        self.see_bridges()?;
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
        let before = self.image.shape();
        let changes = self.image.apply(delta);
        self.commit(&changes, before)?;
        if !delta.endpoints.is_empty() {
            self.see_bridges()?;
        }
        Ok(applied(started, &changes))
    }

    fn poll(&mut self, sink: &mut dyn FnMut(RawFlow)) -> Result<(), DataplaneError> {
        // Two readers would take each other's events.
        self.check_fence()?;
        self.watch()?;
        if self.disturbed {
            self.repair()?;
        }
        let now_ns = monotonic_ns();
        if self.listening != Listening::Told {
            self.listen(now_ns, sink)?;
        }
        self.read_connections(now_ns, sink)?;
        self.read_refused(now_ns, sink)?;
        if std::mem::take(&mut self.unsettled) {
            self.flows.judge_again(&self.judge, &self.image, sink);
        }
        self.begin_epoch()
    }

    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.wait.as_fd())
    }

    fn sweep(&mut self, now_ns: u64, sink: &mut dyn FnMut(RawFlow)) -> Result<SweepStats, DataplaneError> {
        if !self.judge.knows(&kernel::own_addresses()) {
            self.know_endpoints();
        }
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
        let (drops, unrecorded_denials, untold_refusals) = kernel::drops(&counted);
        let entry = |(table, used)| TableUse { table, used, capacity: self.capacities.of(table) };
        let mut tables: Vec<_> = self.image.usage().map(entry).into();
        let denials = u64::from(DENIED_MAX) * 2 * FAMILIES.len() as u64;
        tables.push(TableUse { table: "denials", used: self.denials.entries, capacity: denials });
        tables.push(TableUse {
            table: "conns",
            used: self.flows.connections(),
            capacity: kernel::connections_max(),
        });
        Ok(DataplaneStats {
            drops,
            unrecorded_denials,
            lost_events: self.lost_events,
            untold_refusals,
            tables,
        })
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
        self.epochs = None;
        Ok(())
    }
}
