//! How long a changed plan takes into the kernel, beside the tools that others use for it.

use std::fmt::Write;
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use bulkhead_dataplane::Dataplane;
use bulkhead_discover::links;
use bulkhead_ebpf::{Capacities, EbpfDataplane};
use bulkhead_model::Prefix;
use bulkhead_model::host_policy::{ClassId, HostDelta};
use bulkhead_nft::NftDataplane;

use crate::netns::{feed, host, run};
use crate::report::Line;
use crate::stats::{median, paired_ratio};
use crate::{Effort, fixtures, progress};

/// Addresses that change at once.
const SIZES: [u32; 3] = [1, 100, 10_000];
/// Longer than a grace period of the kernel.
const GRACE_TIME: Duration = Duration::from_millis(40);
/// First of the addresses that come and go; below are those that stay.
const FIRST: u32 = 1_000_000;

/// Measures each size in interleaved rounds.
pub(crate) fn measure(effort: Effort) -> anyhow::Result<Vec<Line>> {
    host()?.exec(move || in_namespace(effort))?
}

fn in_namespace(effort: Effort) -> anyhow::Result<Vec<Line>> {
    run("ip link add w type veth peer name wp")?;
    run("nft add table ip bench")?;
    run("nft add set ip bench peers { type ipv4_addr ; }")?;
    run("ipset create peers hash:ip maxelem 100000")?;
    let root = PathBuf::from(format!("/sys/fs/bpf/bulkhead-bench-{}-plan", std::process::id()));
    let endpoint = (links::interface("w")?, Ipv4Addr::new(10, 0, 1, 2));
    let mut dataplane = EbpfDataplane::open(&root, Capacities::default())?;
    let policy = fixtures::one_rule_per_peer(1_000, &[endpoint], (80, 80))?;
    let mut nft = NftDataplane::open(bulkhead_nft::Capacities::default())?;
    nft.replace(&policy)?;
    let measured = dataplane.replace(&policy).map_err(Into::into).and_then(|_| {
        let mut both = Both { ebpf: &mut dataplane, nft: &mut nft };
        SIZES.iter().map(|size| one_size(&mut both, *size, effort)).collect::<anyhow::Result<Vec<_>>>()
    });
    dataplane.cleanup()?;
    nft.cleanup()?;
    // Sets of ipset belong to the namespace and go with it; the module stays.
    measured
}

/// The dataplanes under measurement. Neither is in charge of an interface.
struct Both<'a> {
    ebpf: &'a mut EbpfDataplane,
    nft: &'a mut NftDataplane,
}

fn one_size(both: &mut Both<'_>, size: u32, effort: Effort) -> anyhow::Result<Line> {
    let rounds = effort.pick(21, 5);
    progress(&format!("plan to kernel: {size} addresses"));
    let addresses = || (0..size).map(|number| fixtures::address(FIRST + number));
    let class = |number: u32| Some(ClassId(number % 1_000 + 1));
    let prefix = |ip| Prefix::host(IpAddr::V4(ip));
    let put = HostDelta {
        addresses: addresses().zip(0..).map(|(ip, number)| (prefix(ip), class(number))).collect(),
        ..HostDelta::default()
    };
    let take =
        HostDelta { addresses: addresses().map(|ip| (prefix(ip), None)).collect(), ..HostDelta::default() };
    let mut nft = "add element ip bench peers { ".to_owned();
    let mut ipset = String::new();
    for ip in addresses() {
        write!(nft, "{ip}, ")?;
        writeln!(ipset, "add peers {ip}")?;
    }
    nft += "}\n";
    let (mut ours, mut over_nft, mut nfts, mut ipsets) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for _ in 0..rounds {
        ours.push(micros(|| Ok(both.ebpf.apply(&put).map(drop)?))?);
        over_nft.push(micros(|| Ok(both.nft.apply(&put).map(drop)?))?);
        nfts.push(micros(|| feed("nft -f -", &nft))?);
        ipsets.push(micros(|| feed("ipset restore", &ipset))?);
        both.ebpf.apply(&take)?;
        both.nft.apply(&take)?;
        run("nft flush set ip bench peers")?;
        run("ipset flush peers")?;
        // After a removal nothing is written for one grace period, which passes in the background.
        std::thread::sleep(GRACE_TIME);
    }
    Ok(Line::new(format!("plan to kernel: {size} new addresses"), "µs", median(&ours))
        .beside("bulkhead over nftables", median(&over_nft))
        .beside("nft -f", median(&nfts))
        .beside("ipset restore", median(&ipsets))
        .ratio(paired_ratio(&ours, &nfts)))
}

fn micros(act: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<f64> {
    let started = Instant::now();
    act()?;
    Ok(started.elapsed().as_secs_f64() * 1e6)
}
