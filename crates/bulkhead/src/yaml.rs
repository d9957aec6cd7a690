//! JSON values as YAML in block style, the way people write manifests.

use serde_json::Value;

/// One document.
pub(crate) fn document(value: &Value) -> String {
    let mut text = String::new();
    write(&mut text, value, 0, true);
    if !text.ends_with('\n') {
        text.push('\n');
    }
    text.trim_start_matches('\n').to_owned()
}

/// Several documents.
pub(crate) fn documents<'a>(values: impl IntoIterator<Item = &'a Value>) -> String {
    values.into_iter().map(document).collect::<Vec<_>>().join("---\n")
}

fn write(text: &mut String, value: &Value, depth: usize, line_start: bool) {
    match value {
        Value::Object(entries) if !entries.is_empty() => {
            let mut first = line_start;
            for (key, value) in entries {
                if !first {
                    text.push('\n');
                    text.push_str(&"  ".repeat(depth));
                }
                first = false;
                text.push_str(&scalar(key));
                text.push(':');
                member(text, value, depth);
            }
        }
        Value::Array(items) if !items.is_empty() => {
            let mut first = line_start;
            for item in items {
                if !first {
                    text.push('\n');
                    text.push_str(&"  ".repeat(depth));
                }
                first = false;
                text.push_str("- ");
                write(text, item, depth + 1, true);
            }
        }
        Value::String(string) => text.push_str(&scalar(string)),
        other => text.push_str(&other.to_string()),
    }
}

fn member(text: &mut String, value: &Value, depth: usize) {
    match value {
        Value::Object(entries) if !entries.is_empty() => write(text, value, depth + 1, false),
        // Lists stand at the depth of their key, as in Kubernetes manifests.
        Value::Array(items) if !items.is_empty() => write(text, value, depth, false),
        _ => {
            text.push(' ');
            write(text, value, depth, true);
        }
    }
}

/// Plain where no reader could take it for anything else, in single quotes if that spares escapes, quoted
/// like JSON otherwise (which YAML 1.2 contains).
fn scalar(text: &str) -> String {
    let plain = text.starts_with(|c: char| c.is_ascii_alphabetic() || c == '/')
        && text.chars().all(|c| c.is_ascii_alphanumeric() || "-_./() ".contains(c) || c == '=')
        && !text.ends_with(' ')
        && !matches!(
            text.to_ascii_lowercase().as_str(),
            "true" | "false" | "null" | "yes" | "no" | "on" | "off" | "y" | "n"
        );
    let selector = !text.is_empty()
        && text.starts_with(|c: char| c.is_ascii_alphabetic())
        && text.contains(" == \"")
        && !text.contains([':', '#', '\n']);
    let single = text.contains('"') && !text.contains('\'') && !text.chars().any(char::is_control);
    match (plain || selector, single) {
        (true, _) => text.to_owned(),
        (false, true) => format!("'{text}'"),
        (false, false) => Value::from(text).to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_reads_back_the_same() {
        let value = serde_json::json!({
            "kind": "Policy",
            "metadata": {"name": "a", "labels": {"v": "1.10", "t": "true", "e": "", "q": "it's: \"x\" # y"}},
            "spec": {
                "appliesTo": "role == \"web\"", "both": "(a == \"x\" && b)",
                "empty": [], "none": {},
                "ingress": [{"action": "Allow", "from": [{"cidrs": ["10.0.0.0/8", "2001:db8::/32"]}, {"a": null}]}, 5],
                "nested": [[1, 2], ["x"]],
            },
        });
        let text = document(&value);
        let read = bulkhead_model::document::read("t", &text).unwrap_or_else(|e| panic!("{e}\n{text}"));
        assert_eq!(read[0].to_json(), value, "{text}");
    }
}
