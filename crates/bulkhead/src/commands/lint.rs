//! `lint`: what is suspicious in manifests, without controller or kernel.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use bulkhead_engine::{Assembly, CODES, Code, CodeInfo, Finding, Severity, World, lint as analyse};
use bulkhead_model::ObjectKey;
use bulkhead_model::document::{Document, Position};
use serde_json::{Value, json};

use crate::cli::{Common, LintArgs};
use crate::failure::Failure;
use crate::manifests;
use crate::output::{self, Style, paint};
use crate::sarif::{self, SarifResult, SarifRule};
use crate::scenario::now;

/// A finding at its place.
struct Placed {
    finding: Finding,
    severity: Severity,
    source: String,
    position: Position,
}

pub(crate) fn lint(common: &Common, args: &LintArgs) -> Result<(), Failure> {
    if args.list {
        return output::show(common.output, &list_json(), || Ok(list()));
    }
    if let Some(code) = &args.explain {
        let info = code_of(code)?.info();
        return output::show(common.output, &info_json(info), || Ok(explained(info)));
    }
    let severities = severities(args)?;
    let documents = manifests::sources(&args.filename)
        .and_then(|sources| manifests::documents(&sources).map_err(|problems| manifests::refused(&problems)))
        .map_err(Failure::broken)?;
    let (found, complete) = look(documents, args, &severities)?;
    if let Some(file) = &args.sarif {
        let text = serde_json::to_string_pretty(&sarif(&found)).unwrap_or_default();
        std::fs::write(file, format!("{text}\n"))
            .map_err(|error| Failure::Broken(format!("cannot write {}: {error}", file.display())))?;
    }
    if !complete {
        output::note("not every rule was compared with all those before it: there are too many\n");
    }
    output::show(common.output, &to_json(&found, complete), || Ok(page(&found)))?;
    let serious = found.iter().any(|placed| placed.severity >= Severity::Warning);
    if serious { Err(Failure::No(None)) } else { Ok(()) }
}

fn code_of(text: &str) -> Result<Code, Failure> {
    Code::parse(text).ok_or_else(|| {
        let words = CODES.iter().flat_map(|info| [info.id, info.name]);
        let near = bulkhead_model::suggest::nearest(text, words);
        let hint = near.map_or_else(String::new, |near| format!("; did you mean {near}?"));
        Failure::Usage(format!("there is no code {text:?}, bulkhead lint --list shows all{hint}"))
    })
}

/// How much each code matters; `None`: not at all.
fn severities(args: &LintArgs) -> Result<BTreeMap<Code, Option<Severity>>, Failure> {
    let mut severities: BTreeMap<_, _> = CODES.iter().map(|info| (info.code, Some(info.severity))).collect();
    for text in &args.allow {
        severities.insert(code_of(text)?, None);
    }
    for text in &args.deny {
        let code = code_of(text)?;
        if severities.insert(code, Some(Severity::Error)) == Some(None) {
            return Err(Failure::Usage(format!("{code} is both allowed and denied")));
        }
    }
    Ok(severities)
}

/// Findings by place, and whether everything was looked at.
fn look(
    documents: Vec<Document>,
    args: &LintArgs,
    severities: &BTreeMap<Code, Option<Severity>>,
) -> Result<(Vec<Placed>, bool), Failure> {
    let mut assembly = Assembly::default();
    let mut world = World::new();
    world.now = args.at.unwrap_or_else(now);
    let mut places: BTreeMap<ObjectKey, Document> = BTreeMap::new();
    for document in documents {
        let key = document.resource.key();
        world.change(&assembly.set(&key, Some(document.resource.clone())));
        places.insert(key, document);
    }
    let findings = analyse(&world, assembly.objects());
    let placed = findings.list.into_iter().filter_map(|finding| {
        let severity = severities.get(&finding.code).copied().flatten()?;
        let document = places.get(&finding.object)?;
        let (source, position) = (document.source.clone(), position(document, &finding.path));
        Some(Placed { finding, severity, source, position })
    });
    let mut placed: Vec<Placed> = placed.collect();
    placed.sort_by(|a, b| {
        (&a.source, a.position, a.finding.code).cmp(&(&b.source, b.position, b.finding.code))
    });
    Ok((placed, findings.complete))
}

/// What fields of findings are called in manifests of Kubernetes and Calico.
const ALSO_CALLED: [(&str, &[&str]); 4] = [
    ("spec.appliesTo", &["spec.selector", "spec.podSelector", "spec.subject"]),
    (".from[0].", &[".source."]),
    (".to[0].", &[".destination."]),
    ("].selector", &["].podSelector"]),
];

/// Where a field stands. What is not there has its parent's place, and that comes before the field: of several names
/// the right one stands last.
fn position(document: &Document, path: &str) -> Position {
    let mut places = vec![document.position_of(path)];
    for (name, others) in ALSO_CALLED {
        let others = others.iter().filter(|_| path.contains(name));
        places.extend(others.map(|other| document.position_of(&path.replace(name, other))));
    }
    places.into_iter().max().unwrap_or_default()
}

fn painted(severity: Severity) -> String {
    let style = match severity {
        Severity::Note => Style::Dim,
        Severity::Warning => Style::Bold,
        Severity::Error => Style::Bad,
    };
    paint(style, severity.as_str())
}

fn page(found: &[Placed]) -> String {
    let mut page = String::new();
    for Placed { finding, severity, source, position } in found {
        let Position { line, column } = position;
        let info = finding.code.info();
        let severity = painted(*severity);
        let _ = writeln!(page, "{source}:{line}:{column}: {severity} {}: {}", info.id, finding.message);
    }
    let count = |severity| found.iter().filter(|placed| placed.severity == severity).count();
    let counts = [Severity::Error, Severity::Warning, Severity::Note].map(|severity| match count(severity) {
        1 => format!("1 {severity}"),
        count => format!("{count} {severity}s"),
    });
    let serious = found.iter().any(|placed| placed.severity >= Severity::Warning);
    let summary = paint(if serious { Style::Bad } else { Style::Good }, &counts.join(", "));
    let _ = writeln!(page, "{summary}");
    if !found.is_empty() {
        let _ = writeln!(page, "{}", paint(Style::Dim, "bulkhead lint --explain CODE says more"));
    }
    page
}

fn to_json(found: &[Placed], complete: bool) -> Value {
    let findings: Vec<Value> = found
        .iter()
        .map(|Placed { finding, severity, source, position }| {
            json!({
                "code": finding.code.info().id,
                "name": finding.code.info().name,
                "severity": severity.as_str(),
                "message": finding.message,
                "object": finding.object.to_string(),
                "path": finding.path,
                "file": source,
                "line": position.line,
                "column": position.column,
            })
        })
        .collect();
    json!({ "findings": findings, "complete": complete })
}

fn sarif(found: &[Placed]) -> Value {
    let rules: Vec<SarifRule> = CODES
        .iter()
        .map(|info| SarifRule {
            id: info.id,
            name: info.name,
            short: info.summary,
            full: info.explanation,
            level: info.severity.as_str(),
        })
        .collect();
    let results: Vec<SarifResult<'_>> = found
        .iter()
        .map(|Placed { finding, severity, source, position }| SarifResult {
            rule: finding.code.info().id,
            level: severity.as_str(),
            message: finding.message.clone(),
            file: source,
            line: position.line,
            column: position.column,
        })
        .collect();
    sarif::document(&rules, &results)
}

fn list() -> String {
    let rows: Vec<Vec<String>> = CODES
        .iter()
        .map(|info| vec![info.id.into(), info.name.into(), painted(info.severity), info.summary.into()])
        .collect();
    output::table(&["CODE", "NAME", "SEVERITY", "SAYS"], &rows)
}

fn explained(info: &CodeInfo) -> String {
    let title = paint(Style::Bold, &format!("{} {}", info.id, info.name));
    format!("{title} ({})\n{}\n\n{}\n", painted(info.severity), info.summary, info.explanation)
}

fn info_json(info: &CodeInfo) -> Value {
    json!({
        "code": info.id,
        "name": info.name,
        "severity": info.severity.as_str(),
        "summary": info.summary,
        "explanation": info.explanation,
    })
}

fn list_json() -> Value {
    CODES.iter().map(info_json).collect()
}

/// The table of codes as documentation shows it.
#[cfg(test)]
fn markdown() -> String {
    let mut text = String::from("| code | name | severity | says |\n|---|---|---|---|\n");
    for CodeInfo { id, name, severity, summary, .. } in CODES {
        let _ =
            writeln!(text, "| [{id}](#{}) | `{name}` | {severity} | {summary} |", id.to_ascii_lowercase());
    }
    for CodeInfo { id, name, summary, explanation, .. } in CODES {
        let _ = write!(text, "\n### {id}\n\n`{name}`: {summary}\n\n{explanation}\n");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const BEGIN: &str = "<!-- from the table in crates/engine/src/lint/codes.rs -->\n";

    #[test]
    fn the_documentation_lists_the_codes_that_there_are() {
        let file = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/lint.md");
        let text = std::fs::read_to_string(&file).unwrap_or_default();
        let listed = text.split_once(BEGIN).map_or("", |(_, listed)| listed);
        let wanted = markdown();
        assert!(listed == wanted, "docs/lint.md must go on after {BEGIN} with:\n{wanted}");
    }
}
