//! Strangers at the agents' port: many, silent, slow, with too much to say.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use bulkhead_identity::tls::{self, HANDSHAKE_TIME_MAX};
use bulkhead_identity::{JoinToken, Key};
use bulkhead_wire::proto::EnrollRequest;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tonic::Code;

use crate::harness::{Fixture, PATIENCE, Site};

/// Longest wait for what takes a limit of time: several of them, for machines that are busy.
const LONG: Duration = Duration::from_secs(120);

async fn metric(site: &Site, name: &str) -> u64 {
    let page = site.get("/metrics").await;
    let wanted = format!("bulkhead_{name} ");
    let line = page.as_str().unwrap().lines().find(|line| line.starts_with(&wanted));
    line.unwrap_or_else(|| panic!("no {name}")).rsplit(' ').next().unwrap().parse().unwrap()
}

async fn connect_from(from: [u8; 4], to: SocketAddr) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind((from, 0).into()).unwrap();
    socket.connect(to).await.unwrap()
}

fn request(token: &JoinToken, host: &str, signing_request: String) -> EnrollRequest {
    let (token_id, token_secret) = (token.id.clone(), token.secret.reveal());
    EnrollRequest { token_id, token_secret, host: host.into(), relay: false, signing_request }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stranger_may_say_a_few_kilobytes() {
    let fixture = Fixture::new().await;
    let (token, _) = fixture.token(json!({ "host": "h1" })).await;
    let mut nobody = fixture.client_over(fixture.nobody("h2"));
    let good = Key::generate().unwrap().request().unwrap();
    // What is around the request does not count for the authority, but for us.
    let padded = format!("{}\n{good}", "x".repeat(9 << 10));
    let refused = nobody.enroll(request(&token, "h1", padded)).await.unwrap_err();
    assert_eq!(refused.code(), Code::OutOfRange, "{refused}");
    let padded = format!("{}\n{good}", "x".repeat(4 << 10));
    nobody.enroll(request(&token, "h1", padded)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn who_tries_to_join_too_often_is_refused_and_agents_are_not() {
    let fixture = Fixture::new().await;
    let token = JoinToken::generate(fixture.authority().certificate());
    let mut nobody = fixture.client_over(fixture.nobody("h2"));
    let began = Instant::now();
    loop {
        let refused = nobody.enroll(request(&token, "h1", "none".into())).await.unwrap_err();
        match refused.code() {
            Code::InvalidArgument => assert!(began.elapsed() < LONG, "it must be refused"),
            Code::ResourceExhausted => break,
            // The time of a stranger is over.
            _ => nobody = fixture.client_over(fixture.nobody("h2")),
        }
    }
    assert!(metric(&fixture, "enrolls_refused_total").await > 0);
    fixture.agent("h1").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn many_strangers_of_one_address_leave_agents_their_places() {
    let fixture = Fixture::new().await;
    let nobody = fixture.nobody("h2");
    let mut open = Vec::new();
    let began = Instant::now();
    while metric(&fixture, "connections_refused_total{port=\"agents\"}").await == 0 {
        assert!(began.elapsed() < LONG, "there must be a bound");
        for _ in 0..20 {
            open.push(tls::connect(&fixture.agents.to_string(), &nobody).await.unwrap());
        }
    }
    let strangers = metric(&fixture, "connections_strangers{port=\"agents\"}").await;
    assert!(strangers <= 64, "{strangers}");
    fixture.agent("h1").await;
    // They go by themselves, since they say nothing.
    while metric(&fixture, "connections_strangers{port=\"agents\"}").await > 0 {
        assert!(began.elapsed() < LONG, "a stranger has half a minute");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let mut byte = [0];
    for mut stream in open {
        let ended = tokio::time::timeout(PATIENCE, async {
            while stream.read(&mut byte).await.is_ok_and(|length| length > 0) {}
        });
        ended.await.expect("all are closed");
    }
    fixture.agent("h2").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_address_that_is_silent_or_slow_in_its_handshakes_holds_up_nobody_else() {
    let fixture = Fixture::new().await;
    let mut silent = Vec::new();
    // More than all handshakes that there are at once.
    for _ in 0..1200 {
        silent.push(connect_from([127, 0, 0, 2], fixture.agents).await);
    }
    for stream in silent.iter_mut().take(50) {
        // The beginning of a handshake's record, and nothing more.
        stream.write_all(&[22, 3]).await.unwrap();
    }
    let began = Instant::now();
    fixture.agent("h1").await;
    println!("an agent was served {:?} after 1200 connections that say nothing", began.elapsed());
    assert!(metric(&fixture, "connections_pending{port=\"agents\"}").await > 0);
    while metric(&fixture, "connections_pending{port=\"agents\"}").await > 0 {
        assert!(began.elapsed() < HANDSHAKE_TIME_MAX + LONG, "their time is over");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert!(metric(&fixture, "handshakes_failed_total{port=\"agents\"}").await >= 1200);
}
