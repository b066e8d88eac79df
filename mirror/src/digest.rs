//! A digest over the frames of a round or an epoch.

use xxhash_rust::xxh3::xxh3_64_with_seed;

/// Chains the checksums of frames in their order. Each checksum covers a whole frame, so two sides that come to the
/// same digest have sent and received the same bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Digest(u64);

impl Digest {
    /// Adds the next frame.
    pub fn add(&mut self, checksum: u64) {
        self.0 = xxh3_64_with_seed(&checksum.to_le_bytes(), self.0);
    }

    /// The digest so far.
    pub fn value(self) -> u64 {
        self.0
    }
}
