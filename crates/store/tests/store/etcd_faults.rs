//! Answers that are lost, and certificates, on the way to a real etcd.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use bulkhead_store::{Etcd, EtcdOptions, Precondition, Revision, Store, StoreError, Transaction};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::etcd_server::EtcdServer;

/// Passes bytes on to etcd, and breaks connections off at what etcd says while told to.
struct Proxy {
    address: String,
    cutting: Arc<AtomicBool>,
    cuts: Arc<AtomicUsize>,
}

impl Proxy {
    async fn before(server: String) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (cutting, cuts) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let proxy = Self { address, cutting: Arc::clone(&cutting), cuts: Arc::clone(&cuts) };
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let server = TcpStream::connect(&server).await.unwrap();
                tokio::spawn(pass_on(client, server, Arc::clone(&cutting), Arc::clone(&cuts)));
            }
        });
        proxy
    }
}

async fn pass_on(client: TcpStream, server: TcpStream, cutting: Arc<AtomicBool>, cuts: Arc<AtomicUsize>) {
    let (mut from_client, mut to_client) = client.into_split();
    let (mut from_server, mut to_server) = server.into_split();
    let up = async { tokio::io::copy(&mut from_client, &mut to_server).await.map(drop) };
    let down = async {
        let mut bytes = vec![0; 64 << 10];
        loop {
            let count = from_server.read(&mut bytes).await?;
            if count == 0 {
                return Ok(());
            }
            if cutting.swap(false, Ordering::Relaxed) {
                cuts.fetch_add(1, Ordering::Relaxed);
                return Ok(());
            }
            to_client.write_all(&bytes[..count]).await?;
        }
    };
    let _broken: std::io::Result<()> = tokio::select! {
        result = up => result,
        result = down => result,
    };
}

/// A single writer counts by compare-and-set while what etcd answers is lost again and again. A request that was applied
/// twice, or an applied one that was taken for refused, would be a conflict.
#[tokio::test(flavor = "multi_thread")]
async fn lost_answers_apply_nothing_twice() {
    const INCREMENTS: usize = 60;
    let server = EtcdServer::start();
    let proxy = Proxy::before(server.endpoint()).await;
    let store = Etcd::open(&EtcdOptions::new(vec![proxy.address.clone()], "/bulkhead")).await.unwrap();
    let mut at = store.apply(Transaction::new().put("/n", "0", Precondition::Absent)).await.unwrap().revision;
    let mut watch = store.watch("/", at).await.unwrap();
    for number in 1..=INCREMENTS {
        proxy.cutting.store(number % 3 != 0, Ordering::Relaxed);
        let value = number.to_string();
        let transaction = Transaction::new().put("/n", value, Precondition::AtRevision(at));
        let applied = store.apply(transaction).await.unwrap();
        assert!(applied.changed && applied.revision > at, "{applied:?}");
        at = applied.revision;
        // A refusal must be one, however often its answer is lost.
        proxy.cutting.store(number % 2 == 0, Ordering::Relaxed);
        let refused =
            store.apply(Transaction::new().delete("/n", Precondition::AtRevision(Revision(1)))).await;
        match refused {
            Err(StoreError::Conflict { found, .. }) => assert_eq!(found, Some(at)),
            other => panic!("{other:?}"),
        }
        proxy.cutting.store(number % 5 == 0, Ordering::Relaxed);
        let removed = store.apply(Transaction::new().delete("/none", Precondition::Any)).await.unwrap();
        assert!(!removed.changed, "there was nothing to remove");
    }
    proxy.cutting.store(false, Ordering::Relaxed);
    assert!(proxy.cuts.load(Ordering::Relaxed) > INCREMENTS / 2, "answers were lost");
    let mark = store.mark().await.unwrap();
    let commits = watch.until(mark).await.unwrap();
    let values: Vec<_> = commits
        .iter()
        .map(|commit| String::from_utf8_lossy(&commit.changes[0].object.as_ref().unwrap().value).into_owned())
        .collect();
    let expected: Vec<_> = (1..=INCREMENTS).map(|number| number.to_string()).collect();
    assert_eq!(values, expected, "each once, in order, over all connections");
}

fn openssl(directory: &Path, arguments: &str) {
    let output = Command::new("openssl").args(arguments.split_whitespace()).current_dir(directory).output();
    let output = output.expect("openssl is needed: make test-deps installs it");
    assert!(output.status.success(), "{arguments}: {}", String::from_utf8_lossy(&output.stderr));
}

#[tokio::test(flavor = "multi_thread")]
async fn over_tls_both_ends_show_certificates() {
    let directory = tempfile::tempdir().unwrap();
    let key = "-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes";
    for authority in ["ca", "other"] {
        let files = format!("-keyout {authority}.key -out {authority}.crt -days 2 -subj /CN={authority}");
        openssl(directory.path(), &format!("req -x509 {key} {files}"));
    }
    std::fs::write(directory.path().join("names"), "subjectAltName=IP:127.0.0.1\n").unwrap();
    for name in ["server", "client"] {
        openssl(directory.path(), &format!("req {key} -keyout {name}.key -out {name}.csr -subj /CN={name}"));
        let by = "-CA ca.crt -CAkey ca.key -CAcreateserial -days 2 -extfile names";
        openssl(directory.path(), &format!("x509 -req -in {name}.csr {by} -out {name}.crt"));
    }
    let file = |name: &str| directory.path().join(name);
    let flag = |name: &str| file(name).display().to_string();
    let server = EtcdServer::with(&[
        "--cert-file",
        &flag("server.crt"),
        "--key-file",
        &flag("server.key"),
        "--trusted-ca-file",
        &flag("ca.crt"),
        "--client-cert-auth",
    ]);
    let with = EtcdOptions {
        ca_file: Some(file("ca.crt")),
        cert_file: Some(file("client.crt")),
        key_file: Some(file("client.key")),
        ..EtcdOptions::new(vec![server.endpoint()], "/bulkhead")
    };
    let store = Etcd::open(&with).await.unwrap();
    let at = store.apply(Transaction::new().put("/a", "1", Precondition::Absent)).await.unwrap().revision;
    let mut watch = store.watch("/", Revision(0)).await.unwrap();
    assert_eq!(watch.until(at).await.unwrap().len(), 1);

    let stranger = EtcdOptions { ca_file: Some(file("other.crt")), ..with.clone() };
    let nobody = EtcdOptions { cert_file: None, key_file: None, ..with };
    let (stranger, nobody) = tokio::join!(Etcd::open(&stranger), Etcd::open(&nobody));
    assert!(matches!(stranger, Err(StoreError::Unavailable { .. })), "{stranger:?}");
    assert!(matches!(nobody, Err(StoreError::Unavailable { .. })), "{nobody:?}");
}
