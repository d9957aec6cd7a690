//! Random policies: everything that a rule can say, about few things.

use serde_json::{Value, json};

use super::{BLOCKS, Maker, NAMESPACES, PORTS, TIMES};
use crate::differential::case::{Step, read};

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
const SOURCE_RANGES: [&str; 7] = ["53", "0-1023", "1024-65535", "32768-61000", "123", "54-60000", "0-65535"];

impl Maker {
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
    pub(super) fn policy(&mut self, step: &mut Step, number: usize) {
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
        if action == "Deny" && self.chance(30) {
            rule["reject"] = json!(true);
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
}
