//! Parts that die.

use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use bulkhead_controller::{Config, start};
use hyper::StatusCode;
use serde_json::json;

use crate::etcd_server::EtcdServer;
use crate::fleet::{Fleet, V1, one_of, policy};
use crate::harness::{Fixture, Site};
use crate::process::Process;

/// Writes policies `NAME0`, `NAME1`, … at one controller.
async fn write(site: &Site, name: &str, count: usize) {
    for number in 0..count {
        let text = policy(&format!("{name}{number}"));
        let (status, answer) = site.try_apply("apply", &[("p.yaml", &text)]).await;
        assert_eq!(status, StatusCode::OK, "{answer}");
    }
}

pub(crate) async fn has_all(site: &Site, name: &str, count: usize) {
    let list = site.get(&format!("{V1}/policies")).await;
    let names: Vec<_> = list["items"]
        .as_array()
        .unwrap()
        .iter()
        .map(|one| one["metadata"]["name"].as_str().unwrap())
        .collect();
    for number in 0..count {
        let wanted = format!("{name}{number}");
        assert!(names.contains(&wanted.as_str()), "{wanted} was acknowledged and is gone");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_controller_killed_under_writes_loses_nothing_that_it_acknowledged() {
    let etcd = EtcdServer::cluster(3);
    let config = Config { controller_lease_ms: 5000, ..one_of(&etcd, "a") };
    let mut a = Process::start(&config);
    let b = Fixture::with(one_of(&etcd, "b")).await;
    let fleet = Fleet::start(20, &[&a.site, &b], b.authority());
    fleet.converges(&b, &[&a.site, &b]).await;
    let acknowledged = Arc::new(AtomicUsize::new(0));
    let writer = a.write_until_it_dies("p", &acknowledged);
    while acknowledged.load(Relaxed) < 20 {
        assert!(!writer.is_finished(), "it must write until it is killed");
        tokio::task::yield_now().await;
    }
    // Of the one under way the outcome is not known, and is the same for all.
    a.kill();
    writer.await.unwrap();
    let acknowledged = acknowledged.load(Relaxed);
    let killed = Instant::now();
    // While its lease lasts it is there, and does not answer.
    let status = b.get(&format!("{V1}/status")).await;
    let silent = &status["controllers"][0];
    assert_eq!((&silent["name"], &silent["answered"]), (&json!("a"), &json!(false)), "{status}");
    assert!(silent["problem"].is_string(), "{status}");
    let flows = b.get(&format!("{V1}/flows")).await;
    assert_eq!(flows["unanswered"][0]["controller"], "a", "{flows}");
    has_all(&b, "p", acknowledged).await;
    write(&b, "q", 5).await;
    fleet.knows(&[&b]);
    fleet.converges(&b, &[&b]).await;
    println!("all 20 agents know everything {:?} after the controller was killed", killed.elapsed());
    fleet.is_registered(&b, &["b"]).await;
    println!("its sessions are gone or others' {:?} after", killed.elapsed());
    // It comes back under its name at once, and agents may go there.
    let a = Process::start(&config);
    fleet.knows(&[&a.site, &b]);
    has_all(&a.site, "q", 5).await;
    fleet.converges(&a.site, &[&a.site, &b]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn three_hundred_agents_come_back_at_once_when_a_controller_is_killed() {
    let etcd = EtcdServer::cluster(3);
    let mut a = Process::start(&one_of(&etcd, "a"));
    let b = Process::start(&one_of(&etcd, "b"));
    write(&b.site, "p", 10).await;
    let began = Instant::now();
    let fleet = Fleet::start(300, &[&a.site, &b.site], b.site.authority());
    fleet.converges(&b.site, &[&a.site, &b.site]).await;
    fleet.is_registered(&b.site, &["a", "b"]).await;
    println!("300 agents know everything {:?} after they were started", began.elapsed());
    a.kill();
    let killed = Instant::now();
    fleet.knows(&[&b.site]);
    fleet.converges(&b.site, &[&b.site]).await;
    println!("150 of 300 agents have gone elsewhere and know everything after {:?}", killed.elapsed());
    fleet.is_registered(&b.site, &["b"]).await;
    println!("no session is left to the dead one after {:?}", killed.elapsed());
    let metrics = b.site.get("/metrics").await;
    let of = |name: &str| {
        let line =
            metrics.as_str().unwrap().lines().find(|line| line.starts_with(&format!("bulkhead_{name} ")));
        line.unwrap().rsplit(' ').next().unwrap().parse::<u64>().unwrap()
    };
    assert_eq!(of("hosts_expired_total"), 0);
    println!("it registered its sessions in {} transactions", of("session_writes_total"));
    assert!(of("session_writes_total") < 150, "they are written together: {}", of("session_writes_total"));
}

#[tokio::test(flavor = "multi_thread")]
async fn etcd_loses_each_of_its_members_in_turn() {
    let mut etcd = EtcdServer::cluster(3);
    let a = Fixture::with(one_of(&etcd, "a")).await;
    let b = Fixture::with(one_of(&etcd, "b")).await;
    let fleet = Fleet::start(20, &[&a, &b], b.authority());
    fleet.converges(&b, &[&a, &b]).await;
    // One of them is the leader.
    for (number, member) in etcd.iter_mut().enumerate() {
        member.kill();
        let (at_a, at_b) = (format!("a{number}x"), format!("b{number}x"));
        let began = Instant::now();
        tokio::join!(write(&a, &at_a, 3), write(&b, &at_b, 3));
        println!("writes at both controllers took {:?} without member {number}", began.elapsed());
        member.restart();
        fleet.converges(&a, &[&a, &b]).await;
        has_all(&b, &at_a, 3).await;
    }
    fleet.is_registered(&a, &["a", "b"]).await;
}

/// For longer than a controller's lease nothing can be read or written; agents hear nothing of it, and no host is lost.
#[tokio::test(flavor = "multi_thread")]
async fn etcd_loses_most_of_its_members_for_a_while() {
    let mut etcd = EtcdServer::cluster(3);
    let short = |name| Config { lease_ms: 2000, grace_ms: 1000, ..one_of(&etcd, name) };
    let (a, b) = (Fixture::with(short("a")).await, Fixture::with(short("b")).await);
    let fleet = Fleet::start(20, &[&a, &b], b.authority());
    fleet.converges(&b, &[&a, &b]).await;
    fleet.is_registered(&b, &["a", "b"]).await;
    let before = fleet.sessions();
    etcd[1].kill();
    etcd[2].kill();
    let outage = Duration::from_secs(4);
    tokio::time::sleep(outage).await;
    etcd[1].restart();
    let back = Instant::now();
    write(&a, "afterwards", 1).await;
    println!("the first write was done {:?} after etcd was back", back.elapsed());
    etcd[2].restart();
    fleet.converges(&b, &[&a, &b]).await;
    fleet.is_registered(&b, &["a", "b"]).await;
    assert_eq!(fleet.sessions(), before, "nobody has lost a session");
    for site in [&a, &b] {
        let metrics = site.get("/metrics").await;
        assert!(metrics.as_str().unwrap().contains("bulkhead_hosts_expired_total 0"), "{metrics}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_controller_that_stops_sends_its_agents_elsewhere_first() {
    let etcd = EtcdServer::cluster(1);
    let a = Fixture::with(one_of(&etcd, "a")).await;
    let b = Fixture::with(one_of(&etcd, "b")).await;
    let fleet = Fleet::start(100, &[&a, &b], b.authority());
    fleet.converges(&b, &[&a, &b]).await;
    fleet.is_registered(&b, &["a", "b"]).await;
    let before = fleet.sessions();
    let began = Instant::now();
    let Fixture { controller, .. } = a;
    controller.shutdown().await.unwrap();
    println!("a controller with 50 agents stopped within {:?}", began.elapsed());
    fleet.converges(&b, &[&b]).await;
    fleet.is_registered(&b, &["b"]).await;
    assert_eq!(fleet.sessions() - before, 50, "each has gone once");
    // And another of its name begins at once.
    let began = Instant::now();
    let again = start(one_of(&etcd, "a")).await.unwrap();
    assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
    again.shutdown().await.unwrap();
}
