//! What the kernel's tables say, beside what they should say.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use bulkhead_model::Direction;
use bulkhead_model::host_policy::{Attachment, Cell, EndpointBinding, HostPolicy};
use bulkhead_model::ports::PortKey;
use serde_json::{Value, json};

use super::Agent;
use super::report::tables;

/// Most differences that are listed one by one.
const DIFFERENCES_MAX: usize = 100;

/// A question about one new connection.
#[derive(Debug)]
pub(crate) struct Lookup {
    /// A workload of this host, anybody's name who is known here, or an address.
    pub(crate) from: String,
    /// Likewise.
    pub(crate) to: String,
    /// Protocol and destination port.
    pub(crate) key: PortKey,
    /// Port of whoever begins; 0 for protocols without.
    pub(crate) source_port: u16,
}

impl Agent {
    /// The tables read back, and where they are others than they should be.
    pub(super) fn dump(&self) -> Value {
        let expected = self.engine.policy();
        match self.dataplane.read_back() {
            Ok(found) => {
                let all = differences(expected, &found);
                let shown: Vec<&String> = all.iter().take(DIFFERENCES_MAX).collect();
                json!({
                    "dataplane": self.dataplane.name(),
                    "programmed": self.programmed,
                    "tables": tables(&found, &expected.rules),
                    "differences": shown,
                    "moreDifferences": all.len() - shown.len(),
                })
            }
            Err(error) => json!({ "dataplane": self.dataplane.name(), "error": error.to_string() }),
        }
    }

    /// What the kernel says of a connection at each end that is here, and what it should say.
    pub(super) fn look_up(&self, lookup: &Lookup) -> Value {
        let ends = self.end(&lookup.from).and_then(|from| Ok((from, self.end(&lookup.to)?)));
        let (from, to) = match ends {
            Ok(ends) => ends,
            Err(message) => return json!({ "error": message }),
        };
        let sides: Vec<Value> = [(&from, Direction::Egress, to.1), (&to, Direction::Ingress, from.1)]
            .into_iter()
            .filter_map(|((name, _), direction, peer)| {
                let name = name.as_ref()?;
                Some(self.side(name, direction, peer, lookup.key, lookup.source_port))
            })
            .collect();
        if sides.is_empty() {
            let message = format!("neither {} nor {} is a workload of this host", lookup.from, lookup.to);
            return json!({ "error": message });
        }
        json!({ "from": from.1, "to": to.1, "sides": sides })
    }

    fn side(
        &self,
        name: &Arc<str>,
        direction: Direction,
        peer: IpAddr,
        key: PortKey,
        source_port: u16,
    ) -> Value {
        let policy = self.engine.policy();
        let nowhere = Attachment::Interface(0);
        let attachment = policy.endpoints.get(name).map_or(nowhere, |binding| binding.attachment);
        let expected = policy.lookup(name, direction, peer, key, source_port);
        let found = self.dataplane.lookup(attachment, direction, peer, key, source_port);
        let say = |cell: Option<Cell>| match cell {
            Some(cell) => json!({
                "verdict": cell.verdict,
                "rule": policy.rules.get(&cell.rule).map(ToString::to_string),
                "auditVerdict": cell.audit_verdict,
                "auditRule": policy.rules.get(&cell.audit_rule).map(ToString::to_string),
            }),
            None => json!({ "verdict": "deny", "rule": "no tables" }),
        };
        let same = found.as_ref().is_ok_and(|found| *found == expected);
        let kernel = match found {
            Ok(cell) => say(cell),
            Err(error) => json!({ "error": error.to_string() }),
        };
        let workload = name.strip_prefix("Workload/").unwrap_or(name);
        json!({
            "workload": workload, "attachment": attachment, "direction": direction, "peer": peer, "class": policy.class_of(peer),
            "kernel": kernel, "expected": say(expected), "same": same,
        })
    }

    /// A workload of this host and its first address, or an address that somebody else has.
    fn end(&self, text: &str) -> Result<(Option<Arc<str>>, IpAddr), String> {
        let policy = self.engine.policy();
        if let Ok(address) = text.parse::<IpAddr>() {
            let holder = policy.endpoints.iter().find(|(_, binding)| binding.addresses.contains(&address));
            return Ok((holder.map(|(name, _)| Arc::clone(name)), address));
        }
        let full = format!("Workload/{text}");
        let on_host = format!("{full}.{}", self.config.host);
        let local =
            policy.endpoints.iter().find(|(name, _)| [&full, &on_host].iter().any(|one| ***name == **one));
        if let Some((name, binding)) = local {
            let address = binding.addresses.first().ok_or_else(|| format!("{text} has no address"))?;
            return Ok((Some(Arc::clone(name)), *address));
        }
        let known = self.book.address_of(text).or_else(|| self.book.address_of(&full));
        known.map(|address| (None, address)).ok_or_else(|| {
            format!("{text:?} is neither a workload of this host, nor a peer that its policies know, nor an address")
        })
    }
}

/// Where the tables of the kernel are others than they should be, in words.
fn differences(expected: &HostPolicy, found: &HostPolicy) -> Vec<String> {
    let mut all = Vec::new();
    let by_attachment = |policy: &HostPolicy| -> BTreeMap<Attachment, EndpointBinding> {
        policy.endpoints.values().map(|binding| (binding.attachment, binding.clone())).collect()
    };
    compare(&by_attachment(expected), &by_attachment(found), &mut all, |attachment| {
        format!("binding of {attachment}")
    });
    if !found.endpoints.is_empty() {
        compare(&expected.addresses, &found.addresses, &mut all, |prefix| format!("class of {prefix}"));
    }
    for (id, compiled) in &found.policies {
        let Some(wanted) = expected.policies.get(id) else {
            all.push(format!("compiled policy {}: the kernel has it, and should not", id.0));
            continue;
        };
        if wanted.default_row != compiled.default_row {
            all.push(format!("compiled policy {}: its default row is another", id.0));
        }
        let name = |class: &bulkhead_model::host_policy::ClassId| {
            format!("compiled policy {}: row of class {}", id.0, class.0)
        };
        compare(&wanted.rows, &compiled.rows, &mut all, name);
    }
    all
}

fn compare<K: Ord, V: PartialEq>(
    expected: &BTreeMap<K, V>,
    found: &BTreeMap<K, V>,
    all: &mut Vec<String>,
    name: impl Fn(&K) -> String,
) {
    let keys: BTreeSet<&K> = expected.keys().chain(found.keys()).collect();
    for key in keys {
        let what = match (expected.get(key), found.get(key)) {
            (Some(wanted), Some(there)) if wanted == there => continue,
            (Some(_), Some(_)) => "the kernel has another",
            (Some(_), None) => "missing in the kernel",
            (None, _) => "the kernel has it, and should not",
        };
        all.push(format!("{}: {what}", name(key)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_are_named_one_by_one() {
        let mut expected = HostPolicy::default();
        let binding = EndpointBinding {
            attachment: Attachment::Interface(7),
            addresses: vec![],
            ingress: bulkhead_model::host_policy::CompiledId::NONE,
            egress: bulkhead_model::host_policy::CompiledId::NONE,
        };
        expected.endpoints.insert("Workload/a".into(), binding.clone());
        let mut found = HostPolicy::default();
        assert_eq!(differences(&expected, &found), ["binding of interface 7: missing in the kernel"]);
        found.endpoints.insert("7".into(), binding);
        assert!(differences(&expected, &found).is_empty());
        found.addresses.insert("10.0.0.1/32".parse().unwrap(), bulkhead_model::host_policy::ClassId(3));
        assert_eq!(
            differences(&expected, &found),
            ["class of 10.0.0.1/32: the kernel has it, and should not"]
        );
    }
}
