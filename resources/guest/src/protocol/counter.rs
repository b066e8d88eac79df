//! The counting workload: a running number whose checksum covers 32 KiB of state.

use super::mix;

/// Words of counter state: 32 KiB, eight pages.
pub const STATE_WORDS: usize = 4096;

/// The state behind the `count` lines of one vCPU.
///
/// Step `n` changes one word, but the printed sum covers all of them: a state page that was lost, or that comes from
/// another epoch than its neighbours, makes every later sum wrong.
#[repr(C, align(4096))]
pub struct Counter {
    state: [u64; STATE_WORDS],
    n: u64,
}

impl Counter {
    /// A counter that still has to be [`reset`](Self::reset); for statics, which start as zeroes.
    #[must_use]
    #[allow(clippy::large_stack_arrays, reason = "the guest has no heap to put it on; there it is a static")]
    pub const fn blank() -> Self {
        Self { state: [0; STATE_WORDS], n: 0 }
    }

    /// Starts over with the state that belongs to `cpu` and `seed`.
    pub fn reset(&mut self, cpu: u32, seed: u64) {
        self.n = 0;
        let key = mix(seed ^ mix(u64::from(cpu) + 1));
        for (index, word) in self.state.iter_mut().enumerate() {
            *word = mix(key ^ index as u64);
        }
    }

    /// Does the next step and returns its number, counted from 1.
    pub fn advance(&mut self) -> u64 {
        self.n += 1;
        let slot = &mut self.state[self.n as usize % STATE_WORDS];
        *slot = mix(*slot ^ self.n);
        self.n
    }

    /// The sum over the whole state, read anew from memory.
    #[must_use]
    pub fn sum(&self) -> u64 {
        self.state.iter().enumerate().fold(0, |sum, (index, word)| sum.wrapping_add(folded(index, *word)))
    }
}

/// What one word of state contributes to the sum.
const fn folded(index: usize, word: u64) -> u64 {
    mix(word ^ index as u64)
}

/// The host's view of a [`Counter`]: the same sums, at the cost of one word a step.
pub struct ExpectedCounter {
    counter: Counter,
    sum: u64,
}

impl ExpectedCounter {
    /// The counter that vCPU `cpu` of a guest started with `seed=` runs.
    #[must_use]
    pub fn new(cpu: u32, seed: u64) -> Self {
        let mut counter = Counter::blank();
        counter.reset(cpu, seed);
        let sum = counter.sum();
        Self { counter, sum }
    }

    /// Does the next step; returns its number and the sum its `count` line must show.
    pub fn advance(&mut self) -> (u64, u64) {
        let index = (self.counter.n + 1) as usize % STATE_WORDS;
        self.sum = self.sum.wrapping_sub(folded(index, self.counter.state[index]));
        let n = self.counter.advance();
        self.sum = self.sum.wrapping_add(folded(index, self.counter.state[index]));
        (n, self.sum)
    }
}
