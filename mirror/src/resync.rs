//! A side that held the guest before, and has its memory still, is sent only what differs.
//!
//! It tells the digest of each page that may hold something. The primary leaves out the pages that are the same, after
//! tracking has begun: what changes later is sent later. So nothing has to be known of what happened since, and a side
//! that was stopped, cut off or handed over in any epoch can be taken back. Digests are seeded with what the guest does not
//! know, so that it cannot make two pages look alike; it would harm nobody but itself.

use xxhash_rust::xxh3::{xxh3_64_with_seed, xxh3_128_with_seed};

use crate::dirty::DirtySet;
use crate::ids::{Guid, Term};
use crate::memory::{PAGE_SIZE, PageMemory};

/// Most digests in a message.
pub const BATCH: usize = 16 << 10;

/// Bytes of a digest.
const DIGEST: usize = 16;

/// What digests are seeded with.
#[derive(Clone, Copy, Debug)]
pub struct Seed(u64);

impl Seed {
    /// For the guest `guid` as it is mirrored in `term`.
    pub fn of(guid: Guid, term: Term) -> Self {
        Self(xxh3_64_with_seed(guid.as_bytes(), term.0))
    }

    fn digest(self, page: &[u8]) -> [u8; DIGEST] {
        xxh3_128_with_seed(page, self.0).to_le_bytes()
    }
}

/// Calls `tell` with the first page and the digests of each run of `pages`, at most [`BATCH`] at a time.
///
/// # Errors
/// What `tell` answers; it is then not called again.
pub fn tell<E>(
    memory: &PageMemory,
    pages: &DirtySet,
    seed: Seed,
    mut tell: impl FnMut(u64, Vec<u8>) -> Result<(), E>,
) -> Result<(), E> {
    let mut body = [0; PAGE_SIZE];
    let mut pages = pages.iter().peekable();
    while let Some(first) = pages.next() {
        let mut digests = Vec::new();
        let mut next = first;
        loop {
            // The set is of this memory: the page can be read.
            let _ = memory.read(next, &mut body);
            digests.extend(seed.digest(&body));
            next += 1;
            if digests.len() >= BATCH * DIGEST || pages.next_if(|&page| page == next).is_none() {
                break;
            }
        }
        tell(first, digests)?;
    }
    Ok(())
}

/// What the other side has of the guest's memory.
#[derive(Debug, Default)]
pub struct Held {
    runs: Vec<(u64, Vec<u8>)>,
    pages: u64,
}

impl Held {
    /// Takes digests from page `first` on, of a memory of `all` pages.
    ///
    /// # Errors
    /// There are no such pages, or more digests than pages.
    pub fn add(&mut self, first: u64, digests: Vec<u8>, all: u64) -> Result<(), String> {
        let count = (digests.len() / DIGEST) as u64;
        self.pages += count;
        let within = first.checked_add(count).is_some_and(|end| end <= all);
        if !digests.len().is_multiple_of(DIGEST) || count == 0 || !within || self.pages > all {
            return Err(format!("{count} digests from page {first} on, of a memory of {all} pages"));
        }
        self.runs.push((first, digests));
        Ok(())
    }

    /// Takes the pages out of `pages` that the other side has as they are in `memory`, and adds those that it has although
    /// they are zero here.
    pub fn leave_out(&self, pages: &mut DirtySet, memory: &PageMemory, seed: Seed) {
        let mut body = [0; PAGE_SIZE];
        for (first, digests) in &self.runs {
            for (page, digest) in (*first..).zip(digests.chunks_exact(DIGEST)) {
                let same = pages.contains(page)
                    && memory.read(page, &mut body).is_ok()
                    && seed.digest(&body) == digest;
                if same {
                    pages.remove(page);
                } else {
                    pages.insert(page);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;
    use vm_memory::GuestAddress;

    use super::*;
    use crate::memory::GuestRam;

    const PAGES: u64 = 128;

    fn memory(pages: &[u8]) -> (PageMemory, DirtySet) {
        let ranges = [(GuestAddress(0), PAGES as usize * PAGE_SIZE)];
        let memory = PageMemory::new(Arc::new(GuestRam::from_ranges(&ranges).unwrap())).unwrap();
        let mut populated = DirtySet::new(PAGES);
        for (page, &fill) in (0..).zip(pages) {
            memory.write(page, &[fill; PAGE_SIZE]).unwrap();
            if fill != 0 {
                populated.insert(page);
            }
        }
        (memory, populated)
    }

    fn seed() -> Seed {
        Seed::of(Guid::from_u128(1), Term(2))
    }

    proptest! {
        #[test]
        fn what_is_sent_makes_both_memories_the_same(
            ours in prop::collection::vec(0_u8..4, PAGES as usize),
            theirs in prop::collection::vec(0_u8..4, PAGES as usize),
        ) {
            let (here, mut to_send) = memory(&ours);
            let (there, populated) = memory(&theirs);
            let mut held = Held::default();
            tell(&there, &populated, seed(), |first, digests| held.add(first, digests, PAGES)).unwrap();

            held.leave_out(&mut to_send, &here, seed());

            for page in 0..PAGES as usize {
                let differs = ours[page] != theirs[page];
                prop_assert_eq!(to_send.contains(page as u64), differs, "page {}", page);
            }
        }
    }

    #[test]
    fn digests_of_pages_that_there_are_not_are_refused() {
        let digests = |count: usize| vec![0; count * DIGEST];
        assert!(Held::default().add(PAGES - 1, digests(1), PAGES).is_ok());
        assert!(Held::default().add(PAGES - 1, digests(2), PAGES).is_err());
        assert!(Held::default().add(u64::MAX, digests(1), PAGES).is_err());
        assert!(Held::default().add(0, digests(0), PAGES).is_err());
        assert!(Held::default().add(0, vec![0; DIGEST + 1], PAGES).is_err());
        let mut held = Held::default();
        held.add(0, digests(PAGES as usize), PAGES).unwrap();
        assert!(held.add(0, digests(1), PAGES).is_err(), "more digests than pages");
    }

    #[test]
    fn runs_are_told_in_bounded_batches() {
        let ranges = [(GuestAddress(0), (BATCH + 64) * PAGE_SIZE)];
        let memory = PageMemory::new(Arc::new(GuestRam::from_ranges(&ranges).unwrap())).unwrap();
        let mut all = DirtySet::new(BATCH as u64 + 64);
        all.insert_range(0, BATCH as u64 + 64);
        let mut told = Vec::new();
        tell(&memory, &all, seed(), |first, digests| {
            told.push((first, digests.len() / DIGEST));
            Ok::<_, ()>(())
        })
        .unwrap();
        assert_eq!(told, [(0, BATCH), (BATCH as u64, 64)]);
    }
}
