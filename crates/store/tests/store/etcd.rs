//! What only a store in etcd must do. Each test starts an etcd of its own.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bulkhead_store::conformance::{self, Revisions};
use bulkhead_store::{Etcd, EtcdOptions, Precondition, Revision, Store, StoreError, Transaction};

use crate::etcd_server::EtcdServer;

/// Longest wait for what must come.
const PATIENCE: Duration = Duration::from_secs(20);

fn options(server: &EtcdServer, prefix: &str) -> EtcdOptions {
    EtcdOptions::new(vec![server.endpoint()], prefix)
}

async fn open(server: &EtcdServer) -> Etcd {
    Etcd::open(&options(server, "/bulkhead")).await.unwrap()
}

async fn put(store: &dyn Store, key: &str, value: &str) -> Revision {
    let transaction = Transaction::new().put(key, value.to_owned(), Precondition::Any);
    store.apply(transaction).await.unwrap().revision
}

#[tokio::test(flavor = "multi_thread")]
async fn etcd_conforms() {
    let server = EtcdServer::start();
    let count = AtomicUsize::new(0);
    conformance::run_all(Revisions::Rising, || async {
        let number = count.fetch_add(1, Ordering::Relaxed);
        // Pages so small that most lists have several, and prefixes that begin like each other.
        let options = EtcdOptions { page_keys: 7, ..options(&server, &format!("/t{number}")) };
        Arc::new(Etcd::open(&options).await.unwrap()) as Arc<dyn Store>
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_stores_at_one_prefix_are_one() {
    let server = EtcdServer::start();
    let (one, other) = (open(&server).await, open(&server).await);
    assert_eq!(one.epoch(), other.epoch());
    let mut watch = other.watch("/", Revision(0)).await.unwrap();
    let at = put(&one, "/a", "1").await;
    assert_eq!(other.get("/a").await.unwrap().unwrap().modified, at);
    let commits = tokio::time::timeout(PATIENCE, watch.next()).await.unwrap().unwrap();
    assert_eq!((commits.len(), commits[0].revision), (1, at));
    let again = Transaction::new().put("/a", "2", Precondition::Absent);
    assert!(
        matches!(other.apply(again).await, Err(StoreError::Conflict { found: Some(found), .. }) if found == at)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_goes_on_after_etcd_was_killed() {
    let mut server = EtcdServer::start();
    let store = Arc::new(open(&server).await);
    let mut watch = store.watch("/", store.mark().await.unwrap()).await.unwrap();
    let mut expected = Vec::new();
    for round in 0..3 {
        expected.push(put(&*store, "/a", &round.to_string()).await);
        server.kill();
        // It is written while there is no etcd, and waits for one.
        let writer = {
            let store = Arc::clone(&store);
            tokio::spawn(async move { put(&*store, "/b", &round.to_string()).await })
        };
        server.restart();
        expected.push(writer.await.unwrap());
        expected.push(put(&*store, "/c", &round.to_string()).await);
    }
    let mark = store.mark().await.unwrap();
    let commits = tokio::time::timeout(PATIENCE, watch.until(mark)).await.unwrap().unwrap();
    let seen: Vec<_> = commits.iter().map(|commit| commit.revision).collect();
    assert_eq!(seen, expected, "every change once, in order");
}

#[tokio::test(flavor = "multi_thread")]
async fn another_member_is_asked_if_one_does_not_answer() {
    let server = EtcdServer::start();
    // Nobody listens there; a socket that is bound but not listening keeps it so.
    let nobody = std::net::UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let endpoints = vec![format!("127.0.0.1:{nobody}"), server.endpoint()];
    let store = Etcd::open(&EtcdOptions::new(endpoints, "/bulkhead")).await.unwrap();
    put(&store, "/a", "1").await;
    let mut watch = store.watch("/", Revision(0)).await.unwrap();
    assert_eq!(tokio::time::timeout(PATIENCE, watch.next()).await.unwrap().unwrap().len(), 1);
}

/// Each member in turn is killed while the store is written to; two of three go on.
#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_that_loses_a_member_goes_on() {
    let mut servers = EtcdServer::cluster(3);
    let endpoints = servers.iter().map(EtcdServer::endpoint).collect();
    let store = Arc::new(Etcd::open(&EtcdOptions::new(endpoints, "/bulkhead")).await.unwrap());
    let mut at = put(&*store, "/n", "0").await;
    let mut watch = store.watch("/", at).await.unwrap();
    let mut expected = Vec::new();
    for server in &mut servers {
        server.kill();
        for _ in 0..5 {
            // By compare-and-set: one that is applied twice, or lost, is a conflict.
            let transaction = Transaction::new().put("/n", "x", Precondition::AtRevision(at));
            at = store.apply(transaction).await.unwrap().revision;
            expected.push(at);
        }
        assert_eq!(store.get("/n").await.unwrap().unwrap().modified, at);
        server.restart();
    }
    let commits = tokio::time::timeout(PATIENCE, watch.until(at)).await.unwrap().unwrap();
    assert_eq!(commits.iter().map(|commit| commit.revision).collect::<Vec<_>>(), expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_compacted_is_said_to_be() {
    let server = EtcdServer::start();
    let store = open(&server).await;
    let first = put(&store, "/a", "1").await;
    let second = put(&store, "/a", "2").await;
    put(&store, "/a", "3").await;
    let mut waiting = store.watch("/", first).await.unwrap();
    tokio::time::timeout(PATIENCE, waiting.next()).await.unwrap().unwrap();
    server.ctl(&["compact", &second.to_string()]);
    let error = store.watch("/", first).await.err();
    assert_eq!(error, Some(StoreError::Compacted { from: first, oldest: second }));
    let error = store.watch("/", Revision(0)).await.err();
    assert_eq!(error, Some(StoreError::Compacted { from: Revision(0), oldest: second }));
    let mut watch = store.watch("/", second).await.unwrap();
    let commits = tokio::time::timeout(PATIENCE, watch.next()).await.unwrap().unwrap();
    assert_eq!(commits[0].changes[0].object.as_ref().unwrap().value, "3");
}

#[tokio::test(flavor = "multi_thread")]
async fn etcds_limits_are_named_with_the_flag_that_raises_them() {
    let many = |count: usize| {
        (0..count).fold(Transaction::new(), |transaction, number| {
            transaction.put(format!("/{number}"), "x", Precondition::Absent)
        })
    };
    let server = EtcdServer::start();
    let store = open(&server).await;
    store.apply(many(127)).await.unwrap();
    match store.apply(many(200)).await {
        Err(error @ StoreError::ServerLimit { flag: "--max-txn-ops", .. }) => {
            assert!(error.to_string().contains("200 operations"), "{error}");
        }
        other => panic!("{other:?}"),
    }
    for megabytes in [2, 8] {
        let large = Transaction::new().put("/large", vec![0; megabytes << 20], Precondition::Any);
        match store.apply(large).await {
            Err(StoreError::ServerLimit { flag: "--max-request-bytes", .. }) => {}
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(store.list("").await.unwrap().0.len(), 127, "nothing was split");

    let server = EtcdServer::with(&["--max-txn-ops", "1000", "--max-request-bytes", "16777216"]);
    let store = open(&server).await;
    let mut watch = store.watch("/", Revision(0)).await.unwrap();
    store.apply(many(900)).await.unwrap();
    let large = Transaction::new().put("/large", vec![0; 8 << 20], Precondition::Any);
    let at = store.apply(large).await.unwrap().revision;
    let commits = tokio::time::timeout(PATIENCE, watch.until(at)).await.unwrap().unwrap();
    assert_eq!(commits.iter().map(|commit| commit.changes.len()).collect::<Vec<_>>(), [900, 1]);
    assert_eq!(store.list("").await.unwrap().0.len(), 901);
}

#[tokio::test(flavor = "multi_thread")]
async fn another_epoch_ends_a_watch() {
    let mut server = EtcdServer::start();
    let store = open(&server).await;
    let mut watch = store.watch("/", Revision(0)).await.unwrap();
    server.ctl(&["del", "--prefix", "/bulkhead/"]);
    let other = open(&server).await;
    assert_ne!(store.epoch(), other.epoch());
    server.kill();
    server.restart();
    let error = loop {
        match tokio::time::timeout(PATIENCE, watch.next()).await.unwrap() {
            Ok(_) => {}
            Err(error) => break error,
        }
    };
    assert!(matches!(error, StoreError::Ahead { .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_writer_whose_own_keys_are_gone_goes_on() {
    let server = EtcdServer::start();
    let store = open(&server).await;
    put(&store, "/a", "1").await;
    server.ctl(&["del", "--prefix", "/bulkhead/writers/"]);
    put(&store, "/a", "2").await;
    let leases = server.ctl(&["lease", "list"]);
    for lease in leases.lines().skip(1) {
        server.ctl(&["lease", "revoke", lease]);
    }
    put(&store, "/a", "3").await;
    assert_eq!(store.get("/a").await.unwrap().unwrap().value, "3");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_closed_store_ends_its_watches() {
    let server = EtcdServer::start();
    let store = open(&server).await;
    let mut watch = store.watch("", Revision(0)).await.unwrap();
    drop(store);
    let error = tokio::time::timeout(PATIENCE, watch.next()).await.unwrap().unwrap_err();
    assert_eq!(error, StoreError::Closed);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_does_not_answer_is_said_to_be_unreachable() {
    let mut server = EtcdServer::start();
    let store = open(&server).await;
    put(&store, "/a", "1").await;
    server.kill();
    let write = Transaction::new().put("/a", "2", Precondition::Any);
    let (read, written) = tokio::join!(store.get("/a"), store.apply(write));
    assert!(matches!(read, Err(StoreError::Unavailable { .. })), "{read:?}");
    assert!(matches!(written, Err(StoreError::OutcomeUnknown { .. })), "{written:?}");
    server.restart();
    put(&store, "/a", "3").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_needs_the_password() {
    let server = EtcdServer::start();
    for arguments in [
        &["user", "add", "root:secret"][..],
        &["role", "add", "bulkhead"],
        &["role", "grant-permission", "bulkhead", "--prefix=true", "readwrite", "/bulkhead/"],
        &["user", "add", "controller:its-own"],
        &["user", "grant-role", "controller", "bulkhead"],
        &["user", "grant-role", "root", "root"],
        &["auth", "enable"],
    ] {
        server.ctl(arguments);
    }
    let password = server.directory().join("password");
    std::fs::write(&password, "its-own\n").unwrap();
    let with = |prefix: &str| EtcdOptions {
        user: Some("controller".into()),
        password_file: Some(password.clone()),
        ..options(&server, prefix)
    };
    let store = Etcd::open(&with("/bulkhead")).await.unwrap();
    let at = put(&store, "/a", "1").await;
    let mut watch = store.watch("/", Revision(0)).await.unwrap();
    assert_eq!(tokio::time::timeout(PATIENCE, watch.until(at)).await.unwrap().unwrap().len(), 1);
    for refused in [options(&server, "/bulkhead"), with("/other")] {
        let error = Etcd::open(&refused).await.unwrap_err();
        assert!(matches!(error, StoreError::Refused { .. }), "{error}");
    }
    std::fs::write(&password, "wrong\n").unwrap();
    let error = Etcd::open(&with("/bulkhead")).await.unwrap_err();
    assert!(matches!(error, StoreError::Refused { .. }), "{error}");
}

#[tokio::test]
async fn options_that_make_no_sense_are_refused() {
    let plain = EtcdOptions::new(vec!["127.0.0.1:1".into()], "/bulkhead");
    for wrong in [
        EtcdOptions { endpoints: vec![], ..plain.clone() },
        EtcdOptions { endpoints: vec!["http://127.0.0.1:1".into()], ..plain.clone() },
        EtcdOptions { prefix: "bulkhead".into(), ..plain.clone() },
        EtcdOptions { prefix: "/bulkhead/".into(), ..plain.clone() },
        EtcdOptions { user: Some("a".into()), ..plain.clone() },
        EtcdOptions { cert_file: Some("/a".into()), ..plain.clone() },
    ] {
        let error = Etcd::open(&wrong).await.unwrap_err();
        assert!(matches!(error, StoreError::Refused { .. }), "{error}");
    }
}
