//! A source of random numbers as a subject.

use super::input::Input;
use super::{Driver, Subject};
use crate::rate_limiter::{RateLimiterConfig, TokenBucketConfig};
use crate::virtio::rng::{Rng, RngConfig};
use crate::virtio::{DeviceState, VirtioDevice};

/// A source of random numbers.
#[derive(Default)]
pub struct RngSubject {
    /// With limits, so high that they are reached in bursts only.
    pub limited: bool,
}

impl Subject for RngSubject {
    fn device(&mut self) -> Box<dyn VirtioDevice> {
        let ops = Some(TokenBucketConfig { size: 50, one_time_burst: 0, refill_time: 1 });
        let limits = self.limited.then_some(RateLimiterConfig { bandwidth: None, ops });
        Box::new(Rng::create(&RngConfig { limits }).unwrap())
    }

    fn request(&mut self, _queue: usize, choices: &mut Input<'_>) -> (Vec<Vec<u8>>, Vec<usize>) {
        (Vec::new(), vec![1 + usize::from(choices.word()) % 5000])
    }

    fn in_flight(&self, _state: &DeviceState, _queue: usize) -> usize {
        0
    }

    fn prove(&mut self, driver: &mut Driver) {
        let request = driver.add(0, &[], &[64]);
        driver.ring(0);
        let mut used = driver.used(0);
        while used.is_empty() {
            driver.mmio.slot().ready(0);
            used = driver.used(0);
        }
        assert_eq!(used, [(request.head, 64)]);
        assert_ne!(driver.read(request.writable[0].0, 64), [0; 64]);
    }
}
