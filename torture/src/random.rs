//! Chance that can be repeated: SplitMix64, whose numbers follow from the seed on every machine and in every release.
//!
//! A generator from a library would do as well, but may change with a version, and a seed in a report must go on
//! meaning what it meant.

/// Numbers that follow from a seed. A clone goes on with the same numbers.
#[derive(Clone, Debug)]
pub(crate) struct Random(u64);

impl Random {
    /// One sequence for each part: what one part of a run draws does not depend on how often another draws.
    pub(crate) fn of(seed: u64, part: &str) -> Self {
        let mut random = Self(seed);
        for byte in part.bytes() {
            random.0 = random.next() ^ u64::from(byte);
        }
        random
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// From `low` up to, but without, `high`.
    pub(crate) fn within(&mut self, low: u64, high: u64) -> u64 {
        low + self.next() % (high - low)
    }

    /// True so many times in a hundred.
    pub(crate) fn percent(&mut self, chance: u64) -> bool {
        self.within(0, 100) < chance
    }

    pub(crate) fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.index(from.len())]
    }

    pub(crate) fn index(&mut self, length: usize) -> usize {
        usize::try_from(self.within(0, length as u64)).expect("an index came from a length")
    }

    pub(crate) fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.index(last + 1));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_numbers_of_a_seed_are_those_of_the_published_algorithm() {
        let mut random = Random(1_234_567);
        assert_eq!(
            [random.next(), random.next(), random.next()],
            [6_457_827_717_110_365_317, 3_203_168_211_198_807_973, 9_817_491_932_198_370_423]
        );
    }

    #[test]
    fn parts_of_a_seed_differ_and_stay_the_same() {
        assert_eq!(Random::of(1, "faults").next(), Random::of(1, "faults").next());
        assert_ne!(Random::of(1, "faults").next(), Random::of(1, "clients").next());
        assert_ne!(Random::of(1, "faults").next(), Random::of(2, "faults").next());
    }
}
