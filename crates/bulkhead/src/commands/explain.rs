//! `explain`: would it pass, and why.

use std::fmt::Write as _;

use bulkhead_engine::{explain_policy, explain_workload, find_endpoint, find_policy};
use bulkhead_model::RuleRef;
use hyper::Method;
use serde_json::{Value, json};

use super::query;
use crate::cli::{Common, ExplainArgs};
use crate::client::{API, call};
use crate::failure::Failure;
use crate::manifests;
use crate::output::{self, Style, labels, paint, text, verdict};
use crate::scenario::{self, Scenario};

/// Most names of one list that are shown.
const SHOWN_MAX: usize = 20;

pub(crate) async fn explain(common: &Common, args: &ExplainArgs) -> Result<(), Failure> {
    let answer = if args.filename.is_empty() {
        let source_port = args.source_port.map(|port| port.to_string());
        let of_kind = |kind: &str| args.name.as_deref().filter(|_| args.kind.as_deref() == Some(kind));
        let parameters = query(&[
            ("from", args.from.as_deref()),
            ("to", args.to.as_deref()),
            ("port", args.port.as_deref()),
            ("sourcePort", source_port.as_deref()),
            ("workload", of_kind("workload")),
            ("policy", of_kind("policy")),
        ]);
        let path = format!("{API}/explain{parameters}");
        output::with_progress("evaluating", call(common.controller(), Method::GET, &path, None)).await?
    } else {
        offline(args)?
    };
    output::show(common.output, &answer, || {
        Ok(match answer["kind"].as_str() {
            Some("WorkloadExplanation") => workload(&answer["explanation"]),
            Some("PolicyExplanation") => policy(&answer["explanation"]),
            _ => page(&answer, args.source_port),
        })
    })
}

/// From manifests alone.
fn offline(args: &ExplainArgs) -> Result<Value, Failure> {
    let mut scenario = Scenario::at(scenario::now());
    scenario.set(manifests::read(&args.filename)?).map_err(|errors| Failure::no(errors.join("\n")))?;
    let world = scenario.fleet().world();
    let not_found = |error: bulkhead_engine::FindError| Failure::no(error.to_string());
    let name = args.name.as_deref().unwrap_or_default();
    Ok(if args.kind.as_deref() == Some("workload") {
        let explained = explain_workload(world, find_endpoint(world, name).map_err(not_found)?);
        json!({ "kind": "WorkloadExplanation", "explanation": explained })
    } else {
        let explained = explain_policy(world, find_policy(world, name).map_err(not_found)?);
        json!({ "kind": "PolicyExplanation", "explanation": explained })
    })
}

/// Names of entities without the kind that they all have.
fn names(value: &Value) -> Vec<String> {
    let names = value.as_array().into_iter().flatten().filter_map(Value::as_str);
    names.map(|name| name.strip_prefix("Workload/").unwrap_or(name).to_owned()).collect()
}

fn order(value: &Value) -> String {
    match value.as_f64() {
        Some(number) => number.to_string(),
        None => "last".into(),
    }
}

fn workload(explained: &Value) -> String {
    let name = text(explained, "/workload");
    let name = name.strip_prefix("Workload/").unwrap_or(&name);
    let mut page = format!("{}\n  labels: {}\n", paint(Style::Bold, name), labels(&explained["labels"]));
    for (field, title) in [("ingress", "connections to it"), ("egress", "connections from it")] {
        let isolated = explained["isolated"][field] == true;
        let rest = if isolated { "what no rule allows is refused" } else { "not isolated" };
        let _ = writeln!(page, "\n{}: {rest}", paint(Style::Bold, title));
        let tiers = explained[field].as_array().cloned().unwrap_or_default();
        for tier in &tiers {
            let end = match tier["endsIn"].as_str() {
                Some("deny") => "ends in deny",
                Some("pass") => "ends in pass",
                _ => "does not count: nothing in it is enforced",
            };
            let _ = writeln!(page, "  tier {} (order {}), {end}", text(tier, "/tier"), order(&tier["order"]));
            for policy in tier["policies"].as_array().into_iter().flatten() {
                let mut notes = vec![format!("{} rules", policy["rules"])];
                if policy["enforced"] == false {
                    notes.push("audit only".into());
                }
                if policy["valid"] == false {
                    notes.push("not valid now".into());
                }
                let _ = writeln!(
                    page,
                    "    {} (order {}): {}; because {}",
                    text(policy, "/policy"),
                    order(&policy["order"]),
                    notes.join(", "),
                    text(policy, "/because")
                );
            }
        }
        if tiers.is_empty() {
            page.push_str("  no policy speaks of it\n");
        }
    }
    let whose =
        if explained["ownPosture"] == true { "its own or its namespace's" } else { "the repository's" };
    let posture = verdict(&text(explained, "/posture"));
    let _ = writeln!(page, "\nwhere no tier decides: {posture} ({whose} default posture)");
    page
}

fn policy(explained: &Value) -> String {
    let mode = if explained["enforced"] == true { "enforced" } else { "audit only" };
    let valid = if explained["valid"] == true { "" } else { ", not valid now" };
    let mut page = format!(
        "{} in tier {} (order {}), {mode}{valid}\n",
        paint(Style::Bold, &text(explained, "/policy")),
        text(explained, "/tier"),
        order(&explained["order"])
    );
    let selected = names(&explained["selects"]);
    let _ = writeln!(page, "\n{}", paint(Style::Bold, &format!("selects {} endpoints", selected.len())));
    output::list(&mut page, &selected, SHOWN_MAX, "nobody: it has no effect now");
    for rule in explained["rules"].as_array().into_iter().flatten() {
        let title = format!("{}[{}] {}", text(rule, "/direction"), rule["index"], text(rule, "/action"));
        let peers = names(&rule["peers"]);
        if rule["anyPeer"] == true {
            let _ = writeln!(page, "\n{}: every address", paint(Style::Bold, &title));
            continue;
        }
        let _ = writeln!(page, "\n{}: {} known peers", paint(Style::Bold, &title), peers.len());
        output::list(&mut page, &peers, SHOWN_MAX, "nobody who is known");
    }
    let rows: Vec<Vec<String>> = explained["cost"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|cost| {
            let number = |name: &str| cost[name].as_i64().unwrap_or_default();
            let host = text(cost, "/host");
            let host = if host.is_empty() { "(unknown)".to_owned() } else { host };
            let added = number("entries") - number("entriesWithout");
            vec![host, number("endpoints").to_string(), format!("{added:+}"), number("entries").to_string()]
        })
        .collect();
    if !rows.is_empty() {
        let _ = writeln!(page, "\n{}", paint(Style::Bold, "table entries"));
        page.push_str(&output::table(&["HOST", "ENDPOINTS", "OF THIS POLICY", "OF ALL"], &rows));
        let hosts = explained["hosts"].as_u64().unwrap_or_default();
        if hosts > rows.len() as u64 {
            let _ = writeln!(page, "… and {} more hosts", hosts - rows.len() as u64);
        }
    }
    page
}

/// `asked`: the source port that was asked about; the one that is meant otherwise is no news.
pub(crate) fn page(answer: &Value, asked: Option<u16>) -> String {
    let explanation = &answer["explanation"];
    let end = |name: &str| {
        let address = text(answer, &format!("/{name}/address"));
        let workload = text(answer, &format!("/{name}/workload"));
        let workload = workload.strip_prefix("Workload/").unwrap_or(&workload).to_owned();
        if workload.is_empty() { address } else { format!("{workload} ({address})") }
    };
    let from_port = asked.map_or_else(String::new, |port| format!(" from port {port}"));
    let mut page = format!(
        "{}{from_port} → {} on {}: {}\n",
        end("from"),
        end("to"),
        text(answer, "/port"),
        verdict(&text(explanation, "/verdict"))
    );
    if explanation["auditVerdict"] != explanation["verdict"] {
        let audit = verdict(&text(explanation, "/auditVerdict"));
        let _ = writeln!(page, "if every Audit policy were enforced: {audit}");
    }
    for (name, who) in [("egress", "source"), ("ingress", "destination")] {
        side(&mut page, name, who, &explanation[name]);
    }
    page
}

/// One end's decision and what was looked at on the way.
pub(crate) fn side(page: &mut String, name: &str, who: &str, side: &Value) {
    let title = paint(Style::Bold, &format!("{name} of the {who}"));
    if side.is_null() {
        let _ = writeln!(page, "\n{title}: not one of our workloads, nothing to say");
        return;
    }
    let workload = text(side, "/workload");
    let workload = workload.strip_prefix("Workload/").unwrap_or(&workload);
    let told = if side["reject"] == true { ", telling so," } else { "" };
    let decision = format!("{}{told} by {}", verdict(&text(side, "/verdict")), rule(&side["rule"]));
    let _ = writeln!(page, "\n{title}, {workload}: {decision}");
    if side["auditRule"] != side["rule"] {
        let audit = verdict(&text(side, "/auditVerdict"));
        let _ = writeln!(page, "  with Audit policies: {audit} by {}", rule(&side["auditRule"]));
    }
    let steps = side["trace"].as_array().cloned().unwrap_or_default();
    if steps.is_empty() {
        let _ = writeln!(page, "  no policy speaks of it");
    }
    for step in &steps {
        let outcome = text(step, "/outcome");
        let outcome = match outcome.as_str() {
            "otherEndpoint" => paint(Style::Dim, "no match: other endpoint"),
            "otherPeer" => paint(Style::Dim, "no match: other peer"),
            "otherPort" => paint(Style::Dim, "no match: other port"),
            "otherSourcePort" => paint(Style::Dim, "no match: other source port"),
            "allow" | "deny" => verdict(&outcome),
            other => other.to_owned(),
        };
        let audit = if step["audit"] == true { " (audit)" } else { "" };
        let _ = writeln!(page, "  {}{audit}: {outcome}", rule(&step["rule"]));
    }
}

/// A rule reference as people read it.
pub(crate) fn rule(value: &Value) -> String {
    match serde_json::from_value::<RuleRef>(value.clone()) {
        Ok(rule) => rule.to_string(),
        Err(_) => value.to_string(),
    }
}
