//! Connections that have been judged since tables last changed. Pure: what stands in the kernel, and in labels.
//!
//! A packet that all have let through leaves a bit in its connection's label: that of the epoch, which ends with every
//! change of tables. While it lasts, packets of such a connection pass by one look-up. Rules can set bits of a label and not
//! clear them, so an epoch's bit is given out again only after a walk over all connections has cleared it.

use crate::object::Element;
use crate::schema::{CURRENT, FRESH};

/// A label.
pub(crate) type Label = [u8; 16];

/// How many epochs there are before bits must be cleared.
pub(crate) const EPOCHS: usize = 4;

/// Where a connection is judged. What it means there differs, so each has bits of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    /// Between others.
    Forward,
    /// At the host itself.
    Local,
}

/// Bits that decisions leave free: byte and bit, by epoch.
const FORWARD: [(usize, u8); EPOCHS] = [(0, 1 << 2), (4, 1 << 2), (4, 1 << 3), (4, 1 << 4)];
const LOCAL: [(usize, u8); EPOCHS] = [(8, 1 << 2), (12, 1 << 2), (12, 1 << 3), (12, 1 << 4)];

impl Place {
    pub(crate) const BOTH: [Self; 2] = [Self::Forward, Self::Local];

    fn bits(self) -> &'static [(usize, u8); EPOCHS] {
        match self {
            Self::Forward => &FORWARD,
            Self::Local => &LOCAL,
        }
    }

    /// Of every epoch.
    pub(crate) fn mask(self) -> Label {
        self.label((1 << EPOCHS) - 1)
    }

    /// Of some epochs, as bits.
    fn label(self, epochs: u8) -> Label {
        let mut label = [0; 16];
        let some = self.bits().iter().enumerate().filter(|(epoch, _)| epochs >> epoch & 1 == 1);
        some.for_each(|(_, (byte, bit))| label[*byte] |= bit);
        label
    }

    /// Key of the bit in force.
    pub(crate) fn key(self) -> Vec<u8> {
        vec![0, 0, 0, if self == Self::Forward { 1 } else { 2 }]
    }
}

/// Which epochs a label speaks of, as bits; anywhere.
pub(crate) fn epochs_of(label: &[u8]) -> u8 {
    let has = |(byte, bit): &(usize, u8)| label.get(*byte).is_some_and(|have| have & bit != 0);
    let one = |epoch: usize| Place::BOTH.iter().any(|place| has(&place.bits()[epoch]));
    (0..EPOCHS).filter(|epoch| one(*epoch)).fold(0, |all, epoch| all | 1 << epoch)
}

/// Bits of these epochs, everywhere.
pub(crate) fn mask_of(epochs: u8) -> Label {
    let [forward, local] = Place::BOTH.map(|place| place.label(epochs));
    std::array::from_fn(|byte| forward[byte] | local[byte])
}

/// Elements by set.
pub(crate) type Elements = [(crate::object::Set, Vec<Element>); 2];

/// The epochs, as the kernel has them.
#[derive(Debug, Clone)]
pub(crate) struct Epochs {
    /// In force, with its elements.
    current: Option<(u8, Elements)>,
    /// Those whose bits some connection may have, as bits.
    used: u8,
}

impl Default for Epochs {
    /// Nothing is in force, and nothing known of labels.
    fn default() -> Self {
        Self { current: None, used: (1 << EPOCHS) - 1 }
    }
}

impl Epochs {
    /// What an earlier process left.
    pub(crate) fn found(current: Vec<Element>, fresh: Vec<Element>) -> Self {
        let label = current.iter().find_map(|element| match element {
            Element::Key { data, .. } => Some(epochs_of(data)),
            _ => None,
        });
        let elements = [(CURRENT, current), (FRESH, fresh)];
        Self { current: label.map(|epoch| (epoch, elements)), ..Self::default() }
    }

    /// Ends the epoch in force: what to remove.
    pub(crate) fn end(&mut self) -> Option<Elements> {
        self.current.take().map(|(_, elements)| elements)
    }

    pub(crate) fn is_in_force(&self) -> bool {
        self.current.is_some()
    }

    /// Begins one whose bit no connection has: what to add. `None` if there is none.
    pub(crate) fn begin(&mut self, places: &[Place]) -> Option<Elements> {
        let epoch = (0..EPOCHS).map(|epoch| 1u8 << epoch).find(|epoch| self.used & epoch == 0)?;
        let (mut current, mut fresh) = (Vec::new(), Vec::new());
        for place in places {
            current.push(Element::Key { key: place.key(), data: place.label(epoch).to_vec() });
            // Whatever is left of others beside it.
            let beside = (0..1u8 << EPOCHS).filter(|others| others & !self.used == 0);
            fresh.extend(
                beside.map(|others| Element::Key {
                    key: place.label(others | epoch).to_vec(),
                    data: Vec::new(),
                }),
            );
        }
        self.used |= epoch;
        let elements = [(CURRENT, current), (FRESH, fresh)];
        self.current = Some((epoch, elements.clone()));
        Some(elements)
    }

    /// Those that are over and whose bits are to be cleared.
    pub(crate) fn over(&self) -> u8 {
        self.used & !self.current.as_ref().map_or(0, |(epoch, _)| *epoch)
    }

    /// No connection has their bits any more. What they stand beside may stay.
    pub(crate) fn cleared(&mut self, epochs: u8) {
        self.used &= !epochs;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schema::DECISION_MASK;

    #[test]
    fn a_bit_is_given_out_again_only_when_it_was_cleared() {
        let mut epochs = Epochs::default();
        assert!(epochs.begin(&Place::BOTH).is_none(), "nothing is known of labels");
        epochs.cleared(epochs.over());
        let mut seen = 0;
        for _ in 0..EPOCHS {
            let [(_, current), (_, fresh)] = epochs.begin(&Place::BOTH).unwrap();
            let Element::Key { data, .. } = &current[0] else { panic!() };
            let epoch = epochs_of(data);
            assert_eq!(seen & epoch, 0);
            // A connection with any of the former bits and this one is known, and none without this one.
            for element in &fresh {
                let Element::Key { key, .. } = element else { panic!() };
                assert!(epochs_of(key) & epoch != 0 && epochs_of(key) & !(seen | epoch) == 0);
            }
            assert_eq!(fresh.len(), 2 << seen.count_ones());
            seen |= epoch;
            assert!(epochs.over() & epoch == 0, "not while it is in force");
            epochs.end().unwrap();
        }
        assert!(epochs.begin(&Place::BOTH).is_none());
        epochs.cleared(0b10);
        assert_eq!(epochs.begin(&[Place::Forward]).map(|[(_, current), _]| current.len()), Some(1));
    }

    #[test]
    fn decisions_leave_these_bits_free() {
        let decisions = [&DECISION_MASK[..], &DECISION_MASK].concat();
        let mut seen = [0; 16];
        for epoch in 0..EPOCHS {
            let mask = mask_of(1 << epoch);
            for byte in 0..16 {
                assert_eq!((mask[byte] & decisions[byte], mask[byte] & seen[byte]), (0, 0));
                seen[byte] |= mask[byte];
            }
            assert_eq!(epochs_of(&mask), 1 << epoch);
        }
    }
}
