//! A virtio memory balloon (virtio 1.2, 5.5): the guest gives pages back to the host, because it is asked to (it
//! inflates the balloon) or because it does not need them (free page reporting).
//!
//! What a page held is lost when it is given back, and nobody copies or mirrors it any more until it is written again.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsRawFd;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use vmm_sys_util::epoll::EventSet;

use super::chain::Chain;
use super::device::{DeviceError, DeviceType, Source, VirtioDevice, read_config};
use super::queue::VirtQueue;
use super::slot::RestoreError;
use super::state::DeviceState;
use crate::timer::Timer;

/// Descriptors of each queue.
pub const QUEUE_SIZE: u16 = 256;
const INFLATE: usize = 0;
const DEFLATE: usize = 1;
/// Statistics, where they were accepted; reported pages come behind them, or here.
const FIRST_OPTIONAL: usize = 2;

const F_STATISTICS: u64 = 1 << 1;
const F_DEFLATE_ON_OOM: u64 = 1 << 2;
const F_REPORTING: u64 = 1 << 5;

const PAGE: u64 = 4096;
const PAGES_PER_MIB: u32 = 256;
/// Most page numbers in one request; Linux and the BSDs send 256.
const MAX_NUMBERS: u32 = 4096;
/// Page numbers and buffers after which others get their turn.
const BATCH: usize = 4096;
/// Page numbers that are copied at once.
const CHUNK: usize = 256;
/// Bytes of one figure of the statistics: tag and value.
const FIGURE: usize = 10;
/// Most figures that are looked at; there are 16 kinds.
const MAX_FIGURES: usize = 64;

/// Takes pages back for the host.
pub trait Discard: Send {
    /// The guest has no more use for what the `len` bytes at guest physical address `start`, whole pages, hold. They may
    /// lie outside of memory.
    fn discard(&mut self, start: u64, len: u64);
}

/// What a balloon is made from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonConfig {
    /// MiB that the guest is asked to give back.
    pub amount_mib: u32,
    /// Whether the guest may take pages back before it runs out of memory.
    pub deflate_on_oom: bool,
    /// Seconds between two looks at the guest's statistics; 0: none.
    pub statistics_interval_s: u16,
    /// Whether the guest tells of pages that it does not need.
    pub free_page_reporting: bool,
}

/// What a balloon holds beyond its registers and queues.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonState {
    /// Pages that the guest is asked to give back.
    pub target: u32,
    /// Pages that it says it has given.
    pub actual: u32,
    /// Head of the guest's last statistics, which it gets back when new ones are wanted.
    pub statistics: Option<u16>,
}

/// A virtio balloon.
pub struct Balloon {
    config: BalloonConfig,
    queue_sizes: Vec<u16>,
    accepted: u64,
    target: u32,
    actual: u32,
    pending_statistics: Option<u16>,
    /// The guest's figures by tag (virtio 1.2, 5.5.6.4).
    statistics: BTreeMap<u16, u64>,
    changed: bool,
    timer: Timer,
    pages: Box<dyn Discard>,
}

impl Balloon {
    /// A balloon that gives pages to `pages`.
    ///
    /// # Errors
    /// The process has no descriptor left for its timer.
    pub fn create(config: &BalloonConfig, pages: Box<dyn Discard>) -> io::Result<Self> {
        let optional =
            usize::from(config.statistics_interval_s > 0) + usize::from(config.free_page_reporting);
        Ok(Self {
            config: *config,
            queue_sizes: vec![QUEUE_SIZE; FIRST_OPTIONAL + optional],
            accepted: 0,
            target: config.amount_mib.saturating_mul(PAGES_PER_MIB),
            actual: 0,
            pending_statistics: None,
            statistics: BTreeMap::new(),
            changed: false,
            timer: Timer::new()?,
            pages,
        })
    }

    /// Asks the guest to give back `mib` MiB in all. [`VirtioDevice::attend`] must follow.
    pub fn set_amount(&mut self, mib: u32) {
        self.target = mib.saturating_mul(PAGES_PER_MIB);
        self.changed = true;
    }

    /// Pages that the guest is asked to give back.
    pub fn target(&self) -> u32 {
        self.target
    }

    /// Looks at the guest's figures every `seconds` (at least 1) from now on. False if they were not wanted at the start,
    /// when that is agreed with the guest, or are to be wanted no longer.
    pub fn set_interval(&mut self, seconds: u16) -> bool {
        let possible = self.config.statistics_interval_s > 0 && seconds > 0;
        if possible {
            self.config.statistics_interval_s = seconds;
            self.wait_for_statistics();
        }
        possible
    }

    /// The guest's last figures, by tag, and the pages that it has given.
    pub fn statistics(&self) -> (&BTreeMap<u16, u64>, u32) {
        (&self.statistics, self.actual)
    }

    fn statistics_queue(&self) -> Option<usize> {
        (self.accepted & F_STATISTICS != 0).then_some(FIRST_OPTIONAL)
    }

    fn reporting_queue(&self) -> Option<usize> {
        let behind = usize::from(self.accepted & F_STATISTICS != 0);
        (self.accepted & F_REPORTING != 0).then_some(FIRST_OPTIONAL + behind)
    }

    /// Works off `queue` with `act`, which says how much there was to do.
    fn each(
        &mut self,
        queue: &mut VirtQueue,
        act: fn(&mut Self, &Chain) -> Result<usize, DeviceError>,
    ) -> Result<(), DeviceError> {
        let (mut any, mut done) = (false, 0);
        while done < BATCH {
            let Some(chain) = queue.pop()? else {
                if queue.listen()? {
                    continue;
                }
                break;
            };
            // Before the guest has the page again: what it writes then counts.
            done += 1 + act(self, &chain)?;
            queue.complete(chain.head(), 0)?;
            any = true;
        }
        if done >= BATCH {
            queue.come_back();
        }
        if any { Ok(queue.notify()?) } else { Ok(()) }
    }

    /// Pages that the guest has put into the balloon: numbers of 4 KiB pages.
    fn inflate(&mut self, chain: &Chain) -> Result<usize, DeviceError> {
        let count = chain.readable_len() / 4;
        if count > MAX_NUMBERS {
            return Err(DeviceError::Request("a balloon request with more pages than any driver sends"));
        }
        let mut run: Option<(u64, u64)> = None;
        for start in (0..count).step_by(CHUNK) {
            let mut bytes = [0; 4 * CHUNK];
            let bytes = &mut bytes[..4 * (count - start).min(CHUNK as u32) as usize];
            chain.read(4 * start, bytes);
            for number in bytes.chunks_exact(4) {
                let number = u64::from(u32::from_le_bytes([number[0], number[1], number[2], number[3]]));
                run = match run {
                    Some((first, pages)) if number == first + pages => Some((first, pages + 1)),
                    Some((first, pages)) => {
                        self.pages.discard(first * PAGE, pages * PAGE);
                        Some((number, 1))
                    }
                    None => Some((number, 1)),
                };
            }
        }
        if let Some((first, pages)) = run {
            self.pages.discard(first * PAGE, pages * PAGE);
        }
        Ok(count as usize)
    }

    /// The guest takes pages back: they are there when it touches them.
    #[expect(clippy::unnecessary_wraps, clippy::unused_self, reason = "one of several of this form")]
    fn deflate(&mut self, _chain: &Chain) -> Result<usize, DeviceError> {
        Ok(0)
    }

    /// Pages that the guest does not need now: the buffers themselves.
    #[expect(clippy::unnecessary_wraps, reason = "one of several of this form")]
    fn report(&mut self, chain: &Chain) -> Result<usize, DeviceError> {
        for buffer in chain.writable() {
            let start = buffer.address.0.next_multiple_of(PAGE);
            let end = (buffer.address.0 + u64::from(buffer.len)) / PAGE * PAGE;
            if end > start {
                self.pages.discard(start, end - start);
            }
        }
        Ok(chain.writable().len())
    }

    /// The guest has sent figures; it gets the buffer back when it is time for new ones.
    fn take_statistics(&mut self, queue: &mut VirtQueue) -> Result<(), DeviceError> {
        let mut any = false;
        for left in (0..QUEUE_SIZE).rev() {
            if left == 0 {
                queue.come_back();
            }
            let Some(chain) = queue.pop()? else {
                if queue.listen()? {
                    continue;
                }
                break;
            };
            let count = (chain.readable_len() as usize / FIGURE).min(MAX_FIGURES);
            for index in 0..count {
                let mut figure = [0; FIGURE];
                chain.read((index * FIGURE) as u32, &mut figure);
                let mut value = [0; 8];
                value.copy_from_slice(&figure[2..]);
                let tag = u16::from_le_bytes([figure[0], figure[1]]);
                if usize::from(tag) < MAX_FIGURES {
                    self.statistics.insert(tag, u64::from_le_bytes(value));
                }
            }
            if let Some(before) = self.pending_statistics.replace(chain.head()) {
                // A driver has one at a time.
                queue.complete(before, 0)?;
                any = true;
            }
        }
        if any { Ok(queue.notify()?) } else { Ok(()) }
    }

    fn wait_for_statistics(&self) {
        if self.config.statistics_interval_s > 0 {
            self.timer.set(Duration::from_secs(self.config.statistics_interval_s.into()));
        }
    }
}

impl VirtioDevice for Balloon {
    fn device_type(&self) -> DeviceType {
        DeviceType::Balloon
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn features(&self) -> u64 {
        let offer = |wanted, feature| if wanted { feature } else { 0 };
        offer(self.config.deflate_on_oom, F_DEFLATE_ON_OOM)
            | offer(self.config.statistics_interval_s > 0, F_STATISTICS)
            | offer(self.config.free_page_reporting, F_REPORTING)
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0; 8];
        config[..4].copy_from_slice(&self.target.to_le_bytes());
        config[4..].copy_from_slice(&self.actual.to_le_bytes());
        read_config(&config, offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let (4, Ok(actual)) = (offset, <[u8; 4]>::try_from(data)) {
            self.actual = u32::from_le_bytes(actual);
        }
    }

    fn activate(&mut self, features: u64, _queues: &mut [VirtQueue]) {
        self.accepted = features;
        self.wait_for_statistics();
    }

    fn reset(&mut self) {
        self.accepted = 0;
        self.actual = 0;
        self.pending_statistics = None;
        self.statistics.clear();
    }

    fn doorbell(&mut self, index: usize, queues: &mut [VirtQueue]) -> Result<(), DeviceError> {
        let statistics = Some(index) == self.statistics_queue();
        let reporting = Some(index) == self.reporting_queue();
        let Some(queue) = queues.get_mut(index) else { return Ok(()) };
        match index {
            INFLATE => self.each(queue, Self::inflate),
            DEFLATE => self.each(queue, Self::deflate),
            _ if statistics => self.take_statistics(queue),
            _ if reporting => self.each(queue, Self::report),
            _ => Ok(()),
        }
    }

    fn sources(&self) -> Vec<Source> {
        vec![Source { fd: self.timer.as_raw_fd(), events: EventSet::IN }]
    }

    fn ready(&mut self, _index: usize, queues: &mut [VirtQueue]) -> Result<(), DeviceError> {
        if self.timer.clear()
            && let Some(queue) = self.statistics_queue().and_then(|index| queues.get_mut(index))
        {
            if let Some(head) = self.pending_statistics.take() {
                queue.complete(head, 0)?;
                queue.notify()?;
            }
            self.wait_for_statistics();
        }
        Ok(())
    }

    fn attend(&mut self, queues: &mut [VirtQueue]) -> Result<(), DeviceError> {
        if std::mem::take(&mut self.changed)
            && let Some(queue) = queues.first()
        {
            queue.interrupt().config_changed();
        }
        (0..queues.len()).try_for_each(|index| self.doorbell(index, queues))
    }

    fn save(&mut self, state: &mut DeviceState) {
        let Self { target, actual, .. } = *self;
        *state = DeviceState::Balloon(BalloonState { target, actual, statistics: self.pending_statistics });
    }

    fn restore(&mut self, state: &DeviceState, queues: &mut [VirtQueue]) -> Result<(), RestoreError> {
        let DeviceState::Balloon(state) = state else { return Err(RestoreError::Kind(DeviceType::Balloon)) };
        let size = self.statistics_queue().and_then(|index| queues.get(index)).map_or(0, VirtQueue::size);
        if state.statistics.is_some_and(|head| head >= size) {
            let reason = "its statistics are in a chain that its queue cannot have";
            return Err(RestoreError::Field { device: DeviceType::Balloon, reason });
        }
        (self.target, self.actual, self.pending_statistics) = (state.target, state.actual, state.statistics);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;
    use crate::virtio::driver::Driver;

    /// Notes what is given back.
    #[derive(Clone, Default)]
    struct Given(Arc<Mutex<Vec<(u64, u64)>>>);

    impl Discard for Given {
        fn discard(&mut self, start: u64, len: u64) {
            self.0.lock().unwrap().push((start, len));
        }
    }

    impl Given {
        fn take(&self) -> Vec<(u64, u64)> {
            std::mem::take(&mut self.0.lock().unwrap())
        }
    }

    const ALL: BalloonConfig = BalloonConfig {
        amount_mib: 3,
        deflate_on_oom: true,
        statistics_interval_s: 1,
        free_page_reporting: true,
    };

    fn balloon(given: &Given) -> Box<dyn VirtioDevice> {
        Box::new(new(given))
    }

    fn new(given: &Given) -> Balloon {
        Balloon::create(&ALL, Box::new(given.clone())).unwrap()
    }

    fn numbers(list: &[u32]) -> Vec<u8> {
        list.iter().flat_map(|number| number.to_le_bytes()).collect()
    }

    #[test]
    fn pages_put_into_the_balloon_are_given_back_in_runs() {
        let given = Given::default();
        let mut driver = Driver::start(balloon(&given), 0);
        assert_eq!(driver.config(0, 4), (3 * 256_u32).to_le_bytes());
        driver.add(INFLATE, &[&numbers(&[7, 8, 9, 20, 5])], &[]);
        driver.begin_watch();
        driver.ring(INFLATE);
        driver.check_changes_are_marked();
        assert_eq!(given.take(), [(7 * PAGE, 3 * PAGE), (20 * PAGE, PAGE), (5 * PAGE, PAGE)]);
        assert_eq!(driver.used(INFLATE).len(), 1);
        driver.add(DEFLATE, &[&numbers(&[7])], &[]);
        driver.ring(DEFLATE);
        assert_eq!(driver.used(DEFLATE).len(), 1);
        assert!(given.take().is_empty());
    }

    #[test]
    fn pages_that_are_reported_free_are_given_back_as_far_as_they_are_whole() {
        for (without, queue) in [(0, 3), (F_STATISTICS, 2)] {
            let given = Given::default();
            let mut driver = Driver::start(balloon(&given), without);
            driver.add_chain(queue, &[(0x20_0000, 0x4000, 2), (0x30_0800, 0x1800, 2), (0x30_4001, 0xfff, 2)]);
            driver.ring(queue);
            assert_eq!(given.take(), [(0x20_0000, 0x4000), (0x30_1000, 0x1000)]);
            assert_eq!(driver.used(queue).len(), 1);
        }
    }

    #[test]
    fn guest_is_told_of_another_amount() {
        let given = Given::default();
        let mut device = new(&given);
        device.set_amount(9);
        let mut driver = Driver::start(Box::new(device), 0);
        driver.mmio.slot().attend();
        assert_eq!(driver.take_interrupt() & 2, 2);
        assert_eq!(driver.config(0, 4), (9 * 256_u32).to_le_bytes());
    }

    #[test]
    fn figures_are_taken_and_asked_for_again() {
        let given = Given::default();
        let mut device = new(&given);
        device.config.statistics_interval_s = 1;
        let mut driver = Driver::start(Box::new(device), 0);
        let figures = [&[4, 0][..], &1234_u64.to_le_bytes(), &[0xff, 0xff], &[0; 8]].concat();
        let request = driver.add(FIRST_OPTIONAL, &[&figures], &[]);
        driver.ring(FIRST_OPTIONAL);
        assert!(driver.used(FIRST_OPTIONAL).is_empty(), "kept until new ones are wanted");
        let start = std::time::Instant::now();
        let mut used = Vec::new();
        while used.is_empty() && start.elapsed() < Duration::from_secs(10) {
            driver.mmio.slot().ready(0);
            used = driver.used(FIRST_OPTIONAL);
        }
        assert_eq!(used, [(request.head, 0)]);
    }

    #[test]
    fn successor_knows_what_was_given_and_has_the_figures_in_flight() {
        let given = Given::default();
        let mut driver = Driver::start(balloon(&given), 0);
        driver.add(FIRST_OPTIONAL, &[&[0; FIGURE]], &[]);
        driver.ring(FIRST_OPTIONAL);
        driver.write_config(4, &77_u32.to_le_bytes());
        let mut next = driver.fail_over(balloon(&given));
        assert_eq!(next.config(4, 4), 77_u32.to_le_bytes());
        assert!(next.used(FIRST_OPTIONAL).is_empty());
        let mut state = crate::virtio::VirtioState::default();
        next.mmio.save(&mut state);
        state.device =
            DeviceState::Balloon(BalloonState { statistics: Some(256), ..BalloonState::default() });
        assert!(next.mmio.restore(&state).is_err());
    }

    #[test]
    fn request_with_more_pages_than_can_be_needs_a_reset() {
        let given = Given::default();
        let mut driver = Driver::start(balloon(&given), 0);
        driver.add_chain(INFLATE, &[(0x10_0000, 4 * (MAX_NUMBERS + 1), 0)]);
        driver.ring(INFLATE);
        assert!(driver.needs_reset());
    }
}
