//! Whatever happens in whatever order, an agent that follows the protocol knows at each barrier exactly what
//! a look at the whole repository would show it.

mod model;

use std::collections::{BTreeMap, BTreeSet};

use bulkhead_model::entity::WorkloadSpec;
use bulkhead_model::policy::{DefaultAction, Order, TierSpec};
use bulkhead_model::resource::{Metadata, Tier, Workload};
use bulkhead_model::{Entity, Kind, Labels, ObjectKey, Resource};
use bulkhead_store::Memory;
use bulkhead_wire::proto::controller_message::Body;
use proptest::prelude::*;

use super::*;
use crate::repository::Repository;

const HOSTS: [&str; 3] = ["h1", "h2", "h3"];
const SELECTORS: [&str; 4] = ["role == 'a'", "has(role)", "bulkhead.dev/host == 'h2'", "role != 'a'"];

#[derive(Debug, Clone)]
enum Step {
    /// Workload (number on host) gets a role (0: none) and an address.
    Workload(u8, u8, u8, u8),
    Gone(u8, u8),
    Tier(u8, bool),
    Subscribe(usize, usize),
    Unsubscribe(usize, usize),
    /// The agent is told what there is.
    Tell(usize),
    /// The session breaks and the agent comes back with what it knows.
    Reconnect(usize),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (0_u8..3, 0_u8..3, 0_u8..3, 0_u8..4).prop_map(|(n, h, r, a)| Step::Workload(n, h, r, a)),
        3 => (0_u8..3, 0_u8..3).prop_map(|(n, h)| Step::Gone(n, h)),
        1 => (0_u8..3, any::<bool>()).prop_map(|(n, there)| Step::Tier(n, there)),
        2 => (0_usize..2, 0_usize..4).prop_map(|(agent, selector)| Step::Subscribe(agent, selector)),
        1 => (0_usize..2, 0_usize..4).prop_map(|(agent, selector)| Step::Unsubscribe(agent, selector)),
        4 => (0_usize..2).prop_map(Step::Tell),
        1 => (0_usize..2).prop_map(Step::Reconnect),
    ]
}

type Known = BTreeMap<String, Vec<proto::Prefix>>;

/// An agent as the protocol asks for it.
struct Agent {
    host: &'static str,
    pump: Pump,
    /// Complete up to here.
    revision: u64,
    tiers: BTreeSet<String>,
    members: BTreeMap<u32, Known>,
}

fn subscriber(id: u64, host: &str) -> Arc<Subscriber> {
    Arc::new(Subscriber::new(id, host.into()))
}

impl Agent {
    fn hear(&mut self, messages: Vec<Body>) {
        for message in messages {
            match message {
                Body::Resources(resources) => {
                    if resources.snapshot {
                        self.tiers.clear();
                    }
                    for json in &resources.upserts {
                        let json: serde_json::Value = serde_json::from_slice(json).unwrap();
                        self.tiers.insert(json["metadata"]["name"].as_str().unwrap().to_owned());
                    }
                    for key in &resources.removes {
                        self.tiers.remove(&key.name);
                    }
                }
                Body::Members(members) => {
                    let known = self.members.get_mut(&members.handle).unwrap();
                    if members.snapshot {
                        known.clear();
                    }
                    for join in members.joins {
                        assert_ne!(join.host, self.host, "never of its own host");
                        known.insert(join.entity, join.prefixes);
                    }
                    for leave in &members.leaves {
                        known.remove(leave);
                    }
                }
                Body::Synced(synced) => self.revision = synced.revision,
                Body::Welcome(_) | Body::InventoryAck(_) | Body::Revocations(_) => {}
            }
        }
    }

    fn check(&self, view: &View) {
        let tiers: BTreeSet<_> = view
            .of_kind(Kind::Tier)
            .filter(|tier| tier.modified > 0)
            .map(|tier| tier.resource.metadata().name.clone())
            .collect();
        assert_eq!(self.tiers, tiers);
        for (handle, known) in &self.members {
            let selector = Selector::parse(SELECTORS[*handle as usize]).unwrap();
            let expected: Known = view
                .of_kind(Kind::Workload)
                .filter_map(|object| Entity::of(&object.resource))
                .filter(|entity| selector.matches(&entity.labels))
                .filter(|entity| entity.host.as_deref() != Some(self.host))
                .map(|entity| {
                    let prefixes = entity.prefixes.iter().copied().map(bulkhead_wire::prefix_to_wire);
                    (entity.name.to_string(), prefixes.collect())
                })
                .collect();
            assert_eq!(*known, expected, "{selector} at {}", self.host);
        }
    }
}

fn workload(number: u8, host: u8, role: u8, address: u8) -> Resource {
    let host = HOSTS[usize::from(host)];
    let mut labels = Labels::new();
    if role > 0 {
        labels.insert("role", if role == 1 { "a" } else { "b" }).unwrap();
    }
    let metadata = Metadata { name: format!("w{number}.{host}"), labels, ..Metadata::default() };
    let addresses = vec![[10, 0, 0, address].into()];
    Resource::Workload(Workload {
        metadata,
        spec: WorkloadSpec { host: host.into(), addresses, ..WorkloadSpec::default() },
    })
}

fn tier(number: u8) -> Resource {
    let metadata = Metadata { name: format!("t{number}"), ..Metadata::default() };
    let spec = TierSpec { order: Order::new(f64::from(number)), default_action: DefaultAction::Deny };
    Resource::Tier(Tier { metadata, spec })
}

fn gone(kind: Kind, name: String) -> ObjectKey {
    ObjectKey { kind, namespace: None, name }
}

async fn publish(repository: &Repository, upserts: Vec<Resource>, removes: Vec<ObjectKey>) {
    let (transaction, _written) = repository.publication(upserts, removes);
    repository.store().apply(transaction).await.unwrap();
    repository.catch_up().await;
}

async fn play(steps: Vec<Step>) {
    let repository = Repository::open(Arc::new(Memory::new())).await.unwrap();
    let mut next_session = 0;
    let mut connect = |host: &str, known| {
        next_session += 1;
        let subscriber = subscriber(next_session, host);
        repository.view_mut().add_session(&subscriber);
        Pump::new(subscriber, known, false)
    };
    let mut agents: Vec<Agent> = ["h1", "h2"]
        .map(|host| Agent {
            host,
            pump: connect(host, None),
            revision: 0,
            tiers: BTreeSet::new(),
            members: BTreeMap::new(),
        })
        .into();
    for step in steps {
        match step {
            Step::Workload(number, host, role, address) => {
                publish(&repository, vec![workload(number, host, role, address)], Vec::new()).await;
            }
            Step::Gone(number, host) => {
                let name = format!("w{number}.{}", HOSTS[usize::from(host)]);
                publish(&repository, Vec::new(), vec![gone(Kind::Workload, name)]).await;
            }
            Step::Tier(number, true) => publish(&repository, vec![tier(number)], Vec::new()).await,
            Step::Tier(number, false) => {
                publish(&repository, Vec::new(), vec![gone(Kind::Tier, format!("t{number}"))]).await;
            }
            Step::Subscribe(agent, selector) => {
                let agent = &mut agents[agent];
                let handle = u32::try_from(selector).unwrap();
                if let std::collections::btree_map::Entry::Vacant(vacant) = agent.members.entry(handle) {
                    vacant.insert(Known::new());
                    let selector = SELECTORS[selector].to_owned();
                    let subscribe = proto::Subscribe { handle, selector, revision: 0 };
                    agent.pump.subscribe(&mut *repository.view_mut(), &subscribe, None).unwrap();
                }
            }
            Step::Unsubscribe(agent, selector) => {
                let handle = u32::try_from(selector).unwrap();
                agents[agent].members.remove(&handle);
                agents[agent].pump.unsubscribe(&mut *repository.view_mut(), handle);
            }
            Step::Tell(agent) => {
                let messages = agents[agent].pump.bodies(&*repository.view());
                agents[agent].hear(messages);
                agents[agent].check(&repository.view());
                assert!(agents[agent].pump.bodies(&*repository.view()).is_empty(), "all was told");
            }
            Step::Reconnect(agent) => {
                let agent = &mut agents[agent];
                agent.pump.close(&mut *repository.view_mut());
                let known = (agent.revision > 0).then_some(agent.revision);
                agent.pump = connect(agent.host, known);
                // What was subscribed to since the last barrier is not known as of it.
                for (handle, members) in &mut agent.members {
                    let selector = SELECTORS[*handle as usize].to_owned();
                    let subscribe = proto::Subscribe { handle: *handle, selector, revision: 0 };
                    let known = known.filter(|_| !members.is_empty());
                    agent.pump.subscribe(&mut *repository.view_mut(), &subscribe, known).unwrap();
                }
            }
        }
    }
    for agent in &mut agents {
        let messages = agent.pump.bodies(&*repository.view());
        agent.hear(messages);
        agent.check(&repository.view());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn an_agent_knows_at_each_barrier_what_there_is(steps in prop::collection::vec(step(), 0..60)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(play(steps));
    }
}
