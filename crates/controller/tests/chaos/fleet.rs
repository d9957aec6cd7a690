//! Agents that speak the real protocol, come back by themselves, and remember what they are told.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bulkhead_controller::Config;
use bulkhead_identity::tls::{self, ClientConfig};
use bulkhead_identity::{Authority, Identity};
use bulkhead_wire::proto::agent_message::Body as Up;
use bulkhead_wire::proto::controller_message::Body as Down;
use bulkhead_wire::proto::distribution_client::DistributionClient;
use bulkhead_wire::proto::{self, AgentMessage, AgentStatus, Hello, Inventory, Subscribe};
use bulkhead_wire::{is_elsewhere, when_to_come_back};
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;
use tonic::transport::Endpoint;

use crate::etcd_server::EtcdServer;
use crate::harness::{Site, credentials, etcd_config};

pub(crate) const V1: &str = "/apis/bulkhead.dev/v1";
/// Longest that a fleet may take until it knows everything: every test is to be done in half a minute.
pub(crate) const CONVERGES: Duration = Duration::from_secs(25);
/// How often agents say that they are there: several times in the shortest lease of a test.
const BEAT_EVERY: Duration = Duration::from_millis(500);
/// Roles of workloads, of which an agent reads one: five in a small fleet, and so many that none has more workloads than this in
/// a large one.
const ROLES_MIN: usize = 5;
const ROLE_LEN_MAX: usize = 60;

/// The configuration of one of several controllers.
pub(crate) fn one_of(etcd: &[EtcdServer], name: &str) -> Config {
    let first = &etcd[0];
    let shared: PathBuf = first.directory().join("identity");
    let mut config = Config {
        name: name.into(),
        data_directory: first.directory().join(name),
        identity_directory: Some(shared),
        controller_lease_ms: 2000,
        lease_ms: 20_000,
        ..etcd_config(first)
    };
    config.etcd.endpoints = etcd.iter().map(EtcdServer::endpoint).collect();
    config
}

/// What an agent knows as of its last barrier.
#[derive(Debug, Clone, Default, PartialEq)]
struct Known {
    epoch: String,
    revision: u64,
    /// Name and generation of policies.
    policies: BTreeMap<String, u64>,
    members: BTreeMap<String, Vec<Vec<u8>>>,
}

#[derive(Debug, Default)]
struct Seen {
    known: Known,
    /// Where it has a session that has told everything.
    at: Option<SocketAddr>,
    sessions: u64,
}

struct Player {
    host: String,
    number: usize,
    /// Roles of the whole fleet.
    roles: usize,
    tls: Arc<ClientConfig>,
    seen: Mutex<Seen>,
    /// How long it takes for each message.
    slow: Duration,
}

pub(crate) struct Fleet {
    players: Vec<Arc<Player>>,
    controllers: watch::Sender<Vec<SocketAddr>>,
    _tasks: JoinSet<()>,
}

impl Fleet {
    /// So many agents, which begin at the controllers in turn. One of a hundred, and the first, are slow readers.
    pub(crate) fn start(count: usize, controllers: &[&Site], authority: &Authority) -> Self {
        let addresses = controllers.iter().map(|site| site.agents).collect();
        let (controllers, mut tasks) = (watch::Sender::new(addresses), JoinSet::new());
        let roles = count.div_ceil(ROLE_LEN_MAX).max(ROLES_MIN);
        let player = |number| {
            let host = format!("h{number}");
            let own = credentials(authority, &Identity::agent(&host).unwrap());
            let tls = tls::client_config(authority.bundle(), Some(&own), "h2").unwrap();
            let slow = Duration::from_millis(if number % 100 == 0 { 20 } else { 0 });
            Arc::new(Player { host, number, roles, tls, seen: Mutex::default(), slow })
        };
        let players: Vec<_> = (0..count).map(player).collect();
        for player in &players {
            tasks.spawn(Arc::clone(player).play(controllers.subscribe()));
        }
        Self { players, controllers, _tasks: tasks }
    }

    /// Where controllers are from now on, for whoever loses his.
    pub(crate) fn knows(&self, controllers: &[&Site]) {
        self.controllers.send_replace(controllers.iter().map(|site| site.agents).collect());
    }

    /// Waits until all agents know what the repository holds, with sessions at one of `at`; answers how long that took.
    pub(crate) async fn converges(&self, repository: &Site, at: &[&Site]) -> Duration {
        self.converges_within(CONVERGES, repository, at).await
    }

    /// The same with another patience.
    pub(crate) async fn converges_within(
        &self,
        patience: Duration,
        repository: &Site,
        at: &[&Site],
    ) -> Duration {
        let began = Instant::now();
        loop {
            // Lists are long in a large fleet: asked for only when there is a chance.
            let away = self.players.iter().find_map(|player| player.away(at));
            let wrong = match away {
                Some(away) => Some(away),
                None => {
                    let wanted = Wanted::of(repository).await;
                    self.players.iter().find_map(|player| player.wrong(&wanted))
                }
            };
            match wrong {
                None => return began.elapsed(),
                Some(wrong) if began.elapsed() > patience => panic!("{wrong}"),
                Some(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
    }

    /// Waits until the store says of every host that one of these controllers serves it.
    pub(crate) async fn is_registered(&self, site: &Site, at: &[&str]) {
        let began = Instant::now();
        loop {
            let status = site.get(&format!("{V1}/status?local=true")).await;
            let controllers = site.get(&format!("{V1}/status")).await["controllers"].clone();
            let of = |one: &Value| one["agents"].as_u64().unwrap();
            let named = |one: &&Value| at.contains(&one["name"].as_str().unwrap());
            let all = controllers.as_array().unwrap();
            let sum: u64 = all.iter().filter(named).map(of).sum();
            if sum == self.players.len() as u64 && all.iter().map(of).sum::<u64>() == sum {
                return;
            }
            assert!(began.elapsed() < CONVERGES, "{controllers} {}", status["controller"]);
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Sessions that have told everything, since the beginning.
    pub(crate) fn sessions(&self) -> u64 {
        self.players.iter().map(|player| player.seen.lock().unwrap().sessions).sum()
    }
}

/// What the repository says that agents must know.
struct Wanted {
    /// Name and generation.
    policies: BTreeMap<String, u64>,
    /// Role, host and name of workloads.
    roles: BTreeMap<String, BTreeMap<String, String>>,
}

impl Wanted {
    async fn of(repository: &Site) -> Self {
        let name = |object: &Value| object["metadata"]["name"].as_str().unwrap().to_owned();
        let policies = list(repository, "policies").await;
        let generation = |policy: &Value| policy["metadata"]["generation"].as_u64().unwrap();
        let policies = policies.iter().map(|policy| (name(policy), generation(policy))).collect();
        let mut roles: BTreeMap<String, BTreeMap<String, String>> = BTreeMap::new();
        for workload in list(repository, "workloads").await {
            let Some(role) = workload["metadata"]["labels"]["role"].as_str() else { continue };
            let host = workload["spec"]["host"].as_str().unwrap().to_owned();
            roles.entry(role.to_owned()).or_default().insert(host, format!("Workload/{}", name(&workload)));
        }
        Self { policies, roles }
    }
}

async fn list(site: &Site, plural: &str) -> Vec<Value> {
    site.get(&format!("{V1}/{plural}")).await["items"].as_array().unwrap().clone()
}

/// A policy that says nothing about anybody.
pub(crate) fn policy(name: &str) -> String {
    format!(
        "apiVersion: bulkhead.dev/v1\nkind: Policy\nmetadata: {{name: {name}}}\n\
         spec: {{appliesTo: role == 'none', ingress: [{{action: Allow}}]}}\n"
    )
}

impl Player {
    fn role(&self) -> String {
        format!("r{}", self.number % self.roles)
    }

    fn read_role(&self) -> String {
        format!("r{}", (self.number + 1) % self.roles)
    }

    fn address(&self) -> String {
        format!("10.1.{}.{}", self.number / 250, self.number % 250 + 1)
    }

    /// Where it is, if it has no session at one of `at`.
    fn away(&self, at: &[&Site]) -> Option<String> {
        let there = self.seen.lock().unwrap().at;
        let away = !at.iter().any(|site| Some(site.agents) == there);
        away.then(|| format!("{} is at {there:?}", self.host))
    }

    /// What it does not know, or wrongly.
    fn wrong(&self, wanted: &Wanted) -> Option<String> {
        let seen = self.seen.lock().unwrap();
        let host = &self.host;
        if seen.at.is_none() {
            return Some(format!("{host} has lost its session"));
        }
        let Wanted { policies, roles } = wanted;
        if seen.known.policies != *policies {
            return Some(format!("{host} knows policies {:?}, not {policies:?}", seen.known.policies));
        }
        if !roles.get(&self.role()).is_some_and(|all| all.contains_key(host)) {
            return Some(format!("w.{host} is not in the repository"));
        }
        let read = roles.get(&self.read_role()).into_iter().flatten();
        let mut wanted: Vec<&String> = read.filter(|(of, _)| *of != host).map(|(_, name)| name).collect();
        wanted.sort();
        let found: Vec<_> = seen.known.members.keys().collect();
        (found != wanted).then(|| format!("{host} knows {} members, not {}", found.len(), wanted.len()))
    }

    async fn play(self: Arc<Self>, controllers: watch::Receiver<Vec<SocketAddr>>) {
        let mut turn = self.number;
        loop {
            let address = {
                let all = controllers.borrow();
                all[turn % all.len()]
            };
            let status = match self.converse(address).await {
                Ok(()) => Status::unavailable("closed"),
                Err(status) => status,
            };
            self.seen.lock().unwrap().at = None;
            let told = when_to_come_back(&status);
            if told.is_none() || is_elsewhere(&status) {
                turn += 1;
            }
            // Spread as the real agent's first attempts are.
            let back_off = Duration::from_millis(50 + self.number as u64 % 50);
            tokio::time::sleep(told.unwrap_or(back_off)).await;
        }
    }

    async fn converse(&self, address: SocketAddr) -> Result<(), Status> {
        let (up, messages) = mpsc::channel(64);
        let say = async |body| {
            let gone = |_closed| Status::unavailable("gone");
            up.send(AgentMessage { body: Some(body) }).await.map_err(gone)
        };
        let known = self.seen.lock().unwrap().known.clone();
        let hello = Hello {
            protocol: bulkhead_wire::PROTOCOL,
            host: self.host.clone(),
            epoch: known.epoch.clone(),
            revision: known.revision,
            ..Hello::default()
        };
        say(Up::Hello(hello)).await?;
        let selector = format!("role == '{}'", self.read_role());
        let subscribe = Subscribe { handle: 1, selector, revision: known.revision };
        say(Up::Subscribe(subscribe)).await?;
        let workload = json!({
            "apiVersion": "bulkhead.dev/v1",
            "kind": "Workload",
            "metadata": { "name": format!("w.{}", self.host), "labels": { "role": self.role() } },
            "spec": { "host": self.host, "addresses": [self.address()] },
        });
        let upserts = vec![Bytes::from(workload.to_string())];
        say(Up::Inventory(Inventory { generation: 1, complete: true, upserts, ..Inventory::default() }))
            .await?;
        let tls = Arc::clone(&self.tls);
        let connector = tower::service_fn(move |_uri| {
            let tls = Arc::clone(&tls);
            async move { tls::connect_as_agent(&address.to_string(), &tls).await.map(TokioIo::new) }
        });
        let channel = Endpoint::from_static("http://controller").connect_with_connector_lazy(connector);
        let mut client = DistributionClient::new(channel);
        let mut down = client.sync(ReceiverStream::new(messages)).await?.into_inner();
        let mut waiting = Vec::new();
        let mut heard_members = false;
        let mut beats = tokio::time::interval(BEAT_EVERY);
        loop {
            let message = tokio::select! {
                message = down.message() => message?,
                _ = beats.tick() => {
                    say(Up::Status(AgentStatus::default())).await?;
                    continue;
                }
            };
            let Some(body) = message.and_then(|message| message.body) else { return Ok(()) };
            tokio::time::sleep(self.slow).await;
            match body {
                Down::Welcome(welcome) => self.seen.lock().unwrap().known.epoch = welcome.epoch,
                Down::Synced(proto::Synced { revision }) => {
                    heard_members |= waiting.iter().any(|body| matches!(body, Down::Members(_)));
                    let mut seen = self.seen.lock().unwrap();
                    waiting.drain(..).for_each(|body| seen.known.take_in(body));
                    if heard_members {
                        seen.known.revision = revision;
                        seen.sessions += u64::from(seen.at.is_none());
                        seen.at = Some(address);
                    }
                }
                other => waiting.push(other),
            }
        }
    }
}

impl Known {
    fn take_in(&mut self, body: Down) {
        match body {
            Down::Resources(resources) => {
                if resources.snapshot {
                    self.policies.clear();
                }
                for bytes in &resources.upserts {
                    let object: Value = serde_json::from_slice(bytes).unwrap();
                    let metadata = &object["metadata"];
                    let name = metadata["name"].as_str().unwrap().to_owned();
                    self.policies.insert(name, metadata["generation"].as_u64().unwrap());
                }
                for key in &resources.removes {
                    self.policies.remove(&key.name);
                }
            }
            Down::Members(members) => {
                if members.snapshot {
                    self.members.clear();
                }
                for member in members.joins {
                    let prefixes = member.prefixes.into_iter().map(|prefix| prefix.address.to_vec());
                    self.members.insert(member.entity, prefixes.collect());
                }
                for name in &members.leaves {
                    self.members.remove(name);
                }
            }
            Down::InventoryAck(ack) => assert!(ack.refused.is_empty(), "{ack:?}"),
            Down::Welcome(_) | Down::Synced(_) | Down::Revocations(_) => {}
        }
    }
}
