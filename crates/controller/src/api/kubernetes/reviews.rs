//! What somebody may do, and who he is: `kubectl auth can-i` and `kubectl auth whoami`.

use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use bulkhead_model::Kind;
use bulkhead_model::kind::Scope;
use bulkhead_model::resource::NO_NAMESPACE;
use bulkhead_model::roles::Role;
use serde::Deserialize;
use serde_json::{Value, json};

use super::discovery::{joined, versions};
use crate::access::{Caller, Permissions};
use crate::api::input::{self, Body, OF_WRITES, Parameters};
use crate::api::problem::Refusal;

/// Verbs that read.
const READS: [&str; 3] = ["get", "list", "watch"];
/// Verbs that change.
const CHANGES: [&str; 5] = ["create", "update", "patch", "delete", "deletecollection"];

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Review {
    spec: Spec,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Spec {
    resource_attributes: Option<Attributes>,
    non_resource_attributes: Option<NonResource>,
    namespace: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Attributes {
    namespace: String,
    verb: String,
    group: String,
    resource: String,
    subresource: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct NonResource {
    verb: String,
}

/// Where somebody wants to change something.
#[derive(Debug, Clone, Copy)]
enum Where<'a> {
    /// Wherever it may be.
    Everywhere,
    /// In this namespace, or in none.
    In(Option<&'a str>),
}

impl<'a> Where<'a> {
    fn of(namespace: &'a str, kind: Kind) -> Self {
        match namespace {
            _ if kind.scope() == Scope::Fleet => Self::In(None),
            "" => Self::Everywhere,
            NO_NAMESPACE if kind.scope() == Scope::Namespaced => {
                Self::In(Some(bulkhead_model::foreign::DEFAULT_NAMESPACE))
            }
            NO_NAMESPACE => Self::In(None),
            name => Self::In(Some(name)),
        }
    }

    fn is_seen(self, permissions: &Permissions) -> bool {
        match self {
            Self::Everywhere => permissions.may_read(None),
            Self::In(namespace) => permissions.may_read(namespace),
        }
    }

    fn allows(self, permissions: &Permissions, kind: Kind) -> bool {
        match self {
            Self::Everywhere => permissions.could_change_everywhere(kind),
            Self::In(namespace) => permissions.could_change(kind, namespace),
        }
    }
}

fn answer(kind: &str, group: &str, spec: &Value, status: &Value) -> Response {
    let body = json!({
        "kind": kind,
        "apiVersion": format!("{group}/v1"),
        "metadata": { "creationTimestamp": null },
        "spec": spec,
        "status": status,
    });
    (StatusCode::CREATED, Json(body)).into_response()
}

fn read(parameters: &Parameters, body: Body) -> Result<(Value, Review), Refusal> {
    parameters.only(&OF_WRITES)?;
    let body: Value = input::json(body)?;
    let review = serde_json::from_value(body.clone());
    let review = review.map_err(|error| Refusal::bad_request(format!("expected a review: {error}")))?;
    Ok((body["spec"].clone(), review))
}

/// `POST /apis/authorization.k8s.io/v1/selfsubjectaccessreviews`.
pub(crate) async fn access(
    Extension(permissions): Extension<Permissions>,
    parameters: Parameters,
    body: Body,
) -> Result<Response, Refusal> {
    let (spec, Review { spec: asked }) = read(&parameters, body)?;
    let (allowed, reason) = match (&asked.resource_attributes, &asked.non_resource_attributes) {
        (Some(attributes), _) => may(&permissions, attributes),
        (None, Some(path)) => {
            let allowed = path.verb == "get" && permissions.title().is_some();
            (allowed, role_of(&permissions))
        }
        (None, None) => {
            return Err(Refusal::bad_request("ask for resourceAttributes or nonResourceAttributes"));
        }
    };
    let status = json!({ "allowed": allowed, "reason": reason });
    Ok(answer("SelfSubjectAccessReview", "authorization.k8s.io", &spec, &status))
}

fn role_of(permissions: &Permissions) -> String {
    permissions.title().unwrap_or_else(|| "no role".into())
}

fn may(permissions: &Permissions, asked: &Attributes) -> (bool, String) {
    let has = role_of(permissions);
    let Attributes { namespace, verb, group, resource, subresource } = asked;
    if resource == "*" || group == "*" {
        return (permissions.role() == Some(Role::Admin), has);
    }
    if !subresource.is_empty() {
        return (false, format!("{resource} have no {subresource} here"));
    }
    let served = versions().filter(|(name, _)| name == group);
    let kind = served.map(|(group, version)| joined(group, version));
    let Some(kind) = kind.into_iter().find_map(|version| Kind::of_resource(&version, resource)) else {
        return (false, format!("there are no {resource:?} in the group {group:?}"));
    };
    let reads = Where::of(namespace, kind).is_seen(permissions);
    let changes = Where::of(namespace, kind).allows(permissions, kind);
    let allowed = match verb.as_str() {
        verb if READS.contains(&verb) => reads,
        verb if CHANGES.contains(&verb) => changes,
        "*" => reads && changes,
        _ => false,
    };
    (allowed, has)
}

/// `POST /apis/authorization.k8s.io/v1/selfsubjectrulesreviews`.
pub(crate) async fn rules(
    Extension(permissions): Extension<Permissions>,
    parameters: Parameters,
    body: Body,
) -> Result<Response, Refusal> {
    let (spec, Review { spec: asked }) = read(&parameters, body)?;
    let rule = |verbs: &[&str], kind: Kind, version: &str| {
        let group = version.split_once('/').map_or("", |(group, _)| group);
        json!({ "verbs": verbs, "apiGroups": [group], "resources": [kind.resource()] })
    };
    let mut rules = Vec::new();
    let seen = |kind: &&Kind| Where::of(&asked.namespace, **kind).is_seen(&permissions);
    for kind in Kind::ALL.iter().filter(seen) {
        let changes = Where::of(&asked.namespace, *kind).allows(&permissions, *kind);
        let verbs = if changes { [&READS[..], &CHANGES].concat() } else { READS.to_vec() };
        rules.extend(kind.manifest_versions().iter().map(|version| rule(&verbs, *kind, version)));
    }
    let paths =
        ["/api", "/api/*", "/apis", "/apis/*", "/openapi", "/openapi/*", "/version", "/healthz", "/readyz"];
    let status = json!({
        "resourceRules": rules,
        "nonResourceRules": [{ "verbs": ["get"], "nonResourceURLs": paths }],
        "incomplete": false,
    });
    Ok(answer("SelfSubjectRulesReview", "authorization.k8s.io", &spec, &status))
}

/// `POST /apis/authentication.k8s.io/v1/selfsubjectreviews`.
pub(crate) async fn subject(
    Extension(caller): Extension<Caller>,
    parameters: Parameters,
) -> Result<Response, Refusal> {
    parameters.only(&OF_WRITES)?;
    let groups: Vec<&str> = caller.groups.iter().map(String::as_str).collect();
    let status = json!({ "userInfo": { "username": caller.name(), "groups": groups } });
    Ok(answer("SelfSubjectReview", "authentication.k8s.io", &Value::Null, &status))
}
