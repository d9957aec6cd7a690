//! Decimal numbers, compared exactly.

use std::cmp::Ordering;
use std::fmt;

/// A decimal number, as digits: nothing is rounded, and there is no infinity and nothing that is no number.
///
/// Blanks around it and zeros that mean nothing do not count: `5`, `05` and `5.00` are one number. There is no
/// exponent and no `+`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Number<'a> {
    negative: bool,
    /// Without leading zeros.
    integer: &'a str,
    /// Without trailing zeros.
    fraction: &'a str,
}

impl<'a> Number<'a> {
    /// `None` if the text is no such number.
    pub fn parse(text: &'a str) -> Option<Self> {
        let text = text.trim();
        let (negative, digits) = match text.strip_prefix('-') {
            Some(digits) => (true, digits),
            None => (false, text),
        };
        let (integer, fraction) = match digits.split_once('.') {
            Some((integer, fraction)) => (integer, Some(fraction)),
            None => (digits, None),
        };
        let are_digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        if !are_digits(integer) || !fraction.is_none_or(are_digits) {
            return None;
        }
        let integer = integer.trim_start_matches('0');
        let fraction = fraction.unwrap_or_default().trim_end_matches('0');
        // There is one zero.
        let negative = negative && !(integer.is_empty() && fraction.is_empty());
        Some(Self { negative, integer, fraction })
    }
}

impl Ord for Number<'_> {
    fn cmp(&self, other: &Self) -> Ordering {
        let magnitude = || {
            let integers = self.integer.len().cmp(&other.integer.len());
            // Of fractions without trailing zeros the one that goes on is larger, as texts have it.
            integers.then(self.integer.cmp(other.integer)).then(self.fraction.cmp(other.fraction))
        };
        match (self.negative, other.negative) {
            (false, false) => magnitude(),
            (true, true) => magnitude().reverse(),
            (false, true) => Ordering::Greater,
            (true, false) => Ordering::Less,
        }
    }
}

impl PartialOrd for Number<'_> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// The shortest form: `0`, `-0.5`, `12`.
impl fmt::Display for Number<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let integer = if self.integer.is_empty() { "0" } else { self.integer };
        write!(f, "{}{integer}", if self.negative { "-" } else { "" })?;
        if self.fraction.is_empty() { Ok(()) } else { write!(f, ".{}", self.fraction) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn number(text: &str) -> Number<'_> {
        Number::parse(text).unwrap_or_else(|| panic!("{text}"))
    }

    #[test]
    fn five_is_one_number_however_it_is_written() {
        for text in ["5", "5.0", "5.00", "05", " 5 "] {
            assert_eq!((number(text), number(text).to_string().as_str()), (number("5"), "5"), "{text}");
        }
    }

    #[test]
    fn zero_has_no_sign() {
        assert_eq!((number("-0.0"), number("-0").to_string().as_str()), (number("0"), "0"));
    }

    #[test]
    fn numbers_are_ordered_by_size() {
        let ascending =
            ["-10", "-9.75", "-9.7", "-0.5", "0", "0.05", "0.5", "0.50001", "9", "9.8", "10", "100"];
        for pair in ascending.windows(2) {
            assert!(number(pair[0]) < number(pair[1]), "{pair:?}");
        }
    }

    #[test]
    fn nothing_is_rounded() {
        assert!(number("0.1000000000000000000000000000001") > number("0.1"));
        assert!(number("9007199254740993") > number("9007199254740992"));
    }

    #[test]
    fn what_is_no_plain_decimal_is_no_number() {
        for text in
            ["", "-", ".5", "5.", "1e3", "NaN", "inf", "-inf", "+5", "0x5", "5 0", "--5", "5.1.0", "٥"]
        {
            assert_eq!(Number::parse(text), None, "{text}");
        }
    }

    proptest! {
        #[test]
        fn small_numbers_compare_as_floats_do(a in -2000i32..2000, b in -2000i32..2000) {
            // Eighths are exact in both.
            let (a, b) = (f64::from(a) / 8.0, f64::from(b) / 8.0);
            let (left, right) = (format!("{a:.4}"), b.to_string());
            prop_assert_eq!(number(&left).cmp(&number(&right)), a.partial_cmp(&b).unwrap());
        }
    }
}
