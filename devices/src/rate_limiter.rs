//! Rate limits for a device: token buckets for operations and for bytes, with Firecracker's parameters.
//!
//! A bucket fills evenly up to its size. A request is let through as long as the bucket is not in debt, however large it
//! is, and what it took is paid back before the next: so no request is too large for a bucket, and the rate is kept on
//! average. The limits in force are part of a device's saved state, what the buckets hold is not: after a failover they
//! begin full.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::timer::Timer;

/// How a bucket fills.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenBucketConfig {
    /// Tokens (bytes or operations) that it holds; 0: no limit.
    pub size: u64,
    /// Tokens that there are once, beyond its size.
    pub one_time_burst: u64,
    /// Milliseconds in which it fills from empty; 0: no limit.
    pub refill_time: u64,
}

/// Limits on a device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RateLimiterConfig {
    /// On bytes.
    pub bandwidth: Option<TokenBucketConfig>,
    /// On operations.
    pub ops: Option<TokenBucketConfig>,
}

#[derive(Debug)]
struct Bucket {
    size: i128,
    refill: Duration,
    burst: i128,
    tokens: i128,
    filled: Instant,
}

impl Bucket {
    fn new(config: &TokenBucketConfig, now: Instant) -> Option<Self> {
        let TokenBucketConfig { size, one_time_burst, refill_time } = *config;
        (size > 0 && refill_time > 0).then(|| Self {
            size: size.into(),
            refill: Duration::from_millis(refill_time),
            burst: one_time_burst.into(),
            tokens: size.into(),
            filled: now,
        })
    }

    fn fill(&mut self, now: Instant) {
        if self.tokens >= self.size {
            // A full bucket does not save up time either.
            self.filled = now;
            return;
        }
        let elapsed = now.saturating_duration_since(self.filled).as_nanos() as i128;
        let added = elapsed * self.size / self.refill.as_nanos() as i128;
        if added > 0 {
            self.tokens = (self.tokens + added).min(self.size);
            // What is left of the time makes a token later.
            let spent = added * self.refill.as_nanos() as i128 / self.size;
            self.filled += Duration::from_nanos(u64::try_from(spent).unwrap_or(u64::MAX));
        }
    }

    /// When the bucket is out of debt; `None`: it is not in debt.
    fn in_debt_until(&mut self, now: Instant) -> Option<Instant> {
        self.fill(now);
        (self.burst <= 0 && self.tokens <= 0).then(|| {
            let missing = 1 - self.tokens;
            let nanos = (missing.saturating_mul(self.refill.as_nanos() as i128) - 1) / self.size + 1;
            self.filled + Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
        })
    }

    fn take(&mut self, tokens: u64) {
        let from_burst = self.burst.min(tokens.into());
        self.burst -= from_burst;
        self.tokens -= i128::from(tokens) - from_burst;
    }
}

/// The limits of a device at work, with the timer that wakes it when it may go on.
pub struct RateLimiter {
    limits: RateLimiterConfig,
    bandwidth: Option<Bucket>,
    ops: Option<Bucket>,
    timer: Timer,
}

impl RateLimiter {
    /// Full buckets.
    ///
    /// # Errors
    /// The process has no descriptor left.
    pub fn new(config: &RateLimiterConfig, now: Instant) -> io::Result<Self> {
        let timer = Timer::new()?;
        let mut this = Self { limits: RateLimiterConfig::default(), bandwidth: None, ops: None, timer };
        this.set(config, now);
        Ok(this)
    }

    /// These limits, in full buckets, from now on.
    pub fn set(&mut self, limits: &RateLimiterConfig, now: Instant) {
        self.limits = *limits;
        self.bandwidth = limits.bandwidth.as_ref().and_then(|config| Bucket::new(config, now));
        self.ops = limits.ops.as_ref().and_then(|config| Bucket::new(config, now));
    }

    /// Other limits from now on. What `change` does not name stays as it is.
    pub fn update(&mut self, change: &RateLimiterConfig, now: Instant) {
        if let Some(config) = &change.bandwidth {
            self.limits.bandwidth = Some(*config);
            self.bandwidth = Bucket::new(config, now);
        }
        if let Some(config) = &change.ops {
            self.limits.ops = Some(*config);
            self.ops = Bucket::new(config, now);
        }
    }

    /// The limits in force.
    pub fn limits(&self) -> RateLimiterConfig {
        self.limits
    }

    /// As [`Self::may_take`], at this moment. Without limits nobody looks at the clock.
    pub fn may_take_now(&mut self) -> bool {
        (self.bandwidth.is_none() && self.ops.is_none()) || self.may_take(Instant::now())
    }

    /// Whether an operation may begin now. If not, [`fd`](Self::fd) becomes readable when it may.
    pub fn may_take(&mut self, now: Instant) -> bool {
        let buckets = [&mut self.bandwidth, &mut self.ops].into_iter().flatten();
        if let Some(until) = buckets.filter_map(|bucket| bucket.in_debt_until(now)).max() {
            self.timer.set(until.saturating_duration_since(now));
            return false;
        }
        true
    }

    /// One operation of `bytes` bytes was carried out.
    pub fn charge(&mut self, bytes: u64) {
        if let Some(bucket) = &mut self.bandwidth {
            bucket.take(bytes);
        }
        if let Some(bucket) = &mut self.ops {
            bucket.take(1);
        }
    }

    /// Readable when an operation that was refused may begin, until [`clear_timer`](Self::clear_timer).
    pub fn fd(&self) -> RawFd {
        self.timer.as_raw_fd()
    }

    /// Makes [`fd`](Self::fd) unreadable, and says whether it was readable.
    pub fn clear_timer(&mut self) -> bool {
        self.timer.clear()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn limiter(
        bandwidth: Option<TokenBucketConfig>,
        ops: Option<TokenBucketConfig>,
        now: Instant,
    ) -> RateLimiter {
        RateLimiter::new(&RateLimiterConfig { bandwidth, ops }, now).unwrap()
    }

    fn take(limiter: &mut RateLimiter, now: Instant, bytes: u64) -> bool {
        let may = limiter.may_take(now);
        if may {
            limiter.charge(bytes);
        }
        may
    }

    const fn bucket(size: u64, one_time_burst: u64, refill_time: u64) -> TokenBucketConfig {
        TokenBucketConfig { size, one_time_burst, refill_time }
    }

    #[test]
    fn burst_is_there_once_and_the_size_again_and_again() {
        let start = Instant::now();
        let mut limiter = limiter(None, Some(bucket(10, 5, 1000)), start);
        let taken = |limiter: &mut RateLimiter, now| (0..100).take_while(|_| take(limiter, now, 1)).count();
        assert_eq!(taken(&mut limiter, start), 15);
        assert_eq!(taken(&mut limiter, start + Duration::from_secs(1)), 10);
        assert_eq!(taken(&mut limiter, start + Duration::from_mins(1)), 10);
        assert_eq!(taken(&mut limiter, start + Duration::from_millis(60_100)), 1);
    }

    #[test]
    fn full_bucket_saves_up_no_time() {
        let start = Instant::now();
        let mut limiter = limiter(None, Some(bucket(1, 0, 20)), start);
        let first = start + Duration::from_millis(19);
        assert!(take(&mut limiter, first, 1));
        assert!(!take(&mut limiter, first + Duration::from_millis(19), 1));
        assert!(take(&mut limiter, first + Duration::from_millis(20), 1));
    }

    #[test]
    fn request_larger_than_the_bucket_is_let_through_and_paid_back() {
        let start = Instant::now();
        let mut limiter = limiter(Some(bucket(1000, 0, 100)), None, start);
        assert!(take(&mut limiter, start, 5000));
        assert!(!take(&mut limiter, start + Duration::from_millis(400), 1));
        assert!(take(&mut limiter, start + Duration::from_millis(401), 1));
    }

    #[test]
    fn refused_request_is_woken() {
        let now = Instant::now();
        let mut limiter = limiter(None, Some(bucket(1, 0, 1)), now);
        assert!(take(&mut limiter, now, 0));
        assert!(!take(&mut limiter, now, 0));
        let mut poll = libc::pollfd { fd: limiter.fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one entry, of which there is one.
        assert_eq!(unsafe { libc::poll(&raw mut poll, 1, 5000) }, 1);
        assert!(limiter.clear_timer());
        assert!(!limiter.clear_timer());
    }

    #[test]
    fn no_limits_limit_nothing() {
        let now = Instant::now();
        let mut limiter = limiter(Some(bucket(0, 0, 5)), Some(bucket(5, 0, 0)), now);
        assert!((0..1000).all(|_| take(&mut limiter, now, u64::MAX)));
    }

    #[test]
    fn update_changes_what_it_names_and_nothing_else() {
        let now = Instant::now();
        let mut limiter = limiter(None, Some(bucket(1, 0, 1000)), now);
        assert!(take(&mut limiter, now, 1));
        assert!(!take(&mut limiter, now, 1));
        limiter.update(&RateLimiterConfig { bandwidth: Some(bucket(10, 0, 1000)), ops: None }, now);
        assert!(!take(&mut limiter, now, 1), "the limit on operations is as it was, and its bucket empty");
        limiter.update(&RateLimiterConfig { bandwidth: None, ops: Some(bucket(0, 0, 0)) }, now);
        assert!(take(&mut limiter, now, 10));
        assert!(!take(&mut limiter, now, 1), "the limit on bytes that was set last holds");
        let limits = limiter.limits();
        assert_eq!(limits.bandwidth, Some(bucket(10, 0, 1000)));
        assert_eq!(limits.ops, Some(bucket(0, 0, 0)));
    }

    #[test]
    fn largest_debt_and_slowest_bucket_are_only_a_long_wait() {
        let now = Instant::now();
        let mut limiter = limiter(Some(bucket(1, 0, u64::MAX)), None, now);
        (0..3).for_each(|_| limiter.charge(u64::MAX));
        assert!(!take(&mut limiter, now + Duration::from_secs(1), 1));
    }

    proptest! {
        #[test]
        fn rate_is_kept_whatever_the_requests(
            size in 1_u64..1 << 40, burst in 0_u64..1 << 40, refill in 1_u64..10_000,
            requests in proptest::collection::vec((0_u64..100_000_000, 1_u64..1 << 32), 1..200),
        ) {
            let start = Instant::now();
            let mut limiter = limiter(Some(bucket(size, burst, refill)), None, start);
            let (mut now, mut taken, mut largest) = (start, 0_u128, 0_u64);
            for (nanos, bytes) in requests {
                now += Duration::from_nanos(nanos);
                if take(&mut limiter, now, bytes) {
                    taken += u128::from(bytes);
                    largest = largest.max(bytes);
                }
            }
            let filled = (now - start).as_nanos() * u128::from(size) / (u128::from(refill) * 1_000_000);
            prop_assert!(taken <= filled + u128::from(size) + u128::from(burst) + u128::from(largest));
        }
    }
}
