//! `history`, `diff --revision`, `rollback` and `audit`: what was changed, by whom, and back.

use hyper::Method;
use serde_json::{Value, json};

use super::{apply, kind_and_name, query};
use crate::cli::{AuditCommand, Common, HistoryArgs, RollbackArgs};
use crate::client::{API, call};
use crate::failure::Failure;
use crate::output::{self, Style, paint, text};

/// Objects that a line names before it counts the others.
const NAMED_MAX: usize = 3;

pub(crate) async fn history(common: &Common, args: &HistoryArgs) -> Result<(), Failure> {
    let object = match args.object.as_deref().map(|text| kind_and_name(text, None)).transpose()? {
        Some((kind, Some(name))) => Some(format!("{kind}/{name}")),
        Some((kind, None)) => {
            return Err(Failure::Usage(format!("which of the {}? Give KIND/NAME", kind.plural())));
        }
        None => None,
    };
    let limit = args.limit.to_string();
    let parameters = query(&[("limit", Some(limit.as_str())), ("object", object.as_deref())]);
    let list = call(common.controller(), Method::GET, &format!("{API}/history{parameters}"), None).await?;
    output::show(common.output, &list, || {
        let rows = list["items"].as_array().into_iter().flatten().map(row);
        Ok(output::table(&["REVISION", "WHEN", "WHO", "FROM", "VERB", "WHAT"], &rows.collect::<Vec<_>>()))
    })
}

fn row(item: &Value) -> Vec<String> {
    let objects = item["objects"].as_array().map(Vec::as_slice).unwrap_or_default();
    let named = objects
        .iter()
        .take(NAMED_MAX)
        .map(|one| format!("{} {}", text(one, "/object"), text(one, "/outcome")));
    let mut what = named.collect::<Vec<_>>().join(", ");
    if objects.len() > NAMED_MAX {
        what.push_str(&format!(" and {} more", objects.len() - NAMED_MAX));
    }
    if item["forced"] == true {
        what.push_str(&format!(" ({})", paint(Style::Bad, "forced")));
    }
    let part = |pointer| text(item, pointer);
    vec![part("/revision"), part("/at"), part("/by"), part("/from"), part("/verb"), what]
}

/// Ends with code 1 if there are differences, as diff(1) does.
pub(super) async fn diff(common: &Common, from: u64, to: Option<u64>) -> Result<(), Failure> {
    let (from, to) = (from.to_string(), to.map(|to| to.to_string()));
    let parameters = query(&[("from", Some(from.as_str())), ("to", to.as_deref())]);
    let answer =
        call(common.controller(), Method::GET, &format!("{API}/history/diff{parameters}"), None).await?;
    let items = answer["items"].as_array().map(Vec::as_slice).unwrap_or_default();
    output::show(common.output, &answer, || Ok(items.iter().map(apply::difference).collect()))?;
    if items.is_empty() { Ok(()) } else { Err(Failure::No(None)) }
}

pub(crate) async fn roll_back(common: &Common, args: &RollbackArgs) -> Result<(), Failure> {
    let RollbackArgs { to, dry_run, change } = args;
    let to = to.to_string();
    let parameters = query(&[
        ("to", Some(to.as_str())),
        ("dryRun", dry_run.then_some("true")),
        ("force", change.force.then_some("true")),
        ("confirmWithin", change.confirm_within.as_deref()),
    ]);
    let path = format!("{API}/history/rollback{parameters}");
    let answer = call(common.controller(), Method::POST, &path, None).await?;
    apply::show(common.output, &answer)
}

pub(crate) fn audit(common: &Common, command: &AuditCommand) -> Result<(), Failure> {
    let AuditCommand::Verify { directory } = command;
    let lines =
        bulkhead_controller::verify_audit(directory).map_err(|error| Failure::no(error.to_string()))?;
    output::show(common.output, &json!({ "lines": lines }), || Ok(format!("{lines} lines, none altered\n")))
}
