//! Batches of pages: a count, a table of entries, and the bodies in the order of the table.

use std::sync::{Arc, Mutex, PoisonError};

use thiserror::Error;
use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::memory::PAGE_SIZE;

/// Most pages of a batch.
pub const BATCH_PAGES: usize = 256;

/// How the body of a page is to be read.
const ZERO: u8 = 0;
const RAW: u8 = 1;
/// Zeros, which need no memory: the guest has given the page back.
const GIVEN_BACK: u8 = 2;

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy)]
#[repr(C)]
struct Entry {
    page: U32,
    encoding: u8,
    reserved: u8,
    length: U16,
}

/// Why a payload is not a batch of pages.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum BatchError {
    /// No page, or too many.
    #[error("a batch has 1 to {BATCH_PAGES} pages, this one says {0}")]
    Count(u32),
    /// Shorter or longer than its table says.
    #[error("the batch is {got} bytes long, its table needs {want}")]
    Length {
        /// What the table needs.
        want: usize,
        /// What there is.
        got: usize,
    },
    /// The guest has no such page.
    #[error("page {page} is beyond the {pages} pages of the allocation")]
    Page {
        /// The page named.
        page: u32,
        /// How many there are.
        pages: u64,
    },
    /// Unknown encoding, or a length that does not go with it.
    #[error("page {page} has encoding {encoding} with {length} bytes")]
    Encoding {
        /// The page named.
        page: u32,
        /// Its encoding.
        encoding: u8,
        /// Its length.
        length: u16,
    },
}

/// Tells whether a page holds nothing but zeros.
pub fn is_zero(page: &[u8]) -> bool {
    // In pieces that compilers turn into vector code, with an early way out: most pages differ in the first piece.
    page.chunks(256).all(|piece| piece.iter().fold(0, |bits, byte| bits | byte) == 0)
}

/// Puts pages into batches. Bodies are not copied: the frame is written from the pieces that [`Self::pieces`] gives.
#[derive(Default)]
pub struct BatchEncoder {
    head: Vec<u8>,
    /// Runs of non-zero pages in the source, in bytes.
    runs: Vec<std::ops::Range<usize>>,
    zero_pages: usize,
}

impl BatchEncoder {
    /// An encoder that allocates no more after this.
    pub fn new() -> Self {
        Self {
            head: Vec::with_capacity(4 + BATCH_PAGES * size_of::<Entry>()),
            runs: Vec::with_capacity(BATCH_PAGES),
            zero_pages: 0,
        }
    }

    /// Encodes `pages`, at most [`BATCH_PAGES`], whose bodies follow each other in `bodies`.
    pub fn encode(&mut self, pages: &[u32], bodies: &[u8]) {
        debug_assert!(pages.len() <= BATCH_PAGES && bodies.len() == pages.len() * PAGE_SIZE);
        self.head.clear();
        self.runs.clear();
        self.zero_pages = 0;
        self.head.extend((pages.len() as u32).to_le_bytes());
        for (index, (&page, body)) in pages.iter().zip(bodies.chunks_exact(PAGE_SIZE)).enumerate() {
            let (encoding, length) = if is_zero(body) { (ZERO, 0) } else { (RAW, PAGE_SIZE as u16) };
            let entry = Entry { page: page.into(), encoding, reserved: 0, length: length.into() };
            self.head.extend_from_slice(entry.as_bytes());
            if encoding == ZERO {
                self.zero_pages += 1;
                continue;
            }
            let start = index * PAGE_SIZE;
            match self.runs.last_mut() {
                Some(run) if run.end == start => run.end += PAGE_SIZE,
                _ => self.runs.push(start..start + PAGE_SIZE),
            }
        }
    }

    /// Encodes `pages`, at most [`BATCH_PAGES`], as given back. There are no bodies.
    pub fn encode_given_back(&mut self, pages: &[u32]) {
        debug_assert!(pages.len() <= BATCH_PAGES);
        self.head.clear();
        self.runs.clear();
        self.zero_pages = 0;
        self.head.extend((pages.len() as u32).to_le_bytes());
        for &page in pages {
            let entry = Entry { page: page.into(), encoding: GIVEN_BACK, reserved: 0, length: 0.into() };
            self.head.extend_from_slice(entry.as_bytes());
        }
    }

    /// The payload in pieces; `bodies` must be what was encoded.
    pub fn pieces<'a>(&'a self, bodies: &'a [u8]) -> impl Iterator<Item = &'a [u8]> + Clone {
        std::iter::once(self.head.as_slice()).chain(self.runs.iter().map(|run| &bodies[run.clone()]))
    }

    /// How many of the encoded pages were zero.
    pub fn zero_pages(&self) -> usize {
        self.zero_pages
    }
}

/// Buffers that are used again, because the first touch of fresh memory costs more than what is done with it.
#[derive(Clone, Debug, Default)]
pub struct BufferPool(Arc<Mutex<Vec<Vec<u8>>>>);

impl BufferPool {
    /// Most idle buffers that are kept.
    const KEEP: usize = 64;

    /// A buffer of `len` bytes with some content or other.
    pub fn take(&self, len: usize) -> PooledBuffer {
        let mut bytes = self.0.lock().unwrap_or_else(PoisonError::into_inner).pop().unwrap_or_default();
        if bytes.len() < len {
            bytes.resize(len.next_multiple_of(PAGE_SIZE), 0);
        }
        PooledBuffer { bytes, len, pool: self.clone() }
    }
}

/// A buffer that goes back to its pool when it is dropped.
#[derive(Debug)]
pub struct PooledBuffer {
    bytes: Vec<u8>,
    len: usize,
    pool: BufferPool,
}

impl std::ops::Deref for PooledBuffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

impl std::ops::DerefMut for PooledBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[..self.len]
    }
}

impl Drop for PooledBuffer {
    fn drop(&mut self) {
        let mut free = self.pool.0.lock().unwrap_or_else(PoisonError::into_inner);
        if free.len() < BufferPool::KEEP {
            free.push(std::mem::take(&mut self.bytes));
        }
    }
}

/// A batch of pages as received: checked, not copied.
#[derive(Debug)]
pub struct PageBatch {
    payload: PooledBuffer,
    count: usize,
}

impl PageBatch {
    /// Checks that `payload` is a batch of pages of a guest with `pages` pages.
    ///
    /// # Errors
    /// [`BatchError`] names what is wrong.
    pub fn parse(payload: PooledBuffer, pages: u64) -> Result<Self, BatchError> {
        let (count, rest) = U32::read_from_prefix(&payload)
            .map_err(|_| BatchError::Length { want: 4, got: payload.len() })?;
        let count = count.get();
        if count == 0 || count as usize > BATCH_PAGES {
            return Err(BatchError::Count(count));
        }
        let table = count as usize * size_of::<Entry>();
        let short = BatchError::Length { want: 4 + table, got: payload.len() };
        let entries = <[Entry]>::ref_from_prefix_with_elems(rest, count as usize).map_err(|_| short)?.0;
        let mut want = 4 + table;
        for entry in entries {
            let (page, length) = (entry.page.get(), entry.length.get());
            if u64::from(page) >= pages {
                return Err(BatchError::Page { page, pages });
            }
            match (entry.encoding, length as usize) {
                (ZERO | GIVEN_BACK, 0) | (RAW, PAGE_SIZE) => want += length as usize,
                _ => return Err(BatchError::Encoding { page, encoding: entry.encoding, length }),
            }
        }
        if want != payload.len() {
            return Err(BatchError::Length { want, got: payload.len() });
        }
        Ok(Self { payload, count: count as usize })
    }

    /// How many pages the batch has; at least one.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.count
    }

    /// The pages: number and content, `None` for a page of zeros.
    pub fn iter(&self) -> impl Iterator<Item = (u32, Option<&[u8]>)> {
        let (table, mut bodies) = self.payload[4..].split_at(self.count * size_of::<Entry>());
        table.chunks_exact(size_of::<Entry>()).map(move |bytes| {
            let page = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
            if bytes[4] != RAW {
                return (page, None);
            }
            let (body, rest) = bodies.split_at(PAGE_SIZE);
            bodies = rest;
            (page, Some(body))
        })
    }

    /// Those of the pages that the guest has given back.
    pub fn given_back(&self) -> impl Iterator<Item = u32> {
        let table = &self.payload[4..][..self.count * size_of::<Entry>()];
        table
            .chunks_exact(size_of::<Entry>())
            .filter(|bytes| bytes[4] == GIVEN_BACK)
            .map(|bytes| u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn buffer(bytes: &[u8]) -> PooledBuffer {
        let mut buffer = BufferPool::default().take(bytes.len());
        buffer.copy_from_slice(bytes);
        buffer
    }

    fn bodies(fill: &[u8]) -> Vec<u8> {
        fill.iter().flat_map(|&byte| [byte; PAGE_SIZE]).collect()
    }

    proptest! {
        #[test]
        fn batch_comes_out_as_it_went_in(fill in prop::collection::vec(0_u8..3, 1..BATCH_PAGES), first in 0_u32..100) {
            let pages: Vec<u32> = (0..fill.len() as u32).map(|index| first + index * 2).collect();
            let bodies = bodies(&fill);
            let mut encoder = BatchEncoder::new();
            encoder.encode(&pages, &bodies);
            let payload = encoder.pieces(&bodies).collect::<Vec<_>>().concat();
            let batch = PageBatch::parse(buffer(&payload), 1000).unwrap();
            let decoded: Vec<_> = batch.iter().map(|(page, body)| (page, body.unwrap_or(&[0; PAGE_SIZE]).to_vec())).collect();
            let sent: Vec<_> = pages.iter().zip(bodies.chunks(PAGE_SIZE)).map(|(&p, b)| (p, b.to_vec())).collect();
            prop_assert_eq!(decoded, sent);
            prop_assert_eq!(encoder.zero_pages(), bodies.chunks(PAGE_SIZE).filter(|body| is_zero(body)).count());
        }

        #[test]
        fn hostile_payload_is_an_error_not_a_crash(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(batch) = PageBatch::parse(buffer(&bytes), 64) {
                prop_assert!(batch.iter().all(|(page, body)| page < 64 && body.is_none_or(|body| body.len() == PAGE_SIZE)));
            }
        }
    }

    #[test]
    fn pages_given_back_are_zeros_and_named() {
        let mut encoder = BatchEncoder::new();
        encoder.encode_given_back(&[3, 9]);
        let payload = encoder.pieces(&[]).collect::<Vec<_>>().concat();
        let batch = PageBatch::parse(buffer(&payload), 64).unwrap();
        assert_eq!(batch.given_back().collect::<Vec<_>>(), [3, 9]);
        assert!(batch.iter().eq([(3, None), (9, None)]));
        encoder.encode(&[5], &bodies(&[0]));
        let payload = encoder.pieces(&[]).collect::<Vec<_>>().concat();
        assert_eq!(PageBatch::parse(buffer(&payload), 64).unwrap().given_back().count(), 0);
    }

    #[test]
    fn page_beyond_the_allocation_is_refused() {
        let bodies = bodies(&[1]);
        let mut encoder = BatchEncoder::new();
        encoder.encode(&[64], &bodies);
        let payload = encoder.pieces(&bodies).collect::<Vec<_>>().concat();
        assert_eq!(
            PageBatch::parse(buffer(&payload), 64).err(),
            Some(BatchError::Page { page: 64, pages: 64 })
        );
    }

    #[test]
    fn truncated_batch_is_refused() {
        let bodies = bodies(&[1, 2]);
        let mut encoder = BatchEncoder::new();
        encoder.encode(&[1, 2], &bodies);
        let payload = encoder.pieces(&bodies).collect::<Vec<_>>().concat();
        for len in 0..payload.len() {
            assert!(PageBatch::parse(buffer(&payload[..len]), 64).is_err(), "{len} bytes");
        }
    }
}
