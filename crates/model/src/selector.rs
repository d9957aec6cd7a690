//! Selectors: expressions over labels.
//!
//! The grammar is Calico's, token for token (projectcalico/calico, `libcalico-go/lib/selector`), and so
//! are canonical form and id, so that policies move over unchanged. Beyond it there are typed comparisons, in
//! places where Calico has an error:
//!
//! ```text
//! selector := ε | or                      ε is all()
//! or       := and ( "||" and )*
//! and      := unary ( "&&" unary )*
//! unary    := "!"* primary
//! primary  := "(" or ")" | "all()" | "global()" | "has(" LABEL ")"
//!           | LABEL ("==" | "!=" | "contains" | "starts with" | "ends with") STRING
//!           | LABEL ("in" | "not in") "{" [STRING ("," STRING)* [","]] "}"
//!           | LABEL ("==" | "!=" | "<" | "<=" | ">" | ">=") ( NUMBER | "version(" STRING ")" )
//! STRING   := '"' [^"]* '"' | "'" [^']* "'"
//! LABEL    := [A-Za-z0-9_./-]{1,512}
//! NUMBER   := ["-"] [0-9]+ ["." [0-9]+]     with no LABEL character behind it
//! ```
//!
//! A label that is absent makes `==`, `in`, `contains`, `starts with`, `ends with`, `has` and every comparison
//! of size false and `!=` and `not in` true (DESIGN 4.7). To a typed comparison a value that is no number, no
//! version is absent: `patches != 3` holds for `patches=many`, `patches < 3` and `patches >= 3` do not.

use std::collections::BTreeSet;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::sync::Arc;

use base64::Engine as _;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha224};

use crate::labels::{Labels, NAMESPACE_LABEL, NAMESPACE_LABELS_PREFIX};

mod parse;
mod restriction;
mod typed;

pub use parse::SelectorError;
pub use restriction::Restriction;
pub use typed::{TypedOp, TypedValue};

/// Longest selector that people may write, in bytes; its canonical text too.
pub const SELECTOR_LEN_MAX: usize = 8192;
/// Deepest nesting of parentheses in it; in its canonical text too.
pub const SELECTOR_DEPTH_MAX: usize = 64;
/// Longest selector that programs make of those, in bytes: several joined, and all labels with a prefix.
pub const CANONICAL_LEN_MAX: usize = 1 << 20;
/// Deepest nesting of parentheses in such a one.
pub const CANONICAL_DEPTH_MAX: usize = SELECTOR_DEPTH_MAX + 8;

/// A selector with its canonical text. Equal canonical text is equality.
#[derive(Clone, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Selector(Arc<Parsed>);

/// Behind one pointer: selectors are parts of rules and keys of indexes, by the hundred thousand.
struct Parsed {
    expr: Expr,
    canonical: Arc<str>,
}

/// The tree of a selector.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Expr {
    /// `all()`
    All,
    /// `global()`: true wherever it is evaluated, but in namespace selectors, where it means what is in no namespace.
    Global,
    /// `has(label)`
    Has(Arc<str>),
    /// A comparison with one value.
    Compare {
        /// Label key.
        label: Arc<str>,
        /// How the value is compared.
        op: CompareOp,
        /// What it is compared with.
        value: Arc<str>,
    },
    /// A comparison with a number or a version.
    Typed {
        /// Label key.
        label: Arc<str>,
        /// How the value is compared.
        op: TypedOp,
        /// What it is compared with.
        value: TypedValue,
    },
    /// `in` or `not in`.
    In {
        /// Label key.
        label: Arc<str>,
        /// Whether it is `not in`.
        negated: bool,
        /// Sorted, without duplicates.
        values: Vec<Arc<str>>,
    },
    /// `!`
    Not(Box<Expr>),
    /// `&&`, two operands or more.
    And(Vec<Expr>),
    /// `||`, two operands or more.
    Or(Vec<Expr>),
}

/// How [`Expr::Compare`] compares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CompareOp {
    /// `==`
    Eq,
    /// `!=`
    Ne,
    /// `contains`
    Contains,
    /// `starts with`
    StartsWith,
    /// `ends with`
    EndsWith,
}

impl CompareOp {
    fn text(self) -> &'static str {
        match self {
            Self::Eq => "==",
            Self::Ne => "!=",
            Self::Contains => "contains",
            Self::StartsWith => "starts with",
            Self::EndsWith => "ends with",
        }
    }
}

impl Selector {
    /// Reads a selector that somebody wrote. Typed comparisons must fit the catalogue of facts
    /// ([`crate::facts::CATALOGUE`]).
    ///
    /// # Errors
    /// With the byte offset, what was expected there and, where there is one, the likely right word.
    pub fn parse(text: &str) -> Result<Self, SelectorError> {
        parse::parse(text, parse::Limits::WRITTEN)
    }

    /// Reads the canonical text of a selector, from a peer or a disk. It was checked where it was written, by
    /// a catalogue that may have been another: here only the grammar counts.
    ///
    /// # Errors
    /// As [`Selector::parse`].
    pub fn parse_canonical(text: &str) -> Result<Self, SelectorError> {
        parse::parse(text, parse::Limits::CANONICAL)
    }

    /// `all()`: every known endpoint and network set.
    pub fn all() -> Self {
        Self::from_expr(Expr::All)
    }

    /// `label == value`.
    pub fn equals(label: &str, value: &str) -> Self {
        Self::from_expr(Expr::Compare { label: label.into(), op: CompareOp::Eq, value: value.into() })
    }

    /// From a tree.
    pub fn from_expr(expr: Expr) -> Self {
        let canonical = expr.to_string().into();
        Self(Arc::new(Parsed { expr, canonical }))
    }

    /// True where all of `selectors` are; `all()` if there are none.
    pub fn all_of(selectors: impl IntoIterator<Item = Self>) -> Self {
        let mut operands: Vec<Expr> = Vec::new();
        let mut known = BTreeSet::new();
        for selector in selectors {
            if selector.0.expr != Expr::All && known.insert(Arc::clone(&selector.0.canonical)) {
                operands.push(selector.0.expr.clone());
            }
        }
        match operands.len() {
            0 => Self::all(),
            1 => Self::from_expr(operands.swap_remove(0)),
            _ => Self::from_expr(Expr::And(operands)),
        }
    }

    /// The tree.
    pub fn expr(&self) -> &Expr {
        &self.0.expr
    }

    /// The canonical text: parses to the same selector, and is the same for texts that differ only in
    /// blanks, quotes, needless parentheses and the order of sets.
    pub fn canonical(&self) -> &Arc<str> {
        &self.0.canonical
    }

    /// Calico's unique id of the canonical text.
    pub fn id(&self) -> String {
        let digest = Sha224::digest(format!("s:{}", self.0.canonical).as_bytes());
        format!("s:{}", base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(digest))
    }

    /// Whether it holds for these labels.
    pub fn matches(&self, labels: &Labels) -> bool {
        self.matches_by(&|key| labels.get(key))
    }

    /// Whether it holds where labels have the values that `get` tells.
    pub fn matches_by<'a>(&self, get: &impl Fn(&str) -> Option<&'a str>) -> bool {
        self.0.expr.matches_by(get)
    }

    /// Whether it asks about this label.
    pub fn reads(&self, label: &str) -> bool {
        self.0.expr.reads(label)
    }

    /// The same question asked of labels that carry `prefix` before their keys.
    #[must_use]
    pub fn with_prefix(&self, prefix: &str) -> Self {
        self.map_labels(|label| format!("{prefix}{label}").into(), &Expr::Global)
    }

    /// The same question asked of other labels, with another expression in the place of `global()`.
    #[must_use]
    pub fn map_labels(&self, label: impl Fn(&str) -> Arc<str>, global: &Expr) -> Self {
        Self::from_expr(self.0.expr.map(&label, global))
    }

    /// As a question about namespaces, asked of what is in them: true of an entity in a namespace whose labels match,
    /// and of one in none if the selector asks for `global()` and holds where there are no labels.
    #[must_use]
    pub fn of_namespaces(&self) -> Self {
        let inside = Expr::Has(NAMESPACE_LABEL.into());
        let never = Expr::Not(Box::new(Expr::All));
        let prefixed = |label: &str| -> Arc<str> { format!("{NAMESPACE_LABELS_PREFIX}{label}").into() };
        let there = Self::all_of([Self::from_expr(inside.clone()), self.map_labels(prefixed, &never)]);
        if !self.holds_outside_namespaces() {
            return there;
        }
        let outside = Expr::Not(Box::new(inside));
        Self::from_expr(Expr::Or(vec![outside, there.0.expr.clone()]))
    }

    /// Whether it is, as a question about namespaces, true of what is in none.
    pub fn holds_outside_namespaces(&self) -> bool {
        self.0.expr.asks_for_global() && self.matches(&Labels::new())
    }

    /// Whether it is, as a question about namespaces, true of what is in one with these labels.
    pub fn holds_in_namespace(&self, labels: &Labels) -> bool {
        let never = Expr::Not(Box::new(Expr::All));
        self.map_labels(|label| label.into(), &never).matches(labels)
    }

    /// A condition on one label that every match fulfils, for indexing.
    pub fn restriction(&self) -> Restriction {
        restriction::of(&self.0.expr)
    }
}

impl Expr {
    fn reads(&self, wanted: &str) -> bool {
        match self {
            Self::All | Self::Global => false,
            Self::Has(label)
            | Self::Compare { label, .. }
            | Self::Typed { label, .. }
            | Self::In { label, .. } => &**label == wanted,
            Self::Not(operand) => operand.reads(wanted),
            Self::And(operands) | Self::Or(operands) => operands.iter().any(|operand| operand.reads(wanted)),
        }
    }

    fn map(&self, label: &dyn Fn(&str) -> Arc<str>, global: &Self) -> Self {
        match self {
            Self::All => Self::All,
            Self::Global => global.clone(),
            Self::Has(key) => Self::Has(label(key)),
            Self::Compare { label: key, op, value } => {
                Self::Compare { label: label(key), op: *op, value: Arc::clone(value) }
            }
            Self::Typed { label: key, op, value } => {
                Self::Typed { label: label(key), op: *op, value: value.clone() }
            }
            Self::In { label: key, negated, values } => {
                Self::In { label: label(key), negated: *negated, values: values.clone() }
            }
            Self::Not(operand) => Self::Not(Box::new(operand.map(label, global))),
            Self::And(operands) => Self::And(operands.iter().map(|o| o.map(label, global)).collect()),
            Self::Or(operands) => Self::Or(operands.iter().map(|o| o.map(label, global)).collect()),
        }
    }

    fn asks_for_global(&self) -> bool {
        match self {
            Self::Global => true,
            Self::Not(operand) => operand.asks_for_global(),
            Self::And(operands) | Self::Or(operands) => operands.iter().any(Self::asks_for_global),
            Self::All | Self::Has(_) | Self::Compare { .. } | Self::Typed { .. } | Self::In { .. } => false,
        }
    }

    /// How deep the parentheses of its text are nested.
    fn nesting(&self) -> usize {
        match self {
            Self::And(operands) | Self::Or(operands) => {
                1 + operands.iter().map(Self::nesting).max().unwrap_or(0)
            }
            Self::Not(operand) => operand.nesting(),
            Self::All
            | Self::Global
            | Self::Has(_)
            | Self::Compare { .. }
            | Self::Typed { .. }
            | Self::In { .. } => 0,
        }
    }

    /// Whether it holds for these labels.
    pub fn matches(&self, labels: &Labels) -> bool {
        self.matches_by(&|key| labels.get(key))
    }

    fn matches_by<'a>(&self, get: &impl Fn(&str) -> Option<&'a str>) -> bool {
        match self {
            Self::All | Self::Global => true,
            Self::Has(label) => get(label).is_some(),
            Self::Compare { label, op, value } => match (get(label), op) {
                (None, op) => *op == CompareOp::Ne,
                (Some(actual), CompareOp::Eq) => actual == &**value,
                (Some(actual), CompareOp::Ne) => actual != &**value,
                (Some(actual), CompareOp::Contains) => actual.contains(&**value),
                (Some(actual), CompareOp::StartsWith) => actual.starts_with(&**value),
                (Some(actual), CompareOp::EndsWith) => actual.ends_with(&**value),
            },
            Self::Typed { label, op, value } => {
                op.holds(get(label).and_then(|actual| value.compare_to(actual)))
            }
            Self::In { label, negated, values } => match get(label) {
                None => *negated,
                Some(actual) => values.binary_search_by(|value| (**value).cmp(actual)).is_ok() != *negated,
            },
            Self::Not(operand) => !operand.matches_by(get),
            Self::And(operands) => operands.iter().all(|operand| operand.matches_by(get)),
            Self::Or(operands) => operands.iter().any(|operand| operand.matches_by(get)),
        }
    }
}

fn write_string(f: &mut fmt::Formatter<'_>, text: &str) -> fmt::Result {
    if text.contains('"') { write!(f, "'{text}'") } else { write!(f, "\"{text}\"") }
}

fn write_joined(f: &mut fmt::Formatter<'_>, operands: &[Expr], operator: &str) -> fmt::Result {
    f.write_str("(")?;
    for (index, operand) in operands.iter().enumerate() {
        if index > 0 {
            f.write_str(operator)?;
        }
        write!(f, "{operand}")?;
    }
    f.write_str(")")
}

impl fmt::Display for Expr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::All => f.write_str("all()"),
            Self::Global => f.write_str("global()"),
            Self::Has(label) => write!(f, "has({label})"),
            Self::Compare { label, op, value } => {
                write!(f, "{label} {} ", op.text())?;
                write_string(f, value)
            }
            Self::Typed { label, op, value } => write!(f, "{label} {op} {value}"),
            Self::In { label, negated, values } => {
                write!(f, "{label} {} {{", if *negated { "not in" } else { "in" })?;
                for (index, value) in values.iter().enumerate() {
                    if index > 0 {
                        f.write_str(", ")?;
                    }
                    write_string(f, value)?;
                }
                f.write_str("}")
            }
            Self::Not(operand) => write!(f, "!{operand}"),
            Self::And(operands) => write_joined(f, operands, " && "),
            Self::Or(operands) => write_joined(f, operands, " || "),
        }
    }
}

impl PartialEq for Selector {
    fn eq(&self, other: &Self) -> bool {
        self.0.canonical == other.0.canonical
    }
}

impl Eq for Selector {}

impl Hash for Selector {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.canonical.hash(state);
    }
}

impl PartialOrd for Selector {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Selector {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.0.canonical.cmp(&other.0.canonical)
    }
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.canonical)
    }
}

impl fmt::Debug for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.canonical)
    }
}

impl From<Selector> for String {
    fn from(selector: Selector) -> Self {
        selector.0.canonical.to_string()
    }
}

impl TryFrom<String> for Selector {
    type Error = SelectorError;

    fn try_from(text: String) -> Result<Self, SelectorError> {
        Self::parse_canonical(&text)
    }
}

#[cfg(test)]
mod tests;
