//! The set of dirty pages: one bit a page, numbered as in [`crate::memory`].

/// A set of page numbers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DirtySet {
    words: Vec<u64>,
    pages: u64,
}

impl DirtySet {
    /// An empty set over `pages` pages.
    pub fn new(pages: u64) -> Self {
        Self { words: vec![0; pages.div_ceil(64) as usize], pages }
    }

    /// How many pages the set ranges over.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Adds `page`; a number beyond the range is ignored.
    pub fn insert(&mut self, page: u64) {
        if page < self.pages {
            self.words[(page / 64) as usize] |= 1 << (page % 64);
        }
    }

    /// Adds `count` pages from `first` on; what lies beyond the range is ignored.
    pub fn insert_range(&mut self, first: u64, count: u64) {
        let end = first.saturating_add(count).min(self.pages);
        let mut page = first;
        while page < end {
            let (word, bit) = ((page / 64) as usize, page % 64);
            let run = (64 - bit).min(end - page);
            self.words[word] |= (u64::MAX >> (64 - run)) << bit;
            page += run;
        }
    }

    /// Whether `page` is in the set.
    pub fn contains(&self, page: u64) -> bool {
        page < self.pages && self.words[(page / 64) as usize] & (1 << (page % 64)) != 0
    }

    /// Adds the pages of a bitmap whose bit 0 is page `first`, a multiple of 64. Bits beyond the range are ignored.
    pub fn insert_words(&mut self, first: u64, bitmap: &[u64]) {
        debug_assert_eq!(first % 64, 0);
        let start = (first / 64) as usize;
        for (word, &bits) in self.words.iter_mut().skip(start).zip(bitmap) {
            *word |= bits;
        }
        self.trim();
    }

    /// Adds every page of `other`: how the bits of an epoch that was never acknowledged are put back.
    pub fn union(&mut self, other: &Self) {
        debug_assert_eq!(self.pages, other.pages);
        for (word, bits) in self.words.iter_mut().zip(&other.words) {
            *word |= bits;
        }
    }

    /// Removes every page of `other`.
    pub fn subtract(&mut self, other: &Self) {
        debug_assert_eq!(self.pages, other.pages);
        for (word, bits) in self.words.iter_mut().zip(&other.words) {
            *word &= !bits;
        }
    }

    /// Removes `page`, if it is there.
    pub fn remove(&mut self, page: u64) {
        if let Some(word) = self.words.get_mut((page / 64) as usize) {
            *word &= !(1 << (page % 64));
        }
    }

    /// The words of the set, page 0 in the lowest bit of the first.
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// Removes every page.
    pub fn clear(&mut self) {
        self.words.fill(0);
    }

    /// Pages in the set.
    pub fn count(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// Whether no page is in the set: then there is nothing to copy.
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|&word| word == 0)
    }

    /// The pages, in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = u64> + '_ {
        self.words
            .iter()
            .enumerate()
            .flat_map(|(index, &word)| Bits(word).map(move |bit| index as u64 * 64 + bit))
    }

    /// Clears what lies beyond the last page in the last word.
    fn trim(&mut self) {
        let used = self.pages % 64;
        if let (true, Some(last)) = (used != 0, self.words.last_mut()) {
            *last &= u64::MAX >> (64 - used);
        }
    }
}

/// The bits that are set in a word, lowest first.
struct Bits(u64);

impl Iterator for Bits {
    type Item = u64;

    fn next(&mut self) -> Option<u64> {
        if self.0 == 0 {
            return None;
        }
        let bit = u64::from(self.0.trailing_zeros());
        self.0 &= self.0 - 1;
        Some(bit)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn behaves_as_a_set_of_numbers(pages in 1_u64..300, ops in prop::collection::vec((0_u64..400, 0_u64..200), 0..20)) {
            let mut set = DirtySet::new(pages);
            let mut model = BTreeSet::new();
            for (first, count) in ops {
                set.insert_range(first, count);
                set.insert(first);
                model.extend((first..first + count).chain([first]).filter(|page| *page < pages));
            }
            prop_assert_eq!(set.count(), model.len() as u64);
            prop_assert!(set.iter().eq(model.iter().copied()));
            prop_assert_eq!(set.is_empty(), model.is_empty());
        }

        #[test]
        fn words_beyond_the_last_page_are_ignored(pages in 1_u64..200, word: u64) {
            let mut set = DirtySet::new(pages);
            set.insert_words(0, &[word; 8]);
            prop_assert!(set.iter().all(|page| page < pages && word & (1 << (page % 64)) != 0));
        }

        #[test]
        fn bits_put_back_are_dirty_again(pages in 1_u64..300, old in prop::collection::vec(0_u64..300, 0..20), new in prop::collection::vec(0_u64..300, 0..20)) {
            let (mut a, mut b) = (DirtySet::new(pages), DirtySet::new(pages));
            for page in old.iter().copied() { a.insert(page); }
            for page in new.iter().copied() { b.insert(page); }
            b.union(&a);
            prop_assert!(old.iter().chain(&new).filter(|&&page| page < pages).all(|&page| b.contains(page)));
        }
    }
}
