//! Relays that die, and whose controllers do.

use std::path::Path;
use std::time::{Duration, Instant};

use bulkhead_controller::{Config, relay};
use hyper::Method;
use serde_json::json;

use crate::etcd_server::EtcdServer;
use crate::fleet::{Fleet, V1, one_of, policy};
use crate::harness::Site;
use crate::process::Process;

const AGENTS: usize = 60;
/// Where those listen that come back at the same place.
const HERE: [u8; 4] = [127, 0, 77, 1];

async fn write(site: &Site, name: &str, count: usize) {
    for number in 0..count {
        site.apply(&policy(&format!("{name}{number}"))).await;
    }
}

/// A relay of this name for all hosts.
pub(crate) async fn relay_of(
    site: &Site,
    controllers: &[&Site],
    name: &str,
    directory: &Path,
) -> relay::Config {
    let body = json!({ "relay": name, "hosts": ["h*"] }).to_string();
    let (status, made) = site.call(Method::POST, &format!("{V1}/tokens"), body).await;
    assert_eq!(status, 201, "{made}");
    // Not where others connect from: their ports would be taken while nobody listens.
    let free =
        std::net::TcpListener::bind(std::net::SocketAddr::from((HERE, 0))).unwrap().local_addr().unwrap();
    relay::Config {
        name: name.into(),
        upstreams: controllers.iter().map(|site| format!("https://{}", site.agents)).collect(),
        join_token: Some(made["token"].as_str().unwrap().into()),
        listen_agents: free,
        listen_probes: None,
        state_directory: directory.join(name),
        ..relay::Config::default()
    }
}

/// Agents behind relays end up with what agents at a controller do, whoever of relays and controllers is killed on the way.
#[tokio::test(flavor = "multi_thread")]
async fn agents_behind_relays_know_everything_whoever_is_killed() {
    let etcd = [EtcdServer::start()];
    let directory = tempfile::tempdir().unwrap();
    let of_a = Config { listen_agents: (HERE, 0).into(), ..one_of(&etcd, "a") };
    let mut a = Process::start(&of_a);
    let mut b = Process::start(&one_of(&etcd, "b"));
    let config = relay_of(&b.site, &[&a.site, &b.site], "r1", directory.path()).await;
    let mut r1 = Process::relay(&config, &b.site);
    let other = relay_of(&b.site, &[&a.site, &b.site], "r2", directory.path()).await;
    let mut r2 = Process::relay(&other, &b.site);
    // A third each at either relay, and at a controller.
    let fleet = Fleet::start(AGENTS, &[&r1.site, &r2.site, &b.site], b.site.authority());
    fleet.converges(&b.site, &[&r1.site, &r2.site, &b.site]).await;
    fleet.is_registered(&b.site, &["a", "b"]).await;

    // As kill -9 ends a relay, while something is written.
    r1.kill();
    let killed = Instant::now();
    fleet.knows(&[&r2.site, &b.site]);
    write(&b.site, "p", 5).await;
    fleet.converges(&b.site, &[&r2.site, &b.site]).await;
    println!("all {AGENTS} agents know everything {:?} after one of two relays was killed", killed.elapsed());

    // It comes back with its certificate, its token being used up, and agents with what they know.
    let r1 = Process::relay(&config, &a.site);
    fleet.knows(&[&r1.site]);
    r2.kill();
    write(&b.site, "q", 5).await;
    // And the controller that served the others: what is acknowledged is with the other.
    b.kill();
    let killed = Instant::now();
    write(&a.site, "r", 5).await;
    fleet.converges(&a.site, &[&r1.site]).await;
    println!(
        "all {AGENTS} agents know everything {:?} after a controller and a relay were killed",
        killed.elapsed()
    );
    fleet.is_registered(&a.site, &["a"]).await;

    // Without any controller the site goes on with what it knows, and hears what it missed when one is back.
    let sessions = fleet.sessions();
    let was = a.site.agents;
    a.kill();
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(fleet.sessions(), sessions, "nobody at the relay notices");
    let a = Process::start(&Config { listen_agents: was, ..of_a });
    write(&a.site, "s", 5).await;
    fleet.converges(&a.site, &[&r1.site]).await;
    fleet.is_registered(&a.site, &["a"]).await;
    assert_eq!(fleet.sessions(), sessions, "their sessions have outlived it");
}
