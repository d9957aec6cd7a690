//! Random histories: few addresses, labels and ports, so that what rules speak of meets and overlaps.

use std::collections::BTreeMap;
use std::net::IpAddr;

use bulkhead_model::ports::Protocol;
use serde_json::{Map, Value, json};

use super::case::{Case, Question, Step, read};
use super::history::HOST;
use super::world::SLOTS;
use crate::random::Random;

/// Addresses that workloads have, of this host or another.
const POOL: [&str; 12] = [
    "10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4", "10.0.0.5", "10.0.0.6", "fd00::1", "fd00::2", "fd00::3",
    "fd00::4", "fd00::5", "fd00::6",
];
/// Those of hosts, names and nobody.
const OTHERS: [&str; 8] = [
    "10.0.0.7",
    "10.0.1.1",
    "192.0.2.1",
    "192.0.2.128",
    "198.51.100.1",
    "fd00::7",
    "2001:db8::1",
    "2001:db8:1::1",
];
const BLOCKS: [&str; 18] = [
    "0.0.0.0/0",
    "10.0.0.0/8",
    "10.0.0.0/24",
    "10.0.0.0/29",
    "10.0.0.0/30",
    "10.0.0.4/31",
    "10.0.0.3/32",
    "10.0.0.5/32",
    "192.0.2.0/24",
    "192.0.2.128/25",
    "::/0",
    "fd00::/8",
    "fd00::/64",
    "fd00::/126",
    "fd00::4/127",
    "fd00::3/128",
    "2001:db8::/32",
    "2001:db8::/64",
];
const ROLES: [&str; 3] = ["web", "db", "cache"];
const ENVIRONMENTS: [&str; 2] = ["prod", "dev"];
const TEAMS: [&str; 2] = ["red", "blue"];
const NAMESPACES: [&str; 2] = ["n1", "n2"];
const TERMS: [&str; 16] = [
    "all()",
    "role == 'web'",
    "role == 'db'",
    "role != 'db'",
    "role in {'web', 'cache'}",
    "role not in {'web'}",
    "has(role)",
    "!has(env)",
    "env == 'prod'",
    "env == 'dev'",
    "role starts with 'c'",
    "role contains 'b'",
    "zone == 'edge'",
    "bulkhead.dev/name == 'w1.here'",
    "risk > 3",
    "risk <= 5",
];
/// Borders of what rules say; one less and one more are asked about too.
const PORTS: [u16; 9] = [1, 53, 80, 81, 443, 8000, 8080, 8100, 65534];
const SOURCE_PORTS: [u16; 7] = [1, 53, 123, 1023, 1024, 32768, 61000];
const SOURCE_RANGES: [&str; 7] = ["53", "0-1023", "1024-65535", "32768-61000", "123", "54-60000", "0-65535"];
const TIMES: u64 = 4;
/// Connections in each state, if all are different.
const FLOWS: usize = 60;

struct Maker {
    random: Random,
    /// The objects that there are, by the name under which a step removes them.
    objects: BTreeMap<String, Value>,
}

/// A history that this seed always makes.
pub fn random_case(seed: u64) -> Case {
    // Neighbouring seeds must not look alike, and none may be 0.
    let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    for _ in 0..4 {
        random.below(2);
    }
    let mut maker = Maker { random, objects: BTreeMap::new() };
    let mut steps = vec![maker.beginning()];
    for _ in 0..2 + maker.random.below(4) {
        steps.push(maker.change());
    }
    Case { why: format!("random history {seed}"), steps }
}

impl Maker {
    fn of<T: Copy>(&mut self, list: &[T]) -> T {
        list[self.random.below(list.len())]
    }

    fn chance(&mut self, percent: usize) -> bool {
        self.random.below(100) < percent
    }

    fn several<T>(&mut self, most: usize, mut one: impl FnMut(&mut Self) -> T) -> Vec<T> {
        let count = self.random.below(most + 1);
        (0..count).map(|_| one(self)).collect()
    }

    fn set(&mut self, step: &mut Step, object: Value) {
        self.objects.insert(identity(&object), object.clone());
        step.set.push(object);
    }

    fn beginning(&mut self) -> Step {
        let mut step = Step::default();
        let tier = self.tier();
        self.set(&mut step, tier);
        for name in NAMESPACES {
            let namespace = self.namespace(name);
            self.set(&mut step, namespace);
        }
        let own_host = json!({ "apiVersion": "bulkhead.dev/v1", "kind": "Host",
            "metadata": { "name": HOST, "labels": { "zone": "edge" } }, "spec": { "agentVersion": "0.1.0" } });
        self.set(&mut step, own_host);
        for number in 0..SLOTS {
            if !self.chance(20) {
                self.workload(&mut step, number, HOST);
            }
            if self.chance(50) {
                self.workload(&mut step, number, "there");
            }
        }
        for number in 0..2 {
            self.surroundings(&mut step, number);
        }
        for number in 0..1 + self.random.below(6) {
            self.policy(&mut step, number);
        }
        self.flows(&mut step, FLOWS);
        step
    }

    fn change(&mut self) -> Step {
        let mut step = Step { restart: self.chance(15), ..Step::default() };
        for _ in 0..1 + self.random.below(4) {
            let number = self.random.below(SLOTS);
            match self.random.below(20) {
                0 => step.now = Some(self.random.below(TIMES as usize) as u64),
                1 => {
                    let tier = self.tier();
                    self.set_again(&mut step, tier);
                }
                2 => {
                    let name = self.of(&NAMESPACES);
                    let namespace = self.namespace(name);
                    self.set_again(&mut step, namespace);
                }
                3 => {
                    let posture = self.of(&["Allow", "Deny"]);
                    let settings = json!({ "apiVersion": "bulkhead.dev/v1", "kind": "Settings",
                        "metadata": { "name": "default" }, "spec": { "defaultPosture": posture } });
                    self.set_again(&mut step, settings);
                }
                4 | 5 => self.surroundings(&mut step, number % 2),
                6..=9 => self.workload(&mut step, number, HOST),
                10..=12 => self.workload(&mut step, number, "there"),
                13 | 14 => {
                    // Tiers and namespaces are what others stand in.
                    let stays = |name: &&String| !["Tier/", "Namespace/"].iter().any(|k| name.starts_with(k));
                    let names: Vec<_> = self.objects.keys().filter(stays).cloned().collect();
                    if !names.is_empty() {
                        let name = names[self.random.below(names.len())].clone();
                        remove(&mut step, &mut self.objects, &name);
                    }
                }
                _ => self.policy(&mut step, number),
            }
        }
        self.flows(&mut step, FLOWS);
        step
    }

    /// Sets an object that the step may have set before.
    fn set_again(&mut self, step: &mut Step, object: Value) {
        step.set.retain(|other| identity(other) != identity(&object));
        step.remove.retain(|removed| *removed != identity(&object));
        self.set(step, object);
    }

    fn tier(&mut self) -> Value {
        let (order, action) = (self.of(&[500, 500_000, 2_000_000]), self.of(&["Pass", "Deny"]));
        json!({ "apiVersion": "bulkhead.dev/v1", "kind": "Tier", "metadata": { "name": "t" },
            "spec": { "order": order, "defaultAction": action } })
    }

    fn namespace(&mut self, name: &str) -> Value {
        let team = self.of(&TEAMS);
        let mut object = json!({ "apiVersion": "bulkhead.dev/v1", "kind": "Namespace",
            "metadata": { "name": name, "labels": { "team": team } }, "spec": {} });
        if self.chance(25) {
            object["spec"]["defaultPosture"] = json!(self.of(&["Allow", "Deny"]));
        }
        object
    }

    fn labels(&mut self) -> Value {
        let mut labels = Map::new();
        if self.chance(80) {
            labels.insert("role".into(), json!(self.of(&ROLES)));
        }
        if self.chance(60) {
            labels.insert("env".into(), json!(self.of(&ENVIRONMENTS)));
        }
        if self.chance(30) {
            labels.insert("risk".into(), json!(self.of(&["1", "4", "9", "much"])));
        }
        Value::Object(labels)
    }

    /// Addresses of the pool that nobody has.
    fn free(&mut self) -> Vec<&'static str> {
        let taken: Vec<&Value> = self
            .objects
            .iter()
            .filter(|(name, _)| name.starts_with("Workload/"))
            .flat_map(|(_, object)| object["spec"]["addresses"].as_array().into_iter().flatten())
            .collect();
        POOL.into_iter().filter(|address| !taken.iter().any(|taken| *taken == address)).collect()
    }

    /// A workload that is new, or other than before: labels, addresses, named ports.
    fn workload(&mut self, step: &mut Step, number: usize, host: &str) {
        let name = format!("w{number}.{host}");
        // Half of the names stand in a namespace, always the same one: elsewhere it would be another workload.
        let namespace = (number >= SLOTS / 2).then(|| NAMESPACES[number % 2]);
        let known = format!("Workload/{}{name}", namespace.map_or_else(String::new, |n| format!("{n}/")));
        let before = self.objects.remove(&known);
        step.set.retain(|object| identity(object) != known);
        step.remove.retain(|removed| *removed != known);
        let mut free = self.free();
        let mut addresses = Vec::new();
        for _ in 0..1 + self.random.below(3) {
            if !free.is_empty() {
                addresses.push(free.swap_remove(self.random.below(free.len())));
            }
        }
        let mut addresses = json!(addresses);
        let mut labels = self.labels();
        // Often only one thing changes.
        if let Some(before) = before {
            match self.random.below(3) {
                0 => addresses = before["spec"]["addresses"].clone(),
                1 => labels = before["metadata"]["labels"].clone(),
                _ => {}
            }
        }
        let mut spec = json!({ "host": host, "addresses": addresses });
        if self.chance(60) {
            let (http, dns) = (self.of(&[80, 8080]), self.of(&[53, 5353]));
            spec["ports"] =
                json!([{ "name": "http", "port": http }, { "name": "dns", "protocol": "udp", "port": dns }]);
        }
        if self.chance(30) {
            spec["serviceAccount"] = json!(self.of(&["robot", "human"]));
        }
        let mut metadata = json!({ "name": name, "labels": labels });
        if let Some(namespace) = namespace {
            metadata["namespace"] = json!(namespace);
        }
        self.set(step, json!({ "apiVersion": "bulkhead.dev/v1", "kind": "Workload", "metadata": metadata, "spec": spec }));
    }

    /// What is no workload and has addresses.
    fn surroundings(&mut self, step: &mut Step, number: usize) {
        let object = match self.random.below(4) {
            0 | 1 => {
                let (first, labels) = (self.of(&BLOCKS), self.labels());
                let cidrs = [vec![first], self.several(2, |maker| maker.of(&BLOCKS))].concat();
                json!({ "apiVersion": "bulkhead.dev/v1", "kind": "NetworkSet",
                    "metadata": { "name": format!("s{number}"), "labels": labels }, "spec": { "cidrs": cidrs } })
            }
            2 => {
                let (zone, address) = (self.of(&["edge", "core"]), self.of(&OTHERS));
                json!({ "apiVersion": "bulkhead.dev/v1", "kind": "Host",
                    "metadata": { "name": "there", "labels": { "zone": zone } },
                    "spec": { "agentVersion": "0.1.0", "addresses": [address] } })
            }
            _ => {
                let addresses = [self.of(&OTHERS), self.of(&POOL)];
                json!({ "apiVersion": "bulkhead.dev/v1", "kind": "NameTable", "metadata": { "name": "names" },
                    "spec": { "names": { "api.example.org": addresses } } })
            }
        };
        self.set_again(step, object);
    }

    fn selector(&mut self) -> String {
        let (a, b) = (self.of(&TERMS), self.of(&TERMS));
        match self.random.below(6) {
            0 => format!("{a} && {b}"),
            1 => format!("{a} || {b}"),
            2 => format!("!({a} && {b})"),
            _ => a.to_owned(),
        }
    }

    /// A policy that a repository takes: one that can never match anything is refused.
    fn policy(&mut self, step: &mut Step, number: usize) {
        let policy = loop {
            let policy = self.any_policy(number);
            if read(&policy).is_ok() {
                break policy;
            }
        };
        self.set_again(step, policy);
    }

    fn any_policy(&mut self, number: usize) -> Value {
        let mut spec = json!({
            "tier": self.of(&["t", "t", "admin", "application", "application", "baseline"]),
            "order": self.random.below(3),
            "appliesTo": self.selector(),
        });
        if self.chance(20) {
            spec["mode"] = json!("Audit");
        }
        if self.chance(10) {
            let second = self.random.below(TIMES as usize);
            spec[self.of(&["validFrom", "validUntil"])] = json!(format!("1970-01-01T00:00:0{second}Z"));
        }
        let directions = self.random.below(5);
        if directions != 0 {
            spec["ingress"] = json!(self.several(4, |maker| maker.rule("from")));
        }
        if directions != 1 {
            spec["egress"] = json!(self.several(4, |maker| maker.rule("to")));
        }
        let mut metadata = json!({ "name": format!("p{number}") });
        if number == 3 {
            metadata["namespace"] = json!(NAMESPACES[1]);
        }
        json!({ "apiVersion": "bulkhead.dev/v1", "kind": "Policy", "metadata": metadata, "spec": spec })
    }

    fn rule(&mut self, peers: &str) -> Value {
        let action = self.of(&["Allow", "Allow", "Allow", "Deny", "Deny", "Pass", "Log"]);
        let mut rule = json!({ "action": action });
        let some = self.several(2, |maker| maker.peer(peers == "to"));
        if !some.is_empty() {
            rule[peers] = json!(some);
        }
        for (field, percent) in [("ports", 60), ("notPorts", 15)] {
            if self.chance(percent) {
                let (first, more) = (self.port(), self.several(2, Self::port));
                rule[field] = json!([vec![first], more].concat());
            }
        }
        for (field, percent) in [("sourcePorts", 20), ("notSourcePorts", 10)] {
            if self.chance(percent) {
                rule[field] = json!([self.of(&SOURCE_RANGES)]);
            }
        }
        if self.chance(10) {
            rule["ipVersion"] = json!(self.of(&[4, 6]));
        }
        if self.chance(10) {
            rule["endpoint"] = match self.random.below(3) {
                0 => json!({ "selector": self.selector() }),
                1 => json!({ "notSelector": self.selector() }),
                _ => json!({ "cidrs": [self.of(&BLOCKS)] }),
            };
        }
        if self.chance(15) {
            rule["log"] = json!(true);
        }
        rule
    }

    fn port(&mut self) -> String {
        let (mut first, mut last) = (self.of(&PORTS), self.of(&PORTS));
        if first > last {
            (first, last) = (last, first);
        }
        let protocol = self.of(&["tcp", "tcp", "udp", "sctp"]);
        match self.random.below(12) {
            0 => "any".into(),
            1 => protocol.into(),
            2 => self.of(&["icmp", "icmp/8", "icmp/8/0", "icmp/3", "icmpv6", "icmpv6/128", "50"]).into(),
            3 => self.of(&["tcp/http", "any/http", "udp/dns", "any/dns"]).into(),
            4..=6 => format!("{protocol}/{first}"),
            _ => format!("{protocol}/{first}-{last}"),
        }
    }

    fn peer(&mut self, egress: bool) -> Value {
        let one = |maker: &mut Self| json!([maker.of(&BLOCKS)]);
        let mut peer = match self.random.below(12) {
            0..=3 => json!({ "selector": self.selector() }),
            4..=6 => json!({ "cidrs": one(self) }),
            7 => json!({ "networkSets": self.of(&["has(role)", "env == 'prod'", "all()"]) }),
            8 => {
                json!({ "namespaceSelector": self.of(&["all()", "team == 'red'", "team != 'red'", "global()"]) })
            }
            9 => json!({ "sameLabels": [self.of(&["role", "env"])] }),
            10 => json!({ "hosts": self.of(&["all()", "zone == 'edge'", "zone == 'core'"]) }),
            _ if egress => json!({ "domains": [self.of(&["api.example.org", "*.example.org"])] }),
            _ => json!({ "notSameLabels": [self.of(&["role", "env"])] }),
        };
        if self.chance(20) {
            peer["notSelector"] = json!(self.selector());
        }
        if self.chance(20) {
            peer["notCidrs"] = one(self);
        }
        if self.chance(10) && peer.get("cidrs").is_none() {
            peer["cidrs"] = one(self);
        }
        if self.chance(5) {
            peer["serviceAccounts"] = json!(["robot"]);
        }
        peer
    }

    /// Connections of which at least one end is usually a workload of this host.
    fn flows(&mut self, step: &mut Step, count: usize) {
        let ours: Vec<IpAddr> = self
            .objects
            .iter()
            .filter(|(name, object)| name.starts_with("Workload/") && object["spec"]["host"] == HOST)
            .flat_map(|(_, object)| object["spec"]["addresses"].as_array().into_iter().flatten())
            .map(|address| address.as_str().unwrap().parse().unwrap())
            .collect();
        for _ in 0..if ours.is_empty() { 0 } else { count } {
            let own = ours[self.random.below(ours.len())];
            let everybody = POOL.iter().chain(&OTHERS).map(|address| address.parse::<IpAddr>().unwrap());
            let others: Vec<IpAddr> =
                everybody.filter(|other| other.is_ipv4() == own.is_ipv4() && *other != own).collect();
            let other = others[self.random.below(others.len())];
            let (from, to) = if self.chance(50) { (own, other) } else { (other, own) };
            let flow = self.flow(from, to);
            if !step.flows.iter().any(|other| other.is_same_connection(&flow)) {
                step.flows.push(flow);
            }
        }
    }

    fn flow(&mut self, from: IpAddr, to: IpAddr) -> Question {
        let near = |maker: &mut Self, port: u16| port - 1 + maker.random.below(3) as u16;
        let (port, source) = (self.of(&PORTS), self.of(&SOURCE_PORTS));
        let (port, source_port) = (near(self, port), near(self, source));
        let (protocol, port, source_port) = match self.random.below(20) {
            0..=9 => (Protocol::TCP, port, source_port),
            10..=14 => (Protocol::UDP, port, source_port),
            15 | 16 => (Protocol::SCTP, port, source_port),
            17 => (Protocol(50), 0, 0),
            _ if from.is_ipv4() => (Protocol::ICMP, 0x0800, 0),
            _ => (Protocol::ICMPV6, 0x8000, 0),
        };
        Question { from, to, protocol, port, source_port, expect: None }
    }
}

fn identity(object: &Value) -> String {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let metadata = &object["metadata"];
    let namespace = metadata.get("namespace").map_or_else(String::new, |n| format!("{}/", text(n)));
    format!("{}/{namespace}{}", text(&object["kind"]), text(&metadata["name"]))
}

/// An object goes, unless the step has made it.
fn remove(step: &mut Step, objects: &mut BTreeMap<String, Value>, name: &str) {
    if !step.set.iter().any(|object| identity(object) == name) {
        objects.remove(name);
        step.remove.push(name.to_owned());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::differential::history::State;

    #[test]
    fn what_is_made_would_be_taken() {
        for seed in 0..300 {
            let case = random_case(seed);
            State::all(&case).unwrap_or_else(|error| panic!("{error}: {}", case.text()));
            let again: Case = serde_json::from_str(&case.text()).unwrap();
            assert_eq!(again, case, "read as it was written");
        }
    }
}
