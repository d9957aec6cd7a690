//! The controller's index: who matches what, in the shapes of Calico's label index, of Cilium's selector cache and
//! of Antrea's controller.

use std::sync::Arc;

use bulkhead_engine::{HostEngine, LocalEndpoint, Member, MemberIndex};
use bulkhead_model::Selector;
use bulkhead_model::host_policy::Attachment;
use bulkhead_model::labels::NAMESPACE_LABEL;

use crate::child::{ANTREA, Body, Outcome, Shape, medians, repeated, timed};
use crate::engine_speed::program_from;
use crate::report::Line;
use crate::{Effort, fixtures, progress};

/// Workloads that are added to an index with selectors.
const UPDATES: u32 = 20_000;
/// Antrea: namespaces, and what each has.
const NAMESPACES: u32 = 25_000;
const PODS_PER_NAMESPACE: u32 = 4;
const HOST_PODS: u32 = 100;

/// What runs in processes of its own.
pub(crate) const BODIES: &[(&str, Body)] = &[
    ("updates-10", || workload_updates(10)),
    ("updates-100", || workload_updates(100)),
    ("updates-1000", || workload_updates(1_000)),
    ("updates-10000", || workload_updates(10_000)),
    ("selectors-100", || selector_updates(100, 10_000)),
    ("selectors-1000", || selector_updates(1_000, 2_000)),
    ("selectors-10000", || selector_updates(10_000, 200)),
    ("selectors-100000", || selector_updates(100_000, 20)),
    ("identities", identities),
    ("antrea", antrea),
    ("antrea-dense", antrea_dense),
];

/// Measures all of them.
pub(crate) fn measure(effort: Effort) -> anyhow::Result<Vec<Line>> {
    progress("the index of labels and selectors");
    let names: Vec<&str> = BODIES.iter().map(|(name, _)| *name).collect();
    let (large, small): (Vec<&str>, Vec<&str>) =
        names.into_iter().partition(|name| name.starts_with("antrea"));
    let mut outcomes = medians(effort.pick(5, 1), &small)?;
    outcomes.extend(medians(effort.pick(3, 1), &large)?);
    let micros = |name: &str| outcomes[name].seconds * 1e6;
    let mut lines = Vec::new();
    for (selectors, name) in
        [("10", "updates-10"), ("100", "updates-100"), ("1000", "updates-1000"), ("10 000", "updates-10000")]
    {
        lines.push(Line::new(
            format!("index, a workload is added: {selectors} selectors"),
            "µs",
            micros(name),
        ));
    }
    for (workloads, name) in [
        ("100", "selectors-100"),
        ("1000", "selectors-1000"),
        ("10 000", "selectors-10000"),
        ("100 000", "selectors-100000"),
    ] {
        let name = micros(name);
        lines.push(Line::new(
            format!("index, a selector is added: {workloads} workloads, each listed if it matches"),
            "µs",
            name,
        ));
    }
    let name = "index and host, one of 10 000 label sets removed and added, all() but one key";
    lines.push(Line::new(name, "µs", micros("identities")));
    let antrea = Shape {
        name: "75 000 policies, 100 000 workloads, 25 000 namespaces: who is selected, fleet-wide",
        published: Some((ANTREA, 6.1, 1600.0)),
        budget: None,
    };
    let mut measured = antrea.lines(&outcomes["antrea"]);
    if let [time, ..] = measured.as_mut_slice() {
        *time = time.clone().budget("<= 1 s", time.ours <= 1.0);
    }
    lines.extend(measured);
    let dense = Shape {
        name: "10 000 policies that each select all of 10 000 workloads, twice: index, and a host of 100",
        published: Some((ANTREA, 10.66, 1157.0)),
        budget: None,
    };
    lines.extend(dense.lines(&outcomes["antrea-dense"]));
    Ok(lines)
}

fn marked(number: u32) -> anyhow::Result<Selector> {
    fixtures::selector(&format!("alpha == \"beta\" && has(ipset-{number})"))
}

/// Calico's WorkloadUpdate: workloads of one label set, of which one of the selectors holds.
fn workload_updates(selectors: u32) -> anyhow::Result<Outcome> {
    let host: Arc<str> = "h".into();
    let mut index = MemberIndex::new();
    for number in 0..selectors {
        index.subscribe(&marked(number)?);
    }
    let entities = (0..UPDATES)
        .map(|number| {
            let labels = [("alpha", "beta"), ("ipset-1", "true")];
            fixtures::workload(&format!("w{number}"), &host, &labels, fixtures::address(number))
        })
        .collect::<anyhow::Result<Vec<_>>>()?;
    repeated(UPDATES, |number| Ok(index.upsert(&entities[number as usize]).len()))?.checked(UPDATES as usize)
}

/// Calico's SelectorUpdates: a selector is read and asked for, its members are walked, and it is taken back.
fn selector_updates(workloads: u32, times: u32) -> anyhow::Result<Outcome> {
    let host: Arc<str> = "h".into();
    let mut index = MemberIndex::new();
    for number in 0..workloads {
        let own = format!("ipset-{}", number % 10);
        let labels = [("alpha", "beta"), (own.as_str(), "true")];
        let entity = fixtures::workload(&format!("w{number}"), &host, &labels, fixtures::address(number))?;
        index.upsert(&entity);
    }
    repeated(times, |time| {
        let id = index.subscribe(&marked(time % 10)?);
        let members = index.members(id).map(|member| member.prefixes.len()).sum();
        index.unsubscribe(id);
        Ok(members)
    })?
    .checked((workloads / 10 * times) as usize)
}

/// Cilium's SelectorCacheIdentityUpdates: a selector that nearly everybody matches, 10 000 label sets; one of them
/// leaves and comes back, and a host's tables follow.
fn identities() -> anyhow::Result<Outcome> {
    const IDENTITIES: u32 = 10_000;
    let (here, elsewhere): (Arc<str>, Arc<str>) = ("here".into(), "elsewhere".into());
    let entity = |number: u32| {
        let value = number.to_string();
        let labels = [("id", value.as_str()), ("app", "shop")];
        fixtures::workload(&format!("w{number}"), &elsewhere, &labels, fixtures::address(number))
    };
    let (mut engine, mut index) = (HostEngine::new(&here), MemberIndex::new());
    let selector = fixtures::selector("!has(key)")?;
    let spec = fixtures::allow_from(fixtures::selector("role == 'foo'")?, std::slice::from_ref(&selector));
    engine.set_policy(&fixtures::policy_key("p"), Some(&spec));
    let own = fixtures::workload("foo", &here, &[("role", "foo")], fixtures::address(IDENTITIES))?;
    engine.set_local(
        &Arc::clone(&own.name),
        Some(LocalEndpoint { entity: own, attachment: Attachment::Interface(2) }),
    );
    let entities = (0..IDENTITIES).map(entity).collect::<anyhow::Result<Vec<_>>>()?;
    for entity in &entities {
        index.upsert(entity);
    }
    program_from(&mut engine, &mut index);
    repeated(2_000, |time| {
        let entity = &entities[(time * 7 % IDENTITIES) as usize];
        let mut written = 0;
        for change in index.remove(&entity.name) {
            engine.change_members(&selector, [], [change.entity]);
        }
        written += engine.flush().addresses.len();
        for _change in index.upsert(entity) {
            let joins = Member {
                entity: Arc::clone(&entity.name),
                host: entity.host.clone(),
                prefixes: entity.prefixes.clone(),
                ports: Vec::new(),
            };
            engine.change_members(&selector, [joins], []);
        }
        Ok(written + engine.flush().addresses.len())
    })?
    .checked(4_000)
}

/// Antrea's largest: per namespace one policy that isolates it and two between pods of one label, and two pods of
/// each label. What is measured is what Antrea's controller computes: for each policy of the fleet whom it applies to
/// and who its peers are. Tables are not part of it.
fn antrea() -> anyhow::Result<Outcome> {
    let host = |pod: u32| -> Arc<str> { format!("h{}", pod / HOST_PODS).into() };
    timed(|| {
        let mut index = MemberIndex::new();
        let mut selected = 0;
        for number in 0..NAMESPACES {
            let namespace = format!("ns-{number}");
            let inherited = [("kubernetes.io/metadata.name".to_owned(), namespace.clone())];
            for pod in 0..PODS_PER_NAMESPACE {
                let id = number * PODS_PER_NAMESPACE + pod;
                let label = [(format!("app-{}", pod / 2 + 1), format!("scale-{}", pod / 2 + 1))];
                let ip = fixtures::address(id);
                index.upsert(&fixtures::pod(
                    &namespace,
                    &format!("p{pod}"),
                    &host(id),
                    &label,
                    &inherited,
                    ip,
                )?);
            }
        }
        for number in 0..NAMESPACES {
            let own = Selector::equals(NAMESPACE_LABEL, &format!("ns-{number}"));
            let app = |app: u32| {
                let app = Selector::equals(&format!("app-{app}"), &format!("scale-{app}"));
                Selector::all_of([own.clone(), app])
            };
            let (first, second) = (app(1), app(2));
            // Subject of the first policy, subjects and peers of the other two.
            for selector in [&own, &first, &first, &second, &second] {
                let id = index.subscribe(selector);
                selected += index.members(id).map(|member| member.prefixes.len()).sum::<usize>();
            }
        }
        Ok((selected, index))
    })?
    .checked((NAMESPACES * (PODS_PER_NAMESPACE + 4 * 2)) as usize)
}

/// Antrea's one namespace, in which each of 10 000 policies selects everybody as subject and as peer: the index, and
/// the tables of a host with a hundred of the pods.
fn antrea_dense() -> anyhow::Result<Outcome> {
    const PODS: u32 = 10_000;
    let (here, elsewhere): (Arc<str>, Arc<str>) = ("here".into(), "elsewhere".into());
    timed(|| {
        let (mut engine, mut index) = (HostEngine::new(&here), MemberIndex::new());
        let own = Selector::equals(NAMESPACE_LABEL, "ns");
        for number in 0..PODS {
            let everybody = Selector::all_of([own.clone(), fixtures::selector("app-1 == 'scale-1'")?]);
            let spec = fixtures::allow_from(everybody.clone(), &[everybody]);
            engine.set_policy(&fixtures::policy_key(&format!("p{number}")), Some(&spec));
        }
        for number in 0..PODS {
            let local = number % (PODS / HOST_PODS) == 0;
            let host = if local { &here } else { &elsewhere };
            let labels = [("app-1".to_owned(), "scale-1".to_owned())];
            let ip = fixtures::address(number);
            let entity = fixtures::pod("ns", &format!("p{number}"), host, &labels, &[], ip)?;
            if local {
                let name = Arc::clone(&entity.name);
                engine.set_local(
                    &name,
                    Some(LocalEndpoint { entity, attachment: Attachment::Interface(number + 2) }),
                );
            } else {
                index.upsert(&entity);
            }
        }
        program_from(&mut engine, &mut index);
        Ok((engine.policy().addresses.len(), (engine, index)))
    })?
    .checked(PODS as usize)
}
