//! Who set which fields of an object: what server-side apply decides by. Pure.
//!
//! Mappings are owned field by field, lists and everything else as one value. Two managers may own a field if they say the
//! same; who changes what another owns takes it from him, except by an apply, which is refused unless it is forced.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

/// Managers whose changes are told apart, as in Kubernetes; the oldest of more become one.
const UPDATERS_MAX: usize = 10;
/// What the oldest become.
const ANCIENT: &str = "ancient-changes";
/// Who set what was there before anybody applied it.
const BEFORE: &str = "before-first-apply";
/// Most managers that apply one object; far above what a fleet has tools.
pub(crate) const APPLIERS_MAX: usize = 100;
/// What the repository sets, or what names the object.
const NOT_OWNED: [&str; 10] = [
    "name",
    "namespace",
    "generateName",
    "uid",
    "resourceVersion",
    "generation",
    "creationTimestamp",
    "deletionTimestamp",
    "managedFields",
    "selfLink",
];

/// From the outermost field to the innermost.
type Path = Vec<String>;

/// How a manager came by his fields.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Operation {
    /// He said that they should be so: what he says no more goes.
    Apply,
    /// He changed them.
    Update,
}

/// The fields of one manager, as Kubernetes writes them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Entry {
    #[serde(default)]
    pub(crate) manager: String,
    pub(crate) operation: Operation,
    #[serde(default)]
    pub(crate) api_version: String,
    #[serde(default)]
    pub(crate) time: String,
    #[serde(default = "fields_type")]
    fields_type: String,
    #[serde(rename = "fieldsV1", with = "v1")]
    fields: BTreeSet<Path>,
}

fn fields_type() -> String {
    "FieldsV1".into()
}

/// A field that somebody else owns and that an apply would change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Conflict {
    pub(crate) manager: String,
    pub(crate) api_version: String,
    /// As Kubernetes writes it: `.spec.order`.
    pub(crate) field: String,
}

/// Who does something, and when.
#[derive(Debug, Clone, Copy)]
pub(crate) struct By<'a> {
    pub(crate) manager: &'a str,
    pub(crate) api_version: &'a str,
    pub(crate) time: &'a str,
}

impl Entry {
    fn new(by: By<'_>, operation: Operation, fields: BTreeSet<Path>) -> Self {
        Self {
            manager: by.manager.to_owned(),
            operation,
            api_version: by.api_version.to_owned(),
            time: by.time.to_owned(),
            fields_type: fields_type(),
            fields,
        }
    }

    fn is(&self, manager: &str, operation: Operation) -> bool {
        self.manager == manager && self.operation == operation
    }
}

/// `{"f:spec": {"f:order": {}}}` and back.
mod v1 {
    use std::collections::BTreeSet;

    use serde::{Deserialize, Deserializer, Serialize, Serializer};
    use serde_json::{Value, json};

    use super::Path;

    pub(super) fn serialize<S: Serializer>(
        fields: &BTreeSet<Path>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        let mut root = json!({});
        for path in fields {
            let mut node = &mut root;
            for name in path {
                node = &mut node[format!("f:{name}")];
                if node.is_null() {
                    *node = json!({});
                }
            }
            // Itself, beside what may be below it.
            if fields.range(path.clone()..).nth(1).is_some_and(|next| next.starts_with(path)) {
                node["."] = json!({});
            }
        }
        root.serialize(serializer)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<BTreeSet<Path>, D::Error> {
        let mut fields = BTreeSet::new();
        read(&Value::deserialize(deserializer)?, &mut Vec::new(), &mut fields);
        Ok(fields)
    }

    fn read(node: &Value, path: &mut Path, into: &mut BTreeSet<Path>) {
        let inner = node.as_object().into_iter().flatten();
        let mut leaf = !path.is_empty();
        for (name, node) in inner {
            // Keys and values of lists: lists are owned as a whole here.
            let Some(name) = name.strip_prefix("f:") else { continue };
            leaf = false;
            path.push(name.to_owned());
            read(node, path, into);
            path.pop();
        }
        if leaf || node.get(".").is_some() && !path.is_empty() {
            into.insert(path.clone());
        }
    }
}

/// The fields that can be owned, with their values.
fn leaves(object: &Value) -> BTreeMap<Path, &Value> {
    let mut found = BTreeMap::new();
    for (name, value) in object.as_object().into_iter().flatten() {
        match name.as_str() {
            "apiVersion" | "kind" => {}
            "metadata" => {
                let inner = value.as_object().into_iter().flatten();
                for (name, value) in inner.filter(|(name, _)| !NOT_OWNED.contains(&name.as_str())) {
                    below(value, vec!["metadata".into(), name.clone()], &mut found);
                }
            }
            _ => below(value, vec![name.clone()], &mut found),
        }
    }
    found
}

fn below<'a>(value: &'a Value, path: Path, into: &mut BTreeMap<Path, &'a Value>) {
    match value {
        Value::Object(fields) if !fields.is_empty() => {
            for (name, value) in fields {
                let mut path = path.clone();
                path.push(name.clone());
                below(value, path, into);
            }
        }
        // Nobody has said anything.
        Value::Null => {}
        _ => drop(into.insert(path, value)),
    }
}

fn at<'a>(object: &'a Value, path: &[String]) -> Option<&'a Value> {
    path.iter().try_fold(object, |value, name| value.get(name))
}

/// Whether a path, what it lies in or what lies in it is among others. Objects may have many fields: no look at each.
fn touched(path: &[String], others: &BTreeSet<Path>) -> bool {
    let below = others.range::<[String], _>((Bound::Included(path), Bound::Unbounded)).next();
    below.is_some_and(|other| other.starts_with(path))
        || (1..path.len()).any(|length| others.contains(&path[..length]))
}

/// What everybody owns, once fields that are not there any more are left out.
fn standing(entries: &[Entry], live: &Value) -> Vec<Entry> {
    let mut entries = entries.to_vec();
    for entry in &mut entries {
        entry.fields.retain(|path| at(live, path).is_some());
    }
    entries.retain(|entry| !entry.fields.is_empty());
    entries
}

/// After a change that is no apply: who changed a field owns it, and nobody else does.
pub(crate) fn updated(entries: &[Entry], before: &Value, after: &Value, by: By<'_>) -> Vec<Entry> {
    let (old, new) = (leaves(before), leaves(after));
    let changed: BTreeSet<Path> = new
        .iter()
        .filter(|(path, value)| old.get(*path) != Some(value))
        .map(|(path, _)| path.clone())
        .collect();
    let mut gone: BTreeSet<Path> = old.keys().filter(|path| !new.contains_key(*path)).cloned().collect();
    gone.extend(changed.iter().cloned());
    let mut entries = standing(entries, before);
    for entry in &mut entries {
        entry.fields.retain(|path| !touched(path, &gone));
    }
    match entries.iter_mut().find(|entry| entry.is(by.manager, Operation::Update)) {
        Some(own) => {
            own.time = by.time.to_owned();
            own.fields.extend(changed);
        }
        None => entries.push(Entry::new(by, Operation::Update, changed)),
    }
    entries.retain(|entry| !entry.fields.is_empty());
    together(entries)
}

/// Makes the oldest of too many updaters one.
fn together(mut entries: Vec<Entry>) -> Vec<Entry> {
    let updaters =
        |entries: &[Entry]| entries.iter().filter(|entry| entry.operation == Operation::Update).count();
    while updaters(&entries) > UPDATERS_MAX {
        let Some(oldest) = entries.iter().position(|entry| entry.operation == Operation::Update) else {
            break;
        };
        let oldest = entries.remove(oldest);
        match entries.iter_mut().find(|entry| entry.is(ANCIENT, Operation::Update)) {
            Some(ancient) => ancient.fields.extend(oldest.fields),
            // At the end, so that the next oldest comes into it.
            None => entries.push(Entry { manager: ANCIENT.into(), ..oldest }),
        }
    }
    entries
}

/// What an apply makes of an object, before it is known whether it may: what the manager says, and without what he said once
/// and nobody else says.
pub(crate) fn merged(live: &Value, entries: &[Entry], config: &Value, manager: &str) -> Value {
    let said: BTreeSet<Path> = leaves(config).into_keys().collect();
    let mut object = live.clone();
    for own in entries.iter().filter(|entry| entry.is(manager, Operation::Apply)) {
        for path in own.fields.iter().filter(|path| !touched(path, &said)) {
            let mut others = entries.iter().filter(|entry| !entry.is(manager, Operation::Apply));
            if !others.any(|other| touched(path, &other.fields)) {
                remove(&mut object, path);
            }
        }
    }
    put(&mut object, config);
    object
}

/// Removes a field, and mappings that are empty then.
fn remove(object: &mut Value, path: &[String]) {
    let (Some(fields), Some((first, rest))) = (object.as_object_mut(), path.split_first()) else { return };
    let Some(inner) = fields.get_mut(first).filter(|_| !rest.is_empty()) else {
        fields.remove(first);
        return;
    };
    remove(inner, rest);
    if inner.as_object().is_some_and(Map::is_empty) {
        fields.remove(first);
    }
}

fn put(target: &mut Value, config: &Value) {
    match (target, config) {
        (Value::Object(target), Value::Object(fields)) => {
            for (name, value) in fields.iter().filter(|(_, value)| !value.is_null()) {
                put(target.entry(name.as_str()).or_insert(Value::Null), value);
            }
        }
        (target, value) => *target = value.clone(),
    }
}

/// After an apply of `config` that made `after` of `live`.
///
/// # Errors
/// With every field that somebody else owns and that is another now, unless it is forced.
pub(crate) fn applied(
    entries: &[Entry],
    live: Option<&Value>,
    (config, after): (&Value, &Value),
    by: By<'_>,
    force: bool,
) -> Result<Vec<Entry>, Vec<Conflict>> {
    let nothing = json!({});
    let live = live.unwrap_or(&nothing);
    let mut entries = standing(entries, live);
    if entries.is_empty() {
        let before = By { manager: BEFORE, ..by };
        entries.push(Entry::new(before, Operation::Update, leaves(live).into_keys().collect()));
    }
    // As they are kept, which may be in another form than they were written.
    let mut own: BTreeSet<Path> = BTreeSet::new();
    for path in leaves(config).into_keys() {
        if let Some(value) = at(after, &path) {
            let mut kept = BTreeMap::new();
            below(value, path, &mut kept);
            own.extend(kept.into_keys());
        }
    }
    let mut conflicts = Vec::new();
    for entry in entries.iter_mut().filter(|entry| !entry.is(by.manager, Operation::Apply)) {
        entry.fields.retain(|path| {
            let changes = touched(path, &own) && at(live, path) != at(after, path);
            if changes {
                let field = path.iter().map(|name| format!(".{name}")).collect();
                let (manager, api_version) = (entry.manager.clone(), entry.api_version.clone());
                conflicts.push(Conflict { manager, api_version, field });
            }
            !changes
        });
    }
    if !conflicts.is_empty() && !force {
        return Err(conflicts);
    }
    let before = entries.iter().find(|entry| entry.is(by.manager, Operation::Apply)).cloned();
    entries.retain(|entry| !entry.fields.is_empty() && !entry.is(by.manager, Operation::Apply));
    // Nobody has done anything if nothing is another.
    let time = before.filter(|before| before.fields == own).map(|before| before.time);
    let by = By { time: time.as_deref().unwrap_or(by.time), ..by };
    entries.push(Entry::new(by, Operation::Apply, own));
    Ok(entries)
}

#[cfg(test)]
mod tests;
