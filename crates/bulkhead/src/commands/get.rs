//! `get`: objects as a table, or whole.

use hyper::Method;
use serde_json::Value;

use super::{kind_and_name, object_path, query};
use crate::cli::{Common, Format, GetArgs};
use crate::client::{call, lines};
use crate::failure::Failure;
use crate::output::{self, labels, table, text};
use crate::yaml;
use bulkhead_model::Kind;

pub(crate) async fn get(common: &Common, args: &GetArgs) -> Result<(), Failure> {
    let (kind, name) = kind_and_name(&args.kind, args.name.as_deref())?;
    let path = object_path(kind, name.as_deref());
    let selector = query(&[("labelSelector", args.selector.as_deref())]);
    let target = common.controller();
    let answer =
        output::with_progress("listing", call(target, Method::GET, &format!("{path}{selector}"), None))
            .await?;
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
        ("resourceVersion", Some(&revision)),
        ("labelSelector", args.selector.as_deref()),
    ]);
    let path = format!("{}{parameters}", object_path(kind, None));
    lines(common.controller(), &path, |event| match common.output {
        Format::Json => output::line(&event.to_string()),
        Format::Yaml => output::print(&format!("---\n{}", yaml::document(&event))),
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

fn items(answer: &Value) -> Vec<&Value> {
    match answer.get("items").and_then(Value::as_array) {
        Some(items) => items.iter().collect(),
        None => vec![answer],
    }
}

fn headings(kind: Kind) -> &'static [&'static str] {
    match kind {
        Kind::Tier => &["NAME", "ORDER", "DEFAULT ACTION"],
        Kind::Policy => &["NAME", "TIER", "ORDER", "MODE", "INGRESS", "EGRESS", "APPLIES TO"],
        Kind::NetworkSet => &["NAME", "BLOCKS", "LABELS"],
        Kind::Workload => &["NAME", "HOST", "ADDRESSES", "SOURCE", "LABELS"],
        Kind::Host => &["NAME", "AGENT", "LABELS"],
        Kind::HostEndpoint => &["NAME", "HOST", "INTERFACE", "ADDRESSES", "LABELS"],
        Kind::Namespace => &["NAME", "DEFAULT POSTURE", "LABELS"],
        Kind::Settings => &["NAME", "DEFAULT POSTURE"],
        Kind::NameTable => &["NAME", "NAMES", "LABELS"],
        Kind::RoleBinding => &["NAME", "ROLE", "USERS", "GROUPS", "TIERS", "NAMESPACES"],
        // Of another system: what all have.
        _ => &["NAME", "CREATED", "LABELS"],
    }
}

fn row(kind: Kind, item: &Value) -> Vec<String> {
    let namespace = text(item, "/metadata/namespace");
    let slash = if namespace.is_empty() { "" } else { "/" };
    let name = format!("{namespace}{slash}{}", text(item, "/metadata/name"));
    let own_labels = labels(&item["metadata"]["labels"]);
    let list = |pointer: &str| -> String {
        let items = item.pointer(pointer).and_then(Value::as_array).into_iter().flatten();
        items.filter_map(Value::as_str).collect::<Vec<_>>().join(",")
    };
    let rules = |pointer: &str| match item.pointer(pointer).and_then(Value::as_array) {
        Some(rules) => format!("{} rules", rules.len()),
        None => "-".into(),
    };
    let or = |value: String, default: &str| if value.is_empty() { default.to_owned() } else { value };
    match kind {
        Kind::Tier => {
            vec![name, or(text(item, "/spec/order"), "last"), text(item, "/spec/defaultAction")]
        }
        Kind::Policy => vec![
            name,
            text(item, "/spec/tier"),
            or(text(item, "/spec/order"), "last"),
            or(text(item, "/spec/mode"), "Enforce"),
            rules("/spec/ingress"),
            rules("/spec/egress"),
            text(item, "/spec/appliesTo"),
        ],
        Kind::NetworkSet => vec![name, list("/spec/cidrs"), own_labels],
        Kind::Workload => vec![
            name,
            text(item, "/spec/host"),
            list("/spec/addresses"),
            text(item, "/spec/source"),
            own_labels,
        ],
        Kind::Host => vec![name, text(item, "/spec/agentVersion"), own_labels],
        Kind::HostEndpoint => vec![
            name,
            text(item, "/spec/host"),
            text(item, "/spec/interface"),
            list("/spec/addresses"),
            own_labels,
        ],
        Kind::Namespace => vec![name, or(text(item, "/spec/defaultPosture"), "-"), own_labels],
        Kind::Settings => vec![name, text(item, "/spec/defaultPosture")],
        Kind::RoleBinding => vec![
            name,
            text(item, "/spec/role"),
            or(list("/spec/users"), "-"),
            or(list("/spec/groups"), "-"),
            or(list("/spec/tiers"), "all"),
            or(list("/spec/namespaces"), "all"),
        ],
        Kind::NameTable => {
            let names = item.pointer("/spec/names").and_then(Value::as_object);
            vec![name, names.map_or(0, serde_json::Map::len).to_string(), own_labels]
        }
        _ => vec![name, text(item, "/metadata/creationTimestamp"), own_labels],
    }
}
