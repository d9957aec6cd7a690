//! What a time of day that jumps changes: nothing but what is bound to it.

use bulkhead_dataplane::fake::FakeDataplane;
use bulkhead_discover::FoundWorkload;
use bulkhead_model::flow::{ConnectionKey, Counters, DropReason, FlowEvent, RawFlow};
use bulkhead_model::host_policy::{ClassId, HostPolicy, RuleId};
use bulkhead_model::registration::Identity;
use bulkhead_model::{Direction, Labels, Verdict, document};
use bulkhead_wire::PROTOCOL;
use bulkhead_wire::proto::controller_message::Body as In;
use bulkhead_wire::proto::{ControllerMessage, Resources, Synced, Welcome};

use super::*;
use crate::clock::{self, jumps};
use crate::session::SessionEvent;
use crate::{disk, flows};

const MANUAL: &str = "manual";

fn hears(agent: &mut Agent, body: In) {
    agent.session_event(SessionEvent::Message(ControllerMessage { body: Some(body) }));
}

/// What the controller tells: policies as of a revision.
fn policies(agent: &mut Agent, revision: u64, text: &str) {
    let all = document::parse("test", text).unwrap();
    let upserts = all.iter().map(|one| one.resource.to_json_text().into()).collect();
    hears(agent, In::Resources(Resources { revision, upserts, ..Resources::default() }));
    hears(agent, In::Synced(Synced { revision }));
    agent.reconcile().unwrap();
}

fn policy(name: &str, block: &str, more: &str) -> String {
    format!(
        "apiVersion: bulkhead.dev/v1\nkind: Policy\nmetadata: {{name: {name}}}\nspec:\n  appliesTo: all()\n{more}  \
         ingress:\n  - action: Allow\n    from: {{cidrs: [{block}]}}\n"
    )
}

fn workloads(names: &[&str]) -> Input {
    let found = names.iter().zip(1..).map(|(name, number)| FoundWorkload {
        name: (*name).into(),
        labels: Labels::new(),
        addresses: vec![[10, 0, 0, number].into()],
        interfaces: vec![(number.into(), format!("veth{number}"))],
        group: None,
        facts: Facts::new(),
        identity: Identity::default(),
    });
    Input::Found(MANUAL, Found { workloads: found.collect(), ..Found::default() })
}

fn flow(opened_ns: u64) -> RawFlow {
    RawFlow {
        event: FlowEvent::Open,
        key: ConnectionKey {
            attachment: Attachment::Interface(1),
            protocol: bulkhead_model::ports::Protocol(6),
            local: [10, 0, 0, 1].into(),
            local_port: 80,
            peer: [192, 0, 2, 1].into(),
            peer_port: 4000,
        },
        peer: [192, 0, 2, 1].into(),
        peer_port: 4000,
        direction: Direction::Ingress,
        verdict: Verdict::Allow,
        rule: RuleId(1),
        audit_verdict: Verdict::Allow,
        audit_rule: RuleId(1),
        reason: DropReason::None,
        counters: Counters::default(),
        opened_ns,
        last_ns: opened_ns,
    }
}

fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap()
}

/// Whether somebody at an address is known to the tables: to those that allow it and deny others.
fn knows(dataplane: &FakeDataplane, address: [u8; 4]) -> bool {
    dataplane.policy().class_of(address.into()) != ClassId::NOBODY
}

#[tokio::test]
async fn a_time_of_day_that_jumps_changes_no_verdict_and_loses_no_record() {
    let directory = tempfile::tempdir().unwrap();
    let (disk, remembered) = disk::open(directory.path(), "boot").unwrap();
    let config =
        Arc::new(Config { host: "h1".into(), state_directory: directory.path().into(), ..Config::default() });
    let membership = Arc::new(crate::membership::open(&config).unwrap());
    let flows = flows::spawn(&membership);
    let progress = watch::channel(Progress::default()).0;
    let session = Conversation { progress, membership, task: tokio::spawn(async {}) };
    let dataplane = FakeDataplane::default();
    let given = Box::new(dataplane.clone());
    let mut agent = Agent::new(config, Facts::new(), given, disk, remembered, session, flows);
    agent.silent.clear();
    agent.engine.set_now(now());
    agent.take_stock().unwrap();
    agent.take_in(workloads(&["web"]));
    let (outgoing, _sent) = mpsc::channel(8);
    agent.session_event(SessionEvent::Connected(outgoing));
    hears(&mut agent, In::Welcome(Welcome { protocol: PROTOCOL, epoch: "e".into(), ..Welcome::default() }));
    // One for good, and one for the next two hours by the time of day.
    let until = Timestamp { seconds: now().seconds + 2 * 3600 };
    let for_good = policy("good", "192.0.2.0/24", "");
    let for_hours = policy("hours", "198.51.100.0/24", &format!("  validUntil: {until}\n"));
    policies(&mut agent, 2, &format!("{for_good}---\n{for_hours}"));
    assert!(knows(&dataplane, [192, 0, 2, 1]) && knows(&dataplane, [198, 51, 100, 1]));
    let in_force = dataplane.policy();
    let turn = |agent: &mut Agent| {
        // What the loop does every two seconds.
        agent.engine.set_now(now());
        agent.dirty |= agent.engine.needs_flush();
        agent.save();
        agent.heartbeat();
        agent.reconcile().unwrap();
    };
    let mut revision = 2;
    for (hours, lasts) in
        [(0, true), (1, true), (5, false), (-5, true), (24 * 365, false), (-400_000, true), (0, true)]
    {
        jumps::set(hours);
        turn(&mut agent);
        assert_eq!(knows(&dataplane, [198, 51, 100, 1]), lasts, "{hours} h");
        assert!(knows(&dataplane, [192, 0, 2, 1]), "{hours} h: that for good stays");
        assert_eq!(dataplane.policy().endpoints.len(), 1, "{hours} h");
        if lasts {
            let blocks = |policy: HostPolicy| policy.addresses.into_keys().collect::<Vec<_>>();
            assert_eq!(blocks(dataplane.policy()), blocks(in_force.clone()), "{hours} h");
        }
        // What is new is put into force.
        revision += 1;
        let new = format!("203.0.113.{revision}/32");
        policies(&mut agent, revision, &policy("new", &new, ""));
        let address = [203, 0, 113, u8::try_from(revision).unwrap()];
        assert!(knows(&dataplane, address), "{hours} h");
        policies(&mut agent, revision, &policy("new", "192.0.2.0/24", ""));
        // Connections are told of, with their true age and by the clock that there is.
        let known = agent.flows.recent(1000).count();
        let minute = 60_000_000_000;
        dataplane.push_swept(flow(monotonic_ns().saturating_sub(minute)));
        dataplane.push_event(flow(monotonic_ns()));
        agent.sweep();
        agent.collect_events();
        let records: Vec<_> = agent.flows.recent(1000).skip(known).cloned().collect();
        assert_eq!((records.len(), agent.flows.lost()), (2, 0), "{hours} h");
        let now = milliseconds(clock::since_epoch());
        for record in &records {
            assert!(now - record.time_ms < 60_000, "{hours} h: {record:?}");
        }
        let age = records[0].time_ms - records[0].opened_ms;
        assert!(age.abs_diff(60_000.min(records[0].time_ms)) < 1000, "{hours} h: {age} ms");
    }
    agent.take_in(workloads(&["web", "db"]));
    agent.reconcile().unwrap();
    assert_eq!(dataplane.policy().endpoints.len(), 2);
}
