//! `apply`, `delete` and `diff`: whole files, all or nothing.

use std::fmt::Write as _;

use hyper::Method;
use serde_json::{Value, json};
use similar::{ChangeTag, TextDiff};

use super::{kind_and_name, object_path, query, sources};
use crate::cli::{ApplyArgs, ChangeArgs, Common, DeleteArgs, DiffArgs, Format};
use crate::client::{API, call};
use crate::failure::Failure;
use crate::output::{self, Style, paint, text};
use crate::yaml;

pub(crate) async fn apply(common: &Common, args: &ApplyArgs) -> Result<(), Failure> {
    let ApplyArgs { files, change } = args;
    let answer = post(common, "apply", sources(&files.filename)?, files.dry_run, change).await?;
    show(common.output, &answer)
}

pub(crate) async fn delete(common: &Common, args: &DeleteArgs) -> Result<(), Failure> {
    let DeleteArgs { filename, dry_run, change, .. } = args;
    if !filename.is_empty() {
        let answer = post(common, "delete", sources(filename)?, *dry_run, change).await?;
        return show(common.output, &answer);
    }
    let (kind, name) = kind_and_name(args.kind.as_deref().unwrap_or_default(), args.name.as_deref())?;
    let Some(name) = name else {
        return Err(Failure::Usage(format!("which of the {}? Give a name", kind.plural())));
    };
    // As a file that holds it: that answer has room for warnings and deadlines.
    let object = call(common.controller(), Method::GET, &object_path(kind, Some(&name)), None).await?;
    let source = json!({ "name": name, "text": object.to_string() });
    let answer = post(common, "delete", json!({ "sources": [source] }), *dry_run, change).await?;
    show(common.output, &answer)
}

/// Ends with code 1 if there are differences, as diff(1) does.
pub(crate) async fn diff(common: &Common, args: &DiffArgs) -> Result<(), Failure> {
    if let Some((from, to)) = args.revision {
        return super::history::diff(common, from, to).await;
    }
    let change = ChangeArgs { force: false, confirm_within: None };
    let answer = post(common, "apply", sources(&args.filename)?, true, &change).await?;
    let items = answer["items"].as_array().cloned().unwrap_or_default();
    let changed: Vec<_> = items.iter().filter(|item| item["outcome"] != "unchanged").collect();
    output::show(common.output, &answer, || Ok(changed.iter().map(|item| difference(item)).collect()))?;
    warn(&answer);
    if changed.is_empty() { Ok(()) } else { Err(Failure::No(None)) }
}

async fn post(
    common: &Common,
    verb: &str,
    sources: Value,
    dry_run: bool,
    change: &ChangeArgs,
) -> Result<Value, Failure> {
    let parameters = query(&[
        ("dryRun", dry_run.then_some("true")),
        ("force", change.force.then_some("true")),
        ("confirmWithin", change.confirm_within.as_deref()),
    ]);
    let path = format!("{API}/{verb}{parameters}");
    let work = call(common.controller(), Method::POST, &path, Some(sources.to_string()));
    output::with_progress(&format!("waiting for {verb}"), work).await
}

/// Whom the change cuts off, on standard error: what programs read is not disturbed.
fn warn(answer: &Value) {
    let dry_run = answer["dryRun"].as_bool().unwrap_or_default();
    let note = if dry_run { " (without --force it will be refused)" } else { "" };
    let warnings: Vec<_> = answer["warnings"].as_array().into_iter().flatten().collect();
    for warning in &warnings {
        eprintln!("{} {}{note}", paint(Style::Bad, "warning:"), warning.as_str().unwrap_or_default());
    }
    let more = answer["cutOff"].as_u64().unwrap_or_default().saturating_sub(warnings.len() as u64);
    if more > 0 {
        eprintln!("{} and {more} more", paint(Style::Bad, "warning:"));
    }
}

pub(super) fn show(format: Format, answer: &Value) -> Result<(), Failure> {
    warn(answer);
    output::show(format, answer, || {
        let dry_run = answer["dryRun"].as_bool().unwrap_or_default();
        let mut lines = String::new();
        for item in answer["items"].as_array().into_iter().flatten() {
            let outcome = text(item, "/outcome");
            let style = match outcome.as_str() {
                "unchanged" => Style::Dim,
                "deleted" => Style::Bad,
                _ => Style::Good,
            };
            let note = if dry_run { " (dry run)" } else { "" };
            let _ = writeln!(lines, "{} {}{note}", name_of(item), paint(style, &outcome));
        }
        if lines.is_empty() {
            lines.push_str("nothing in these files\n");
        }
        if let Some(id) = answer.pointer("/confirmation/id").and_then(Value::as_str) {
            let deadline = text(answer, "/confirmation/deadline");
            let _ = writeln!(lines, "rolled back at {deadline} unless you say: bulkhead confirm {id}");
        }
        Ok(lines)
    })
}

fn name_of(item: &Value) -> String {
    let namespace = text(item, "/namespace");
    let slash = if namespace.is_empty() { "" } else { "/" };
    format!("{}/{namespace}{slash}{}", text(item, "/kind"), text(item, "/name"))
}

/// What became of an object; between revisions the answer leaves it to the two states.
fn outcome(item: &Value) -> &str {
    match (item["outcome"].as_str(), item["before"].is_null(), item["after"].is_null()) {
        (Some(outcome), ..) => outcome,
        (None, true, _) => "created",
        (None, false, true) => "deleted",
        (None, false, false) => "configured",
    }
}

/// What the repository sets itself is no difference.
fn manifest(value: &Value) -> String {
    let mut value = value.clone();
    if let Some(metadata) = value.get_mut("metadata").and_then(Value::as_object_mut) {
        for name in ["resourceVersion", "uid", "generation", "creationTimestamp"] {
            metadata.remove(name);
        }
    }
    if value.is_null() { String::new() } else { yaml::document(&value) }
}

pub(super) fn difference(item: &Value) -> String {
    let name = name_of(item);
    let (before, after) = (manifest(&item["before"]), manifest(&item["after"]));
    let diff = TextDiff::from_lines(&before, &after);
    let mut text = format!("{}\n", paint(Style::Bold, &format!("{name}: {}", outcome(item))));
    for change in diff.iter_all_changes() {
        let line = change.value().trim_end_matches('\n');
        let _ = match change.tag() {
            ChangeTag::Delete => writeln!(text, "{}", paint(Style::Bad, &format!("- {line}"))),
            ChangeTag::Insert => writeln!(text, "{}", paint(Style::Good, &format!("+ {line}"))),
            ChangeTag::Equal => writeln!(text, "  {line}"),
        };
    }
    text
}
