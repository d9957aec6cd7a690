//! The one reader of YAML and JSON.
//!
//! Text becomes a tree of [`Node`]s that know their position, and the tree becomes [`Resource`]s. All
//! problems of a text are found in one go, each with source, line, column, field path, what was expected
//! and, where there is one, the nearest right word. Unknown and duplicate fields are problems. YAML
//! anchors and aliases are refused: no policy needs them and they can blow up.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::resource::Resource;

mod decode;
mod tree;

pub use decode::{Decoder, Fields};
pub use tree::read;
pub use tree::{Node, Value};

/// Largest text that is read, in bytes.
pub const DOCUMENT_BYTES_MAX: usize = 16 << 20;
/// Deepest nesting of mappings and sequences.
pub const DOCUMENT_DEPTH_MAX: usize = 64;
/// Most problems that are reported for one text.
pub const PROBLEMS_MAX: usize = 100;

/// A place in a text. Lines and columns count from 1; columns count characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
pub struct Position {
    /// Line.
    pub line: u32,
    /// Column.
    pub column: u32,
}

/// Something wrong in a text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// File name, or whatever names the text.
    pub source: String,
    /// Line, from 1; 0 if the text has no lines (a value from a program).
    pub line: u32,
    /// Column, from 1.
    pub column: u32,
    /// Path of the field, like `spec.ingress[0].from.selector`.
    pub path: String,
    /// What is wrong and what was expected.
    pub message: String,
    /// The nearest right word.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub suggestion: Option<String>,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.source)?;
        if self.line > 0 {
            write!(f, ":{}:{}", self.line, self.column)?;
        }
        f.write_str(": ")?;
        if !self.path.is_empty() {
            write!(f, "{}: ", self.path)?;
        }
        f.write_str(&self.message)?;
        if let Some(suggestion) = &self.suggestion {
            write!(f, "; did you mean {suggestion}?")?;
        }
        Ok(())
    }
}

/// One resource with the text it came from.
#[derive(Debug, Clone)]
pub struct Document {
    /// The resource.
    pub resource: Resource,
    /// Name of the text.
    pub source: String,
    node: Node,
}

impl Document {
    /// Where a field stands, e.g. `spec.tier`; the nearest existing parent's place if it is absent.
    pub fn position_of(&self, path: &str) -> Position {
        let mut node = &self.node;
        for name in path.split(['.', '[', ']']).filter(|name| !name.is_empty()) {
            match node.child(name) {
                Some(child) => node = child,
                // What may be one or a list of them, and is one.
                None if matches!(node.value, Value::Mapping(_)) && name.parse::<usize>().is_ok() => {}
                None => break,
            }
        }
        node.position
    }

    /// A problem with one field of this document.
    pub fn problem(&self, path: &str, message: impl Into<String>, suggestion: Option<String>) -> Problem {
        let Position { line, column } = self.position_of(path);
        Problem {
            source: self.source.clone(),
            line,
            column,
            path: path.into(),
            message: message.into(),
            suggestion,
        }
    }
}

/// Reads all resources of a text: one or more YAML documents, or JSON; `kind: List` is unfolded.
///
/// # Errors
/// With every problem found, [`PROBLEMS_MAX`] at most; then nothing of the text is to be used.
pub fn parse(source: &str, text: &str) -> Result<Vec<Document>, Vec<Problem>> {
    let roots = read(source, text).map_err(|problem| vec![problem])?;
    of_nodes(source, roots)
}

/// Reads what stands in a text that holds other things too.
///
/// # Errors
/// As [`parse`].
pub fn of_nodes(source: &str, nodes: Vec<Node>) -> Result<Vec<Document>, Vec<Problem>> {
    let mut documents = Vec::new();
    let mut problems = Vec::new();
    for node in nodes.into_iter().flat_map(unfold) {
        let mut decoder = Decoder::new(source);
        match crate::resource::decode(&mut decoder, &node) {
            Some(resource) if decoder.problems.is_empty() => {
                documents.push(Document { resource, source: source.into(), node });
            }
            _ => problems.append(&mut decoder.problems),
        }
    }
    problems.truncate(PROBLEMS_MAX);
    if problems.is_empty() { Ok(documents) } else { Err(problems) }
}

/// Reads one resource from a JSON value made by a program.
///
/// # Errors
/// With every problem found.
pub fn from_value(source: &str, value: &serde_json::Value) -> Result<Resource, Vec<Problem>> {
    let node = Node::from_json(value);
    let mut decoder = Decoder::new(source);
    match crate::resource::decode(&mut decoder, &node) {
        Some(resource) if decoder.problems.is_empty() => Ok(resource),
        _ => Err(decoder.problems),
    }
}

/// The items of a `List`, or of a list of one kind (`PodList`), whose items may leave out what the list says for them.
fn unfold(root: Node) -> Vec<Node> {
    let text = |name| root.child(name).and_then(Node::as_str).map(ToOwned::to_owned);
    let (kind, version) = (text("kind"), text("apiVersion"));
    let of = kind.as_deref().and_then(|kind| kind.strip_suffix("List")).map(ToOwned::to_owned);
    let (Some(of), Some(Value::Sequence(_))) = (of, root.child("items").map(|items| &items.value)) else {
        return vec![root];
    };
    let said = [("apiVersion", version), ("kind", Some(of))];
    let Value::Mapping(entries) = root.value else { return Vec::new() };
    let items = entries.into_iter().filter(|(key, _)| key.as_str() == Some("items"));
    let mut items: Vec<Node> = items
        .flat_map(|(_, items)| match items.value {
            Value::Sequence(items) => items,
            _ => Vec::new(),
        })
        .collect();
    for item in &mut items {
        let position = item.position;
        for (name, value) in &said {
            let missing = item.child(name).is_none();
            let filled = value.as_ref().filter(|value| missing && !value.is_empty());
            if let (Value::Mapping(entries), Some(value)) = (&mut item.value, filled) {
                let node = |text: &str| Node { position, value: Value::String(text.to_owned()) };
                entries.push((node(name), node(value)));
            }
        }
    }
    items
}
