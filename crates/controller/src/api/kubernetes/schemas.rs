//! OpenAPI as Kubernetes has it: version 3 by group and version, version 2 in one. Made from `openapi.json`, so that a field is
//! described once. Objects of other systems are open: what they may say stands in their own documentation.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use axum::Json;
use axum::body::Bytes;
use axum::extract::Path;
use axum::http::{HeaderMap, header};
use axum::response::{IntoResponse, Response};
use bulkhead_model::Kind;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use super::discovery::{is_namespaced, joined, versions};
use super::place::is_builtin;
use super::protobuf;
use crate::api::OPENAPI;
use crate::api::problem::Refusal;

/// Media type of version 2 as protocol buffers.
const PROTOBUF: &str = "application/com.github.proto-openapi.spec.v2.v1.0+protobuf";
/// What names of schemas begin with.
const PREFIX: &str = "dev.bulkhead.v1.";
/// Which objects a schema or an operation is about.
const GVK: &str = "x-kubernetes-group-version-kind";
/// Where version 3 and version 2 keep schemas.
const REFERENCES: (&str, &str) = ("#/components/schemas/", "#/definitions/");

/// Documents of version 3, by path below `/openapi/v3/`, each with its digest.
static V3: LazyLock<BTreeMap<String, (Bytes, String)>> = LazyLock::new(|| {
    let served = versions().map(|(group, version)| joined(group, version));
    let served = served.filter(|version| Kind::of_api_version(version).next().is_some());
    served
        .map(|version| {
            let text = v3_of(&version).to_string();
            let digest = Sha256::digest(text.as_bytes());
            let digest: String = digest.iter().take(16).map(|byte| format!("{byte:02X}")).collect();
            (path_of(&version), (text.into(), digest))
        })
        .collect()
});
static V2: LazyLock<Value> = LazyLock::new(v2_document);
static V2_PROTOBUF: LazyLock<Bytes> = LazyLock::new(|| protobuf::document(&V2).into());

/// `GET /openapi/v3`.
pub(crate) async fn v3() -> Json<Value> {
    let paths = V3.iter().map(|(path, (_, digest))| {
        (path.clone(), json!({ "serverRelativeURL": format!("/openapi/v3/{path}?hash={digest}") }))
    });
    Json(json!({ "paths": paths.collect::<Map<_, _>>() }))
}

/// `GET /openapi/v3/api/v1`.
pub(crate) async fn v3_core() -> Result<Response, Refusal> {
    v3_at("api/v1")
}

/// `GET /openapi/v3/apis/{group}/{version}`.
pub(crate) async fn v3_group(Path((group, version)): Path<(String, String)>) -> Result<Response, Refusal> {
    v3_at(&format!("apis/{group}/{version}"))
}

fn v3_at(path: &str) -> Result<Response, Refusal> {
    let found = V3.get(path).ok_or_else(|| Refusal::not_found(format!("there is no schema at {path:?}")))?;
    Ok(([(header::CONTENT_TYPE, "application/json")], found.0.clone()).into_response())
}

/// `GET /openapi/v2`.
pub(crate) async fn v2(headers: HeaderMap) -> Response {
    let accept = headers.get(header::ACCEPT).and_then(|value| value.to_str().ok()).unwrap_or_default();
    if accept.contains("openapi.spec.v2") {
        return ([(header::CONTENT_TYPE, PROTOBUF)], V2_PROTOBUF.clone()).into_response();
    }
    Json(&*V2).into_response()
}

/// Path below which the objects of an `apiVersion` are.
fn path_of(version: &str) -> String {
    if version.contains('/') { format!("apis/{version}") } else { format!("api/{version}") }
}

fn gvk(version: &str, kind: Kind) -> Value {
    let (group, version) = version.split_once('/').unwrap_or(("", version));
    json!({ "group": group, "version": version, "kind": kind.manifest_kind() })
}

/// Names of schemas must tell groups apart.
fn schema_name(version: &str, kind: Kind) -> String {
    if kind.is_own() {
        return format!("{PREFIX}{kind}");
    }
    let group = version.split_once('/').map_or("io.k8s.api.core", |(group, _)| group);
    let version = version.rsplit('/').next().unwrap_or_default();
    format!("{group}.{version}.{}", kind.manifest_kind())
}

fn v3_of(version: &str) -> Value {
    json!({
        "openapi": "3.0.0",
        "info": { "title": "Bulkhead", "version": env!("CARGO_PKG_VERSION") },
        "paths": paths(version, |parameter| json!({
            "name": parameter, "in": "query", "schema": { "type": "string", "uniqueItems": true },
        })),
        "components": { "schemas": schemas(version, true) },
    })
}

fn v2_document() -> Value {
    let mut all = (Map::new(), Map::new());
    for (group, version) in versions() {
        let version = joined(group, version);
        all.0.append(&mut paths(
            &version,
            |parameter| json!({ "name": parameter, "in": "query", "type": "string", "uniqueItems": true }),
        ));
        all.1.append(&mut schemas(&version, false));
    }
    json!({
        "swagger": "2.0",
        "info": { "title": "Bulkhead", "version": env!("CARGO_PKG_VERSION") },
        "paths": all.0,
        "definitions": all.1,
    })
}

/// Paths of an `apiVersion`, as far as clients look for what they may ask there.
fn paths(version: &str, parameter: impl Fn(&str) -> Value) -> Map<String, Value> {
    let mut paths = Map::new();
    for kind in Kind::of_api_version(version) {
        let below = if is_namespaced(kind) { "namespaces/{namespace}/" } else { "" };
        let list = format!("/{}/{below}{}", path_of(version), kind.resource());
        let operation = |action: &str, parameters: &[&str]| {
            json!({
                "description": format!("{action} {}", kind.manifest_kind()),
                "parameters": parameters.iter().map(|name| parameter(name)).collect::<Vec<_>>(),
                "responses": { "200": { "description": "OK" } },
                "x-kubernetes-action": action,
                GVK: gvk(version, kind),
            })
        };
        let written = ["dryRun", "fieldManager", "fieldValidation"];
        let applied = ["dryRun", "fieldManager", "fieldValidation", "force"];
        let named = json!({
            "get": operation("get", &[]),
            "put": operation("put", &written),
            "patch": operation("patch", &applied),
            "delete": operation("delete", &["dryRun"]),
        });
        let listed = json!({ "get": operation("list", &[]), "post": operation("post", &written) });
        paths.insert(format!("{list}/{{name}}"), named);
        paths.insert(list, listed);
    }
    paths
}

/// Schemas of the kinds of an `apiVersion`, with what they refer to.
fn schemas(version: &str, third: bool) -> Map<String, Value> {
    let document: Value = serde_json::from_str(OPENAPI).unwrap_or_default();
    let described = &document["components"]["schemas"];
    let mut schemas = Map::new();
    for kind in Kind::of_api_version(version) {
        let mut schema = if kind.is_own() { described[kind.as_str()].clone() } else { open(version, kind) };
        // Older clients would compute their patches by this, and it says less than they know of these kinds.
        if third || !is_builtin(kind) {
            schema[GVK] = json!([gvk(version, kind)]);
        }
        add(&mut schemas, schema_name(version, kind), &schema, described, third);
    }
    schemas
}

/// Takes a schema in, and all that it refers to.
fn add(into: &mut Map<String, Value>, name: String, schema: &Value, described: &Value, third: bool) {
    if into.contains_key(&name) {
        return;
    }
    let mut referred = Vec::new();
    let plain = simplified(schema, third, &mut referred);
    into.insert(name, plain);
    for other in referred {
        add(into, format!("{PREFIX}{other}"), &described[&other], described, third);
    }
}

/// An object of another system.
fn open(version: &str, kind: Kind) -> Value {
    let text = |description: &str| json!({ "type": "string", "description": description });
    let open = |description: &str| {
        json!({
            "type": "object", "description": description, "x-kubernetes-preserve-unknown-fields": true,
        })
    };
    json!({
        "type": "object",
        "description": format!(
            "{} of {version}: kept as it was written, and enforced as docs/kubernetes.md says.", kind.manifest_kind()
        ),
        "properties": {
            "apiVersion": text("The group and version that it is written in."),
            "kind": text("What it is."),
            "metadata": open("Name, namespace, labels and annotations."),
            "spec": open("As the system defines it that it comes from."),
            "status": open("As the system defines it that it comes from."),
        },
    })
}

/// A schema without what the older languages do not know. Where there are several forms, version 3, which is only shown to
/// people, has the longest; version 2, by which clients check, leaves it open.
fn simplified(schema: &Value, third: bool, referred: &mut Vec<String>) -> Value {
    let Some(fields) = schema.as_object() else { return schema.clone() };
    if let Some(name) = schema["$ref"].as_str().and_then(|text| text.strip_prefix(REFERENCES.0)) {
        referred.push(name.to_owned());
        let reference = if third { REFERENCES.0 } else { REFERENCES.1 };
        let reference = json!({ "$ref": format!("{reference}{PREFIX}{name}") });
        let Some(description) = fields.get("description").filter(|_| third) else { return reference };
        return json!({ "allOf": [reference], "description": description });
    }
    let mut plain = Map::new();
    if let Some(forms) = schema["oneOf"].as_array() {
        if let (true, Some(Value::Object(longest))) = (third, forms.last()) {
            plain = simplified(&Value::Object(longest.clone()), third, referred)
                .as_object()
                .cloned()
                .unwrap_or_default();
        }
        if let Some(description) = fields.get("description") {
            plain.insert("description".into(), description.clone());
        }
        return Value::Object(plain);
    }
    for (name, value) in fields {
        let value = match name.as_str() {
            "const" => continue,
            // An apply of the server is complete with what its manager cares about.
            "required" if !third => continue,
            "additionalProperties" if value.is_boolean() => continue,
            "properties" => value
                .as_object()
                .into_iter()
                .flatten()
                .map(|(name, field)| (name.clone(), simplified(field, third, referred)))
                .collect::<Map<_, _>>()
                .into(),
            "items" | "additionalProperties" => simplified(value, third, referred),
            _ => value.clone(),
        };
        plain.insert(name.clone(), value);
    }
    Value::Object(plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn references(value: &Value, found: &mut Vec<String>) {
        match value {
            Value::Object(fields) => {
                found.extend(fields.get("$ref").and_then(Value::as_str).map(ToOwned::to_owned));
                fields.values().for_each(|field| references(field, found));
            }
            Value::Array(items) => items.iter().for_each(|item| references(item, found)),
            _ => {}
        }
    }

    #[test]
    fn every_reference_leads_somewhere() {
        let v3 = V3.values().map(|(text, _)| serde_json::from_slice::<Value>(text).unwrap());
        for document in v3.chain([V2.clone()]) {
            let mut found = Vec::new();
            references(&document, &mut found);
            for reference in found {
                let pointer = reference.strip_prefix('#').unwrap();
                assert!(document.pointer(pointer).is_some(), "{reference}");
            }
        }
        assert_eq!(V3.len(), 8);
    }

    #[test]
    fn every_kind_has_a_schema_that_names_it() {
        let definitions = V2["definitions"].as_object().unwrap();
        for kind in Kind::ALL {
            for version in kind.manifest_versions() {
                let schema = &definitions[&schema_name(version, *kind)];
                assert_eq!(schema[GVK][0] == gvk(version, *kind), !is_builtin(*kind));
                let third: Value = serde_json::from_slice(&V3[&path_of(version)].0).unwrap();
                let schema = &third["components"]["schemas"][schema_name(version, *kind)];
                assert_eq!(schema[GVK][0], gvk(version, *kind));
            }
        }
        assert!(V2_PROTOBUF.len() > 10_000);
    }
}
