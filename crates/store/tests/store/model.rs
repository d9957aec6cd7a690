//! Random transactions against a plain map.

use std::collections::BTreeMap;

use bulkhead_store::{Embedded, Memory, OpKind, Precondition, Revision, Store, StoreError, Transaction};
use proptest::prelude::*;

#[derive(Debug, Default, Clone)]
struct Model {
    objects: BTreeMap<String, (Vec<u8>, u64, u64)>,
    revision: u64,
}

impl Model {
    /// Whether the transaction is applied.
    fn apply(&mut self, transaction: &Transaction) -> bool {
        let holds = transaction.ops.iter().all(|op| {
            let modified = self.objects.get(&*op.key).map(|(_, _, modified)| *modified);
            match op.precondition {
                Precondition::Any => true,
                Precondition::Absent => modified.is_none(),
                Precondition::Present => modified.is_some(),
                Precondition::AtRevision(revision) => modified == Some(revision.0),
            }
        });
        if !holds {
            return false;
        }
        let next = self.revision + 1;
        for op in &transaction.ops {
            match &op.kind {
                OpKind::Put(value) | OpKind::PutUnder(value, _) => {
                    let created = self.objects.get(&*op.key).map_or(next, |(_, created, _)| *created);
                    self.objects.insert(op.key.to_string(), (value.to_vec(), created, next));
                    self.revision = next;
                }
                OpKind::Delete => {
                    if self.objects.remove(&*op.key).is_some() {
                        self.revision = next;
                    }
                }
            }
        }
        true
    }
}

fn transaction() -> impl Strategy<Value = Transaction> {
    let precondition = prop_oneof![
        3 => Just(Precondition::Any),
        1 => Just(Precondition::Absent),
        2 => Just(Precondition::Present),
        1 => (0_u64..40).prop_map(|revision| Precondition::AtRevision(Revision(revision))),
    ];
    let op = (precondition, prop::option::of(prop::collection::vec(any::<u8>(), 0..20)));
    prop::collection::btree_map(0_u8..12, op, 0..5).prop_map(|ops| {
        ops.into_iter().fold(Transaction::new(), |transaction, (key, (when, value))| {
            let key = format!("/{key:02}");
            match value {
                Some(value) => transaction.put(key, value, when),
                None => transaction.delete(key, when),
            }
        })
    })
}

async fn same(store: &dyn Store, model: &Model) {
    let (objects, revision) = store.list("").await.unwrap();
    let found: BTreeMap<_, _> = objects
        .into_iter()
        .map(|object| (object.key.to_string(), (object.value.to_vec(), object.created.0, object.modified.0)))
        .collect();
    assert_eq!((found, revision.0), (model.objects.clone(), model.revision));
}

/// Replaying the whole log gives the same objects.
async fn log_replays(store: &dyn Store, model: &Model) {
    let mut watch = store.watch("", Revision(0)).await.unwrap();
    let mut replayed = BTreeMap::new();
    while watch.position().0 < model.revision {
        for commit in watch.next().await.unwrap() {
            for change in &commit.changes {
                match &change.object {
                    Some(object) => replayed.insert(change.key.to_string(), object.value.to_vec()),
                    None => replayed.remove(&*change.key),
                };
            }
        }
    }
    let expected: BTreeMap<_, _> =
        model.objects.iter().map(|(key, (value, ..))| (key.clone(), value.clone())).collect();
    assert_eq!(replayed, expected);
}

async fn drive(store: &dyn Store, model: &mut Model, transactions: &[Transaction]) {
    for transaction in transactions {
        let expected = model.apply(transaction);
        match store.apply(transaction.clone()).await {
            Ok(applied) => assert!(expected && applied.revision.0 == model.revision),
            Err(StoreError::Conflict { .. }) => assert!(!expected, "{transaction:?}"),
            Err(error) => panic!("{error}"),
        }
    }
    same(store, model).await;
    log_replays(store, model).await;
}

fn block_on(test: impl Future<Output = ()>) {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(test);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn memory_is_a_map(transactions in prop::collection::vec(transaction(), 0..60)) {
        block_on(async { drive(&Memory::new(), &mut Model::default(), &transactions).await });
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn embedded_is_a_map_over_reopening(
        before in prop::collection::vec(transaction(), 0..20),
        after in prop::collection::vec(transaction(), 0..20),
    ) {
        let directory = tempfile::tempdir().unwrap();
        block_on(async {
            let mut model = Model::default();
            for transactions in [&before, &after] {
                let store = Embedded::open(directory.path()).unwrap();
                same(&store, &model).await;
                drive(&store, &mut model, transactions).await;
            }
            let store = Embedded::open(directory.path()).unwrap();
            same(&store, &model).await;
            log_replays(&store, &model).await;
        });
    }
}
