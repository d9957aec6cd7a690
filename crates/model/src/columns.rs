//! What a table shows of an object, by its kind: for the command line and for clients of the API that ask for tables.

use serde_json::{Map, Value as Json};

use crate::kind::Kind;

/// Headings of the columns; the first is the name, which [`cells`] leaves to the caller.
pub fn headings(kind: Kind) -> &'static [&'static str] {
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

/// What stands under the headings after the first, for an object in its manifest form.
pub fn cells(kind: Kind, item: &Json) -> Vec<String> {
    let at = |pointer: &str| text(item, pointer);
    let labels = || labels(&item["metadata"]["labels"]);
    let list = |pointer: &str| -> String {
        let items = item.pointer(pointer).and_then(Json::as_array).into_iter().flatten();
        items.filter_map(Json::as_str).collect::<Vec<_>>().join(",")
    };
    let rules = |pointer: &str| match item.pointer(pointer).and_then(Json::as_array) {
        Some(rules) => format!("{} rules", rules.len()),
        None => "-".into(),
    };
    let or = |value: String, default: &str| if value.is_empty() { default.to_owned() } else { value };
    match kind {
        Kind::Tier => vec![or(at("/spec/order"), "last"), at("/spec/defaultAction")],
        Kind::Policy => vec![
            at("/spec/tier"),
            or(at("/spec/order"), "last"),
            or(at("/spec/mode"), "Enforce"),
            rules("/spec/ingress"),
            rules("/spec/egress"),
            at("/spec/appliesTo"),
        ],
        Kind::NetworkSet => vec![list("/spec/cidrs"), labels()],
        Kind::Workload => vec![at("/spec/host"), list("/spec/addresses"), at("/spec/source"), labels()],
        Kind::Host => vec![at("/spec/agentVersion"), labels()],
        Kind::HostEndpoint => {
            vec![at("/spec/host"), at("/spec/interface"), list("/spec/addresses"), labels()]
        }
        Kind::Namespace => vec![or(at("/spec/defaultPosture"), "-"), labels()],
        Kind::Settings => vec![at("/spec/defaultPosture")],
        Kind::RoleBinding => vec![
            at("/spec/role"),
            or(list("/spec/users"), "-"),
            or(list("/spec/groups"), "-"),
            or(list("/spec/tiers"), "all"),
            or(list("/spec/namespaces"), "all"),
        ],
        Kind::NameTable => {
            let names = item.pointer("/spec/names").and_then(Json::as_object);
            vec![names.map_or(0, Map::len).to_string(), labels()]
        }
        _ => vec![at("/metadata/creationTimestamp"), labels()],
    }
}

/// The text, number or truth value at a place; empty if there is none.
pub fn text(value: &Json, pointer: &str) -> String {
    match value.pointer(pointer) {
        Some(Json::String(text)) => text.clone(),
        Some(Json::Null) | None => String::new(),
        Some(other) => other.to_string(),
    }
}

/// Labels as `key=value,…`.
pub fn labels(value: &Json) -> String {
    let pairs = value.as_object().into_iter().flatten();
    pairs
        .map(|(key, value)| format!("{key}={}", value.as_str().unwrap_or_default()))
        .collect::<Vec<_>>()
        .join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_a_cell_for_each_heading() {
        for kind in Kind::ALL {
            assert_eq!(cells(*kind, &Json::Null).len() + 1, headings(*kind).len(), "{kind}");
        }
    }
}
