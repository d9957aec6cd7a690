//! The public policy cases, where they lie beside the checkout, through real sockets over both dataplanes.
//!
//! BULKHEAD_CASES is their folder; BULKHEAD_CONFORMANCE is how many states are tried over each dataplane (`all`: every
//! state, and every connection in it).
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails here")]

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Instant;

use bulkhead_dataplane::Dataplane;
use bulkhead_dataplane_testing::conformance::{Cluster, State, Tally, groups};
use bulkhead_dataplane_testing::random::Random;
use bulkhead_ebpf::EbpfDataplane;
use bulkhead_nft::NftDataplane;

/// States that a short run tries, and connections in each.
const STATES: usize = 150;
const FLOWS: usize = 200;
/// Which groups those are.
const SEED: u64 = 0x0b01_4ead;
/// Clusters side by side: most of the time goes into waiting for silence.
const CLUSTERS: usize = 4;

fn cases() -> PathBuf {
    let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/conformance");
    std::env::var_os("BULKHEAD_CASES").map_or(beside, PathBuf::from)
}

/// Groups to try, and connections in each of their states.
fn sample(folder: &Path) -> (VecDeque<Vec<State>>, usize) {
    let mut all = groups(folder);
    let states = match std::env::var("BULKHEAD_CONFORMANCE") {
        Ok(all_of_it) if all_of_it == "all" => return (all.into(), usize::MAX),
        Ok(number) => number.parse().expect("BULKHEAD_CONFORMANCE: expected a number or all"),
        Err(_) => STATES,
    };
    let mut random = Random(SEED);
    let mut chosen = VecDeque::new();
    let mut count = 0;
    while count < states && !all.is_empty() {
        let group = all.swap_remove(random.below(all.len()));
        count += group.len();
        chosen.push_back(group);
    }
    (chosen, FLOWS)
}

fn conform(name: &str, open: impl Fn(usize) -> Box<dyn Dataplane> + Sync) {
    let folder = cases();
    if !folder.is_dir() {
        println!("no public cases in {}: nothing to run", folder.display());
        return;
    }
    let began = Instant::now();
    let (groups, flows) = sample(&folder);
    let groups = Mutex::new(groups);
    let total = Mutex::new(Tally::default());
    std::thread::scope(|scope| {
        for number in 0..CLUSTERS {
            let (groups, total, open) = (&groups, &total, &open);
            scope.spawn(move || {
                let mut cluster = Cluster::new(|| open(number));
                loop {
                    let Some(group) = groups.lock().unwrap().pop_front() else { break };
                    let tally = cluster.run(&group, flows);
                    total.lock().unwrap().add(tally);
                }
            });
        }
    });
    let Tally { states, flows, controls, skipped, wrong } = total.into_inner().unwrap();
    println!("{name}: {states} states, {flows} connections, {controls} controls in {:?}", began.elapsed());
    for (reason, count) in skipped {
        println!("{name}: {count} left out: {reason}");
    }
    assert!(states > 0 && flows > 0, "no case at all in {}", folder.display());
    let shown = wrong.iter().take(20).map(String::as_str).collect::<Vec<_>>().join("\n");
    assert!(wrong.is_empty(), "{} connections went wrong:\n{shown}", wrong.len());
}

/// A pin directory, removed at the end.
struct Pins(PathBuf);

impl Drop for Pins {
    fn drop(&mut self) {
        for directory in std::fs::read_dir(&self.0).into_iter().flatten().flatten() {
            let _ = std::fs::remove_dir_all(directory.path());
        }
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[test]
fn pods_reach_each_other_as_the_public_suites_say_over_ebpf() {
    let pins = Pins(format!("/sys/fs/bpf/bulkhead-conformance-{}", std::process::id()).into());
    conform("ebpf", |number| {
        let capacities = bulkhead_ebpf::Capacities { conns: 65_536, ..bulkhead_ebpf::Capacities::default() };
        Box::new(EbpfDataplane::open(&pins.0.join(number.to_string()), capacities).unwrap())
    });
}

#[test]
fn pods_reach_each_other_as_the_public_suites_say_over_nftables() {
    conform("nftables", |_| Box::new(NftDataplane::open(bulkhead_nft::Capacities::default()).unwrap()));
}
