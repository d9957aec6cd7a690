//! What there is: groups, versions and resources, in the old form and in the aggregated one.

use axum::Json;
use axum::extract::Path;
use axum::http::{HeaderMap, header};
use axum::response::{IntoResponse, Response};
use bulkhead_model::Kind;
use bulkhead_model::kind::Scope;
use serde_json::{Value, json};

use crate::api::problem::Refusal;

/// The release of Kubernetes whose conventions clients may count on.
const LIKE: (&str, &str) = ("1", "30");
/// The groups, in the order in which clients look a short name up; the first is where `networkpolicies` is found.
const GROUPS: [(&str, &[&str]); 9] = [
    ("", &["v1"]),
    ("bulkhead.dev", &["v1"]),
    ("networking.k8s.io", &["v1"]),
    ("discovery.k8s.io", &["v1"]),
    ("policy.networking.k8s.io", &["v1alpha2", "v1alpha1"]),
    ("projectcalico.org", &["v3"]),
    ("crd.projectcalico.org", &["v1"]),
    ("authorization.k8s.io", &["v1"]),
    ("authentication.k8s.io", &["v1"]),
];
/// What can be done with objects.
const VERBS: [&str; 8] = ["create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"];
/// Questions about whoever asks; no objects.
const QUESTIONS: [(&str, &str, &str); 3] = [
    ("authorization.k8s.io/v1", "selfsubjectaccessreviews", "SelfSubjectAccessReview"),
    ("authorization.k8s.io/v1", "selfsubjectrulesreviews", "SelfSubjectRulesReview"),
    ("authentication.k8s.io/v1", "selfsubjectreviews", "SelfSubjectReview"),
];
/// The aggregated form's media types, by version.
const AGGREGATED: [(&str, &str); 2] = [
    ("v2", "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList"),
    ("v2beta1", "application/json;g=apidiscovery.k8s.io;v=v2beta1;as=APIGroupDiscoveryList"),
];

/// `GROUP/VERSION`, or just the version.
pub(super) fn joined(group: &str, version: &str) -> String {
    if group.is_empty() { version.to_owned() } else { format!("{group}/{version}") }
}

/// The groups and their versions.
pub(super) fn versions() -> impl Iterator<Item = (&'static str, &'static str)> {
    GROUPS.iter().flat_map(|(group, versions)| versions.iter().map(move |version| (*group, *version)))
}

/// The word for one object of a kind.
fn singular(kind: Kind) -> String {
    kind.manifest_kind().to_ascii_lowercase()
}

/// Clients know `ns` for what Kubernetes calls so.
fn short_names(kind: Kind) -> &'static [&'static str] {
    match kind {
        Kind::KubernetesNamespace => &["ns"],
        Kind::Namespace => &[],
        kind => kind.short(),
    }
}

/// Whether clients name a namespace for its objects.
pub(super) fn is_namespaced(kind: Kind) -> bool {
    kind.scope() != Scope::Fleet
}

fn categories(kind: Kind) -> &'static [&'static str] {
    if kind.is_own() { &["bulkhead"] } else { &[] }
}

/// `GET /version`.
pub(crate) async fn version() -> Json<Value> {
    let (major, minor) = LIKE;
    let own = env!("CARGO_PKG_VERSION");
    Json(json!({
        "major": major,
        "minor": minor,
        "gitVersion": format!("v{major}.{minor}.0+bulkhead.{own}"),
        "gitCommit": "",
        "gitTreeState": "",
        "buildDate": "1970-01-01T00:00:00Z",
        "goVersion": "",
        "compiler": "",
        "platform": format!("{}/{}", std::env::consts::OS, std::env::consts::ARCH),
    }))
}

/// `GET /api`.
pub(crate) async fn core(headers: HeaderMap) -> Response {
    aggregated(&headers, |group| group.is_empty()).unwrap_or_else(|| {
        Json(json!({ "kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": [] }))
            .into_response()
    })
}

/// `GET /apis`.
pub(crate) async fn groups(headers: HeaderMap) -> Response {
    aggregated(&headers, |group| !group.is_empty()).unwrap_or_else(|| {
        let groups = GROUPS.iter().filter(|(group, _)| !group.is_empty());
        let groups: Vec<_> = groups.map(|(group, versions)| described(group, versions)).collect();
        Json(json!({ "kind": "APIGroupList", "apiVersion": "v1", "groups": groups })).into_response()
    })
}

/// `GET /apis/{group}`.
pub(crate) async fn group(Path(group): Path<String>) -> Result<Json<Value>, Refusal> {
    let found = GROUPS.iter().find(|(name, _)| !name.is_empty() && *name == group);
    let (name, versions) = found.ok_or_else(|| no_such_group(&group))?;
    let mut group = described(name, versions);
    group["kind"] = json!("APIGroup");
    group["apiVersion"] = json!("v1");
    Ok(Json(group))
}

/// `GET /api/v1`.
pub(crate) async fn core_resources() -> Json<Value> {
    Json(resources("v1"))
}

/// `GET /apis/bulkhead.dev/v1`.
pub(crate) async fn own_resources() -> Json<Value> {
    Json(resources(bulkhead_model::resource::API_VERSION))
}

/// `GET /apis/{group}/{version}`.
pub(crate) async fn group_resources(
    Path((group, version)): Path<(String, String)>,
) -> Result<Json<Value>, Refusal> {
    let known = versions().any(|(name, one)| !name.is_empty() && name == group && one == version);
    if known { Ok(Json(resources(&joined(&group, &version)))) } else { Err(no_such_group(&group)) }
}

fn no_such_group(name: &str) -> Refusal {
    let known: Vec<_> = GROUPS.iter().map(|(group, _)| *group).filter(|group| !group.is_empty()).collect();
    Refusal::not_found(format!("there is no group {name:?} in this version, there are {}", known.join(", ")))
}

fn described(group: &str, versions: &[&str]) -> Value {
    let version = |version: &&str| json!({ "groupVersion": joined(group, version), "version": version });
    let all: Vec<_> = versions.iter().map(version).collect();
    json!({ "name": group, "versions": all, "preferredVersion": all.first() })
}

fn resources(group_version: &str) -> Value {
    let kinds = Kind::of_api_version(group_version).map(|kind| {
        let mut resource = json!({
            "name": kind.resource(),
            "singularName": singular(kind),
            "namespaced": is_namespaced(kind),
            "kind": kind.manifest_kind(),
            "verbs": VERBS,
        });
        for (name, list) in [("shortNames", short_names(kind)), ("categories", categories(kind))] {
            if !list.is_empty() {
                resource[name] = json!(list);
            }
        }
        resource
    });
    let questions = QUESTIONS.iter().filter(|(of, ..)| *of == group_version).map(|(_, name, kind)| {
        json!({ "name": name, "singularName": kind.to_ascii_lowercase(), "namespaced": false, "kind": kind, "verbs": ["create"] })
    });
    json!({
        "kind": "APIResourceList",
        "apiVersion": "v1",
        "groupVersion": group_version,
        "resources": kinds.chain(questions).collect::<Vec<_>>(),
    })
}

/// Everything in one answer, if the client asks for that before anything else that there is.
fn aggregated(headers: &HeaderMap, wanted: impl Fn(&str) -> bool) -> Option<Response> {
    let accept = headers.get(header::ACCEPT)?.to_str().ok()?;
    let plain = |text: &str| {
        let mut parts: Vec<&str> = text.split(';').map(str::trim).collect();
        parts.sort_unstable();
        parts.join(";")
    };
    let (version, media_type) = accept
        .split(',')
        .find_map(|asked| AGGREGATED.iter().find(|(_, media_type)| plain(asked) == plain(media_type)))?;
    let items = GROUPS.iter().filter(|(group, _)| wanted(group)).map(|(group, versions)| {
        let versions = versions.iter().map(|version| {
            let listed = resources(&joined(group, version));
            let listed = listed["resources"].as_array().into_iter().flatten();
            let resources = listed.map(|one| aggregated_resource(one, group, version));
            json!({ "version": version, "freshness": "Current", "resources": resources.collect::<Vec<_>>() })
        });
        json!({ "metadata": { "name": group }, "versions": versions.collect::<Vec<_>>() })
    });
    let body = json!({
        "kind": "APIGroupDiscoveryList",
        "apiVersion": format!("apidiscovery.k8s.io/{version}"),
        "metadata": {},
        "items": items.collect::<Vec<_>>(),
    });
    Some(([(header::CONTENT_TYPE, *media_type)], body.to_string()).into_response())
}

fn aggregated_resource(one: &Value, group: &str, version: &str) -> Value {
    let scope = if one["namespaced"] == true { "Namespaced" } else { "Cluster" };
    let mut resource = json!({
        "resource": one["name"],
        "responseKind": { "group": group, "version": version, "kind": one["kind"] },
        "scope": scope,
        "singularResource": one["singularName"],
        "verbs": one["verbs"],
    });
    for name in ["shortNames", "categories"] {
        if !one[name].is_null() {
            resource[name] = one[name].clone();
        }
    }
    resource
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_version_of_every_kind_is_found() {
        let served: BTreeSet<String> = versions().map(|(group, version)| joined(group, version)).collect();
        for version in Kind::api_versions() {
            assert!(served.contains(version), "{version}");
        }
        for version in &served {
            assert!(!resources(version)["resources"].as_array().unwrap().is_empty(), "{version}");
        }
    }

    #[test]
    fn aggregated_discovery_is_for_who_asks_for_it() {
        let mut headers = HeaderMap::new();
        assert!(aggregated(&headers, |_| true).is_none());
        headers.insert(header::ACCEPT, "application/json".parse().unwrap());
        assert!(aggregated(&headers, |_| true).is_none());
        let asked = "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList,application/json";
        headers.insert(header::ACCEPT, asked.parse().unwrap());
        assert!(aggregated(&headers, |_| true).is_some());
    }
}
