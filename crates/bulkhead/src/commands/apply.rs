//! `apply`, `delete` and `diff`: whole files, all or nothing.

use std::fmt::Write as _;

use hyper::Method;
use serde_json::Value;
use similar::{ChangeTag, TextDiff};

use super::{kind_and_name, object_path, query, sources};
use crate::cli::{Common, DeleteArgs, FileArgs, Format};
use crate::client::{API, call};
use crate::failure::Failure;
use crate::output::{self, Style, paint, text};
use crate::yaml;

pub(crate) async fn apply(common: &Common, args: &FileArgs) -> Result<(), Failure> {
    let answer = post(common, "apply", args, args.dry_run).await?;
    show(common.output, &answer)
}

pub(crate) async fn delete(common: &Common, args: &DeleteArgs) -> Result<(), Failure> {
    if !args.filename.is_empty() {
        let files = FileArgs { filename: args.filename.clone(), dry_run: args.dry_run };
        let answer = post(common, "delete", &files, args.dry_run).await?;
        return show(common.output, &answer);
    }
    let (kind, name) = kind_and_name(args.kind.as_deref().unwrap_or_default(), args.name.as_deref())?;
    let Some(name) = name else {
        return Err(Failure::Usage(format!("which of the {}? Give a name", kind.plural())));
    };
    let path = object_path(kind, Some(&name));
    // There is no dry run for a single object but to see whether it is there.
    let method = if args.dry_run { Method::GET } else { Method::DELETE };
    let answer = call(common.controller(), method, &path, None).await?;
    output::show(common.output, &answer, || {
        let note = if args.dry_run { " (dry run)" } else { "" };
        Ok(format!("{kind}/{name} deleted{note}\n"))
    })
}

/// Ends with code 1 if there are differences, as diff(1) does.
pub(crate) async fn diff(common: &Common, args: &FileArgs) -> Result<(), Failure> {
    let answer = post(common, "apply", args, true).await?;
    let items = answer["items"].as_array().cloned().unwrap_or_default();
    let changed: Vec<_> = items.iter().filter(|item| item["outcome"] != "unchanged").collect();
    output::show(common.output, &answer, || Ok(changed.iter().map(|item| difference(item)).collect()))?;
    if changed.is_empty() { Ok(()) } else { Err(Failure::No(None)) }
}

async fn post(common: &Common, verb: &str, args: &FileArgs, dry_run: bool) -> Result<Value, Failure> {
    let body = sources(&args.filename)?.to_string();
    let dry_run = dry_run.then_some("true");
    let path = format!("{API}/{verb}{}", query(&[("dryRun", dry_run)]));
    let work = call(common.controller(), Method::POST, &path, Some(body));
    output::with_progress(&format!("waiting for {verb}"), work).await
}

fn show(format: Format, answer: &Value) -> Result<(), Failure> {
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
        Ok(lines)
    })
}

fn name_of(item: &Value) -> String {
    let namespace = text(item, "/namespace");
    let slash = if namespace.is_empty() { "" } else { "/" };
    format!("{}/{namespace}{slash}{}", text(item, "/kind"), text(item, "/name"))
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

fn difference(item: &Value) -> String {
    let name = name_of(item);
    let (before, after) = (manifest(&item["before"]), manifest(&item["after"]));
    let diff = TextDiff::from_lines(&before, &after);
    let mut text =
        format!("{}\n", paint(Style::Bold, &format!("{name}: {}", item["outcome"].as_str().unwrap_or("?"))));
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
