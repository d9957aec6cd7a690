//! Several controllers over one etcd.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use bulkhead_controller::{Config, start};
use bulkhead_identity::Key;
use hyper::{Method, StatusCode};
use serde_json::{Value, json};

use crate::etcd_server::EtcdServer;
use crate::flows::{now_ms, record, report};
use crate::guard::{HERE, SHUT, THERE};
use crate::harness::{Agent, Fixture, Lines, PATIENCE, POLICY, etcd_config};

const V1: &str = "/apis/bulkhead.dev/v1";

/// The configuration of one of several controllers, with the authority that they share.
pub(crate) fn one_of(etcd: &EtcdServer, name: &str) -> Config {
    let shared: PathBuf = etcd.directory().join("identity");
    Config {
        name: name.into(),
        data_directory: etcd.directory().join(name),
        identity_directory: Some(shared),
        controller_lease_ms: 2000,
        ..etcd_config(etcd)
    }
}

async fn two(etcd: &EtcdServer) -> (Fixture, Fixture) {
    (Fixture::with(one_of(etcd, "a")).await, Fixture::with(one_of(etcd, "b")).await)
}

/// Waits until an answer is as it should be.
async fn until(fixture: &Fixture, path: &str, good: impl Fn(&Value) -> bool) -> Value {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let answer = fixture.get(path).await;
        if good(&answer) {
            return answer;
        }
        assert!(Instant::now() < deadline, "{path}: {answer}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Waits until a controller's status says who serves a host.
async fn served_by(fixture: &Fixture, host: &str, controller: &str) {
    until(fixture, &format!("{V1}/status"), |status| {
        let registered = |one: &Value| one["name"] == controller && one["agents"].as_u64() > Some(0);
        let is_there = |agent: &Value| {
            agent["host"] == host && agent["connected"] == true && agent["controller"] == controller
        };
        status["controllers"].as_array().unwrap().iter().any(registered)
            && status["agents"].as_array().unwrap().iter().any(is_there)
    })
    .await;
}

async fn publish(agent: &mut Agent, name: &str, host: &str, address: &str) {
    agent.publish(true, &[(name, host, json!({ "role": "web" }), address)], &[]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_newer_session_wins_at_whichever_controller_it_is() {
    let etcd = EtcdServer::start();
    let (a, b) = two(&etcd).await;
    let mut first = a.agent("h1").await;
    publish(&mut first, "web.h1", "h1", "10.0.0.1").await;
    served_by(&b, "h1", "a").await;
    let mut second = b.agent("h1").await;
    let status = first.receive().await.unwrap_err();
    assert!(status.message().contains("newer session, with controller \"b\""), "{status}");
    served_by(&a, "h1", "b").await;
    // And back; what the first controller removes is its own key only.
    let mut third = a.agent("h1").await;
    let status = second.receive().await.unwrap_err();
    assert!(status.message().contains("newer session, with controller \"a\""), "{status}");
    served_by(&b, "h1", "a").await;
    publish(&mut third, "web.h1", "h1", "10.0.0.1").await;
    drop(third);
    until(&b, &format!("{V1}/status"), |status| status["controllers"][0]["agents"] == 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_controllers_of_one_name_are_refused_and_a_killed_one_takes_its_own_back() {
    let etcd = EtcdServer::start();
    let a = Fixture::with(one_of(&etcd, "a")).await;
    let other = Config { data_directory: etcd.directory().join("elsewhere"), ..one_of(&etcd, "a") };
    let error = start(other).await.unwrap_err().to_string();
    assert!(error.contains("a controller named \"a\" is registered already"), "{error}");
    assert!(error.contains(&a.controller.api.to_string()), "{error}");
    a.controller.shutdown().await.unwrap();
    let began = Instant::now();
    Fixture::with(one_of(&etcd, "a")).await;
    assert!(
        began.elapsed() < Duration::from_secs(2),
        "a name that was given back is free: {:?}",
        began.elapsed()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_written_at_two_controllers_at_once_is_validated_one_after_the_other() {
    let etcd = EtcdServer::start();
    let (a, b) = two(&etcd).await;
    let tier = "apiVersion: bulkhead.dev/v1\nkind: Tier\nmetadata: {name: t}\nspec: {order: 5}\n";
    let policy = "apiVersion: bulkhead.dev/v1\nkind: Policy\nmetadata: {name: p}\n\
                  spec: {tier: t, appliesTo: all(), ingress: [{action: Allow}]}\n";
    let sources = [("p.yaml", policy)];
    for _ in 0..10 {
        a.apply(tier).await;
        until(&b, &format!("{V1}/tiers"), |list| {
            list["items"].as_array().unwrap().iter().any(|tier| tier["metadata"]["name"] == "t")
        })
        .await;
        // Either the policy comes first, and the tier stays, or the tier goes, and the policy is refused.
        let (deleted, (applied, answer)) = tokio::join!(b.delete("tiers/t"), a.try_apply("apply", &sources));
        match (deleted, applied) {
            (StatusCode::FORBIDDEN, StatusCode::OK) => {
                assert_eq!(b.delete("policies/p").await, StatusCode::OK)
            }
            (StatusCode::OK, StatusCode::UNPROCESSABLE_ENTITY) => {}
            other => panic!("{other:?}: {answer}"),
        }
    }
    // Writers of different objects get through, all of them.
    let named = |name: &str| POLICY.replace("name: db", &format!("name: {name}"));
    let write = async |fixture: &Fixture, names: [String; 10]| {
        for name in names {
            fixture.apply(&named(&name)).await;
        }
    };
    let names = |of: &str| std::array::from_fn(|number| format!("{of}{number}"));
    tokio::join!(write(&a, names("a")), write(&b, names("b")));
    for fixture in [&a, &b] {
        until(fixture, &format!("{V1}/policies"), |list| list["items"].as_array().unwrap().len() == 20).await;
        let history = fixture.get(&format!("{V1}/history?limit=100")).await;
        let revisions: Vec<_> =
            history["items"].as_array().unwrap().iter().map(|one| &one["revision"]).collect();
        assert!(revisions.windows(2).all(|two| two[0].as_u64() > two[1].as_u64()), "{history}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_is_undone_once_by_whichever_controller_is_left() {
    let etcd = EtcdServer::start();
    let (a, b) = two(&etcd).await;
    let c = Fixture::with(one_of(&etcd, "c")).await;
    let waiting = async |fixture: &Fixture, name: &str, within: &str| {
        let text = POLICY.replace("name: db", &format!("name: {name}"));
        let path = format!("{V1}/apply?confirmWithin={within}");
        let body = json!({ "sources": [{ "name": "x.yaml", "text": text }] }).to_string();
        let (status, answer) = fixture.call(Method::POST, &path, body).await;
        assert_eq!(status, StatusCode::OK, "{answer}");
        answer["confirmation"]["id"].as_str().unwrap().to_owned()
    };
    // One that others confirm, and one that others undo.
    let kept = waiting(&a, "kept", "60s").await;
    let confirmations = format!("{V1}/confirmations");
    until(&b, &confirmations, |list| list["items"].as_array().unwrap().iter().any(|one| one["id"] == *kept))
        .await;
    let confirm = format!("{confirmations}/{kept}/confirm");
    let roll_back = format!("{confirmations}/{kept}/rollback");
    let both = tokio::join!(
        b.call(Method::POST, &confirm, String::new()),
        a.call(Method::POST, &roll_back, String::new())
    );
    let won = [both.0.0, both.1.0].iter().filter(|status| **status == StatusCode::OK).count();
    assert_eq!(won, 1, "{both:?}");
    // One whose controller dies; the others see the deadline through, and one of them undoes it.
    let undone = waiting(&a, "undone", "2s").await;
    a.controller.shutdown().await.unwrap();
    let ended = |list: &Value| {
        let mut items = list["items"].as_array().unwrap().iter();
        items.any(|one| one["id"] == *undone && one["standing"] == "rolledBack")
    };
    for fixture in [&b, &c] {
        until(fixture, &confirmations, ended).await;
        assert_eq!(
            fixture.call(Method::GET, &format!("{V1}/policies/undone"), String::new()).await.0,
            StatusCode::NOT_FOUND
        );
    }
    let mut roll_backs = 0;
    for fixture in [&b, &c] {
        let metrics = fixture.get("/metrics").await;
        let line =
            metrics.as_str().unwrap().lines().find(|line| line.starts_with("bulkhead_roll_backs_total "));
        roll_backs += line.unwrap().split_once(' ').unwrap().1.parse::<u32>().unwrap();
    }
    assert_eq!(roll_backs, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_and_revocations_are_known_everywhere() {
    let etcd = EtcdServer::start();
    let (a, b) = two(&etcd).await;
    let mut first = b.agent("h1").await;
    let body = json!({ "holder": "agent/h1", "reason": "lost" }).to_string();
    let (status, answer) = a.call(Method::POST, &format!("{V1}/revocations"), body).await;
    assert!(status.is_success(), "{answer}");
    assert!(first.receive().await.unwrap_err().message().contains("revoked"));
    // The last use of a token is given away once, at whichever of them.
    let (token, _) = a.token(json!({})).await;
    let tokens =
        until(&b, &format!("{V1}/tokens"), |list| list["items"].as_array().unwrap().len() == 1).await;
    assert_eq!(tokens["items"][0]["id"], json!(token.id));
    let (x, y) = (Key::generate().unwrap(), Key::generate().unwrap());
    let both = tokio::join!(a.join(&token, "x", &x), b.join(&token, "y", &y));
    assert_eq!([both.0.is_ok(), both.1.is_ok()].iter().filter(|joined| **joined).count(), 1, "{both:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn status_and_flows_are_those_of_all_controllers() {
    let etcd = EtcdServer::start();
    let (a, b) = two(&etcd).await;
    let _first = a.agent("h1").await;
    let _second = b.agent("h2").await;
    for fixture in [&a, &b] {
        served_by(fixture, "h1", "a").await;
        served_by(fixture, "h2", "b").await;
    }
    let local = a.get(&format!("{V1}/status?local=true")).await;
    assert_eq!((local["agents"].as_array().unwrap().len(), local.get("controllers")), (1, None));
    let mut lines = Lines::of(a.send(Method::GET, &format!("{V1}/flows?follow=true"), String::new()).await);
    let now = now_ms();
    report(&a, &[record(now, "10.0.0.1", "10.0.0.2", "allow", "one")]).await;
    report(&b, &[record(now + 1, "10.0.0.1", "10.0.0.2", "allow", "two")]).await;
    let from = [lines.next().await, lines.next().await];
    let mut from: Vec<_> = from.iter().map(|flow| flow["controller"].as_str().unwrap()).collect();
    from.sort_unstable();
    assert_eq!(from, ["a", "b"]);
    let flows = b.get(&format!("{V1}/flows")).await;
    let of: Vec<_> = flows["items"].as_array().unwrap().iter().map(|flow| &flow["controller"]).collect();
    assert_eq!(of, ["b", "a"], "the newest first: {flows}");
    assert_eq!(b.get(&format!("{V1}/flows?local=true")).await["items"].as_array().unwrap().len(), 1);
    assert_eq!(flows.get("unanswered"), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_hosts_workloads_go_once_and_come_back_with_it() {
    let etcd = EtcdServer::start();
    // Long enough for a slow machine to speak in.
    let short = |name| Config { lease_ms: 1500, grace_ms: 500, ..one_of(&etcd, name) };
    let (a, b) = (Fixture::with(short("a")).await, Fixture::with(short("b")).await);
    let mut agent = a.agent("h1").await;
    publish(&mut agent, "web.h1", "h1", "10.0.0.1").await;
    let count = |count: usize| move |list: &Value| list["items"].as_array().unwrap().len() == count;
    until(&b, &format!("{V1}/workloads"), count(1)).await;
    drop(agent);
    let left = Instant::now();
    until(&b, &format!("{V1}/workloads"), count(0)).await;
    assert!(left.elapsed() >= Duration::from_millis(2000), "{:?}", left.elapsed());
    let mut expired = 0;
    for fixture in [&a, &b] {
        until(fixture, &format!("{V1}/workloads"), count(0)).await;
        expired += counter(fixture, "hosts_expired_total").await;
    }
    // Both may have looked at the same moment; what was removed was removed once.
    assert!((1..=2).contains(&expired), "{expired}");
    let mut agent = b.agent("h1").await;
    publish(&mut agent, "web.h1", "h1", "10.0.0.1").await;
    until(&a, &format!("{V1}/workloads"), count(1)).await;
    // Meanwhile it speaks more often than its lease asks for, however slow the machine.
    let served = served_by(&a, "h1", "b");
    tokio::pin!(served);
    loop {
        tokio::select! {
            () = &mut served => break,
            () = tokio::time::sleep(Duration::from_millis(50)) => {
                publish(&mut agent, "web.h1", "h1", "10.0.0.1").await;
            }
        }
    }
}

/// The value of a counter.
async fn counter(fixture: &Fixture, name: &str) -> u64 {
    let metrics = fixture.get("/metrics").await;
    let wanted = format!("bulkhead_{name} ");
    let line = metrics.as_str().unwrap().lines().find_map(|line| line.strip_prefix(&wanted));
    line.unwrap().parse().unwrap()
}

/// Its sessions last longer together than lease and grace, and none of them alone does.
#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_goes_from_one_controller_to_another_is_never_taken_for_lost() {
    let etcd = EtcdServer::start();
    let short = |name| Config { lease_ms: 500, grace_ms: 0, ..one_of(&etcd, name) };
    let (a, b) = (Fixture::with(short("a")).await, Fixture::with(short("b")).await);
    let began = Instant::now();
    let mut turn = 0;
    while began.elapsed() < Duration::from_millis(2500) {
        let at = if turn % 2 == 0 { &a } else { &b };
        let mut agent = at.agent("h1").await;
        publish(&mut agent, "web.h1", "h1", "10.0.0.1").await;
        // It stays for less than a lease, and leaves without a word.
        tokio::time::sleep(Duration::from_millis(200)).await;
        let list = at.get(&format!("{V1}/workloads")).await;
        assert_eq!(list["items"].as_array().unwrap().len(), 1, "after {turn} moves");
        turn += 1;
    }
    assert_eq!(counter(&a, "hosts_expired_total").await + counter(&b, "hosts_expired_total").await, 0);
}

/// A workload that moves is registered by its new host before its old one lets go. Whoever reads it, at either controller,
/// sees the one, then perhaps both, then the other; never none, and both no longer than between the two transactions.
#[tokio::test(flavor = "multi_thread")]
async fn an_address_that_moves_between_hosts_always_has_an_owner() {
    let etcd = EtcdServer::start();
    let (a, b) = two(&etcd).await;
    let (mut old, mut new) = (a.agent("h1").await, b.agent("h2").await);
    publish(&mut old, "web.h1", "h1", "10.0.0.1").await;
    let (mut at_a, mut at_b) = (a.agent("h3").await, b.agent("h4").await);
    for reader in [&mut at_a, &mut at_b] {
        until(&b, &format!("{V1}/workloads"), |list| !list["items"].as_array().unwrap().is_empty()).await;
        assert_eq!(reader.subscribe("role == 'web'", 0).await.joins(), [("Workload/web.h1", "h1")]);
    }
    publish(&mut new, "web.h2", "h2", "10.0.0.1").await;
    old.publish(true, &[], &[]).await;
    for reader in [&mut at_a, &mut at_b] {
        let mut owners = vec!["Workload/web.h1".to_owned()];
        while owners != ["Workload/web.h2"] {
            let batch = reader.batch().await;
            owners.extend(batch.joins().iter().map(|(entity, _)| (*entity).to_owned()));
            owners.retain(|owner| !batch.leaves().contains(&owner.as_str()));
            assert!(!owners.is_empty(), "{batch:?}");
        }
        reader.hears_nothing().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_that_would_cut_off_another_controllers_agent_is_refused() {
    let etcd = EtcdServer::start();
    let (a, b) = two(&etcd).await;
    b.apply(HERE).await;
    b.apply(THERE).await;
    let _agent = a.agent("h7").await;
    served_by(&b, "h7", "a").await;
    let (status, answer) = b.try_apply("apply", &[("shut.yaml", SHUT)]).await;
    assert_eq!((status, &answer["reason"]), (StatusCode::CONFLICT, &json!("LockOut")), "{answer}");
    assert!(answer["message"].as_str().unwrap().contains("the agent of h7"), "{answer}");
}
