//! `dataplane`: what this host's kernel tables say, beside what they should say.

use std::fmt::Write as _;

use hyper::Method;
use serde_json::Value;

use super::query;
use crate::cli::{Common, DataplaneCommand};
use crate::client::call;
use crate::failure::Failure;
use crate::output::{self, Style, paint, table, text, verdict};

pub(crate) async fn dataplane(common: &Common, command: &DataplaneCommand) -> Result<(), Failure> {
    match command {
        DataplaneCommand::Status => status(common).await,
        DataplaneCommand::Dump => dump(common).await,
        DataplaneCommand::Lookup { from, to, port, source_port } => {
            let source_port = source_port.map(|port| port.to_string());
            let parameters = query(&[
                ("from", Some(from)),
                ("to", Some(to)),
                ("port", Some(port)),
                ("sourcePort", source_port.as_deref()),
            ]);
            lookup(common, &parameters, port).await
        }
    }
}

/// Ends with code 1 if the kernel's tables are others than they should be.
async fn status(common: &Common) -> Result<(), Failure> {
    let report = call(common.agent(), Method::GET, "/status", None).await?;
    let found = call(common.agent(), Method::GET, "/dataplane/dump", None).await?;
    let mut answer = report.clone();
    for field in ["differences", "moreDifferences", "error"] {
        answer[field] = found[field].clone();
    }
    output::show(common.output, &answer, || Ok(status_page(&report, &found)))?;
    let good = found["error"].is_null() && found["differences"].as_array().is_some_and(Vec::is_empty);
    if good { Ok(()) } else { Err(Failure::No(None)) }
}

fn status_page(report: &Value, found: &Value) -> String {
    let force = if report["programmed"] == true { "tables in force" } else { "tables not in force yet" };
    let mut page = format!(
        "{} on {}: {force}, revision {}\n",
        text(report, "/dataplane"),
        text(report, "/host"),
        text(report, "/revision")
    );
    let tables = report["tables"].as_object().into_iter().flatten();
    let rows: Vec<Vec<String>> = tables
        .map(|(name, use_)| {
            let number = |index: usize| use_[index].as_u64().unwrap_or_default();
            let percent = number(0).saturating_mul(100).checked_div(number(1)).unwrap_or_default();
            vec![name.clone(), number(0).to_string(), number(1).to_string(), format!("{percent} %")]
        })
        .collect();
    page.push_str(&table(&["TABLE", "USED", "CAPACITY", "FULL"], &rows));
    let drops = report["drops"].as_object().into_iter().flatten();
    let drops: Vec<_> = drops.map(|(reason, count)| vec![reason.clone(), count.to_string()]).collect();
    if !drops.is_empty() {
        page.push('\n');
        page.push_str(&table(&["DROPPED BECAUSE", "PACKETS"], &drops));
    }
    page.push('\n');
    differences(&mut page, found);
    page
}

fn differences(page: &mut String, found: &Value) {
    if let Some(error) = found["error"].as_str() {
        let _ = writeln!(page, "{}: {error}", paint(Style::Bad, "the tables cannot be read back"));
        return;
    }
    let list: Vec<&str> =
        found["differences"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    if list.is_empty() {
        let _ = writeln!(page, "{}", paint(Style::Good, "the kernel's tables are what they should be"));
    }
    for difference in list {
        let _ = writeln!(page, "{}: {difference}", paint(Style::Bad, "difference"));
    }
    if let Some(more) = found["moreDifferences"].as_u64().filter(|more| *more > 0) {
        let _ = writeln!(page, "… and {more} more");
    }
}

async fn dump(common: &Common) -> Result<(), Failure> {
    let found = call(common.agent(), Method::GET, "/dataplane/dump", None).await?;
    output::show(common.output, &found, || {
        let mut page = crate::yaml::document(&found["tables"]);
        page.push('\n');
        differences(&mut page, &found);
        Ok(page)
    })
}

/// Ends with code 1 if the kernel says something else than it should.
async fn lookup(common: &Common, parameters: &str, port: &str) -> Result<(), Failure> {
    let path = format!("/dataplane/lookup{parameters}");
    let answer = call(common.agent(), Method::GET, &path, None).await?;
    if let Some(error) = answer["error"].as_str() {
        return Err(Failure::no(error));
    }
    output::show(common.output, &answer, || Ok(lookup_page(&answer, port)))?;
    let same = answer["sides"].as_array().into_iter().flatten().all(|side| side["same"] == true);
    if same { Ok(()) } else { Err(Failure::No(None)) }
}

fn lookup_page(answer: &Value, port: &str) -> String {
    let mut page = format!("{} → {} on {port}\n", text(answer, "/from"), text(answer, "/to"));
    for side in answer["sides"].as_array().into_iter().flatten() {
        let said = |name: &str| match side[name]["error"].as_str() {
            Some(error) => paint(Style::Bad, error),
            None => format!(
                "{} by {}",
                verdict(&text(side, &format!("/{name}/verdict"))),
                text(side, &format!("/{name}/rule"))
            ),
        };
        let title = format!(
            "{} of {} ({})",
            text(side, "/direction"),
            text(side, "/workload"),
            output::attachment(&side["attachment"])
        );
        let _ = writeln!(
            page,
            "\n{}: the other end {} is of class {}",
            paint(Style::Bold, &title),
            text(side, "/peer"),
            side["class"]
        );
        let _ = writeln!(page, "  the kernel says  {}", said("kernel"));
        if side["same"] != true {
            let _ = writeln!(page, "  {} {}", paint(Style::Bad, "it should say   "), said("expected"));
        }
    }
    page
}
