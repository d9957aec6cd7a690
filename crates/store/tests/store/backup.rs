//! Copies: taken, refused when damaged, taken in, and followed by what changes meanwhile.

use std::sync::Arc;

use bulkhead_store::{
    Backup, BackupError, Embedded, Etcd, EtcdOptions, Memory, Migration, Precondition, Restored, Revision,
    Store, StoreError, Transaction,
};

use crate::etcd_server::EtcdServer;

async fn put(store: &dyn Store, key: &str, value: &[u8]) -> Revision {
    let transaction = Transaction::new().put(key, value.to_vec(), Precondition::Any);
    store.apply(transaction).await.unwrap().revision
}

/// A store with texts, bytes that are none, something deleted and something under a lease.
async fn filled(store: &dyn Store) {
    for number in 0..300_u32 {
        put(store, &format!("/text/{number}"), format!("\"{number}\" – \n").as_bytes()).await;
    }
    put(store, "/bytes", &[0, 255, 128]).await;
    put(store, "/empty", b"").await;
    put(store, "/gone", b"x").await;
    store.apply(Transaction::new().delete("/gone", Precondition::Present)).await.unwrap();
    let lease = store.grant(std::time::Duration::from_secs(600)).await.unwrap();
    store.apply(Transaction::new().put_under(lease, "/leased", "x", Precondition::Any)).await.unwrap();
}

async fn text_of(store: &dyn Store) -> Vec<u8> {
    Backup::take(store).await.unwrap().into_lines().flatten().collect()
}

/// Keys and values, without what is under a lease.
async fn content(store: &dyn Store) -> Vec<(String, Vec<u8>)> {
    let (objects, _) = store.list("").await.unwrap();
    let lasting = objects.iter().filter(|object| object.lease.is_none());
    lasting.map(|object| (object.key.to_string(), object.value.to_vec())).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn any_store_takes_in_the_copy_of_any_other() {
    let server = EtcdServer::start();
    let directory = tempfile::tempdir().unwrap();
    let etcd = |prefix: &str| EtcdOptions::new(vec![server.endpoint()], prefix);
    let sources: [Box<dyn Store>; 3] = [
        Box::new(Memory::new()),
        Box::new(Embedded::open(directory.path().join("source")).unwrap()),
        Box::new(Etcd::open(&etcd("/source")).await.unwrap()),
    ];
    for (number, source) in sources.iter().enumerate() {
        filled(&**source).await;
        let text = text_of(&**source).await;
        let backup = Backup::read(&text[..]).unwrap();
        assert_eq!(backup, Backup::take(&**source).await.unwrap());
        assert_eq!((backup.epoch.as_str(), backup.objects.len()), (source.epoch(), 302));
        let targets: [(Box<dyn Store>, usize); 3] = [
            (Box::new(Memory::new()), 1),
            (Box::new(Embedded::open(directory.path().join(number.to_string())).unwrap()), 1),
            (Box::new(Etcd::open(&etcd(&format!("/{number}"))).await.unwrap()), 4),
        ];
        for (target, transactions) in &targets {
            let restored = backup.restore(&**target, false).await.unwrap();
            assert_eq!(restored.transactions, *transactions);
            assert_eq!(content(&**target).await, content(&**source).await);
            assert_ne!(target.epoch(), source.epoch());
            let again = backup.restore(&**target, false).await;
            assert!(matches!(again, Err(BackupError::NotEmpty(302))), "{again:?}");
            put(&**target, "/text/0", b"other").await;
            put(&**target, "/more", b"more").await;
            backup.restore(&**target, true).await.unwrap();
            assert_eq!(content(&**target).await, content(&**source).await);
        }
    }
}

#[tokio::test]
async fn what_was_cut_off_or_altered_is_refused() {
    let store = Memory::new();
    for number in 0..3 {
        put(&store, &format!("/{number}"), b"value").await;
    }
    let text = text_of(&store).await;
    assert_eq!(Backup::read(&text[..]).unwrap().objects.len(), 3);
    let refused = |text: &[u8]| matches!(Backup::read(text), Err(BackupError::Damaged { .. }));
    for length in 0..text.len() {
        assert!(refused(&text[..length]), "cut off after {length} bytes");
    }
    for at in 0..text.len() {
        for bit in [1, 0x20] {
            let mut altered = text.clone();
            altered[at] ^= bit;
            assert!(refused(&altered), "byte {at} altered");
        }
    }
    assert!(refused(&[&text[..], b"\n"].concat()), "something behind its end");
    let lines: Vec<_> = text.split_inclusive(|byte| *byte == b'\n').collect();
    assert!(refused(&[lines[0], lines[2], lines[1], lines[3], lines[4]].concat()), "lines exchanged");
    assert!(refused(&[lines[0], lines[1], lines[1], lines[3], lines[4]].concat()), "a line twice");
}

/// A writer goes on while the store is copied; the copy is complete up to the revision that it names.
#[tokio::test(flavor = "multi_thread")]
async fn a_store_moves_while_it_is_written_to() {
    let server = EtcdServer::start();
    let directory = tempfile::tempdir().unwrap();
    let from: Arc<dyn Store> = Arc::new(Embedded::open(directory.path()).unwrap());
    let to = Etcd::open(&EtcdOptions::new(vec![server.endpoint()], "/bulkhead")).await.unwrap();
    filled(&*from).await;
    let (stop, mut stopped) = tokio::sync::watch::channel(false);
    let writer = {
        let from = Arc::clone(&from);
        tokio::spawn(async move {
            let mut number = 0_u32;
            while !*stopped.borrow_and_update() {
                number += 1;
                let transaction = Transaction::new()
                    .put(format!("/new/{}", number % 20), number.to_string(), Precondition::Any)
                    .put(format!("/text/{}", number % 20), number.to_string(), Precondition::Any)
                    .delete(format!("/new/{}", (number + 7) % 20), Precondition::Any);
                from.apply(transaction).await.unwrap();
                tokio::task::yield_now().await;
            }
        })
    };
    let mut migration = Migration::begin(&*from, &to, false).await.unwrap();
    assert_eq!(migration.objects, content(&to).await.len());
    for _ in 0..20 {
        migration.step().await.unwrap();
    }
    stop.send_replace(true);
    writer.await.unwrap();
    let last = from.revision().await.unwrap();
    assert_eq!(migration.finish().await.unwrap(), last);
    assert_eq!(content(&to).await, content(&*from).await);
    // And back, the other way round.
    let back = Memory::new();
    let migration = Migration::begin(&to, &back, false).await.unwrap();
    assert_eq!(migration.copied, Restored { revision: Revision(1), transactions: 1 });
    put(&to, "/late", b"late").await;
    migration.finish().await.unwrap();
    assert_eq!(content(&back).await, content(&to).await);
    let full = Migration::begin(&*from, &back, false).await.map(drop);
    assert!(matches!(full, Err(BackupError::NotEmpty(_))), "{full:?}");
}

#[tokio::test]
async fn a_copy_changes_nothing_in_a_store_that_cannot_take_it() {
    let source = Memory::new();
    filled(&source).await;
    let backup = Backup::take(&source).await.unwrap();
    let mut nameless = backup.clone();
    nameless.objects[7].key = "".into();
    let target = Memory::new();
    let refused = nameless.restore(&target, false).await;
    assert!(matches!(refused, Err(BackupError::Store(StoreError::Key(_)))), "{refused:?}");
    assert_eq!(target.revision().await.unwrap(), Revision(0));
}
