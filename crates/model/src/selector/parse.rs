//! Text to tree. One pass, no token list: the lexer is context-sensitive (`in`, `contains` and the like are
//! operators only after a label), so each place asks for just what may stand there.

use std::sync::Arc;

use super::{
    CANONICAL_DEPTH_MAX, CANONICAL_LEN_MAX, CompareOp, Expr, SELECTOR_DEPTH_MAX, SELECTOR_LEN_MAX, Selector,
    TypedOp, TypedValue,
};
use crate::facts::{self, FactType, Number, Version};
use crate::labels::{LABEL_KEY_LEN_MAX, is_label_byte};
use crate::suggest::nearest;

/// Why a text is not a selector.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("expected {expected}, found {found}{}", suggestion.as_ref().map(|word| format!("; did you mean {word}?")).unwrap_or_default())]
pub struct SelectorError {
    /// Byte offset of the place that is wrong.
    pub offset: usize,
    /// What could have stood there.
    pub expected: String,
    /// What stands there.
    pub found: String,
    /// The likely right text for it.
    pub suggestion: Option<String>,
}

const OPERATORS: &str = "==, !=, <, <=, >, >=, in, not in, contains, starts with or ends with";

/// What a version begins with; the parenthesis is part of the word, as in `has(`.
const VERSION_OPEN: &str = "version(";

/// How much is accepted.
#[derive(Clone, Copy)]
pub(super) struct Limits {
    length: usize,
    depth: usize,
    key_length: usize,
    /// Whether typed comparisons must fit the catalogue of facts.
    catalogue: bool,
}

impl Limits {
    /// Of what people write.
    pub(super) const WRITTEN: Self = Self {
        length: SELECTOR_LEN_MAX,
        depth: SELECTOR_DEPTH_MAX,
        key_length: LABEL_KEY_LEN_MAX,
        catalogue: true,
    };
    /// Of what programs make of it.
    pub(super) const CANONICAL: Self = Self {
        length: CANONICAL_LEN_MAX,
        depth: CANONICAL_DEPTH_MAX,
        // A key with a prefix; nothing has such a label, and the selector says so as it should.
        key_length: 2 * LABEL_KEY_LEN_MAX,
        catalogue: false,
    };
}

pub(super) fn parse(text: &str, limits: Limits) -> Result<Selector, SelectorError> {
    let parser = Parser { text, at: 0, limits };
    if text.len() > limits.length {
        return Err(parser.too_long());
    }
    let selector = Selector::from_expr(expr(text, limits)?);
    // The canonical text is what is stored and sent, so it must be readable in turn. It has parentheses around
    // everything and blanks around operators, and may exceed what the text keeps to.
    if selector.expr().nesting() > limits.depth {
        return Err(parser.too_deep());
    }
    if selector.0.canonical.len() > limits.length {
        return Err(parser.too_long());
    }
    Ok(selector)
}

fn expr(text: &str, limits: Limits) -> Result<Expr, SelectorError> {
    let mut parser = Parser { text, at: 0, limits };
    parser.skip_blanks();
    if parser.rest().is_empty() {
        return Ok(Expr::All);
    }
    let expr = parser.or(0)?;
    parser.skip_blanks();
    if parser.rest().is_empty() {
        Ok(expr)
    } else {
        let hint = match parser.rest().as_bytes().first() {
            Some(b'&') => Some("&&"),
            Some(b'|') => Some("||"),
            _ => match parser.word().to_ascii_lowercase().as_str() {
                "and" => Some("&&"),
                "or" => Some("||"),
                _ => None,
            },
        };
        Err(parser.error("&&, || or the end of the selector", hint.map(Into::into)))
    }
}

struct Parser<'a> {
    text: &'a str,
    at: usize,
    limits: Limits,
}

impl<'a> Parser<'a> {
    fn rest(&self) -> &'a str {
        self.text.get(self.at..).unwrap_or_default()
    }

    fn skip_blanks(&mut self) {
        self.at += self.rest().bytes().take_while(|byte| matches!(byte, b' ' | b'\t')).count();
    }

    /// Takes `token` if it comes next, after blanks.
    fn take(&mut self, token: &str) -> bool {
        self.skip_blanks();
        let found = self.rest().starts_with(token);
        if found {
            self.at += token.len();
        }
        found
    }

    /// The run of label characters that comes next, not taken.
    fn word(&self) -> &'a str {
        let length = self.rest().bytes().take_while(|byte| is_label_byte(*byte)).count();
        self.rest().get(..length).unwrap_or_default()
    }

    fn error(&self, expected: &str, suggestion: Option<String>) -> SelectorError {
        let word = self.word();
        let found = if !word.is_empty() {
            format!("{word:?}")
        } else {
            match self.rest().chars().next() {
                Some(character) => format!("{character:?}"),
                None => "the end of the selector".into(),
            }
        };
        SelectorError { offset: self.at, expected: expected.into(), found, suggestion }
    }

    fn too_long(&self) -> SelectorError {
        self.error(&format!("a selector of at most {} bytes in its canonical form", self.limits.length), None)
    }

    fn too_deep(&self) -> SelectorError {
        self.error(&format!("at most {} nested parentheses", self.limits.depth), None)
    }

    fn or(&mut self, depth: usize) -> Result<Expr, SelectorError> {
        let mut operands = vec![self.and(depth)?];
        while self.take("||") {
            operands.push(self.and(depth)?);
        }
        Ok(single_or(operands, Expr::Or))
    }

    fn and(&mut self, depth: usize) -> Result<Expr, SelectorError> {
        let mut operands = vec![self.unary(depth)?];
        while self.take("&&") {
            operands.push(self.unary(depth)?);
        }
        Ok(single_or(operands, Expr::And))
    }

    fn unary(&mut self, depth: usize) -> Result<Expr, SelectorError> {
        let mut negated = false;
        loop {
            self.skip_blanks();
            if self.rest().starts_with('!') {
                self.at += 1;
                negated = !negated;
            } else {
                break;
            }
        }
        let operand = self.primary(depth)?;
        Ok(match (negated, operand) {
            (false, operand) => operand,
            // As with "!!": its text would be that, and would not parse to the same tree. Calico keeps both here.
            (true, Expr::Not(inner)) => *inner,
            (true, operand) => Expr::Not(Box::new(operand)),
        })
    }

    fn primary(&mut self, depth: usize) -> Result<Expr, SelectorError> {
        self.skip_blanks();
        if self.rest().starts_with('(') {
            if depth >= self.limits.depth {
                return Err(self.too_deep());
            }
            self.at += 1;
            let inner = self.or(depth + 1)?;
            if !self.take(")") {
                return Err(self.error("&&, || or )", None));
            }
            return Ok(inner);
        }
        if self.take("all()") {
            return Ok(Expr::All);
        }
        if self.take("global()") {
            return Ok(Expr::Global);
        }
        if self.rest().starts_with("has(") {
            self.at += "has(".len();
            let label = self.label("a label key")?;
            if !self.take(")") {
                return Err(self.error(")", None));
            }
            return Ok(Expr::Has(label));
        }
        self.skip_blanks();
        let start = self.at;
        let label = self.label("a label key, has(…), all(), ! or (")?;
        self.operation(start, label)
    }

    fn label(&mut self, expected: &str) -> Result<Arc<str>, SelectorError> {
        self.skip_blanks();
        let word = self.word();
        if word.is_empty() {
            let hint = self.rest().starts_with(['"', '\'']).then(|| "a label key without quotes".into());
            return Err(self.error(expected, hint));
        }
        if word.len() > self.limits.key_length {
            let expected = format!("a label key of at most {} bytes", self.limits.key_length);
            return Err(self.error(&expected, None));
        }
        let unknown_call = self.text.as_bytes().get(self.at + word.len()) == Some(&b'(');
        if unknown_call {
            let hint = nearest(word, ["has", "all", "global"]);
            return Err(self.error(expected, hint.map(|word| format!("{word}(…)"))));
        }
        self.at += word.len();
        Ok(word.into())
    }

    /// What follows a label, which stands at `start`.
    fn operation(&mut self, start: usize, label: Arc<str>) -> Result<Expr, SelectorError> {
        self.skip_blanks();
        // The longer ones come first.
        let operators = [
            ("==", TypedOp::Eq, Some(CompareOp::Eq)),
            ("!=", TypedOp::Ne, Some(CompareOp::Ne)),
            ("<=", TypedOp::Le, None),
            (">=", TypedOp::Ge, None),
            ("<", TypedOp::Lt, None),
            (">", TypedOp::Gt, None),
        ];
        for (token, typed, plain) in operators {
            if self.take(token) {
                self.skip_blanks();
                let quoted = self.rest().starts_with(['"', '\'']);
                return match plain {
                    Some(op) if quoted || !(self.at_typed_value() || is_version(&label)) => {
                        self.compare(label, op)
                    }
                    _ => self.typed(start, label, typed),
                };
            }
        }
        let operators: [(&[&str], CompareOp); 3] = [
            (&["contains"], CompareOp::Contains),
            (&["starts with", "startswith"], CompareOp::StartsWith),
            (&["ends with", "endswith"], CompareOp::EndsWith),
        ];
        for (words, op) in operators {
            if words.iter().any(|word| self.take_words(word)) {
                return self.compare(label, op);
            }
        }
        for (words, negated) in [(&["in"][..], false), (&["not in", "notin"][..], true)] {
            if words.iter().any(|word| self.take_words(word)) {
                let values = self.set()?;
                return Ok(Expr::In { label, negated, values });
            }
        }
        Err(self.error(OPERATORS, self.operator_hint()))
    }

    fn operator_hint(&self) -> Option<String> {
        let rest = self.rest();
        for (wrong, right) in [("=<", "<="), ("=>", ">="), ("=", "==")] {
            if rest.starts_with(wrong) {
                return Some(right.into());
            }
        }
        let words = ["contains", "startswith", "endswith", "in", "notin"];
        nearest(self.word(), words).map(|word| match word {
            "startswith" => "starts with".into(),
            "endswith" => "ends with".into(),
            "notin" => "not in".into(),
            other => other.into(),
        })
    }

    /// Takes a word operator (its words may be parted by any blanks) if a word boundary follows.
    fn take_words(&mut self, words: &str) -> bool {
        let start = self.at;
        for word in words.split(' ') {
            self.skip_blanks();
            if self.word() != word {
                self.at = start;
                return false;
            }
            self.at += word.len();
        }
        true
    }

    fn compare(&mut self, label: Arc<str>, op: CompareOp) -> Result<Expr, SelectorError> {
        let value = self.string()?;
        Ok(Expr::Compare { label, op, value })
    }

    /// Whether a number or a version comes next.
    fn at_typed_value(&self) -> bool {
        self.rest().starts_with(VERSION_OPEN) || Number::parse(self.word()).is_some()
    }

    /// What follows the operator of a typed comparison. Nothing but blanks stands before it.
    fn typed(&mut self, start: usize, label: Arc<str>, op: TypedOp) -> Result<Expr, SelectorError> {
        let value_start = self.at;
        let value = if self.rest().starts_with(VERSION_OPEN) {
            self.at += VERSION_OPEN.len();
            self.skip_blanks();
            let text_start = self.at;
            let text = self.string()?;
            let Some(value) = TypedValue::version(&text) else {
                self.at = text_start;
                return Err(self.error("a version, which begins with a digit", None));
            };
            if !self.take(")") {
                return Err(self.error(")", None));
            }
            value
        } else if let Some(number) = TypedValue::number(self.word()) {
            self.at += self.word().len();
            number
        } else {
            let hint = self.typed_hint(&label);
            return Err(self.error("a number or version('…')", hint));
        };
        if self.limits.catalogue {
            if let Some(known) = facts::find(&label)
                && known.fact_type != value.fact_type()
            {
                self.at = value_start;
                return Err(self.misfit(known, op, &value));
            }
            if facts::find(&label).is_none()
                && let Some(meant) = facts::near_miss(&label)
            {
                self.at = start;
                return Err(
                    self.error("the key of a known fact or of a label unlike any", Some(meant.into()))
                );
            }
        }
        Ok(Expr::Typed { label, op, value })
    }

    /// What the thing that stands here was likely meant to be.
    fn typed_hint(&self, label: &str) -> Option<String> {
        let quoted = || {
            let quote = self.rest().chars().next().filter(|c| matches!(c, '"' | '\''))?;
            self.rest()[1..].split(quote).next()
        };
        let text = quoted().unwrap_or(self.word());
        let known = facts::find(label).map(|fact| fact.fact_type);
        if known != Some(FactType::Version)
            && let Some(number) = Number::parse(text)
        {
            return Some(number.to_string());
        }
        Version::parse(text).map(|_| version_text(text))
    }

    /// The comparison does not fit what is known of the fact.
    fn misfit(&self, known: &facts::KnownFact, op: TypedOp, value: &TypedValue) -> SelectorError {
        let text = value.text();
        let (expected, suggestion) = match known.fact_type {
            FactType::Version => ("version('…')", Version::parse(text).map(|_| version_text(text))),
            FactType::Number => ("a number", Number::parse(text).map(|number| number.to_string())),
            FactType::Text | FactType::Boolean => {
                let equality = matches!(op, TypedOp::Eq | TypedOp::Ne);
                ("a comparison with a value in quotes", equality.then(|| format!("'{text}'")))
            }
        };
        let expected = format!("{expected}, since the fact {} is {}", known.key, known.fact_type.describe());
        self.error(&expected, suggestion)
    }

    fn string(&mut self) -> Result<Arc<str>, SelectorError> {
        self.skip_blanks();
        let rest = self.rest();
        let Some(quote) = rest.chars().next().filter(|c| matches!(c, '"' | '\'')) else {
            let word = self.word();
            let hint = (!word.is_empty()).then(|| format!("'{word}'"));
            return Err(self.error("a value in quotes", hint));
        };
        match rest[1..].find(quote) {
            Some(length) => {
                self.at += length + 2;
                Ok(rest[1..=length].into())
            }
            None => {
                self.at = self.text.len();
                Err(self.error(&format!("the closing {quote}"), None))
            }
        }
    }

    fn set(&mut self) -> Result<Vec<Arc<str>>, SelectorError> {
        if !self.take("{") {
            return Err(self.error("a set like {'a', 'b'}", None));
        }
        let mut values = Vec::new();
        loop {
            if self.take("}") {
                break;
            }
            values.push(self.string()?);
            if self.take(",") {
                continue;
            }
            if self.take("}") {
                break;
            }
            return Err(self.error(", or }", None));
        }
        values.sort();
        values.dedup();
        Ok(values)
    }
}

/// Whether a label is known to be a version.
fn is_version(label: &str) -> bool {
    facts::find(label).is_some_and(|fact| fact.fact_type == FactType::Version)
}

fn version_text(text: &str) -> String {
    format!("version('{}')", text.trim())
}

fn single_or(mut operands: Vec<Expr>, many: impl FnOnce(Vec<Expr>) -> Expr) -> Expr {
    if operands.len() == 1 { operands.swap_remove(0) } else { many(operands) }
}
