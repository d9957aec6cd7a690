//! `docs/policy-reference.md`: made of the API's own description and of examples that use every field.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::Path;

use anyhow::{Context, Result, bail};
use bulkhead_model::Kind;
use bulkhead_model::document::{Node, Value as NodeValue, read};
use serde_json::Value;

const PAGE: &str = "docs/policy-reference.md";
const DESCRIPTION: &str = "crates/controller/openapi.json";

/// Writes the page.
pub(crate) fn write(root: &Path) -> Result<()> {
    let (page, problems) = page(root)?;
    if !problems.is_empty() {
        bail!("{}", problems.join("\n"));
    }
    std::fs::write(root.join(PAGE), page).context(PAGE)?;
    println!("{PAGE} written");
    Ok(())
}

/// What is wrong with the page as it stands.
pub(crate) fn check(root: &Path, problems: &mut Vec<String>) -> Result<()> {
    let (page, mut found) = page(root)?;
    problems.append(&mut found);
    if std::fs::read_to_string(root.join(PAGE)).unwrap_or_default() != page {
        problems.push(format!("{PAGE} is not what the API says: run `cargo xtask reference`"));
    }
    Ok(())
}

fn page(root: &Path) -> Result<(String, Vec<String>)> {
    let text = std::fs::read_to_string(root.join(DESCRIPTION)).context(DESCRIPTION)?;
    let document: Value = serde_json::from_str(&text).context(DESCRIPTION)?;
    let mut reference = Reference {
        schemas: &document["components"]["schemas"],
        told: BTreeSet::new(),
        fields: BTreeSet::new(),
    };
    let mut used = BTreeSet::new();
    let mut page = String::from(INTRODUCTION);
    reference.section(&mut page, "Metadata", "##");
    for kind in Kind::ALL.iter().filter(|kind| kind.is_own()) {
        let short = match kind.short() {
            [] => String::new(),
            short => format!(" (`{}`)", short.join("`, `")),
        };
        let about = reference.schemas[kind.as_str()]["description"].as_str().unwrap_or_default();
        let _ = writeln!(page, "## {kind}\n\n{about} On the command line: `{}`{short}.\n", kind.plural());
        let file = format!("docs/reference/{}.yaml", kind.as_str().to_ascii_lowercase());
        let example = std::fs::read_to_string(root.join(&file)).with_context(|| file.clone())?;
        let _ = writeln!(page, "```yaml\n{example}```\n");
        reference.section(&mut page, &format!("{kind}Spec"), "###");
        for node in read(&file, &example).map_err(|problem| anyhow::anyhow!("{problem}"))? {
            for (field, schema) in [("metadata", "Metadata".to_owned()), ("spec", format!("{kind}Spec"))] {
                if let Some(node) = node.child(field) {
                    reference.used(&schema, node, &mut used);
                }
            }
        }
    }
    let set_by_repository = ["resourceVersion", "uid", "generation", "creationTimestamp", "managedFields"];
    let problems = reference
        .fields
        .difference(&used)
        .filter(|field| !set_by_repository.iter().any(|set| **field == format!("Metadata.{set}")))
        .map(|field| format!("docs/reference: the field {field} is in no example"))
        .collect();
    page.truncate(page.trim_end().len());
    page.push('\n');
    Ok((page, problems))
}

const INTRODUCTION: &str = "\
# Policy reference

Every kind of Bulkhead's own with every field, and examples that use all of them. This page is made by `cargo xtask \
reference` from the description of the API (`GET /openapi.json`) and the files in `docs/reference/`; the house rules check \
that it is up to date and that no field is without an example. What policies mean together stands in \
[policy.md](policy.md), kinds of Kubernetes and Calico in [kubernetes.md](kubernetes.md) and [migrating.md](migrating.md).

All objects carry `apiVersion: bulkhead.dev/v1`, `kind`, `metadata` and `spec`. Unknown fields are refused.

";

struct Reference<'a> {
    schemas: &'a Value,
    /// Schemas that have their section.
    told: BTreeSet<String>,
    /// `Schema.field` of every field.
    fields: BTreeSet<String>,
}

impl<'a> Reference<'a> {
    /// A table of fields, followed by one for each schema in it that has none yet.
    fn section(&mut self, page: &mut String, name: &str, level: &str) {
        let schema = &self.schemas[name];
        self.told.insert(name.to_owned());
        let title = if name.ends_with("Spec") { "Fields of `spec`" } else { name };
        let _ = writeln!(page, "{level} {title}\n");
        if let Some(about) = schema["description"].as_str() {
            let _ = writeln!(page, "{about}\n");
        }
        page.push_str("| field | form | |\n|---|---|---|\n");
        let mut inner = Vec::new();
        self.rows(page, name, "", schema, &mut inner);
        page.push('\n');
        for name in inner {
            if !self.told.contains(&name) {
                self.section(page, &name, "###");
            }
        }
    }

    fn rows(
        &mut self,
        page: &mut String,
        name: &str,
        path: &str,
        schema: &'a Value,
        inner: &mut Vec<String>,
    ) {
        let required: Vec<&str> =
            schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        for (field, property) in schema["properties"].as_object().into_iter().flatten() {
            self.fields.insert(format!("{name}.{path}{field}"));
            let needed = if required.contains(&field.as_str()) { ", needed" } else { "" };
            let default = match &property["default"] {
                Value::Null => String::new(),
                Value::String(text) => format!(" Default: `{text}`."),
                other => format!(" Default: `{other}`."),
            };
            let about = property["description"].as_str().unwrap_or_default();
            let target = named(property);
            let form = match &target {
                Some(target) => format!("[{target}](#{}){}", target.to_ascii_lowercase(), many(property)),
                None => form(property),
            };
            let _ = writeln!(page, "| `{path}{field}` | {form}{needed} | {about}{default} |");
            match target {
                Some(target) => inner.push(target),
                None => self.rows(page, name, &format!("{path}{field}."), property, inner),
            }
        }
    }

    /// Notes the fields of a schema that a part of an example uses.
    fn used(&self, name: &str, node: &Node, used: &mut BTreeSet<String>) {
        self.used_in(name, "", &self.schemas[name], node, used);
    }

    fn used_in(&self, name: &str, path: &str, schema: &Value, node: &Node, used: &mut BTreeSet<String>) {
        for (key, value) in node.entries() {
            let field = key.as_str().unwrap_or_default();
            let property = &schema["properties"][field];
            used.insert(format!("{name}.{path}{field}"));
            let Some(target) = named(property) else {
                self.used_in(name, &format!("{path}{field}."), property, value, used);
                continue;
            };
            match &value.value {
                NodeValue::Sequence(items) => items.iter().for_each(|item| self.used(&target, item, used)),
                _ => self.used(&target, value, used),
            }
        }
    }
}

/// The schema that a property, or each item of it, refers to.
fn named(property: &Value) -> Option<String> {
    let options = property["oneOf"].as_array().into_iter().flatten();
    let places =
        [&property["$ref"], &property["items"]["$ref"]].into_iter().chain(options.map(|o| &o["$ref"]));
    places.filter_map(Value::as_str).next().and_then(|text| text.rsplit('/').next()).map(Into::into)
}

fn many(property: &Value) -> &'static str {
    if property["oneOf"].is_array() {
        ", one or a list"
    } else if property["type"] == "array" {
        ", a list"
    } else {
        ""
    }
}

/// How a value looks.
fn form(property: &Value) -> String {
    if let Some(words) = property["enum"].as_array() {
        let words: Vec<_> =
            words.iter().map(|word| format!("`{}`", word.to_string().trim_matches('"'))).collect();
        return words.join(" ");
    }
    if property["oneOf"].is_array() {
        return "one or a list".into();
    }
    match property["type"].as_str() {
        Some("array") => "list".into(),
        Some("string") => "text".into(),
        Some("boolean") => "`true` `false`".into(),
        Some("object") | None => "mapping".into(),
        Some(other) => other.into(),
    }
}
