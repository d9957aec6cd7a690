//! One module per command that an operator types.

use std::path::PathBuf;

use bulkhead_model::Kind;
use serde_json::{Value, json};

use crate::client::{API, encode};
use crate::failure::Failure;
use crate::manifests;

pub(crate) mod apply;
pub(crate) mod confirm;
pub(crate) mod convert;
pub(crate) mod dataplane;
pub(crate) mod decide;
pub(crate) mod describe;
pub(crate) mod docs;
pub(crate) mod explain;
pub(crate) mod flows;
pub(crate) mod get;
pub(crate) mod history;
pub(crate) mod identities;
pub(crate) mod kubeconfig;
pub(crate) mod lint;
pub(crate) mod sim;
pub(crate) mod status;
pub(crate) mod store;
pub(crate) mod test;
pub(crate) mod trace;
pub(crate) mod workload;

/// `KIND NAME`, `KIND/NAME` or just `KIND`.
fn kind_and_name(kind: &str, name: Option<&str>) -> Result<(Kind, Option<String>), Failure> {
    let (kind_text, name) = match (kind.split_once('/'), name) {
        (Some((kind, first)), None) => (kind, Some(first.to_owned())),
        (Some(_), Some(_)) => {
            return Err(Failure::Usage(format!(
                "{kind:?} already names an object: give KIND/NAME or KIND NAME"
            )));
        }
        (None, name) => (kind, name.map(ToOwned::to_owned)),
    };
    let kind = Kind::parse(kind_text).ok_or_else(|| {
        let known: Vec<_> = Kind::ALL.iter().map(|kind| kind.plural()).collect();
        let near = bulkhead_model::suggest::nearest(kind_text, known.iter().copied());
        let hint = near.map(|near| format!("; did you mean {near}?")).unwrap_or_default();
        Failure::Usage(format!("there is no kind {kind_text:?}, there are {}{hint}", known.join(", ")))
    })?;
    Ok((kind, name))
}

/// Path of all objects of a kind, or of those in a namespace.
fn list_path(kind: Kind, namespace: Option<&str>) -> String {
    match namespace {
        Some(namespace) => format!("{API}/namespaces/{}/{}", encode(namespace), kind.plural()),
        None => object_path(kind, None),
    }
}

/// Path of a kind or an object; `namespace/name` names an object in a namespace.
fn object_path(kind: Kind, name: Option<&str>) -> String {
    let plural = kind.plural();
    match name.map(|name| name.split_once('/').map_or((None, name), |(ns, name)| (Some(ns), name))) {
        None => format!("{API}/{plural}"),
        Some((None, name)) => format!("{API}/{plural}/{}", encode(name)),
        Some((Some(ns), name)) => format!("{API}/namespaces/{}/{plural}/{}", encode(ns), encode(name)),
    }
}

/// Query parameters that are given, encoded.
fn query(parameters: &[(&str, Option<&str>)]) -> String {
    let given = parameters.iter().filter_map(|(name, value)| value.map(|value| (name, value)));
    let pairs: Vec<_> = given.map(|(name, value)| format!("{name}={}", encode(value))).collect();
    if pairs.is_empty() { String::new() } else { format!("?{}", pairs.join("&")) }
}

/// Texts of files as the API takes them.
fn sources(names: &[PathBuf]) -> Result<Value, Failure> {
    let sources = manifests::sources(names)?;
    let sources: Vec<_> =
        sources.iter().map(|source| json!({ "name": source.name, "text": source.text })).collect();
    Ok(json!({ "sources": sources }))
}
