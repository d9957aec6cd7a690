//! `convert`: objects of Kubernetes and Calico as Bulkhead's own.

use std::fmt::Write as _;

use bulkhead_model::convert::Kept;
use serde_json::{Value, json};

use crate::cli::{Common, ConvertArgs, Format};
use crate::failure::Failure;
use crate::{manifests, output, yaml};

pub(crate) fn convert(common: &Common, args: &ConvertArgs) -> Result<(), Failure> {
    let mut items: Vec<Value> = Vec::new();
    let mut notes = String::new();
    for resource in manifests::read(&args.filename)? {
        match resource.to_native() {
            Ok(native) => items.extend(native.iter().map(|native| manifest(native.to_json()))),
            Err(why) => {
                if why != Kept::Own {
                    let _ = writeln!(notes, "{} stays as it is: {why}", resource.key());
                }
                items.push(manifest(resource.to_json()));
            }
        }
    }
    // Apart from the manifests, so that these can be piped on.
    output::note(&notes);
    match common.output {
        Format::Json => output::line(
            &serde_json::to_string_pretty(&json!({ "apiVersion": "v1", "kind": "List", "items": items }))
                .unwrap_or_default(),
        ),
        // Manifests are no table.
        Format::Table | Format::Yaml => output::print(&yaml::documents(&items)),
    }
}

/// What a person would write: without what a repository had set.
fn manifest(mut value: Value) -> Value {
    if let Some(metadata) = value.get_mut("metadata").and_then(Value::as_object_mut) {
        for name in ["resourceVersion", "uid", "generation", "creationTimestamp"] {
            metadata.remove(name);
        }
    }
    value
}
