//! Text to tree. One pass, no token list: the lexer is context-sensitive (`in`, `contains` and the like are
//! operators only after a label), so each place asks for just what may stand there.

use std::sync::Arc;

use super::{CompareOp, Expr, SELECTOR_DEPTH_MAX, SELECTOR_LEN_MAX};
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

const OPERATORS: &str = "==, !=, in, not in, contains, starts with or ends with";

pub(super) fn parse(text: &str) -> Result<Expr, SelectorError> {
    let mut parser = Parser { text, at: 0 };
    if text.len() > SELECTOR_LEN_MAX {
        return Err(parser.error(&format!("at most {SELECTOR_LEN_MAX} bytes"), None));
    }
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
        Ok(if negated { Expr::Not(Box::new(operand)) } else { operand })
    }

    fn primary(&mut self, depth: usize) -> Result<Expr, SelectorError> {
        self.skip_blanks();
        if self.rest().starts_with('(') {
            if depth >= SELECTOR_DEPTH_MAX {
                return Err(self.error(&format!("at most {SELECTOR_DEPTH_MAX} nested parentheses"), None));
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
        let label = self.label("a label key, has(…), all(), ! or (")?;
        self.operation(label)
    }

    fn label(&mut self, expected: &str) -> Result<Arc<str>, SelectorError> {
        self.skip_blanks();
        let word = self.word();
        if word.is_empty() {
            let hint = self.rest().starts_with(['"', '\'']).then(|| "a label key without quotes".into());
            return Err(self.error(expected, hint));
        }
        if word.len() > LABEL_KEY_LEN_MAX {
            return Err(self.error(&format!("a label key of at most {LABEL_KEY_LEN_MAX} bytes"), None));
        }
        let unknown_call = self.text.as_bytes().get(self.at + word.len()) == Some(&b'(');
        if unknown_call {
            let hint = nearest(word, ["has", "all", "global"]);
            return Err(self.error(expected, hint.map(|word| format!("{word}(…)"))));
        }
        self.at += word.len();
        Ok(word.into())
    }

    fn operation(&mut self, label: Arc<str>) -> Result<Expr, SelectorError> {
        self.skip_blanks();
        for (token, op) in [("==", CompareOp::Eq), ("!=", CompareOp::Ne)] {
            if self.take(token) {
                return self.compare(label, op);
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
        if rest.starts_with('=') {
            return Some("==".into());
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

fn single_or(mut operands: Vec<Expr>, many: impl FnOnce(Vec<Expr>) -> Expr) -> Expr {
    if operands.len() == 1 { operands.swap_remove(0) } else { many(operands) }
}
