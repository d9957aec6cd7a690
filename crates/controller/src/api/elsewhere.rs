//! Answers that need what other controllers know: theirs and ours as one.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::sync::Arc;

use axum::body::{Body, Bytes};
use futures::{Stream, StreamExt};
use serde_json::{Value, json};

use crate::clock;
use crate::cluster::{Answer, ask_others, follow_others};
use crate::context::Context;

/// Longest line of another controller's answer that goes on; a record is far shorter.
const LINE_BYTES_MAX: usize = 1 << 20;

/// Where flow records are asked for.
const FLOWS: &str = "/apis/bulkhead.dev/v1/flows";
/// Query parameter of a question that is not passed on.
pub(super) const LOCAL: &str = "local";

/// What all controllers know together.
pub(super) struct Fleet {
    pub(super) controllers: Vec<Value>,
    pub(super) agents: Vec<Value>,
    pub(super) relays: Value,
}

/// All controllers, with what the others say of themselves; and all agents, each as the controller says that has it.
pub(super) async fn status(context: &Context, own: &Value) -> Fleet {
    let answers = ask_others(context, "/apis/bulkhead.dev/v1/status?local=true").await;
    let mut agents = BTreeMap::new();
    take_in(&mut agents, own);
    let mut revisions =
        BTreeMap::from([(context.config.name.clone(), own["controller"]["revision"].clone())]);
    let mut problems = BTreeMap::new();
    let mut relays = own["relays"].clone();
    for Answer { of, said } in answers {
        match said {
            Ok(status) => {
                take_in(&mut agents, &status);
                connected_there(&mut relays, &status);
                revisions.insert(of.name, status["controller"]["revision"].clone());
            }
            Err(problem) => drop(problems.insert(of.name, problem)),
        }
    }
    let mut known = context.cluster.controllers();
    if !known.iter().any(|one| one.name == context.config.name) {
        known.push(context.cluster.own().clone());
    }
    let controllers = known.into_iter().map(|one| {
        let mut shown = json!({
            "name": one.name,
            "api": one.api,
            "agentsAt": one.agents,
            "version": one.version,
            "since": clock::rfc3339(one.since_ms),
            "agents": context.cluster.served_by(&one.name),
            "answered": revisions.contains_key(&one.name),
        });
        if let Some(revision) = revisions.get(&one.name) {
            shown["revision"] = revision.clone();
        }
        if let Some(problem) = problems.get(&one.name) {
            shown["problem"] = json!(problem);
        }
        shown
    });
    Fleet { controllers: controllers.collect(), agents: agents.into_values().collect(), relays }
}

/// A relay is connected if it is to any controller.
fn connected_there(relays: &mut Value, status: &Value) {
    let there = status["relays"].as_array();
    for relay in relays.as_array_mut().into_iter().flatten() {
        let same = |one: &&Value| one["name"] == relay["name"] && one["connected"] == true;
        if let Some(connected) = there.and_then(|all| all.iter().find(same)) {
            *relay = connected.clone();
        }
    }
}

/// Adds the agents of a controller's answer. Of two that know a host, the one that has it counts, else the later one.
fn take_in(agents: &mut BTreeMap<String, Value>, status: &Value) {
    let name = status["controller"]["name"].as_str().unwrap_or_default();
    for agent in status["agents"].as_array().into_iter().flatten() {
        let mut agent = agent.clone();
        agent["controller"] = json!(name);
        let host = agent["host"].as_str().unwrap_or_default().to_owned();
        // Times are written so that the later one is the greater text.
        let rank = |agent: &Value| {
            let seen = agent["lastSeen"].as_str().unwrap_or_default().to_owned();
            (agent["connected"] == true, seen)
        };
        match agents.get(&host) {
            Some(known) if rank(known) >= rank(&agent) => {}
            _ => drop(agents.insert(host, agent)),
        }
    }
}

/// Our flow records and the others', newest first, at most `limit`; and who did not answer.
pub(super) async fn flows(
    context: &Context,
    own: Vec<Value>,
    query: &str,
    limit: usize,
) -> (Vec<Value>, Vec<Value>) {
    let mut unanswered = Vec::new();
    let mut all = own;
    for Answer { of, said } in ask_others(context, &format!("{FLOWS}?{query}&{LOCAL}=true")).await {
        match said {
            Ok(mut answer) => match answer["items"].take() {
                Value::Array(items) => all.extend(items),
                _ => unanswered.push(silent(&of.name, "its answer has no items")),
            },
            Err(problem) => unanswered.push(silent(&of.name, &problem)),
        }
    }
    // Each controller's own order is kept where times are the same.
    all.sort_by_key(|flow| Reverse(flow["timeMs"].as_u64()));
    all.truncate(limit);
    (all, unanswered)
}

fn silent(controller: &str, problem: &str) -> Value {
    json!({ "controller": controller, "problem": problem })
}

/// Lines of the other controllers' flows as they come; a line about each that does not answer, or ends.
pub(super) async fn follow(context: Arc<Context>, query: &str) -> impl Stream<Item = Bytes> + Send + 'static {
    let streams = follow_others(&context, &format!("{FLOWS}?{query}&{LOCAL}=true")).await.into_iter();
    let streams = streams.map(|Answer { of, said }| {
        let lines = match said {
            Ok(body) => lines(body).boxed(),
            Err(problem) => futures::stream::iter([silent(&of.name, &problem)]).boxed(),
        };
        let end = silent(&of.name, "its answer has ended: ask again for what it is told from now on");
        lines.chain(futures::stream::iter([end])).boxed()
    });
    futures::stream::select_all(streams).map(|value| {
        let value = if value.get("problem").is_some() { json!({ "unanswered": value }) } else { value };
        Bytes::from(format!("{value}\n"))
    })
}

/// The values of an answer with one on each line.
fn lines(body: Body) -> impl Stream<Item = Value> + Send + 'static {
    let state = (body.into_data_stream(), Vec::new());
    let batches = futures::stream::unfold(state, |(mut data, mut text)| async move {
        let chunk = data.next().await?.ok()?;
        text.extend_from_slice(&chunk);
        let whole = text.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
        let rest = text.split_off(whole);
        if rest.len() > LINE_BYTES_MAX {
            return None;
        }
        let read = text.split(|byte| *byte == b'\n').filter_map(|line| serde_json::from_slice(line).ok());
        Some((futures::stream::iter(read.collect::<Vec<Value>>()), (data, rest)))
    });
    batches.flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_two_that_know_a_host_the_one_that_has_it_counts() {
        let of = |name: &str, connected: bool, seen: &str| {
            let agent = json!({ "host": "h", "connected": connected, "lastSeen": seen });
            json!({ "controller": { "name": name }, "agents": [agent] })
        };
        let owner = |statuses: &[Value]| {
            let mut agents = BTreeMap::new();
            statuses.iter().for_each(|status| take_in(&mut agents, status));
            agents["h"]["controller"].as_str().unwrap().to_owned()
        };
        let (early, late) = ("2026-01-01T00:00:00Z", "2026-01-01T00:00:05Z");
        assert_eq!(owner(&[of("a", true, early), of("b", false, late)]), "a");
        assert_eq!(owner(&[of("a", false, early), of("b", true, early)]), "b");
        assert_eq!(owner(&[of("a", false, early), of("b", false, late)]), "b");
    }
}
