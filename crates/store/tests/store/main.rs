//! The conformance suite on every engine, random transactions against a model, and what only a file must do.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod backup;
mod crash;
mod embedded;
mod etcd;
mod etcd_faults;
mod etcd_server;
mod full;
mod linearizable;
mod model;
mod small_disk;

use std::sync::Arc;

use bulkhead_store::conformance::{self, Revisions};
use bulkhead_store::{Embedded, Memory, Store};

#[tokio::test(flavor = "multi_thread")]
async fn memory_conforms() {
    conformance::run_all(Revisions::Dense, || async { Arc::new(Memory::new()) as Arc<dyn Store> }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn embedded_conforms() {
    let directory = tempfile::tempdir().unwrap();
    let count = std::sync::atomic::AtomicUsize::new(0);
    conformance::run_all(Revisions::Dense, || async {
        let number = count.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        Arc::new(Embedded::open(directory.path().join(number.to_string())).unwrap()) as Arc<dyn Store>
    })
    .await;
}
