//! What a page of the working set holds: a function of its owner, its number and its generation.
//!
//! Layout of a page, in words: 0 the owner and the generation in the clear (`cpu << 32 | generation`), 1 a key mixed of
//! cpu, page and generation, 2.. the content derived from that key. Except for [`Content::Zero`], whose words 2.. are
//! zero, each word differs between two generations, so a page put together from two of them fails the check wherever
//! the seam is. (Text repeats after 65,536 generations; the two header words do not.)

use super::mix;

/// Words in a 4 KiB page.
pub const PAGE_WORDS: usize = 512;

/// One page of the working set.
pub type Page = [u64; PAGE_WORDS];

/// Words at the start of each page that identify it.
const HEADER_WORDS: usize = 2;

/// Step between neighbouring words of the stream: odd, so it visits every value.
const STRIDE: u64 = 0x9e37_79b9_7f4a_7c15;

/// What pages are filled with; decides how well they compress.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Zero but for the two header words.
    Zero,
    /// One word, repeated.
    Const,
    /// ASCII that compresses about as well as a log file.
    Text,
    /// Noise that does not compress.
    Random,
}

/// Four-letter syllables of the text content, in memory order.
const SYLLABLES: [u32; 16] = [
    u32::from_le_bytes(*b"the "),
    u32::from_le_bytes(*b"page"),
    u32::from_le_bytes(*b" of "),
    u32::from_le_bytes(*b"host"),
    u32::from_le_bytes(*b" and"),
    u32::from_le_bytes(*b"disk"),
    u32::from_le_bytes(*b" in "),
    u32::from_le_bytes(*b"time"),
    u32::from_le_bytes(*b"load"),
    u32::from_le_bytes(*b" at "),
    u32::from_le_bytes(*b"node"),
    u32::from_le_bytes(*b"read"),
    u32::from_le_bytes(*b" to "),
    u32::from_le_bytes(*b"link"),
    u32::from_le_bytes(*b"sent"),
    u32::from_le_bytes(*b"\nlog"),
];

/// Fills `page` with what `generation` of page `page_index` of vCPU `cpu` must hold.
pub fn fill_page(page: &mut Page, cpu: u32, page_index: u64, generation: u32, content: Content) {
    let key = key_of(cpu, page_index, generation);
    page[0] = header_of(cpu, generation);
    page[1] = key;
    let body = &mut page[HEADER_WORDS..];
    match content {
        Content::Zero => body.fill(0),
        Content::Const => body.fill(key),
        Content::Text => fill_body(body, |index| text_word(page_index, generation, index)),
        Content::Random => fill_body(body, |index| random_word(key, index)),
    }
}

/// Whether `page` is, in every word, what [`fill_page`] would have written.
#[must_use]
pub fn check_page(page: &Page, cpu: u32, page_index: u64, generation: u32, content: Content) -> bool {
    let key = key_of(cpu, page_index, generation);
    let header_differs = (page[0] ^ header_of(cpu, generation)) | (page[1] ^ key);
    let body = &page[HEADER_WORDS..];
    let body_differs = match content {
        Content::Zero => difference(body, |_| 0),
        Content::Const => difference(body, |_| key),
        Content::Text => difference(body, |index| text_word(page_index, generation, index)),
        Content::Random => difference(body, |index| random_word(key, index)),
    };
    header_differs | body_differs == 0
}

/// The generation that the header of `page` claims; the page need not be whole.
#[must_use]
pub const fn generation_of(page: &Page) -> u32 {
    page[0] as u32
}

const fn header_of(cpu: u32, generation: u32) -> u64 {
    (cpu as u64) << 32 | generation as u64
}

/// Different for any two generations of a page, because `mix` is a bijection.
const fn key_of(cpu: u32, page_index: u64, generation: u32) -> u64 {
    mix(generation as u64 ^ mix((cpu as u64) << 48 ^ page_index))
}

fn fill_body(body: &mut [u64], word: impl Fn(u64) -> u64) {
    for (slot, index) in body.iter_mut().zip(0..) {
        *slot = word(index);
    }
}

/// Zero if each word is as expected. Without early exit, so that it runs at memory speed.
fn difference(body: &[u64], word: impl Fn(u64) -> u64) -> u64 {
    body.iter().zip(0..).fold(0, |found, (slot, index)| found | (slot ^ word(index)))
}

/// A bijection of the key for each index. No multiplication by the key: this is to become vector code.
const fn random_word(key: u64, index: u64) -> u64 {
    let word = key.wrapping_add(STRIDE.wrapping_mul(index));
    word ^ (word >> 29)
}

/// A syllable that depends on the place, then four letters that depend on the generation.
const fn text_word(page_index: u64, generation: u32, index: u64) -> u64 {
    let place = (page_index + 1).wrapping_mul(STRIDE) ^ STRIDE.wrapping_mul(index);
    let syllable = SYLLABLES[(place >> 60) as usize];
    // An odd factor keeps generations apart modulo 65,536, and neighbours apart in every letter.
    let tag = generation.wrapping_mul(0x1357) & 0xffff;
    let letters = 0x6161_6161 + (tag & 0xf | (tag & 0xf0) << 4 | (tag & 0xf00) << 8 | (tag & 0xf000) << 12);
    (letters as u64) << 32 | syllable as u64
}
