//! A cluster of pods, each in a namespace of its own, on a host that routes. One more namespace stands for everything
//! outside: other nodes, and addresses that are nobody's.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use bulkhead_dataplane::Dataplane;
use bulkhead_engine::{Endpoint, Fleet, Flow};
use bulkhead_model::host_policy::Attachment;
use bulkhead_model::ports::{Protocol, USUAL_SOURCE_PORT};

use super::cases::{Expectation, State};
use super::exchange::{Calling, Fate, Probe, Servers, Service, call, listen, outcomes};
use crate::connections::forget_connections;
use crate::machine::Machine;
use crate::namespace::{Namespace, ifindex, ip, run};
use crate::random::Random;

/// Pods at once, and the place of what is outside.
const PODS: usize = 12;
const OUTSIDE: usize = PODS;
/// Connections at once: each is a descriptor or two.
const BATCH: usize = 240;
/// Where every pod sends what is not for itself.
const GATEWAYS: [&str; 2] = ["169.254.1.1", "fe80::1"];

/// What was tried, and what came of it.
#[derive(Debug, Default)]
pub struct Tally {
    /// States that were reached.
    pub states: usize,
    /// Connections that were judged.
    pub flows: usize,
    /// Connections tried before there were policies, so that silence means something.
    pub controls: usize,
    /// What was left out, by the reason.
    pub skipped: BTreeMap<&'static str, usize>,
    /// What was wrong.
    pub wrong: Vec<String>,
}

impl Tally {
    /// Takes in another's.
    pub fn add(&mut self, other: Self) {
        let Self { states, flows, controls, skipped, wrong } = other;
        self.states += states;
        self.flows += flows;
        self.controls += controls;
        for (reason, count) in skipped {
            *self.skipped.entry(reason).or_default() += count;
        }
        self.wrong.extend(wrong);
    }
}

/// Namespaces and a dataplane between them, in the namespace of the thread that made it.
pub struct Cluster {
    dataplane: Box<dyn Dataplane>,
    stations: Vec<Namespace>,
    /// Who has which address, in the present group.
    holders: BTreeMap<IpAddr, usize>,
    /// Addresses of more than one pod.
    shared: BTreeSet<IpAddr>,
    servers: Option<Servers>,
    random: Random,
}

impl std::fmt::Debug for Cluster {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cluster").field("holders", &self.holders).finish_non_exhaustive()
    }
}

fn station(number: usize, host: bool) -> String {
    format!("02:00:00:00:0{}:{:02x}", u8::from(host), number + 1)
}

/// One connection that a state speaks of, between addresses that stand somewhere.
struct Asked<'a> {
    expectation: &'a Expectation,
    probe: Probe,
}

impl Cluster {
    /// Moves this thread into a namespace that routes between pods' namespaces, under the dataplane that is opened there.
    pub fn new(open: impl FnOnce() -> Box<dyn Dataplane>) -> Self {
        crate::namespace::enter_new_namespace();
        run("ip link set lo up");
        for setting in ["ipv4.ip_forward", "ipv6.conf.all.forwarding"] {
            run(&format!("sysctl -qw net.{setting}=1"));
        }
        let stations: Vec<_> = (0..=OUTSIDE).map(pod).collect();
        let mut dataplane = open();
        for number in 0..PODS {
            dataplane.attach(Attachment::Interface(ifindex(&format!("v{number}")))).unwrap();
        }
        Self {
            dataplane,
            stations,
            holders: BTreeMap::new(),
            shared: BTreeSet::new(),
            servers: None,
            random: Random(7),
        }
    }

    /// Brings a cluster through the states of a group, trying at most so many connections in each.
    ///
    /// # Panics
    /// If the dataplane refuses a state.
    pub fn run(&mut self, group: &[State], flows_max: usize) -> Tally {
        let mut tally = Tally::default();
        // As a service that was just started: nothing is left of the cluster before.
        self.servers = None;
        forget_connections();
        self.settle_in(group);
        let mut machine = Machine::new(Fleet::new());
        for (number, pod) in pods(group).into_iter().enumerate() {
            machine.place(&format!("Pod/{pod}"), ifindex(&format!("v{number}")));
        }
        machine.set(group[0].objects(false));
        machine.settle();
        self.dataplane.replace(&machine.policy()).unwrap();
        self.controls(group, flows_max, &mut tally);
        for state in group {
            machine.set(state.objects(true));
            for delta in machine.settle() {
                self.dataplane.apply(&delta).unwrap();
            }
            tally.states += 1;
            let random = self.random.0;
            let asked = self.questions(state, flows_max, &mut tally.skipped);
            // The same as in the controls.
            self.random = Random(random);
            tally.flows += asked.len();
            for (asked, fate) in self.ask(asked) {
                let right = match fate {
                    Fate::Answered => asked.probe.expected,
                    Fate::Silent => !asked.probe.expected,
                    Fate::Refused(_) => false,
                };
                if !right {
                    tally.wrong.push(complaint(state, &asked, &fate, &machine));
                }
            }
            // Reports are not looked at here, but must not pile up.
            self.dataplane.poll(&mut |_flow| ()).unwrap();
        }
        tally
    }

    /// Every connection that will be tried must be answered while there are no policies.
    fn controls(&mut self, group: &[State], flows_max: usize, tally: &mut Tally) {
        let mut seen = BTreeSet::new();
        for state in group {
            // A pod that is not there in the first state has no tables yet.
            let there = |asked: &Asked<'_>| {
                let has = |end: &str| end.starts_with("ip:") || group[0].pods.iter().any(|p| p.path() == end);
                has(&asked.expectation.from) && has(&asked.expectation.to)
            };
            let random = self.random.0;
            let mut asked = self.questions(state, flows_max, &mut BTreeMap::new());
            self.random = Random(random);
            asked.retain(|asked| {
                let Probe { from, to, protocol, .. } = asked.probe;
                let silent = !asked.probe.expected && there(asked);
                silent && seen.insert((from, to, protocol))
            });
            for asked in &mut asked {
                asked.probe.expected = true;
            }
            tally.controls += asked.len();
            for (asked, fate) in self.ask(asked) {
                let Probe { from, to, protocol, .. } = asked.probe;
                if fate != Fate::Answered {
                    let id = &state.id;
                    tally.wrong.push(format!("{id}: without policies {from} {protocol} {to}: {fate:?}"));
                }
            }
        }
        forget_connections();
    }

    /// Gives everybody the group's addresses and servers.
    fn settle_in(&mut self, group: &[State]) {
        for address in std::mem::take(&mut self.holders).into_keys() {
            ip(&[format!("route del {address}")]);
        }
        self.shared.clear();
        let names = pods(group);
        for state in group {
            for pod in &state.pods {
                let number = names.iter().position(|name| *name == pod.path());
                let number = number.filter(|_| !pod.host_network).unwrap_or(OUTSIDE);
                let before = self.holders.insert(pod.ip, number);
                if before.is_some_and(|before| before != number) {
                    self.shared.insert(pod.ip);
                }
            }
        }
        let ends = group.iter().flat_map(|state| &state.probes).flat_map(|probe| [&probe.from, &probe.to]);
        for address in ends.filter_map(|end| end.strip_prefix("ip:")) {
            self.holders.entry(address.parse().unwrap()).or_insert(OUTSIDE);
        }
        let services = services(group);
        let mut listening = Vec::new();
        let mut routes = Vec::new();
        for number in 0..=OUTSIDE {
            let held = self.holders.iter().filter(|(_, holder)| **holder == number);
            let own: Vec<IpAddr> = held.map(|(address, _)| *address).collect();
            for address in &own {
                let other = station(number, false);
                routes.push(format!("route replace {address} dev v{number}"));
                routes.push(format!("neigh replace {address} lladdr {other} dev v{number} nud permanent"));
            }
            let every = services.iter().flat_map(|(protocol, port)| {
                own.iter().map(|address| (*protocol, SocketAddr::new(*address, *port)))
            });
            let every: Vec<Service> = every.collect();
            listening.extend(self.stations[number].exec(move || {
                run("ip addr flush dev eth0");
                let add = |address: &IpAddr| {
                    let quick = if address.is_ipv6() { "nodad" } else { "" };
                    format!("addr add {address} dev eth0 {quick}")
                };
                let mut commands: Vec<_> = own.iter().map(add).collect();
                let (v4, v6): (Vec<&IpAddr>, Vec<&IpAddr>) = own.iter().partition(|own| own.is_ipv4());
                if !v4.is_empty() {
                    commands.push(format!("route replace {} dev eth0 scope link", GATEWAYS[0]));
                    commands.push(format!("route replace default via {}", GATEWAYS[0]));
                }
                if !v6.is_empty() {
                    commands.push(format!("route replace default via {} dev eth0", GATEWAYS[1]));
                }
                for gateway in GATEWAYS {
                    let host = station(number, true);
                    commands.push(format!("neigh replace {gateway} lladdr {host} dev eth0 nud permanent"));
                }
                ip(&commands);
                listen(&every)
            }));
        }
        ip(&routes);
        self.servers = Some(Servers::start(listening));
    }

    fn questions<'a>(
        &mut self,
        state: &'a State,
        flows_max: usize,
        skipped: &mut BTreeMap<&'static str, usize>,
    ) -> Vec<Asked<'a>> {
        let mut skip = |reason| *skipped.entry(reason).or_default() += 1;
        let mut asked = Vec::new();
        let end = |end: &str| match end.strip_prefix("ip:") {
            Some(address) => address.parse().unwrap(),
            None => state.pods.iter().find(|pod| pod.path() == end).unwrap().ip,
        };
        for expectation in &state.probes {
            if expectation.loopback {
                skip("a pod calls itself: no packet leaves it");
                continue;
            }
            if expectation.expect == "undefined" {
                skip("the suite leaves it open");
                continue;
            }
            let (from, to) = (end(&expectation.from), end(&expectation.to));
            if self.shared.contains(&from) || self.shared.contains(&to) {
                skip("two pods have the address");
                continue;
            }
            if self.holders[&from] == OUTSIDE && self.holders[&to] == OUTSIDE {
                skip("both ends are outside");
                continue;
            }
            let to = SocketAddr::new(to, expectation.port);
            let expected = expectation.expect == "allow";
            let protocol = protocol(&expectation.proto);
            asked.push(Asked { expectation, probe: Probe { from, to, protocol, expected } });
        }
        while asked.len() > flows_max {
            let one = self.random.below(asked.len());
            asked.swap_remove(one);
        }
        asked
    }

    fn ask<'a>(&self, mut asked: Vec<Asked<'a>>) -> Vec<(Asked<'a>, Fate)> {
        let mut answers = Vec::new();
        while !asked.is_empty() {
            let mut batch = asked.split_off(asked.len().saturating_sub(BATCH));
            batch.sort_by_key(|asked| self.holders[&asked.probe.from]);
            let mut calls: Vec<Calling> = Vec::new();
            for (number, station) in self.stations.iter().enumerate() {
                let from_here = batch.iter().filter(|asked| self.holders[&asked.probe.from] == number);
                let probes: Vec<Probe> = from_here.map(|asked| asked.probe.clone()).collect();
                if !probes.is_empty() {
                    calls.extend(station.exec(move || call(probes)));
                }
            }
            let fates = outcomes(calls).into_iter().map(|(_, fate)| fate);
            answers.extend(batch.into_iter().zip(fates));
        }
        answers
    }
}

/// A namespace with one interface, known to the host by station address, as are all who may live in it.
fn pod(number: usize) -> Namespace {
    let namespace = Namespace::new();
    let (host, other) = (station(number, true), station(number, false));
    run(&format!("ip link add v{number} address {host} type veth peer name p{number} address {other}"));
    run(&format!("ip link set p{number} netns {} name eth0", namespace.tid));
    run(&format!("ip link set v{number} up"));
    namespace.exec(|| {
        run("ip link set lo up");
        run("ip link set eth0 up");
    });
    namespace
}

/// The pods of a group that have a network of their own.
fn pods(group: &[State]) -> Vec<String> {
    let all = group.iter().flat_map(|state| &state.pods).filter(|pod| !pod.host_network);
    let names: BTreeSet<String> = all.map(super::cases::Pod::path).collect();
    assert!(names.len() <= PODS, "{} pods", names.len());
    names.into_iter().collect()
}

fn services(group: &[State]) -> BTreeSet<(Protocol, u16)> {
    let probes = group.iter().flat_map(|state| &state.probes);
    probes.map(|probe| (protocol(&probe.proto), probe.port)).collect()
}

fn protocol(name: &str) -> Protocol {
    let found = Protocol::NAMES.iter().find(|(known, _)| known.eq_ignore_ascii_case(name));
    found.unwrap_or_else(|| panic!("{name}")).1
}

/// What is wrong, and who says what.
fn complaint(state: &State, asked: &Asked<'_>, fate: &Fate, machine: &Machine) -> String {
    let Expectation { from, to, port, proto, expect, .. } = asked.expectation;
    let end = |end: &str, address| Endpoint {
        workload: (!end.starts_with("ip:")).then(|| format!("Pod/{end}").into()),
        address,
    };
    let Probe { from: source, to: destination, protocol, .. } = &asked.probe;
    let flow = Flow {
        source: end(from, *source),
        destination: end(to, destination.ip()),
        key: protocol.key(*port),
        source_port: USUAL_SOURCE_PORT,
    };
    let reference = machine.fleet().decide_by_reference(&flow).verdict;
    let tables = machine.fleet().decide_by_tables(&flow).verdict;
    let id = &state.id;
    format!(
        "{id}: {from} -> {to} {port}/{proto}: expected {expect}, got {fate:?} (reference {reference:?}, tables {tables:?})"
    )
}
