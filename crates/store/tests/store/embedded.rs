//! What only a store in a file must do.

use std::sync::Arc;

use bulkhead_store::{
    Embedded, EmbeddedOptions, Memory, Precondition, Revision, Store, StoreError, Transaction,
};

async fn put(store: &dyn Store, key: &str, value: &str) -> Revision {
    let transaction = Transaction::new().put(key, value.to_owned(), Precondition::Any);
    store.apply(transaction).await.unwrap().revision
}

#[tokio::test]
async fn reopening_keeps_objects_epoch_and_log() {
    let directory = tempfile::tempdir().unwrap();
    let store = Embedded::open(directory.path()).unwrap();
    let epoch = store.epoch().to_owned();
    let first = put(&store, "/a", "1").await;
    put(&store, "/b", "2").await;
    store.apply(Transaction::new().delete("/a", Precondition::Any)).await.unwrap();
    let before = store.list("").await.unwrap();
    drop(store);

    let store = Embedded::open(directory.path()).unwrap();
    assert_eq!(store.epoch(), epoch);
    assert_eq!(store.list("").await.unwrap(), before);
    let mut watch = store.watch("", first).await.unwrap();
    let commits = watch.next().await.unwrap();
    let changed: Vec<_> = commits.iter().map(|commit| (commit.revision.0, &*commit.changes[0].key)).collect();
    assert_eq!(changed, [(2, "/b"), (3, "/a")]);
    assert_eq!(put(&store, "/c", "3").await, Revision(4));
}

#[tokio::test]
async fn leases_end_with_the_process_and_their_keys_when_it_is_opened_again() {
    let directory = tempfile::tempdir().unwrap();
    let store = Embedded::open(directory.path()).unwrap();
    let lease = store.grant(std::time::Duration::from_secs(600)).await.unwrap();
    let under = |keys: &[&str]| {
        keys.iter().fold(Transaction::new(), |all, key| all.put_under(lease, *key, "1", Precondition::Any))
    };
    store.apply(under(&["/1", "/2", "/freed"])).await.unwrap();
    let at = put(&store, "/freed", "2").await;
    drop(store);

    let store = Embedded::open(directory.path()).unwrap();
    let (left, revision) = store.list("").await.unwrap();
    assert_eq!(left.iter().map(|object| &*object.key).collect::<Vec<_>>(), ["/freed"]);
    assert_eq!(revision, Revision(at.0 + 1));
    let commits = store.watch("", at).await.unwrap().ready().unwrap();
    assert_eq!(commits.len(), 1);
    assert!(commits[0].changes.iter().all(|change| change.object.is_none()));
    assert_eq!(store.keep_alive(lease).await, Err(StoreError::NoLease(lease)));
    drop(store);
    let store = Embedded::open(directory.path()).unwrap();
    assert_eq!(store.revision().await.unwrap(), revision, "once is enough");
}

#[tokio::test]
async fn a_second_holder_is_refused_by_name() {
    let directory = tempfile::tempdir().unwrap();
    let _store = Embedded::open(directory.path()).unwrap();
    match Embedded::open(directory.path()) {
        Err(StoreError::Locked { holder, .. }) => {
            assert_eq!(holder, format!("process {}", std::process::id()));
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn the_log_is_bounded_in_memory_and_in_the_file() {
    let directory = tempfile::tempdir().unwrap();
    let options = EmbeddedOptions { log_changes_max: 10, ..EmbeddedOptions::new(directory.path()) };
    let store = Embedded::open_with(&options).unwrap();
    for number in 0..50 {
        put(&store, "/a", &number.to_string()).await;
    }
    let compacted = StoreError::Compacted { from: Revision(39), oldest: Revision(40) };
    assert_eq!(store.watch("", Revision(39)).await.err(), Some(compacted.clone()));
    drop(store);
    let store = Embedded::open_with(&options).unwrap();
    assert_eq!(store.watch("", Revision(39)).await.err(), Some(compacted));
    let mut watch = store.watch("", Revision(40)).await.unwrap();
    assert_eq!(watch.next().await.unwrap().len(), 10);
}

#[tokio::test]
async fn a_store_whose_making_was_cut_short_is_made_anew() {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("store.new"), "what a power cut left").unwrap();
    let store = Embedded::open(directory.path()).unwrap();
    assert_eq!(put(&store, "/a", "1").await, Revision(1));
    assert!(!directory.path().join("store.new").exists());
}

#[tokio::test]
async fn compaction_gives_room_back_and_keeps_everything() {
    const LARGE: usize = 100_000;
    let directory = tempfile::tempdir().unwrap();
    let options = EmbeddedOptions { log_changes_max: 10, ..EmbeddedOptions::new(directory.path()) };
    let store = Embedded::open_with(&options).unwrap();
    for number in 0..200 {
        put(&store, &format!("/{number}"), &"x".repeat(LARGE)).await;
    }
    for number in 0..200 {
        put(&store, &format!("/{number}"), &number.to_string()).await;
    }
    let (before, epoch) = (store.list("").await.unwrap(), store.epoch().to_owned());
    let busy = Embedded::compact(directory.path());
    assert!(matches!(busy, Err(StoreError::Locked { .. })), "{busy:?}");
    drop(store);
    let (large, small) = Embedded::compact(directory.path()).unwrap();
    assert!(large > 200 * LARGE as u64 && small < large / 4, "from {large} to {small} bytes");
    assert_eq!(std::fs::metadata(directory.path().join("store.redb")).unwrap().len(), small);
    let store = Embedded::open_with(&options).unwrap();
    assert_eq!((store.list("").await.unwrap(), store.epoch()), (before, epoch.as_str()));
    let nothing = tempfile::tempdir().unwrap();
    assert!(matches!(Embedded::compact(nothing.path()), Err(StoreError::Io { .. })));
}

#[tokio::test]
async fn a_watcher_that_falls_behind_is_told() {
    let store = Memory::with_log(10);
    let mut watch = store.watch("", Revision(0)).await.unwrap();
    for number in 0..11 {
        put(&store, "/a", &number.to_string()).await;
    }
    let error = watch.next().await.unwrap_err();
    assert_eq!(error, StoreError::Compacted { from: Revision(0), oldest: Revision(1) });
}

#[tokio::test]
async fn a_closed_store_ends_its_watches() {
    let store = Memory::new();
    let mut watch = store.watch("", Revision(0)).await.unwrap();
    drop(store);
    assert_eq!(watch.next().await.unwrap_err(), StoreError::Closed);
}

#[tokio::test]
async fn damage_is_reported_and_not_a_panic() {
    let directory = tempfile::tempdir().unwrap();
    let store = Embedded::open(directory.path()).unwrap();
    for number in 0..500 {
        put(&store, &format!("/{number}"), &"x".repeat(600)).await;
    }
    drop(store);
    // As an unclean stop leaves it, with rubbish in the midst of the file.
    std::fs::write(directory.path().join("store.lock"), "process 1\n").unwrap();
    let path = directory.path().join("store.redb");
    let mut bytes = std::fs::read(&path).unwrap();
    let middle = bytes.len() / 4;
    bytes[8192..middle].fill(0xa5);
    std::fs::write(&path, bytes).unwrap();
    match Embedded::open(directory.path()) {
        Err(StoreError::Corrupt { .. }) => {}
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn writers_at_once_share_a_commit_and_all_last() {
    let directory = tempfile::tempdir().unwrap();
    let store = Arc::new(Embedded::open(directory.path()).unwrap());
    let writers: Vec<_> = (0..200)
        .map(|number| {
            let store = Arc::clone(&store);
            tokio::spawn(async move { put(&*store, &format!("/{number}"), "x").await })
        })
        .collect();
    let mut revisions = Vec::new();
    for writer in writers {
        revisions.push(writer.await.unwrap().0);
    }
    revisions.sort_unstable();
    assert_eq!(revisions, (1..=200).collect::<Vec<_>>());
    drop(store);
    assert_eq!(Embedded::open(directory.path()).unwrap().list("").await.unwrap().0.len(), 200);
}
