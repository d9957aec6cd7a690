//! Selectors found by what labels may match them.

use std::collections::HashMap;
use std::sync::Arc;

use bulkhead_model::selector::Restriction;
use bulkhead_model::{Labels, Selector};

/// Selectors by a condition that each match must fulfil.
#[derive(Debug)]
pub(crate) struct SelectorIndex<T> {
    by_value: HashMap<Arc<str>, HashMap<Arc<str>, Vec<T>>>,
    by_key: HashMap<Arc<str>, Vec<T>>,
    rest: Vec<T>,
}

impl<T> Default for SelectorIndex<T> {
    fn default() -> Self {
        Self { by_value: HashMap::new(), by_key: HashMap::new(), rest: Vec::new() }
    }
}

impl<T: Clone + PartialEq> SelectorIndex<T> {
    /// The lists in which a selector stands; made if they are not there yet.
    fn for_each_list(&mut self, selector: &Selector, mut visit: impl FnMut(&mut Vec<T>)) {
        match selector.restriction() {
            Restriction::Nothing => {}
            Restriction::None => visit(&mut self.rest),
            Restriction::Present(key) => {
                let list = self.by_key.entry(Arc::clone(&key)).or_default();
                visit(list);
                if list.is_empty() {
                    self.by_key.remove(&key);
                }
            }
            Restriction::OneOf(key, values) => {
                let by_value = self.by_value.entry(key).or_default();
                for value in values {
                    let list = by_value.entry(Arc::clone(&value)).or_default();
                    visit(list);
                    if list.is_empty() {
                        by_value.remove(&value);
                    }
                }
            }
        }
    }

    /// Adds a selector under an id of its own.
    pub(crate) fn insert(&mut self, id: &T, selector: &Selector) {
        self.for_each_list(selector, |list| {
            // Most lists have one entry for good.
            if list.is_empty() {
                list.reserve_exact(1);
            }
            list.push(id.clone());
        });
    }

    /// Takes it out again.
    pub(crate) fn remove(&mut self, id: &T, selector: &Selector) {
        self.for_each_list(selector, |list| list.retain(|known| known != id));
    }

    /// Selectors that may match these labels; the others cannot.
    pub(crate) fn candidates(&self, labels: &Labels) -> Vec<T> {
        let mut candidates = self.rest.clone();
        for (key, value) in labels.iter() {
            candidates.extend(self.by_key.get(key).into_iter().flatten().cloned());
            let equal = self.by_value.get(key).and_then(|values| values.get(value));
            candidates.extend(equal.into_iter().flatten().cloned());
        }
        candidates
    }
}
