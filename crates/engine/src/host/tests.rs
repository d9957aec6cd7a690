//! The engine against the reference evaluator, and against itself from scratch.

use std::collections::BTreeMap;

use bulkhead_model::host_policy::{ClassId, Row};
use bulkhead_model::labels::{DOMAIN_LABEL, SERVICE_LABEL};
use bulkhead_model::meaning::Bequest;
use bulkhead_model::policy::{Action, DefaultAction, IpVersion, Mode, Order, Own, Peer, Rule, SourcePorts};
use bulkhead_model::ports::{PortKey, PortRange, Protocol};
use bulkhead_model::settings::FailSafe;
use bulkhead_model::{Direction, Kind, Labels, Verdict, entity};
use proptest::prelude::*;

use super::*;
use crate::decide::selects;
use crate::{MemberIndex, SelectorId, World, judge, judge_forwarded};

const HOST: &str = "here";

/// A controller and an agent, joined by function calls.
struct Fleet {
    world: World,
    index: MemberIndex,
    subscribed: BTreeMap<Selector, SelectorId>,
    engine: HostEngine,
}

/// One change of the fleet's state.
#[derive(Debug, Clone)]
enum Op {
    Policy(u8, Option<PolicySpec>),
    Tier(Option<TierSpec>),
    Entity(u8, Option<(Labels, Vec<Prefix>)>),
    Local(u8, Option<(Labels, Vec<Prefix>)>),
    /// The time, and whether the repository's posture is deny.
    Now(u8, bool),
}

pub(crate) fn policy_key(number: u8) -> ObjectKey {
    let namespace = (number == 3).then(|| "n".to_owned());
    ObjectKey { kind: Kind::Policy, namespace, name: format!("p{number}") }
}

pub(crate) fn make_entity(
    name: &str,
    kind: Kind,
    labels: &Labels,
    prefixes: &[Prefix],
    host: Option<&str>,
) -> Entity {
    let namespace = labels.get("ns").map(ToOwned::to_owned);
    let mut labels = entity::with_automatic_labels(labels, kind, namespace.as_deref(), name, host);
    // A name that means different numbers, and another protocol, on different entities.
    let port = |protocol, port, name: &str| NamedPort { name: name.into(), protocol, port };
    let ports = match (kind, labels.get("b")) {
        (Kind::Workload | Kind::HostEndpoint, Some("1")) => vec![port(Protocol::TCP, 80, "http")],
        (Kind::Workload | Kind::HostEndpoint, Some("2")) => {
            vec![port(Protocol::TCP, 81, "http"), port(Protocol::UDP, 80, "http")]
        }
        (Kind::EndpointSlice, Some("1")) => vec![port(Protocol::TCP, 80, "80")],
        (Kind::EndpointSlice, _) => vec![port(Protocol::TCP, 81, "81"), port(Protocol::UDP, 80, "80")],
        _ => vec![],
    };
    for port in &ports {
        labels.insert_any(&entity::port_label(port.protocol, &port.name), &port.port.to_string()).unwrap();
    }
    match kind {
        Kind::EndpointSlice => labels.insert_any(SERVICE_LABEL, "s").unwrap(),
        Kind::NameTable => labels.insert_any(DOMAIN_LABEL, "x.example.com").unwrap(),
        _ => {}
    }
    let denies = kind == Kind::HostEndpoint && labels.get("a") == Some("1");
    let mut entity = Entity {
        name: name.into(),
        labels,
        prefixes: prefixes.to_vec(),
        host: host.map(Into::into),
        ports,
        posture: denies.then_some(Verdict::Deny),
        parents: Vec::new(),
    };
    if namespace.is_some() {
        let mut own = Labels::new();
        own.insert("team", "red").unwrap();
        entity.inherit(&Bequest::of_namespace("n", &own, None));
    }
    entity
}

/// What stands behind the number of an entity that is not local.
pub(crate) fn kind_of(number: u8) -> Kind {
    match number {
        1 | 3 => Kind::NetworkSet,
        5 => Kind::EndpointSlice,
        6 => Kind::NameTable,
        7 => Kind::Host,
        _ => Kind::Workload,
    }
}

pub(crate) fn settings(denies: bool) -> SettingsSpec {
    let fail_safe =
        FailSafe { ingress: vec!["tcp/81".parse().unwrap()], egress: vec!["udp/80".parse().unwrap()] };
    SettingsSpec { default_posture: if denies { Verdict::Deny } else { Verdict::Allow }, fail_safe }
}

const FORWARDED: &str = "#forwarded";

fn forwarded(name: &str) -> Arc<str> {
    format!("{name}{FORWARDED}").into()
}

impl Fleet {
    fn new() -> Self {
        let mut fleet = Self {
            world: World::new(),
            index: MemberIndex::new(),
            subscribed: BTreeMap::new(),
            engine: HostEngine::new(HOST),
        };
        fleet.run(&Op::Now(0, false));
        fleet
    }

    fn run(&mut self, op: &Op) {
        match op {
            Op::Policy(number, spec) => {
                let key = policy_key(*number);
                self.engine.set_policy(&key, spec.as_ref());
                match spec {
                    Some(spec) => self.world.policies.insert(key, spec.clone()),
                    None => self.world.policies.remove(&key),
                };
            }
            Op::Tier(spec) => {
                // "baseline" is predefined, so policies may always name it.
                self.engine.set_tier("baseline", spec.clone());
                let spec = spec.clone().or_else(|| predefined_tiers().remove("baseline"));
                self.world.tiers.extend(spec.map(|spec| ("baseline".to_owned(), spec)));
            }
            Op::Entity(number, state) => {
                let name = format!("e{number}");
                let kind = kind_of(*number);
                let host = (kind == Kind::Workload).then_some("there");
                let entity = state.as_ref().map(|(l, p)| make_entity(&name, kind, l, p, host));
                self.set_entity(&name, entity);
            }
            Op::Local(number, state) => {
                let name = format!("l{number}");
                let kind = if *number == 2 { Kind::HostEndpoint } else { Kind::Workload };
                let entity = state.as_ref().map(|(l, p)| make_entity(&name, kind, l, p, Some(HOST)));
                let index = u32::from(*number) + 1;
                let attachment = match kind {
                    Kind::HostEndpoint => Attachment::Host(index),
                    _ => Attachment::Interface(index),
                };
                if kind == Kind::HostEndpoint {
                    let forwarding = entity.as_ref().map(|entity| LocalEndpoint::forwarding(entity, index));
                    self.engine.set_local(&forwarded(&name), forwarding);
                }
                let local = entity.clone().map(|entity| LocalEndpoint { entity, attachment });
                self.engine.set_local(&name.as_str().into(), local);
                self.set_entity(&name, entity);
            }
            Op::Now(seconds, denies) => {
                let now = Timestamp { seconds: (*seconds).into() };
                self.engine.set_now(now);
                self.engine.set_settings(settings(*denies));
                self.world.now = now;
                self.world.settings = settings(*denies);
            }
        }
    }

    fn set_entity(&mut self, name: &str, entity: Option<Entity>) {
        let changes = match entity {
            Some(entity) => {
                self.world.entities.insert(name.into(), entity.clone());
                self.index.upsert(&entity)
            }
            None => {
                self.world.entities.remove(name);
                self.index.remove(name)
            }
        };
        crate::fleet::tell(&mut self.engine, &self.index, changes);
    }

    /// Flushes and answers subscriptions until nothing is left to do; answers the deltas.
    fn settle(&mut self) -> Vec<HostDelta> {
        let mut deltas = Vec::new();
        loop {
            deltas.push(self.engine.flush());
            let wanted: BTreeSet<Selector> = self.engine.wanted().cloned().collect();
            let stale: Vec<_> = self.subscribed.keys().filter(|s| !wanted.contains(s)).cloned().collect();
            for selector in stale {
                self.index.unsubscribe(self.subscribed.remove(&selector).unwrap());
            }
            let new: Vec<_> = wanted.into_iter().filter(|s| !self.subscribed.contains_key(s)).collect();
            for selector in &new {
                let id = self.index.subscribe(selector);
                self.subscribed.insert(selector.clone(), id);
                self.engine.set_members(selector, self.index.members(id).map(Member::from));
            }
            if new.is_empty() && !self.engine.needs_flush() {
                return deltas;
            }
        }
    }

    /// What is forwarded is not asked about where no policy is for it, and then everything is allowed.
    fn check_forwarded_is_bound_where_policies_are(&self) {
        let policy = self.engine.policy();
        for (name, entity) in self.world.entities.iter().filter(|(_, entity)| entity.is_host_endpoint()) {
            let bound = policy.endpoints.contains_key(&forwarded(name));
            let policies = self.world.policies.iter().filter(|(key, spec)| {
                spec.apply_on_forward && spec.is_valid_at(self.world.now) && selects(key, spec, entity)
            });
            assert_eq!(bound, policies.count() > 0, "{name}");
        }
    }

    /// Every endpoint, direction, address and port of the small universe gets the reference's answer.
    fn check_against_reference(&self) {
        let policy = self.engine.policy();
        self.check_forwarded_is_bound_where_policies_are();
        for name in policy.endpoints.keys() {
            let plain = name.strip_suffix(FORWARDED);
            let judge = if plain.is_some() { judge_forwarded } else { judge };
            let entity = &self.world.entities[plain.unwrap_or(name)];
            for direction in Direction::BOTH {
                for peer in addresses() {
                    for (key, source) in questions() {
                        let cell = policy.lookup(name, direction, peer, key, source);
                        let cell = cell.expect("every endpoint is bound");
                        let judged = judge(&self.world, entity, direction, peer, key, source);
                        let found = (
                            cell.verdict,
                            &policy.rules[&cell.rule],
                            cell.audit_verdict,
                            &policy.rules[&cell.audit_rule],
                            (cell.log, cell.reject),
                        );
                        let expected = (
                            judged.verdict,
                            &judged.rule,
                            judged.audit_verdict,
                            &judged.audit_rule,
                            (judged.log, judged.reject),
                        );
                        assert_eq!(
                            found, expected,
                            "{name} {direction} {peer} {key:#x} from {source}\n{judged:#?}"
                        );
                    }
                }
            }
        }
    }
}

pub(crate) fn addresses() -> Vec<IpAddr> {
    let mut addresses: Vec<IpAddr> = (0..8u8).map(|last| [10, 0, 0, last].into()).collect();
    addresses.extend(
        ["192.0.2.1", "2001:db8::1", "2001:db8::2", "2001:db8:1::1"].map(|a| a.parse::<IpAddr>().unwrap()),
    );
    addresses
}

/// Port keys, each with the source ports that rules may tell apart; protocols without have 0.
pub(crate) fn questions() -> impl Iterator<Item = (PortKey, u16)> {
    let (tcp, udp) = (Protocol::TCP, Protocol::UDP);
    let keys = [tcp.key(80), tcp.key(81), tcp.key(443), udp.key(80)];
    let questions = keys.into_iter().flat_map(|key| [53, 54, 1024].map(|source| (key, source)));
    questions.chain([(Protocol::ICMP.key(0x0800), 0), (0, 0)])
}

/// A host policy with ids replaced by what they stand for.
type Canonical =
    (BTreeMap<Prefix, usize>, BTreeMap<Arc<str>, (Attachment, Vec<IpAddr>, [BTreeMap<usize, String>; 2])>);

fn canonical(policy: &HostPolicy) -> Canonical {
    let mut numbers: BTreeMap<ClassId, usize> = BTreeMap::new();
    for class in policy.addresses.values() {
        let next = numbers.len() + 1;
        numbers.entry(*class).or_insert(next);
    }
    let row = |row: &Row| {
        let cell = |id| policy.rules.get(&id).map(ToString::to_string);
        let variants = row.variants().flat_map(|(from, columns)| columns.iter().map(move |c| (from, c)));
        let columns = variants.map(|(from, c)| {
            (
                (from, c.first),
                c.cell.verdict,
                cell(c.cell.rule),
                c.cell.audit_verdict,
                cell(c.cell.audit_rule),
                (c.cell.log, c.cell.reject),
                c.cell.written,
            )
        });
        format!("{:?}", columns.collect::<Vec<_>>())
    };
    let table = |id: CompiledId| -> BTreeMap<usize, String> {
        let Some(compiled) = policy.policies.get(&id) else { return BTreeMap::new() };
        let rows = compiled
            .rows
            .iter()
            .map(|(class, r)| (*numbers.get(class).expect("no row for a class that is gone"), row(r)));
        rows.chain([(0, row(&compiled.default_row))]).collect()
    };
    let endpoints = policy.endpoints.iter().map(|(name, binding)| {
        let tables = [table(binding.ingress), table(binding.egress)];
        (Arc::clone(name), (binding.attachment, binding.addresses.clone(), tables))
    });
    let addresses = policy.addresses.iter().map(|(prefix, class)| (*prefix, numbers[class]));
    (addresses.collect(), endpoints.collect())
}

fn from_scratch(ops: &[Op]) -> Canonical {
    let mut fleet = Fleet::new();
    let mut last: BTreeMap<String, &Op> = BTreeMap::new();
    for op in ops {
        last.insert(subject(op), op);
    }
    last.values().for_each(|op| fleet.run(op));
    fleet.settle();
    canonical(fleet.engine.policy())
}

fn subject(op: &Op) -> String {
    match op {
        Op::Policy(number, _) => format!("policy {number}"),
        Op::Tier(_) => "tier".into(),
        Op::Entity(number, _) => format!("entity {number}"),
        Op::Local(number, _) => format!("local {number}"),
        Op::Now(..) => "now".into(),
    }
}

/// The same subject taken away: what comes before an op when a history is split.
fn removal(op: &Op) -> Op {
    match op {
        Op::Policy(number, _) => Op::Policy(*number, None),
        Op::Tier(_) => Op::Tier(None),
        Op::Entity(number, _) => Op::Entity(*number, None),
        Op::Local(number, _) => Op::Local(*number, None),
        Op::Now(..) => Op::Now(0, false),
    }
}

pub(crate) fn any_labels() -> impl Strategy<Value = Labels> {
    // Numbers, versions and what is neither.
    let facts = prop::option::of(prop::sample::select(vec!["3", "5.0", "10", "5.0-rc1", "many"]));
    (prop::option::of(1..3u8), prop::option::of(1..3u8), any::<bool>(), facts).prop_map(|(a, b, ns, fact)| {
        let mut labels = Labels::new();
        if let Some(fact) = fact {
            labels.insert("f", fact).unwrap();
        }
        for (key, value) in [("a", a), ("b", b)] {
            if let Some(value) = value {
                labels.insert(key, &value.to_string()).unwrap();
            }
        }
        if ns {
            labels.insert("ns", "n").unwrap();
        }
        labels
    })
}

fn any_selector() -> impl Strategy<Value = Selector> {
    let texts = [
        "all()",
        "a == '1'",
        "a == '2'",
        "has(b)",
        "a != '1'",
        "b in {'1'} || a == '2'",
        "bulkhead.dev/name == 'e2'",
        "f > 3",
        "f != 5",
        "f == 5 || a == '1'",
        "f >= version('5') && has(b)",
        "!f < version('5')",
    ];
    prop::sample::select(texts.to_vec()).prop_map(|text| Selector::parse(text).unwrap())
}

pub(crate) fn any_block() -> impl Strategy<Value = Prefix> {
    let texts = [
        "10.0.0.0/30",
        "10.0.0.4/31",
        "10.0.0.5/32",
        "0.0.0.0/0",
        "::/0",
        "2001:db8::/64",
        "2001:db8::1/128",
        "10.0.0.0/8",
    ];
    prop::sample::select(texts.to_vec()).prop_map(|text| text.parse().unwrap())
}

fn any_peer() -> impl Strategy<Value = Peer> {
    let same = || prop::option::weighted(0.2, prop::sample::select(vec!["a", "b"]));
    let namespaces = prop::sample::select(vec![
        "all()",
        "team == 'red'",
        "team != 'red'",
        "!has(x)",
        "global()",
        "!global() || has(x)",
    ]);
    (
        prop::option::weighted(0.5, any_selector()),
        prop::option::weighted(0.15, any_selector()),
        prop::option::weighted(0.15, namespaces),
        (same(), same()),
        prop::collection::vec(any_block(), 0..2),
        prop::collection::vec(any_block(), 0..2),
        prop::option::weighted(0.15, any_selector()),
        (
            prop::option::weighted(0.1, any_selector()),
            prop::option::weighted(
                0.1,
                prop::sample::select(vec!["*.example.com", "x.example.com", "y.org"]),
            ),
            prop::option::weighted(0.15, prop::sample::select(vec!["n/s", "m/s", "s"])),
        ),
    )
        .prop_map(
            |(
                selector,
                not_selector,
                namespaces,
                (same, not_same),
                cidrs,
                not_cidrs,
                network_sets,
                (hosts, domains, services),
            )| {
                Peer {
                    selector,
                    not_selector,
                    namespace_selector: namespaces.map(|text| Selector::parse(text).unwrap()),
                    service_accounts: vec![],
                    same_labels: same.into_iter().map(ToOwned::to_owned).collect(),
                    not_same_labels: not_same.into_iter().map(ToOwned::to_owned).collect(),
                    cidrs,
                    not_cidrs,
                    network_sets,
                    hosts,
                    domains: domains.into_iter().map(ToOwned::to_owned).collect(),
                    services: services.into_iter().map(|name| name.parse().unwrap()).collect(),
                }
            },
        )
}

fn any_own() -> impl Strategy<Value = Own> {
    let selectors = (prop::option::of(any_selector()), prop::option::weighted(0.3, any_selector()));
    let blocks = (prop::collection::vec(any_block(), 0..2), prop::collection::vec(any_block(), 0..2));
    (selectors, blocks).prop_map(|((selector, not_selector), (cidrs, not_cidrs))| Own {
        selector,
        not_selector,
        cidrs,
        not_cidrs,
    })
}

pub(crate) fn any_rule() -> impl Strategy<Value = Rule> {
    let ports =
        ["any", "tcp", "tcp/80", "tcp/80-443", "udp", "icmp/8", "tcp/81-65535", "tcp/http", "any/http"];
    let ports = prop::sample::select(ports.to_vec()).prop_map(|text| text.parse().unwrap());
    let not_ports = prop::sample::select(vec!["tcp", "tcp/81", "udp/80", "icmp", "tcp/http", "any/http"]);
    let not_ports = prop::option::weighted(0.2, not_ports);
    let versions = prop::option::weighted(0.2, prop::sample::select(vec![IpVersion::V4, IpVersion::V6]));
    let sources = || {
        let ranges = ["53", "0-1023", "54-60000", "1024-65535", "0-65535"];
        let range = prop::sample::select(ranges.to_vec()).prop_map(|text| text.parse().unwrap());
        prop::option::weighted(0.3, prop::collection::vec(range, 1..3)).prop_map(Option::unwrap_or_default)
    };
    let actions = [Action::Allow, Action::Allow, Action::Deny, Action::Pass, Action::Log];
    (
        prop::sample::select(actions.to_vec()),
        prop::collection::vec(any_peer(), 0..3),
        prop::collection::vec(ports, 0..3),
        not_ports.prop_map(|text| text.map(|text| text.parse().unwrap()).into_iter().collect()),
        (sources(), sources()),
        (versions, prop::option::weighted(0.2, any_own())),
        (any::<bool>(), prop::bool::weighted(0.2)),
    )
        .prop_map(|(action, peers, ports, not_ports, sources, (ip_version, own), (log, reject))| Rule {
            action,
            peers,
            ports,
            not_ports,
            source_ports: asked(sources.0, sources.1),
            ip_version,
            own: own.map(Box::new),
            log,
            reject: reject && action == Action::Deny,
        })
}

fn asked(wanted: Vec<PortRange>, excluded: Vec<PortRange>) -> Option<Box<SourcePorts>> {
    let asked = !wanted.is_empty() || !excluded.is_empty();
    asked.then(|| Box::new(SourcePorts { wanted, excluded }))
}

pub(crate) fn any_policy() -> impl Strategy<Value = PolicySpec> {
    let rules = || prop::option::weighted(0.7, prop::collection::vec(any_rule(), 0..4));
    let tiers = ["admin", "application", "application", "baseline"];
    let time = || prop::option::weighted(0.15, (0..4u64).prop_map(|seconds| Timestamp { seconds }));
    let times = (time(), time());
    let forward = prop::bool::weighted(0.3);
    (
        prop::sample::select(tiers.to_vec()),
        0..3u8,
        any::<bool>(),
        any_selector(),
        rules(),
        rules(),
        (times, forward),
    )
        .prop_map(|(tier, order, audit, applies_to, mut ingress, mut egress, (times, forward))| {
            // What is forwarded has no end of its own to ask about.
            if forward {
                ingress.iter_mut().chain(&mut egress).flatten().for_each(|rule: &mut Rule| rule.own = None);
            }
            PolicySpec {
                tier: tier.into(),
                order: Order::new(order.into()),
                mode: if audit && order == 2 { Mode::Audit } else { Mode::Enforce },
                valid_from: times.0,
                valid_until: times.1,
                apply_on_forward: forward,
                applies_to,
                ingress,
                egress,
            }
        })
}

fn any_op() -> impl Strategy<Value = Op> {
    let host = (0..8u8).prop_map(|last| Prefix::host([10, 0, 0, last].into()));
    let host6 = (1..3u16).prop_map(|last| Prefix::host([0x2001, 0xdb8, 0, 0, 0, 0, 0, last].into()));
    let hosts = prop::collection::vec(prop_oneof![3 => host, 1 => host6], 0..3);
    let local_hosts =
        (0..8u8, any::<bool>(), prop::option::weighted(0.2, 0..8u8)).prop_map(|(last, both, more)| {
            let v6 = both.then(|| Prefix::host([0x2001, 0xdb8, 0, 0, 0, 0, 0, u16::from(last)].into()));
            let v4 =
                [Some(last), more].into_iter().flatten().map(|last| Prefix::host([10, 0, 0, last].into()));
            v4.chain(v6).collect()
        });
    let entity = (0..8u8, any_labels(), hosts, prop::collection::vec(any_block(), 0..3), any::<u8>());
    prop_oneof![
        4 => (0..4u8, prop::option::weighted(0.8, any_policy())).prop_map(|(n, p)| Op::Policy(n, p)),
        1 => (any::<bool>(), any::<bool>(), any::<bool>()).prop_map(|(there, first, pass)| {
            let order = Order::new(if first { 1.0 } else { 2e9 });
            let default_action = if pass { DefaultAction::Pass } else { DefaultAction::Deny };
            Op::Tier(there.then_some(TierSpec { order, default_action }))
        }),
        4 => entity.prop_map(|(n, labels, hosts, blocks, there)| {
            let prefixes = if kind_of(n) == Kind::NetworkSet { blocks } else { hosts };
            Op::Entity(n, (there > 50).then_some((labels, prefixes)))
        }),
        3 => (0..3u8, any_labels(), local_hosts, any::<u8>())
            .prop_map(|(n, labels, hosts, there)| Op::Local(n, (there > 50).then_some((labels, hosts)))),
        1 => (0..4u8, any::<bool>()).prop_map(|(now, denies)| Op::Now(now, denies)),
    ]
}

fn histories() -> impl Strategy<Value = Vec<Op>> {
    prop::collection::vec(any_op(), 1..14)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    /// Tables equal the reference after every step, and equal tables made from scratch.
    #[test]
    fn tables_follow_the_reference_through_any_history(ops in histories()) {
        let mut fleet = Fleet::new();
        for (index, op) in ops.iter().enumerate() {
            fleet.run(op);
            fleet.settle();
            fleet.check_against_reference();
            prop_assert_eq!(canonical(fleet.engine.policy()), from_scratch(&ops[..=index]));
        }
    }

    /// The end state is the same whether updates come one at a time, all at once, in reverse order (of
    /// independent subjects), split into removal and addition, or with flushes in between.
    #[test]
    fn the_end_depends_on_the_state_alone(ops in histories(), flush_at in prop::collection::vec(any::<bool>(), 14)) {
        let expected = from_scratch(&ops);
        let mut squashed = Fleet::new();
        ops.iter().for_each(|op| squashed.run(op));
        squashed.settle();
        prop_assert_eq!(&canonical(squashed.engine.policy()), &expected, "squashed");

        let mut reversed = Fleet::new();
        let mut seen = BTreeSet::new();
        for op in ops.iter().rev().filter(|op| seen.insert(subject(op))) {
            reversed.run(op);
            reversed.settle();
        }
        prop_assert_eq!(&canonical(reversed.engine.policy()), &expected, "reversed");

        let mut split = Fleet::new();
        for (op, flush) in ops.iter().zip(&flush_at) {
            split.run(&removal(op));
            if *flush {
                split.engine.flush();
            }
            split.run(op);
            split.engine.flush();
        }
        split.settle();
        prop_assert_eq!(&canonical(split.engine.policy()), &expected, "split");
    }

    /// While a delta is applied piece by piece, every question gets the answer before or the answer after.
    #[test]
    fn no_packet_meets_a_third_state(ops in histories()) {
        let mut fleet = Fleet::new();
        let mut tables = HostPolicy::default();
        for op in &ops {
            fleet.run(op);
            for delta in fleet.settle() {
                let before = tables.clone();
                let mut after = tables.clone();
                after.apply(&delta);
                for piece in pieces(&delta) {
                    tables.apply(&piece);
                    assert_between(&before, &tables, &after);
                }
                prop_assert_eq!(&tables, &after);
            }
            prop_assert_eq!(&tables, fleet.engine.policy());
        }
    }
}

/// A delta cut up as a dataplane applies it.
fn pieces(delta: &HostDelta) -> Vec<HostDelta> {
    let blank = || HostDelta { revision: delta.revision, ..HostDelta::default() };
    let mut pieces = vec![HostDelta {
        rules: delta.rules.clone(),
        rows: delta.rows.clone(),
        policies: delta.policies.clone(),
        ..blank()
    }];
    let mut upserts: Vec<_> = delta.addresses.iter().filter(|(_, class)| class.is_some()).collect();
    upserts.sort_by_key(|(prefix, _)| std::cmp::Reverse(prefix.mapped_len()));
    let mut removals: Vec<_> = delta.addresses.iter().filter(|(_, class)| class.is_none()).collect();
    removals.sort_by_key(|(prefix, _)| prefix.mapped_len());
    for (prefix, class) in upserts.into_iter().chain(removals) {
        pieces.push(HostDelta { addresses: BTreeMap::from([(*prefix, *class)]), ..blank() });
    }
    for (name, binding) in &delta.endpoints {
        let endpoints = BTreeMap::from([(Arc::clone(name), binding.clone())]);
        pieces.push(HostDelta { endpoints, ..blank() });
    }
    pieces.push(HostDelta {
        removed_rows: delta.removed_rows.clone(),
        removed_policies: delta.removed_policies.clone(),
        removed_rules: delta.removed_rules.clone(),
        ..blank()
    });
    pieces
}

fn assert_between(before: &HostPolicy, now: &HostPolicy, after: &HostPolicy) {
    for name in now.endpoints.keys() {
        // What an endpoint's policy says of its own addresses is never asked: own traffic passes, and what is the host's
        // own is not forwarded. (When an endpoint itself changes, its address and its binding do, and only there the two
        // could mix.)
        let holder = name.strip_suffix(FORWARDED).unwrap_or(name);
        let own = |peer: &IpAddr| {
            [before, now, after].iter().any(|policy| {
                policy.endpoints.get(holder).is_some_and(|endpoint| endpoint.addresses.contains(peer))
            })
        };
        for direction in Direction::BOTH {
            for peer in addresses().into_iter().filter(|peer| !own(peer)) {
                for (key, source) in questions() {
                    let answer = |policy: &HostPolicy| policy.lookup(name, direction, peer, key, source);
                    let found = answer(now);
                    assert!(
                        found == answer(before) || found == answer(after),
                        "{name} {direction} {peer} {key:#x} from {source}: {found:?} is neither {:?} nor {:?}",
                        answer(before),
                        answer(after)
                    );
                }
            }
        }
    }
}

fn labels(pairs: &[(&str, &str)]) -> Labels {
    let mut labels = Labels::new();
    pairs.iter().for_each(|(key, value)| labels.insert(key, value).unwrap());
    labels
}

fn allow_from(applies_to: &str, from: Peer) -> PolicySpec {
    PolicySpec {
        ingress: Some(vec![Rule { peers: vec![from], ..Rule::new(Action::Allow) }]),
        ..PolicySpec::new(Selector::parse(applies_to).unwrap())
    }
}

fn selector_peer(text: &str) -> Peer {
    Peer { selector: Some(Selector::parse(text).unwrap()), ..Peer::default() }
}

/// P2: twenty instances of A allowed to twenty of B.
#[test]
fn a_new_instance_costs_one_address_where_it_matters_and_nothing_elsewhere() {
    let instance =
        |number: u8, role: &str| (labels(&[("role", role)]), vec![Prefix::host([10, 0, 1, number].into())]);
    let mut fleet = Fleet::new();
    fleet.run(&Op::Policy(0, Some(allow_from("role == 'b'", selector_peer("role == 'a'")))));
    fleet.run(&Op::Local(0, Some(instance(100, "b"))));
    fleet.run(&Op::Entity(0, Some(instance(0, "a"))));
    fleet.settle();
    for number in 1..20 {
        fleet.run(&Op::Entity(100 + number, Some(instance(number, "a"))));
        let written: usize = fleet.settle().iter().map(HostDelta::entries_written).sum();
        assert_eq!(written, 1, "one entry for instance {number}");
    }
    fleet.run(&Op::Entity(200, Some(instance(50, "c"))));
    assert!(fleet.settle().iter().all(HostDelta::is_empty), "nobody here reads role c");
}

#[test]
fn a_policy_waits_for_its_members_and_a_new_endpoint_is_closed_until_then() {
    let mut engine = HostEngine::new(HOST);
    let entity = make_entity("l0", Kind::Workload, &labels(&[("role", "b")]), &[], Some(HOST));
    engine.set_local(&"l0".into(), Some(LocalEndpoint { entity, attachment: Attachment::Interface(7) }));
    engine.flush();
    let open = engine.policy().endpoints["l0"].clone();
    assert_ne!(open.ingress, CompiledId::NONE);
    let spec = allow_from("role == 'b'", selector_peer("role == 'a'"));
    engine.set_policy(&policy_key(0), Some(&spec));
    assert!(engine.flush().endpoints.is_empty(), "the old tables stay");
    let waiting = Selector::parse("role == 'a'").unwrap();
    assert_eq!(engine.not_ready()["l0"], [NotReady::Waiting(waiting.clone())]);

    let entity = make_entity("l1", Kind::Workload, &labels(&[("role", "b")]), &[], Some(HOST));
    engine.set_local(&"l1".into(), Some(LocalEndpoint { entity, attachment: Attachment::Interface(8) }));
    engine.flush();
    assert_eq!(engine.policy().endpoints["l1"].ingress, CompiledId::NONE, "closed");

    engine.set_members(&waiting, []);
    engine.flush();
    assert!(engine.not_ready().is_empty());
    assert_ne!(engine.policy().endpoints["l0"].ingress, open.ingress);
}

#[test]
fn a_policy_in_an_unknown_tier_leaves_the_last_good_tables_and_is_named() {
    let mut fleet = Fleet::new();
    fleet.run(&Op::Local(0, Some((labels(&[("role", "b")]), vec![]))));
    fleet.settle();
    let before = fleet.engine.policy().clone();
    let mut spec = allow_from("role == 'b'", selector_peer("role == 'a'"));
    spec.tier = "nowhere".into();
    fleet.engine.set_policy(&policy_key(0), Some(&spec));
    fleet.settle();
    assert_eq!(fleet.engine.policy().endpoints, before.endpoints);
    let reason = NotReady::UnknownTier { policy: "p0".into(), tier: "nowhere".into() };
    assert_eq!(fleet.engine.not_ready()["l0"], [reason]);
}

/// The cost of source ports is in the rows that they touch, and what no part tells apart is stored once.
#[test]
fn source_ports_cost_their_boundaries_where_they_matter() {
    let mut fleet = Fleet::new();
    let mut spec = allow_from("all()", selector_peer("a == '1'"));
    let rule = &mut spec.ingress.as_mut().unwrap()[0];
    rule.source_ports = asked(vec!["53".parse().unwrap(), "65535".parse().unwrap()], vec![]);
    let mut plain = rule.clone();
    (plain.peers, plain.source_ports) = (vec![selector_peer("b == '1'")], None);
    spec.ingress.as_mut().unwrap().push(plain);
    fleet.run(&Op::Policy(0, Some(spec)));
    fleet.run(&Op::Local(0, Some((labels(&[]), vec![Prefix::host([10, 0, 0, 1].into())]))));
    for (number, label) in [(0, ("a", "1")), (2, ("b", "1"))] {
        let address = Prefix::host([10, 0, 0, 2 + number].into());
        fleet.run(&Op::Entity(number, Some((labels(&[label]), vec![address]))));
    }
    fleet.settle();
    fleet.check_against_reference();
    let policy = fleet.engine.policy();
    let row = |last: u8| {
        let class = policy.class_of([10, 0, 0, last].into());
        let compiled = &policy.policies[&policy.endpoints["l0"].ingress];
        compiled.rows.get(&class).unwrap_or(&compiled.default_row).clone()
    };
    let starts: Vec<_> = row(2).variants().map(|(from, _)| from).collect();
    assert_eq!(starts, [0, 53, 54, 65535]);
    let columns: Vec<_> = row(2).variants().map(|(_, columns)| Arc::clone(columns)).collect();
    assert!(Arc::ptr_eq(&columns[0], &columns[2]) && Arc::ptr_eq(&columns[1], &columns[3]));
    assert!(!row(4).reads_source_port() && !row(7).reads_source_port());
    let verdict = |key, source| policy.lookup("l0", Direction::Ingress, [10, 0, 0, 2].into(), key, source);
    let allowed = |key, source| verdict(key, source).unwrap().verdict == Verdict::Allow;
    assert!(allowed(Protocol::TCP.key(1), 65535) && allowed(Protocol::UDPLITE.key(1), 53));
    assert!(!allowed(Protocol::TCP.key(1), 65534) && !allowed(Protocol(47).key(0), 53));
}

#[test]
fn too_many_source_ports_leave_the_last_good_tables_and_are_told() {
    let mut fleet = Fleet::new();
    fleet.run(&Op::Local(0, Some((labels(&[]), vec![]))));
    fleet.settle();
    let before = fleet.engine.policy().clone();
    for number in 0..3u16 {
        let mut spec = allow_from("all()", selector_peer("a == '1'"));
        let port = |port: u16| PortRange { first: port, last: port };
        spec.ingress.as_mut().unwrap()[0].source_ports =
            asked((0..200).map(|each| port(1 + number * 1000 + each * 2)).collect(), vec![]);
        fleet.run(&Op::Policy(number.try_into().unwrap(), Some(spec)));
    }
    fleet.settle();
    assert_eq!(fleet.engine.policy().endpoints, before.endpoints);
    let reason = NotReady::TooManySourcePorts { direction: Direction::Ingress, parts: 1201 };
    assert_eq!(fleet.engine.not_ready()["l0"], [reason]);
    fleet.run(&Op::Local(1, Some((labels(&[]), vec![]))));
    fleet.settle();
    assert_eq!(fleet.engine.policy().endpoints["l1"].ingress, CompiledId::NONE, "a new one is closed");
    fleet.run(&Op::Policy(1, None));
    fleet.settle();
    assert!(fleet.engine.not_ready().is_empty());
    fleet.check_against_reference();
}

#[test]
fn rule_numbers_survive_a_restart() {
    let mut fleet = Fleet::new();
    fleet.run(&Op::Policy(0, Some(allow_from("all()", selector_peer("has(a)")))));
    fleet.run(&Op::Local(0, Some((labels(&[]), vec![]))));
    fleet.settle();
    let rules = fleet.engine.policy().rules.clone();
    let mut second = Fleet::new();
    second.engine.adopt_rules(&rules);
    second.run(&Op::Local(0, Some((labels(&[]), vec![]))));
    second.run(&Op::Policy(1, Some(allow_from("all()", selector_peer("has(a)")))));
    second.run(&Op::Policy(0, Some(allow_from("all()", selector_peer("has(a)")))));
    second.settle();
    for (id, rule) in &rules {
        assert_eq!(second.engine.policy().rules.get(id), Some(rule));
    }
}

#[test]
fn a_named_port_means_what_the_destination_says() {
    let mut fleet = Fleet::new();
    let host = |last: u8| vec![Prefix::host([10, 0, 0, last].into())];
    let mut spec = allow_from("all()", selector_peer("all()"));
    let rule = Rule { ports: vec!["tcp/http".parse().unwrap()], ..spec.ingress.take().unwrap().remove(0) };
    spec.egress = Some(vec![rule]);
    fleet.run(&Op::Local(0, Some((labels(&[]), host(1)))));
    fleet.run(&Op::Entity(0, Some((labels(&[("b", "1")]), host(2)))));
    fleet.run(&Op::Policy(0, Some(spec)));
    fleet.settle();
    fleet.check_against_reference();
    fleet.run(&Op::Entity(2, Some((labels(&[("b", "2")]), host(3)))));
    fleet.settle();
    fleet.check_against_reference();
    fleet.run(&Op::Entity(0, Some((labels(&[("b", "2")]), host(2)))));
    fleet.settle();
    fleet.check_against_reference();
}
