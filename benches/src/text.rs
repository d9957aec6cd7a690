//! From the text of manifests to tables and to verdicts, as `bulkhead` itself goes from one to the other.

use std::hint::black_box;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context as _, anyhow, bail};
use bulkhead_engine::{Assembly, Endpoint, Fleet, Flow, HostEngine, LocalEndpoint, MemberIndex};
use bulkhead_model::host_policy::Attachment;
use bulkhead_model::ports::{Protocol, USUAL_SOURCE_PORT};
use bulkhead_model::{Problem, document};
use serde_json::{Value, json};

use crate::child::{Body, Outcome, Shape, medians, processor, timed};
use crate::engine_speed::program_from;
use crate::report::Line;
use crate::small::policies;
use crate::stats::median;
use crate::{Effort, fixtures, progress};

const POLICIES: u32 = 10_000;
const LOCALS: u32 = 200;
/// The large cluster that is asked for verdicts, and how many it gives.
const LARGE_POLICIES: u32 = 2_000;
const LARGE_WORKLOADS: u32 = 5_000;
const LARGE_FLOWS: u32 = 20_000;
/// How often the small cluster changes; all pairs of its nine pods are asked on three ports each time.
const SMALL_STEPS: u32 = 200;
const PORTS: [(u16, &str); 3] = [(80, "TCP"), (81, "TCP"), (80, "UDP")];

/// What runs in processes of its own.
pub(crate) const BODIES: &[(&str, Body)] = &[("yaml", yaml), ("decide", in_process)];

/// Measures all of them.
pub(crate) fn measure(effort: Effort) -> anyhow::Result<Vec<Line>> {
    progress("text to tables and to verdicts");
    let rounds = effort.pick(5, 1);
    let outcomes = medians(rounds, &["yaml", "decide"])?;
    let (yaml, decide) = (&outcomes["yaml"], &outcomes["decide"]);
    let name = "10 000 policies of two rules from YAML to tables, 10 000 workloads, 200 local";
    let mut lines = Shape { name, ..Shape::default() }.lines(yaml);
    for part in ["parse", "assemble", "tables"] {
        lines.push(Line::new(format!("of it: {part}"), "s", yaml.parts[part]));
    }
    for by in ["tables", "reference"] {
        let name = format!("verdicts by {by}, 2000 policies, 5000 workloads");
        lines.push(Line::new(name, "1/s", decide.parts[by]));
    }
    lines.extend(through_process(rounds.min(3))?);
    Ok(lines)
}

fn problems(problems: &[Problem]) -> anyhow::Error {
    anyhow!("{problems:?}")
}

/// Reads the text as `apply` does, takes it in as the controller does, and makes one host's tables of it.
fn yaml() -> anyhow::Result<Outcome> {
    let text = policies(POLICIES)?;
    let (here, elsewhere): (Arc<str>, Arc<str>) = ("here".into(), "elsewhere".into());
    let mut parts = Vec::new();
    let mut outcome = timed(|| {
        let mut last = processor();
        let mut part = |name: &str| {
            let now = processor();
            parts.push((name.to_owned(), now - last));
            last = now;
        };
        let documents = document::parse("bench", &text).map_err(|found| problems(&found))?;
        part("parse");
        let mut assembly = Assembly::default();
        let mut changes = Vec::new();
        for document in documents {
            let key = document.resource.key();
            changes.push(assembly.set(&key, Some(document.resource)));
        }
        part("assemble");
        let (mut engine, mut index) = (HostEngine::new(&here), MemberIndex::new());
        for (key, spec) in changes.iter().flat_map(|change| &change.policies) {
            engine.set_policy(key, spec.as_ref());
        }
        for number in 0..POLICIES {
            let local = number % (POLICIES / LOCALS) == 0;
            let role = format!("r{number}");
            let labels = [("role", role.as_str()), ("env", "prod")];
            let host = if local { &here } else { &elsewhere };
            let entity = fixtures::workload(&format!("w{number}"), host, &labels, fixtures::address(number))?;
            if local {
                let name = Arc::clone(&entity.name);
                engine.set_local(
                    &name,
                    Some(LocalEndpoint { entity, attachment: Attachment::Interface(number + 2) }),
                );
            } else {
                index.upsert(&entity);
            }
        }
        program_from(&mut engine, &mut index);
        part("tables");
        Ok((engine.policy().endpoints.len(), (engine, index, assembly, changes)))
    })?
    .checked(LOCALS as usize)?;
    outcome.parts.extend(parts);
    Ok(outcome)
}

/// Everything on one host, asked by function calls.
fn in_process() -> anyhow::Result<Outcome> {
    let mut fleet = Fleet::new();
    let mut assembly = Assembly::default();
    for document in document::parse("bench", &policies(LARGE_POLICIES)?).map_err(|found| problems(&found))? {
        let key = document.resource.key();
        fleet.change(&assembly.set(&key, Some(document.resource)));
    }
    let host: Arc<str> = "h".into();
    for number in 0..LARGE_WORKLOADS {
        let role = format!("r{}", number % LARGE_POLICIES);
        let labels = [("role", role.as_str()), ("env", "prod")];
        let entity = fixtures::workload(&format!("w{number}"), &host, &labels, fixtures::address(number))?;
        fleet.set_entity(&Arc::clone(&entity.name), Some(&entity));
    }
    fleet.settle();
    let end = |number: u32| Endpoint {
        workload: Some(format!("Workload/w{number}").into()),
        address: fixtures::address(number).into(),
    };
    let flows: Vec<Flow> = (0..2_000)
        .map(|number| Flow {
            source: end((number * 7 + number % 2) % LARGE_WORKLOADS),
            destination: end((number * 7 + LARGE_WORKLOADS - 1) % LARGE_WORKLOADS),
            key: Protocol::TCP.key(443),
            source_port: USUAL_SOURCE_PORT,
        })
        .collect();
    let per_second = |count: usize, started: f64| -> anyhow::Result<f64> {
        Ok(f64::from(u32::try_from(count)?) / (processor() - started))
    };
    let started = processor();
    for _ in 0..20 {
        flows.iter().for_each(|flow| drop(black_box(fleet.decide_by_tables(black_box(flow)))));
    }
    let tables = per_second(20 * flows.len(), started)?;
    let asked = &flows[..200];
    let started = processor();
    asked.iter().for_each(|flow| drop(black_box(fleet.decide_by_reference(black_box(flow)))));
    let reference = per_second(asked.len(), started)?;
    if asked
        .iter()
        .any(|flow| fleet.decide_by_tables(flow).verdict != fleet.decide_by_reference(flow).verdict)
    {
        bail!("tables and reference differ");
    }
    let parts = [("tables".to_owned(), tables), ("reference".to_owned(), reference)].into();
    Ok(Outcome { parts, ..Outcome::default() })
}

/// The program that answers: beside this one, or where the environment says.
fn bulkhead() -> anyhow::Result<PathBuf> {
    let beside = std::env::current_exe()?.with_file_name("bulkhead");
    let program = std::env::var_os("BULKHEAD_BIN").map_or(beside, PathBuf::from);
    if !program.exists() {
        bail!("there is no {}: build it, or set BULKHEAD_BIN", program.display());
    }
    Ok(program)
}

/// `bulkhead decide --batch`: JSON in, JSON out, one process for all lines.
fn through_process(rounds: usize) -> anyhow::Result<Vec<Line>> {
    let small: Vec<Value> = (0..SMALL_STEPS).map(small_step).collect();
    let large = large_cluster();
    let warm = json!({ "id": "warm", "manifests": large["manifests"] });
    let mut lines = Vec::new();
    for by in ["tables", "reference"] {
        let flags: &[&str] = if by == "reference" { &["--reference"] } else { &[] };
        let mut rates = [Vec::new(), Vec::new(), Vec::new()];
        for _ in 0..rounds {
            let mut batch = Batch::start(flags)?;
            rates[0].push(batch.ask(&small)?);
            batch.ask(std::slice::from_ref(&warm))?;
            // The reference evaluator looks at everything for every flow: a part of the flows is enough for it.
            let mut asked = large.clone();
            if by == "reference" {
                let flows = asked["flows"].as_array_mut().context("flows")?;
                flows.truncate(200);
            }
            let started = Instant::now();
            batch.ask(std::slice::from_ref(&warm))?;
            let manifests_again = started.elapsed().as_secs_f64();
            let flows = asked["flows"].as_array().map_or(0, Vec::len);
            let started = Instant::now();
            batch.ask(&[asked])?;
            let seconds = (started.elapsed().as_secs_f64() - manifests_again).max(1e-9);
            rates[1].push(f64::from(u32::try_from(flows)?) / seconds);
            rates[2].push(manifests_again);
        }
        let name = format!("decide --batch by {by}, 9 pods, a new policy every 243 flows");
        lines.push(Line::new(name, "1/s", median(&rates[0])));
        let name = format!("decide --batch by {by}, 2000 policies, 5000 pods");
        lines.push(Line::new(name, "1/s", median(&rates[1])));
        if by == "tables" {
            let name = "decide --batch, a line with 7001 manifests that changes nothing";
            lines.push(Line::new(name, "s", median(&rates[2])));
        }
    }
    Ok(lines)
}

struct Batch {
    child: std::process::Child,
    answers: BufReader<std::process::ChildStdout>,
}

impl Batch {
    fn start(flags: &[&str]) -> anyhow::Result<Self> {
        let program = bulkhead()?;
        let mut child = Command::new(&program)
            .args(["decide", "--batch"])
            .args(flags)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {}", program.display()))?;
        let answers = BufReader::new(child.stdout.take().context("no standard output")?);
        Ok(Self { child, answers })
    }

    /// Asks line by line, as a tool that compares verdicts does. Answers the flows per second.
    fn ask(&mut self, requests: &[Value]) -> anyhow::Result<f64> {
        let texts: Vec<String> = requests.iter().map(|request| format!("{request}\n")).collect();
        let mut judged = 0;
        let started = Instant::now();
        for text in &texts {
            let input = self.child.stdin.as_mut().context("no standard input")?;
            input.write_all(text.as_bytes())?;
            input.flush()?;
            let mut line = String::new();
            self.answers.read_line(&mut line)?;
            let answer: Value = serde_json::from_str(&line).context("answer of decide --batch")?;
            if answer["errors"].as_array().is_none_or(|errors| !errors.is_empty()) {
                bail!("decide --batch: {}", answer["errors"]);
            }
            judged += answer["results"].as_array().map_or(0, Vec::len);
        }
        Ok(f64::from(u32::try_from(judged)?) / started.elapsed().as_secs_f64())
    }
}

impl Drop for Batch {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        let _ = self.child.wait();
    }
}

fn namespace(name: &str) -> Value {
    json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": name, "labels": { "ns": name } } })
}

fn pod(namespace: &str, name: &str, labels: &Value, ip: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": { "namespace": namespace, "name": name, "labels": labels },
        "spec": { "nodeName": "node-1", "containers": [{
            "name": "serve", "ports": [{ "containerPort": 80, "protocol": "TCP", "name": "serve-80-tcp" }],
        }] },
        "status": { "podIP": ip, "podIPs": [{ "ip": ip }] },
    })
}

/// The cluster of cyclonus, namespaces x, y and z with pods a, b and c, and one policy of many.
fn small_step(step: u32) -> Value {
    let (namespaces, pods) = (["x", "y", "z"], ["a", "b", "c"]);
    let mut manifests: Vec<Value> = namespaces.iter().map(|name| namespace(name)).collect();
    let mut ends = Vec::new();
    for (net, space) in namespaces.iter().enumerate() {
        for (number, name) in pods.iter().enumerate() {
            let ip = format!("192.168.{}.{}", net + 1, number + 11);
            manifests.push(pod(space, name, &json!({ "pod": name }), &ip));
            ends.push(format!("pod:{space}/{name}"));
        }
    }
    let at = |list: [&'static str; 3], by: u32| list[(step / by % 3) as usize];
    manifests.push(json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": { "namespace": at(namespaces, 1), "name": "base" },
        "spec": {
            "podSelector": { "matchLabels": { "pod": at(pods, 3) } },
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [{
                "ports": [{ "protocol": "TCP", "port": 80 + step % 2 }],
                "from": [{
                    "podSelector": { "matchExpressions": [
                        { "key": "pod", "operator": "In", "values": ["b", at(pods, 9)] },
                    ] },
                    "namespaceSelector": { "matchLabels": { "ns": at(namespaces, 27) } },
                }],
            }],
            "egress": [
                { "to": [{ "ipBlock": { "cidr": format!("192.168.{}.0/24", step % 4) } }] },
                { "ports": [{ "protocol": "UDP", "port": 53 }] },
            ],
        },
    }));
    let pairs = ends.iter().flat_map(|from| ends.iter().map(move |to| (from, to)));
    let flows: Vec<Value> = pairs
        .flat_map(|(from, to)| {
            PORTS
                .map(|(port, protocol)| json!({ "from": from, "to": to, "port": port, "protocol": protocol }))
        })
        .collect();
    json!({ "id": step, "manifests": manifests, "flows": flows })
}

fn large_cluster() -> Value {
    let mut manifests = vec![namespace("x")];
    for number in 0..LARGE_WORKLOADS {
        let name = format!("p{number}");
        let labels = json!({ "role": format!("r{}", number % LARGE_POLICIES), "env": "prod" });
        manifests.push(pod("x", &name, &labels, &fixtures::address(number).to_string()));
    }
    for number in 0..LARGE_POLICIES {
        manifests.push(json!({
            "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
            "metadata": { "namespace": "x", "name": format!("n{number}") },
            "spec": {
                "podSelector": { "matchLabels": { "role": format!("r{number}") } },
                "policyTypes": ["Ingress"],
                "ingress": [{
                    "ports": [{ "protocol": "TCP", "port": 443 }],
                    "from": [{ "podSelector": { "matchLabels": { "role": format!("r{}", number + 1) } } }],
                }],
            },
        }));
    }
    let flows: Vec<Value> = (0..LARGE_FLOWS)
        .map(|number| {
            json!({
                "from": format!("pod:x/p{}", (number * 7 + number % 2) % LARGE_WORKLOADS),
                "to": format!("pod:x/p{}", (number * 7 + LARGE_WORKLOADS - 1) % LARGE_WORKLOADS),
                "port": 443, "protocol": "TCP",
            })
        })
        .collect();
    json!({ "id": "large", "manifests": manifests, "flows": flows })
}
