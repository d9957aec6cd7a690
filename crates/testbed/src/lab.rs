//! The fabric and its hosts.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU16, Ordering};

use anyhow::{Context, Result, ensure};

use crate::namespace::{self, Netns};
use crate::process::kill_ledger;
use crate::workload::Workload;

/// Below this all labs keep their files.
const ROOT: &str = "/run/bulkhead-testbed";
/// First number of a host's workload prefix.
const FIRST_PREFIX: u8 = 100;
/// Most hosts in a lab.
const HOSTS_MAX: usize = 100;

/// A host: a namespace that routes for its workloads.
#[derive(Debug)]
pub struct Host {
    /// Its name in the fleet.
    pub name: String,
    /// Its namespace.
    pub netns: Netns,
    number: u8,
    next: AtomicU16,
}

/// A fleet without software: fabric, hosts, and a directory for files.
#[derive(Debug)]
pub struct Lab {
    /// Where the controller belongs.
    pub fabric: Netns,
    /// The hosts, in the order given.
    pub hosts: Vec<Host>,
    prefix: String,
    directory: PathBuf,
    keep: bool,
}

impl Lab {
    /// Builds a fabric and hosts whose namespaces begin with `prefix`, after removing what is left of an
    /// earlier lab with that prefix.
    ///
    /// # Errors
    /// If not root, or a tool is missing.
    pub fn new(prefix: &str, hosts: &[&str]) -> Result<Self> {
        ensure!(rustix::process::geteuid().is_root(), "a lab of network namespaces needs root");
        ensure!(hosts.len() <= HOSTS_MAX, "at most {HOSTS_MAX} hosts");
        Self::clean(prefix);
        let directory = Path::new(ROOT).join(prefix);
        fs::create_dir_all(&directory).with_context(|| format!("{}", directory.display()))?;
        let fabric = Netns::new(&format!("{prefix}-fabric"))?;
        fabric.ip(&lines(&[
            "link set lo up",
            "link add br0 type bridge",
            "addr add 10.200.0.1/24 dev br0",
            "addr add fd00:200::1/64 dev br0 nodad",
            "link set br0 up",
        ]))?;
        let mut lab = Self { fabric, hosts: Vec::new(), prefix: prefix.into(), directory, keep: false };
        for (number, name) in (0u8..).zip(hosts) {
            let host = lab.new_host(name, number, hosts.len())?;
            lab.hosts.push(host);
        }
        Ok(lab)
    }

    /// Removes whatever a lab with this prefix left: processes, namespaces, pins, files.
    pub fn clean(prefix: &str) {
        let directory = Path::new(ROOT).join(prefix);
        kill_ledger(&directory.join("processes"));
        namespace::delete_all(&format!("{prefix}-"));
        crate::docker::unmount_below(&directory);
        let _ = fs::remove_dir_all(pins(prefix));
        let _ = fs::remove_dir_all(&directory);
    }

    fn new_host(&self, name: &str, number: u8, count: usize) -> Result<Host> {
        let netns = Netns::new(&format!("{}-{name}", self.prefix))?;
        netns.sysctl(&[
            ("net.ipv4.ip_forward", "1"),
            ("net.ipv6.conf.all.forwarding", "1"),
            ("net.ipv6.conf.default.accept_dad", "0"),
        ])?;
        let port = format!("h{number}");
        let fabric = self.fabric.name();
        let mut setup = vec![
            "link set lo up".to_owned(),
            format!("link add uplink type veth peer name {port} netns {fabric}"),
            format!("addr add 10.200.0.{}/24 dev uplink", 10 + number),
            format!("addr add fd00:200::{}/64 dev uplink nodad", 10 + number),
            "link set uplink up".to_owned(),
        ];
        for other in (0u8..).take(count).filter(|other| *other != number) {
            let (prefix, gateway) = (FIRST_PREFIX + other, 10 + other);
            setup.push(format!("route add 10.{prefix}.0.0/16 via 10.200.0.{gateway}"));
            setup.push(format!("route add fd00:{prefix}::/64 via fd00:200::{gateway}"));
        }
        netns.ip(&setup)?;
        self.fabric.ip(&[format!("link set {port} master br0 up")])?;
        Ok(Host { name: name.into(), netns, number, next: AtomicU16::new(1) })
    }

    /// The host of this name.
    ///
    /// # Panics
    /// If there is none: a mistake in the test.
    pub fn host(&self, name: &str) -> &Host {
        match self.hosts.iter().find(|host| host.name == name) {
            Some(host) => host,
            None => panic!("the lab has no host {name}"),
        }
    }

    /// A new workload's namespace on a host, joined and with addresses, with nothing running in it.
    ///
    /// # Errors
    /// If it cannot be built.
    pub fn workload(&self, host: &str, name: &str) -> Result<Workload> {
        let workload = self.unjoined_workload(host, name)?;
        self.join(&workload)?;
        Ok(workload)
    }

    /// As [`Lab::workload`], but without an interface yet: [`Lab::join`] gives it one.
    ///
    /// # Errors
    /// If it cannot be built.
    pub fn unjoined_workload(&self, host: &str, name: &str) -> Result<Workload> {
        Workload::new(&self.prefix, self.host(host), name, None)
    }

    /// Joins a workload to its host.
    ///
    /// # Errors
    /// If it cannot be joined.
    pub fn join(&self, workload: &Workload) -> Result<()> {
        workload.join(self.host(&workload.host))
    }

    /// As [`Lab::workload`], with a host-side interface of this name.
    ///
    /// # Errors
    /// If it cannot be built.
    pub fn workload_with_interface(&self, host: &str, name: &str, interface: &str) -> Result<Workload> {
        let workload = Workload::new(&self.prefix, self.host(host), name, Some(interface))?;
        self.join(&workload)?;
        Ok(workload)
    }

    /// What all names of this lab begin with.
    pub fn prefix(&self) -> &str {
        &self.prefix
    }

    /// Where this lab's files are.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The list of processes to end if this run crashes.
    pub fn ledger(&self) -> PathBuf {
        self.directory.join("processes")
    }

    /// Where the agent of a host pins its tables.
    pub fn pin_directory(&self, host: &str) -> PathBuf {
        pins(&self.prefix).join(host)
    }

    /// Leaves everything behind when dropped; [`Lab::clean`] removes it.
    pub fn keep(&mut self) {
        self.keep = true;
        self.fabric.keep();
        self.hosts.iter_mut().for_each(|host| host.netns.keep());
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if self.keep {
            return;
        }
        kill_ledger(&self.ledger());
        let _ = fs::remove_dir_all(pins(&self.prefix));
        // The logs of a test that fails are what one wants to read.
        if !std::thread::panicking() {
            let _ = fs::remove_dir_all(&self.directory);
        }
    }
}

impl Host {
    /// The next free pair of addresses for a workload.
    pub(crate) fn next_addresses(&self) -> (u16, Ipv4Addr, Ipv6Addr) {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let [high, low] = number.to_be_bytes();
        let v4 = Ipv4Addr::new(10, FIRST_PREFIX + self.number, high, low);
        // The prefix is written in decimal digits, like the IPv4 one.
        let prefix = 0x100 + u16::from(self.number / 10) * 16 + u16::from(self.number % 10);
        let v6 = Ipv6Addr::new(0xfd00, prefix, 0, 0, 0, 0, 0, number);
        (number, v4, v6)
    }

    /// A block of this host's prefix for a bridge of containers: gateway with length.
    pub(crate) fn container_gateway(&self) -> String {
        format!("10.{}.128.1/24", FIRST_PREFIX + self.number)
    }

    /// Its address in the fabric.
    pub fn address(&self) -> IpAddr {
        Ipv4Addr::new(10, 200, 0, 10 + self.number).into()
    }
}

fn pins(prefix: &str) -> PathBuf {
    Path::new("/sys/fs/bpf").join(format!("bulkhead-test-{prefix}"))
}

fn lines(lines: &[&str]) -> Vec<String> {
    lines.iter().map(|line| (*line).to_owned()).collect()
}
