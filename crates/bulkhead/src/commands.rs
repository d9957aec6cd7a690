//! One module per command that an operator types.

use std::path::PathBuf;

use bulkhead_model::Kind;
use serde_json::{Value, json};

use crate::client::{API, encode};
use crate::failure::Failure;

pub(crate) mod apply;
pub(crate) mod decide;
pub(crate) mod describe;
pub(crate) mod docs;
pub(crate) mod explain;
pub(crate) mod flows;
pub(crate) mod get;
pub(crate) mod status;
pub(crate) mod workload;

/// Largest directory that is read, in files.
const FILES_MAX: usize = 10_000;

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
        let known = Kind::ALL.map(Kind::plural);
        let near = bulkhead_model::suggest::nearest(kind_text, known);
        let hint = near.map(|near| format!("; did you mean {near}?")).unwrap_or_default();
        Failure::Usage(format!("there is no kind {kind_text:?}, there are {}{hint}", known.join(", ")))
    })?;
    Ok((kind, name))
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

/// The texts of files, of all manifests in directories, and of standard input, as the API takes them.
fn sources(names: &[PathBuf]) -> Result<Value, Failure> {
    let mut sources = Vec::new();
    for name in names {
        if name.as_os_str() == "-" {
            let text = std::io::read_to_string(std::io::stdin());
            let text =
                text.map_err(|error| Failure::Other(format!("cannot read standard input: {error}")))?;
            sources.push(json!({ "name": "standard input", "text": text }));
            continue;
        }
        for file in files(name)? {
            let text = std::fs::read_to_string(&file)
                .map_err(|error| Failure::no(format!("cannot read {}: {error}", file.display())))?;
            sources.push(json!({ "name": file.display().to_string(), "text": text }));
        }
    }
    Ok(json!({ "sources": sources }))
}

fn files(path: &PathBuf) -> Result<Vec<PathBuf>, Failure> {
    let fail = |error: std::io::Error| Failure::no(format!("cannot read {}: {error}", path.display()));
    if !std::fs::metadata(path).map_err(fail)?.is_dir() {
        return Ok(vec![path.clone()]);
    }
    let mut files = Vec::new();
    for entry in std::fs::read_dir(path).map_err(fail)?.take(FILES_MAX) {
        let file = entry.map_err(fail)?.path();
        let extension = file.extension().and_then(|extension| extension.to_str());
        if matches!(extension, Some("yaml" | "yml" | "json")) {
            files.push(file);
        }
    }
    if files.is_empty() {
        return Err(Failure::no(format!("{} holds no .yaml, .yml or .json file", path.display())));
    }
    files.sort();
    Ok(files)
}
