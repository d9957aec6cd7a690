//! What every store must do. A backend's tests call [`run_all`] with a function that makes an empty store.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use crate::types::{Precondition, Revision, StoreError, Transaction};
use crate::{Store, Watch};

/// Longest that a test waits for what must come.
const PATIENCE: Duration = Duration::from_secs(10);

/// Runs every test, each on a store of its own.
///
/// # Panics
/// If the store does not do what a store must.
pub async fn run_all<F, Fut>(make_store: F)
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
    deleting_nothing_is_no_change(&*make_store().await).await;
    a_watch_sees_every_change_once_in_order(&*make_store().await).await;
    a_watch_resumes_and_keeps_to_its_prefix(&*make_store().await).await;
    a_watch_beyond_the_end_is_refused(&*make_store().await).await;
    writers_at_once_lose_no_increment(make_store().await).await;
    epochs_differ(&*make_store().await, &*make_store().await).await;
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

async fn an_empty_store_has_nothing(store: &dyn Store) {
    assert_eq!(ok(store.revision().await), Revision(0));
    assert_eq!(ok(store.get("/a").await), None);
    assert_eq!(ok(store.list("").await), (vec![], Revision(0)));
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
    let transaction =
        Transaction::new().put("/a", "1", Precondition::Any).put("/b", "2", Precondition::Absent);
    let applied = ok(store.apply(transaction).await);
    assert_eq!((applied.revision, applied.changed), (Revision(1), true));
    let (objects, revision) = ok(store.list("/").await);
    assert_eq!(revision, Revision(1));
    assert!(objects.iter().all(|object| object.modified == Revision(1)), "{objects:?}");
    assert_eq!(put(store, "/a", "3").await, Revision(2));
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
    let (objects, revision) = ok(store.list("").await);
    assert_eq!(revision, at);
    assert_eq!(objects.iter().map(|object| &*object.value).collect::<Vec<_>>(), [b"1"]);
}

async fn nonsense_is_refused(store: &dyn Store) {
    let twice = Transaction::new().put("/a", "1", Precondition::Any).delete("/a", Precondition::Any);
    assert_eq!(store.apply(twice).await, Err(StoreError::DuplicateKey("/a".into())));
    let nameless = Transaction::new().put("", "1", Precondition::Any);
    assert_eq!(store.apply(nameless).await, Err(StoreError::Key(String::new())));
    assert_eq!(ok(store.revision().await), Revision(0));
}

async fn lists_are_by_prefix_and_in_order(store: &dyn Store) {
    for key in ["/b/2", "/b/1", "/bb/1", "/a/1", "/c/1", "/b"] {
        put(store, key, key).await;
    }
    let (objects, _) = ok(store.list("/b/").await);
    assert_eq!(objects.iter().map(|object| &*object.key).collect::<Vec<_>>(), ["/b/1", "/b/2"]);
    assert_eq!(ok(store.list("").await).0.len(), 6);
}

async fn deleting_nothing_is_no_change(store: &dyn Store) {
    let at = put(store, "/a", "1").await;
    let applied = ok(store.apply(Transaction::new().delete("/b", Precondition::Any)).await);
    assert_eq!((applied.revision, applied.changed), (at, false));
    assert!(!ok(store.apply(Transaction::new()).await).changed);
    assert_eq!(ok(store.revision().await), at);
}

async fn a_watch_sees_every_change_once_in_order(store: &dyn Store) {
    let mut early = ok(store.watch("", Revision(0)).await);
    for number in 0..1000 {
        put(store, &format!("/{}", number % 10), &number.to_string()).await;
    }
    ok(store.apply(Transaction::new().delete("/3", Precondition::Present)).await);
    let mut late = ok(store.watch("", Revision(0)).await);
    for watch in [&mut early, &mut late] {
        let seen = next_changes(watch, 1001).await;
        for (number, (key, value, revision)) in seen.iter().enumerate().take(1000) {
            let number = number as u64;
            assert_eq!((key.as_str(), *revision), (format!("/{}", number % 10).as_str(), number + 1));
            assert_eq!(value.as_deref(), Some(number.to_string().as_bytes()));
        }
        assert_eq!(seen.last(), Some(&("/3".to_owned(), None, 1001)));
        assert!(ok(watch.ready()).is_empty(), "nothing may come twice");
    }
}

async fn a_watch_resumes_and_keeps_to_its_prefix(store: &dyn Store) {
    put(store, "/a/1", "1").await;
    let middle = put(store, "/b/1", "2").await;
    put(store, "/a/1", "3").await;
    let transaction =
        Transaction::new().put("/a/2", "4", Precondition::Any).put("/b/2", "4", Precondition::Any);
    ok(store.apply(transaction).await);
    let mut watch = ok(store.watch("/a/", middle).await);
    let seen = next_changes(&mut watch, 2).await;
    assert_eq!(seen, [("/a/1".to_owned(), Some("3".into()), 3), ("/a/2".to_owned(), Some("4".into()), 4)]);
    put(store, "/b/3", "5").await;
    assert!(ok(watch.ready()).is_empty());
    assert_eq!(watch.position(), Revision(5), "foreign changes are passed over");
    put(store, "/a/3", "6").await;
    assert_eq!(next_changes(&mut watch, 1).await, [("/a/3".to_owned(), Some("6".into()), 6)]);
}

async fn a_watch_beyond_the_end_is_refused(store: &dyn Store) {
    let at = put(store, "/a", "1").await;
    let from = Revision(at.0 + 1);
    let error = store.watch("", from).await.err();
    assert_eq!(error, Some(StoreError::Ahead { from, current: at }));
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

async fn epochs_differ(one: &dyn Store, other: &dyn Store) {
    assert_ne!(one.epoch(), other.epoch());
}
