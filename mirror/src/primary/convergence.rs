//! When to stop seeding and make the one final pause.

use std::time::Duration;

use crate::memory::PAGE_SIZE;

/// Rounds after which seeding ends in any case.
pub const MAX_ROUNDS: u32 = 30;

/// A round that leaves more than this share (in percent) of what the round before left has not shrunk it.
const SHRINKING_PERCENT: u64 = 90;

/// What a round came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Round {
    /// Pages sent in it.
    pub pages: u64,
    /// From its first page to the standby's answer.
    pub took: Duration,
    /// Pages that the guest dirtied meanwhile: what remains.
    pub remaining: u64,
}

/// What to do with the remainder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Send it in another round while the guest runs.
    Another,
    /// It fits the budget at the measured rate.
    Fits,
    /// It does not get smaller: more rounds only cost.
    NoLongerShrinks,
    /// Enough rounds.
    TooManyRounds,
}

impl Verdict {
    /// Whether the final pause comes now.
    pub fn is_final(self) -> bool {
        self != Self::Another
    }
}

/// Judges `round`, the `number`-th (from 1), which followed one that left `before` pages.
pub fn judge(number: u32, round: Round, before: u64, budget: Duration) -> Verdict {
    let rate = (round.pages.max(1) * PAGE_SIZE as u64) as f64 / round.took.as_secs_f64().max(1e-6);
    let time_for_rest = (round.remaining * PAGE_SIZE as u64) as f64 / rate;
    if time_for_rest <= budget.as_secs_f64() {
        Verdict::Fits
    } else if number >= MAX_ROUNDS {
        Verdict::TooManyRounds
    } else if round.remaining * 100 >= before * SHRINKING_PERCENT {
        Verdict::NoLongerShrinks
    } else {
        Verdict::Another
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BUDGET: Duration = Duration::from_millis(10);

    /// A round at 100 pages a millisecond.
    fn round(pages: u64, remaining: u64) -> Round {
        Round { pages, took: Duration::from_micros(pages * 10), remaining }
    }

    #[test]
    fn remainder_that_fits_the_budget_ends_seeding() {
        assert_eq!(judge(1, round(100_000, 1000), 100_000, BUDGET), Verdict::Fits);
        assert_eq!(judge(1, round(100_000, 1001), 100_000, BUDGET), Verdict::Another);
    }

    #[test]
    fn remainder_that_no_longer_shrinks_ends_seeding() {
        assert_eq!(judge(3, round(50_000, 44_999), 50_000, BUDGET), Verdict::Another);
        assert_eq!(judge(3, round(50_000, 45_000), 50_000, BUDGET), Verdict::NoLongerShrinks);
    }

    #[test]
    fn seeding_ends_after_the_last_round() {
        assert_eq!(judge(MAX_ROUNDS, round(50_000, 10_000), 50_000, BUDGET), Verdict::TooManyRounds);
    }

    #[test]
    fn idle_guest_needs_one_round() {
        let took = Duration::ZERO;
        assert_eq!(judge(1, Round { pages: 0, took, remaining: 0 }, 0, BUDGET), Verdict::Fits);
    }
}
