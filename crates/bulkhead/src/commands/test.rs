//! `test`: policy tests, without controller or kernel.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use bulkhead_model::Problem;
use serde_json::{Value, json};

use super::explain;
use crate::cli::{Common, TestArgs};
use crate::failure::Failure;
use crate::junit::{self, JunitCase, JunitOutcome, JunitSuite};
use crate::manifests;
use crate::output::{self, Style, paint};
use crate::sarif::{self, SarifResult, SarifRule};
use crate::suite::{self, Suite, is_test_file};

mod run;

use run::{CaseRun, Difference, Outcome, SuiteRun};

/// Most files that one call looks at.
const FILES_MAX: usize = 100_000;
/// Deepest directory below one that is given.
const DEPTH_MAX: usize = 64;

/// What the SARIF log calls a test that failed, and one that could not be asked.
const RULES: [SarifRule; 2] = [
    SarifRule {
        id: "BHT001",
        name: "policy-test-failed",
        short: "A connection does otherwise than a policy test expects",
        full: "The verdict, its author or the audit verdict of a connection differs from what the test says.",
        level: "error",
    },
    SarifRule {
        id: "BHT002",
        name: "policy-test-broken",
        short: "A policy test cannot be asked",
        full: "The test file or the manifests that it names cannot be read, or an end is not among them.",
        level: "error",
    },
];

/// Everything that came of one call.
struct Results {
    suites: Vec<SuiteRun>,
    /// Files that cannot be read: name and problems.
    broken: Vec<(String, Vec<Problem>)>,
    time: Duration,
}

pub(crate) fn test(common: &Common, args: &TestArgs) -> Result<(), Failure> {
    let results = results(args).map_err(Failure::broken)?;
    if let Some(file) = &args.junit {
        write(file, &junit(&results))?;
    }
    if let Some(file) = &args.sarif {
        let text = serde_json::to_string_pretty(&sarif(&results)).unwrap_or_default();
        write(file, &format!("{text}\n"))?;
    }
    output::show(common.output, &to_json(&results), || Ok(page(&results)))?;
    let broken = results.broken.iter().flat_map(|(_, problems)| problems).map(ToString::to_string);
    let errors = results.suites.iter().flat_map(SuiteRun::errors).map(ToOwned::to_owned);
    let errors: Vec<String> = broken.chain(errors).collect();
    if !errors.is_empty() {
        return Err(Failure::Broken(errors.join("\n")));
    }
    if results.failed() > 0 {
        return Err(Failure::No(None));
    }
    if results.passed() == 0 {
        let asked =
            args.filter.as_ref().map_or_else(String::new, |text| format!(" with {text:?} in its name"));
        return Err(Failure::Broken(format!(
            "there is no test{asked} in {}: files of tests are called *.test.yaml",
            args.files.join(", ")
        )));
    }
    Ok(())
}

fn write(file: &Path, text: &str) -> Result<(), Failure> {
    std::fs::write(file, text)
        .map_err(|error| Failure::Broken(format!("cannot write {}: {error}", file.display())))
}

fn results(args: &TestArgs) -> Result<Results, Failure> {
    let started = Instant::now();
    let mut results = Results { suites: Vec::new(), broken: Vec::new(), time: Duration::ZERO };
    for file in files(&args.files)? {
        let name = file.display().to_string();
        let name = name.strip_prefix("./").unwrap_or(&name);
        let text = std::fs::read_to_string(&file)
            .map_err(|error| Failure::Broken(format!("cannot read {name}: {error}")))?;
        match suite::parse(name, &text) {
            Ok(suites) => run_all(args, &suites, &mut results),
            Err(problems) => results.broken.push((name.to_owned(), problems)),
        }
        if args.fail_fast && !results.all_well() {
            break;
        }
    }
    results.time = started.elapsed();
    Ok(results)
}

fn run_all(args: &TestArgs, suites: &[Suite], results: &mut Results) {
    for suite in suites {
        let wanted = |case: &suite::Case| {
            let name = format!("{} {} {}", suite.source, suite.name, case.name);
            args.filter.as_ref().is_none_or(|text| name.contains(text.as_str()))
        };
        if suite.cases.iter().any(wanted) {
            results.suites.push(run::suite(suite, args.fail_fast, wanted));
        }
        if args.fail_fast && !results.all_well() {
            return;
        }
    }
}

impl Results {
    fn passed(&self) -> usize {
        self.suites.iter().map(SuiteRun::passed).sum()
    }

    fn failed(&self) -> usize {
        self.suites.iter().map(SuiteRun::failed).sum()
    }

    fn errors(&self) -> usize {
        let broken: usize = self.broken.iter().map(|(_, problems)| problems.len()).sum();
        broken + self.suites.iter().map(|suite| suite.errors().count()).sum::<usize>()
    }

    fn all_well(&self) -> bool {
        self.failed() == 0 && self.errors() == 0
    }
}

/// Files that are given, whatever their name, and test files in directories.
fn files(given: &[String]) -> Result<Vec<PathBuf>, Failure> {
    let mut files = Vec::new();
    for text in given {
        for path in manifests::matching(Path::new(""), text)? {
            if path.is_dir() {
                below(&path, 0, &mut files)?;
            } else {
                files.push(path);
            }
        }
    }
    let mut known = std::collections::BTreeSet::new();
    files.retain(|file| known.insert(file.clone()));
    Ok(files)
}

fn below(directory: &Path, depth: usize, files: &mut Vec<PathBuf>) -> Result<(), Failure> {
    let wrong =
        |why: &dyn std::fmt::Display| Failure::Broken(format!("cannot read {}: {why}", directory.display()));
    let mut entries = Vec::new();
    for entry in std::fs::read_dir(directory).map_err(|error| wrong(&error))? {
        entries.push(entry.map_err(|error| wrong(&error))?);
    }
    entries.sort_by_key(std::fs::DirEntry::file_name);
    for entry in entries {
        let path = entry.path();
        let hidden = entry.file_name().to_string_lossy().starts_with('.');
        // Links to directories are not followed: they may lead in circles.
        let is_directory = entry.file_type().is_ok_and(|kind| kind.is_dir());
        if is_directory && !hidden && depth < DEPTH_MAX {
            below(&path, depth + 1, files)?;
        } else if !is_directory && is_test_file(&path) {
            files.push(path);
        }
        if files.len() > FILES_MAX {
            return Err(wrong(&format!("more than {FILES_MAX} test files")));
        }
    }
    Ok(())
}

fn page(results: &Results) -> String {
    let mut page = String::new();
    for suite in &results.suites {
        let file = if suite.name == suite.source { String::new() } else { format!(" ({})", suite.source) };
        let _ = writeln!(page, "{}{file}", paint(Style::Bold, &suite.name));
        for case in &suite.cases {
            match &case.outcome {
                Outcome::Passed => {
                    let _ = writeln!(page, "  {}    {}", paint(Style::Good, "ok"), case.name);
                }
                Outcome::Error(_) => {
                    let _ = writeln!(page, "  {} {}", paint(Style::Bad, "ERROR"), case.name);
                }
                Outcome::Failed(told, more) => {
                    let _ = writeln!(page, "  {}  {}", paint(Style::Bad, "FAIL"), case.name);
                    page.push_str(&indented(&details(suite, case, told, *more)));
                }
            }
        }
        page.push('\n');
    }
    let errors = match results.errors() {
        0 => String::new(),
        errors => format!(", {errors} wrong"),
    };
    let summary = format!("{} passed, {} failed{errors}", results.passed(), results.failed());
    let style = if results.all_well() { Style::Good } else { Style::Bad };
    let _ = writeln!(page, "{} in {:.2} s", paint(style, &summary), results.time.as_secs_f64());
    page
}

/// What was expected and found, and how it came to that.
fn details(suite: &SuiteRun, case: &CaseRun, told: &[Difference], more: usize) -> String {
    let mut text = format!("expected at {}:{}:{}\n", suite.source, case.position.line, case.position.column);
    for difference in told {
        let _ = writeln!(text, "{}", difference.message);
        for direction in &difference.sides {
            let name = direction.to_string();
            let who = if name == "egress" { "source" } else { "destination" };
            explain::side(&mut text, &name, who, &difference.explanation[name.as_str()]);
        }
        text.push('\n');
    }
    if more > 0 {
        let _ = writeln!(text, "… and {more} more connections");
    }
    text
}

fn indented(text: &str) -> String {
    let lines = text.trim_end().lines().map(|line| match line {
        "" => "\n".to_owned(),
        line => format!("        {line}\n"),
    });
    lines.collect()
}

fn to_json(results: &Results) -> Value {
    let suites: Vec<Value> = results
        .suites
        .iter()
        .map(|suite| {
            let tests: Vec<Value> = suite.cases.iter().map(case_json).collect();
            json!({
                "name": suite.name,
                "file": suite.source,
                "seconds": suite.time.as_secs_f64(),
                "tests": tests,
            })
        })
        .collect();
    let broken: Vec<Value> =
        results.broken.iter().map(|(file, problems)| json!({ "file": file, "problems": problems })).collect();
    json!({
        "passed": results.passed(),
        "failed": results.failed(),
        "errors": results.errors(),
        "seconds": results.time.as_secs_f64(),
        "suites": suites,
        "broken": broken,
    })
}

fn case_json(case: &CaseRun) -> Value {
    let mut value = json!({
        "name": case.name,
        "line": case.position.line,
        "column": case.position.column,
        "seconds": case.time.as_secs_f64(),
    });
    match &case.outcome {
        Outcome::Passed => value["outcome"] = json!("passed"),
        Outcome::Error(message) => {
            value["outcome"] = json!("error");
            value["error"] = json!(message);
        }
        Outcome::Failed(told, more) => {
            let failures: Vec<Value> = told
                .iter()
                .map(|one| json!({ "message": one.message, "explanation": one.explanation }))
                .collect();
            value["outcome"] = json!("failed");
            value["failures"] = json!(failures);
            value["moreFailures"] = json!(more);
        }
    }
    value
}

fn junit(results: &Results) -> String {
    let details: Vec<Vec<(String, String)>> = results
        .suites
        .iter()
        .map(|suite| suite.cases.iter().map(|case| told(suite, case)).collect())
        .collect();
    let broken: Vec<Vec<String>> = results
        .broken
        .iter()
        .map(|(_, problems)| problems.iter().map(ToString::to_string).collect())
        .collect();
    let mut suites: Vec<JunitSuite<'_>> = Vec::new();
    for (suite, details) in results.suites.iter().zip(&details) {
        let cases = suite.cases.iter().zip(details);
        let cases = cases.map(|(case, (message, all))| JunitCase {
            name: &case.name,
            file: &suite.source,
            line: case.position.line,
            time: case.time,
            outcome: match &case.outcome {
                Outcome::Passed => JunitOutcome::Passed,
                Outcome::Failed(..) => JunitOutcome::Failed(message, all),
                Outcome::Error(message) => JunitOutcome::Error(message),
            },
        });
        suites.push(JunitSuite { name: &suite.name, cases: cases.collect(), time: suite.time });
    }
    for ((file, problems), texts) in results.broken.iter().zip(&broken) {
        let cases = problems.iter().zip(texts).map(|(problem, text)| JunitCase {
            name: "file",
            file,
            line: problem.line,
            time: Duration::ZERO,
            outcome: JunitOutcome::Error(text),
        });
        suites.push(JunitSuite { name: file, cases: cases.collect(), time: Duration::ZERO });
    }
    junit::document(&suites)
}

/// A failure's first message, and everything without colours.
fn told(suite: &SuiteRun, case: &CaseRun) -> (String, String) {
    match &case.outcome {
        Outcome::Failed(told, more) => {
            let first = told.first().map(|one| one.message.clone()).unwrap_or_default();
            (first, output::plain(&details(suite, case, told, *more)))
        }
        Outcome::Passed | Outcome::Error(_) => Default::default(),
    }
}

fn sarif(results: &Results) -> Value {
    let mut found = Vec::new();
    for suite in &results.suites {
        for case in &suite.cases {
            let (rule, message) = match &case.outcome {
                Outcome::Passed => continue,
                Outcome::Failed(told, _) => {
                    let lines: Vec<&str> = told.iter().map(|one| one.message.as_str()).collect();
                    (RULES[0].id, format!("{}: {}", case.name, lines.join("\n")))
                }
                Outcome::Error(message) => (RULES[1].id, message.clone()),
            };
            let (line, column) = (case.position.line, case.position.column);
            found.push(SarifResult { rule, level: "error", message, file: &suite.source, line, column });
        }
    }
    for problem in results.broken.iter().flat_map(|(_, problems)| problems) {
        let Problem { line, column, .. } = *problem;
        let (rule, message) = (RULES[1].id, problem.to_string());
        found.push(SarifResult { rule, level: "error", message, file: &problem.source, line, column });
    }
    sarif::document(&RULES, &found)
}
