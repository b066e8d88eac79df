//! Where dirty pages are copied aside during the pause. Allocated and touched once, before the first epoch.

use crate::memory::{PAGE_SIZE, PageError, PageMemory};

/// Pages copied out of guest memory, bounded by its capacity.
#[derive(Debug)]
pub struct Staging {
    pages: Vec<u32>,
    bodies: Vec<u8>,
    capacity: usize,
}

impl Staging {
    /// Room for `capacity` pages, all of it touched, so that no page fault falls into a pause.
    pub fn new(capacity: usize) -> Self {
        let mut bodies = Vec::with_capacity(capacity * PAGE_SIZE);
        advise_huge(&bodies);
        bodies.resize(capacity * PAGE_SIZE, u8::MAX);
        Self { pages: Vec::with_capacity(capacity), bodies, capacity }
    }

    /// How many pages fit.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Copies pages of `from` until `pages` is at its end or there is no more room; replaces what was staged before.
    /// Allocates nothing.
    ///
    /// # Errors
    /// A page number that the memory does not have.
    pub fn fill(
        &mut self,
        memory: &PageMemory,
        pages: &mut impl Iterator<Item = u64>,
    ) -> Result<(), PageError> {
        self.pages.clear();
        for body in self.bodies.chunks_exact_mut(PAGE_SIZE) {
            let Some(page) = pages.next() else { break };
            memory.read(page, body)?;
            self.pages.push(page as u32);
        }
        Ok(())
    }

    /// The staged pages in batches of at most `size`: numbers and bodies.
    pub fn batches(&self, size: usize) -> impl Iterator<Item = (&[u32], &[u8])> {
        self.pages
            .chunks(size)
            .zip(self.bodies.chunks(size * PAGE_SIZE))
            .map(|(pages, bodies)| (pages, &bodies[..pages.len() * PAGE_SIZE]))
    }

    /// How many pages are staged.
    pub fn len(&self) -> usize {
        self.pages.len()
    }

    /// Whether nothing is staged.
    pub fn is_empty(&self) -> bool {
        self.pages.is_empty()
    }
}

/// Asks for huge pages behind the spare room of `bodies`: a fault then costs a tenth per page. A refusal changes
/// nothing but the time that the first touch takes.
fn advise_huge(bodies: &Vec<u8>) {
    const HUGE: usize = 2 << 20;
    let start = (bodies.as_ptr() as usize).next_multiple_of(HUGE);
    let end = (bodies.as_ptr() as usize + bodies.capacity()) / HUGE * HUGE;
    if start < end {
        // SAFETY: the range lies inside the allocation of `bodies`, and MADV_HUGEPAGE changes neither its content nor
        // its protection.
        let _ =
            unsafe { rustix::mm::madvise(start as *mut _, end - start, rustix::mm::Advice::LinuxHugepage) };
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use vm_memory::{GuestAddress, GuestMemoryMmap};

    use super::*;

    #[test]
    fn pages_come_out_in_batches_with_their_content() {
        let ram = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 64 * PAGE_SIZE)]).unwrap());
        let memory = PageMemory::new(ram).unwrap();
        for page in 0..64 {
            memory.write(page, &[page as u8; PAGE_SIZE]).unwrap();
        }
        let mut staging = Staging::new(5);
        let mut wanted = [3_u64, 9, 11, 20, 40, 41, 42].into_iter();
        staging.fill(&memory, &mut wanted).unwrap();
        let staged: Vec<_> =
            staging.batches(2).map(|(pages, bodies)| (pages.to_vec(), bodies[0], bodies.len())).collect();
        assert_eq!(staged, [(vec![3, 9], 3, 8192), (vec![11, 20], 11, 8192), (vec![40], 40, 4096)]);
        staging.fill(&memory, &mut wanted).unwrap();
        assert_eq!(staging.batches(256).map(|(pages, _)| pages.to_vec()).collect::<Vec<_>>(), [vec![41, 42]]);
    }
}
