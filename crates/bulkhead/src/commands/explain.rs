//! `explain`: would it pass, and why.

use std::fmt::Write as _;

use bulkhead_model::RuleRef;
use hyper::Method;
use serde_json::Value;

use super::query;
use crate::cli::{Common, ExplainArgs};
use crate::client::{API, call};
use crate::failure::Failure;
use crate::output::{self, Style, paint, text, verdict};

pub(crate) async fn explain(common: &Common, args: &ExplainArgs) -> Result<(), Failure> {
    let source_port = args.source_port.map(|port| port.to_string());
    let parameters = query(&[
        ("from", Some(&args.from)),
        ("to", Some(&args.to)),
        ("port", Some(&args.port)),
        ("sourcePort", source_port.as_deref()),
    ]);
    let path = format!("{API}/explain{parameters}");
    let answer =
        output::with_progress("evaluating", call(common.controller(), Method::GET, &path, None)).await?;
    output::show(common.output, &answer, || Ok(page(&answer, args.source_port)))
}

/// `asked`: the source port that was asked about; the one that is meant otherwise is no news.
fn page(answer: &Value, asked: Option<u16>) -> String {
    let explanation = &answer["explanation"];
    let end = |name: &str| {
        let address = text(answer, &format!("/{name}/address"));
        let workload = text(answer, &format!("/{name}/workload"));
        let workload = workload.strip_prefix("Workload/").unwrap_or(&workload);
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

fn side(page: &mut String, name: &str, who: &str, side: &Value) {
    let title = paint(Style::Bold, &format!("{name} of the {who}"));
    if side.is_null() {
        let _ = writeln!(page, "\n{title}: not one of our workloads, nothing to say");
        return;
    }
    let workload = text(side, "/workload");
    let workload = workload.strip_prefix("Workload/").unwrap_or(&workload);
    let decision = format!("{} by {}", verdict(&text(side, "/verdict")), rule(&side["rule"]));
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
