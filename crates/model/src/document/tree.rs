//! Text to a tree of values with positions.

use saphyr_parser::{Event, Parser, ScalarStyle, Span};

use super::{DOCUMENT_BYTES_MAX, DOCUMENT_DEPTH_MAX, Position, Problem};

/// A value and where it stands.
#[derive(Debug, Clone, PartialEq)]
pub struct Node {
    /// Where its first character is; 0:0 if it came from a program.
    pub position: Position,
    /// The value.
    pub value: Value,
}

/// What a node holds. Plain scalars keep their text, since a label value `1.10` is not the number 1.1.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// Nothing, `null` or `~`.
    Null,
    /// `true` or `false`, unquoted.
    Bool(bool),
    /// An unquoted number, as written.
    Number(String),
    /// Any other scalar.
    String(String),
    /// A list.
    Sequence(Vec<Node>),
    /// Keys and values in the order written; duplicates are found by the decoder.
    Mapping(Vec<(Node, Node)>),
}

impl Node {
    /// Member of a mapping by name, or of a sequence by decimal index.
    pub fn child(&self, name: &str) -> Option<&Self> {
        match &self.value {
            Value::Mapping(entries) => {
                entries.iter().find(|(key, _)| key.as_str() == Some(name)).map(|(_, value)| value)
            }
            Value::Sequence(items) => items.get(name.parse::<usize>().ok()?),
            _ => None,
        }
    }

    /// The pairs of a mapping; none if it is something else.
    pub fn entries(&self) -> &[(Self, Self)] {
        match &self.value {
            Value::Mapping(entries) => entries,
            _ => &[],
        }
    }

    /// The text of a string.
    pub fn as_str(&self) -> Option<&str> {
        match &self.value {
            Value::String(text) => Some(text),
            _ => None,
        }
    }

    /// What it is, for messages.
    pub fn describe(&self) -> String {
        match &self.value {
            Value::Null => "nothing".into(),
            Value::Bool(value) => value.to_string(),
            Value::Number(text) => format!("the number {text}"),
            Value::String(text) if text.chars().count() <= 60 => format!("{text:?}"),
            Value::String(_) => "a long text".into(),
            Value::Sequence(_) => "a list".into(),
            Value::Mapping(_) => "a mapping".into(),
        }
    }

    /// The same without positions. Numbers too large for JSON become texts.
    pub fn to_json(&self) -> serde_json::Value {
        use serde_json::Value as Json;
        match &self.value {
            Value::Null => Json::Null,
            Value::Bool(value) => Json::Bool(*value),
            Value::Number(text) => serde_json::from_str(text).unwrap_or_else(|_| Json::String(text.clone())),
            Value::String(text) => Json::String(text.clone()),
            Value::Sequence(items) => items.iter().map(Self::to_json).collect(),
            Value::Mapping(entries) => entries
                .iter()
                .map(|(key, value)| (key.as_str().unwrap_or_default().to_owned(), value.to_json()))
                .collect::<serde_json::Map<_, _>>()
                .into(),
        }
    }

    /// A tree without positions.
    pub fn from_json(value: &serde_json::Value) -> Self {
        use serde_json::Value as Json;
        let value = match value {
            Json::Null => Value::Null,
            Json::Bool(value) => Value::Bool(*value),
            Json::Number(number) => Value::Number(number.to_string()),
            Json::String(text) => Value::String(text.clone()),
            Json::Array(items) => Value::Sequence(items.iter().map(Self::from_json).collect()),
            Json::Object(entries) => Value::Mapping(
                entries
                    .iter()
                    .map(|(key, value)| {
                        let key = Self { position: Position::default(), value: Value::String(key.clone()) };
                        (key, Self::from_json(value))
                    })
                    .collect(),
            ),
        };
        Self { position: Position::default(), value }
    }
}

/// A collection that is still open.
struct Open {
    position: Position,
    mapping: bool,
    items: Vec<Node>,
}

/// The documents of a text as trees; empty ones are left out.
///
/// # Errors
/// At the first place that is no YAML, or is nested too deep, or is an alias.
pub fn read(source: &str, text: &str) -> Result<Vec<Node>, Problem> {
    let problem = |position: Position, message: String| Problem {
        source: source.into(),
        line: position.line,
        column: position.column,
        path: String::new(),
        message,
        suggestion: None,
    };
    if text.len() > DOCUMENT_BYTES_MAX {
        return Err(problem(Position::default(), format!("larger than {DOCUMENT_BYTES_MAX} bytes")));
    }
    let mut parser = Parser::new_from_str(text);
    let mut open: Vec<Open> = Vec::new();
    let mut roots = Vec::new();
    while let Some(event) = parser.next_event() {
        let (event, span) = event.map_err(|error| {
            let position = mark(&Span::empty(*error.marker()));
            problem(position, format!("not valid YAML: {}", error.info()))
        })?;
        let position = mark(&span);
        let complete = match event {
            Event::StreamEnd => break,
            Event::Nothing | Event::StreamStart | Event::DocumentStart(_) | Event::DocumentEnd => continue,
            Event::Alias(_) => {
                return Err(problem(position, "aliases are not supported: write it out".into()));
            }
            Event::SequenceStart(..) | Event::MappingStart(..) => {
                if open.len() >= DOCUMENT_DEPTH_MAX {
                    return Err(problem(position, format!("nested deeper than {DOCUMENT_DEPTH_MAX} levels")));
                }
                open.push(Open {
                    position,
                    mapping: matches!(event, Event::MappingStart(..)),
                    items: Vec::new(),
                });
                continue;
            }
            Event::Scalar(text, style, ..) => {
                let value = match style {
                    ScalarStyle::Plain => plain(&text),
                    _ => Value::String(text.into_owned()),
                };
                Node { position, value }
            }
            Event::SequenceEnd | Event::MappingEnd => match open.pop() {
                Some(closed) => close(closed),
                None => return Err(problem(position, "unexpected end of a collection".into())),
            },
        };
        match open.last_mut() {
            Some(parent) => parent.items.push(complete),
            None if complete.value == Value::Null => {}
            None => roots.push(complete),
        }
    }
    Ok(roots)
}

fn close(open: Open) -> Node {
    let value = if open.mapping {
        let mut items = open.items.into_iter();
        let mut entries = Vec::new();
        while let (Some(key), Some(value)) = (items.next(), items.next()) {
            entries.push((key, value));
        }
        Value::Mapping(entries)
    } else {
        Value::Sequence(open.items)
    };
    Node { position: open.position, value }
}

fn mark(span: &Span) -> Position {
    let number = |value: usize| u32::try_from(value).unwrap_or(u32::MAX);
    Position { line: number(span.start.line()), column: number(span.start.col().saturating_add(1)) }
}

/// YAML 1.2 core schema.
fn plain(text: &str) -> Value {
    match text {
        "" | "~" | "null" | "Null" | "NULL" => Value::Null,
        "true" | "True" | "TRUE" => Value::Bool(true),
        "false" | "False" | "FALSE" => Value::Bool(false),
        _ => {
            let digits = text.strip_prefix(['-', '+']).unwrap_or(text);
            let numeric = digits.starts_with(|c: char| c.is_ascii_digit() || c == '.')
                && digits.parse::<f64>().is_ok()
                && !digits.contains("inf")
                && !digits.contains("nan");
            if numeric { Value::Number(text.into()) } else { Value::String(text.into()) }
        }
    }
}
