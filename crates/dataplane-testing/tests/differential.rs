//! Reference evaluator, compiled tables, what the kernel holds and real packets: the same verdict and rule, in random
//! histories and in those that lie in tests/cases/differential.
//!
//! DIFFERENTIAL_CASES is how many random histories each dataplane gets, DIFFERENTIAL_SECONDS for how long it gets more
//! and more of them instead; DIFFERENTIAL_SEED is the first one's number.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails here")]

use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bulkhead_dataplane::Dataplane;
use bulkhead_dataplane_testing::differential::{Answered, Case, Mismatch, World, random_case, smallest};
use bulkhead_ebpf::EbpfDataplane;
use bulkhead_nft::NftDataplane;

const CASES: u64 = 60;
/// Hosts at once: the kernel lets its writers wait more than it works.
const HOSTS: usize = 3;
/// How long a failing case is made smaller.
const SHRINKING: Duration = Duration::from_secs(120);
/// Mismatches that are shown.
const SHOWN: usize = 10;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/cases/differential")
}

/// A number that Make or a person has set.
fn variable(name: &str) -> Option<u64> {
    let value = std::env::var(name).ok().filter(|value| !value.is_empty())?;
    Some(value.parse().unwrap_or_else(|_| panic!("{name}={value}: expected a number")))
}

/// A pin directory, removed at the end.
struct Pins(PathBuf);

impl Pins {
    fn new() -> Self {
        let this = std::thread::current().id();
        Self(format!("/sys/fs/bpf/bulkhead-differential-{}-{this:?}", std::process::id()).into())
    }
}

impl Drop for Pins {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

type Open = Box<dyn Fn() -> Box<dyn Dataplane>>;

/// How a dataplane is opened, each time for the same host.
trait Kind: Sync {
    fn name(&self) -> &'static str;
    /// For one of several hosts at once.
    fn opener(&self, host: usize) -> Open;
}

struct Ebpf(Pins);

impl Kind for Ebpf {
    fn name(&self) -> &'static str {
        "ebpf"
    }

    fn opener(&self, host: usize) -> Open {
        let path = self.0.0.join(host.to_string());
        let capacities = bulkhead_ebpf::Capacities {
            addresses: 4096,
            prefixes: 4096,
            rows: 16384,
            steps: 65536,
            cells: 16384,
            variants: 4096,
            endpoints: 64,
            endpoint_addrs: 256,
            // A sixteenth of them for one endpoint, each minute.
            conns: 262_144,
            denials: 4096,
            frags: 256,
            events_bytes: 1 << 20,
        };
        Box::new(move || Box::new(EbpfDataplane::open(&path, capacities).unwrap()))
    }
}

struct Nftables;

impl Kind for Nftables {
    fn name(&self) -> &'static str {
        "nftables"
    }

    fn opener(&self, _host: usize) -> Open {
        Box::new(|| Box::new(NftDataplane::open(bulkhead_nft::Capacities::default()).unwrap()))
    }
}

fn listed(mismatches: &[Mismatch]) -> String {
    let shown: Vec<_> = mismatches.iter().take(SHOWN).map(ToString::to_string).collect();
    format!("{} mismatches:\n{}", mismatches.len(), shown.join("\n"))
}

/// Makes a failing case small and keeps it, so that it is tried from now on each time.
fn keep(dataplane: &str, name: &str, case: &Case, world: &mut World) -> String {
    world.hurry();
    let mut fails = |case: &Case| world.run(case).is_ok_and(|answered| !answered.mismatches.is_empty());
    if !fails(case) {
        return format!("{name} fails over {dataplane}, and a second time it does not:\n{}", case.text());
    }
    let shrunk = smallest(case, SHRINKING, &mut fails);
    let mut small = shrunk.case.with_answers().unwrap();
    small.why = format!("{}, found over {dataplane}", small.why);
    let path = folder().join(format!("found-{name}.json"));
    std::fs::create_dir_all(folder()).unwrap();
    std::fs::write(&path, small.text()).unwrap();
    let mismatches = world.run(&small).unwrap().mismatches;
    let (runs, took) = (shrunk.runs, shrunk.took);
    let before = (case.steps.len(), case.changes(), case.flows());
    let after = (small.steps.len(), small.changes(), small.flows());
    format!(
        "{name} over {dataplane}: of {before:?} steps, changes and connections {after:?} are left after {runs} runs \
         in {took:?}, in {}:\n{}{}",
        path.display(),
        small.text(),
        listed(&mismatches)
    )
}

fn random_histories(kind: &dyn Kind) {
    let began = Instant::now();
    let seconds = variable("DIFFERENTIAL_SECONDS").map(Duration::from_secs);
    let cases = variable("DIFFERENTIAL_CASES").unwrap_or(CASES);
    let first = variable("DIFFERENTIAL_SEED").unwrap_or(1);
    let (next, total) = (AtomicU64::new(0), Mutex::new(Answered::default()));
    let found: Mutex<Option<String>> = Mutex::new(None);
    std::thread::scope(|scope| {
        for host in 0..HOSTS {
            let (next, total, found) = (&next, &total, &found);
            scope.spawn(move || {
                let mut world = World::new(kind.opener(host));
                loop {
                    let count = next.fetch_add(1, Ordering::Relaxed);
                    let over = seconds.map_or(count >= cases, |seconds| began.elapsed() >= seconds);
                    if over || found.lock().unwrap().is_some() {
                        next.fetch_sub(1, Ordering::Relaxed);
                        break;
                    }
                    let number = first + count;
                    let case = random_case(number);
                    let answered = world.run(&case).unwrap();
                    if !answered.mismatches.is_empty() {
                        let name = format!("{}-{number}", kind.name());
                        let text = listed(&answered.mismatches);
                        *found.lock().unwrap() = Some(text);
                        let kept = keep(kind.name(), &name, &case, &mut world);
                        found.lock().unwrap().as_mut().unwrap().push_str(&format!("\n{kept}"));
                        break;
                    }
                    total.lock().unwrap().add(&answered);
                }
            });
        }
    });
    if let Some(found) = found.into_inner().unwrap() {
        panic!("{found}");
    }
    let (name, count) = (kind.name(), next.into_inner());
    let Answered { flows, passed, states, .. } = total.into_inner().unwrap();
    let took = began.elapsed();
    println!(
        "{name}: {count} histories, {states} states, {flows} connections, {passed} allowed, in {took:?}"
    );
    assert!(passed > 0 && passed < flows, "nothing is told apart");
}

/// Those that were found once, and those that somebody has thought of.
fn kept_cases(kind: &dyn Kind) {
    let dataplane = kind.name();
    let mut world = World::new(kind.opener(0));
    let mut files: Vec<_> = std::fs::read_dir(folder()).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.retain(|file| file.extension().is_some_and(|extension| extension == "json"));
    files.sort();
    assert!(!files.is_empty(), "no case in {}", folder().display());
    let mut wrong = Vec::new();
    let mut flows = 0;
    for file in &files {
        let name = file.display();
        let case = Case::load(file);
        match world.run(&case) {
            Ok(answered) if answered.mismatches.is_empty() => flows += answered.flows,
            Ok(answered) => wrong.push(format!("{name}: {}", listed(&answered.mismatches))),
            Err(error) => wrong.push(format!("{name}: {error}")),
        }
    }
    println!("{dataplane}: {} cases of files, {flows} connections", files.len());
    assert!(wrong.is_empty(), "over {dataplane}:\n{}", wrong.join("\n"));
}

#[test]
fn random_histories_mean_the_same_to_everybody_over_ebpf() {
    random_histories(&Ebpf(Pins::new()));
}

#[test]
fn random_histories_mean_the_same_to_everybody_over_nftables() {
    random_histories(&Nftables);
}

#[test]
fn kept_cases_mean_the_same_to_everybody_over_ebpf() {
    kept_cases(&Ebpf(Pins::new()));
}

#[test]
fn kept_cases_mean_the_same_to_everybody_over_nftables() {
    kept_cases(&Nftables);
}
