//! `decide --batch`: verdicts from manifests alone, line by line, without controller or kernel.

use std::collections::BTreeMap;
use std::io::BufRead;
use std::net::IpAddr;
use std::sync::Arc;

use bulkhead_engine::{Endpoint, Explanation, Fleet, Flow, Judgement};
use bulkhead_model::document::{Node, from_value};
use bulkhead_model::kubernetes::{self, Names, Object};
use bulkhead_model::policy::PolicySpec;
use bulkhead_model::ports::{Protocol, USUAL_SOURCE_PORT};
use bulkhead_model::resource::API_VERSION;
use bulkhead_model::{Entity, Labels, ObjectKey, Resource, RuleRef, Verdict};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::cli::DecideArgs;
use crate::failure::Failure;
use crate::output;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Request {
    #[serde(default)]
    id: Value,
    #[serde(default)]
    reset: bool,
    #[serde(default)]
    manifests: Vec<Value>,
    #[serde(default)]
    dns: Names,
    #[serde(default)]
    flows: Vec<Question>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Question {
    from: String,
    to: String,
    #[serde(default)]
    port: u16,
    #[serde(default = "tcp")]
    protocol: String,
    /// Absent: [`USUAL_SOURCE_PORT`].
    #[serde(default, rename = "sourcePort")]
    source_port: Option<u16>,
}

fn tcp() -> String {
    "TCP".into()
}

/// Everything that manifests say.
#[derive(Debug, Default)]
struct State {
    entities: BTreeMap<Arc<str>, Entity>,
    policies: BTreeMap<ObjectKey, PolicySpec>,
    tiers: BTreeMap<String, bulkhead_model::policy::TierSpec>,
    /// Pods on their node's network: no workloads, but they have an address to speak from.
    on_host: BTreeMap<String, Vec<IpAddr>>,
}

pub(crate) fn decide(args: &DecideArgs) -> Result<(), Failure> {
    let mut state = State::default();
    let mut fleet = Fleet::new(Verdict::Allow);
    let mut differences = 0;
    for line in std::io::stdin().lock().lines() {
        let line = line.map_err(|error| Failure::Other(format!("cannot read standard input: {error}")))?;
        if line.trim().is_empty() {
            continue;
        }
        let request: Request = match serde_json::from_str(&line) {
            Ok(request) => request,
            Err(error) => {
                output::line(&json!({ "results": [], "errors": [error.to_string()] }).to_string())?;
                continue;
            }
        };
        if request.reset {
            (state, fleet) = (State::default(), Fleet::new(Verdict::Allow));
        }
        let answer = match State::read(&request.manifests, &request.dns) {
            Ok(next) => {
                next.bring(&mut fleet, &state);
                state = next;
                answer(args, &mut fleet, &state, &request, &mut differences)
            }
            Err(errors) => json!({ "id": request.id, "results": [], "errors": errors }),
        };
        output::line(&answer.to_string())?;
    }
    if differences > 0 {
        return Err(Failure::no(format!("tables and reference differ on {differences} flows")));
    }
    Ok(())
}

fn answer(
    args: &DecideArgs,
    fleet: &mut Fleet,
    state: &State,
    request: &Request,
    differences: &mut u64,
) -> Value {
    let mut results = Vec::new();
    let mut errors = Vec::new();
    for question in &request.flows {
        let flow = match state.flow(question) {
            Ok(flow) => flow,
            Err(error) => {
                errors.push(error);
                results.push(Value::Null);
                continue;
            }
        };
        let rivals = state.rivals(&flow);
        for entity in &rivals {
            fleet.set_entity(&entity.name, Some(&without_addresses(entity, &flow)));
        }
        if !rivals.is_empty() {
            fleet.settle();
        }
        let chosen =
            if args.reference { fleet.decide_by_reference(&flow) } else { fleet.decide_by_tables(&flow) };
        if args.check {
            let reference = without_trace(fleet.decide_by_reference(&flow));
            if reference != chosen {
                *differences += 1;
                errors.push(format!("{question:?}: tables say {chosen:?}, the reference {reference:?}"));
            }
        }
        for entity in &rivals {
            fleet.set_entity(&entity.name, Some(entity));
        }
        if !rivals.is_empty() {
            fleet.settle();
        }
        results.push(result(&chosen));
    }
    json!({ "id": request.id, "results": results, "errors": errors })
}

/// An address is one workload's at a time. Where manifests give it to several, a question that names one of them is
/// about that one having it.
fn without_addresses(entity: &Entity, flow: &Flow) -> Entity {
    let mut entity = entity.clone();
    entity.prefixes.retain(|prefix| {
        ![flow.source.address, flow.destination.address]
            .iter()
            .any(|address| prefix.contains_address(*address))
    });
    entity
}

fn without_trace(mut explanation: Explanation) -> Explanation {
    for side in [&mut explanation.egress, &mut explanation.ingress].into_iter().flatten() {
        side.trace.clear();
    }
    explanation
}

fn result(explanation: &Explanation) -> Value {
    let side = |judgement: &Judgement| author(judgement.verdict, &judgement.rule);
    let audit = |judgement: &Judgement| author(judgement.audit_verdict, &judgement.audit_rule);
    json!({
        "verdict": explanation.verdict,
        "egress": explanation.egress.as_ref().map(side),
        "ingress": explanation.ingress.as_ref().map(side),
        "audit": {
            "verdict": explanation.audit_verdict,
            "egress": explanation.egress.as_ref().map(audit),
            "ingress": explanation.ingress.as_ref().map(audit),
        },
    })
}

fn author(verdict: Verdict, rule: &RuleRef) -> Value {
    let (tier, policy, index) = match rule {
        RuleRef::Rule { tier, policy, index, .. } => (Some(tier), Some(policy), json!(index)),
        RuleRef::TierDefault { tier } => (Some(tier), None, json!("default action")),
        RuleRef::DefaultPosture => (None, None, json!("default posture")),
        RuleRef::Builtin { builtin } => (None, None, json!(builtin)),
    };
    json!({ "tier": tier, "policy": policy, "rule": index, "action": verdict })
}

impl State {
    fn read(manifests: &[Value], dns: &Names) -> Result<Self, Vec<String>> {
        let mut state = Self::default();
        let mut namespaces: BTreeMap<String, Labels> = BTreeMap::new();
        let mut errors = Vec::new();
        for (index, manifest) in manifests.iter().enumerate() {
            let source = format!("manifests[{index}]");
            let problems = if manifest["apiVersion"] == API_VERSION {
                from_value(&source, manifest).map(|resource| state.add_native(&resource))
            } else {
                let object = kubernetes::read(&source, &Node::from_json(manifest), dns);
                object.map(|object| state.add(object, &mut namespaces))
            };
            errors.extend(problems.err().into_iter().flatten().map(|problem| problem.to_string()));
        }
        for (name, spec) in kubernetes::tiers() {
            state.tiers.insert(name.into(), spec);
        }
        for entity in state.entities.values_mut() {
            let namespace = entity.labels.get(bulkhead_model::labels::NAMESPACE_LABEL).map(ToOwned::to_owned);
            if let Some(labels) = namespace.and_then(|namespace| namespaces.get(&namespace)) {
                entity.inherit(labels);
            }
        }
        if errors.is_empty() { Ok(state) } else { Err(errors) }
    }

    fn add_native(&mut self, resource: &Resource) {
        if let Some(entity) = Entity::of(resource) {
            self.entities.insert(Arc::clone(&entity.name), entity);
        }
        match resource {
            Resource::Policy(policy) => {
                self.policies.insert(resource.key(), policy.spec.clone());
            }
            Resource::Tier(tier) => {
                self.tiers.insert(tier.metadata.name.clone(), tier.spec.clone());
            }
            Resource::NetworkSet(_) | Resource::Workload(_) | Resource::Host(_) => {}
        }
    }

    fn add(&mut self, object: Object, namespaces: &mut BTreeMap<String, Labels>) {
        match object {
            Object::Namespace(name, labels) => {
                namespaces.insert(name, labels);
            }
            Object::Pod(entity) | Object::Node(entity) => {
                self.entities.insert(Arc::clone(&entity.name), entity);
            }
            Object::HostPod(name, addresses) => {
                self.on_host.insert(name, addresses);
            }
            Object::Policy(key, spec) => {
                self.policies.insert(key, spec);
            }
        }
    }

    /// Changes `fleet` from what `before` says to what this says, and nothing else.
    fn bring(&self, fleet: &mut Fleet, before: &Self) {
        for (name, spec) in self.tiers.iter().filter(|(name, spec)| before.tiers.get(*name) != Some(spec)) {
            fleet.set_tier(name, Some(spec.clone()));
        }
        for name in before.tiers.keys().filter(|name| !self.tiers.contains_key(*name)) {
            fleet.set_tier(name, None);
        }
        for (key, spec) in self.policies.iter().filter(|(key, spec)| before.policies.get(*key) != Some(spec))
        {
            fleet.set_policy(key, Some(spec));
        }
        for key in before.policies.keys().filter(|key| !self.policies.contains_key(*key)) {
            fleet.set_policy(key, None);
        }
        for (name, entity) in
            self.entities.iter().filter(|(name, entity)| before.entities.get(*name) != Some(entity))
        {
            fleet.set_entity(name, Some(entity));
        }
        for name in before.entities.keys().filter(|name| !self.entities.contains_key(*name)) {
            fleet.set_entity(name, None);
        }
        fleet.settle();
    }

    /// Other workloads with the address of one that the flow names.
    fn rivals(&self, flow: &Flow) -> Vec<&Entity> {
        let ends = [&flow.source, &flow.destination];
        let named = |entity: &&Entity| ends.iter().any(|end| end.workload.as_ref() == Some(&entity.name));
        let claims = |entity: &&Entity| {
            let mut taken = ends.iter().filter(|end| end.workload.is_some()).map(|end| end.address);
            taken.any(|address| entity.prefixes.iter().any(|p| p.is_host() && p.contains_address(address)))
        };
        self.entities.values().filter(|entity| !named(entity)).filter(claims).collect()
    }

    fn flow(&self, question: &Question) -> Result<Flow, String> {
        let protocol = Protocol::NAMES
            .iter()
            .find(|(name, _)| name.eq_ignore_ascii_case(&question.protocol))
            .map(|(_, protocol)| *protocol)
            .or_else(|| question.protocol.parse().ok().map(Protocol))
            .ok_or_else(|| format!("there is no protocol {:?}", question.protocol))?;
        let (from, to) = (self.end(&question.from)?, self.end(&question.to)?);
        // Each connection is of one family: the first that both ends have.
        let pair = from.1.iter().find_map(|source| {
            let same = to.1.iter().find(|destination| destination.is_ipv4() == source.is_ipv4());
            same.map(|destination| (*source, *destination))
        });
        let (source, destination) =
            pair.ok_or_else(|| format!("{} and {} have no family in common", question.from, question.to))?;
        let source_port = match question.source_port {
            Some(_) if !protocol.has_ports() => return Err(format!("{protocol} has no source ports")),
            given if protocol.has_ports() => given.unwrap_or(USUAL_SOURCE_PORT),
            _ => 0,
        };
        Ok(Flow {
            source: Endpoint { workload: from.0, address: source },
            destination: Endpoint { workload: to.0, address: destination },
            key: protocol.key(question.port),
            source_port,
        })
    }

    /// The workload behind an end, if it is one, and its addresses.
    fn end(&self, text: &str) -> Result<(Option<Arc<str>>, Vec<IpAddr>), String> {
        let of_entity = |entity: &Entity| {
            let addresses = entity.prefixes.iter().map(|prefix| prefix.address()).collect();
            (Some(Arc::clone(&entity.name)), addresses)
        };
        if let Some(address) = text.strip_prefix("ip:") {
            let address: IpAddr = address.parse().map_err(|_| format!("{text:?}: not an IP address"))?;
            let holder = self.entities.values().find(|entity| {
                entity.name.starts_with("Workload/")
                    && entity
                        .prefixes
                        .iter()
                        .any(|prefix| prefix.is_host() && prefix.contains_address(address))
            });
            return Ok((holder.map(|entity| Arc::clone(&entity.name)), vec![address]));
        }
        let name = text
            .strip_prefix("pod:")
            .or_else(|| text.strip_prefix("workload:"))
            .ok_or_else(|| format!("{text:?}: expected pod:NAMESPACE/NAME, workload:NAME or ip:ADDRESS"))?;
        if let Some(addresses) = self.on_host.get(name) {
            return Ok((None, addresses.clone()));
        }
        let entity = self.entities.get(format!("Workload/{name}").as_str());
        entity.map(of_entity).ok_or_else(|| format!("{text:?} is not among the manifests"))
    }
}
