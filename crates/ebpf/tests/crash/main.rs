//! An agent that is killed at any step of a change leaves each endpoint under the policy before or after it, never a
//! third one; and whoever comes next brings everything to exactly what is wanted.
//!
//! No test harness: the process must have one thread, so that it can fork others that work with its tables.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails here")]

#[path = "../common/mod.rs"]
mod common;
mod tracer;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use bulkhead_dataplane::Dataplane;
use bulkhead_ebpf::EbpfDataplane;
use bulkhead_model::host_policy::{
    Attachment, ClassId, CompiledId, EndpointBinding, HostDelta, HostPolicy, RuleId,
};
use bulkhead_model::ports::Protocol;
use bulkhead_model::verdict::Verdict::{self, Allow, Deny};
use bulkhead_model::{Direction, Prefix};
use common::packet::{Packet, SYN};
use common::{Bench, PinRoot, Rule, cell, compile, enter_new_namespace, interface, run, small};
use libbpf_rs::{MapCore, MapFlags, MapHandle};
use tracer::{Place, kill_at, watch};

const PEERS: [&str; 4] = ["10.0.1.7", "10.0.2.7", "10.0.3.7", "192.0.2.9"];
const PORTS: [u16; 2] = [80, 443];

/// Two compiled policies of a version, over the same classes as every other version has. Their rules have numbers of
/// their own, so that an answer tells where it comes from.
fn compiled(version: u32, verdict: Verdict) -> Vec<bulkhead_model::host_policy::CompiledPolicy> {
    let other = if verdict == Allow { Deny } else { Allow };
    let base = version * 100;
    let blocks = prefixes();
    let rules = [
        Rule("10.0.1.0/24", "tcp/80", verdict, base + 1),
        Rule("10.0.2.0/24", "tcp", other, base + 2),
        Rule("10.0.3.7/32", "tcp/443", verdict, base + 3),
    ];
    let default = cell(other, base + 9, false);
    [1, 2].map(|number| compile(CompiledId(version * 10 + number), &blocks, &rules, default)).into()
}

fn prefixes() -> Vec<Prefix> {
    ["10.0.1.0/24", "10.0.2.0/24", "10.0.3.7/32"].map(|text| text.parse().unwrap()).into()
}

fn own(number: u8) -> IpAddr {
    [172, 16, 0, number].into()
}

fn binding(number: u8, version: u32) -> EndpointBinding {
    EndpointBinding {
        attachment: interface(&format!("w{number}")),
        addresses: vec![own(number)],
        ingress: CompiledId(version * 10 + 1),
        egress: CompiledId(version * 10 + 2),
    }
}

/// A whole state: these endpoints under that version.
fn state(endpoints: &[u8], version: u32, verdict: Verdict) -> HostPolicy {
    HostPolicy {
        revision: version.into(),
        addresses: prefixes().into_iter().zip((1..).map(ClassId)).collect(),
        policies: compiled(version, verdict).into_iter().map(|policy| (policy.id, policy)).collect(),
        endpoints: endpoints.iter().map(|number| (name(*number), binding(*number, version))).collect(),
        rules: BTreeMap::new(),
    }
}

fn name(number: u8) -> Arc<str> {
    format!("w{number}").into()
}

/// From `state(&[1, 2], 1, …)`: the first endpoint under new policies and with another address of its own, the second
/// gone, a third there; a peer in another class, for which every policy in force has a row; the old policies gone.
fn difference(verdict: Verdict) -> HostDelta {
    let moved: Prefix = "192.0.2.9/32".parse().unwrap();
    let class = ClassId(4);
    let base = |version: u32| cell(verdict, version * 100 + 4, true);
    let row = |version| common::row(&[("tcp".parse().unwrap(), base(version))], base(version));
    let mut policies = compiled(2, verdict);
    for policy in &mut policies {
        policy.rows.insert(class, row(2));
    }
    let mut first = binding(1, 2);
    first.addresses.push([172, 16, 9, 1].into());
    HostDelta {
        revision: 2,
        rows: [11, 12].map(|old| (CompiledId(old), class, row(1))).into(),
        policies,
        addresses: BTreeMap::from([
            (moved, Some(class)),
            (prefixes()[0], None),
            ("10.0.1.0/25".parse().unwrap(), Some(ClassId(1))),
        ]),
        endpoints: BTreeMap::from([(name(1), Some(first)), (name(2), None), (name(3), Some(binding(3, 2)))]),
        removed_policies: [11, 12].map(CompiledId).into(),
        ..HostDelta::default()
    }
}

/// A connection's direction, peer and port, and what becomes of it, by which rule.
type Answer = (Direction, IpAddr, u16, Option<(Verdict, RuleId)>);

struct World {
    bench: Bench,
    /// Where the next probe comes from, lest it is a packet of a known connection.
    port: u16,
}

impl World {
    fn open(&mut self) {
        self.bench.dataplane = EbpfDataplane::open(self.bench.root.path(), small()).unwrap();
    }

    fn pinned(&self, map: &str) -> MapHandle {
        MapHandle::from_pinned_path(self.pin_directory("v").join(map)).unwrap()
    }

    /// The one directory of pins whose name begins so.
    fn pin_directory(&self, beginning: &str) -> PathBuf {
        let entries = std::fs::read_dir(self.bench.root.path()).unwrap();
        let mut found: Vec<PathBuf> = entries
            .map(|entry| entry.unwrap())
            .filter(|entry| entry.file_name().to_str().unwrap().starts_with(beginning))
            .map(|entry| entry.path())
            .collect();
        assert_eq!(found.len(), 1, "{found:?}");
        found.remove(0)
    }

    fn pins(&self, beginning: &str) -> Vec<PathBuf> {
        let entries =
            std::fs::read_dir(self.pin_directory(beginning)).unwrap().map(|entry| entry.unwrap().path());
        let mut pins: Vec<PathBuf> = entries.filter(|path| path.is_file()).collect();
        pins.sort();
        pins
    }

    /// What the programs of the kernel, and its tables, say of an endpoint: versions of the rules that decide, by probe.
    fn answers(&mut self, number: u8) -> Vec<Answer> {
        let attachment = interface(&format!("w{number}"));
        let mut answers = Vec::new();
        for direction in Direction::BOTH {
            for peer in PEERS {
                for port in PORTS {
                    let peer: IpAddr = peer.parse().unwrap();
                    self.port = self.port.checked_add(1).unwrap_or(10_000);
                    let source_port = self.port;
                    let key = Protocol::TCP.key(port);
                    let found = self.bench.dataplane.lookup(attachment, direction, peer, key, source_port);
                    let found = found.unwrap().map(|cell| (cell.verdict, cell.rule));
                    let (from, to) = if direction == Direction::Egress {
                        (own(number), peer)
                    } else {
                        (peer, own(number))
                    };
                    let packet = Packet::tcp(from, source_port, to, port, SYN);
                    self.bench.ifindex = common::ifindex(&format!("w{number}"));
                    let passed = if direction == Direction::Egress {
                        self.bench.from(&packet)
                    } else {
                        self.bench.to(&packet)
                    };
                    let says = found.is_some_and(|(verdict, _)| verdict == Allow);
                    assert_eq!(passed, says, "{direction} {peer} {port} of w{number}: {found:?}");
                    answers.push((direction, peer, port, found));
                }
            }
        }
        answers
    }

    /// Each endpoint is under one of two states, as a whole.
    fn check_no_third(&mut self, old: &HostPolicy, new: &HostPolicy, members: &[&HostPolicy], place: &str) {
        for number in 1..=3 {
            let answers = self.answers(number);
            let bound = |state: &HostPolicy| {
                state.endpoints.get(&name(number)).map(|binding| (binding.ingress, binding.egress))
            };
            // Policies before or after; members before or after, whatever the policies are.
            let fits = |policies: &HostPolicy| {
                answers.iter().all(|(direction, peer, port, found)| {
                    members.iter().any(|members| {
                        let mut mixed = (*members).clone();
                        mixed.endpoints.clone_from(&policies.endpoints);
                        let expected =
                            mixed.lookup(&name(number), *direction, *peer, Protocol::TCP.key(*port), 9);
                        expected.map(|cell| (cell.verdict, cell.rule)) == *found
                    })
                })
            };
            assert!(
                fits(old) || fits(new),
                "{place}: w{number} is neither under {:?} nor under {:?}: {answers:?}",
                bound(old),
                bound(new)
            );
        }
    }

    /// Exactly what is wanted, and nothing besides it.
    fn check_exactly(&mut self, wanted: &HostPolicy, place: &str) {
        for number in 1..=3 {
            for (direction, peer, port, found) in self.answers(number) {
                let expected = wanted.lookup(&name(number), direction, peer, Protocol::TCP.key(port), 9);
                let expected = expected.map(|cell| (cell.verdict, cell.rule));
                assert_eq!(found, expected, "{place}: w{number} {direction} {peer} {port}");
            }
        }
        let read = self.bench.dataplane.read_back().unwrap();
        assert_eq!(read.addresses, wanted.addresses, "{place}");
        assert_eq!(read.policies, wanted.policies, "{place}");
        let bindings = |policy: &HostPolicy| -> BTreeMap<Attachment, EndpointBinding> {
            policy.endpoints.values().map(|binding| (binding.attachment, binding.clone())).collect()
        };
        assert_eq!(bindings(&read), bindings(wanted), "{place}");
        for map in ["addr_exact", "addr_lpm", "rows", "steps", "cells", "variants"] {
            let outer = self.pinned(map);
            let banks = outer.keys().filter(|key| matches!(outer.lookup(key, MapFlags::ANY), Ok(Some(_))));
            assert_eq!(banks.count(), 1, "{place}: banks in {map}");
        }
        assert_eq!(self.pinned("endpoints").keys().count(), wanted.endpoints.len(), "{place}");
        let addresses: usize = wanted.endpoints.values().map(|binding| binding.addresses.len()).sum();
        assert_eq!(self.pinned("endpoint_addrs").keys().count(), addresses, "{place}");
        let known: BTreeSet<Attachment> = (1..=3).map(|number| interface(&format!("w{number}"))).collect();
        assert_eq!(self.bench.dataplane.attached().unwrap(), known, "{place}");
    }

    /// Kills `work` everywhere between `old` and `new`; a successor then brings about `new` each time.
    fn kill_everywhere(
        &mut self,
        title: &str,
        old: &HostPolicy,
        new: &HostPolicy,
        members: &[&HostPolicy],
        least: usize,
        work: &dyn Fn(&mut EbpfDataplane),
    ) {
        let started = Instant::now();
        self.bench.dataplane.replace(old).unwrap();
        let words = shared_words(self);
        let look = || words.read();
        let dataplane = &mut self.bench.dataplane;
        let course = watch(&mut || work(dataplane), &look).unwrap();
        let places = course.places();
        self.open();
        self.bench.dataplane.replace(old).unwrap();
        let stores = places.iter().filter(|place| place.stores > 0).count();
        for place in &places {
            let step = course.calls.get(place.calls).map_or("the end", |(name, _)| name.as_str());
            let shown = format!(
                "{title}, killed before call {} ({step}), {} stores later",
                place.calls, place.stores
            );
            let dataplane = &mut self.bench.dataplane;
            kill_at(&mut || work(dataplane), *place, &look).unwrap();
            self.check_no_third(old, new, members, &shown);
            self.open();
            self.bench.dataplane.read_back().unwrap();
            self.bench.dataplane.replace(new).unwrap();
            self.check_exactly(new, &shown);
            self.bench.dataplane.replace(old).unwrap();
        }
        let kills = places.len();
        let seconds = started.elapsed().as_secs_f64();
        println!("{title}: killed at {kills} places, {stores} of them stores, in {seconds:.1} s");
        assert!(kills >= least, "{title}: only {kills} places: has the tracer gone blind?");
    }
}

/// The bindings and the configuration, as memory that everybody shares.
struct Words(Vec<(*const u64, usize)>);

impl Words {
    fn read(&self) -> Vec<u64> {
        let words = self.0.iter().flat_map(|(base, len)| (0..*len).map(move |at| (*base, at)));
        #[expect(unsafe_code, reason = "shared memory")]
        // SAFETY: within the mappings, which are never undone.
        words.map(|(base, at)| unsafe { base.add(at).read_volatile() }).collect()
    }
}

fn shared_words(world: &World) -> Words {
    let map = |name: &str, len: usize| {
        let handle = world.pinned(name);
        #[expect(unsafe_code, reason = "mmap")]
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        let base = unsafe {
            let fd = std::os::fd::AsRawFd::as_raw_fd(&handle.as_fd());
            libc::mmap(std::ptr::null_mut(), len * 8, libc::PROT_READ, libc::MAP_SHARED, fd, 0)
        };
        assert_ne!(base, libc::MAP_FAILED, "{name}");
        (base.cast_const().cast::<u64>(), len)
    };
    // Of the configuration without its first word: who opens raises the generation, from whatever it was.
    let (config, len) = map("config", 2);
    Words(vec![map("bindings", small().endpoints as usize), (config.wrapping_add(1), len - 1)])
}

fn replacing(world: &mut World) {
    let old = state(&[1, 2], 1, Allow);
    let new = state(&[1, 3], 2, Deny);
    world.kill_everywhere("replace", &old, &new, &[&old, &new], 20, &|dataplane| {
        dataplane.replace(&state(&[1, 3], 2, Deny)).unwrap();
    });
}

fn applying(world: &mut World) {
    let old = state(&[1, 2], 1, Allow);
    let delta = difference(Deny);
    let mut after = old.clone();
    after.apply(&delta);
    // Members before and after, with all that was in force in between.
    let mut between = [old.clone(), after.clone()];
    for state in &mut between {
        for policy in old.policies.values().chain(after.policies.values()) {
            let rows = delta.rows.iter().filter(|(id, ..)| *id == policy.id);
            let rows = rows.map(|(_, class, row)| (*class, Arc::clone(row)));
            state.policies.entry(policy.id).or_insert_with(|| policy.clone()).rows.extend(rows);
        }
    }
    let [before, behind] = &between;
    world.kill_everywhere("apply", &old, &after, &[before, behind], 15, &move |dataplane| {
        dataplane.apply(&delta).unwrap();
    });
}

/// What an agent does first that starts anew over what another left. What it does then is replacing.
fn starting_again(world: &mut World) {
    let old = state(&[1, 2], 1, Allow);
    let root = world.bench.root.path().to_owned();
    world.kill_everywhere("open and attach", &old, &old, &[&old], 5, &move |_fenced| {
        let mut dataplane = EbpfDataplane::open(&root, small()).unwrap();
        for number in 1..=3 {
            dataplane.attach(interface(&format!("w{number}"))).unwrap();
        }
    });
}

/// What the first agent of a host does: what it leaves when it is killed is no hindrance to the next.
fn starting_for_the_first_time(world: &mut World) {
    let wanted = state(&[1, 2], 1, Allow);
    let work = |root: &std::path::Path| {
        let mut dataplane = EbpfDataplane::open(root, small()).unwrap();
        for number in 1..=3 {
            dataplane.attach(interface(&format!("w{number}"))).unwrap();
        }
        dataplane.replace(&state(&[1, 2], 1, Allow)).unwrap();
    };
    let look = Vec::new;
    let again = |world: &mut World| {
        world.bench.dataplane.cleanup().unwrap();
        world.bench.root.path().to_owned()
    };
    let root = again(world);
    let course = watch(&mut || work(&root), &look).unwrap();
    world.open();
    // What replacing does is looked at elsewhere: here, up to the last link.
    let last = course.calls.iter().rposition(|(name, _)| name == "pin").unwrap() + 2;
    let places: Vec<usize> = (0..last).filter(|calls| *calls == 0 || course.calls[calls - 1].1).collect();
    assert!(places.len() > 20, "only {} places: has the tracer gone blind?", places.len());
    for calls in &places {
        let shown = format!("first start, killed before call {calls} ({})", course.calls[*calls].0);
        let root = again(world);
        kill_at(&mut || work(&root), Place { calls: *calls, stores: 0 }, &look).unwrap();
        world.open();
        for number in 1..=3 {
            world.bench.dataplane.attach(interface(&format!("w{number}"))).unwrap();
        }
        world.bench.dataplane.replace(&wanted).unwrap();
        world.check_exactly(&wanted, &shown);
    }
    println!("first start: killed at {} places", places.len());
}

/// A dataplane of another network namespace, to hold the place of one that has ended.
fn elsewhere() -> EbpfDataplane {
    let open = || {
        enter_new_namespace();
        EbpfDataplane::open(PinRoot::new().path(), small()).unwrap()
    };
    std::thread::spawn(open).join().unwrap()
}

/// Tables that somebody emptied, and pins that somebody removed.
fn damage_from_outside(world: &mut World) {
    let wanted = state(&[1, 2], 3, Allow);
    let name = |pin: PathBuf| pin.file_name().unwrap().to_str().unwrap().to_owned();
    let pins: Vec<String> = world.pins("v").into_iter().map(name).collect();
    assert!(pins.len() > 10, "{pins:?}");
    world.bench.dataplane.replace(&state(&[1, 2, 3], 2, Deny)).unwrap();
    // What says nothing of policy goes together; everything else by itself.
    let records = ["conns", "denials", "frags", "events", "counters"].map(ToOwned::to_owned);
    let (records, others): (Vec<_>, Vec<_>) = pins.into_iter().partition(|pin| records.contains(pin));
    let groups: Vec<Vec<String>> = others.into_iter().map(|pin| vec![pin]).chain([records]).collect();
    let mut emptied = 0;
    for group in &groups {
        let mut deleted = 0;
        for map in group.iter().map(|pin| world.pinned(pin)).filter(|map| map.key_size() > 0) {
            // Arrays cannot be emptied: deleting from one fails.
            deleted += map.keys().collect::<Vec<_>>().iter().filter(|key| map.delete(key).is_ok()).count();
        }
        if deleted == 0 {
            continue;
        }
        emptied += 1;
        world.open();
        world.bench.dataplane.replace(&wanted).unwrap();
        world.check_exactly(&wanted, &format!("{group:?} was emptied"));
        world.bench.dataplane.replace(&state(&[1, 2, 3], 2, Deny)).unwrap();
    }
    assert!(emptied >= 8, "only {emptied} tables had anything to delete");
    for group in &groups {
        world.bench.dataplane.replace(&state(&[1, 2, 3], 2, Deny)).unwrap();
        let path = world.pin_directory("v");
        group.iter().for_each(|pin| std::fs::remove_file(path.join(pin)).unwrap());
        world.open();
        world.bench.dataplane.replace(&wanted).unwrap();
        world.check_exactly(&wanted, &format!("the pin of {group:?} was removed"));
    }
    // The programs at netfilter's hooks: without one of them, a workload's first packets would go unjudged.
    let gates = world.pins("gates");
    assert!(gates.len() > 4, "{gates:?}");
    for gate in &gates {
        std::fs::remove_file(gate).unwrap();
        let swept = world.bench.dataplane.sweep(0, &mut |_flow| ()).unwrap();
        assert_eq!((swept.put_back, world.pins("gates")), (1, gates.clone()), "{}", gate.display());
        // And while nobody is there who could.
        world.bench.dataplane = elsewhere();
        std::fs::remove_file(gate).unwrap();
        world.open();
        world.bench.dataplane.replace(&wanted).unwrap();
        assert_eq!(world.pins("gates"), gates, "the pin {} was removed", gate.display());
        world.check_exactly(&wanted, "netfilter");
    }
    // The words of the bindings and the configuration, set to nonsense.
    for map in ["bindings", "config"] {
        world.bench.dataplane.replace(&state(&[1, 2, 3], 2, Deny)).unwrap();
        let handle = world.pinned(map);
        let value = vec![0xffu8; handle.value_size() as usize];
        for key in handle.keys().take(3).collect::<Vec<_>>() {
            // The generation must be able to rise.
            let value = if map == "config" { vec![7; value.len()] } else { value.clone() };
            handle.update(&key, &value, MapFlags::ANY).unwrap();
        }
        world.open();
        world.bench.dataplane.replace(&wanted).unwrap();
        world.check_exactly(&wanted, &format!("{map} was overwritten"));
    }
    println!("damage from outside: {emptied} emptied, {} pins removed", groups.len());
}

type Scenario = fn(&mut World);

const SCENARIOS: [(&str, Scenario); 5] = [
    ("replacing", replacing),
    ("applying", applying),
    ("starting-again", starting_again),
    ("starting-for-the-first-time", starting_for_the_first_time),
    ("damage-from-outside", damage_from_outside),
];

/// One scenario here, or all of them, each in a process of its own: they spend most of their time in the kernel's verifier.
fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let Some(name) = arguments.iter().find_map(|argument| argument.strip_prefix("--scenario=")) {
        let (_, scenario) = SCENARIOS.iter().find(|(known, _)| *known == name).unwrap();
        let mut bench = Bench::new();
        for number in 1..=3 {
            run(&format!("ip link add w{number} type veth peer name p{number}"));
            bench.dataplane.attach(interface(&format!("w{number}"))).unwrap();
        }
        scenario(&mut World { bench, port: 10_000 });
        return;
    }
    // As the harness would: a filter that names something else is not for us.
    let filter = arguments.iter().find(|argument| !argument.starts_with('-'));
    let chosen =
        SCENARIOS.iter().filter(|(name, _)| filter.is_none_or(|filter| name.contains(filter.as_str())));
    let executable = std::env::current_exe().unwrap();
    let running: Vec<_> = chosen
        .map(|(name, _)| {
            let started = Instant::now();
            let child = std::process::Command::new(&executable)
                .arg(format!("--scenario={name}"))
                .stdout(std::process::Stdio::piped())
                .stderr(std::process::Stdio::piped())
                .spawn();
            (name, started, child.unwrap())
        })
        .collect();
    let mut failed = false;
    for (name, started, child) in running {
        let output = child.wait_with_output().unwrap();
        let said =
            [output.stdout, output.stderr].map(|said| String::from_utf8_lossy(&said).into_owned()).concat();
        let how = if output.status.success() { "ok" } else { "FAILED" };
        println!("crash {name} ... {how} ({:.0} s)\n{said}", started.elapsed().as_secs_f64());
        failed |= !output.status.success();
    }
    assert!(!failed, "see above");
}
