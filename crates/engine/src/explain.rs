//! What applies to an endpoint and why, and what a policy does and costs: for people, from the state alone.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bulkhead_model::host_policy::HostPolicy;
use bulkhead_model::labels::HOST_LABEL;
use bulkhead_model::policy::{Action, DefaultAction, Mode};
use bulkhead_model::{Direction, Entity, Labels, ObjectKey, Verdict};
use serde::Serialize;

use crate::decide::{matched_by, selects};
use crate::fleet::Fleet;
use crate::world::World;

/// Most endpoints of a policy whose peers are looked for: `sameLabels` can mean others for each.
const SUBJECTS_MAX: usize = 20;
/// Most hosts whose cost is computed: each is two compilations of its tables.
pub const COST_HOSTS_MAX: usize = 10;

/// Everything that applies to one endpoint, in order.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct WorkloadExplanation {
    /// Its name.
    pub workload: Arc<str>,
    /// What selectors see of it, inherited labels too.
    pub labels: Labels,
    /// Tiers that have policies for it, towards it.
    pub ingress: Vec<TierExplanation>,
    /// Tiers that have policies for it, from it.
    pub egress: Vec<TierExplanation>,
    /// What happens where no tier decides.
    pub posture: Verdict,
    /// Whether that is its own or its namespace's, and not the repository's.
    pub own_posture: bool,
    /// In which directions what no rule allows is refused.
    pub isolated: Isolation,
}

/// In which directions a tier applies that ends in Deny.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Isolation {
    /// Towards it.
    pub ingress: bool,
    /// From it.
    pub egress: bool,
}

/// A tier that applies to an endpoint in one direction.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct TierExplanation {
    /// Its name.
    pub tier: String,
    /// Its place; absent: last.
    pub order: Option<f64>,
    /// What ends it: `deny`, `pass`, or `skip` if none of its policies is enforced.
    pub ends_in: &'static str,
    /// Its policies that select the endpoint, in order.
    pub policies: Vec<PolicyUse>,
}

/// A policy that selects an endpoint and speaks of a direction.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PolicyUse {
    /// Its name.
    pub policy: String,
    /// Its place in the tier; absent: last.
    pub order: Option<f64>,
    /// Why it applies: its selector, and its namespace if it has one.
    pub because: String,
    /// Whether it is enforced, and not only audited.
    pub enforced: bool,
    /// Whether it exists at this time.
    pub valid: bool,
    /// Its rules in this direction.
    pub rules: usize,
}

/// What one policy does and costs.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PolicyExplanation {
    /// Its name.
    pub policy: String,
    /// Its tier.
    pub tier: String,
    /// Its place in the tier; absent: last.
    pub order: Option<f64>,
    /// Whether it is enforced, and not only audited.
    pub enforced: bool,
    /// Whether it exists at this time.
    pub valid: bool,
    /// The endpoints it selects.
    pub selects: Vec<Arc<str>>,
    /// Its rules, and whom they match.
    pub rules: Vec<RuleExplanation>,
    /// What it costs where; the hosts with most of its endpoints, [`COST_HOSTS_MAX`] at most.
    pub cost: Vec<HostCost>,
    /// Hosts that have endpoints of it.
    pub hosts: usize,
}

/// One rule, and whom it matches now.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct RuleExplanation {
    /// Which of the policy's lists.
    pub direction: Direction,
    /// Place in the list, from 0.
    pub index: usize,
    /// `allow`, `deny`, `pass` or `log`.
    pub action: &'static str,
    /// Whether it matches every address.
    pub any_peer: bool,
    /// Known entities with an address that it matches.
    pub peers: Vec<Arc<str>>,
}

/// Table entries of one host, with a policy and without.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct HostCost {
    /// The host; empty if that is not known.
    pub host: String,
    /// Endpoints there that the policy selects.
    pub endpoints: usize,
    /// Entries as things are.
    pub entries: usize,
    /// Entries if it were not for the policy.
    pub entries_without: usize,
}

/// What applies to an endpoint, and why.
pub fn explain_workload(world: &World, endpoint: &Entity) -> WorkloadExplanation {
    let [ingress, egress] = Direction::BOTH.map(|direction| tiers_of(world, endpoint, direction));
    let isolated = |tiers: &[TierExplanation]| tiers.iter().any(|tier| tier.ends_in == "deny");
    WorkloadExplanation {
        workload: Arc::clone(&endpoint.name),
        labels: endpoint.labels.clone(),
        isolated: Isolation { ingress: isolated(&ingress), egress: isolated(&egress) },
        ingress,
        egress,
        posture: endpoint.posture.unwrap_or(world.settings.default_posture),
        own_posture: endpoint.posture.is_some(),
    }
}

fn tiers_of(world: &World, endpoint: &Entity, direction: Direction) -> Vec<TierExplanation> {
    let mut tiers: Vec<_> = world.tiers.iter().collect();
    tiers.sort_by_key(|(name, spec)| (spec.order, (*name).clone()));
    let mut explained = Vec::new();
    for (tier, spec) in tiers {
        let mut policies: Vec<_> = world
            .policies
            .iter()
            .filter(|(_, policy)| policy.tier == *tier && policy.rules(direction).is_some())
            .filter(|(key, policy)| selects(key, policy, endpoint))
            .collect();
        if policies.is_empty() {
            continue;
        }
        policies.sort_by_key(|(key, policy)| (policy.order, (*key).clone()));
        let uses: Vec<PolicyUse> = policies
            .into_iter()
            .map(|(key, policy)| PolicyUse {
                policy: key.policy_name(),
                order: policy.order.number(),
                because: match &key.namespace {
                    Some(namespace) => format!("{} in namespace {namespace}", policy.applies_to),
                    None => policy.applies_to.to_string(),
                },
                enforced: policy.mode == Mode::Enforce,
                valid: policy.is_valid_at(world.now),
                rules: policy.rules(direction).unwrap_or_default().len(),
            })
            .collect();
        let counts = uses.iter().any(|policy| policy.enforced && policy.valid);
        let ends_in = match (counts, spec.default_action) {
            (false, _) => "skip",
            (true, DefaultAction::Deny) => "deny",
            (true, DefaultAction::Pass) => "pass",
        };
        explained.push(TierExplanation {
            tier: tier.clone(),
            order: spec.order.number(),
            ends_in,
            policies: uses,
        });
    }
    explained
}

/// What a policy does and costs; `None` if there is none of this key.
pub fn explain_policy(world: &World, key: &ObjectKey) -> Option<PolicyExplanation> {
    let policy = world.policies.get(key)?;
    let selected: Vec<&Entity> = world
        .entities
        .values()
        .filter(|entity| entity.is_endpoint() && selects(key, policy, entity))
        .collect();
    let mut rules = Vec::new();
    for direction in Direction::BOTH {
        for (index, rule) in policy.rules(direction).unwrap_or_default().iter().enumerate() {
            let any_peer = rule.peers.is_empty();
            let mut peers: BTreeSet<Arc<str>> = BTreeSet::new();
            if !any_peer {
                for subject in selected.iter().take(SUBJECTS_MAX) {
                    let others = world.entities.values().filter(|other| other.name != subject.name);
                    let matched =
                        others.filter(|other| matched_by(world, key, rule, subject, direction, other));
                    peers.extend(matched.map(|other| Arc::clone(&other.name)));
                }
            }
            let action = match rule.action {
                Action::Allow => "allow",
                Action::Deny => "deny",
                Action::Pass => "pass",
                Action::Log => "log",
            };
            rules.push(RuleExplanation {
                direction,
                index,
                action,
                any_peer,
                peers: peers.into_iter().collect(),
            });
        }
    }
    let mut by_host: BTreeMap<String, usize> = BTreeMap::new();
    for entity in &selected {
        *by_host.entry(host_of(entity).to_owned()).or_default() += 1;
    }
    let hosts = by_host.len();
    let mut by_host: Vec<_> = by_host.into_iter().collect();
    by_host.sort_by_key(|(_, endpoints)| std::cmp::Reverse(*endpoints));
    let cost = by_host
        .into_iter()
        .take(COST_HOSTS_MAX)
        .map(|(host, endpoints)| {
            let (entries, entries_without) = entries_of(world, &host, key);
            HostCost { host, endpoints, entries, entries_without }
        })
        .collect();
    Some(PolicyExplanation {
        policy: key.policy_name(),
        tier: policy.tier.clone(),
        order: policy.order.number(),
        enforced: policy.mode == Mode::Enforce,
        valid: policy.is_valid_at(world.now),
        selects: selected.iter().map(|entity| Arc::clone(&entity.name)).collect(),
        rules,
        cost,
        hosts,
    })
}

fn host_of(entity: &Entity) -> &str {
    entity.labels.get(HOST_LABEL).unwrap_or_default()
}

/// Table entries of a host as things are, and if it were not for one policy.
fn entries_of(world: &World, host: &str, policy: &ObjectKey) -> (usize, usize) {
    let mut fleet = Fleet::of_host(host);
    fleet.set_settings(world.settings.clone());
    fleet.set_now(world.now);
    for (name, spec) in &world.tiers {
        fleet.set_tier(name, Some(spec.clone()));
    }
    for (name, entity) in &world.entities {
        fleet.set_entity(name, Some(entity));
    }
    for (key, spec) in world.policies.iter().filter(|(key, _)| *key != policy) {
        fleet.set_policy(key, Some(spec));
    }
    fleet.settle();
    let without = entries(fleet.tables());
    fleet.set_policy(policy, world.policies.get(policy));
    fleet.settle();
    (entries(fleet.tables()), without)
}

fn entries(tables: &HostPolicy) -> usize {
    let rows: usize = tables.policies.values().map(|policy| policy.rows.len() + 1).sum();
    tables.addresses.len() + rows + tables.endpoints.len()
}

#[cfg(test)]
mod tests {
    use bulkhead_model::document::parse;

    use super::*;
    use crate::Assembly;

    fn world(text: &str) -> World {
        let (mut world, mut assembly) = (World::new(), Assembly::default());
        for document in parse("test", text).unwrap() {
            world.change(&assembly.set(&document.resource.key(), Some(document.resource)));
        }
        world
    }

    const STATE: &str = "\
apiVersion: bulkhead.dev/v1
kind: Policy
metadata: {name: a-to-b}
spec:
  appliesTo: role == 'b'
  ingress: [{action: Allow, from: {selector: role == 'a'}}]
---
apiVersion: bulkhead.dev/v1
kind: Policy
metadata: {name: watched}
spec: {mode: Audit, appliesTo: role == 'b', egress: []}
---
apiVersion: bulkhead.dev/v1
kind: Workload
metadata: {name: a.h1, labels: {role: a}}
spec: {host: h1, addresses: [10.0.0.1]}
---
apiVersion: bulkhead.dev/v1
kind: Workload
metadata: {name: b.h2, labels: {role: b}}
spec: {host: h2, addresses: [10.0.0.2]}
";

    #[test]
    fn a_workload_is_explained_by_what_applies_and_why() {
        let world = world(STATE);
        let explained = explain_workload(&world, &world.entities["Workload/b.h2"]);
        assert_eq!(explained.isolated, Isolation { ingress: true, egress: false });
        let tier = &explained.ingress[0];
        assert_eq!((tier.tier.as_str(), tier.ends_in), ("application", "deny"));
        assert_eq!(tier.policies[0].because, "role == \"b\"");
        assert_eq!((explained.egress[0].ends_in, explained.egress[0].policies[0].enforced), ("skip", false));
        assert!(explain_workload(&world, &world.entities["Workload/a.h1"]).ingress.is_empty());
    }

    #[test]
    fn a_policy_is_explained_by_whom_it_selects_and_matches_and_what_it_costs() {
        let world = world(STATE);
        let key = world.policies.keys().find(|key| key.name == "a-to-b").unwrap();
        let explained = explain_policy(&world, key).unwrap();
        assert_eq!(explained.selects, ["Workload/b.h2".into()]);
        assert_eq!(explained.rules[0].peers, ["Workload/a.h1".into()]);
        // One address and one row on the host of b, and nothing where a is.
        let cost = HostCost { host: "h2".into(), endpoints: 1, entries: 5, entries_without: 3 };
        assert_eq!(explained.cost, [cost]);
    }
}
