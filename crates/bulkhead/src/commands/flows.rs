//! `flows`: who talked to whom, and which rule decided.

use hyper::Method;
use serde_json::{Value, json};

use super::explain::rule;
use super::query;
use crate::cli::{Common, FlowArgs, Format};
use crate::client::{API, call, lines};
use crate::failure::Failure;
use crate::output::{self, Style, paint, table, text, verdict};
use crate::yaml;

const HEADINGS: [&str; 9] =
    ["TIME", "EVENT", "VERDICT", "SOURCE", "DESTINATION", "PORT", "DIRECTION", "PACKETS", "DECIDED BY"];

pub(crate) async fn flows(common: &Common, args: &FlowArgs) -> Result<(), Failure> {
    let limit = args.limit.to_string();
    if args.local {
        let path = format!("/flows?limit={limit}");
        let items = call(common.agent(), Method::GET, &path, None).await?;
        return show(common.output, &json!({ "kind": "FlowList", "items": items }));
    }
    let parameters = query(&[
        ("limit", (!args.follow).then_some(limit.as_str())),
        ("since", args.since.as_deref()),
        ("workload", args.workload.as_deref()),
        ("label", args.label.as_deref()),
        ("verdict", args.verdict.as_deref()),
        ("policy", args.policy.as_deref()),
        ("follow", args.follow.then_some("true")),
    ]);
    let path = format!("{API}/flows{parameters}");
    if !args.follow {
        let mut answer =
            output::with_progress("reading flows", call(common.controller(), Method::GET, &path, None))
                .await?;
        // The newest come first; people read downwards in time.
        if let Some(items) = answer.get_mut("items").and_then(Value::as_array_mut) {
            items.reverse();
        }
        return show(common.output, &answer);
    }
    let mut follow = follower(common.output);
    lines(common.controller(), &path, |flow| follow(&flow)).await
}

/// Shows records one by one as they come, with headings above the first in a table.
pub(super) fn follower(format: Format) -> impl FnMut(&Value) -> Result<(), Failure> {
    let mut first = true;
    move |record| match format {
        Format::Json => output::line(&record.to_string()),
        Format::Yaml => output::print(&format!("---\n{}", yaml::document(record))),
        Format::Table => {
            if std::mem::take(&mut first) {
                output::line(&paint(Style::Bold, &HEADINGS.join("   ")))?;
            }
            if let Some(silent) = record.get("unanswered") {
                return output::line(&unanswered(silent));
            }
            output::line(&row(record).join("   "))
        }
    }
}

fn show(format: Format, answer: &Value) -> Result<(), Failure> {
    output::show(format, answer, || {
        let items = answer["items"].as_array().cloned().unwrap_or_default();
        let silent = answer["unanswered"].as_array().into_iter().flatten();
        let silent: String = silent.map(|one| format!("{}\n", unanswered(one))).collect();
        if items.is_empty() {
            return Ok(format!("no flows recorded that match\n{silent}"));
        }
        Ok(format!("{}{silent}", table(&HEADINGS, &items.iter().map(row).collect::<Vec<_>>())))
    })
}

/// What is missing, since a controller does not answer.
fn unanswered(one: &Value) -> String {
    let said = format!("controller {} is not in this: {}", text(one, "/controller"), text(one, "/problem"));
    paint(Style::Bad, &said)
}

fn row(flow: &Value) -> Vec<String> {
    let end = |name: &str| {
        let workload = text(flow, &format!("/{name}/workload"));
        let shown = if workload.is_empty() { text(flow, &format!("/{name}/address")) } else { workload };
        // Where the host rewrites addresses, people look for the one that they know.
        match flow.pointer(&format!("/{name}/seenAs")).and_then(Value::as_str) {
            Some(seen) => format!("{shown} (as {seen})"),
            None => shown,
        }
    };
    let decision = text(flow, "/enforced/verdict");
    let audit = text(flow, "/audit/verdict");
    let shown = verdict(&decision);
    let shown = if audit == decision { shown } else { format!("{shown} (audit: {audit})") };
    let packets = |name: &str| flow[name].as_u64().unwrap_or_default();
    let event = text(flow, "/event");
    let reason = text(flow, "/reason");
    let reason = if matches!(reason.as_str(), "none" | "policy" | "") {
        String::new()
    } else {
        format!(" [{reason}]")
    };
    vec![
        clock(flow["timeMs"].as_u64().unwrap_or_default()),
        event,
        shown,
        end("source"),
        end("destination"),
        port(flow),
        text(flow, "/direction"),
        format!("{}/{}", packets("packetsForward"), packets("packetsReverse")),
        format!("{}{reason}", rule(&flow["enforced"]["rule"])),
    ]
}

fn port(flow: &Value) -> String {
    let number = u8::try_from(flow["protocol"].as_u64().unwrap_or_default()).unwrap_or_default();
    let protocol = bulkhead_model::ports::Protocol(number);
    let port = flow["destination"]["port"].as_u64().unwrap_or_default();
    if protocol.has_ports() { format!("{protocol}/{port}") } else { protocol.to_string() }
}

/// Time of day in UTC, to the millisecond.
fn clock(unix_ms: u64) -> String {
    let (seconds, ms) = (unix_ms / 1000 % 86_400, unix_ms % 1000);
    format!("{:02}:{:02}:{:02}.{ms:03}", seconds / 3600, seconds / 60 % 60, seconds % 60)
}
