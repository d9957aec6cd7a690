//! Findings as SARIF 2.1.0 (OASIS), which code review tools show beside the lines they are about.

use serde_json::{Value, json};

/// Where the schema lies.
const SCHEMA: &str = "https://json.schemastore.org/sarif-2.1.0.json";

/// A kind of finding.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SarifRule {
    pub(crate) id: &'static str,
    pub(crate) name: &'static str,
    pub(crate) short: &'static str,
    pub(crate) full: &'static str,
    pub(crate) level: &'static str,
}

/// One finding.
#[derive(Debug, Clone)]
pub(crate) struct SarifResult<'a> {
    /// Which of the rules.
    pub(crate) rule: &'static str,
    /// `error`, `warning` or `note`.
    pub(crate) level: &'static str,
    pub(crate) message: String,
    pub(crate) file: &'a str,
    /// From 1; 0: not known.
    pub(crate) line: u32,
    pub(crate) column: u32,
}

/// The whole log.
pub(crate) fn document(rules: &[SarifRule], results: &[SarifResult<'_>]) -> Value {
    let described: Vec<Value> = rules
        .iter()
        .map(|rule| {
            json!({
                "id": rule.id,
                "name": rule.name,
                "shortDescription": { "text": rule.short },
                "fullDescription": { "text": rule.full },
                "defaultConfiguration": { "level": rule.level },
            })
        })
        .collect();
    let results: Vec<Value> = results.iter().map(|found| result(rules, found)).collect();
    json!({
        "$schema": SCHEMA,
        "version": "2.1.0",
        "runs": [{
            "tool": { "driver": {
                "name": "bulkhead",
                "version": env!("CARGO_PKG_VERSION"),
                "rules": described,
            } },
            "columnKind": "unicodeCodePoints",
            "results": results,
        }],
    })
}

fn result(rules: &[SarifRule], found: &SarifResult<'_>) -> Value {
    let mut place = json!({ "artifactLocation": { "uri": uri(found.file) } });
    if found.line > 0 {
        place["region"] = json!({ "startLine": found.line, "startColumn": found.column.max(1) });
    }
    json!({
        "ruleId": found.rule,
        "ruleIndex": rules.iter().position(|rule| rule.id == found.rule),
        "level": found.level,
        "message": { "text": found.message },
        "locations": [{ "physicalLocation": place }],
    })
}

/// A path as a relative or absolute reference (RFC 3986).
fn uri(path: &str) -> String {
    let plain = path.strip_prefix("./").unwrap_or(path);
    let mut uri = String::with_capacity(plain.len());
    for byte in plain.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~/".contains(&byte) {
            uri.push(char::from(byte));
        } else {
            uri.push_str(&format!("%{byte:02X}"));
        }
    }
    uri
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_become_references() {
        assert_eq!(uri("./a/b c#1.yaml"), "a/b%20c%231.yaml");
        assert_eq!(uri("standard input"), "standard%20input");
    }

    #[test]
    fn what_has_no_line_has_no_region() {
        let rule = SarifRule { id: "X1", name: "x", short: "s", full: "f", level: "error" };
        let found =
            SarifResult { rule: "X1", level: "error", message: "m".into(), file: "f", line: 0, column: 0 };
        let log = document(&[rule], &[found]);
        assert_eq!(log["runs"][0]["results"][0]["ruleIndex"], 0);
        assert!(log["runs"][0]["results"][0]["locations"][0]["physicalLocation"]["region"].is_null());
    }
}
