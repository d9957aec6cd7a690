//! What requests say: bodies and query parameters. Unknown parameters are refused, like unknown fields.

use std::collections::BTreeMap;
use std::time::Duration;

use axum::body::Bytes;
use axum::extract::rejection::{BytesRejection, QueryRejection};
use axum::extract::{FromRequestParts, Query};
use axum::http::StatusCode;
use axum::http::request::Parts;
use bulkhead_model::document::{self, Document, Node, Position, Value};
use bulkhead_model::{ObjectKey, Problem, Resource};
use serde::de::DeserializeOwned;

use super::kubernetes::place::Place;
use super::problem::Refusal;
use crate::access::{Caller, Permissions};
use crate::context::Context;
use crate::guard::{Known, Who};
use crate::repository::{Accounts, Author, CONFIRM_WITHIN, OWN_MANAGER, Terms};

/// Query parameters, by name.
#[derive(Debug)]
pub(crate) struct Parameters(BTreeMap<String, String>);

impl<S: Send + Sync> FromRequestParts<S> for Parameters {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Refusal> {
        let query: Result<Query<Vec<(String, String)>>, QueryRejection> =
            Query::from_request_parts(parts, state).await;
        let Query(pairs) = query.map_err(|error| Refusal::bad_request(error.to_string()))?;
        let mut parameters = BTreeMap::new();
        for (name, value) in pairs {
            // Which of them counts, nobody could say.
            if parameters.insert(name.clone(), value).is_some() {
                return Err(Refusal::bad_request(format!("query parameter {name:?} is given twice")));
            }
        }
        Ok(Self(parameters))
    }
}

impl Parameters {
    /// Refuses parameters that this request does not have.
    pub(crate) fn only(&self, known: &[&str]) -> Result<(), Refusal> {
        let Some(unknown) = self.0.keys().find(|name| !known.contains(&name.as_str())) else { return Ok(()) };
        let suggestion = bulkhead_model::suggest::nearest(unknown, known.iter().copied())
            .map_or_else(String::new, |word| format!("; did you mean {word}?"));
        let known = if known.is_empty() { "none".into() } else { known.join(", ") };
        Err(Refusal::bad_request(format!(
            "there is no query parameter {unknown:?}, there are {known}{suggestion}"
        )))
    }

    /// All of them but one, as they stand in an address.
    pub(crate) fn query(&self, but: &str) -> String {
        let escaped = |text: &str| {
            let byte = |byte: u8| match byte {
                b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => {
                    char::from(byte).to_string()
                }
                other => format!("%{other:02X}"),
            };
            text.bytes().map(byte).collect::<String>()
        };
        let pairs = self
            .0
            .iter()
            .filter(|(name, _)| *name != but)
            .map(|(name, value)| format!("{}={}", escaped(name), escaped(value)));
        pairs.collect::<Vec<_>>().join("&")
    }

    /// A parameter's text, if it is given and not empty.
    pub(crate) fn text(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str).filter(|text| !text.is_empty())
    }

    /// A parameter's text, which must be given.
    pub(crate) fn required(&self, name: &str, expected: &str) -> Result<&str, Refusal> {
        self.text(name)
            .ok_or_else(|| Refusal::bad_request(format!("query parameter {name} is missing: {expected}")))
    }

    /// A parameter as a value.
    pub(crate) fn parsed<T: std::str::FromStr>(
        &self,
        name: &str,
        expected: &str,
    ) -> Result<Option<T>, Refusal> {
        let wrong = |text| format!("query parameter {name}: expected {expected}, found {text:?}");
        self.text(name)
            .map(|text| text.parse().map_err(|_unhelpful| Refusal::bad_request(wrong(text))))
            .transpose()
    }

    /// A switch; absent means no.
    pub(crate) fn switch(&self, name: &str) -> Result<bool, Refusal> {
        match self.text(name) {
            // Kubernetes clients say dryRun=All.
            Some("true" | "1" | "All") => Ok(true),
            None | Some("false" | "0") => Ok(false),
            Some(other) => Err(Refusal::bad_request(format!(
                "query parameter {name}: expected true or false, found {other:?}"
            ))),
        }
    }
}

/// A number of milliseconds like `90s`, `5m`, `2h` or `7d`.
pub(crate) fn duration_ms(text: &str) -> Option<u64> {
    let units = [("ms", 1), ("s", 1000), ("m", 60_000), ("h", 3_600_000), ("d", 86_400_000)];
    units.into_iter().find_map(|(unit, unit_ms)| {
        let count: u64 = text.strip_suffix(unit)?.parse().ok()?;
        Some(count.saturating_mul(unit_ms))
    })
}

/// Query parameters of everything that changes objects.
pub(crate) const OF_CHANGES: [&str; 3] = ["dryRun", "force", "confirmWithin"];

/// Longest name of a field manager, as in Kubernetes.
const MANAGER_LEN_MAX: usize = 128;
/// Query parameters that clients of Kubernetes send with anything, and that change nothing here.
pub(crate) const OF_CLIENTS: [&str; 2] = ["pretty", "timeout"];
/// Query parameters of what writes one object.
pub(crate) const OF_WRITES: [&str; 7] =
    ["dryRun", "force", "confirmWithin", "fieldManager", "fieldValidation", "pretty", "timeout"];

/// On which terms a request changes objects.
pub(crate) fn terms(
    context: &Context,
    parameters: &Parameters,
    (caller, permissions): (&Caller, &Permissions),
    verb: &'static str,
) -> Result<Terms, Refusal> {
    let confirm_within = parameters.text("confirmWithin").map(|text| {
        let within = duration_ms(text).map(Duration::from_millis);
        within.filter(|within| (CONFIRM_WITHIN.0..=CONFIRM_WITHIN.1).contains(within)).ok_or_else(|| {
            let message = format!("query parameter confirmWithin: expected 1s to 24h, found {text:?}");
            Refusal::bad_request(message)
        })
    });
    // Unknown and duplicate fields are refused whatever a client asks for: what was meant by them cannot be enforced.
    if let Some(text) = parameters.text("fieldValidation")
        && !matches!(text, "Strict" | "Warn" | "Ignore")
    {
        let message =
            format!("query parameter fieldValidation: expected Strict, Warn or Ignore, found {text:?}");
        return Err(Refusal::bad_request(message));
    }
    // Clients of Kubernetes say who sets fields; who does not is not asked to answer for them.
    let manager = parameters.text("fieldManager").map(manager).transpose()?;
    let begins = manager.is_some();
    let accounts = Accounts::Changed { manager: manager.unwrap_or(OWN_MANAGER).to_owned(), begins };
    let mut lifelines = context.sessions.registry.lifelines();
    lifelines.extend(context.cluster.lifelines());
    // Who is on this machine's own socket cannot be cut off from it.
    if let Some(ends) = caller.ends {
        lifelines.insert(0, Known { who: Who::Operator, ends });
    }
    Ok(Terms {
        dry_run: parameters.switch("dryRun")?,
        force: parameters.switch("force")?,
        confirm_within: confirm_within.transpose()?,
        author: Author { by: caller.name(), from: caller.from(), verb },
        permissions: permissions.clone(),
        accounts,
        lifelines,
    })
}

/// The name of a field manager.
fn manager(text: &str) -> Result<&str, Refusal> {
    if text.len() <= MANAGER_LEN_MAX && !text.chars().any(char::is_control) {
        return Ok(text);
    }
    let message =
        format!("query parameter fieldManager: at most {MANAGER_LEN_MAX} bytes without control characters");
    Err(Refusal::bad_request(message))
}

/// A body, or why there is none.
pub(crate) type Body = Result<Bytes, BytesRejection>;

/// The body's text.
pub(crate) fn text(body: Body) -> Result<String, Refusal> {
    let bytes = body.map_err(|error| match error.status() {
        StatusCode::PAYLOAD_TOO_LARGE => {
            let message = format!("a body may have {} bytes", super::BODY_BYTES_MAX);
            Refusal::new(StatusCode::PAYLOAD_TOO_LARGE, "RequestEntityTooLarge", message)
        }
        _ => Refusal::bad_request(error.to_string()),
    })?;
    String::from_utf8(bytes.into())
        .map_err(|error| Refusal::bad_request(format!("the body is not UTF-8: {error}")))
}

/// A body of JSON with these fields and no others.
pub(crate) fn json<T: DeserializeOwned>(body: Body) -> Result<T, Refusal> {
    serde_json::from_str(&text(body)?).map_err(|error| Refusal::bad_request(format!("the body: {error}")))
}

/// The body's only object, YAML or JSON, as its place has it.
pub(crate) fn document(place: &Place, body: Body) -> Result<Document, Refusal> {
    let text = text(body)?;
    let mut nodes = document::read("body", &text).map_err(|problem| Refusal::invalid(vec![problem]))?;
    // The one line that programs send tells nobody where to look.
    if !text.trim_end().contains('\n') {
        nodes.iter_mut().for_each(without_positions);
    }
    manifest(place, nodes)
}

/// An object that was made of what there was, under the same limits as one that was sent.
pub(crate) fn changed(place: &Place, object: &serde_json::Value) -> Result<Document, Refusal> {
    let mut nodes =
        document::read("body", &object.to_string()).map_err(|problem| Refusal::invalid(vec![problem]))?;
    nodes.iter_mut().for_each(without_positions);
    manifest(place, nodes)
}

fn without_positions(node: &mut Node) {
    node.position = Position::default();
    match &mut node.value {
        Value::Sequence(items) => items.iter_mut().for_each(without_positions),
        Value::Mapping(entries) => {
            for (key, value) in entries {
                key.position = Position::default();
                without_positions(value);
            }
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

/// The only object of what was read.
fn manifest(place: &Place, mut nodes: Vec<Node>) -> Result<Document, Refusal> {
    nodes.iter_mut().for_each(|node| place.take(node));
    let mut documents = document::of_nodes("body", nodes).map_err(Refusal::invalid)?;
    match (documents.pop(), documents.is_empty()) {
        (Some(document), true) => Ok(document),
        (None, _) => Err(Refusal::bad_request("the body has no object")),
        (Some(_), false) => Err(Refusal::bad_request("the body has more than one object")),
    }
}

/// What clients of Kubernetes send with a deletion. What depends on an object is not asked about: here nothing does.
#[derive(Debug, Default, serde::Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct DeleteOptions {
    dry_run: Vec<String>,
    preconditions: Preconditions,
}

#[derive(Debug, Default, serde::Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Preconditions {
    uid: Option<String>,
    resource_version: Option<String>,
}

impl DeleteOptions {
    pub(crate) fn is_dry_run(&self) -> bool {
        self.dry_run.iter().any(|text| text == "All")
    }

    pub(crate) fn resource_version(&self) -> Option<&str> {
        self.preconditions.resource_version.as_deref()
    }

    /// Whether the object is the one that is meant.
    pub(crate) fn check(&self, key: &ObjectKey, found: Option<&Resource>) -> Result<(), Refusal> {
        let (Some(expected), Some(found)) = (&self.preconditions.uid, found) else { return Ok(()) };
        if found.metadata().uid.as_ref() == Some(expected) {
            return Ok(());
        }
        let message = format!("{key} is another object than the one with the uid {expected}");
        Err(Refusal::new(StatusCode::CONFLICT, "Conflict", message))
    }
}

/// The body of a deletion, if it has one.
pub(crate) fn delete_options(body: Body) -> Result<DeleteOptions, Refusal> {
    let text = text(body)?;
    if text.trim().is_empty() {
        return Ok(DeleteOptions::default());
    }
    serde_json::from_str(&text)
        .map_err(|error| Refusal::bad_request(format!("expected DeleteOptions: {error}")))
}

/// Files sent together.
#[derive(Debug, serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct Sources {
    sources: Vec<Source>,
}

#[derive(Debug, serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct Source {
    name: String,
    text: String,
}

/// The objects of a `{"sources": [{"name", "text"}]}` body, or all problems of all texts.
pub(crate) fn documents(body: Body) -> Result<Vec<Document>, Refusal> {
    let text = text(body)?;
    let Sources { sources } = serde_json::from_str(&text).map_err(|error| {
        Refusal::bad_request(format!("expected {{\"sources\": [{{\"name\", \"text\"}}]}}: {error}"))
    })?;
    let mut documents = Vec::new();
    let mut problems: Vec<Problem> = Vec::new();
    for Source { name, text } in sources {
        match document::parse(&name, &text) {
            Ok(mut more) => documents.append(&mut more),
            Err(mut more) => problems.append(&mut more),
        }
    }
    if problems.is_empty() { Ok(documents) } else { Err(Refusal::invalid(problems)) }
}
