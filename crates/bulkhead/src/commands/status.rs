//! `status` and `plan`: what is in force, and what is not and why.

use std::fmt::Write as _;

use hyper::Method;
use serde_json::{Value, json};

use crate::cli::Common;
use crate::client::{API, call};
use crate::failure::Failure;
use crate::output::{self, Style, paint, table, text};

/// Asks the controller, and this host's agent if there is one. Fails only if neither answers.
pub(crate) async fn status(common: &Common) -> Result<(), Failure> {
    let controller = call(common.controller(), Method::GET, &format!("{API}/status"), None).await;
    let agent = if common.agent_socket.exists() {
        Some(call(common.agent(), Method::GET, "/status", None).await)
    } else {
        None
    };
    let (fleet, failure) = match controller {
        Ok(fleet) => (fleet, None),
        Err(failure @ Failure::Unreachable(_)) => (Value::Null, Some(failure)),
        Err(failure) => return Err(failure),
    };
    let here = match agent {
        Some(Ok(here)) => here,
        Some(Err(_)) | None => Value::Null,
    };
    if let (Some(failure), true) = (failure, here.is_null()) {
        return Err(failure);
    }
    let value = json!({ "fleet": fleet, "thisHost": here });
    output::show(common.output, &value, || {
        let mut page = String::new();
        fleet_page(&mut page, common, &fleet);
        if !here.is_null() {
            host_page(&mut page, &here);
        }
        Ok(page)
    })
}

/// The controllers, if there are several.
fn controllers(page: &mut String, fleet: &Value) {
    let all = fleet["controllers"].as_array().cloned().unwrap_or_default();
    if all.len() < 2 {
        return;
    }
    let row = |one: &Value| {
        let state = match one["answered"] == true {
            true => paint(Style::Good, "answers"),
            false => paint(Style::Bad, &format!("silent: {}", text(one, "/problem"))),
        };
        let columns = ["/name", "/api", "/agentsAt", "/version", "/since", "/agents", "/revision"];
        let mut row: Vec<String> = columns.iter().map(|column| text(one, column)).collect();
        row.push(state);
        row
    };
    let headings = ["CONTROLLER", "API", "AGENTS AT", "VERSION", "SINCE", "AGENTS", "REVISION", "STATE"];
    page.push_str(&table(&headings, &all.iter().map(row).collect::<Vec<_>>()));
    page.push('\n');
}

/// The relays, if there are any.
fn relays(page: &mut String, fleet: &Value) {
    let all = fleet["relays"].as_array().cloned().unwrap_or_default();
    if all.is_empty() {
        return;
    }
    let row = |one: &Value| {
        let state = connection(one["connected"] == true);
        let hosts = one["hosts"].as_array().into_iter().flatten().filter_map(Value::as_str);
        let hosts = hosts.collect::<Vec<_>>().join(",");
        vec![text(one, "/name"), state, text(one, "/agentsAt"), text(one, "/version"), hosts]
    };
    let headings = ["RELAY", "STATE", "AGENTS AT", "VERSION", "MAY SPEAK FOR"];
    page.push_str(&table(&headings, &all.iter().map(row).collect::<Vec<_>>()));
    page.push('\n');
}

fn connection(connected: bool) -> String {
    if connected { paint(Style::Good, "connected") } else { paint(Style::Bad, "away") }
}

fn fleet_page(page: &mut String, common: &Common, fleet: &Value) {
    if fleet.is_null() {
        let _ = writeln!(page, "{} at {}", paint(Style::Bad, "no controller"), common.server_name());
        return;
    }
    let _ = writeln!(
        page,
        "controller {} {} at {}: revision {}",
        text(fleet, "/controller/name"),
        text(fleet, "/controller/version"),
        common.server_name(),
        text(fleet, "/controller/revision")
    );
    controllers(page, fleet);
    let confirmations = fleet["confirmations"].as_array().into_iter().flatten();
    for waiting in confirmations.filter(|one| one["standing"] == "waiting") {
        let (id, deadline) = (text(waiting, "/id"), text(waiting, "/deadline"));
        let head = paint(Style::Bad, "waits for confirmation");
        let _ =
            writeln!(page, "{head}: {id}, rolled back at {deadline} unless you say: bulkhead confirm {id}");
    }
    relays(page, fleet);
    let agents = fleet["agents"].as_array().cloned().unwrap_or_default();
    if agents.is_empty() {
        page.push_str("no agent has connected yet\n");
        return;
    }
    let rows: Vec<_> = agents
        .iter()
        .map(|agent| {
            let state = connection(agent["connected"] == true);
            let not_enforced = agent["notEnforced"].as_array().map_or(0, Vec::len);
            vec![
                text(agent, "/host"),
                state,
                agent["relay"].as_str().unwrap_or("-").to_owned(),
                text(agent, "/version"),
                text(agent, "/dataplane"),
                text(agent, "/enforcedRevision"),
                text(agent, "/endpoints"),
                text(agent, "/subscriptions"),
                text(agent, "/entries"),
                not_enforced.to_string(),
            ]
        })
        .collect();
    let headings = [
        "HOST",
        "STATE",
        "RELAY",
        "VERSION",
        "DATAPLANE",
        "REVISION",
        "ENDPOINTS",
        "SELECTORS",
        "ENTRIES WRITTEN",
        "NOT ENFORCED",
    ];
    page.push_str(&table(&headings, &rows));
    for agent in &agents {
        reasons(page, &text(agent, "/host"), &agent["notEnforced"]);
    }
}

fn reasons(page: &mut String, host: &str, list: &Value) {
    for entry in list.as_array().into_iter().flatten() {
        let subject = text(entry, "/subject");
        let subject = subject.strip_prefix("Workload/").unwrap_or(&subject);
        let _ = writeln!(
            page,
            "{} {host}: {subject}: {}",
            paint(Style::Bad, "not enforced"),
            text(entry, "/reason")
        );
    }
}

fn host_page(page: &mut String, here: &Value) {
    let host = text(here, "/host");
    let connected = if here["connected"] == true {
        paint(Style::Good, "connected")
    } else {
        format!("{} ({})", paint(Style::Bad, "no controller"), text(here, "/disconnectedBecause"))
    };
    let because = here["dataplaneBecause"].as_str().map_or(String::new(), |why| format!(" ({why})"));
    let force = if here["programmed"] == true { "tables in force" } else { "tables not in force yet" };
    let _ = writeln!(
        page,
        "\nthis host, {host}: {connected}, {force}, revision {}, dataplane {}{because}",
        text(here, "/revision"),
        text(here, "/dataplane")
    );
    reasons(page, &host, &here["notEnforced"]);
    let endpoints = here["endpoints"].as_array().cloned().unwrap_or_default();
    if !endpoints.is_empty() {
        let state = |value: &Value| {
            if value == true { paint(Style::Good, "policy") } else { paint(Style::Bad, "closed") }
        };
        let rows: Vec<_> = endpoints
            .iter()
            .map(|endpoint| {
                let addresses = endpoint["addresses"].as_array().into_iter().flatten();
                let addresses: Vec<_> = addresses.filter_map(Value::as_str).collect();
                vec![
                    text(endpoint, "/workload"),
                    output::attachment(&endpoint["attachment"]),
                    state(&endpoint["ingress"]),
                    state(&endpoint["egress"]),
                    addresses.join(","),
                    output::labels(&endpoint["labels"]),
                ]
            })
            .collect();
        page.push_str(&table(&["ENDPOINT", "AT", "INGRESS", "EGRESS", "ADDRESSES", "LABELS"], &rows));
    }
    let drops = here["drops"].as_object().into_iter().flatten();
    let drops: Vec<_> = drops.map(|(reason, count)| format!("{reason} {count}")).collect();
    if !drops.is_empty() {
        let _ = writeln!(page, "dropped packets: {}", drops.join(", "));
    }
    let missing = [
        ("flowRecordsLost", "flow records lost"),
        ("eventsLost", "events lost"),
        ("refusalsUnrecorded", "refusals without a flow"),
        ("refusalsUntold", "refusals untold"),
    ];
    let missing = missing.map(|(name, what)| (here[name].as_u64().unwrap_or(0), what));
    let missing: Vec<_> = missing.iter().filter(|(count, _)| *count > 0).collect();
    if !missing.is_empty() {
        let missing: Vec<_> = missing.iter().map(|(count, what)| format!("{what} {count}")).collect();
        let _ = writeln!(page, "{}: {}", paint(Style::Bad, "not reported"), missing.join(", "));
    }
}

/// The tables of this host, as values.
pub(crate) async fn plan(common: &Common) -> Result<(), Failure> {
    let plan = call(common.agent(), Method::GET, "/plan", None).await?;
    output::show(common.output, &plan, || Ok(crate::yaml::document(&plan)))
}
