//! Which objects a request is about: a namespace, a selector of labels, a selector of fields.

use bulkhead_model::entity::with_automatic_labels;
use bulkhead_model::labels::is_label_key;
use bulkhead_model::{Entity, ObjectKey, Resource, Selector};

use super::place::{Lies, Place};
use crate::api::input::Parameters;
use crate::api::problem::Refusal;

/// Query parameters that choose objects.
pub(crate) const OF_SELECTIONS: [&str; 2] = ["labelSelector", "fieldSelector"];

/// Which objects of a kind.
#[derive(Debug, Clone)]
pub(crate) struct Selection {
    namespace: Option<Lies>,
    labels: Option<Selector>,
    fields: Vec<FieldIs>,
}

/// A condition on the name or the namespace of an object.
#[derive(Debug, Clone, PartialEq, Eq)]
struct FieldIs {
    namespace: bool,
    equal: bool,
    value: String,
}

impl Selection {
    /// What a path and its query choose.
    pub(crate) fn of(place: &Place, parameters: &Parameters) -> Result<Self, Refusal> {
        let [labels, fields] = OF_SELECTIONS;
        let wrong = |name, error: String| Refusal::bad_request(format!("query parameter {name}: {error}"));
        let labels = parameters.text(labels).map(label_selector).transpose();
        let fields = parameters.text(fields).map(field_selector).transpose();
        Ok(Self {
            namespace: place.namespace.clone(),
            labels: labels.map_err(|error| wrong("labelSelector", error))?,
            fields: fields.map_err(|error| wrong("fieldSelector", error))?.unwrap_or_default(),
        })
    }

    /// Whether an object is chosen.
    pub(crate) fn has(&self, resource: &Resource) -> bool {
        self.has_key(&resource.key()) && self.labels.as_ref().is_none_or(|labels| selects(labels, resource))
    }

    /// Whether an object of this key may be chosen.
    pub(crate) fn has_key(&self, key: &ObjectKey) -> bool {
        let here = match &self.namespace {
            None => true,
            Some(lies) => lies.namespace() == key.namespace.as_deref(),
        };
        here && self.fields.iter().all(|field| {
            let found = if field.namespace { key.namespace.as_deref().unwrap_or("") } else { &key.name };
            (found == field.value) == field.equal
        })
    }

    /// The namespace that all of them lie in.
    pub(crate) fn namespace(&self) -> Option<&Lies> {
        self.namespace.as_ref()
    }
}

/// Selectors see the automatic labels too, as they do in policies.
fn selects(selector: &Selector, resource: &Resource) -> bool {
    if let Some(entity) = Entity::of(resource) {
        return selector.matches(&entity.labels);
    }
    let (key, metadata) = (resource.key(), resource.metadata());
    let namespace = key.namespace.as_deref();
    selector.matches(&with_automatic_labels(&metadata.labels, key.kind, namespace, &key.name, None))
}

/// Bulkhead's language or Kubernetes': nothing but the empty text is right in both.
fn label_selector(text: &str) -> Result<Selector, String> {
    let own = match Selector::parse(text) {
        Ok(selector) => return Ok(selector),
        Err(error) => error.to_string(),
    };
    let translated =
        translate(text).and_then(|text| Selector::parse(&text).map_err(|error| error.to_string()));
    translated.map_err(|error| format!("{own}; and as Kubernetes writes it: {error}"))
}

/// A selector of Kubernetes (`a=b,c in (d,e),!f`) in Bulkhead's language.
fn translate(text: &str) -> Result<String, String> {
    let terms = split(text).into_iter().map(|term| term_of(term.trim()));
    Ok(terms.collect::<Result<Vec<_>, _>>()?.join(" && "))
}

/// At the commas outside of parentheses.
fn split(text: &str) -> Vec<&str> {
    let mut inside = false;
    text.split(|c| {
        match c {
            '(' => inside = true,
            ')' => inside = false,
            _ => {}
        }
        c == ',' && !inside
    })
    .collect()
}

fn term_of(term: &str) -> Result<String, String> {
    let key = |text: &str| {
        let text = text.trim();
        if is_label_key(text) { Ok(text.to_owned()) } else { Err(format!("{text:?} is no key of a label")) }
    };
    if let Some(absent) = term.strip_prefix('!') {
        return Ok(format!("!has({})", key(absent)?));
    }
    // The longer operators first, since = is a part of them.
    for (operator, own) in [("!=", "!="), ("==", "=="), ("=", "==")] {
        if let Some((left, right)) = term.split_once(operator) {
            return Ok(format!("{} {own} {}", key(left)?, quoted(right)?));
        }
    }
    let Some((left, list)) = term.split_once('(') else { return Ok(format!("has({})", key(term)?)) };
    let list = list.strip_suffix(')').ok_or_else(|| format!("{term:?} does not end with a parenthesis"))?;
    let values = list.split(',').map(quoted).collect::<Result<Vec<_>, _>>()?.join(", ");
    let mut words = left.split_whitespace();
    let own = match (words.next(), words.next(), words.next()) {
        (Some(name), Some("in"), None) => format!("{} in {{{values}}}", key(name)?),
        (Some(name), Some("notin"), None) => format!("{} not in {{{values}}}", key(name)?),
        _ => return Err(format!("expected KEY in (…) or KEY notin (…), found {term:?}")),
    };
    Ok(own)
}

fn quoted(value: &str) -> Result<String, String> {
    let value = value.trim();
    let fits = value.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.'));
    if fits { Ok(format!("\"{value}\"")) } else { Err(format!("{value:?} is no value of a label")) }
}

/// `metadata.name=a,metadata.namespace!=b`.
fn field_selector(text: &str) -> Result<Vec<FieldIs>, String> {
    let term = |term: &str| {
        let operators = [("!=", false), ("==", true), ("=", true)];
        let found = operators.iter().find_map(|(text, equal)| Some((term.split_once(text)?, *equal)));
        let ((field, value), equal) = found.ok_or_else(|| format!("expected FIELD=VALUE, found {term:?}"))?;
        let namespace = match field.trim() {
            "metadata.name" => false,
            "metadata.namespace" => true,
            other => return Err(format!("expected metadata.name or metadata.namespace, found {other:?}")),
        };
        let value = value.trim();
        // What is in no namespace is named like that here, too.
        let value = if namespace && value == bulkhead_model::resource::NO_NAMESPACE { "" } else { value };
        Ok(FieldIs { namespace, equal, value: value.to_owned() })
    };
    text.split(',').filter(|text| !text.trim().is_empty()).map(term).collect()
}

#[cfg(test)]
mod tests {
    use bulkhead_model::Labels;

    use super::*;

    #[test]
    fn both_languages_are_understood() {
        let mut labels = Labels::new();
        labels.insert("app", "web").unwrap();
        labels.insert("a.b/tier", "1").unwrap();
        for (text, expected) in [
            ("app=web", true),
            ("app == 'web'", true),
            ("app==web,a.b/tier=1", true),
            ("app!=web", false),
            ("other!=web", true),
            ("app in (db, web)", true),
            ("app notin (db,web),app", false),
            ("other notin (db)", true),
            ("!other,a.b/tier", true),
            ("!app", false),
            ("other=", false),
            ("has(app) && all()", true),
        ] {
            assert_eq!(label_selector(text).unwrap().matches(&labels), expected, "{text}");
        }
        for wrong in ["app in db", "app in (db", "a b", "app=we'b", "=x", "app within (x)", ","] {
            let error = label_selector(wrong).unwrap_err();
            assert!(error.contains("as Kubernetes writes it"), "{wrong}: {error}");
        }
    }

    #[test]
    fn fields_are_names_and_namespaces() {
        let fields = field_selector("metadata.name=a,metadata.namespace!=b").unwrap();
        assert_eq!(fields.len(), 2);
        assert!(fields[0].equal && !fields[1].equal && fields[1].namespace);
        assert!(field_selector("status.phase=Running").unwrap_err().contains("metadata.name"));
        assert!(field_selector("metadata.name").is_err());
    }
}
