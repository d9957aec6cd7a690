//! `decide`: verdicts from manifests alone, without controller or kernel: one flow, or line by line.

use std::collections::BTreeMap;
use std::io::BufRead;
use std::net::IpAddr;

use bulkhead_engine::{Explanation, Flow, Judgement};
use bulkhead_model::document::from_value;
use bulkhead_model::time::Timestamp;
use bulkhead_model::{Resource, RuleRef, Verdict};
use serde::Deserialize;
use serde_json::{Value, json};

use super::explain;
use crate::cli::{Common, DecideArgs};
use crate::failure::Failure;
use crate::manifests;
use crate::output;
use crate::scenario::{self, Judge, Question, Scenario};

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
    dns: BTreeMap<String, Vec<IpAddr>>,
    #[serde(default)]
    flows: Vec<Asked>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Asked {
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

impl Asked {
    fn question(&self) -> Question<'_> {
        Question {
            from: &self.from,
            to: &self.to,
            port: self.port,
            protocol: &self.protocol,
            source_port: self.source_port,
        }
    }
}

pub(crate) fn decide(common: &Common, args: &DecideArgs) -> Result<(), Failure> {
    let now = args.at.unwrap_or_else(scenario::now);
    if args.batch { batch(args, now) } else { single(common, args, now) }
}

/// One flow; ends with code 1 if it does not pass.
fn single(common: &Common, args: &DecideArgs, now: Timestamp) -> Result<(), Failure> {
    let mut resources = manifests::read(&args.filename)?;
    let mut given: BTreeMap<String, Vec<IpAddr>> = BTreeMap::new();
    for pair in &args.dns {
        let (name, address) = pair.split_once('=').unwrap_or((pair, ""));
        let address =
            address.parse().map_err(|_| Failure::Usage(format!("--dns {pair}: expected NAME=ADDRESS")))?;
        given.entry(name.to_owned()).or_default().push(address);
    }
    resources.extend(scenario::names(&given).map_err(Failure::Usage)?);
    let mut scenario = Scenario::at(now);
    scenario.set(resources).map_err(|errors| Failure::no(errors.join("\n")))?;
    let expected = "which flow? Give --from and --to, like pod:shop/web, workload:web.host1 or ip:192.0.2.1";
    let end = |end: &Option<String>| end.clone().ok_or_else(|| Failure::Usage(expected.into()));
    let asked = Asked {
        from: end(&args.from)?,
        to: end(&args.to)?,
        port: args.port,
        protocol: args.protocol.clone(),
        source_port: args.source_port,
    };
    let flow = scenario.flow(&asked.question()).map_err(Failure::Usage)?;
    let (chosen, reference) = ask(&mut scenario, args, &flow);
    // The tables know who decided, the reference also what it looked at on the way.
    let explained = reference.unwrap_or_else(|| scenario.decide(&flow, Judge::Reference));
    let answer = json!({
        "from": flow.source,
        "to": flow.destination,
        "port": format!("{}/{}", asked.protocol.to_ascii_lowercase(), asked.port),
        "explanation": explained,
        "result": result(&chosen),
    });
    output::show(common.output, &answer, || Ok(explain::page(&answer, args.source_port)))?;
    if args.check && without_trace(explained) != without_trace(chosen.clone()) {
        return Err(Failure::Other("tables and reference differ on this flow".into()));
    }
    if chosen.verdict == Verdict::Allow { Ok(()) } else { Err(Failure::No(None)) }
}

fn batch(args: &DecideArgs, now: Timestamp) -> Result<(), Failure> {
    let mut scenario = Scenario::at(now);
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
            scenario = Scenario::at(now);
        }
        let resources = read(&request.manifests, &request.dns);
        let answer = match resources.and_then(|resources| scenario.set(resources)) {
            Ok(()) => answer(args, &mut scenario, &request, &mut differences),
            Err(errors) => json!({ "id": request.id, "results": [], "errors": errors }),
        };
        output::line(&answer.to_string())?;
    }
    if differences > 0 {
        return Err(Failure::no(format!("tables and reference differ on {differences} flows")));
    }
    Ok(())
}

fn read(manifests: &[Value], dns: &BTreeMap<String, Vec<IpAddr>>) -> Result<Vec<Resource>, Vec<String>> {
    let mut resources = Vec::with_capacity(manifests.len() + 1);
    let mut errors = Vec::new();
    for (index, manifest) in manifests.iter().enumerate() {
        match from_value(&format!("manifests[{index}]"), manifest) {
            Ok(resource) => resources.push(resource),
            Err(problems) => errors.extend(problems.iter().map(ToString::to_string)),
        }
    }
    match scenario::names(dns) {
        Ok(names) => resources.extend(names),
        Err(error) => errors.push(error),
    }
    if errors.is_empty() { Ok(resources) } else { Err(errors) }
}

fn answer(args: &DecideArgs, scenario: &mut Scenario, request: &Request, differences: &mut u64) -> Value {
    let mut results = Vec::new();
    let mut errors = Vec::new();
    for asked in &request.flows {
        let flow = match scenario.flow(&asked.question()) {
            Ok(flow) => flow,
            Err(error) => {
                errors.push(error);
                results.push(Value::Null);
                continue;
            }
        };
        let (chosen, reference) = ask(scenario, args, &flow);
        if let Some(reference) = reference.map(without_trace)
            && reference != without_trace(chosen.clone())
        {
            *differences += 1;
            errors.push(format!("{asked:?}: tables say {chosen:?}, the reference {reference:?}"));
        }
        results.push(result(&chosen));
    }
    json!({ "id": request.id, "results": results, "errors": errors })
}

/// Whoever is to be asked, and for `--check` the reference too.
fn ask(scenario: &mut Scenario, args: &DecideArgs, flow: &Flow) -> (Explanation, Option<Explanation>) {
    let judge = if args.reference { Judge::Reference } else { Judge::Tables };
    let chosen = scenario.decide(flow, judge);
    (chosen, args.check.then(|| scenario.decide(flow, Judge::Reference)))
}

/// What tables and reference must agree on.
pub(super) fn without_trace(mut explanation: Explanation) -> Explanation {
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
