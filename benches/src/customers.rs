//! Isolated customers: many namespaces with one pod and one policy each, of which a host runs a hundred pods.
//!
//! The parameters are those of Calico's benchmarks of this name: 15 labels per pod and 3 per namespace, one rule for
//! calls from the own namespace, one for calls to it and one for DNS.

use std::sync::Arc;

use bulkhead_engine::{HostEngine, LocalEndpoint, MemberIndex};
use bulkhead_model::host_policy::Attachment;
use bulkhead_model::labels::NAMESPACE_LABEL;
use bulkhead_model::policy::{Action, Peer, PolicySpec, Rule};
use bulkhead_model::ports::{PortMatch, Protocol};
use bulkhead_model::{Entity, ObjectKey, Prefix, Selector};

use crate::child::{Body, CALICO, Outcome, Shape, medians, timed};
use crate::engine_speed::program_from;
use crate::report::Line;
use crate::{Effort, fixtures, progress};

const LOCALS: u32 = 100;
const DNS: [u8; 4] = [10, 96, 0, 10];

/// What runs in processes of its own.
pub(crate) const BODIES: &[(&str, Body)] = &[
    ("customers-1k", || both(1_000)),
    ("customers-10k", || both(10_000)),
    ("customers-100k", || both(100_000)),
    ("customers-host-100k", || host_alone(100_000)),
];

/// Measures three sizes.
pub(crate) fn measure(effort: Effort) -> anyhow::Result<Vec<Line>> {
    progress("isolated customers");
    let small = medians(effort.pick(5, 3), &["customers-1k", "customers-10k"])?;
    let large = medians(effort.pick(3, 1), &["customers-100k", "customers-host-100k"])?;
    let sizes = [
        ("1000", &small["customers-1k"], (0.0454, 10.1)),
        ("10 000", &small["customers-10k"], (0.388, 47.6)),
        ("100 000", &large["customers-100k"], (6.898, 401.7)),
    ];
    let mut lines = Vec::new();
    for (size, outcome, (seconds, megabytes)) in sizes {
        let name = &format!("{size} isolated customers, 100 local, index and host");
        lines.extend(
            Shape { name, published: Some((CALICO, seconds, megabytes)), budget: None }.lines(outcome),
        );
    }
    let name = "100 000 isolated customers, 100 local, host alone";
    let published = Some((CALICO, 6.898, 401.7));
    let shape = Shape { name, published, budget: Some((0.5, 80.0)) };
    lines.extend(shape.lines(&large["customers-host-100k"]));
    Ok(lines)
}

fn namespace(number: u32) -> String {
    format!("customer-{number}")
}

/// The policy of one customer: to and from the own namespace, and to the DNS server.
fn policy(number: u32) -> (ObjectKey, PolicySpec) {
    let own = Selector::equals(NAMESPACE_LABEL, &namespace(number));
    let same = Rule {
        peers: vec![Peer { selector: Some(own.clone()), ..Peer::default() }],
        ..Rule::new(Action::Allow)
    };
    let dns = Rule {
        peers: vec![Peer { cidrs: vec![Prefix::host(DNS.into())], ..Peer::default() }],
        ports: vec![PortMatch::Ports { protocol: Protocol::UDP, first: 53, last: 53 }],
        ..Rule::new(Action::Allow)
    };
    let key = fixtures::policy_key(&format!("isolate-{number}"));
    let spec = PolicySpec {
        ingress: Some(vec![same.clone()]),
        egress: Some(vec![same, dns]),
        ..PolicySpec::new(own)
    };
    (key, spec)
}

/// Five labels of its own, four with two values, four with a few, a constant, and one with 5000 values; and what
/// the namespace has.
fn pod(number: u32, host: &Arc<str>) -> anyhow::Result<Entity> {
    let mut labels: Vec<(String, String)> = Vec::new();
    labels.extend((0..5).map(|label| (format!("unique-{label}"), format!("value-{number}-{label}"))));
    labels.extend((0..4).map(|label| (format!("binary-{label}"), (number >> label & 1).to_string())));
    labels.extend((0..4).map(|label| (format!("few-{label}"), (number % (label + 3)).to_string())));
    labels.push(("app".into(), "shop".into()));
    labels.push(("group".into(), (number % 5_000).to_string()));
    let inherited = [
        ("kubernetes.io/metadata.name".to_owned(), namespace(number)),
        ("customer".to_owned(), number.to_string()),
        ("isolated".to_owned(), "true".to_owned()),
    ];
    let address = fixtures::address(number);
    fixtures::pod(&namespace(number), "pod", host, &labels, &inherited, address)
}

fn host_with_policies(customers: u32) -> HostEngine {
    let mut engine = HostEngine::new("here");
    for (key, spec) in (0..customers).map(policy) {
        engine.set_policy(&key, Some(&spec));
    }
    engine
}

/// Each so manieth pod is here.
fn add_locals(engine: &mut HostEngine, customers: u32) -> anyhow::Result<()> {
    let here: Arc<str> = "here".into();
    for number in (0..customers).step_by((customers / LOCALS) as usize) {
        let entity = pod(number, &here)?;
        let name = Arc::clone(&entity.name);
        engine
            .set_local(&name, Some(LocalEndpoint { entity, attachment: Attachment::Interface(number + 2) }));
    }
    Ok(())
}

/// Everything in one process, as Calico has it: all pods into the index, all policies and the local pods into the
/// host's engine, until the tables stand.
fn both(customers: u32) -> anyhow::Result<Outcome> {
    let elsewhere: Arc<str> = "elsewhere".into();
    timed(|| {
        let mut engine = host_with_policies(customers);
        let mut index = MemberIndex::new();
        for number in (0..customers).filter(|number| number % (customers / LOCALS) != 0) {
            index.upsert(&pod(number, &elsewhere)?);
        }
        add_locals(&mut engine, customers)?;
        program_from(&mut engine, &mut index);
        Ok((engine.policy().addresses.len(), (engine, index)))
    })?
    .checked(LOCALS as usize + 1)
}

/// What an agent has of it: all policies, the local pods, and members of the selectors that it asks for.
fn host_alone(customers: u32) -> anyhow::Result<Outcome> {
    timed(|| {
        let mut engine = host_with_policies(customers);
        add_locals(&mut engine, customers)?;
        program_from(&mut engine, &mut MemberIndex::new());
        Ok((engine.policy().addresses.len(), engine))
    })?
    .checked(LOCALS as usize + 1)
}
