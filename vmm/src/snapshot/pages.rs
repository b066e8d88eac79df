//! The memory file of a snapshot.
//!
//! Page `p` lies at [`DATA`]` + p * 4096`; pages that are not in the snapshot, or hold only zeros, are holes. Behind the
//! last page is the index: which pages the snapshot has, and a checksum for each of them.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use mirror::dirty::DirtySet;
use mirror::memory::{Layout, PAGE_SIZE};
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_64;

use super::{FileError, Identity, Preamble};

/// Where page 0 lies.
pub const DATA: u64 = PAGE_SIZE as u64;

const MAGIC: [u8; 8] = *b"USTYPAGE";
const WHAT: &str = "memory";
/// Pages written in one call, at most.
const RUN: usize = 256;

/// What a memory file says of itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PagesHeader {
    /// The snapshot.
    pub identity: Identity,
    /// Where the pages lie in the guest.
    pub layout: Layout,
    /// Pages in the snapshot.
    pub present: u64,
    /// Checksum of the index.
    pub index_checksum: u64,
}

impl PagesHeader {
    fn index_at(&self) -> u64 {
        DATA + self.layout.bytes()
    }

    fn index_len(&self) -> u64 {
        (self.layout.pages().div_ceil(64) + self.present) * 8
    }
}

/// Writes a memory file.
pub(super) struct PageWriter {
    file: File,
    layout: Layout,
    present: DirtySet,
    /// By page; meaningless where the page is not present.
    checksums: Vec<u64>,
    /// Consecutive pages that wait to be written together.
    run: Vec<u8>,
    run_start: u64,
}

impl PageWriter {
    pub(super) fn new(file: File, layout: &Layout) -> io::Result<Self> {
        // The length alone makes room for holes.
        file.set_len(DATA + layout.bytes())?;
        Ok(Self {
            file,
            layout: layout.clone(),
            present: DirtySet::new(layout.pages()),
            checksums: vec![0; layout.pages() as usize],
            run: Vec::with_capacity(RUN * PAGE_SIZE),
            run_start: 0,
        })
    }

    /// Writes `body` as page `page`, in the place of what was written there before.
    pub(super) fn write(&mut self, page: u64, body: &[u8]) -> io::Result<()> {
        let again = self.present.contains(page);
        let zero = body.iter().all(|&byte| byte == 0);
        self.checksums[page as usize] = xxh3_64(body);
        self.present.insert(page);
        if zero && !again {
            return Ok(());
        }
        let next = self.run_start + (self.run.len() / PAGE_SIZE) as u64;
        if page != next || self.run.len() == RUN * PAGE_SIZE {
            self.flush()?;
            self.run_start = page;
        }
        self.run.extend_from_slice(body);
        Ok(())
    }

    /// Pages written.
    pub(super) fn count(&self) -> u64 {
        self.present.count()
    }

    fn flush(&mut self) -> io::Result<()> {
        if !self.run.is_empty() {
            self.file.write_all_at(&self.run, DATA + self.run_start * PAGE_SIZE as u64)?;
            self.run.clear();
        }
        Ok(())
    }

    /// Writes index and header, and waits until all of it is on stable storage.
    pub(super) fn finish(mut self, identity: Identity) -> io::Result<()> {
        self.flush()?;
        let mut index = Vec::new();
        for word in self.present.words() {
            index.extend(word.to_le_bytes());
        }
        for page in self.present.iter() {
            index.extend(self.checksums[page as usize].to_le_bytes());
        }
        let header = PagesHeader {
            identity,
            present: self.present.count(),
            index_checksum: xxh3_64(&index),
            layout: self.layout,
        };
        let mut start = Preamble::encode(MAGIC, &header).map_err(io::Error::other)?;
        if start.len() as u64 > DATA {
            return Err(io::Error::other("the memory's layout has too many regions for the file's header"));
        }
        start.resize(DATA as usize, 0);
        self.file.write_all_at(&index, header.index_at())?;
        self.file.write_all_at(&start, 0)?;
        self.file.sync_all()
    }
}

/// A memory file, its header and index verified.
#[derive(Debug)]
pub struct PageReader {
    path: PathBuf,
    file: File,
    header: PagesHeader,
    present: DirtySet,
    /// In the order of the pages that are present.
    checksums: Vec<u64>,
    /// Pages present before each word of the bitmap.
    ranks: Vec<u64>,
}

impl PageReader {
    /// Opens the file at `path`.
    ///
    /// # Errors
    /// [`FileError`]
    pub fn open(path: &Path) -> Result<Self, FileError> {
        let read = |cause| FileError::Read { path: path.into(), cause };
        let file = File::open(path).map_err(read)?;
        let len = file.metadata().map_err(read)?.len();
        let mut start = vec![0; DATA.min(len) as usize];
        file.read_exact_at(&mut start, 0).map_err(read)?;
        let (header, _): (PagesHeader, _) = Preamble::decode(&start, MAGIC, WHAT, path)?;
        let wrong = |reason: &str| FileError::Content { path: path.into(), reason: reason.into() };
        if header.present > header.layout.pages() {
            return Err(wrong("it says that it has more pages than the guest"));
        }
        let wanted = header.index_at() + header.index_len();
        if len != wanted {
            return Err(FileError::Truncated { path: path.into(), len, wanted });
        }
        let mut index = vec![0; header.index_len() as usize];
        file.read_exact_at(&mut index, header.index_at()).map_err(read)?;
        if xxh3_64(&index) != header.index_checksum {
            return Err(FileError::Damaged { path: path.into(), part: "page index".into() });
        }
        let mut numbers =
            index.chunks_exact(8).map(|bytes| u64::from_le_bytes(bytes.try_into().unwrap_or_default()));
        let words: Vec<u64> = numbers.by_ref().take(header.layout.pages().div_ceil(64) as usize).collect();
        let mut present = DirtySet::new(header.layout.pages());
        present.insert_words(0, &words);
        if present.count() != header.present {
            return Err(wrong("its index does not have the pages that its header says"));
        }
        let mut before = 0;
        let ranks = words
            .iter()
            .map(|word| {
                let rank = before;
                before += u64::from(word.count_ones());
                rank
            })
            .collect();
        Ok(Self { path: path.into(), file, header, present, checksums: numbers.collect(), ranks })
    }

    /// What it says of itself.
    pub fn header(&self) -> &PagesHeader {
        &self.header
    }

    /// The pages that it has.
    pub fn present(&self) -> &DirtySet {
        &self.present
    }

    /// The file, for mapping.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Reads page `page` into `body` and verifies it. A page that is not present is refused.
    ///
    /// # Errors
    /// [`FileError`]
    pub fn read(&self, page: u64, body: &mut [u8]) -> Result<(), FileError> {
        self.read_run(page, body)
    }

    /// Reads as many pages from `first` on as fit `bodies`, and verifies them. One that is not present is refused.
    ///
    /// # Errors
    /// [`FileError`]
    pub fn read_run(&self, first: u64, bodies: &mut [u8]) -> Result<(), FileError> {
        self.file
            .read_exact_at(bodies, DATA + first * PAGE_SIZE as u64)
            .map_err(|cause| FileError::Read { path: self.path.clone(), cause })?;
        for (page, body) in (first..).zip(bodies.chunks(PAGE_SIZE)) {
            if self.checksum(page) != Some(xxh3_64(body)) {
                return Err(FileError::Damaged { path: self.path.clone(), part: format!("page {page}") });
            }
        }
        Ok(())
    }

    /// Reads and verifies every page.
    ///
    /// # Errors
    /// [`FileError`] names the first that is damaged.
    pub fn verify(&self) -> Result<(), FileError> {
        let mut body = vec![0; PAGE_SIZE];
        self.present.iter().try_for_each(|page| self.read(page, &mut body))
    }

    fn checksum(&self, page: u64) -> Option<u64> {
        if !self.present.contains(page) {
            return None;
        }
        let word = self.present.words()[(page / 64) as usize];
        let below = word & ((1 << (page % 64)) - 1);
        let rank = self.ranks[(page / 64) as usize] + u64::from(below.count_ones());
        self.checksums.get(rank as usize).copied()
    }
}
