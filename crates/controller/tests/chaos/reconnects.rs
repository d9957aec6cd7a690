//! A whole fleet that comes back at once. `make chaos` has 5000 agents, `make test` fewer: they and the controller share a machine
//! and are not optimised there.

use std::time::{Duration, Instant};

use bulkhead_controller::{Config, StoreKind};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::fleet::{Fleet, policy};
use crate::harness::config;
use crate::process::Process;

/// How many agents.
const AGENTS: &str = "BULKHEAD_CHAOS_AGENTS";
const AGENTS_DEFAULT: usize = 1500;
/// Longest that they may take: far more than they need, since nobody knows what else the machine does.
const PATIENCE: Duration = Duration::from_secs(120);

#[tokio::test(flavor = "multi_thread")]
async fn a_fleet_reconnects_at_once_when_its_controller_is_killed_and_started_again() {
    let agents = std::env::var(AGENTS).map_or(AGENTS_DEFAULT, |text| text.parse().unwrap());
    // A connection takes a file at either end.
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let config =
        Config { store: StoreKind::Embedded, data_directory: directory.path().to_owned(), ..config() };
    let mut controller = Process::start(&config);
    for number in 0..10 {
        controller.site.apply(&policy(&format!("p{number}"))).await;
    }
    let began = Instant::now();
    let fleet = Fleet::start(agents, &[&controller.site], controller.site.authority());
    let keys = began.elapsed();
    fleet.converges_within(PATIENCE, &controller.site, &[&controller.site]).await;
    println!("{agents} agents know everything {:?} after they were started", began.elapsed() - keys);
    controller.kill();
    let killed = Instant::now();
    let controller = Process::start(&config);
    println!("the controller serves again {:?} after it was killed", killed.elapsed());
    fleet.knows(&[&controller.site]);
    controller.site.apply(&policy("afterwards")).await;
    fleet.converges_within(PATIENCE, &controller.site, &[&controller.site]).await;
    println!("{agents} agents know everything {:?} after the controller was killed", killed.elapsed());
    let metrics = controller.site.get("/metrics").await;
    let of = |name: &str| {
        let mut lines = metrics.as_str().unwrap().lines();
        lines.find(|line| line.starts_with(&format!("bulkhead_{name} "))).unwrap().to_owned()
    };
    println!("{}\n{}", of("agent_sessions_deferred_total"), of("session_writes_total"));
    assert_eq!(of("hosts_expired_total"), "bulkhead_hosts_expired_total 0");
}
