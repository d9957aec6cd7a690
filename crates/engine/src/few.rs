//! Sets that nearly always have one element, by the hundred thousand: one element takes no memory of its own.

use std::collections::BTreeSet;

/// A set.
#[derive(Debug, Clone, Default)]
#[expect(clippy::box_collection, reason = "the rare case, and half as large in the usual one")]
pub(crate) enum Few<T> {
    /// Nothing.
    #[default]
    None,
    /// One element.
    One(T),
    /// Two or more, or what was left of them.
    Many(Box<BTreeSet<T>>),
}

impl<T: Ord> Few<T> {
    /// Adds an element.
    pub(crate) fn insert(&mut self, element: T) {
        *self = match std::mem::take(self) {
            Self::None => Self::One(element),
            Self::One(one) if one == element => Self::One(one),
            Self::One(one) => Self::Many(Box::new(BTreeSet::from([one, element]))),
            Self::Many(mut many) => {
                many.insert(element);
                Self::Many(many)
            }
        };
    }

    /// Takes it out again.
    pub(crate) fn remove<Q: Ord + ?Sized>(&mut self, element: &Q)
    where
        T: std::borrow::Borrow<Q>,
    {
        match self {
            Self::None => {}
            Self::One(one) if Q::cmp((*one).borrow(), element).is_ne() => {}
            Self::One(_) => *self = Self::None,
            Self::Many(many) => {
                many.remove(element);
                if many.is_empty() {
                    *self = Self::None;
                }
            }
        }
    }

    /// Whether there is no element.
    pub(crate) fn is_empty(&self) -> bool {
        matches!(self, Self::None)
    }

    /// The elements, ascending.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &T> {
        let (one, many) = match self {
            Self::None => (None, None),
            Self::One(one) => (Some(one), None),
            Self::Many(many) => (None, Some(many)),
        };
        one.into_iter().chain(many.into_iter().flat_map(|many| many.iter()))
    }
}

impl<T: Ord> FromIterator<T> for Few<T> {
    fn from_iter<I: IntoIterator<Item = T>>(elements: I) -> Self {
        let mut few = Self::None;
        elements.into_iter().for_each(|element| few.insert(element));
        few
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn it_is_a_set(steps in proptest::collection::vec((any::<bool>(), 0u8..4), 0..20)) {
            let (mut few, mut set) = (Few::None, BTreeSet::new());
            for (insert, element) in steps {
                if insert {
                    few.insert(element);
                    set.insert(element);
                } else {
                    few.remove(&element);
                    set.remove(&element);
                }
                prop_assert!(few.iter().eq(&set));
                prop_assert_eq!(few.is_empty(), set.is_empty());
            }
        }
    }
}
