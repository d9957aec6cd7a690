//! What policy costs traffic between two workloads of one host, beside what others cost.

use bulkhead_model::host_policy::Attachment;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use bulkhead_dataplane::Dataplane;
use bulkhead_discover::links;
use bulkhead_ebpf::bench::EmptyHooks;
use bulkhead_ebpf::{Capacities, EbpfDataplane};
use bulkhead_nft::{Fence, NftDataplane};

use crate::load::Test;
use crate::netns::{Namespace, feed, host, run};
use crate::report::Line;
use crate::stats::{median, paired_ratio};
use crate::{Effort, fixtures, load, progress};

const CLIENT: Ipv4Addr = Ipv4Addr::new(10, 0, 1, 2);
const SERVER: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
/// Host-side interfaces of the two workloads.
const INTERFACES: [&str; 2] = ["w1", "w2"];
/// Addresses in the sets of nftables and ipset.
const SET_ADDRESSES: u32 = 20_000;
/// How often the agent's part is done: reading what the kernel reports.
const POLL_INTERVAL: Duration = Duration::from_millis(5);
/// How much slower than without any policy is kept as a promise.
const OVERHEAD_MAX: f64 = 1.03;
/// How many times faster than linear rules is kept as a promise.
const SPEEDUP_MIN: f64 = 7.0;

/// What is in force on the way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Variant {
    None,
    EmptyAtInterfaces,
    EmptyEverywhere,
    Ours10,
    OursFenced,
    Ours100k,
    OverNft10,
    OverNft100k,
    NftSet,
    Ipset,
    Iptables(u32),
}

impl Variant {
    const ALL: [Self; 13] = [
        Self::None,
        Self::EmptyAtInterfaces,
        Self::EmptyEverywhere,
        Self::Ours10,
        Self::OursFenced,
        Self::Ours100k,
        Self::OverNft10,
        Self::OverNft100k,
        Self::NftSet,
        Self::Ipset,
        Self::Iptables(100),
        Self::Iptables(1_000),
        Self::LINEAR,
    ];
    /// What linear rules of that number cost is what is promised to be beaten.
    const LINEAR: Self = Self::Iptables(10_000);

    fn name(self) -> String {
        match self {
            Self::None => "no policy".into(),
            Self::EmptyAtInterfaces => "empty programs at the interfaces".into(),
            Self::EmptyEverywhere => "empty programs at the same hooks".into(),
            Self::Ours10 => "bulkhead, 10 rules".into(),
            Self::OursFenced => "bulkhead and its fence, 10 rules".into(),
            Self::Ours100k => "bulkhead, 100 000 rules".into(),
            Self::OverNft10 => "bulkhead over nftables, 10 rules".into(),
            Self::OverNft100k => "bulkhead over nftables, 100 000 rules".into(),
            Self::NftSet => format!("nft set of {SET_ADDRESSES}"),
            Self::Ipset => format!("ipset of {SET_ADDRESSES}"),
            Self::Iptables(rules) => format!("iptables, {rules} rules"),
        }
    }
}

type Samples = BTreeMap<(Test, Variant), Vec<f64>>;

/// Measures all variants in interleaved rounds.
pub(crate) fn measure(effort: Effort) -> anyhow::Result<Vec<Line>> {
    let samples = host()?.exec(move || sample(effort))??;
    Ok(lines(&samples))
}

fn sample(effort: Effort) -> anyhow::Result<Samples> {
    let client = Namespace::workload(INTERFACES[0], 1)?;
    let server = Namespace::workload(INTERFACES[1], 2)?;
    load::serve(&server)?;
    let (nft, ipset) = (nft_rules()?, ipset_entries()?);
    let by_set = iptables_rules(["-m set --match-set bench src"])?;
    let time = Duration::from_millis(effort.pick(400, 200));
    let rounds = effort.pick(11, 3);
    let mut samples = Samples::new();
    for round in 0..rounds {
        progress(&format!("traffic: round {} of {rounds}", round + 1));
        let mut order = Variant::ALL;
        // Whatever drifts in one direction hits all alike.
        if round % 2 == 1 {
            order.reverse();
        }
        for variant in order {
            let (mut ours, mut empty) = (None, None);
            match variant {
                Variant::None => {}
                Variant::EmptyAtInterfaces => empty = Some(EmptyHooks::attach(&interfaces()?, false)?),
                Variant::EmptyEverywhere => empty = Some(EmptyHooks::attach(&interfaces()?, true)?),
                Variant::Ours10 => ours = Some(Ours::over_ebpf(10)?),
                Variant::OursFenced => {
                    ours = Some(Ours::over_ebpf(10)?);
                    let patterns: Vec<String> = vec!["w*".into()];
                    let _ = Fence::raise(&patterns, interfaces()?.into_iter().collect())?;
                }
                Variant::Ours100k => ours = Some(Ours::over_ebpf(100_000)?),
                Variant::OverNft10 => ours = Some(Ours::over_nft(10)?),
                Variant::OverNft100k => ours = Some(Ours::over_nft(100_000)?),
                Variant::NftSet => feed("nft -f -", &nft)?,
                Variant::Ipset => {
                    feed("ipset restore", &ipset)?;
                    feed("iptables-restore", &by_set)?;
                }
                Variant::Iptables(rules) => {
                    let others = (0..rules).map(|number| format!("-s {}/32", fixtures::address(number)));
                    feed("iptables-restore", &iptables_rules(others.chain([String::new()]))?)?;
                }
            }
            for test in Test::ALL {
                let value = client.exec(move || load::measure(test, SERVER, time))??;
                samples.entry((test, variant)).or_default().push(value);
            }
            drop(empty);
            match variant {
                Variant::None | Variant::EmptyAtInterfaces | Variant::EmptyEverywhere => {}
                // Removed whole: programs at netfilter's hooks would cost the others, too, and somebody flushes below.
                Variant::OursFenced => {
                    drop(ours);
                    Fence::remove()?;
                }
                Variant::Ours10 | Variant::Ours100k | Variant::OverNft10 | Variant::OverNft100k => drop(ours),
                // iptables' tables are nftables' too, so that nothing of either stays.
                Variant::NftSet | Variant::Iptables(_) => run("nft flush ruleset")?,
                Variant::Ipset => {
                    run("nft flush ruleset")?;
                    run("ipset destroy bench")?;
                }
            }
        }
    }
    Ok(samples)
}

fn interfaces() -> anyhow::Result<Vec<u32>> {
    Ok(INTERFACES.iter().map(|name| links::interface(name)).collect::<Result<_, _>>()?)
}

/// A dataplane with a policy of some size, and the part of an agent that reads its events.
struct Ours {
    dataplane: Arc<Mutex<Box<dyn Dataplane>>>,
    stop: Arc<AtomicBool>,
    poller: Option<JoinHandle<()>>,
}

impl Ours {
    fn over_ebpf(rules: u32) -> anyhow::Result<Self> {
        let root = PathBuf::from(format!("/sys/fs/bpf/bulkhead-bench-{}", std::process::id()));
        Self::attached(Box::new(EbpfDataplane::open(&root, Capacities::default())?), rules)
    }

    fn over_nft(rules: u32) -> anyhow::Result<Self> {
        Self::attached(Box::new(NftDataplane::open(bulkhead_nft::Capacities::default())?), rules)
    }

    fn attached(mut dataplane: Box<dyn Dataplane>, rules: u32) -> anyhow::Result<Self> {
        let interfaces = interfaces()?;
        let endpoints = [(interfaces[0], CLIENT), (interfaces[1], SERVER)];
        dataplane.replace(&fixtures::one_rule_per_peer(rules, &endpoints, (7001, 7002))?)?;
        for ifindex in interfaces {
            dataplane.attach(Attachment::Interface(ifindex))?;
        }
        let (dataplane, stop) = (Arc::new(Mutex::new(dataplane)), Arc::<AtomicBool>::default());
        let (read, stopped) = (Arc::clone(&dataplane), Arc::clone(&stop));
        let poller = std::thread::Builder::new().name("poller".into()).spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                let mut dataplane = read.lock().unwrap_or_else(PoisonError::into_inner);
                // An event that cannot be read is lost, and counted as such by the kernel.
                let _ = dataplane.poll(&mut |_flow| {});
                drop(dataplane);
                std::thread::sleep(POLL_INTERVAL);
            }
        })?;
        Ok(Self { dataplane, stop, poller: Some(poller) })
    }

    fn with<T>(&self, act: impl FnOnce(&mut dyn Dataplane) -> T) -> T {
        act(self.dataplane.lock().unwrap_or_else(PoisonError::into_inner).as_mut())
    }
}

impl Drop for Ours {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(poller) = self.poller.take() {
            let _panicked = poller.join();
        }
        if let Err(error) = self.with(|dataplane| dataplane.cleanup()) {
            eprintln!("   pins were left behind: {error}");
        }
    }
}

/// Rules that accept what they match, looked at one after the other.
fn iptables_rules<T: AsRef<str>>(matches: impl IntoIterator<Item = T>) -> anyhow::Result<String> {
    let mut text = "*filter\n:FORWARD DROP [0:0]\n".to_owned();
    for matched in matches {
        writeln!(text, "-A FORWARD {} -j ACCEPT", matched.as_ref())?;
    }
    text += "COMMIT\n";
    Ok(text)
}

fn ipset_entries() -> anyhow::Result<String> {
    let mut text = format!("create bench hash:ip maxelem {}\n", 2 * SET_ADDRESSES);
    for address in (0..SET_ADDRESSES - 2).map(fixtures::address).chain([CLIENT, SERVER]) {
        writeln!(text, "add bench {address}")?;
    }
    Ok(text)
}

fn nft_rules() -> anyhow::Result<String> {
    let mut text = "table ip bench {\nset peers {\ntype ipv4_addr\nelements = { ".to_owned();
    for number in 0..SET_ADDRESSES - 2 {
        write!(text, "{}, ", fixtures::address(number))?;
    }
    write!(text, "{CLIENT}, {SERVER} }}\n}}\n")?;
    text +=
        "chain forward {\ntype filter hook forward priority 0; policy drop;\nip saddr @peers accept\n}\n}\n";
    Ok(text)
}

fn lines(samples: &Samples) -> Vec<Line> {
    let values = |test, variant| samples.get(&(test, variant)).map(Vec::as_slice).unwrap_or_default();
    let mut lines = Vec::new();
    for test in Test::ALL {
        let (what, unit) = match test {
            Test::RequestResponse => ("TCP request/response, 1 byte", "µs"),
            Test::Connect => ("TCP connect, request, response, close", "µs"),
            Test::Bulk => ("TCP bulk", "Gbit/s"),
        };
        let both = [
            (Variant::Ours10, Variant::OverNft10, "10"),
            (Variant::Ours100k, Variant::OverNft100k, "100 000"),
        ];
        for (ours, over_nft, rules) in both {
            let mut line = Line::new(format!("{what}: {rules} rules"), unit, median(values(test, ours)));
            let others = [
                over_nft,
                Variant::None,
                Variant::EmptyAtInterfaces,
                Variant::EmptyEverywhere,
                Variant::OursFenced,
                Variant::NftSet,
                Variant::Ipset,
                Variant::Iptables(100),
                Variant::Iptables(1_000),
                Variant::LINEAR,
            ];
            for other in others {
                line = line.beside(&other.name(), median(values(test, other)));
            }
            let ratio = paired_ratio(values(test, ours), values(test, Variant::None));
            let line = line.ratio(ratio);
            lines.push(match test {
                Test::Bulk => line.budget(">= 0.97 of no policy", ratio >= 2.0 - OVERHEAD_MAX),
                Test::RequestResponse | Test::Connect => {
                    line.budget("<= 1.03 of no policy", ratio <= OVERHEAD_MAX)
                }
            });
        }
    }
    let rr = |variant| values(Test::RequestResponse, variant);
    let speedup = paired_ratio(rr(Variant::LINEAR), rr(Variant::Ours100k));
    lines.push(
        Line::new("requests per second, 100 000 rules", "1/s", 1e6 / median(rr(Variant::Ours100k)))
            .beside(&Variant::LINEAR.name(), 1e6 / median(rr(Variant::LINEAR)))
            .ratio(speedup)
            .budget(">= 7 of linear rules", speedup >= SPEEDUP_MIN),
    );
    lines
}
