use serde_json::{Value, json};

use super::*;

fn by(manager: &str) -> By<'_> {
    By { manager, api_version: "v1", time: "now" }
}

fn spec(spec: &Value) -> Value {
    json!({ "apiVersion": "v1", "kind": "K", "metadata": { "name": "a" }, "spec": spec })
}

/// An apply, and what everybody owns then.
fn apply(
    entries: &[Entry],
    live: &Value,
    config: &Value,
    manager: &str,
    force: bool,
) -> Result<(Value, Vec<Entry>), Vec<Conflict>> {
    let after = merged(live, entries, config, manager);
    applied(entries, Some(live), (config, &after), by(manager), force).map(|entries| (after, entries))
}

fn owners(entries: &[Entry]) -> Value {
    entries
        .iter()
        .map(|entry| {
            json!([entry.manager, entry.operation, serde_json::to_value(entry).unwrap()["fieldsV1"]])
        })
        .collect()
}

#[test]
fn what_a_manager_says_no_more_goes_unless_another_says_it() {
    let first = spec(&json!({ "a": 1, "b": { "c": 2 }, "l": [1] }));
    let empty = json!({ "apiVersion": "v1", "kind": "K", "metadata": { "name": "a" } });
    let (live, entries) = apply(&[], &empty, &first, "one", false).unwrap();
    assert_eq!(live, first);
    let (live, entries) = apply(&entries, &live, &spec(&json!({ "a": 1 })), "two", false).unwrap();
    let (live, entries) = apply(&entries, &live, &spec(&json!({ "l": [1, 2] })), "one", false).unwrap();
    assert_eq!(live, spec(&json!({ "a": 1, "l": [1, 2] })), "b is gone with its parent, a is the other's");
    assert_eq!(
        owners(&entries),
        json!([["two", "Apply", {"f:spec": {"f:a": {}}}], ["one", "Apply", {"f:spec": {"f:l": {}}}]])
    );
}

#[test]
fn what_another_owns_is_changed_by_force_only() {
    let live = spec(&json!({ "a": 1, "l": [1] }));
    let entries = updated(&[], &json!({}), &live, by("editor"));
    assert_eq!(owners(&entries), json!([["editor", "Update", {"f:spec": {"f:a": {}, "f:l": {}}}]]));
    let same = apply(&entries, &live, &spec(&json!({ "a": 1 })), "tool", false).unwrap().1;
    assert_eq!(same.len(), 2, "both own what both say");
    let config = spec(&json!({ "a": 2, "l": [2] }));
    let conflicts = apply(&entries, &live, &config, "tool", false).unwrap_err();
    let fields: Vec<_> = conflicts.iter().map(|one| (one.manager.as_str(), one.field.as_str())).collect();
    assert_eq!(fields, [("editor", ".spec.a"), ("editor", ".spec.l")]);
    let (live, entries) = apply(&entries, &live, &config, "tool", true).unwrap();
    assert_eq!(live, config);
    assert_eq!(owners(&entries), json!([["tool", "Apply", {"f:spec": {"f:a": {}, "f:l": {}}}]]));
    // Who changes a field by hand takes it.
    let edited = spec(&json!({ "a": 3, "l": [2] }));
    let entries = updated(&entries, &live, &edited, by("editor"));
    assert_eq!(
        owners(&entries),
        json!([["tool", "Apply", {"f:spec": {"f:l": {}}}], ["editor", "Update", {"f:spec": {"f:a": {}}}]])
    );
}

#[test]
fn what_was_there_before_belongs_to_nobody_in_particular() {
    let live = spec(&json!({ "a": 1, "b": 2 }));
    let conflicts = apply(&[], &live, &spec(&json!({ "a": 2 })), "tool", false).unwrap_err();
    assert_eq!(conflicts[0].manager, BEFORE);
    let (_, entries) = apply(&[], &live, &spec(&json!({ "a": 1 })), "tool", false).unwrap();
    assert_eq!(entries.len(), 2);
}

#[test]
fn a_mapping_that_becomes_a_value_is_one_conflict() {
    let live = spec(&json!({ "a": { "b": 1 } }));
    let entries = updated(&[], &json!({}), &live, by("editor"));
    let conflicts = apply(&entries, &live, &spec(&json!({ "a": 7 })), "tool", false).unwrap_err();
    assert_eq!(conflicts[0].field, ".spec.a.b");
}

#[test]
fn entries_are_read_back_and_updaters_bounded() {
    let mut live = spec(&json!({ "e": {}, "x": 0 }));
    let mut entries = updated(&[], &json!({}), &live, by("first"));
    for index in 0..UPDATERS_MAX * 2 {
        let mut next = live.clone();
        next["spec"][format!("f{index}")] = json!(index);
        entries = updated(&entries, &live, &next, by(&format!("m{index}")));
        live = next;
        let text = serde_json::to_string(&entries).unwrap();
        assert_eq!(serde_json::from_str::<Vec<Entry>>(&text).unwrap(), entries, "{text}");
    }
    assert!(entries.len() <= UPDATERS_MAX, "{}", entries.len());
    let all: usize = entries.iter().map(|entry| entry.fields.len()).sum();
    assert_eq!(all, UPDATERS_MAX * 2 + 2);
}

#[test]
fn many_fields_are_compared_in_good_time() {
    let object = |value: u32| {
        let fields: Map<_, _> = (0..20_000).map(|index| (format!("f{index}"), json!(value))).collect();
        spec(&Value::Object(fields))
    };
    let started = std::time::Instant::now();
    let entries = updated(&[], &json!({}), &object(1), by("one"));
    let entries = updated(&entries, &object(1), &object(2), by("two"));
    assert_eq!(apply(&entries, &object(2), &object(3), "three", false).unwrap_err().len(), 20_000);
    assert!(started.elapsed() < std::time::Duration::from_secs(20), "{:?}", started.elapsed());
}
