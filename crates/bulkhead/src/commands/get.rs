//! `get`: objects as a table, or whole.

use hyper::Method;
use serde_json::Value;

use super::{kind_and_name, list_path, object_path, query};
use crate::cli::{Common, Format, GetArgs};
use crate::client::{call, lines};
use crate::failure::Failure;
use crate::output::{self, table, text};
use crate::yaml;
use bulkhead_model::Kind;
use bulkhead_model::columns::{cells, headings};
use bulkhead_model::kind::Scope;

pub(crate) async fn get(common: &Common, args: &GetArgs) -> Result<(), Failure> {
    let (kind, name) = kind_and_name(&args.kind, args.name.as_deref())?;
    let path = match (&args.namespace, &name) {
        (Some(_), _) if kind.scope() == Scope::Fleet => {
            return Err(Failure::Usage(format!("{} are in no namespace", kind.plural())));
        }
        (Some(namespace), Some(name)) => object_path(kind, Some(&format!("{namespace}/{name}"))),
        (_, Some(name)) => object_path(kind, Some(name)),
        (namespace, None) => list_path(kind, namespace.as_deref()),
    };
    let selector = query(&[("labelSelector", args.selector.as_deref())]);
    let target = common.controller();
    let mut answer =
        output::with_progress("listing", call(target, Method::GET, &format!("{path}{selector}"), None))
            .await?;
    without_owners(&mut answer);
    if args.watch {
        return watch(common, kind, args, &answer).await;
    }
    let items = items(&answer);
    match common.output {
        Format::Yaml if name.is_none() => output::print(&yaml::documents(items.iter().copied())),
        format => output::show(format, &answer, || {
            if items.is_empty() {
                return Ok(format!("no {}\n", kind.plural()));
            }
            let rows: Vec<_> = items.iter().map(|item| row(kind, item)).collect();
            Ok(table(headings(kind), &rows))
        }),
    }
}

async fn watch(common: &Common, kind: Kind, args: &GetArgs, first: &Value) -> Result<(), Failure> {
    let rows: Vec<_> = items(first)
        .into_iter()
        .map(|item| {
            let mut row = row(kind, item);
            row.insert(0, String::new());
            row
        })
        .collect();
    let mut columns = vec!["EVENT"];
    columns.extend(headings(kind));
    if common.output == Format::Table {
        output::print(&table(&columns, &rows))?;
    }
    let revision = text(first, "/metadata/resourceVersion");
    let parameters = query(&[
        ("watch", Some("true")),
        // Something comes now and then, also if nothing changes.
        ("allowWatchBookmarks", Some("true")),
        ("resourceVersion", Some(&revision)),
        ("labelSelector", args.selector.as_deref()),
    ]);
    let path = format!("{}{parameters}", list_path(kind, args.namespace.as_deref()));
    lines(common.controller(), &path, |mut event| match common.output {
        Format::Json | Format::Yaml => {
            without_owners(&mut event["object"]);
            if common.output == Format::Json {
                return output::line(&event.to_string());
            }
            output::print(&format!("---\n{}", yaml::document(&event)))
        }
        Format::Table => {
            let kind_of_event = text(&event, "/type");
            if kind_of_event == "ERROR" {
                return Err(Failure::Other(text(&event, "/object/message")));
            }
            if kind_of_event == "BOOKMARK" {
                return Ok(());
            }
            let mut row = row(kind, &event["object"]);
            row.insert(0, kind_of_event);
            output::line(&row.join("   "))
        }
    })
    .await
}

/// Leaves out which program set which field: nobody reads that here.
pub(super) fn without_owners(answer: &mut Value) {
    let remove = |object: &mut Value| {
        if let Some(metadata) = object["metadata"].as_object_mut() {
            metadata.remove("managedFields");
        }
    };
    match answer.get_mut("items").and_then(Value::as_array_mut) {
        Some(items) => items.iter_mut().for_each(remove),
        None => remove(answer),
    }
}

fn items(answer: &Value) -> Vec<&Value> {
    match answer.get("items").and_then(Value::as_array) {
        Some(items) => items.iter().collect(),
        None => vec![answer],
    }
}

fn row(kind: Kind, item: &Value) -> Vec<String> {
    let namespace = text(item, "/metadata/namespace");
    let slash = if namespace.is_empty() { "" } else { "/" };
    let mut row = vec![format!("{namespace}{slash}{}", text(item, "/metadata/name"))];
    row.extend(cells(kind, item));
    row
}
