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

use crate::labels::Labels;

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
pub struct Selector {
    expr: Arc<Expr>,
    canonical: Arc<str>,
}

/// The tree of a selector.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Expr {
    /// `all()`
    All,
    /// `global()`: true wherever it is evaluated; kept for Calico policies, where it has a meaning of its
    /// own in namespace selectors.
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
        Self { expr: Arc::new(expr), canonical }
    }

    /// True where all of `selectors` are; `all()` if there are none.
    pub fn all_of(selectors: impl IntoIterator<Item = Self>) -> Self {
        let mut operands: Vec<Expr> = Vec::new();
        let mut known = BTreeSet::new();
        for selector in selectors {
            if *selector.expr != Expr::All && known.insert(Arc::clone(&selector.canonical)) {
                operands.push((*selector.expr).clone());
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
        &self.expr
    }

    /// The canonical text: parses to the same selector, and is the same for texts that differ only in
    /// blanks, quotes, needless parentheses and the order of sets.
    pub fn canonical(&self) -> &Arc<str> {
        &self.canonical
    }

    /// Calico's unique id of the canonical text.
    pub fn id(&self) -> String {
        let digest = Sha224::digest(format!("s:{}", self.canonical).as_bytes());
        format!("s:{}", base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(digest))
    }

    /// Whether it holds for these labels.
    pub fn matches(&self, labels: &Labels) -> bool {
        self.expr.matches(labels)
    }

    /// Whether it asks about this label.
    pub fn reads(&self, label: &str) -> bool {
        self.expr.reads(label)
    }

    /// The same question asked of labels that carry `prefix` before their keys.
    #[must_use]
    pub fn with_prefix(&self, prefix: &str) -> Self {
        Self::from_expr(self.expr.with_prefix(prefix))
    }

    /// A condition on one label that every match fulfils, for indexing.
    pub fn restriction(&self) -> Restriction {
        restriction::of(&self.expr)
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

    fn with_prefix(&self, prefix: &str) -> Self {
        let named = |label: &Arc<str>| -> Arc<str> { format!("{prefix}{label}").into() };
        match self {
            Self::All => Self::All,
            Self::Global => Self::Global,
            Self::Has(label) => Self::Has(named(label)),
            Self::Compare { label, op, value } => {
                Self::Compare { label: named(label), op: *op, value: Arc::clone(value) }
            }
            Self::Typed { label, op, value } => {
                Self::Typed { label: named(label), op: *op, value: value.clone() }
            }
            Self::In { label, negated, values } => {
                Self::In { label: named(label), negated: *negated, values: values.clone() }
            }
            Self::Not(operand) => Self::Not(Box::new(operand.with_prefix(prefix))),
            Self::And(operands) => Self::And(operands.iter().map(|o| o.with_prefix(prefix)).collect()),
            Self::Or(operands) => Self::Or(operands.iter().map(|o| o.with_prefix(prefix)).collect()),
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

    fn matches(&self, labels: &Labels) -> bool {
        match self {
            Self::All | Self::Global => true,
            Self::Has(label) => labels.get(label).is_some(),
            Self::Compare { label, op, value } => match (labels.get(label), op) {
                (None, op) => *op == CompareOp::Ne,
                (Some(actual), CompareOp::Eq) => actual == &**value,
                (Some(actual), CompareOp::Ne) => actual != &**value,
                (Some(actual), CompareOp::Contains) => actual.contains(&**value),
                (Some(actual), CompareOp::StartsWith) => actual.starts_with(&**value),
                (Some(actual), CompareOp::EndsWith) => actual.ends_with(&**value),
            },
            Self::Typed { label, op, value } => {
                op.holds(labels.get(label).and_then(|actual| value.compare_to(actual)))
            }
            Self::In { label, negated, values } => match labels.get(label) {
                None => *negated,
                Some(actual) => values.binary_search_by(|value| (**value).cmp(actual)).is_ok() != *negated,
            },
            Self::Not(operand) => !operand.matches(labels),
            Self::And(operands) => operands.iter().all(|operand| operand.matches(labels)),
            Self::Or(operands) => operands.iter().any(|operand| operand.matches(labels)),
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
        self.canonical == other.canonical
    }
}

impl Eq for Selector {}

impl Hash for Selector {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.canonical.hash(state);
    }
}

impl PartialOrd for Selector {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Selector {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.canonical.cmp(&other.canonical)
    }
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.canonical)
    }
}

impl fmt::Debug for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.canonical)
    }
}

impl From<Selector> for String {
    fn from(selector: Selector) -> Self {
        selector.canonical.to_string()
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
