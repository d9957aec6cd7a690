//! Tools for turning nodes into typed values: each takes a node, answers a value or notes a problem.

use std::collections::BTreeSet;
use std::fmt::Display;
use std::str::FromStr;

use super::{Node, PROBLEMS_MAX, Position, Problem, Value};
use crate::suggest::nearest;

/// Collects the problems of one document; knows where it is.
#[derive(Debug)]
pub struct Decoder {
    source: String,
    path: Vec<String>,
    /// What was found, [`PROBLEMS_MAX`] at most.
    pub problems: Vec<Problem>,
}

impl Decoder {
    /// For a text of this name.
    pub fn new(source: &str) -> Self {
        Self { source: source.into(), path: Vec::new(), problems: Vec::new() }
    }

    /// Notes what is wrong with a node.
    pub fn problem(&mut self, node: &Node, message: impl Into<String>) {
        self.problem_at(node.position, message, None);
    }

    /// Notes what is wrong at a place, and the nearest right word.
    pub fn problem_at(&mut self, position: Position, message: impl Into<String>, suggestion: Option<String>) {
        if self.problems.len() < PROBLEMS_MAX {
            self.problems.push(Problem {
                source: self.source.clone(),
                line: position.line,
                column: position.column,
                path: self.path.concat(),
                message: message.into(),
                suggestion,
            });
        }
    }

    /// Runs `decode` with `step` (`.name` or `[0]`) added to the path.
    pub fn within<T>(&mut self, step: &str, decode: impl FnOnce(&mut Self) -> T) -> T {
        let separator = if self.path.is_empty() || step.starts_with('[') { "" } else { "." };
        self.path.push(format!("{separator}{step}"));
        let result = decode(self);
        self.path.pop();
        result
    }

    /// A text.
    pub fn string(&mut self, node: &Node) -> Option<String> {
        match &node.value {
            Value::String(text) => Some(text.clone()),
            _ => self.expected(node, "a text"),
        }
    }

    /// A string, or any other plain scalar as it was written.
    pub fn scalar_text(&mut self, node: &Node) -> Option<String> {
        match &node.value {
            Value::String(text) | Value::Number(text) => Some(text.clone()),
            Value::Bool(value) => Some(value.to_string()),
            _ => self.expected(node, "a text"),
        }
    }

    /// A number; `expected` says which.
    pub fn number<T: FromStr>(&mut self, node: &Node, expected: &str) -> Option<T> {
        let parsed = match &node.value {
            Value::Number(text) => text.parse::<T>().ok(),
            _ => None,
        };
        parsed.or_else(|| self.expected(node, expected))
    }

    /// Notes that something else was expected.
    pub fn expected<T>(&mut self, node: &Node, expected: &str) -> Option<T> {
        self.problem(node, format!("expected {expected}, found {}", node.describe()));
        None
    }

    /// One of a few words.
    pub fn word<T: Copy>(&mut self, node: &Node, words: &[(&str, T)]) -> Option<T> {
        let text = self.string(node)?;
        if let Some((_, value)) = words.iter().find(|(word, _)| *word == text) {
            return Some(*value);
        }
        let known: Vec<_> = words.iter().map(|(word, _)| *word).collect();
        let suggestion = nearest(&text, known.iter().copied()).map(Into::into);
        self.problem_at(node.position, format!("expected {}, found {text:?}", known.join(", ")), suggestion);
        None
    }

    /// A text that parses as `T`.
    pub fn parsed<T: FromStr<Err: Display>>(&mut self, node: &Node) -> Option<T> {
        let text = self.scalar_text(node)?;
        text.parse().map_err(|error: T::Err| self.problem(node, error.to_string())).ok()
    }

    /// A list; each item is decoded even when an earlier one failed, so that all problems show.
    pub fn list<T>(
        &mut self,
        node: &Node,
        max: usize,
        mut decode: impl FnMut(&mut Self, &Node) -> Option<T>,
    ) -> Option<Vec<T>> {
        let Value::Sequence(items) = &node.value else {
            return self.expected(node, "a list");
        };
        if items.len() > max {
            self.problem(node, format!("at most {max} items are allowed, found {}", items.len()));
            return None;
        }
        let decoded: Vec<_> = items
            .iter()
            .enumerate()
            .map(|(index, item)| self.within(&format!("[{index}]"), |decoder| decode(decoder, item)))
            .collect();
        decoded.into_iter().collect()
    }

    /// The fields of a mapping.
    pub fn fields<'n>(&mut self, node: &'n Node, what: &str) -> Option<Fields<'n>> {
        let Value::Mapping(entries) = &node.value else {
            return self.expected(node, what);
        };
        let mut fields = Fields { position: node.position, entries: Vec::new(), asked: Vec::new() };
        let mut names = BTreeSet::new();
        for (key, value) in entries {
            let Some(name) = key.as_str() else {
                self.problem(key, format!("expected a field name, found {}", key.describe()));
                continue;
            };
            if !names.insert(name) {
                self.problem(key, format!("the field {name:?} is given twice"));
                continue;
            }
            fields.entries.push(Entry { name, key_position: key.position, value, taken: false });
        }
        Some(fields)
    }
}

#[derive(Debug)]
struct Entry<'n> {
    name: &'n str,
    key_position: Position,
    value: &'n Node,
    taken: bool,
}

/// The fields of one mapping, taken one by one; what is left at [`Fields::finish`] is unknown.
#[derive(Debug)]
pub struct Fields<'n> {
    position: Position,
    entries: Vec<Entry<'n>>,
    asked: Vec<&'static str>,
}

impl<'n> Fields<'n> {
    /// The value of a field that may be absent; `null` counts as absent.
    pub fn optional<T>(
        &mut self,
        decoder: &mut Decoder,
        name: &'static str,
        decode: impl FnOnce(&mut Decoder, &'n Node) -> Option<T>,
    ) -> Option<T> {
        self.asked.push(name);
        let entry = self.entries.iter_mut().find(|entry| entry.name == name)?;
        entry.taken = true;
        let value = entry.value;
        if value.value == Value::Null {
            return None;
        }
        decoder.within(name, |decoder| decode(decoder, value))
    }

    /// The value of a field that must be there.
    pub fn required<T>(
        &mut self,
        decoder: &mut Decoder,
        name: &'static str,
        decode: impl FnOnce(&mut Decoder, &'n Node) -> Option<T>,
    ) -> Option<T> {
        if !self.has(name) {
            self.optional(decoder, name, |_, _| None::<T>);
            decoder.problem_at(self.position, format!("the field {name:?} is missing"), None);
            return None;
        }
        self.optional(decoder, name, decode)
    }

    /// Notes a field that is known but not accepted here.
    pub fn refuse(&mut self, decoder: &mut Decoder, name: &'static str, why: &str) {
        if let Some(entry) = self.entries.iter_mut().find(|entry| entry.name == name) {
            entry.taken = true;
            let position = entry.key_position;
            decoder.within(name, |decoder| decoder.problem_at(position, why, None));
        }
    }

    /// Whether a field is there and not `null`.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.entries.iter().any(|entry| entry.name == name && entry.value.value != Value::Null)
    }

    /// Where the mapping stands.
    pub fn position(&self) -> Position {
        self.position
    }

    /// Notes every field that nobody asked for.
    pub fn finish(self, decoder: &mut Decoder) {
        for entry in self.entries.iter().filter(|entry| !entry.taken) {
            // No more would be told, and looking for the nearest word takes time.
            if decoder.problems.len() >= PROBLEMS_MAX {
                return;
            }
            let suggestion = nearest(entry.name, self.asked.iter().copied()).map(Into::into);
            let known = self.asked.join(", ");
            let message = format!("unknown field {:?}, expected one of {known}", entry.name);
            decoder.problem_at(entry.key_position, message, suggestion);
        }
    }
}
