//! Changes of a JSON value: JSON Patch (RFC 6902), JSON Merge Patch (RFC 7386), and the strategic merge that clients send for
//! the kinds of Kubernetes that they know.

use bulkhead_model::Kind;
use bulkhead_model::document::DOCUMENT_DEPTH_MAX;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::api::BODY_BYTES_MAX;

/// Most operations of one patch: each may have to move a whole list.
const OPERATIONS_MAX: usize = 1000;
/// Most bytes that a patch may copy: each copy could double the object.
const COPIED_BYTES_MAX: usize = BODY_BYTES_MAX;

/// One operation of a JSON Patch.
#[derive(Debug, Clone, Deserialize)]
#[serde(tag = "op", rename_all = "lowercase")]
pub(super) enum Operation {
    Add { path: String, value: Value },
    Remove { path: String },
    Replace { path: String, value: Value },
    Move { from: String, path: String },
    Copy { from: String, path: String },
    Test { path: String, value: Value },
}

/// Applies operations one after another; the error names the one that failed.
pub(super) fn patch(target: &mut Value, operations: &[Operation]) -> Result<(), String> {
    if operations.len() > OPERATIONS_MAX {
        return Err(format!("a patch may have {OPERATIONS_MAX} operations"));
    }
    let mut copied = 0;
    for (index, operation) in operations.iter().enumerate() {
        let done = check(target, operation, &mut copied).and_then(|()| apply(target, operation));
        done.map_err(|error| format!("operation {index}: {error}"))?;
    }
    Ok(())
}

/// Refuses what would make the object too large, or too deep: whoever reads it follows its depth.
fn check(target: &Value, operation: &Operation, copied: &mut usize) -> Result<(), String> {
    let (path, value) = match operation {
        Operation::Add { path, value } | Operation::Replace { path, value } => (path, Some(value)),
        Operation::Move { from, path } | Operation::Copy { from, path } => (path, target.pointer(from)),
        Operation::Remove { .. } | Operation::Test { .. } => return Ok(()),
    };
    let Some(value) = value else { return Ok(()) };
    if path.matches('/').count() + depth(value) > DOCUMENT_DEPTH_MAX {
        return Err(format!("the object would be nested deeper than {DOCUMENT_DEPTH_MAX}"));
    }
    if matches!(operation, Operation::Copy { .. }) {
        *copied += value.to_string().len();
        if *copied > COPIED_BYTES_MAX {
            return Err(format!("more than {COPIED_BYTES_MAX} bytes would be copied"));
        }
    }
    Ok(())
}

fn depth(value: &Value) -> usize {
    match value {
        Value::Object(fields) => 1 + fields.values().map(depth).max().unwrap_or_default(),
        Value::Array(items) => 1 + items.iter().map(depth).max().unwrap_or_default(),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => 0,
    }
}

fn apply(target: &mut Value, operation: &Operation) -> Result<(), String> {
    match operation {
        Operation::Add { path, value } => add(target, path, value.clone()),
        Operation::Remove { path } => remove(target, path).map(drop),
        Operation::Replace { path, value } => {
            *target.pointer_mut(path).ok_or_else(|| nothing(path))? = value.clone();
            Ok(())
        }
        Operation::Move { from, path } => {
            if path.strip_prefix(from.as_str()).is_some_and(|rest| rest.starts_with('/')) {
                return Err(format!("{from:?} cannot be moved into itself"));
            }
            let value = remove(target, from)?;
            add(target, path, value)
        }
        Operation::Copy { from, path } => {
            let value = target.pointer(from).ok_or_else(|| nothing(from))?.clone();
            add(target, path, value)
        }
        Operation::Test { path, value } => match target.pointer(path) {
            Some(found) if found == value => Ok(()),
            Some(found) => Err(format!("{path:?} is {found}, not {value}")),
            None => Err(nothing(path)),
        },
    }
}

fn nothing(path: &str) -> String {
    format!("there is nothing at {path:?}")
}

/// The parent of a place, and its last part.
fn parent<'a>(target: &'a mut Value, path: &str) -> Result<(&'a mut Value, String), String> {
    let (above, last) = path.rsplit_once('/').ok_or_else(|| format!("{path:?} does not begin with /"))?;
    let parent = target.pointer_mut(above).ok_or_else(|| nothing(above))?;
    Ok((parent, last.replace("~1", "/").replace("~0", "~")))
}

fn add(target: &mut Value, path: &str, value: Value) -> Result<(), String> {
    if path.is_empty() {
        *target = value;
        return Ok(());
    }
    let (parent, last) = parent(target, path)?;
    match parent {
        Value::Object(fields) => drop(fields.insert(last, value)),
        Value::Array(items) if last == "-" => items.push(value),
        Value::Array(items) => {
            let index = index(&last).filter(|index| *index <= items.len());
            items.insert(index.ok_or_else(|| nothing(path))?, value);
        }
        _ => return Err(nothing(path)),
    }
    Ok(())
}

fn remove(target: &mut Value, path: &str) -> Result<Value, String> {
    let (parent, last) = parent(target, path)?;
    let gone = match parent {
        Value::Object(fields) => fields.remove(&last),
        Value::Array(items) => {
            index(&last).filter(|index| *index < items.len()).map(|index| items.remove(index))
        }
        _ => None,
    };
    gone.ok_or_else(|| nothing(path))
}

/// A decimal number without zeros in front.
fn index(text: &str) -> Option<usize> {
    let plain = text == "0" || !text.starts_with(['0', '+']);
    text.parse().ok().filter(|_| plain)
}

/// RFC 7386.
pub(super) fn merge(target: &mut Value, patch: &Value) {
    let Value::Object(changes) = patch else {
        *target = patch.clone();
        return;
    };
    if !target.is_object() {
        *target = json!({});
    }
    let Value::Object(fields) = target else { return };
    for (name, change) in changes {
        if change.is_null() {
            fields.remove(name);
        } else {
            merge(fields.entry(name.as_str()).or_insert(Value::Null), change);
        }
    }
}

/// Fields of a strategic merge that tell how to merge.
const DIRECTIVE: &str = "$patch";
const RETAIN_KEYS: &str = "$retainKeys";
const SET_ORDER: &str = "$setElementOrder/";
const DELETE_VALUES: &str = "$deleteFromPrimitiveList/";

/// By which field the items of a list are told apart; `None`: the list is one value.
fn merge_key(kind: Kind, field: &str) -> Option<&'static str> {
    match (kind, field) {
        (_, "conditions") => Some("type"),
        (_, "ownerReferences") => Some("uid"),
        (Kind::Service, "ports") => Some("port"),
        (Kind::Pod, "ports") => Some("containerPort"),
        (Kind::Pod, "volumeMounts") => Some("mountPath"),
        (Kind::Pod, "hostAliases" | "podIPs") => Some("ip"),
        (Kind::Pod, "containers" | "initContainers" | "ephemeralContainers" | "volumes" | "env")
        | (Kind::Pod | Kind::ServiceAccount, "imagePullSecrets" | "secrets") => Some("name"),
        (Kind::Node, "addresses") => Some("type"),
        _ => None,
    }
}

/// A strategic merge into an object of a kind of Kubernetes.
pub(super) fn strategic(kind: Kind, target: &mut Value, patch: &Value) -> Result<(), String> {
    let Value::Object(changes) = patch else {
        *target = patch.clone();
        return Ok(());
    };
    match changes.get(DIRECTIVE).and_then(Value::as_str) {
        None | Some("merge") => {}
        Some("replace") => {
            *target = without_directives(patch);
            return Ok(());
        }
        Some("delete") => {
            *target = Value::Null;
            return Ok(());
        }
        Some(other) => return Err(format!("{DIRECTIVE} may be merge, replace or delete, not {other:?}")),
    }
    if !target.is_object() {
        *target = json!({});
    }
    let Value::Object(fields) = target else { return Ok(()) };
    if let Some(kept) = changes.get(RETAIN_KEYS).and_then(Value::as_array) {
        fields.retain(|name, _| kept.iter().any(|kept| kept == name));
    }
    for (name, change) in changes {
        if let Some(list) = name.strip_prefix(DELETE_VALUES) {
            if let (Some(Value::Array(items)), Some(gone)) = (fields.get_mut(list), change.as_array()) {
                items.retain(|item| !gone.contains(item));
            }
        } else if name.starts_with('$') {
        } else if change.is_null() {
            fields.remove(name);
        } else if let Some(items) = change.as_array() {
            let field = fields.entry(name.as_str()).or_insert_with(|| json!([]));
            merge_lists(kind, name, field, items)?;
        } else {
            let field = fields.entry(name.as_str()).or_insert(Value::Null);
            strategic(kind, field, change)?;
            if field.is_null() {
                fields.remove(name);
            }
        }
    }
    for (name, order) in changes {
        let Some((list, order)) = name.strip_prefix(SET_ORDER).zip(order.as_array()) else { continue };
        if let Some(Value::Array(items)) = fields.get_mut(list) {
            let key = merge_key(kind, list);
            let place =
                |item: &Value| order.iter().position(|one| same(key, one, item)).unwrap_or(usize::MAX);
            items.sort_by_key(place);
        }
    }
    Ok(())
}

/// Whether two items of a list are one.
fn same(key: Option<&str>, a: &Value, b: &Value) -> bool {
    key.map_or(a == b, |key| a[key] == b[key])
}

fn merge_lists(kind: Kind, name: &str, target: &mut Value, changes: &[Value]) -> Result<(), String> {
    let replaces = changes.iter().any(|item| item[DIRECTIVE] == "replace");
    let key = merge_key(kind, name);
    let adds = key.is_some() || name == "finalizers";
    let Value::Array(items) = target else {
        *target = Value::Array(changes.iter().map(without_directives).collect());
        return Ok(());
    };
    if replaces || !adds {
        let kept = changes.iter().filter(|item| item[DIRECTIVE] != "replace");
        *items = kept.map(without_directives).collect();
        return Ok(());
    }
    for change in changes {
        let found = items.iter().position(|item| same(key, item, change));
        match (found, change[DIRECTIVE] == "delete") {
            (Some(index), true) => drop(items.remove(index)),
            (None, true) => {}
            (Some(index), false) => strategic(kind, &mut items[index], change)?,
            (None, false) => items.push(without_directives(change)),
        }
    }
    Ok(())
}

fn without_directives(value: &Value) -> Value {
    match value {
        Value::Object(fields) => fields
            .iter()
            .filter(|(name, value)| !name.starts_with('$') && !value.is_null())
            .map(|(name, value)| (name.clone(), without_directives(value)))
            .collect::<Map<_, _>>()
            .into(),
        Value::Array(items) => items.iter().map(without_directives).collect(),
        other => other.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn patched(mut target: Value, operations: Value) -> Result<Value, String> {
        let operations: Vec<Operation> = serde_json::from_value(operations).unwrap();
        patch(&mut target, &operations).map(|()| target)
    }

    #[test]
    fn operations_do_what_rfc_6902_says() {
        for (target, operation, expected) in [
            (json!({}), json!({"op": "add", "path": "/a", "value": 1}), json!({"a": 1})),
            (json!([1, 3]), json!({"op": "add", "path": "/1", "value": 2}), json!([1, 2, 3])),
            (json!([1]), json!({"op": "add", "path": "/-", "value": 2}), json!([1, 2])),
            (json!({"a": 1}), json!({"op": "add", "path": "", "value": 2}), json!(2)),
            (json!({"a/b": 1, "c~": 2}), json!({"op": "remove", "path": "/a~1b"}), json!({"c~": 2})),
            (json!([1, 2]), json!({"op": "remove", "path": "/0"}), json!([2])),
            (json!({"a": 1}), json!({"op": "replace", "path": "/a", "value": null}), json!({"a": null})),
            (
                json!({"a": [1, 2]}),
                json!({"op": "move", "from": "/a/0", "path": "/b"}),
                json!({"a": [2], "b": 1}),
            ),
            (json!({"a": 1}), json!({"op": "copy", "from": "/a", "path": "/b"}), json!({"a": 1, "b": 1})),
            (json!({"a": 1}), json!({"op": "test", "path": "/a", "value": 1}), json!({"a": 1})),
        ] {
            assert_eq!(patched(target, json!([operation])).unwrap(), expected, "{operation}");
        }
        for operation in [
            json!({"op": "add", "path": "/x/y", "value": 1}),
            json!({"op": "add", "path": "/l/7", "value": 1}),
            json!({"op": "add", "path": "/l/01", "value": 1}),
            json!({"op": "add", "path": "a", "value": 1}),
            json!({"op": "remove", "path": "/x"}),
            json!({"op": "remove", "path": ""}),
            json!({"op": "replace", "path": "/x", "value": 1}),
            json!({"op": "move", "from": "/l", "path": "/l/0"}),
            json!({"op": "test", "path": "/l", "value": 1}),
        ] {
            let error = patched(json!({"l": [1]}), json!([operation])).unwrap_err();
            assert!(error.starts_with("operation 0: "), "{operation}: {error}");
        }
    }

    #[test]
    fn a_patch_that_doubles_is_stopped() {
        let operations = |path: fn(usize) -> String| -> Value {
            (0..30).map(|index| json!({"op": "copy", "from": "", "path": path(index)})).collect()
        };
        let text = "x".repeat(1 << 18);
        let error = patched(json!({"a": text}), operations(|index| format!("/{index}"))).unwrap_err();
        assert!(error.contains("bytes"), "{error}");
        // Each is deeper than the one before; it would be twice as deep if it were copied into its innermost.
        let deeper: Value =
            (1..=100).map(|times| json!({"op": "copy", "from": "", "path": "/x".repeat(times)})).collect();
        let error = patched(json!({}), deeper).unwrap_err();
        assert!(error.contains("deeper"), "{error}");
    }

    #[test]
    fn merging_does_what_rfc_7386_says() {
        for (target, change, expected) in [
            (json!({"a": "b"}), json!({"a": "c"}), json!({"a": "c"})),
            (json!({"a": "b", "b": 1}), json!({"a": null}), json!({"b": 1})),
            (json!({"a": [1]}), json!({"a": [2, 3]}), json!({"a": [2, 3]})),
            (json!({"a": {"b": 1}}), json!({"a": {"c": {"d": null}}}), json!({"a": {"b": 1, "c": {}}})),
            (json!([1]), json!({"a": {"b": null}}), json!({"a": {}})),
            (json!({"a": 1}), json!(7), json!(7)),
        ] {
            let mut merged = target;
            merge(&mut merged, &change);
            assert_eq!(merged, expected, "{change}");
        }
    }

    #[test]
    fn lists_of_known_kinds_merge_by_their_keys() {
        let mut service = json!({"spec": {"ports": [{"port": 1, "name": "a"}, {"port": 2}]}});
        let change = json!({"spec": {
            "$setElementOrder/ports": [{"port": 3}, {"port": 1}],
            "ports": [{"port": 1, "name": "b"}, {"port": 3}, {"port": 2, "$patch": "delete"}],
        }});
        strategic(Kind::Service, &mut service, &change).unwrap();
        assert_eq!(service, json!({"spec": {"ports": [{"port": 3}, {"port": 1, "name": "b"}]}}));
        let mut policy = json!({"spec": {"ingress": [{}], "podSelector": {"matchLabels": {"a": "b"}}}});
        let change =
            json!({"spec": {"ingress": [], "podSelector": {"$patch": "replace", "matchLabels": {"c": "d"}}}});
        strategic(Kind::NetworkPolicy, &mut policy, &change).unwrap();
        assert_eq!(policy, json!({"spec": {"ingress": [], "podSelector": {"matchLabels": {"c": "d"}}}}));
        assert!(strategic(Kind::Pod, &mut policy, &json!({"$patch": "x"})).is_err());
    }
}
