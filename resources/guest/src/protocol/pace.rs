//! Time that cannot jump, and work that falls due as it passes.

/// Longest stretch of time believed at once, in nanoseconds.
///
/// After a pause or on another host the guest's clock may be anywhere. What was not believed is lost, so nothing has to
/// be caught up for longer than this.
const LONGEST_STEP_NS: u64 = 50_000_000;

/// Turns clock readings, which may jump either way, into elapsed time that does not.
#[derive(Default)]
pub struct Clock {
    last_ns: Option<u64>,
}

impl Clock {
    /// Nanoseconds since the last reading: 0 if the clock went back, 50 ms at most if it leapt.
    pub fn elapsed(&mut self, now_ns: u64) -> u64 {
        let last_ns = self.last_ns.replace(now_ns).unwrap_or(now_ns);
        now_ns.saturating_sub(last_ns).min(LONGEST_STEP_NS)
    }
}

/// Events that fall due at a steady rate.
pub struct Pace {
    events: u64,
    period_ns: u64,
    /// Event-nanoseconds earned and not yet spent; an event costs `period_ns`.
    credit: u64,
}

impl Pace {
    /// `events` in every `period_ns` nanoseconds (at least 1); none ever if `events` is 0.
    ///
    /// `events` must stay below 10^11, or the credit of one step would not fit.
    #[must_use]
    pub const fn new(events: u64, period_ns: u64) -> Self {
        Self { events, period_ns, credit: 0 }
    }

    /// Lets `elapsed_ns` pass. Credit is bounded, so that work which cannot be done in time is not saved up.
    pub fn earn(&mut self, elapsed_ns: u64) {
        let most = self.period_ns.saturating_add(self.events.saturating_mul(LONGEST_STEP_NS));
        let earned = self.events.saturating_mul(elapsed_ns);
        self.credit = self.credit.saturating_add(earned).min(most);
    }

    /// Takes the events that are due, `most` at most.
    pub fn take(&mut self, most: u64) -> u64 {
        let due = (self.credit / self.period_ns).min(most);
        self.credit -= due * self.period_ns;
        due
    }

    /// Nanoseconds until the next event: 0 if one is due, `u64::MAX` if none will ever be.
    #[must_use]
    pub const fn wait_ns(&self) -> u64 {
        if self.events == 0 {
            return u64::MAX;
        }
        self.period_ns.saturating_sub(self.credit).div_ceil(self.events)
    }
}
