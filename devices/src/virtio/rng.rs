//! A virtio source of random numbers (virtio 1.2, 5.4): the host kernel's.

use std::io;
use std::time::Instant;

use rustix::rand::{GetRandomFlags, getrandom};
use serde::{Deserialize, Serialize};
use vmm_sys_util::epoll::EventSet;

use super::chain::Chain;
use super::device::{DeviceError, DeviceType, Source, VirtioDevice};
use super::queue::VirtQueue;
use super::slot::RestoreError;
use super::state::DeviceState;
use crate::rate_limiter::{RateLimiter, RateLimiterConfig};

/// Descriptors of the one queue.
pub const QUEUE_SIZE: u16 = 64;
/// Most random bytes for one request; a guest that wants more asks again.
const MAX_BYTES: usize = 64 << 10;
/// Bytes made at once.
const CHUNK: usize = 256;

/// What a source of random numbers is made from.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RngConfig {
    /// Limits on what the guest gets.
    pub limits: Option<RateLimiterConfig>,
}

/// A virtio source of random numbers. It holds nothing: a request is answered at once, or left in its queue.
pub struct Rng {
    limiter: Option<RateLimiter>,
}

impl Rng {
    /// A source with the limits of `config`.
    ///
    /// # Errors
    /// The process has no descriptor left for a timer.
    pub fn create(config: &RngConfig) -> io::Result<Self> {
        let limiter = config.limits.as_ref().map(|limits| RateLimiter::new(limits, Instant::now()));
        Ok(Self { limiter: limiter.transpose()? })
    }

    fn serve(&mut self, queue: &mut VirtQueue) -> Result<(), DeviceError> {
        let (mut any, mut left) = (false, QUEUE_SIZE);
        loop {
            queue.silence()?;
            let mut limited = false;
            while left > 0 {
                limited = self.limiter.as_mut().is_some_and(|limiter| !limiter.may_take(Instant::now()));
                if limited {
                    break;
                }
                let Some(chain) = queue.pop()? else { break };
                left -= 1;
                let count = fill(&chain);
                if let Some(limiter) = &mut self.limiter {
                    limiter.charge(count as u64);
                }
                queue.complete(chain.head(), count as u32)?;
                any = true;
            }
            if left == 0 {
                // Others get their turn first, however fast the driver adds requests.
                queue.come_back();
                break;
            }
            if !queue.listen()? || limited {
                break;
            }
        }
        if any { Ok(queue.notify()?) } else { Ok(()) }
    }
}

/// Fills the buffers of `chain` and says with how much. Nothing, should the kernel have none, is an answer too.
fn fill(chain: &Chain) -> usize {
    let wanted = (chain.writable_len() as usize).min(MAX_BYTES);
    let mut done = 0;
    while done < wanted {
        let mut bytes = [0; CHUNK];
        let len = (wanted - done).min(CHUNK);
        let Ok(count @ 1..) = getrandom(&mut bytes[..len], GetRandomFlags::empty()) else { break };
        done += chain.write(done as u32, &bytes[..count]);
    }
    done
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> DeviceType {
        DeviceType::Rng
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        0
    }

    fn read_config(&self, _offset: u64, _data: &mut [u8]) {}

    fn activate(&mut self, _features: u64, _queues: &mut [VirtQueue]) {}

    fn reset(&mut self) {}

    fn doorbell(&mut self, _index: usize, queues: &mut [VirtQueue]) -> Result<(), DeviceError> {
        self.attend(queues)
    }

    fn sources(&self) -> Vec<Source> {
        let source = |limiter: &RateLimiter| Source { fd: limiter.fd(), events: EventSet::IN };
        self.limiter.iter().map(source).collect()
    }

    fn ready(&mut self, _index: usize, queues: &mut [VirtQueue]) -> Result<(), DeviceError> {
        if let Some(limiter) = &mut self.limiter {
            limiter.clear_timer();
        }
        self.attend(queues)
    }

    fn attend(&mut self, queues: &mut [VirtQueue]) -> Result<(), DeviceError> {
        queues.first_mut().map_or(Ok(()), |queue| self.serve(queue))
    }

    fn save(&mut self, state: &mut DeviceState) {
        *state = DeviceState::None;
    }

    fn restore(&mut self, state: &DeviceState, _queues: &mut [VirtQueue]) -> Result<(), RestoreError> {
        if *state == DeviceState::None { Ok(()) } else { Err(RestoreError::Kind(DeviceType::Rng)) }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::rate_limiter::TokenBucketConfig;
    use crate::virtio::driver::Driver;

    fn source(limits: Option<RateLimiterConfig>) -> Box<Rng> {
        Box::new(Rng::create(&RngConfig { limits }).unwrap())
    }

    #[test]
    fn buffers_are_filled_with_something_else_each_time_and_marked_dirty() {
        let mut driver = Driver::start(source(None), 0);
        let requests = [driver.add(0, &[], &[5000, 3000]), driver.add(0, &[], &[8000])];
        driver.begin_watch();
        driver.ring(0);
        assert!(driver.check_changes_are_marked() >= 4, "four pages and the used ring");
        assert_eq!(driver.used(0), [(requests[0].head, 8000), (requests[1].head, 8000)]);
        let bytes = |request: usize| driver.read(requests[request].writable[0].0, 3000);
        assert_ne!(bytes(0), bytes(1));
        assert!(bytes(0).iter().any(|&byte| byte != 0));
    }

    #[test]
    fn large_request_gets_a_part_and_one_without_room_nothing() {
        let mut driver = Driver::start(source(None), 0);
        driver.add(0, &[], &[1 << 20]);
        driver.add(0, &[b"no room"], &[]);
        driver.ring(0);
        assert_eq!(driver.used(0).iter().map(|&(_, len)| len).collect::<Vec<_>>(), [MAX_BYTES as u32, 0]);
    }

    #[test]
    fn limit_delays_requests_and_loses_none() {
        let ops = Some(TokenBucketConfig { size: 1, one_time_burst: 0, refill_time: 20 });
        let mut driver = Driver::start(source(Some(RateLimiterConfig { bandwidth: None, ops })), 0);
        for _ in 0..3 {
            driver.add(0, &[], &[16]);
        }
        let start = Instant::now();
        driver.ring(0);
        let mut count = driver.used(0).len();
        assert_eq!(count, 1);
        while count < 3 {
            driver.mmio.slot().ready(0);
            count += driver.used(0).len();
            assert!(start.elapsed() < Duration::from_secs(10));
        }
        assert!(start.elapsed() > Duration::from_millis(30));
    }

    #[test]
    fn successor_serves_what_was_not_taken_yet() {
        let mut driver = Driver::start(source(None), 0);
        let request = driver.add(0, &[], &[16]);
        let mut next = driver.fail_over(source(None));
        assert_eq!(next.used(0), [(request.head, 16)]);
    }
}
