//! What the guest programs and whoever watches them from outside agree on.
//!
//! Shared by the bare-metal guest, by the Linux userspace workload and by the host that checks both: `no_std`, no
//! dependency, integers only. The guest prints [`Line`]s; the host parses them and recomputes every sum with
//! [`ExpectedCounter`], so nothing has to be taken on the guest's word.

// The paths are spelt out so that this file can be included by `mod` and by `#[path]` alike.
#[path = "protocol/block.rs"]
mod block;
#[path = "protocol/counter.rs"]
mod counter;
#[path = "protocol/line.rs"]
mod line;
#[path = "protocol/pace.rs"]
mod pace;
#[path = "protocol/page.rs"]
mod page;
#[path = "protocol/params.rs"]
mod params;
#[path = "protocol/request.rs"]
mod request;
#[path = "protocol/worker.rs"]
mod worker;

pub use block::{fill_block, read_block};
pub use counter::{Counter, ExpectedCounter, STATE_WORDS};
pub use line::{Line, LineBuffer};
pub use pace::{Clock, Pace};
pub use page::{Content, PAGE_WORDS, Page, check_page, fill_page, generation_of};
pub use params::{Address, BadParameter, Key, MAX_CPUS, Params, Pattern};
pub use request::{BLOCK_BYTES, LONGEST_REQUEST, REGISTERS, Reply, Request, stream_byte};
pub use worker::{Platform, Worker};

/// The I/O port that ends the machine: the guest writes its exit code there, one byte.
pub const EXIT_PORT: u16 = 0x501;

/// Exit code of a run that did all it was asked to do.
pub const EXIT_OK: u8 = 0;
/// Exit code after a parameter that cannot be honoured; an `error key=…` line came before.
pub const EXIT_BAD_PARAMETER: u8 = 2;
/// Exit code after an unexpected exception; a `panic …` line came before.
pub const EXIT_PANIC: u8 = 0xff;

/// A bijection on 64-bit words that spreads every input bit over the whole output.
///
/// Being a bijection is what the page check rests on: different generations never give the same key.
#[must_use]
pub const fn mix(word: u64) -> u64 {
    let word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}
