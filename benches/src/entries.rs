//! How many table entries an activation writes over all hosts, beside lists of pairs of addresses.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use bulkhead_engine::{Change, HostEngine, LocalEndpoint, Member, MemberChange, MemberIndex, SelectorId};
use bulkhead_model::host_policy::Attachment;
use bulkhead_model::{Entity, Selector};

use crate::report::Line;
use crate::{Effort, fixtures, progress};

/// Instances of a service once it is scaled up.
const INSTANCES: u32 = 20;

/// The engine of each host and what the controller keeps for them.
struct Fleet {
    index: MemberIndex,
    hosts: Vec<Host>,
    subscribers: HashMap<SelectorId, Vec<usize>>,
}

struct Host {
    name: Arc<str>,
    engine: HostEngine,
    subscribed: HashMap<Selector, SelectorId>,
    written: usize,
}

impl Fleet {
    fn new(hosts: usize) -> Self {
        let host = |number| {
            let name: Arc<str> = format!("h{number}").into();
            let engine = HostEngine::new(&name);
            Host { name, engine, subscribed: HashMap::new(), written: 0 }
        };
        let hosts = (0..hosts).map(host).collect();
        Self { index: MemberIndex::new(), hosts, subscribers: HashMap::new() }
    }

    fn set_policy(&mut self, name: &str, applies_to: &str, from: &[Selector]) -> anyhow::Result<()> {
        let spec = fixtures::allow_from(fixtures::selector(applies_to)?, from);
        let key = fixtures::policy_key(name);
        self.hosts.iter_mut().for_each(|host| host.engine.set_policy(&key, Some(&spec)));
        Ok(())
    }

    /// Starts a workload; answers which hosts have something to do.
    fn activate(&mut self, at: usize, entity: &Entity) -> BTreeSet<usize> {
        let mut concerned = BTreeSet::from([at]);
        for MemberChange { selector, entity: name, change } in self.index.upsert(entity) {
            let Some(text) = self.index.selector(selector).cloned() else { continue };
            for subscriber in self.subscribers.get(&selector).into_iter().flatten() {
                if *subscriber == at {
                    continue;
                }
                concerned.insert(*subscriber);
                let engine = &mut self.hosts[*subscriber].engine;
                match &change {
                    Change::Join { prefixes, host, ports } => {
                        let joins = Member {
                            entity: Arc::clone(&name),
                            host: host.clone(),
                            prefixes: prefixes.to_vec(),
                            ports: ports.to_vec(),
                        };
                        engine.change_members(&text, [joins], []);
                    }
                    Change::Leave => engine.change_members(&text, [], [Arc::clone(&name)]),
                }
            }
        }
        let attachment = Attachment::Interface(u32::try_from(self.index.entities()).unwrap_or(u32::MAX));
        let endpoint = LocalEndpoint { entity: entity.clone(), attachment };
        self.hosts[at].engine.set_local(&entity.name, Some(endpoint));
        concerned
    }

    /// Brings a host's tables up to date, as its agent does.
    fn settle(&mut self, at: usize) {
        let host = &mut self.hosts[at];
        loop {
            host.written += host.engine.flush().entries_written();
            let wanted: Vec<Selector> = host.engine.wanted().cloned().collect();
            for selector in wanted {
                host.subscribed.entry(selector).or_insert_with_key(|selector| {
                    let id = self.index.subscribe(selector);
                    self.subscribers.entry(id).or_default().push(at);
                    id
                });
            }
            let waiting = host.engine.waiting();
            for selector in &waiting {
                let Some(id) = host.subscribed.get(selector) else { continue };
                host.engine.set_members(selector, self.index.members(*id).map(Member::from));
            }
            if waiting.is_empty() && !host.engine.needs_flush() {
                return;
            }
        }
    }

    fn take_written(&mut self) -> Vec<usize> {
        self.hosts.iter_mut().map(|host| std::mem::take(&mut host.written)).collect()
    }
}

/// Where the instances of a service run.
#[derive(Debug, Clone, Copy)]
enum Placement {
    /// One after the other, each on another host.
    Spread,
    /// Ten on one host.
    Packed,
}

/// Starts an instance of a service.
fn start(
    fleet: &mut Fleet,
    placement: Placement,
    service: u32,
    instance: u32,
) -> anyhow::Result<BTreeSet<usize>> {
    let number = service * INSTANCES + instance;
    let place = match placement {
        Placement::Spread => number,
        Placement::Packed => number / 10,
    };
    let at = place as usize % fleet.hosts.len();
    let name = format!("s{service}-{instance}");
    let label = service.to_string();
    let host = Arc::clone(&fleet.hosts[at].name);
    let entity = fixtures::workload(&name, &host, &[("service", &label)], fixtures::address(number))?;
    Ok(fleet.activate(at, &entity))
}

/// Measures a small and a large fleet.
pub(crate) fn measure(effort: Effort) -> anyhow::Result<Vec<Line>> {
    let mut lines = two_services()?;
    lines.extend(many_services(effort, Placement::Spread)?);
    lines.extend(many_services(effort, Placement::Packed)?);
    Ok(lines)
}

fn service(number: u32) -> anyhow::Result<Selector> {
    fixtures::selector(&format!("service == '{number}'"))
}

/// Twenty workloads that may call twenty others: all of it, on one host and on ten.
fn two_services() -> anyhow::Result<Vec<Line>> {
    let mut lines = Vec::new();
    for hosts in [1, 10] {
        let mut fleet = Fleet::new(hosts);
        fleet.set_policy("p", "service == '1'", &[service(0)?])?;
        for number in [0, 1] {
            for instance in 0..INSTANCES {
                start(&mut fleet, Placement::Spread, number, instance)?;
            }
        }
        (0..hosts).for_each(|host| fleet.settle(host));
        let written: usize = fleet.take_written().iter().sum();
        let pairs = f64::from(INSTANCES * INSTANCES);
        let name = format!("entries: 20 callers of 20, {hosts} host(s), all at once");
        lines.push(
            Line::new(name, "entries", to_f64(written))
                .beside("pairs of addresses", pairs)
                .ratio(to_f64(written) / pairs),
        );
    }
    Ok(lines)
}

/// One of many services is scaled from one instance to twenty.
fn many_services(effort: Effort, placement: Placement) -> anyhow::Result<Vec<Line>> {
    let (services, hosts) = effort.pick((1_000, 50), (200, 50));
    progress(&format!("entries: {services} services on {hosts} hosts"));
    let mut fleet = Fleet::new(hosts);
    for number in 0..services {
        let from = [service((number + 1) % services)?, service((number + 2) % services)?];
        fleet.set_policy(&format!("p{number}"), &format!("service == '{number}'"), &from)?;
    }
    for number in 0..services {
        for instance in 0..if number == 0 { 1 } else { INSTANCES } {
            start(&mut fleet, placement, number, instance)?;
        }
    }
    (0..hosts).for_each(|host| fleet.settle(host));
    fleet.take_written();
    let mut concerned = BTreeSet::new();
    for instance in 1..INSTANCES {
        let touched = start(&mut fleet, placement, 0, instance)?;
        touched.iter().for_each(|host| fleet.settle(*host));
        concerned.extend(touched);
    }
    let written = fleet.take_written();
    let unconcerned: usize =
        (0..hosts).filter(|host| !concerned.contains(host)).map(|host| written[host]).sum();
    let all: usize = written.iter().sum();
    // Each new instance may be called by 2 × 20 and may call 2 × 20.
    let pairs = f64::from((INSTANCES - 1) * (2 * INSTANCES + 2 * INSTANCES));
    let what = format!(
        "{services} services x 20 on {hosts} hosts, {}",
        match placement {
            Placement::Spread => "spread",
            Placement::Packed => "ten per host",
        }
    );
    Ok(vec![
        Line::new(format!("entries: one service from 1 to 20, {what}"), "entries", to_f64(all))
            .beside("pairs of addresses", pairs)
            .ratio(to_f64(all) / pairs),
        Line::new(format!("hosts concerned by it, {what}"), "hosts", to_f64(concerned.len())),
        Line::new(format!("entries on unconcerned hosts, {what}"), "entries", to_f64(unconcerned))
            .budget("0", unconcerned == 0),
    ])
}

#[expect(clippy::cast_precision_loss, reason = "counts of entries are far below 2^52")]
fn to_f64(count: usize) -> f64 {
    count as f64
}
