//! The blocks that the guest's service writes to its disk: each says which it is and what it holds, under a checksum.

use super::BLOCK_BYTES;
use super::mix;

const MAGIC: u64 = 0x756e_6465_7273_7464;
const WORDS: usize = BLOCK_BYTES / 8;

/// Fills a block: magic, number, value, then words that follow from both, the last one being the checksum of all.
pub fn fill_block(bytes: &mut [u8; BLOCK_BYTES], block: u64, value: u64) {
    let mut sum = 0_u64;
    for (index, chunk) in bytes.chunks_exact_mut(8).enumerate() {
        let word = if index == WORDS - 1 { sum } else { word(index, block, value) };
        sum = mix(sum ^ word);
        chunk.copy_from_slice(&word.to_le_bytes());
    }
}

/// The value of a block that was written whole by [`fill_block`] as number `block`.
#[must_use]
pub fn read_block(bytes: &[u8; BLOCK_BYTES], block: u64) -> Option<u64> {
    let word_at = |index: usize| {
        let mut word_bytes = [0; 8];
        word_bytes.copy_from_slice(bytes.get(index * 8..index * 8 + 8)?);
        Some(u64::from_le_bytes(word_bytes))
    };
    let value = word_at(2)?;
    let mut sum = 0_u64;
    for index in 0..WORDS {
        let expected = if index == WORDS - 1 { sum } else { word(index, block, value) };
        if word_at(index)? != expected {
            return None;
        }
        sum = mix(sum ^ expected);
    }
    Some(value)
}

const fn word(index: usize, block: u64, value: u64) -> u64 {
    match index {
        0 => MAGIC,
        1 => block,
        2 => value,
        _ => mix(mix(block) ^ value ^ index as u64),
    }
}
