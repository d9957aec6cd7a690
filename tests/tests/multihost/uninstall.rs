//! After `agent --cleanup` a host is what it was before the first agent.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use bulkhead_testbed::{Bulkhead, Host, Lab, Outcome, Protocol, eventually, find_binary};
use libbpf_rs::libbpf_sys;
use libbpf_rs::query::{LinkInfoIter, ProgInfoIter, ProgInfoQueryOptions};
use libbpf_rs::{MapCore, MapHandle};

use crate::common::{CLIENT_TO_SERVER, member, outcome, wait_outcome};

/// What an agent could leave on a host, besides its files.
#[derive(Debug, PartialEq)]
struct Traces {
    nftables: String,
    settings: BTreeMap<PathBuf, String>,
}

fn traces(host: &Host) -> Traces {
    let read = || -> Result<Traces> {
        let output = std::process::Command::new("nft").args(["list", "ruleset"]).output()?;
        ensure!(output.status.success(), "{output:?}");
        let mut settings = BTreeMap::new();
        read_settings(Path::new("/proc/sys/net"), &mut settings);
        Ok(Traces { nftables: String::from_utf8(output.stdout)?, settings })
    };
    host.netns.run(read).unwrap()
}

/// Settings of this namespace; of interfaces and neighbours only those that stay, and no counts.
fn read_settings(directory: &Path, found: &mut BTreeMap<PathBuf, String>) {
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        let path = entry.path();
        let name = entry.file_name().to_string_lossy().into_owned();
        if path.is_dir() {
            if !name.starts_with("wl") {
                read_settings(&path, found);
            }
        } else if !name.ends_with("_count")
            && name != "stable_secret"
            && let Ok(text) = std::fs::read_to_string(&path)
        {
            found.insert(path, text);
        }
    }
}

/// Numbers of the kernel's objects: programs over the maps that are pinned below a directory, their maps and links.
#[derive(Debug, Default, PartialEq)]
struct Objects {
    maps: BTreeSet<u32>,
    programs: BTreeSet<u32>,
    links: BTreeSet<u32>,
}

impl Objects {
    /// Those of one pin directory: others' agents run on this machine, too.
    fn of(pins: &Path) -> Self {
        let mut pinned = BTreeSet::new();
        for path in files(pins) {
            pinned.extend(
                MapHandle::from_pinned_path(path).and_then(|map| map.info()).map(|info| info.info.id),
            );
        }
        let mut objects = Self::default();
        for program in ProgInfoIter::with_query_opts(ProgInfoQueryOptions::default().include_map_ids(true)) {
            if program.map_ids.iter().any(|map| pinned.contains(map)) {
                objects.programs.insert(program.id);
                objects.maps.extend(program.map_ids);
            }
        }
        let links = LinkInfoIter::default().filter(|link| objects.programs.contains(&link.prog_id));
        objects.links = links.map(|link| link.id).collect();
        objects.maps.extend(pinned);
        objects
    }

    /// Those that are still there. Without opening a map: the kernel empties an array of programs when the last
    /// descriptor of it is closed, and one that somebody opens and closes while that goes on is never freed.
    fn left(&self) -> Self {
        let programs = ProgInfoIter::default().map(|program| program.id);
        let links = LinkInfoIter::default().map(|link| link.id);
        Self {
            maps: self.maps.iter().copied().filter(|id| is_map(*id)).collect(),
            programs: programs.filter(|id| self.programs.contains(id)).collect(),
            links: links.filter(|id| self.links.contains(id)).collect(),
        }
    }
}

fn is_map(id: u32) -> bool {
    let mut next = 0;
    #[expect(unsafe_code, reason = "libbpf call")]
    // SAFETY: a number that outlives the call.
    let found = unsafe { libbpf_sys::bpf_map_get_next_id(id - 1, &raw mut next) == 0 };
    found && next == id
}

fn files(directory: &Path) -> BTreeSet<PathBuf> {
    let mut found = BTreeSet::new();
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            found.extend(files(&path));
        } else {
            found.insert(path);
        }
    }
    found
}

#[test]
fn an_uninstalled_agent_leaves_nothing_but_its_state_and_its_log() {
    let lab = Lab::new("bt-uninstall", &["host-1"]).unwrap();
    let mut bulkhead = Bulkhead::without_processes(lab, &find_binary().unwrap(), &BTreeMap::new());
    bulkhead.start_controller().unwrap();
    let before = traces(bulkhead.host("host-1"));
    let files_before = files(bulkhead.lab.directory());
    bulkhead.start_agents().unwrap();
    bulkhead.wait_connected().unwrap();
    let server = member(&bulkhead, "host-1", "server", &[("role", "server")], &[5000]);
    let client = member(&bulkhead, "host-1", "client", &[("role", "client")], &[5000]);
    let stranger = member(&bulkhead, "host-1", "stranger", &[("role", "stranger")], &[5000]);
    bulkhead.apply_text("server.yaml", CLIENT_TO_SERVER).unwrap();
    let (server, client, stranger) = (&server.workload, &client.workload, &stranger.workload);
    wait_outcome(client, server, Protocol::Tcp(5000), Outcome::Reached);
    wait_outcome(stranger, server, Protocol::Tcp(5000), Outcome::Silent);
    let pins = bulkhead.lab.pin_directory("host-1");
    let objects = Objects::of(&pins);
    let status = bulkhead.agent("host-1").status().unwrap();
    if status["dataplane"] == "ebpf" {
        let Objects { maps, programs, links } = &objects;
        // Two at each of three interfaces, six at netfilter's hooks.
        assert!(maps.len() > 10 && programs.len() >= 8 && links.len() >= 12, "{objects:?}");
    } else {
        assert_ne!(traces(bulkhead.host("host-1")), before, "it has left something, so far");
    }

    assert!(bulkhead.stop_agent("host-1"));
    bulkhead.clean_kernel("host-1").unwrap();
    assert_eq!(
        outcome(stranger, server, Protocol::Tcp(5000)),
        Outcome::Reached,
        "nothing is judged any more"
    );
    assert!(!pins.exists(), "{}", pins.display());
    assert_eq!(traces(bulkhead.host("host-1")), before);
    eventually("the kernel has freed everything", || {
        let left = objects.left();
        ensure!(left == Objects::default(), "{left:?}");
        Ok(())
    })
    .unwrap();
    let state = bulkhead.lab.directory().join("host-1.state");
    let others: Vec<_> = files(bulkhead.lab.directory())
        .into_iter()
        .filter(|path| !files_before.contains(path) && !path.starts_with(&state))
        // What the test itself has written.
        .filter(|path| !["host-1.log", "server.yaml"].iter().any(|name| path.ends_with(name)))
        .filter(|path| !path.starts_with(bulkhead.lab.directory().join("controller")))
        .collect();
    assert_eq!(others, Vec::<PathBuf>::new());
    // Once more, where there is nothing.
    bulkhead.clean_kernel("host-1").unwrap();
    assert!(!pins.exists());
}
