//! A controller that cannot reach its etcd.

use std::time::Instant;

use bulkhead_controller::Config;

use crate::etcd_server::EtcdServer;
use crate::fleet::{CONVERGES, Fleet, V1, one_of, policy};
use crate::harness::{Fixture, Site};
use crate::proxy::{CUT, DEAF, OPEN, Open, Proxy};

/// Waits until a controller is known, or is not, to another.
async fn until_known(at: &Site, name: &str, known: bool) {
    let began = Instant::now();
    loop {
        let controllers = at.get(&format!("{V1}/status")).await["controllers"].clone();
        if controllers.as_array().unwrap().iter().any(|one| one["name"] == name) == known {
            return;
        }
        assert!(began.elapsed() < CONVERGES, "{controllers}");
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
}

async fn cut_off(how: Open) {
    let etcd = EtcdServer::cluster(1);
    let way = Proxy::to(etcd[0].endpoint()).await;
    let a = Fixture::with(one_of(&etcd, "a")).await;
    let mut config: Config = one_of(&etcd, "b");
    config.etcd.endpoints = vec![way.address.to_string()];
    let b = Fixture::with(config).await;
    let fleet = Fleet::start(20, &[&a, &b], a.authority());
    fleet.converges(&a, &[&a, &b]).await;
    fleet.is_registered(&a, &["a", "b"]).await;
    let before = fleet.sessions();
    way.set(how);
    // Its lease ends; its agents stay with it and know what they know. What is written meanwhile they do not.
    until_known(&a, "b", false).await;
    a.apply(&policy("meanwhile")).await;
    assert_eq!(fleet.sessions(), before, "nobody has lost a session");
    way.set(OPEN);
    let healed = Instant::now();
    until_known(&a, "b", true).await;
    fleet.is_registered(&a, &["a", "b"]).await;
    println!("all sessions are registered again {:?} after the way was open", healed.elapsed());
    fleet.converges(&a, &[&a, &b]).await;
    println!("all agents know everything {:?} after", healed.elapsed());
    b.apply(&policy("afterwards")).await;
    fleet.converges(&a, &[&a, &b]).await;
    assert_eq!(fleet.sessions(), before, "nobody has lost a session");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_controller_cut_off_from_etcd_comes_back_with_its_sessions() {
    cut_off(CUT).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_controller_that_does_not_hear_etcd_comes_back_with_its_sessions() {
    cut_off(DEAF).await;
}

/// Longer than lease and grace: the other controller has removed what the agents there had published. Each publishes again.
#[tokio::test(flavor = "multi_thread")]
async fn workloads_that_expired_meanwhile_are_published_again() {
    let etcd = EtcdServer::cluster(1);
    let way = Proxy::to(etcd[0].endpoint()).await;
    let short = |name| Config { lease_ms: 2000, grace_ms: 0, ..one_of(&etcd, name) };
    let a = Fixture::with(short("a")).await;
    let mut config = short("b");
    config.etcd.endpoints = vec![way.address.to_string()];
    let b = Fixture::with(config).await;
    let fleet = Fleet::start(10, &[&a, &b], a.authority());
    fleet.converges(&a, &[&a, &b]).await;
    fleet.is_registered(&a, &["a", "b"]).await;
    way.set(CUT);
    let began = Instant::now();
    while a.get(&format!("{V1}/workloads")).await["items"].as_array().unwrap().len() != 5 {
        assert!(began.elapsed() < CONVERGES, "they must expire");
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    println!("5 hosts were taken for lost {:?} after the way was cut", began.elapsed());
    way.set(OPEN);
    fleet.converges(&a, &[&a, &b]).await;
    fleet.is_registered(&a, &["a", "b"]).await;
}

/// The agent has gone elsewhere while its controller, which has not noticed, could not reach etcd.
#[tokio::test(flavor = "multi_thread")]
async fn a_session_that_was_overtaken_meanwhile_is_ended_when_its_controller_is_back() {
    let etcd = EtcdServer::cluster(1);
    let way = Proxy::to(etcd[0].endpoint()).await;
    let a = Fixture::with(one_of(&etcd, "a")).await;
    let mut config = one_of(&etcd, "b");
    config.etcd.endpoints = vec![way.address.to_string()];
    let b = Fixture::with(config).await;
    let mut old = b.agent("h1").await;
    until_served(&a, "b").await;
    way.set(CUT);
    until_known(&a, "b", false).await;
    let mut new = a.agent("h1").await;
    until_served(&a, "a").await;
    way.set(OPEN);
    let status = old.receive().await.unwrap_err();
    assert!(status.message().contains("newer session"), "{status}");
    until_known(&a, "b", true).await;
    until_served(&b, "a").await;
    new.hears_nothing().await;
}

async fn until_served(at: &Site, controller: &str) {
    let began = Instant::now();
    loop {
        let controllers = at.get(&format!("{V1}/status")).await["controllers"].clone();
        if controllers.as_array().unwrap().iter().any(|one| one["name"] == controller && one["agents"] == 1) {
            return;
        }
        assert!(began.elapsed() < CONVERGES, "{controllers}");
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
}
