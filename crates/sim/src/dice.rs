//! Numbers that look random and are the same for the same seed (SplitMix64).

/// A stream of them.
#[derive(Debug, Clone)]
pub(crate) struct Dice(u64);

impl Dice {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = self.0;
        bits = (bits ^ bits >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ bits >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        bits ^ bits >> 31
    }

    /// One of `0..sides`; 0 if there is none.
    pub(crate) fn roll(&mut self, sides: u32) -> u32 {
        // Smaller than `sides`.
        (self.next() % u64::from(sides.max(1))) as u32
    }

    /// True so many times of a thousand.
    pub(crate) fn chance(&mut self, of_a_thousand: u32) -> bool {
        self.roll(1000) < of_a_thousand
    }
}
