//! When an epoch ends.
//!
//! While nobody outside waits, an epoch lasts as long as it may: a longer one costs the guest less. Output that waits ends
//! it, but not before its own pause has been earned: a guest that always has something to say would else stand still for
//! most of the time. Where shortest and longest time are the same, all epochs last just as long.

use std::time::Duration;

use super::Pacing;

/// The guest runs at least so many times as long as it stood still, if that is for output that waits.
const EARNED: u32 = 4;

/// Of how many pauses the expected one is the mean, about: one that was long by chance is no rule.
const MEMORY: u32 = 8;

/// What is known of the epochs so far.
#[derive(Debug, Default)]
pub(super) struct Pace {
    /// When the last pause began.
    paused: Duration,
    /// What a pause takes.
    pause: Duration,
    /// Output waits, as far as was looked in this epoch.
    waits: bool,
}

impl Pace {
    /// The pause begins.
    pub(super) fn pauses(&mut self, now: Duration) {
        self.paused = now;
    }

    /// The pause is over, and another epoch has begun.
    pub(super) fn goes_on(&mut self, now: Duration) {
        let took = now.saturating_sub(self.paused);
        self.pause = (self.pause * (MEMORY - 1) + took) / MEMORY;
        self.waits = false;
    }

    /// Whether an epoch of this age is to end.
    pub(super) fn is_over(
        &mut self,
        bounds: &Pacing,
        age: Duration,
        waits: bool,
        dirty: Option<u64>,
    ) -> bool {
        self.waits = waits;
        // A pause that is too long gets longer by waiting.
        let crowded = dirty.is_some_and(|pages| pages >= bounds.dirty_budget);
        age >= self.due(bounds) || (crowded && age >= bounds.min_interval)
    }

    /// How long an epoch of this age lasts yet, if nothing happens.
    pub(super) fn left(&self, bounds: &Pacing, age: Duration) -> Duration {
        self.due(bounds).saturating_sub(age)
    }

    /// The age at which the epoch ends, as far as is known.
    fn due(&self, bounds: &Pacing) -> Duration {
        if self.waits {
            (self.pause * EARNED).max(bounds.min_interval).min(bounds.interval)
        } else {
            bounds.interval
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn between(shortest: u64, longest: u64) -> Pacing {
        Pacing { min_interval: ms(shortest), interval: ms(longest), ..Pacing::default() }
    }

    /// After many pauses that took so long.
    fn after_pauses_of(pause: Duration) -> Pace {
        let mut pace = Pace::default();
        for turn in 0..100 {
            pace.pauses(ms(100) * turn);
            pace.goes_on(ms(100) * turn + pause);
        }
        pace
    }

    #[test]
    fn output_that_waits_ends_an_epoch_and_silence_lengthens_it() {
        let (mut pace, bounds) = (Pace::default(), between(1, 25));
        assert!(!pace.is_over(&bounds, ms(24), false, Some(0)));
        assert!(pace.is_over(&bounds, ms(25), false, Some(0)));
        assert!(!pace.is_over(&bounds, Duration::from_micros(999), true, Some(0)));
        assert!(pace.is_over(&bounds, ms(1), true, Some(0)));
    }

    #[test]
    fn fixed_target_holds_for_output_and_for_silence() {
        let (mut pace, bounds) = (after_pauses_of(ms(30)), between(5, 5));
        for waits in [false, true] {
            assert!(!pace.is_over(&bounds, ms(4), waits, None), "{waits}");
            assert!(pace.is_over(&bounds, ms(5), waits, None), "{waits}");
        }
    }

    #[test]
    fn guest_with_long_pauses_runs_four_times_as_long_in_between() {
        let (mut pace, bounds) = (after_pauses_of(ms(2)), between(1, 25));
        assert!(!pace.is_over(&bounds, ms(7), true, None));
        assert!(pace.is_over(&bounds, ms(8), true, None));
        assert!(after_pauses_of(ms(9)).is_over(&bounds, ms(25), true, None), "not beyond the longest time");
    }

    #[test]
    fn one_long_pause_does_not_rule_the_next_epochs() {
        let mut pace = after_pauses_of(Duration::from_micros(200));
        pace.pauses(ms(20_000));
        pace.goes_on(ms(20_010));
        assert!(pace.is_over(&between(1, 25), ms(6), true, None));
    }

    #[test]
    fn many_dirty_pages_end_an_epoch_whatever_pauses_cost() {
        let (mut pace, bounds) = (after_pauses_of(ms(5)), between(1, 25));
        assert!(!pace.is_over(&bounds, ms(1), false, Some(bounds.dirty_budget - 1)));
        assert!(pace.is_over(&bounds, ms(1), false, Some(bounds.dirty_budget)));
    }

    #[test]
    fn time_left_is_exact_in_both_cases_and_begins_anew_with_each_epoch() {
        let (mut pace, bounds) = (Pace::default(), between(1, 25));
        assert_eq!(pace.left(&bounds, ms(5)), ms(20));
        assert!(!pace.is_over(&bounds, Duration::from_micros(400), true, None));
        assert_eq!(pace.left(&bounds, Duration::from_micros(400)), Duration::from_micros(600));
        pace.goes_on(Duration::ZERO);
        assert_eq!(pace.left(&bounds, ms(0)), ms(25));
        assert_eq!(pace.left(&bounds, ms(30)), ms(0));
    }
}
