//! Comparisons with numbers and versions.

use std::cmp::Ordering;
use std::fmt;
use std::sync::Arc;

use crate::facts::{FactType, Number, Version};

/// How [`super::Expr::Typed`] compares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TypedOp {
    /// `==`
    Eq,
    /// `!=`
    Ne,
    /// `<`
    Lt,
    /// `<=`
    Le,
    /// `>`
    Gt,
    /// `>=`
    Ge,
}

impl TypedOp {
    /// Whether it holds for a value that stands so to the one in the selector; `None`: there is no such value, or
    /// it cannot be compared (DESIGN 4.7).
    pub(super) fn holds(self, ordering: Option<Ordering>) -> bool {
        let Some(ordering) = ordering else { return self == Self::Ne };
        match self {
            Self::Eq => ordering.is_eq(),
            Self::Ne => ordering.is_ne(),
            Self::Lt => ordering.is_lt(),
            Self::Le => ordering.is_le(),
            Self::Gt => ordering.is_gt(),
            Self::Ge => ordering.is_ge(),
        }
    }
}

impl fmt::Display for TypedOp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Eq => "==",
            Self::Ne => "!=",
            Self::Lt => "<",
            Self::Le => "<=",
            Self::Gt => ">",
            Self::Ge => ">=",
        })
    }
}

/// What is compared with: a number in its shortest form, or a version without blanks around it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TypedValue {
    version: bool,
    text: Arc<str>,
}

impl TypedValue {
    /// `None` if the text is no number.
    pub fn number(text: &str) -> Option<Self> {
        Number::parse(text).map(|number| Self { version: false, text: number.to_string().into() })
    }

    /// `None` if the text is no version.
    pub fn version(text: &str) -> Option<Self> {
        Version::parse(text).map(|_| Self { version: true, text: text.trim().into() })
    }

    /// What its values are.
    pub fn fact_type(&self) -> FactType {
        if self.version { FactType::Version } else { FactType::Number }
    }

    /// The number, or what stands in `version('…')`.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// How an actual value stands to this one; `None` if it is of another type.
    pub(super) fn compare_to(&self, actual: &str) -> Option<Ordering> {
        if self.version {
            Some(Version::parse(actual)?.cmp(&Version::parse(&self.text)?))
        } else {
            Some(Number::parse(actual)?.cmp(&Number::parse(&self.text)?))
        }
    }
}

impl fmt::Display for TypedValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // A version has no quotes.
        if self.version { write!(f, "version(\"{}\")", self.text) } else { f.write_str(&self.text) }
    }
}
