//! What the first packet of a connection costs, and a packet of one that is there, from 10 to 100 000 rules: beside
//! linear rules, a set of ipset's and one of nftables'. UDP from one workload to another through their host.
//!
//! Client, forwarding and delivery run on one processor, so the time of a send is the time of the whole way. The others
//! let what belongs to a known connection pass by their first rule, as everybody writes them.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::net::{Ipv4Addr, UdpSocket};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use bulkhead_dataplane::Dataplane;
use bulkhead_discover::links;
use bulkhead_ebpf::{Capacities, EbpfDataplane};
use bulkhead_model::host_policy::Attachment;
use bulkhead_model::ports::Protocol;
use bulkhead_nft::NftDataplane;

use crate::netns::{Namespace, feed, host, run};
use crate::report::Line;
use crate::stats::median;
use crate::{Effort, fixtures, load, progress};

const CLIENT: Ipv4Addr = Ipv4Addr::new(10, 0, 1, 2);
const SERVER: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
const INTERFACES: [&str; 2] = ["w1", "w2"];
/// Where somebody answers; what comes to other ports is dropped on arrival.
const PORT: u16 = 7003;
/// How long packets of a known connection are sent.
const KNOWN: Duration = Duration::from_millis(150);
/// Packets that are timed together.
const BATCH: u16 = 256;
/// What the lines begin with that a chart is made of.
pub(crate) const KINDS: [&str; 2] =
    ["UDP, first packet of a connection", "UDP, packet of a known connection"];

/// What is in force on the way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Variant {
    None,
    Ours,
    OverNft,
    NftSet,
    Ipset,
    Iptables,
}

impl Variant {
    const ALL: [Self; 6] = [Self::None, Self::Ours, Self::OverNft, Self::NftSet, Self::Ipset, Self::Iptables];

    fn name(self) -> &'static str {
        match self {
            Self::None => "no policy",
            Self::Ours => "bulkhead",
            Self::OverNft => "bulkhead over nftables",
            Self::NftSet => "nftables set",
            Self::Ipset => "ipset",
            Self::Iptables => "iptables",
        }
    }
}

/// Nanoseconds of the first packet and of one of a known connection.
type Samples = BTreeMap<(u32, Variant), [Vec<f64>; 2]>;

/// Measures all sizes and variants.
pub(crate) fn measure(effort: Effort) -> anyhow::Result<Vec<Line>> {
    let sizes = effort.pick(&[10, 100, 1_000, 10_000, 100_000][..], &[10, 10_000]);
    let samples = host()?.exec(move || sample(effort, sizes))??;
    let mut lines = Vec::new();
    for (kind, name) in KINDS.iter().enumerate() {
        for size in sizes {
            let value = |variant| median(&samples[&(*size, variant)][kind]);
            let mut line = Line::new(format!("{name}: {size} rules"), "ns", value(Variant::Ours));
            for other in Variant::ALL.into_iter().filter(|other| *other != Variant::Ours) {
                line = line.beside(other.name(), value(other));
            }
            lines.push(line);
        }
    }
    let size = *sizes.last().context("no size")?;
    let rate = |variant| 1e9 / median(&samples[&(size, variant)][1]);
    let mut line = Line::new(format!("UDP packets per second: {size} rules"), "1/s", rate(Variant::Ours));
    for other in Variant::ALL.into_iter().filter(|other| *other != Variant::Ours) {
        line = line.beside(other.name(), rate(other));
    }
    lines.push(line);
    Ok(lines)
}

fn sample(effort: Effort, sizes: &[u32]) -> anyhow::Result<Samples> {
    let client = Namespace::workload(INTERFACES[0], 1)?;
    let server = Namespace::workload(INTERFACES[1], 2)?;
    server.exec(|| -> anyhow::Result<()> {
        run(&format!("iptables -t raw -A PREROUTING -p udp ! --dport {PORT} -j DROP"))?;
        let socket = UdpSocket::bind((SERVER, PORT))?;
        std::thread::Builder::new().name("answer".into()).spawn(move || {
            let mut buffer = [0; 8];
            while let Ok((len, from)) = socket.recv_from(&mut buffer) {
                // Only what asks is answered: the rest is load, and it should find nobody to wake.
                if len > 1 {
                    let _ = socket.send_to(b"!", from);
                    std::thread::sleep(KNOWN + Duration::from_millis(50));
                }
            }
        })?;
        Ok(())
    })??;
    let root = PathBuf::from(format!("/sys/fs/bpf/bulkhead-bench-{}-scale", std::process::id()));
    let interfaces = INTERFACES.map(links::interface);
    let [first, second] = interfaces;
    let interfaces = [first?, second?];
    let endpoints = [(interfaces[0], CLIENT), (interfaces[1], SERVER)];
    // Room for all that is begun and never answered.
    let capacities = Capacities { conns: 1 << 20, ..Capacities::default() };
    let mut samples = Samples::new();
    for size in sizes {
        progress(&format!("scale: {size} rules"));
        let policy = fixtures::rules_per_peer(*size, &endpoints, Protocol::UDP, (1, 65_534))?;
        for round in 0..effort.pick(5, 1) {
            let mut order = Variant::ALL;
            if round % 2 == 1 {
                order.reverse();
            }
            for variant in order {
                // Not there at all while others are measured: its programs at netfilter's hooks would judge.
                let mut dataplane: Option<Box<dyn Dataplane>> = match variant {
                    Variant::Ours => Some(Box::new(EbpfDataplane::open(&root, capacities)?)),
                    Variant::OverNft => {
                        Some(Box::new(NftDataplane::open(bulkhead_nft::Capacities::default())?))
                    }
                    _ => None,
                };
                if let Some(ours) = &mut dataplane {
                    ours.replace(&policy)?;
                    for ifindex in interfaces {
                        ours.attach(Attachment::Interface(ifindex))?;
                    }
                }
                match variant {
                    Variant::None | Variant::Ours | Variant::OverNft => {}
                    Variant::NftSet => feed("nft -f -", &nft(*size)?)?,
                    Variant::Ipset => {
                        feed("ipset restore", &ipset(*size)?)?;
                        feed(
                            "iptables-restore",
                            &iptables(&["-m set --match-set bench src -j ACCEPT".into()])?,
                        )?;
                    }
                    Variant::Iptables => {
                        let rules: Vec<String> =
                            addresses(*size).map(|address| format!("-s {address}/32 -j ACCEPT")).collect();
                        feed("iptables-restore", &iptables(&rules)?)?;
                    }
                }
                let batches = effort.pick(12, 8);
                let entry = samples.entry((*size, variant)).or_default();
                entry[0].push(first_packets(&client, &mut dataplane, batches)?);
                entry[1].push(client.exec(|| known(KNOWN))??);
                match variant {
                    Variant::None => {}
                    Variant::Ours | Variant::OverNft => {
                        dataplane.iter_mut().try_for_each(|ours| ours.cleanup())?;
                    }
                    Variant::NftSet | Variant::Iptables => run("nft flush ruleset")?,
                    Variant::Ipset => {
                        run("nft flush ruleset")?;
                        run("ipset destroy bench")?;
                    }
                }
            }
        }
    }
    Ok(samples)
}

/// Median over batches of packets that each begin a connection, in nanoseconds for one.
fn first_packets(
    client: &Namespace,
    dataplane: &mut Option<Box<dyn Dataplane>>,
    batches: u16,
) -> anyhow::Result<f64> {
    let mut times = Vec::new();
    for batch in 0..batches {
        let time = client.exec(move || -> anyhow::Result<f64> {
            load::pin(load::CLIENT_CPU);
            // A port of its own, and with it connections that nobody has seen.
            let socket = UdpSocket::bind((CLIENT, 0))?;
            let base = 10_000 + batch * BATCH;
            let begun = Instant::now();
            for number in 0..BATCH {
                socket.send_to(b"?", (SERVER, base + number))?;
            }
            Ok(begun.elapsed().as_secs_f64() * 1e9 / f64::from(BATCH))
        })??;
        times.push(time);
        // As an agent does: a full ring would make the next ones cheaper.
        if let Some(dataplane) = dataplane {
            dataplane.poll(&mut |_flow| {})?;
        }
    }
    Ok(median(&times))
}

fn known(time: Duration) -> anyhow::Result<f64> {
    load::pin(load::CLIENT_CPU);
    let socket = UdpSocket::bind((CLIENT, 0))?;
    socket.connect((SERVER, PORT))?;
    socket.set_read_timeout(Some(2 * KNOWN))?;
    // Whoever answers may still sleep, and what came before this be in the way.
    let asked = (0..20).any(|_| socket.send(b"??").is_ok() && socket.recv(&mut [0; 8]).is_ok());
    ensure!(asked, "nobody answers");
    let (started, mut times) = (Instant::now(), Vec::new());
    while started.elapsed() < time {
        let begun = Instant::now();
        for _ in 0..BATCH {
            socket.send(b"?")?;
        }
        times.push(begun.elapsed().as_secs_f64() * 1e9 / f64::from(BATCH));
    }
    Ok(median(&times))
}

/// As many as there are rules, the one that counts last.
fn addresses(size: u32) -> impl Iterator<Item = Ipv4Addr> {
    (0..size - 1).map(fixtures::address).chain([CLIENT])
}

fn iptables(rules: &[String]) -> anyhow::Result<String> {
    let mut text = "*filter\n:FORWARD DROP [0:0]\n".to_owned();
    text += "-A FORWARD -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT\n";
    for rule in rules {
        writeln!(text, "-A FORWARD {rule}")?;
    }
    text += "COMMIT\n";
    Ok(text)
}

fn ipset(size: u32) -> anyhow::Result<String> {
    let mut text = format!("create bench hash:ip maxelem {}\n", size.max(65_536) * 2);
    for address in addresses(size) {
        writeln!(text, "add bench {address}")?;
    }
    Ok(text)
}

fn nft(size: u32) -> anyhow::Result<String> {
    let elements: Vec<String> = addresses(size).map(|address| address.to_string()).collect();
    Ok(format!(
        "table ip bench {{\nset peers {{\ntype ipv4_addr\nelements = {{ {} }}\n}}\nchain forward {{\n\
         type filter hook forward priority 0; policy drop;\nct state established,related accept\n\
         ip saddr @peers accept\n}}\n}}\n",
        elements.join(", ")
    ))
}
