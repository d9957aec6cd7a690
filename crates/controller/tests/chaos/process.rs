//! A controller as a process of its own, to be killed. It is this test binary, started again with a variable.

use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::Relaxed;

use bulkhead_controller::{Config, relay, start};
use bulkhead_identity::tls::{self, ClientConfig};
use http_body_util::Full;
use hyper::body::Bytes;
use hyper::{Request, StatusCode};
use hyper_util::rt::TokioIo;
use serde_json::json;
use tokio::task::JoinHandle;

use crate::fleet::{V1, policy};
use crate::harness::Site;

const CHILD_CONFIG: &str = "BULKHEAD_CHAOS_CONTROLLER";
const CHILD_RELAY: &str = "BULKHEAD_CHAOS_RELAY";

/// What the child does: serves until it is killed.
#[tokio::test(flavor = "multi_thread")]
async fn child() {
    if let Ok(config) = std::env::var(CHILD_RELAY) {
        let mut relay = relay::start(serde_json::from_str(&config).unwrap()).await.unwrap();
        println!("serves {0} {0}", relay.agents);
        std::io::stdout().flush().unwrap();
        panic!("{}", relay.failed().await);
    }
    let Ok(config) = std::env::var(CHILD_CONFIG) else { return };
    let mut controller = start(serde_json::from_str(&config).unwrap()).await.unwrap();
    println!("serves {} {}", controller.api, controller.agents);
    std::io::stdout().flush().unwrap();
    panic!("{}", controller.failed().await);
}

pub(crate) struct Process {
    child: Child,
    pub(crate) site: Site,
}

impl Process {
    /// Starts one and waits until it serves.
    pub(crate) fn start(config: &Config) -> Self {
        let (child, api, agents) = spawn(CHILD_CONFIG, &serde_json::to_string(config).unwrap());
        Self { child, site: Site::at(api, agents, &config.identity_directory()) }
    }

    /// Starts a relay. What it is asked otherwise than by agents, `upstream` answers.
    pub(crate) fn relay(config: &relay::Config, upstream: &Site) -> Self {
        let (child, _, agents) = spawn(CHILD_RELAY, &serde_json::to_string(config).unwrap());
        Self { child, site: upstream.behind(agents) }
    }

    /// Writes policies `NAME0`, `NAME1`, … one after the other until it dies; `acknowledged` counts.
    pub(crate) fn write_until_it_dies(&self, name: &str, acknowledged: &Arc<AtomicUsize>) -> JoinHandle<()> {
        let admin = self.site.operator("root", &["bulkhead:admins"]);
        let (api, name, acknowledged) =
            (self.site.api.to_string(), name.to_owned(), Arc::clone(acknowledged));
        tokio::spawn(async move {
            loop {
                let text = policy(&format!("{name}{}", acknowledged.load(Relaxed)));
                if try_apply(&api, &admin, &text).await.is_none() {
                    return;
                }
                acknowledged.fetch_add(1, Relaxed);
            }
        })
    }

    /// As `kill -9` ends it.
    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may be dead already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Applies a file; `None` if there is no answer that says that it was done.
async fn try_apply(api: &str, admin: &Arc<ClientConfig>, text: &str) -> Option<()> {
    let body = json!({ "sources": [{ "name": "p.yaml", "text": text }] }).to_string();
    let stream = tls::connect(api, admin).await.ok()?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.ok()?;
    tokio::spawn(connection);
    let request = Request::post(format!("{V1}/apply")).header("host", "bulkhead");
    let answer = sender.send_request(request.body(Full::new(Bytes::from(body))).unwrap()).await.ok()?;
    (answer.status() == StatusCode::OK).then_some(())
}

/// This binary as a child, and where it serves operators and agents.
fn spawn(variable: &str, config: &str) -> (Child, SocketAddr, SocketAddr) {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["process::child", "--exact", "--nocapture"])
        .env(variable, config)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let addresses = lines.by_ref().map_while(Result::ok).find_map(|line| {
        let (_, addresses) = line.split_once("serves ")?;
        let (api, agents) = addresses.split_once(' ')?;
        Some((api.parse().unwrap(), agents.parse().unwrap()))
    });
    let (api, agents) = addresses.expect("the controller must start");
    // What it says later must not fill the pipe.
    std::thread::spawn(move || lines.for_each(drop));
    (child, api, agents)
}
