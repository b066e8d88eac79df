//! A set of the equal parts of a disk.

use std::ops::Range;

/// Some of the parts, of `size` bytes each, that a disk consists of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Regions {
    size: u64,
    count: u64,
    words: Vec<u64>,
}

impl Regions {
    /// None of the parts of a disk of `len` bytes.
    pub(super) fn none(len: u64, size: u64) -> Self {
        let parts = len.div_ceil(size);
        Self { size, count: 0, words: vec![0; parts.div_ceil(64) as usize] }
    }

    /// The parts that `len` bytes from `at` touch.
    pub(super) fn touched(&self, at: u64, len: u64) -> Range<u64> {
        at / self.size..(at + len).div_ceil(self.size)
    }

    /// How many are in the set.
    pub(super) fn count(&self) -> u64 {
        self.count
    }

    /// Whether `part` is in the set.
    pub(super) fn contains(&self, part: u64) -> bool {
        self.words.get((part / 64) as usize).is_some_and(|word| word & 1 << (part % 64) != 0)
    }

    /// Whether any of `parts` is in the set.
    pub(super) fn contains_any(&self, mut parts: Range<u64>) -> bool {
        parts.any(|part| self.contains(part))
    }

    /// Adds `part`; says whether it was not there.
    pub(super) fn insert(&mut self, part: u64) -> bool {
        let Some(word) = self.words.get_mut((part / 64) as usize) else { return false };
        let new = *word & 1 << (part % 64) == 0;
        *word |= 1 << (part % 64);
        self.count += u64::from(new);
        new
    }

    /// Takes `part` out.
    pub(super) fn remove(&mut self, part: u64) {
        if self.contains(part) {
            self.words[(part / 64) as usize] &= !(1 << (part % 64));
            self.count -= 1;
        }
    }

    /// The first in the set that is not before `part`.
    pub(super) fn next(&self, part: u64) -> Option<u64> {
        let first = (part / 64) as usize;
        let mut mask = !0 << (part % 64);
        for (index, word) in self.words.iter().enumerate().skip(first) {
            let word = word & mask;
            if word != 0 {
                return Some(index as u64 * 64 + u64::from(word.trailing_zeros()));
            }
            mask = !0;
        }
        None
    }

    /// Those in the set, in order.
    pub(super) fn iter(&self) -> impl Iterator<Item = u64> + '_ {
        std::iter::successors(self.next(0), |&part| self.next(part + 1))
    }

    /// Those in the set as ranges, but at most `most`: then one range over all of them.
    pub(super) fn ranges(&self, most: usize) -> Vec<Range<u64>> {
        let mut ranges: Vec<Range<u64>> = Vec::new();
        for part in self.iter() {
            let full = ranges.len() >= most;
            match ranges.last_mut() {
                Some(last) if last.end == part || full => last.end = part + 1,
                _ => ranges.push(part..part + 1),
            }
        }
        ranges
    }
}

impl Extend<u64> for Regions {
    fn extend<I: IntoIterator<Item = u64>>(&mut self, parts: I) {
        for part in parts {
            self.insert(part);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_put_in_is_found_in_order_and_can_be_taken_out() {
        let mut set = Regions::none(1000 * 10, 10);
        set.extend([999, 0, 64, 63, 64]);
        assert_eq!(set.iter().collect::<Vec<_>>(), [0, 63, 64, 999]);
        assert_eq!((set.count(), set.next(65)), (4, Some(999)));
        set.remove(63);
        assert_eq!(set.ranges(8), [0..1, 64..65, 999..1000]);
        assert_eq!(set.ranges(2), [0..1, 64..1000], "too many become fewer that hold more");
        assert!(set.contains_any(set.touched(635, 10)) && !set.contains_any(set.touched(630, 10)));
    }
}
