//! A disk that is full.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bulkhead_store::{
    Embedded, EmbeddedOptions, Precondition, RESERVE_BYTES, Revision, Store, StoreError, Transaction,
    free_bytes,
};

use crate::small_disk::SmallDisk;

/// Longest that it may take until writes work again.
const PATIENCE: Duration = Duration::from_secs(20);
const VALUE_BYTES: usize = 64 << 10;

fn put(key: &str) -> Transaction {
    Transaction::new().put(key, vec![7; VALUE_BYTES], Precondition::Any)
}

async fn keys(store: &dyn Store) -> BTreeSet<String> {
    store.list("/o/").await.unwrap().0.iter().map(|stored| stored.key.to_string()).collect()
}

/// Writes until it is refused; what was acknowledged.
async fn write_until_full(store: &dyn Store, name: &str) -> (BTreeSet<String>, StoreError) {
    let mut acknowledged = BTreeSet::new();
    loop {
        let key = format!("/o/{name}{}", acknowledged.len());
        match store.apply(put(&key)).await {
            Ok(_) => drop(acknowledged.insert(key)),
            Err(error) => return (acknowledged, error),
        }
    }
}

/// Writes until it is taken.
async fn write_again(store: &dyn Store, key: &str) {
    let began = Instant::now();
    while let Err(error) = store.apply(put(key)).await {
        assert!(matches!(error, StoreError::Full { .. }), "{error}");
        assert!(began.elapsed() < PATIENCE, "{error}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn open(directory: &Path, reserve_bytes: u64) -> Embedded {
    Embedded::open_with(&EmbeddedOptions { reserve_bytes, ..EmbeddedOptions::new(directory) }).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_fills_its_disk_stops_in_good_order_and_goes_on_when_there_is_room() {
    let disk = SmallDisk::new(48 << 20);
    let directory = disk.path().join("store");
    let store = open(&directory, RESERVE_BYTES);
    let lease = store.grant(PATIENCE).await.unwrap();
    let under = Transaction::new().put_under(lease, "/leased", "x", Precondition::Any);
    store.apply(under).await.unwrap();
    assert_eq!(store.refuses(), None);
    disk.fill(16 << 20);
    let (acknowledged, error) = write_until_full(&store, "a").await;
    assert!(matches!(error, StoreError::Full { .. }) && !acknowledged.is_empty(), "{error}");
    assert!(error.to_string().contains("is full: nothing was changed; make room there"), "{error}");
    assert_eq!(store.refuses(), Some(error));
    let left = free_bytes(disk.path()).unwrap();
    assert!(left > RESERVE_BYTES / 2, "it leaves what it promises: {left}");
    // What is large is refused while there may be room for what is small: somebody takes that too.
    disk.fill(RESERVE_BYTES - 1);
    // Reading, watching and leases go on.
    assert_eq!(keys(&store).await, acknowledged);
    assert_eq!(
        store.watch("/o/", Revision(1)).await.unwrap().next().await.unwrap().len(),
        acknowledged.len()
    );
    store.keep_alive(lease).await.unwrap();
    // Of what changes leave, keys under leases take some: whoever starts must be able to say so.
    let under = Transaction::new().put_under(lease, "/leased", "y", Precondition::Any);
    store.apply(under).await.unwrap();
    assert!(store.refuses().is_some(), "other changes are refused all the same");
    disk.fill(0);
    // They cannot be removed now.
    let error = store.revoke(lease).await.unwrap_err();
    assert!(matches!(error, StoreError::Full { .. }), "{error}");

    disk.make_room();
    write_again(&store, "/o/afterwards").await;
    assert_eq!(store.refuses(), None);
    let began = Instant::now();
    while store.get("/leased").await.unwrap().is_some() {
        assert!(began.elapsed() < PATIENCE, "a lease that ended meanwhile takes its keys along");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let before = store.list("").await.unwrap();
    drop(store);
    let store = open(&directory, RESERVE_BYTES);
    assert_eq!(store.list("").await.unwrap(), before);
}

/// Nobody writes, and it is noticed all the same.
#[tokio::test(flavor = "multi_thread")]
async fn whoever_keeps_a_lease_has_it_look_for_room() {
    let disk = SmallDisk::new(48 << 20);
    let store = open(&disk.path().join("store"), RESERVE_BYTES);
    let lease = store.grant(PATIENCE * 2).await.unwrap();
    disk.fill(0);
    store.apply(put("/o/one")).await.unwrap_err();
    disk.make_room();
    let began = Instant::now();
    while store.refuses().is_some() {
        assert!(began.elapsed() < PATIENCE);
        store.keep_alive(lease).await.unwrap();
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(keys(&store).await.is_empty(), "what was refused is not there");
}

/// Without looking beforehand, writes fail in the middle of a transaction, time and again.
#[tokio::test(flavor = "multi_thread")]
async fn a_write_that_fails_half_way_is_there_or_is_not_and_the_file_is_opened_again() {
    fail_half_way(EmbeddedOptions::new("").log_changes_max).await;
}

/// The same while rows of objects are written along, in one round after the other.
#[tokio::test(flavor = "multi_thread")]
async fn a_write_that_fails_half_way_through_a_round_is_there_or_is_not() {
    fail_half_way(8).await;
}

async fn fail_half_way(log_changes_max: usize) {
    let disk = SmallDisk::new(48 << 20);
    let directory = disk.path().join("store");
    let options =
        || EmbeddedOptions { reserve_bytes: 0, log_changes_max, ..EmbeddedOptions::new(&directory) };
    let store: Arc<dyn Store> = Arc::new(Embedded::open_with(&options()).unwrap());
    let (mut acknowledged, mut unknown) = (BTreeSet::new(), BTreeSet::new());
    for round in 0..6 {
        // Less each time than one more value takes, more or less.
        disk.fill(300_000 + round * 70_000);
        let writers = (0..4).map(|writer| {
            let store = Arc::clone(&store);
            let name = format!("{round}-{writer}-");
            tokio::spawn(async move {
                let (acknowledged, error) = write_until_full(&*store, &name).await;
                (format!("/o/{name}{}", acknowledged.len()), acknowledged, error)
            })
        });
        for writer in writers.collect::<Vec<_>>() {
            let (last, all, error) = writer.await.unwrap();
            acknowledged.extend(all);
            match error {
                StoreError::Full { .. } => {}
                StoreError::OutcomeUnknown { .. } => drop(unknown.insert(last)),
                other => panic!("{other}"),
            }
        }
        assert!(store.refuses().is_some());
        disk.make_room();
        let key = format!("/o/again{round}");
        write_again(&*store, &key).await;
        acknowledged.insert(key);
        let found = keys(&*store).await;
        assert!(acknowledged.is_subset(&found), "{:?}", acknowledged.difference(&found));
        let more: Vec<_> = found.difference(&acknowledged).filter(|key| !unknown.contains(*key)).collect();
        assert!(more.is_empty(), "refused and there: {more:?}");
    }
    let before = store.list("").await.unwrap();
    drop(store);
    let again = Embedded::open_with(&options()).unwrap();
    assert_eq!(again.list("").await.unwrap(), before, "the file says the same");
    println!("{} acknowledged, {} of unknown outcome", acknowledged.len(), unknown.len());
}
