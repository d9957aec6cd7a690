//! One host's tables at the start of a day, in shapes for which Calico has published numbers.
//!
//! What a host is told arrives as it would from the controller, member by member; what the controller does for all
//! hosts once is measured separately, and both are added up where the published number is of both.

use std::sync::Arc;

use bulkhead_engine::{HostEngine, LocalEndpoint, Member, MemberIndex};
use bulkhead_model::host_policy::Attachment;
use bulkhead_model::policy::PolicySpec;
use bulkhead_model::{Entity, ObjectKey, Prefix, Selector};

use crate::child::{Body, CALICO, Outcome, Shape, medians, timed};
use crate::report::Line;
use crate::{Effort, fixtures, progress};

const MARKERS: u32 = 31;
const REMOTES: u32 = 250_000;
const POLICIES: u32 = 10_000;
const LOCALS: u32 = 200;
const RULES_PER_POLICY: u32 = 5;
/// Sets of the shape with network sets, how many addresses they have in turn, and the workloads beside them.
const SETS: u32 = 1_000;
const SET_SIZES: [u32; 10] = [1, 1, 1, 1, 2, 3, 4, 5, 100, 1000];
const SET_REMOTES: u32 = 10_000;

/// What runs in processes of its own.
pub(crate) const BODIES: &[(&str, Body)] =
    &[("snapshot", snapshot), ("snapshot-index", snapshot_index), ("network-sets", network_sets)];

/// Measures both shapes.
pub(crate) fn measure(effort: Effort) -> anyhow::Result<Vec<Line>> {
    progress("250 000 workloads at the start of a day");
    let outcomes = medians(effort.pick(5, 1), &["snapshot", "snapshot-index", "network-sets"])?;
    let [snapshot, index, sets] =
        ["snapshot", "snapshot-index", "network-sets"].map(|name| outcomes[name].clone());
    let name = "start of day, 250 000 workloads, 10 000 policies, 200 local";
    let published = Some((CALICO, 3.39, 374.5));
    let mut lines = Shape { name, published, budget: Some((0.34, 75.0)) }.lines(&snapshot);
    let name = &format!("{name}: the controller's index");
    lines.extend(Shape { name, ..Shape::default() }.lines(&index));
    let both = Outcome {
        seconds: snapshot.seconds + index.seconds,
        megabytes: snapshot.megabytes + index.megabytes,
        ..Outcome::default()
    };
    let name = "the same, host and index added up";
    lines.extend(Shape { name, published, budget: None }.lines(&both));
    let name = "10 000 workloads, 1000 network sets, 1000 policies, 200 local";
    lines.extend(Shape { name, published: Some((CALICO, 0.50, 81.0)), budget: None }.lines(&sets));
    Ok(lines)
}

fn marker(number: u32) -> anyhow::Result<Selector> {
    fixtures::selector(&format!("has(marker-{})", number % MARKERS))
}

fn snapshot_labels(number: u32) -> Vec<(String, String)> {
    let one_in = |k: u32| (format!("one-in-{k}"), format!("value-{}", number % k));
    let mut labels: Vec<_> = [10, 11, 20, 30, 40].map(one_in).into();
    labels.push((format!("marker-{}", number % MARKERS), "true".into()));
    labels
}

fn entity(number: u32, host: &Arc<str>, labels: &[(String, String)]) -> anyhow::Result<Entity> {
    let labels: Vec<_> = labels.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
    fixtures::workload(&format!("w{number}"), host, &labels, fixtures::address(number))
}

fn add_local(engine: &mut HostEngine, number: u32, entity: Entity) {
    let name = Arc::clone(&entity.name);
    engine.set_local(&name, Some(LocalEndpoint { entity, attachment: Attachment::Interface(number + 2) }));
}

fn remote(number: u32, host: &Arc<str>) -> Member {
    Member {
        entity: format!("Workload/w{number}").into(),
        host: Some(Arc::clone(host)),
        prefixes: vec![Prefix::host(fixtures::address(number).into())],
        ports: Vec::new(),
    }
}

/// One host's tables: policies first, then workloads, then what the engine asks for.
fn snapshot() -> anyhow::Result<Outcome> {
    let (here, elsewhere): (Arc<str>, Arc<str>) = ("here".into(), "elsewhere".into());
    let markers = (0..MARKERS).map(marker).collect::<anyhow::Result<Vec<_>>>()?;
    let at = |number: u32| markers[(number % MARKERS) as usize].clone();
    let policy = |number: u32| -> (ObjectKey, PolicySpec) {
        let from: Vec<_> = (0..RULES_PER_POLICY).map(|rule| at(number * RULES_PER_POLICY + rule)).collect();
        (fixtures::policy_key(&format!("p{number}")), fixtures::allow_from(at(number), &from))
    };
    timed(|| {
        let mut engine = HostEngine::new(&here);
        for (key, spec) in (0..POLICIES).map(policy) {
            engine.set_policy(&key, Some(&spec));
        }
        for number in REMOTES..REMOTES + LOCALS {
            add_local(&mut engine, number, entity(number, &here, &snapshot_labels(number))?);
        }
        program(&mut engine, |selector| {
            let wanted = markers.iter().position(|marker| marker == selector).unwrap_or(usize::MAX);
            let wanted = u32::try_from(wanted).unwrap_or(REMOTES);
            (wanted..REMOTES).step_by(MARKERS as usize).map(|number| remote(number, &elsewhere))
        });
        Ok((engine.policy().addresses.len(), engine))
    })?
    .checked((REMOTES + LOCALS) as usize)
}

/// Flushes until nothing is missing, as an agent does.
pub(crate) fn program<M: Iterator<Item = Member>>(
    engine: &mut HostEngine,
    mut members: impl FnMut(&Selector) -> M,
) {
    loop {
        engine.flush();
        let waiting = engine.waiting();
        for selector in &waiting {
            engine.set_members(selector, members(selector));
        }
        if waiting.is_empty() && !engine.needs_flush() {
            return;
        }
    }
}

/// The same with an index to ask.
pub(crate) fn program_from(engine: &mut HostEngine, index: &mut MemberIndex) {
    program(engine, |selector| {
        let id = index.subscribe(selector);
        index.members(id).map(Member::from).collect::<Vec<_>>().into_iter()
    });
}

fn snapshot_index() -> anyhow::Result<Outcome> {
    let host: Arc<str> = "elsewhere".into();
    timed(|| {
        let mut index = MemberIndex::new();
        for number in 0..MARKERS {
            index.subscribe(&marker(number)?);
        }
        for number in 0..REMOTES {
            index.upsert(&entity(number, &host, &snapshot_labels(number))?);
        }
        Ok((index.entities(), index))
    })?
    .checked(REMOTES as usize)
}

/// Index and one host, as every policy applies to every workload: each set is a class of its own.
fn network_sets() -> anyhow::Result<Outcome> {
    let (here, elsewhere): (Arc<str>, Arc<str>) = ("here".into(), "elsewhere".into());
    let mut next = SET_REMOTES + LOCALS;
    let mut set_addresses = 0;
    let outcome = timed(|| {
        let (mut engine, mut index) = (HostEngine::new(&here), MemberIndex::new());
        for number in 0..SETS {
            let from = fixtures::selector(&format!("network-set-name == 'set-{number}'"))?;
            let key = fixtures::policy_key(&format!("p{number}"));
            engine.set_policy(&key, Some(&fixtures::allow_from(Selector::all(), &[from])));
        }
        for number in 0..SET_REMOTES {
            index.upsert(&entity(number, &elsewhere, &snapshot_labels(number))?);
        }
        for number in 0..SETS {
            let size = SET_SIZES[number as usize % SET_SIZES.len()];
            index.upsert(&fixtures::network_set(&format!("set-{number}"), next..next + size)?);
            next += size;
            set_addresses += size;
        }
        for number in SET_REMOTES..SET_REMOTES + LOCALS {
            add_local(&mut engine, number, entity(number, &here, &snapshot_labels(number))?);
        }
        program_from(&mut engine, &mut index);
        Ok((engine.policy().addresses.len(), (engine, index)))
    })?;
    outcome.checked(set_addresses as usize)
}
