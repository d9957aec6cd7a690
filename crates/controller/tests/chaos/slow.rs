//! Agents that read nothing, or a byte a second.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use crate::disks::metric;
use crate::fleet::policy;
use crate::harness::{Fixture, Site, config};

/// What the documentation says: whoever takes no message for ten seconds is cut off. Buffers on the way fill first.
const CUT_OFF_WITHIN: Duration = Duration::from_secs(120);
/// Longest that anybody else may wait for a change meanwhile: far more than it takes.
const OTHERS_WAIT_MAX: Duration = Duration::from_secs(8);
/// Answers with [`TOLD`] members each: more than the buffers of both ends hold.
const UNREAD: u32 = 5000;
const TOLD: u32 = 50;

/// A way to the controller, on which from some moment on so many bytes a second come back.
async fn way(to: SocketAddr, bytes_per_second: usize) -> (SocketAddr, watch::Sender<bool>) {
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    let (slow, is_slow) = watch::channel(false);
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            let (server, is_slow) = (TcpStream::connect(to).await.unwrap(), is_slow.clone());
            let ((mut from_client, mut to_client), (mut from_server, mut to_server)) =
                (client.into_split(), server.into_split());
            tokio::spawn(async move { tokio::io::copy(&mut from_client, &mut to_server).await });
            tokio::spawn(async move {
                let mut buffer = vec![0; 64 << 10];
                loop {
                    let slow = *is_slow.borrow();
                    if slow {
                        tokio::time::sleep(Duration::from_secs(1)).await;
                    }
                    if slow && bytes_per_second == 0 {
                        continue;
                    }
                    let length = if slow { bytes_per_second } else { buffer.len() };
                    let Ok(length @ 1..) = from_server.read(&mut buffer[..length]).await else { return };
                    if to_client.write_all(&buffer[..length]).await.is_err() {
                        return;
                    }
                }
            });
        }
    });
    (address, slow)
}

async fn cut_off(bytes_per_second: usize) {
    let identity = tempfile::tempdir().unwrap();
    let directory = identity.path().to_owned();
    let fixture =
        Fixture::with(bulkhead_controller::Config { identity_directory: Some(directory), ..config() }).await;
    let mut writer = fixture.agent("h2").await;
    writer.publish(true, &[("web.h2", "h2", json!({ "role": "web" }), "10.0.0.2")], &[]).await;
    let mut other = fixture.agent("h3").await;
    other.subscribe("role == 'web'", 0).await;

    let (address, slow) = way(fixture.agents, bytes_per_second).await;
    let through = Site::at(fixture.api, address, identity.path());
    let mut reader = through.agent_at("h1", "", 0).await;
    let epoch = reader.welcomed().await.epoch;
    reader.batch().await;
    let revision = reader.subscribe("role == 'web'", 0).await.revision;
    slow.send_replace(true);
    let names: Vec<String> = (0..TOLD).map(|number| format!("many-{number}.h2")).collect();
    let many: Vec<_> =
        names.iter().map(|name| (name.as_str(), "h2", json!({ "role": "many" }), "10.0.1.1")).collect();
    writer.publish(false, &many, &[]).await;
    let began = Instant::now();
    let asking = async {
        for number in 0..UNREAD {
            reader.ask(number + 100, &format!("role in {{'many', 'nobody-{number}'}}")).await;
        }
    };
    // What it asks is read as far as its answers are taken: it may be cut off before it is through.
    tokio::select! {
        () = asking => {}
        () = tokio::time::sleep(Duration::from_secs(5)) => {}
    }
    let (mut longest, mut number) = (Duration::ZERO, 0);
    while metric(&fixture, "agent_sessions_cut_off_total").await == 0 {
        assert!(began.elapsed() < CUT_OFF_WITHIN, "it must be cut off");
        let asked = Instant::now();
        fixture.apply(&policy(&format!("p{number}"))).await;
        let heard = other.batch().await;
        assert_eq!(heard.resources.len(), 1, "{heard:?}");
        longest = longest.max(asked.elapsed());
        number += 1;
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    println!(
        "cut off after {:?}; another heard {number} changes, the last of all {longest:?} after",
        began.elapsed()
    );
    assert!(number > 0 && longest < OTHERS_WAIT_MAX, "{longest:?}");

    // It comes back on a better way, and hears what has changed.
    drop(reader);
    let mut reader = fixture.agent_at("h1", &epoch, revision).await;
    reader.welcomed().await;
    let batch = reader.batch().await;
    assert!(!batch.resources[0].snapshot, "{batch:?}");
    let heard: usize = batch.resources.iter().map(|part| part.upserts.len()).sum();
    assert_eq!(heard, number, "the policies since, and nothing else");
    let batch = reader.subscribe("role == 'web'", revision).await;
    assert!(!batch.members[0].snapshot && batch.joins().is_empty(), "{batch:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_reads_nothing_is_cut_off_while_others_go_on_and_resumes() {
    cut_off(0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_reads_a_byte_a_second_is_cut_off_while_others_go_on_and_resumes() {
    cut_off(1).await;
}
