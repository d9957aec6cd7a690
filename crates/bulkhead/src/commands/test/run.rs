//! Runs policy tests: the compiled tables answer, and the reference evaluator must agree.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use bulkhead_engine::{Explanation, Flow, Judgement, find_policy};
use bulkhead_model::document::Position;
use bulkhead_model::{Direction, Resource, RuleRef};
use serde_json::Value;

use super::super::decide::without_trace;
use crate::failure::Failure;
use crate::manifests;
use crate::scenario::{self, Judge, Question, Scenario};
use crate::suite::{By, Case, Manifest, Placed, Port, Suite};

/// Most failed connections of one test that are told.
const TOLD_MAX: usize = 5;

/// What came of one document.
#[derive(Debug)]
pub(super) struct SuiteRun {
    pub(super) name: String,
    pub(super) source: String,
    pub(super) cases: Vec<CaseRun>,
    pub(super) time: Duration,
}

/// What came of one test.
#[derive(Debug)]
pub(super) struct CaseRun {
    pub(super) name: String,
    /// Of what was expected.
    pub(super) position: Position,
    pub(super) outcome: Outcome,
    pub(super) time: Duration,
}

#[derive(Debug)]
pub(super) enum Outcome {
    Passed,
    /// Connections that did otherwise, and how many more of them there are.
    Failed(Vec<Difference>, usize),
    /// It could not be asked, and why, with place.
    Error(String),
}

/// A connection that did otherwise than was expected.
#[derive(Debug)]
pub(super) struct Difference {
    /// One line.
    pub(super) message: String,
    /// What the reference saw.
    pub(super) explanation: Value,
    /// Directions whose decision made the difference.
    pub(super) sides: Vec<Direction>,
}

/// One of a test's connections.
struct Connection<'a> {
    from: &'a Placed<String>,
    to: &'a Placed<String>,
    port: Port,
}

/// Runs the tests of a suite that `wanted` picks.
pub(super) fn suite(suite: &Suite, fail_fast: bool, wanted: impl Fn(&Case) -> bool) -> SuiteRun {
    let started = Instant::now();
    let mut run = SuiteRun {
        name: suite.name.clone(),
        source: suite.source.clone(),
        cases: Vec::new(),
        time: Duration::ZERO,
    };
    match scenario(suite) {
        Ok(mut scenario) => {
            for case in suite.cases.iter().filter(|case| wanted(case)) {
                let began = Instant::now();
                let outcome = outcome(&mut scenario, suite, case);
                let stop = fail_fast && !matches!(outcome, Outcome::Passed);
                let (name, position) = (case.name.clone(), case.verdict.position);
                run.cases.push(CaseRun { name, position, outcome, time: began.elapsed() });
                if stop {
                    break;
                }
            }
        }
        Err(problems) => {
            let outcome = Outcome::Error(problems.join("\n"));
            let name = "manifests".to_owned();
            let position = Position { line: 1, column: 1 };
            run.cases.push(CaseRun { name, position, outcome, time: started.elapsed() });
        }
    }
    run.time = started.elapsed();
    run
}

/// Everything that a suite's manifests say.
fn scenario(suite: &Suite) -> Result<Scenario, Vec<String>> {
    let base = Path::new(&suite.source).parent().unwrap_or(Path::new(""));
    let mut resources: Vec<Resource> = Vec::new();
    let mut errors = Vec::new();
    for manifest in &suite.manifests {
        match manifest {
            Manifest::Inline(documents) => {
                resources.extend(documents.iter().map(|document| document.resource.clone()));
            }
            Manifest::Path(path) => match read(base, &path.value) {
                Ok(more) => resources.extend(more),
                Err(failure) => errors.push(located(suite, path.position, failure.message().unwrap_or(""))),
            },
        }
    }
    match scenario::names(&suite.dns) {
        Ok(names) => resources.extend(names),
        Err(error) => errors.push(format!("{}: dns: {error}", suite.source)),
    }
    let mut seen = BTreeSet::new();
    for key in resources.iter().map(Resource::key) {
        if !seen.insert(key.clone()) {
            errors.push(format!("{}: manifests: {key} is given twice", suite.source));
        }
    }
    let now = suite.at.unwrap_or_else(scenario::now);
    let mut scenario = Scenario::at(now);
    // What is missing would only make others wrong.
    if errors.is_empty()
        && let Err(more) = scenario.set(resources)
    {
        errors.extend(more.into_iter().map(|error| format!("{}: manifests: {error}", suite.source)));
    }
    if errors.is_empty() { Ok(scenario) } else { Err(errors) }
}

fn read(base: &Path, path: &str) -> Result<Vec<Resource>, Failure> {
    let files: Vec<PathBuf> = manifests::named(base, path)?;
    manifests::read(&files)
}

fn located(suite: &Suite, Position { line, column }: Position, message: &str) -> String {
    format!("{}:{line}:{column}: {message}", suite.source)
}

fn outcome(scenario: &mut Scenario, suite: &Suite, case: &Case) -> Outcome {
    let mut told = Vec::new();
    let mut more = 0;
    for from in &case.from {
        for to in &case.to {
            for port in &case.ports {
                let connection = Connection { from, to, port: *port };
                match difference(scenario, case, &connection) {
                    Ok(None) => {}
                    Ok(Some(difference)) if told.len() < TOLD_MAX => told.push(difference),
                    Ok(Some(_)) => more += 1,
                    Err(message) => {
                        // It begins with the end that is wrong.
                        let of_to = message.starts_with(&format!("{:?}", to.value));
                        let end = if of_to { to } else { from };
                        return Outcome::Error(located(suite, end.position, &message));
                    }
                }
            }
        }
    }
    if told.is_empty() { Outcome::Passed } else { Outcome::Failed(told, more) }
}

/// What a connection does otherwise than is expected.
///
/// # Errors
/// If it cannot be asked, or the two judges differ.
fn difference(
    scenario: &mut Scenario,
    case: &Case,
    connection: &Connection<'_>,
) -> Result<Option<Difference>, String> {
    let flow = flow(scenario, case, connection)?;
    let found = scenario.decide(&flow, Judge::Tables);
    let reference = scenario.decide(&flow, Judge::Reference);
    let title = format!("{} → {} on {}", connection.from.value, connection.to.value, connection.port);
    if without_trace(reference.clone()) != without_trace(found.clone()) {
        return Err(format!(
            "{title}: tables and reference differ, which is a mistake of Bulkhead itself: tables say {}, the \
             reference {}",
            decision(&found),
            decision(&reference)
        ));
    }
    let Some((what, sides)) = wrong(scenario, case, &found) else { return Ok(None) };
    let explanation = serde_json::to_value(&reference).unwrap_or_default();
    Ok(Some(Difference { message: format!("{title}: {what}"), explanation, sides }))
}

fn flow(scenario: &Scenario, case: &Case, connection: &Connection<'_>) -> Result<Flow, String> {
    let question = Question {
        from: &connection.from.value,
        to: &connection.to.value,
        port: connection.port.number,
        protocol: &connection.port.protocol.to_string(),
        source_port: case.source_port,
    };
    scenario.flow(&question)
}

/// What is other than expected, and whose decision that is.
fn wrong(scenario: &Scenario, case: &Case, found: &Explanation) -> Option<(String, Vec<Direction>)> {
    let expected = case.verdict.value;
    let all = || sides(found).map(|(direction, _)| direction).collect();
    if found.verdict != expected {
        let guilty = sides(found).filter(|(_, side)| side.verdict == found.verdict);
        return Some((
            format!("expected {expected}, found {}", decision(found)),
            guilty.map(|(direction, _)| direction).collect(),
        ));
    }
    if let Some(by) = &case.by
        && !decided_by(by, found)
    {
        let hint = unknown_policy(scenario, by).map(|hint| format!(" ({hint})")).unwrap_or_default();
        return Some((format!("expected {expected} by {by}{hint}, found {}", decision(found)), all()));
    }
    if let Some(audit) = case.audit
        && found.audit_verdict != audit
    {
        let found = found.audit_verdict;
        return Some((format!("expected {audit} if every Audit policy were enforced, found {found}"), all()));
    }
    None
}

fn sides(found: &Explanation) -> impl Iterator<Item = (Direction, &Judgement)> {
    let sides = [(Direction::Egress, &found.egress), (Direction::Ingress, &found.ingress)];
    sides.into_iter().filter_map(|(direction, side)| Some((direction, side.as_ref()?)))
}

/// Verdict and authors. Of a refusal only who refuses: the other end does not matter.
fn decision(found: &Explanation) -> String {
    let authors: Vec<String> = sides(found)
        .filter(|(_, side)| side.verdict == found.verdict)
        .map(|(direction, side)| match side.rule {
            // It tells the direction itself.
            RuleRef::Rule { .. } => side.rule.to_string(),
            _ => format!("{} at {direction}", side.rule),
        })
        .collect();
    if authors.is_empty() {
        return format!("{}: neither end is ours", found.verdict);
    }
    format!("{} by {}", found.verdict, authors.join(" and "))
}

/// Whether one of the ends that made the verdict did so for the reason that is expected.
fn decided_by(by: &By, found: &Explanation) -> bool {
    let mut deciding = sides(found).filter(|(_, side)| side.verdict == found.verdict);
    deciding.any(|(direction, side)| match by {
        By::Named(name) => {
            let policy = matches!(&side.rule, RuleRef::Rule { policy, .. } if policy == name);
            policy || side.rule.to_string() == *name
        }
        By::Rule { policy, rule, tier, direction: wanted } => {
            let (its_tier, its_policy, its_rule) = match &side.rule {
                RuleRef::Rule { tier, policy, index, .. } => (Some(tier), Some(policy), Some(*index)),
                RuleRef::TierDefault { tier } => (Some(tier), None, None),
                RuleRef::DefaultPosture | RuleRef::Builtin { .. } => (None, None, None),
            };
            wanted.is_none_or(|wanted| wanted == direction)
                && (policy.is_none() || policy.as_ref() == its_policy)
                && (tier.is_none() || tier.as_ref() == its_tier)
                && (rule.is_none() || *rule == its_rule)
        }
    })
}

/// If no policy has the name that is expected: what may have been meant.
fn unknown_policy(scenario: &Scenario, by: &By) -> Option<String> {
    let name = match by {
        By::Named(name) if !name.contains(' ') => name,
        By::Rule { policy: Some(name), .. } => name,
        _ => return None,
    };
    find_policy(scenario.fleet().world(), name).err().map(|error| error.to_string())
}

impl SuiteRun {
    pub(super) fn passed(&self) -> usize {
        self.cases.iter().filter(|case| matches!(case.outcome, Outcome::Passed)).count()
    }

    pub(super) fn failed(&self) -> usize {
        self.cases.iter().filter(|case| matches!(case.outcome, Outcome::Failed(..))).count()
    }

    pub(super) fn errors(&self) -> impl Iterator<Item = &str> {
        self.cases.iter().filter_map(|case| match &case.outcome {
            Outcome::Error(message) => Some(message.as_str()),
            Outcome::Passed | Outcome::Failed(..) => None,
        })
    }
}
