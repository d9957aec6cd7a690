//! [`EbpfDataplane`]: the parts put together.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use bulkhead_dataplane::{
    Applied, Dataplane, DataplaneError, DataplaneStats, SweepStats, TableUse, grace_period,
};
use bulkhead_model::Direction;
use bulkhead_model::flow::{DropReason, RawFlow};
use bulkhead_model::host_policy::{Attachment, Cell, CompiledId, HostDelta, HostPolicy};
use bulkhead_model::ports::PortKey;

use crate::bank::{Bank, Outer, Tally};
use crate::capacities::Capacities;
use crate::cgroups::Groups;
use crate::endpoints::{Endpoints, Targets};
use crate::events::Events;
use crate::gates::Gates;
use crate::grace::Grace;
use crate::layout::{
    ABI_VERSION, COUNTER_LOST_EVENTS, COUNTER_UNRECORDED, COUNTER_UNTOLD, HALF_OPEN_SPAN, subject_of,
};
use crate::loader::{self, Loaded, libbpf_error};
use crate::lookup::Reader;
use crate::mapping::Mapping;
use crate::readback;
use crate::refusal::Refuser;
use crate::sweep::Sweeper;
use crate::tcx::Links;
use crate::{requirements, sys};

/// Enforces with eBPF programs on the host side of the workloads' interfaces.
///
/// Interfaces are those of the network namespace of the calling thread.
#[derive(Debug)]
pub struct EbpfDataplane {
    dir: PathBuf,
    root: PathBuf,
    capacities: Capacities,
    loaded: Loaded,
    links: Links,
    gates: Gates,
    groups: Groups,
    outer: Outer,
    bank: Option<Bank>,
    endpoints: Endpoints,
    grace: Grace,
    events: Events,
    refuser: Refuser,
    sweeper: Sweeper,
    counters: OwnedFd,
    config: Mapping<u64>,
    cpus: usize,
    generation: u64,
}

/// Words of `struct config` with the generation and the two cookies, half words with the revision, the number of host
/// endpoints and the number of those that are about forwarded traffic.
const CONFIG_GENERATION: u32 = 0;
const CONFIG_REVISION: u32 = 2;
const CONFIG_HOSTS: u32 = 3;
const CONFIG_REFUSERS: u32 = 2;
const CONFIG_FORWARDED: u32 = 8;
const CONFIG_WORDS: u32 = 5;

impl EbpfDataplane {
    /// Takes charge of what is pinned under `root`, for instance `/sys/fs/bpf/bulkhead/default`, or begins
    /// there. Whoever was in charge before is fenced off; what they applied stays in force until the
    /// first [`Dataplane::replace`].
    pub fn open(root: &Path, capacities: Capacities) -> Result<Self, DataplaneError> {
        requirements::check(root)?;
        let dir = root.join(format!("v{ABI_VERSION}"));
        let mut capacities = capacities;
        let loaded = Loaded::open(&dir, &mut capacities)?;
        let config_map = loaded.map("config")?;
        let config = Mapping::<u64>::new(config_map.as_fd(), CONFIG_WORDS)
            .map_err(|error| DataplaneError::io("map the configuration into memory", error))?;
        let generation = config.word(CONFIG_GENERATION).fetch_add(1, Ordering::SeqCst) + 1;
        if generation == 1 {
            // Connections may be remembered from before somebody removed an earlier configuration: under no revision
            // of theirs, lest one that is no longer allowed passes unjudged.
            config.half(CONFIG_REVISION).store(first_revision(), Ordering::SeqCst);
        }
        let refuser = Refuser::open();
        for (index, cookie) in (CONFIG_REFUSERS..).zip(refuser.cookies()) {
            config.word(index).store(cookie, Ordering::SeqCst);
        }
        let gates = Gates::open(root, &loaded)?;
        let cost = HALF_OPEN_SPAN / u64::from(capacities.half_open_max());
        let costs = loaded.table::<u32, u64>("half_open_ns")?;
        costs.put(&0, &cost).map_err(|error| DataplaneError::io("bound half-open connections", error))?;
        let mut links = Links::open(&dir)?;
        links.take_over(&loaded)?;
        let mut groups = Groups::open(&dir)?;
        groups.take_over(&loaded)?;
        let events = Events::open(loaded.map("events")?)
            .map_err(|error| DataplaneError::io("open the ring buffer", error))?;
        let cpus = libbpf_rs::num_possible_cpus().map_err(|error| libbpf_error("count CPUs", &error))?;
        Ok(Self {
            outer: Outer::open(&loaded)?,
            bank: None,
            grace: Grace::default(),
            endpoints: Endpoints::open(&loaded, &capacities)?,
            sweeper: Sweeper::new(loaded.table("conns")?, loaded.table("denials")?),
            counters: loaded.map("counters")?,
            root: root.to_path_buf(),
            dir,
            capacities,
            loaded,
            links,
            gates,
            groups,
            events,
            refuser,
            config,
            cpus,
            generation,
        })
    }

    /// Sizes in effect: those asked for, except where tables existed already.
    pub fn capacities(&self) -> &Capacities {
        &self.capacities
    }

    pub(crate) fn loaded(&self) -> &Loaded {
        &self.loaded
    }

    fn check_fence(&self) -> Result<(), DataplaneError> {
        let current = self.config.word(CONFIG_GENERATION).load(Ordering::SeqCst);
        if current == self.generation {
            return Ok(());
        }
        Err(DataplaneError::Fenced { current, own: self.generation })
    }

    /// Makes every live connection be judged again at its next packet.
    fn raise_revision(&self) {
        self.config.half(CONFIG_REVISION).fetch_add(1, Ordering::SeqCst);
    }

    /// Tells the programs whether the host itself is an endpoint, and whether what it forwards is somebody's.
    fn count_hosts(&self) {
        let bound = |of: fn(Attachment) -> bool| self.endpoints.count(of);
        let hosts = bound(|attachment| matches!(attachment, Attachment::Host(_)));
        self.config.half(CONFIG_HOSTS).store(hosts, Ordering::SeqCst);
        let forwarded = bound(|attachment| matches!(attachment, Attachment::Forwarded(_)));
        self.config.half(CONFIG_FORWARDED).store(forwarded, Ordering::SeqCst);
    }

    /// Pins again what somebody has removed: it is in force as long as we live, and must be beyond that.
    fn put_back(&self) -> Result<u64, DataplaneError> {
        Ok(self.loaded.put_back()?
            + self.gates.put_back()?
            + self.links.put_back()?
            + self.groups.put_back()?)
    }

    fn grace_period() -> Result<(), DataplaneError> {
        grace_period().map_err(|error| DataplaneError::io("wait for running programs", error))
    }

    fn is_unsettled(&self) -> bool {
        self.endpoints.is_unsettled() || self.bank.as_ref().is_some_and(Bank::is_unsettled)
    }

    /// Before anything is written, what was removed earlier must be out of every program's sight: the
    /// kernel's allocator recycles removed elements at once.
    fn settle(&mut self) -> Result<(), DataplaneError> {
        if self.is_unsettled() {
            self.grace.finish().map_err(|error| DataplaneError::io("wait for running programs", error))?;
            self.endpoints.settle();
            self.bank.iter_mut().for_each(Bank::settle);
        }
        Ok(())
    }

    fn replace_all(&mut self, policy: &HostPolicy, tally: &mut Tally) -> Result<(), DataplaneError> {
        self.settle()?;
        let targets = self.endpoints.targets_of_policy(policy)?;
        self.endpoints.check(&targets)?;
        let slot = self
            .endpoints
            .free_bank()
            .ok_or_else(|| DataplaneError::Inconsistent("every bank is in use".to_owned()))?;
        let (bank, written) = Bank::build(slot, &self.capacities, policy, &self.outer)?;
        tally.written += written.written;
        self.endpoints.switch(&targets, slot, tally)?;
        self.count_hosts();
        self.gates.install(&self.loaded)?;
        self.raise_revision();
        Self::grace_period()?;
        self.endpoints.settle();
        self.bank = Some(bank);
        for other in (0..crate::layout::BANKS).filter(|other| *other != slot) {
            self.outer.clear(other)?;
        }
        self.remove_other_versions()
    }

    /// Programs of another layout, left by another version of the agent, have judged up to now. Ours come to stand beside
    /// them first: no packet passes unjudged.
    fn remove_other_versions(&mut self) -> Result<(), DataplaneError> {
        let there = |attached: Result<(), DataplaneError>| match attached {
            // An interface or a group that has gone meanwhile.
            Err(DataplaneError::Gone { .. }) => Ok(()),
            other => other,
        };
        for path in self.other_versions()? {
            let (mut links, mut groups) = (Links::of_another(&path), Groups::of_another(&path));
            for ifindex in links.attached()? {
                there(self.links.attach(&self.loaded, ifindex))?;
                links.detach(ifindex)?;
            }
            for inode in groups.attached()? {
                there(self.groups.attach(&self.loaded, inode))?;
                groups.detach(inode)?;
            }
            loader::remove_pins(&path)?;
        }
        Ok(())
    }

    fn other_versions(&self) -> Result<Vec<PathBuf>, DataplaneError> {
        Ok(self.versions()?.into_iter().filter(|path| *path != self.dir).collect())
    }

    /// Pin directories of all layouts. Nothing else under the root is ours.
    fn versions(&self) -> Result<Vec<PathBuf>, DataplaneError> {
        let entries = fs::read_dir(&self.root)
            .map_err(|error| DataplaneError::io(format!("list {}", self.root.display()), error))?;
        let is_version =
            |name: &str| name.strip_prefix('v').is_some_and(|number| number.parse::<u32>().is_ok());
        Ok(entries
            .filter_map(Result::ok)
            .filter(|entry| entry.file_name().to_str().is_some_and(is_version))
            .map(|entry| entry.path())
            .collect())
    }

    fn apply_delta(&mut self, delta: &HostDelta, tally: &mut Tally) -> Result<(), DataplaneError> {
        self.settle()?;
        let targets: Targets<'_> = self.endpoints.targets_of_delta(delta)?;
        self.endpoints.check(&targets)?;
        let Some(bank) = &mut self.bank else {
            return Err(DataplaneError::Inconsistent(
                "a difference came before the first whole state".to_owned(),
            ));
        };
        bank.extend(delta, tally)?;
        self.endpoints.switch(&targets, bank.slot, tally)?;
        self.count_hosts();
        // At once, not after the grace period: a program that still runs on the old tables has read the old
        // revision before them, so what it lets through is judged again, too.
        self.raise_revision();
        let Some(bank) = &mut self.bank else { return Ok(()) };
        if !delta.removed_rows.is_empty() || !delta.removed_policies.is_empty() {
            // Nobody may be between an old class or binding and its row.
            Self::grace_period()?;
            bank.shrink(delta, tally)?;
        }
        if self.is_unsettled() {
            self.grace.begin();
        }
        Ok(())
    }

    fn counter(&self, index: u32) -> Result<u64, DataplaneError> {
        sys::sum_per_cpu(self.counters.as_fd(), index, self.cpus)
            .map_err(|error| DataplaneError::io("read counters", error))
    }
}

/// One that is later than any of an earlier configuration, whose revisions rise less often than once a millisecond.
#[expect(clippy::cast_possible_truncation, reason = "it may wrap around")]
fn first_revision() -> u32 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis() as u32
}

fn applied(started: Instant, tally: Tally) -> Applied {
    Applied { entries_written: tally.written, entries_deleted: tally.deleted, duration: started.elapsed() }
}

impl Dataplane for EbpfDataplane {
    fn name(&self) -> &'static str {
        "ebpf"
    }

    fn attach(&mut self, attachment: Attachment) -> Result<(), DataplaneError> {
        self.check_fence()?;
        match attachment {
            Attachment::Interface(ifindex) => self.links.attach(&self.loaded, ifindex),
            // The netfilter programs are always there.
            Attachment::Host(_) | Attachment::Forwarded(_) => Ok(()),
            Attachment::Cgroup(inode) => self.groups.attach(&self.loaded, inode),
        }
    }

    fn detach(&mut self, attachment: Attachment) -> Result<(), DataplaneError> {
        self.check_fence()?;
        match attachment {
            Attachment::Interface(ifindex) => {
                let others = self.other_versions()?;
                others.iter().try_for_each(|path| Links::of_another(path).detach(ifindex))?;
                self.links.detach(ifindex)
            }
            Attachment::Host(_) | Attachment::Forwarded(_) => Ok(()),
            Attachment::Cgroup(inode) => {
                let others = self.other_versions()?;
                others.iter().try_for_each(|path| Groups::of_another(path).detach(inode))?;
                self.groups.detach(inode)
            }
        }
    }

    /// Also where programs of another layout are, until the first [`Self::replace`] puts ours there.
    fn attached(&self) -> Result<BTreeSet<Attachment>, DataplaneError> {
        let mut attached = BTreeSet::new();
        for path in self.versions()? {
            let interfaces = Links::of_another(&path).attached()?;
            attached.extend(interfaces.into_iter().map(Attachment::Interface));
            attached.extend(Groups::of_another(&path).attached()?.into_iter().map(Attachment::Cgroup));
        }
        Ok(attached)
    }

    fn replace(&mut self, policy: &HostPolicy) -> Result<Applied, DataplaneError> {
        let (started, mut tally) = (Instant::now(), Tally::default());
        self.check_fence()?;
        self.replace_all(policy, &mut tally)?;
        Ok(applied(started, tally))
    }

    fn apply(&mut self, delta: &HostDelta) -> Result<Applied, DataplaneError> {
        let (started, mut tally) = (Instant::now(), Tally::default());
        self.check_fence()?;
        if !delta.is_empty() {
            self.apply_delta(delta, &mut tally)?;
        }
        Ok(applied(started, tally))
    }

    fn poll(&mut self, sink: &mut dyn FnMut(RawFlow)) -> Result<(), DataplaneError> {
        // Two readers of one ring would take each other's events.
        self.check_fence()?;
        let refuser = &mut self.refuser;
        let drained = self.events.drain(sink, &mut |refusal| refuser.tell(refusal));
        drained.map_err(|error| DataplaneError::io("read the ring buffer", error))
    }

    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.events.fd())
    }

    fn sweep(&mut self, now_ns: u64, sink: &mut dyn FnMut(RawFlow)) -> Result<SweepStats, DataplaneError> {
        self.check_fence()?;
        let swept = self.sweeper.sweep(now_ns, sink);
        let swept = swept.map_err(|error| DataplaneError::io("sweep connections", error))?;
        Ok(SweepStats { put_back: self.put_back()?, ..swept })
    }

    fn stats(&self) -> Result<DataplaneStats, DataplaneError> {
        let mut drops = BTreeMap::new();
        let mut unrecorded_denials = 0;
        for reason in DropReason::ALL {
            let index = u32::from(reason as u8);
            let count = self.counter(index)?;
            if count > 0 {
                drops.insert(reason, count);
            }
            unrecorded_denials += self.counter(COUNTER_UNRECORDED + index)?;
        }
        let mut tables = Vec::new();
        if let Some(bank) = &self.bank {
            tables.extend(bank.usage());
        }
        tables.extend(self.endpoints.usage());
        let entry = |table, used, capacity| TableUse { table, used, capacity: u64::from(capacity) };
        tables.push(entry("conns", self.sweeper.connections, self.capacities.conns));
        tables.push(entry("denials", self.sweeper.denied, self.capacities.denials));
        Ok(DataplaneStats {
            drops,
            unrecorded_denials,
            lost_events: self.counter(COUNTER_LOST_EVENTS)?,
            untold_refusals: self.counter(COUNTER_UNTOLD)? + self.refuser.untold,
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
        let io_error = |error| DataplaneError::io(format!("look up {attachment}"), error);
        let Some(binding) = self.endpoints.binding(subject_of(attachment)).map_err(io_error)? else {
            return Ok(None);
        };
        let compiled = match direction {
            Direction::Ingress => binding.ingress,
            Direction::Egress => binding.egress,
        };
        if compiled == CompiledId::NONE {
            return Ok(None);
        }
        let reader = Reader { outer: &self.outer, bank: binding.bank };
        reader.cell(compiled, peer, key, source_port).map_err(io_error)
    }

    fn read_back(&self) -> Result<HostPolicy, DataplaneError> {
        readback::read_back(&self.outer, &self.endpoints)
    }

    fn generation(&self) -> u64 {
        self.generation
    }

    fn cleanup(&mut self) -> Result<(), DataplaneError> {
        self.check_fence()?;
        for attachment in self.attached()? {
            self.detach(attachment)?;
        }
        Gates::remove(&self.root)?;
        for version in self.versions()? {
            loader::remove_pins(&version)?;
        }
        // It stays if somebody else has something there.
        let _not_empty = fs::remove_dir(&self.root);
        Ok(())
    }
}
