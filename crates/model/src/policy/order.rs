//! Places in an order.

use std::cmp::Ordering;

use serde_json::{Value as Json, json};

/// Place in an order: lower comes first, absent is last.
#[derive(Debug, Clone, Copy)]
pub struct Order(f64);

impl Order {
    /// After everything that has a number.
    pub const LAST: Self = Self(f64::INFINITY);

    /// A finite number; anything else is [`Order::LAST`].
    pub fn new(number: f64) -> Self {
        // -0.0 and 0.0 are one place.
        if number.is_finite() { Self(number + 0.0) } else { Self::LAST }
    }

    /// The number, if it has one.
    pub fn number(self) -> Option<f64> {
        self.0.is_finite().then_some(self.0)
    }

    pub(super) fn to_json(self) -> Json {
        self.number().map_or(Json::Null, |number| {
            // Whole numbers are written as people write them: 100, not 100.0.
            #[expect(clippy::cast_possible_truncation, reason = "checked to be whole and small")]
            let whole = number as i64;
            #[expect(clippy::cast_precision_loss, reason = "compared with what it came from")]
            let same = number.abs() < 1e15 && whole as f64 == number;
            if same { json!(whole) } else { json!(number) }
        })
    }
}

impl PartialEq for Order {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Order {}

impl PartialOrd for Order {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Order {
    fn cmp(&self, other: &Self) -> Ordering {
        self.0.total_cmp(&other.0)
    }
}
