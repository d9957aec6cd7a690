//! What every store must do. A backend's tests call [`run_all`] with a function that makes an empty store.

use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;

use crate::types::{Precondition, Revision, StoreError, Transaction};
use crate::{Store, Watch};

/// Longest that a test waits for what must come.
const PATIENCE: Duration = Duration::from_secs(10);

/// What is asked of a store's revisions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Revisions {
    /// An empty store is at 0 and each change is the next number: the store is alone with its revisions.
    Dense,
    /// Each change has a higher number than the one before.
    Rising,
}

/// Runs every test, each on a store of its own.
///
/// # Panics
/// If the store does not do what a store must.
pub async fn run_all<F, Fut>(revisions: Revisions, make_store: F)
where
    F: Fn() -> Fut,
    Fut: Future<Output = Arc<dyn Store>>,
{
    an_empty_store_has_nothing(&*make_store().await).await;
    a_write_can_be_read(&*make_store().await).await;
    each_transaction_makes_one_revision(&*make_store().await).await;
    preconditions_are_kept(&*make_store().await).await;
    a_refused_transaction_changes_nothing(&*make_store().await).await;
    nonsense_is_refused(&*make_store().await).await;
    lists_are_by_prefix_and_in_order(&*make_store().await).await;
    lists_are_of_one_revision(make_store().await).await;
    deleting_nothing_is_no_change(&*make_store().await).await;
    a_watch_sees_every_change_once_in_order(&*make_store().await).await;
    a_watch_sees_whole_transactions(&*make_store().await).await;
    a_watch_resumes_and_keeps_to_its_prefix(&*make_store().await).await;
    a_watch_comes_to_a_mark(&*make_store().await).await;
    a_watch_beyond_the_end_is_refused(&*make_store().await).await;
    writers_at_once_lose_no_increment(make_store().await).await;
    keys_under_a_lease_go_when_it_ends(&*make_store().await).await;
    a_revoked_leases_keys_go_at_once(&*make_store().await).await;
    epochs_differ(&*make_store().await, &*make_store().await).await;
    if revisions == Revisions::Dense {
        dense_revisions_have_no_gaps(&*make_store().await).await;
    }
}

fn ok<T>(result: Result<T, StoreError>) -> T {
    match result {
        Ok(value) => value,
        Err(error) => panic!("the store refused: {error}"),
    }
}

async fn put(store: &dyn Store, key: &str, value: &str) -> Revision {
    let transaction = Transaction::new().put(key, value.to_owned(), Precondition::Any);
    ok(store.apply(transaction).await).revision
}

/// (key, value or nothing, revision) of the next `count` changes of a watch.
async fn next_changes(watch: &mut Watch, count: usize) -> Vec<(String, Option<Bytes>, u64)> {
    let mut seen = Vec::new();
    while seen.len() < count {
        let Ok(commits) = tokio::time::timeout(PATIENCE, watch.next()).await else {
            panic!("the watch answered {} of {count} changes", seen.len());
        };
        for commit in ok(commits) {
            for change in &commit.changes {
                let value = change.object.as_ref().map(|object| object.value.clone());
                seen.push((change.key.to_string(), value, commit.revision.0));
            }
        }
    }
    seen
}

/// Waits until a watch that has nothing to say is at a revision.
async fn passes_over(watch: &mut Watch, revision: Revision) {
    let Ok(commits) = tokio::time::timeout(PATIENCE, watch.until(revision)).await else {
        panic!("the watch is at {} and does not come to {revision}", watch.position());
    };
    assert!(ok(commits).is_empty(), "what does not concern a watch must not come");
}

async fn an_empty_store_has_nothing(store: &dyn Store) {
    let before = ok(store.revision().await);
    assert_eq!(ok(store.get("/a").await), None);
    let (objects, revision) = ok(store.list("").await);
    assert_eq!(objects, vec![]);
    assert!(revision >= before);
    assert!(!store.epoch().is_empty());
}

async fn a_write_can_be_read(store: &dyn Store) {
    let first = put(store, "/a", "one").await;
    let second = put(store, "/a", "two").await;
    let Some(object) = ok(store.get("/a").await) else { panic!("what was written is not there") };
    assert_eq!((object.created, object.modified), (first, second));
    assert_eq!((&*object.key, &*object.value), ("/a", &b"two"[..]));
}

async fn each_transaction_makes_one_revision(store: &dyn Store) {
    let before = ok(store.revision().await);
    let transaction =
        Transaction::new().put("/a", "1", Precondition::Any).put("/b", "2", Precondition::Absent);
    let applied = ok(store.apply(transaction).await);
    assert!(applied.changed && applied.revision > before, "{applied:?}");
    let (objects, revision) = ok(store.list("/").await);
    assert!(revision >= applied.revision);
    assert_eq!(objects.len(), 2);
    assert!(objects.iter().all(|object| object.modified == applied.revision), "{objects:?}");
    let next = put(store, "/a", "3").await;
    assert!(next > applied.revision);
    let (objects, _) = ok(store.list("/").await);
    let stamps: Vec<_> = objects.iter().map(|object| (object.created, object.modified)).collect();
    assert_eq!(stamps, [(applied.revision, next), (applied.revision, applied.revision)]);
}

async fn preconditions_are_kept(store: &dyn Store) {
    let at = put(store, "/a", "1").await;
    let refused = [
        ("/a", Precondition::Absent, Some(at)),
        ("/a", Precondition::AtRevision(Revision(at.0 + 1)), Some(at)),
        ("/b", Precondition::Present, None),
        ("/b", Precondition::AtRevision(at), None),
    ];
    for (key, expected, found) in refused {
        for transaction in
            [Transaction::new().put(key, "2", expected), Transaction::new().delete(key, expected)]
        {
            let error = store.apply(transaction).await;
            assert_eq!(error, Err(StoreError::Conflict { key: key.into(), expected, found }));
        }
    }
    let transaction =
        Transaction::new().put("/a", "2", Precondition::AtRevision(at)).put("/b", "2", Precondition::Absent);
    let at = ok(store.apply(transaction).await).revision;
    let transaction =
        Transaction::new().delete("/a", Precondition::Present).delete("/b", Precondition::AtRevision(at));
    ok(store.apply(transaction).await);
    assert_eq!(ok(store.list("").await).0, vec![]);
}

async fn a_refused_transaction_changes_nothing(store: &dyn Store) {
    let at = put(store, "/a", "1").await;
    let transaction = Transaction::new()
        .put("/a", "2", Precondition::Any)
        .delete("/b", Precondition::Any)
        .put("/c", "2", Precondition::Present);
    assert!(store.apply(transaction).await.is_err());
    let (objects, _) = ok(store.list("").await);
    let found: Vec<_> = objects.iter().map(|object| (&*object.value, object.modified)).collect();
    assert_eq!(found, [(&b"1"[..], at)]);
}

async fn nonsense_is_refused(store: &dyn Store) {
    let before = ok(store.revision().await);
    let twice = Transaction::new().put("/a", "1", Precondition::Any).delete("/a", Precondition::Any);
    assert_eq!(store.apply(twice).await, Err(StoreError::DuplicateKey("/a".into())));
    let nameless = Transaction::new().put("", "1", Precondition::Any);
    assert_eq!(store.apply(nameless).await, Err(StoreError::Key(String::new())));
    assert_eq!(ok(store.revision().await), before);
}

async fn lists_are_by_prefix_and_in_order(store: &dyn Store) {
    for key in ["/b/2", "/b/1", "/bb/1", "/a/1", "/c/1", "/b"] {
        put(store, key, key).await;
    }
    let (objects, _) = ok(store.list("/b/").await);
    assert_eq!(objects.iter().map(|object| &*object.key).collect::<Vec<_>>(), ["/b/1", "/b/2"]);
    assert_eq!(ok(store.list("").await).0.len(), 6);
}

/// A writer changes the first and the last key together, so a list that is not of one revision shows a difference.
async fn lists_are_of_one_revision(store: Arc<dyn Store>) {
    const KEYS: usize = 100;
    const WRITES: usize = 50;
    let mut transaction = Transaction::new();
    for number in 0..KEYS {
        transaction = transaction.put(format!("/{number:03}"), "0", Precondition::Any);
    }
    ok(store.apply(transaction).await);
    let writer = {
        let store = Arc::clone(&store);
        tokio::spawn(async move {
            for number in 0..WRITES {
                let value = number.to_string();
                let transaction = Transaction::new().put("/000", value.clone(), Precondition::Any).put(
                    format!("/{:03}", KEYS - 1),
                    value,
                    Precondition::Any,
                );
                ok(store.apply(transaction).await);
            }
        })
    };
    while !writer.is_finished() {
        let (objects, revision) = ok(store.list("/").await);
        assert_eq!(objects.len(), KEYS);
        let (Some(first), Some(last)) = (objects.first(), objects.last()) else { panic!("empty") };
        assert_eq!((&first.value, first.modified), (&last.value, last.modified));
        assert!(objects.iter().all(|object| object.modified <= revision));
    }
    assert!(writer.await.is_ok(), "the writer panicked");
}

async fn deleting_nothing_is_no_change(store: &dyn Store) {
    let at = put(store, "/a", "1").await;
    let mut watch = ok(store.watch("", at).await);
    let applied = ok(store.apply(Transaction::new().delete("/b", Precondition::Any)).await);
    assert!(applied.revision >= at && !applied.changed, "{applied:?}");
    assert!(!ok(store.apply(Transaction::new()).await).changed);
    passes_over(&mut watch, ok(store.mark().await)).await;
}

async fn a_watch_sees_every_change_once_in_order(store: &dyn Store) {
    let empty = ok(store.revision().await);
    let mut early = ok(store.watch("", empty).await);
    let mut expected = Vec::new();
    for number in 0..1000 {
        let (key, value) = (format!("/{}", number % 10), number.to_string());
        let revision = put(store, &key, &value).await;
        expected.push((key, Some(Bytes::from(value)), revision.0));
    }
    let deleted = ok(store.apply(Transaction::new().delete("/3", Precondition::Present)).await);
    expected.push(("/3".to_owned(), None, deleted.revision.0));
    assert!(expected.is_sorted_by(|(.., one), (.., next)| one < next), "revisions rise");
    let mut late = ok(store.watch("", empty).await);
    let mut from_the_beginning = ok(store.watch("", Revision(0)).await);
    for watch in [&mut early, &mut late, &mut from_the_beginning] {
        assert_eq!(next_changes(watch, expected.len()).await, expected);
        passes_over(watch, ok(store.mark().await)).await;
    }
}

async fn a_watch_sees_whole_transactions(store: &dyn Store) {
    const TRANSACTIONS: u64 = 200;
    let mut watch = ok(store.watch("/", ok(store.revision().await)).await);
    let keys = ["/c", "/a", "/b"];
    for number in 0..TRANSACTIONS {
        let transaction = keys.iter().fold(Transaction::new(), |transaction, key| {
            transaction.put(*key, number.to_string(), Precondition::Any)
        });
        ok(store.apply(transaction).await);
    }
    let mark = ok(store.mark().await);
    let Ok(commits) = tokio::time::timeout(PATIENCE, watch.until(mark)).await else {
        panic!("the watch does not come to its mark");
    };
    let commits = ok(commits);
    assert_eq!(commits.len() as u64, TRANSACTIONS);
    for commit in &commits {
        let changed: Vec<_> = commit.changes.iter().map(|change| &*change.key).collect();
        assert_eq!(changed, keys, "in the order of the operations");
    }
}

async fn a_watch_resumes_and_keeps_to_its_prefix(store: &dyn Store) {
    put(store, "/a/1", "1").await;
    let middle = put(store, "/b/1", "2").await;
    let third = put(store, "/a/1", "3").await;
    let transaction =
        Transaction::new().put("/a/2", "4", Precondition::Any).put("/b/2", "4", Precondition::Any);
    let fourth = ok(store.apply(transaction).await).revision;
    let mut watch = ok(store.watch("/a/", middle).await);
    let seen = next_changes(&mut watch, 2).await;
    let expected = |key: &str, value: &'static str, revision: Revision| {
        (key.to_owned(), Some(Bytes::from(value)), revision.0)
    };
    assert_eq!(seen, [expected("/a/1", "3", third), expected("/a/2", "4", fourth)]);
    let foreign = put(store, "/b/3", "5").await;
    let step = tokio::time::timeout(PATIENCE, watch.step()).await;
    assert_eq!(step, Ok(Ok(vec![])), "a watcher is told that there was something");
    passes_over(&mut watch, foreign).await;
    let sixth = put(store, "/a/3", "6").await;
    assert_eq!(next_changes(&mut watch, 1).await, [expected("/a/3", "6", sixth)]);
}

async fn a_watch_comes_to_a_mark(store: &dyn Store) {
    let mut watch = ok(store.watch("/", Revision(0)).await);
    passes_over(&mut watch, ok(store.mark().await)).await;
    let at = put(store, "/a", "1").await;
    let mark = ok(store.mark().await);
    assert!(mark >= at);
    let Ok(commits) = tokio::time::timeout(PATIENCE, watch.until(mark)).await else {
        panic!("the watch does not come to its mark");
    };
    assert_eq!(ok(commits).len(), 1);
    assert!(watch.position() >= mark);
}

async fn a_watch_beyond_the_end_is_refused(store: &dyn Store) {
    /// Further than anything that an engine does by itself meanwhile.
    const FAR: u64 = 1000;
    let at = put(store, "/a", "1").await;
    let ahead = Revision(at.0 + FAR);
    match store.watch("", ahead).await {
        Err(StoreError::Ahead { from, current }) => {
            assert!(from == ahead && current >= at && current < ahead)
        }
        other => panic!("{other:?}"),
    }
}

/// What our own stores promise beyond the rest: every revision is one change, and nothing is between two of them.
async fn dense_revisions_have_no_gaps(store: &dyn Store) {
    assert_eq!(ok(store.revision().await), Revision(0));
    assert_eq!(ok(store.list("").await), (vec![], Revision(0)));
    for number in 1..=10 {
        assert_eq!(put(store, "/a", "1").await, Revision(number));
        assert_eq!(ok(store.list("").await).1, Revision(number));
        assert_eq!(ok(store.mark().await), Revision(number), "a mark makes none");
    }
    let refused = Transaction::new().put("/a", "2", Precondition::Absent);
    assert!(store.apply(refused).await.is_err());
    let nothing = ok(store.apply(Transaction::new().delete("/b", Precondition::Any)).await);
    assert_eq!((nothing.revision, nothing.changed), (Revision(10), false));
    let error = store.watch("", Revision(11)).await.err();
    assert_eq!(error, Some(StoreError::Ahead { from: Revision(11), current: Revision(10) }));
    let mut watch = ok(store.watch("/b", Revision(0)).await);
    assert!(ok(watch.ready()).is_empty());
    assert_eq!(watch.position(), Revision(10), "foreign changes are passed over at once");
    assert_eq!(put(store, "/b", "1").await, Revision(11));
    assert_eq!(ok(watch.ready()).len(), 1, "a watch has what its writer was told of");
}

async fn writers_at_once_lose_no_increment(store: Arc<dyn Store>) {
    const WRITERS: usize = 8;
    const INCREMENTS: usize = 25;
    put(&*store, "/count", "0").await;
    let writers: Vec<_> = (0..WRITERS)
        .map(|_| {
            let store = Arc::clone(&store);
            tokio::spawn(async move {
                for _ in 0..INCREMENTS {
                    while !increment(&*store).await {}
                }
            })
        })
        .collect();
    for writer in writers {
        assert!(writer.await.is_ok(), "a writer panicked");
    }
    let value = ok(store.get("/count").await).map(|object| object.value);
    assert_eq!(value.as_deref(), Some((WRITERS * INCREMENTS).to_string().as_bytes()));
}

/// Whether it came through; a conflict is no error here.
async fn increment(store: &dyn Store) -> bool {
    let Some(object) = ok(store.get("/count").await) else { panic!("the counter is gone") };
    let count = std::str::from_utf8(&object.value).ok().and_then(|text| text.parse::<u64>().ok());
    let next = count.map_or_else(String::new, |count| (count + 1).to_string());
    let transaction = Transaction::new().put("/count", next, Precondition::AtRevision(object.modified));
    match store.apply(transaction).await {
        Ok(applied) => {
            let written = ok(store.get("/count").await).map(|object| object.modified);
            assert!(written >= Some(applied.revision), "a writer must read its own writes");
            true
        }
        Err(StoreError::Conflict { .. }) => false,
        Err(error) => panic!("the store refused: {error}"),
    }
}

async fn keys_under_a_lease_go_when_it_ends(store: &dyn Store) {
    const TTL: Duration = Duration::from_secs(1);
    /// Between two looks, in each of which one of the leases is kept alive.
    const LOOK_EVERY: Duration = Duration::from_millis(100);
    let granted = Instant::now();
    let (ends, stays) = (ok(store.grant(TTL).await), ok(store.grant(TTL).await));
    let under = |lease, keys: &[&str]| {
        keys.iter().fold(Transaction::new(), |all, key| all.put_under(lease, *key, "1", Precondition::Any))
    };
    ok(store.apply(under(ends, &["/1", "/2", "/freed", "/moved", "/deleted"])).await);
    assert_eq!(ok(store.get("/1").await).and_then(|object| object.lease), Some(ends));
    let transaction = under(stays, &["/moved", "/other"])
        .put("/freed", "1", Precondition::Present)
        .delete("/deleted", Precondition::Present);
    let at = ok(store.apply(transaction).await).revision;
    let mut watch = ok(store.watch("/", at).await);
    let commits = loop {
        ok(store.keep_alive(stays).await);
        match tokio::time::timeout(LOOK_EVERY, watch.next()).await {
            Ok(commits) => break ok(commits),
            Err(_elapsed) => assert!(granted.elapsed() < PATIENCE, "the lease does not end"),
        }
    };
    assert!(granted.elapsed() >= TTL, "it ended too early");
    assert_eq!(commits.len(), 1, "one change: {commits:?}");
    let mut gone: Vec<_> =
        commits[0].changes.iter().map(|change| (&*change.key, change.object.is_none())).collect();
    gone.sort_unstable();
    assert_eq!(gone, [("/1", true), ("/2", true)]);
    let (left, _) = ok(store.list("/").await);
    let left: Vec<_> = left.iter().map(|object| (&*object.key, object.lease)).collect();
    assert_eq!(left, [("/freed", None), ("/moved", Some(stays)), ("/other", Some(stays))]);

    assert_eq!(store.keep_alive(ends).await, Err(StoreError::NoLease(ends)));
    assert_eq!(store.revoke(ends).await, Err(StoreError::NoLease(ends)));
    let late = under(ends, &["/1"]).put("/2", "2", Precondition::Any);
    assert_eq!(store.apply(late).await, Err(StoreError::NoLease(ends)));
    assert_eq!(ok(store.list("/").await).0.len(), 3, "nothing was written");
}

async fn a_revoked_leases_keys_go_at_once(store: &dyn Store) {
    const TTL: Duration = Duration::from_secs(600);
    let lease = ok(store.grant(TTL).await);
    let transaction = Transaction::new()
        .put_under(lease, "/1", "1", Precondition::Absent)
        .put("/2", "2", Precondition::Absent)
        .put_under(lease, "/3", "3", Precondition::Absent);
    let at = ok(store.apply(transaction).await).revision;
    let mut watch = ok(store.watch("/", at).await);
    ok(store.revoke(lease).await);
    let (left, _) = ok(store.list("/").await);
    assert_eq!(left.iter().map(|object| &*object.key).collect::<Vec<_>>(), ["/2"]);
    let mut gone = next_changes(&mut watch, 2).await;
    gone.sort_unstable();
    assert_eq!((gone[0].0.as_str(), gone[1].0.as_str()), ("/1", "/3"));
    assert_eq!((&gone[0].1, gone[0].2), (&None, gone[1].2), "one change");
    let empty = ok(store.grant(TTL).await);
    assert_ne!(empty, lease);
    ok(store.revoke(empty).await);
}

async fn epochs_differ(one: &dyn Store, other: &dyn Store) {
    assert_ne!(one.epoch(), other.epoch());
}
