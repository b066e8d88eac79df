//! A virtio disk (virtio 1.2, 5.2) on an image that both sides of a mirrored guest may share.
//!
//! Requests that change the image are held until the epoch that knows of them is committed, then carried out, then
//! completed; reads and flushes are carried out at once. So the image is always what the last committed epoch says,
//! but for requests that this epoch has in flight: those may or may not have been carried out, and a standby that takes
//! over carries them out again, from the same memory and therefore with the same bytes. A flush covers what was completed
//! before it (virtio 1.2, 5.2.6.2), all of which the image has by then; so it need not wait for an epoch. A read that
//! runs beside a write of the same sectors has no order with it by virtio either.
//!
//! On a replicated disk, of which each side has its own image, nothing is held: see [`replica`].

pub mod config;
mod engine;
pub mod fence;
mod image;
pub mod replica;
mod request;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use serde::{Deserialize, Serialize};
use thiserror::Error;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_WRITE_ZEROES,
};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

pub use config::{BlockConfig, CacheType, EngineKind, FenceConfig, ImageFormat, Replication, WatchdogConfig};
pub use image::ImageError;

use self::engine::{Done, Engine, Job, Pool, Ring};
use self::image::Image;
use self::replica::{MAX_WRITE, Replica, ReplicaError, Replicating, SIZE_MAX};
use self::request::{ID_LEN, Limits, MAX_SPAN, Operation, Request, SECTOR, Status};
use super::chain::Chain;
use super::counters::{BlockCounters, DeviceCounters};
use super::device::{DeviceError, DeviceType, Source, VirtioDevice, read_config};
use super::held::{Held, OutputPolicy};
use super::queue::VirtQueue;
use super::slot::RestoreError;
use super::state::DeviceState;
use crate::rate_limiter::{RateLimiter, RateLimiterConfig};

/// Descriptors of the one queue, and so the most requests in flight.
pub const QUEUE_SIZE: u16 = 256;
/// Most buffers of one request, told to the driver: its header and status take two more descriptors.
const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// Length of the configuration space up to the end of what discards and zeroes need.
const CONFIG_LEN: usize = 60;

/// What a block device holds beyond its registers and queue.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockState {
    /// Heads of the requests in flight, in the order in which they came.
    pub in_flight: Vec<u16>,
    /// The limits in force.
    pub limits: RateLimiterConfig,
}

/// Why a disk cannot be had.
#[derive(Debug, Error)]
pub enum BlockError {
    /// The image.
    #[error("drive {id}: {cause}")]
    Image {
        /// The drive's name.
        id: String,
        /// What is wrong with it.
        cause: ImageError,
    },
    /// Whoever carries requests out.
    #[error("drive {id}: cannot set up {what}: {cause}")]
    Engine {
        /// The drive's name.
        id: String,
        /// What could not be set up.
        what: &'static str,
        /// What the system answered.
        cause: io::Error,
    },
    /// io_uring was asked for.
    #[error("drive {id}: io_uring works on raw images only; leave the engine out, or give a raw image")]
    NotRaw {
        /// The drive's name.
        id: String,
    },
    /// What belongs to a replicated drive.
    #[error("drive {id}: {cause}")]
    Replica {
        /// The drive's name.
        id: String,
        /// What is wrong with it.
        cause: ReplicaError,
    },
    /// Images of other formats have tables that a log of writes does not lead through.
    #[error("drive {id}: only raw images can be replicated; convert it: qemu-img convert -O raw IMAGE RAW")]
    ReplicatedFormat {
        /// The drive's name.
        id: String,
    },
    /// The standby would go on with the old one.
    #[error("drive {id}: a replicated drive keeps its image while the guest runs")]
    ReplicatedImage {
        /// The drive's name.
        id: String,
    },
}

/// A virtio disk.
pub struct Block {
    made_from: BlockConfig,
    id: [u8; ID_LEN],
    limits: Limits,
    features: u64,
    config: [u8; CONFIG_LEN],
    engine: Box<dyn Engine>,
    image: Arc<Image>,
    /// Counts what the engine has carried out.
    finished: EventFd,
    /// Requests that change the image and wait for their epoch.
    held: Held<u16>,
    /// In flight when the device was saved: to be carried out again.
    again: VecDeque<u16>,
    /// Under way in the engine, in the order in which they came.
    under_way: Vec<u16>,
    done: VecDeque<Done>,
    limiter: RateLimiter,
    counters: Arc<BlockCounters>,
    replica: Option<Arc<Replica>>,
}

impl Block {
    /// Opens the image that `config` names.
    ///
    /// # Errors
    /// [`BlockError`]
    pub fn create(config: &BlockConfig) -> Result<Self, BlockError> {
        let failed = |what| move |cause| BlockError::Engine { id: config.id.clone(), what, cause };
        let finished = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(failed("its eventfd"))?;
        let limits = config.limits.unwrap_or_default();
        let limiter = RateLimiter::new(&limits, Instant::now()).map_err(failed("its rate limiter"))?;
        let (image, sectors) = open(config)?;
        let mut engine = engine(config, &image, &finished)?;
        let replica = match config.replication {
            Replication::Shared(_) => None,
            Replication::Replicated => {
                let room = finished.try_clone().map_err(failed("its eventfd"))?;
                let replica = Arc::new(replicate(config, &image, sectors, room)?);
                let replicating = Replicating::new(engine, &replica, &finished);
                engine = Box::new(replicating.map_err(failed("its threads"))?);
                Some(replica)
            }
        };
        let mut this = Self {
            made_from: config.clone(),
            id: name(&config.id),
            limits: Limits {
                sectors,
                read_only: config.read_only,
                longest_write: if replica.is_some() { MAX_WRITE } else { u32::MAX },
            },
            features: features(config),
            config: [0; CONFIG_LEN],
            engine,
            image,
            finished,
            held: Held::with_capacity(QUEUE_SIZE.into()),
            again: VecDeque::new(),
            under_way: Vec::with_capacity(QUEUE_SIZE.into()),
            done: VecDeque::new(),
            limiter,
            counters: Arc::default(),
            replica,
        };
        this.write_config_space();
        Ok(this)
    }

    /// The image at `path` from now on: what the guest has asked for and has not begun goes there. The driver is to be told
    /// of it ([`Interrupt::config_changed`](super::Interrupt::config_changed)), and
    /// [`attend`](VirtioDevice::attend) must follow.
    ///
    /// # Errors
    /// [`BlockError`]; the device then keeps the image that it has.
    pub fn change_image(&mut self, path: &Path) -> Result<(), BlockError> {
        if self.replica.is_some() {
            return Err(BlockError::ReplicatedImage { id: self.made_from.id.clone() });
        }
        self.use_image(BlockConfig { path: path.into(), ..self.made_from.clone() })
    }

    /// What makes it a replicated disk, if it is one.
    pub fn replica(&self) -> Option<&Arc<Replica>> {
        self.replica.as_ref()
    }

    /// What a fence has to know of it, if it needs one: the guest writes to an image that its standby has, too.
    fn fenced(&self) -> Option<fence::Fenced> {
        let BlockConfig { id, path, read_only: false, replication: Replication::Shared(fence), .. } =
            &self.made_from
        else {
            return None;
        };
        let image = Arc::clone(self.image.file());
        Some(fence::Fenced { drive: id.clone(), path: path.clone(), image, fence: fence.clone() })
    }

    /// What is written to an image that others have is on stable storage before it is completed, until output is passed
    /// again: what a guest was told of must not be lost with the memory of this host, while the guest itself lives on.
    pub fn write_through(&mut self) {
        if self.fenced().is_some() {
            self.image.set_write_through(true);
        }
    }

    fn use_image(&mut self, config: BlockConfig) -> Result<(), BlockError> {
        let (image, sectors) = open(&config)?;
        let engine = engine(&config, &image, &self.finished)?;
        self.engine.wait();
        self.engine.collect(&mut self.done);
        self.engine = engine;
        image.set_write_through(self.image.writes_through());
        self.image = image;
        self.limits.sectors = sectors;
        self.made_from = config;
        self.write_config_space();
        Ok(())
    }

    /// Other limits from now on; what `change` does not name stays as it is. [`attend`](VirtioDevice::attend) must follow.
    pub fn update_limits(&mut self, change: &RateLimiterConfig) {
        self.limiter.update(change, Instant::now());
    }

    fn write_config_space(&mut self) {
        let mut put = |at: usize, value: &[u8]| self.config[at..at + value.len()].copy_from_slice(value);
        put(0, &self.limits.sectors.to_le_bytes());
        put(8, &SIZE_MAX.to_le_bytes());
        put(12, &SEG_MAX.to_le_bytes());
        put(20, &(SECTOR as u32).to_le_bytes());
        // max_discard_sectors, max_discard_seg, discard_sector_alignment
        put(36, &MAX_SPAN.to_le_bytes());
        put(40, &1_u32.to_le_bytes());
        put(44, &8_u32.to_le_bytes());
        // max_write_zeroes_sectors, max_write_zeroes_seg, write_zeroes_may_unmap
        put(48, &MAX_SPAN.to_le_bytes());
        put(52, &1_u32.to_le_bytes());
        put(56, &[1]);
    }

    /// A write waits, and what comes after it waits in the queue.
    fn is_clogged(&self) -> bool {
        self.replica.is_some() && !self.held.is_empty()
    }

    fn in_flight(&self) -> usize {
        self.held.len() + self.under_way.len() + self.again.len()
    }

    /// Takes what the driver has made available.
    fn take(&mut self, queue: &mut VirtQueue) -> Result<(), DeviceError> {
        let mut left = QUEUE_SIZE;
        loop {
            queue.silence()?;
            while left > 0
                && !self.is_clogged()
                && self.limiter.may_take_now()
                && let Some(chain) = queue.pop()?
            {
                left -= 1;
                if self.in_flight() >= usize::from(queue.size()) {
                    return Err(DeviceError::Request("more disk requests in flight than the queue is long"));
                }
                self.limiter.charge(u64::from(chain.readable_len()) + u64::from(chain.writable_len()));
                self.begin(chain, queue, true)?;
                if self.replica.is_some() {
                    self.go_on(queue)?;
                }
            }
            if left == 0 {
                // Others get their turn first, however fast the driver adds requests that are answered at once.
                queue.come_back();
                return Ok(());
            }
            if self.is_clogged() || !queue.listen()? {
                return Ok(());
            }
            if !self.limiter.may_take_now() {
                self.counters.limited.add(1);
                return Ok(());
            }
        }
    }

    /// Begins with a request. One that changes the image waits first if it `may_wait`.
    fn begin(&mut self, chain: Chain, queue: &mut VirtQueue, may_wait: bool) -> Result<(), DeviceError> {
        match Request::parse(&chain, self.limits)? {
            Request::Image(operation) if may_wait && operation.changes_the_image() => {
                self.held.push(chain.head());
            }
            Request::Image(operation) => {
                let mut bytes = Vec::new();
                if let (Operation::Write { len, .. }, Some(_)) = (operation, &self.replica) {
                    // What the image gets is what the log gets, whatever the guest does to its memory meanwhile.
                    bytes.resize(len as usize, 0);
                    chain.read(request::HEADER, &mut bytes);
                }
                self.under_way.push(chain.head());
                self.engine.submit(Job { operation, chain, bytes, synced: false });
            }
            Request::Id => {
                chain.write(0, &self.id);
                answer(&chain, Status::Ok, ID_LEN as u32, queue)?;
            }
            Request::Refused(status) => {
                self.counters.errors.add(1);
                answer(&chain, status, 0, queue)?;
            }
        }
        Ok(())
    }

    /// Begins with what was in flight at a save, and with what is no longer to be held.
    fn go_on(&mut self, queue: &mut VirtQueue) -> Result<(), DeviceError> {
        while let Some(head) = self.again.pop_front() {
            let chain = queue.chain(head)?;
            self.begin(chain, queue, true)?;
        }
        while let Some(head) = self.held.pop() {
            let chain = queue.chain(head)?;
            if !self.admits(&chain)? {
                self.held.put_back(head);
                break;
            }
            self.begin(chain, queue, false)?;
        }
        Ok(())
    }

    /// Whether a request that changes the image may begin now.
    fn admits(&self, chain: &Chain) -> Result<bool, DeviceError> {
        let Some(replica) = &self.replica else { return Ok(true) };
        Ok(match Request::parse(chain, self.limits)? {
            Request::Image(operation) => replica.admit(operation),
            _ => true,
        })
    }

    fn complete(&mut self, queue: &mut VirtQueue) -> Result<(), DeviceError> {
        self.engine.collect(&mut self.done);
        while let Some(Done { job: Job { operation, chain, bytes, .. }, result }) = self.done.pop_front() {
            // One of them, should the driver have made its head available more than once.
            if let Some(index) = self.under_way.iter().position(|&head| head == chain.head()) {
                self.under_way.remove(index);
            }
            if let Some(replica) = &self.replica {
                replica.complete(operation, &bytes);
            }
            self.count(operation, result.is_ok());
            let status = match &result {
                Ok(()) => Status::Ok,
                Err(cause) if cause.raw_os_error() == Some(libc::EOPNOTSUPP) => Status::Unsupported,
                Err(_) => Status::IoError,
            };
            let read = match operation {
                Operation::Read { len, .. } => len,
                _ => 0,
            };
            answer(&chain, status, read, queue)?;
        }
        Ok(())
    }

    fn count(&self, operation: Operation, done: bool) {
        let counters = &self.counters;
        match operation {
            _ if !done => counters.errors.add(1),
            Operation::Read { len, .. } => {
                counters.reads.add(1);
                counters.read_bytes.add(len.into());
            }
            Operation::Write { len, .. } => {
                counters.writes.add(1);
                counters.written_bytes.add(len.into());
            }
            Operation::Flush => counters.flushes.add(1),
            Operation::Discard { .. } | Operation::Zero { .. } => counters.discards.add(1),
        }
    }

    /// Everything that the device can do now.
    fn work(&mut self, queue: &mut VirtQueue) -> Result<(), DeviceError> {
        self.complete(queue)?;
        self.go_on(queue)?;
        self.take(queue)?;
        self.go_on(queue)?;
        self.engine.begin();
        Ok(queue.notify()?)
    }
}

/// Writes the status byte, the last of the chain, and gives the chain back with `len` bytes of data before it.
fn answer(chain: &Chain, status: Status, len: u32, queue: &mut VirtQueue) -> Result<(), DeviceError> {
    chain.write(chain.writable_len() - 1, &[status as u8]);
    Ok(queue.complete(chain.head(), len + 1)?)
}

fn open(config: &BlockConfig) -> Result<(Arc<Image>, u64), BlockError> {
    let failed = |cause| BlockError::Image { id: config.id.clone(), cause };
    let image = Image::open(&config.path, config.format, !config.read_only).map_err(failed)?;
    let len = image.len().map_err(|cause| {
        failed(ImageError::Open { path: config.path.clone(), writable: !config.read_only, cause })
    })?;
    if !len.is_multiple_of(SECTOR) {
        return Err(failed(ImageError::Length { path: config.path.clone(), len }));
    }
    Ok((Arc::new(image), len / SECTOR))
}

/// What makes the raw `image` one that is replicated; `room` wakes the device.
fn replicate(
    config: &BlockConfig,
    image: &Image,
    sectors: u64,
    room: EventFd,
) -> Result<Replica, BlockError> {
    let id = || config.id.clone();
    if !image.is_raw() {
        return Err(BlockError::ReplicatedFormat { id: id() });
    }
    Replica::open(&config.id, &config.path, sectors * SECTOR, room)
        .map_err(|cause| BlockError::Replica { id: id(), cause })
}

fn engine(
    config: &BlockConfig,
    image: &Arc<Image>,
    finished: &EventFd,
) -> Result<Box<dyn Engine>, BlockError> {
    let failed = |what| move |cause| BlockError::Engine { id: config.id.clone(), what, cause };
    if config.engine != EngineKind::Threads {
        match Ring::new(image, QUEUE_SIZE, finished) {
            Ok(Some(ring)) => return Ok(Box::new(ring)),
            Ok(None) if config.engine == EngineKind::IoUring => {
                return Err(BlockError::NotRaw { id: config.id.clone() });
            }
            Err(cause) if config.engine == EngineKind::IoUring => return Err(failed("io_uring")(cause)),
            // Threads do on every kernel.
            _ => {}
        }
    }
    Ok(Box::new(Pool::new(image, finished).map_err(failed("its threads"))?))
}

fn features(config: &BlockConfig) -> u64 {
    let mut features = 1 << VIRTIO_BLK_F_SEG_MAX | 1 << VIRTIO_BLK_F_BLK_SIZE;
    if config.replication == Replication::Replicated {
        features |= 1 << VIRTIO_BLK_F_SIZE_MAX;
    }
    if config.cache == CacheType::Writeback {
        features |= 1 << VIRTIO_BLK_F_FLUSH;
    }
    features |= if config.read_only {
        1 << VIRTIO_BLK_F_RO
    } else {
        1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES
    };
    features
}

fn name(id: &str) -> [u8; ID_LEN] {
    let mut name = [0; ID_LEN];
    let len = id.len().min(ID_LEN);
    name[..len].copy_from_slice(&id.as_bytes()[..len]);
    name
}

impl VirtioDevice for Block {
    fn device_type(&self) -> DeviceType {
        DeviceType::Block
    }

    fn counters(&self) -> DeviceCounters {
        DeviceCounters::Block(Arc::clone(&self.counters))
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config(&self.config, offset, data);
    }

    fn activate(&mut self, _features: u64, _queues: &mut [VirtQueue]) {}

    fn reset(&mut self) {
        // Afterwards the guest's memory is its own again.
        self.engine.wait();
        self.engine.collect(&mut self.done);
        if let Some(replica) = &self.replica {
            // The driver does not hear of it, but it has been written.
            for Done { job: Job { operation, bytes, .. }, .. } in &self.done {
                replica.complete(*operation, bytes);
            }
            replica.reset();
        }
        self.done.clear();
        self.held.clear();
        self.again.clear();
        self.under_way.clear();
    }

    fn doorbell(&mut self, _index: usize, queues: &mut [VirtQueue]) -> Result<(), DeviceError> {
        self.attend(queues)
    }

    fn sources(&self) -> Vec<Source> {
        let source = |fd| Source { fd, events: EventSet::IN };
        [self.finished.as_raw_fd(), self.limiter.fd()].map(source).into()
    }

    fn ready(&mut self, _index: usize, queues: &mut [VirtQueue]) -> Result<(), DeviceError> {
        self.limiter.clear_timer();
        self.attend(queues)
    }

    fn set_output(&mut self, policy: OutputPolicy) {
        let Some(replica) = &self.replica else {
            if policy == OutputPolicy::Pass {
                self.image.set_write_through(false);
            }
            return self.held.set_policy(policy);
        };
        // What is written here is nobody else's before its epoch is committed: nothing needs to be held.
        match policy {
            OutputPolicy::Hold => {}
            OutputPolicy::Pass => replica.go_alone(),
            OutputPolicy::Freeze => self.held.set_policy(policy),
        }
    }

    fn release_output(&mut self) {
        self.held.release();
        if let Some(replica) = &self.replica {
            replica.acknowledged();
            if replica.note_is_long() {
                self.engine.begin();
            }
        }
    }

    fn output_waits(&self) -> bool {
        match &self.replica {
            Some(replica) => replica.log_is_urgent(),
            None => self.held.waits(),
        }
    }

    fn attend(&mut self, queues: &mut [VirtQueue]) -> Result<(), DeviceError> {
        if let Some(queue) = queues.first_mut() {
            return self.work(queue);
        }
        // Nothing is under way without a driver; the descriptor must not stay readable.
        self.engine.collect(&mut self.done);
        self.done.clear();
        Ok(())
    }

    fn drain(&mut self) {
        self.engine.wait();
    }

    fn save(&mut self, state: &mut DeviceState) {
        if !matches!(state, DeviceState::Block(_)) {
            let in_flight = Vec::with_capacity(QUEUE_SIZE.into());
            *state = DeviceState::Block(BlockState { in_flight, limits: RateLimiterConfig::default() });
        }
        if let DeviceState::Block(state) = state {
            state.in_flight.clear();
            state.in_flight.extend(self.under_way.iter().chain(&self.again).chain(self.held.iter()));
            state.limits = self.limiter.limits();
        }
        self.held.mark();
        if let Some(replica) = &self.replica {
            replica.close_log();
        }
    }

    fn restore(&mut self, state: &DeviceState, queues: &mut [VirtQueue]) -> Result<(), RestoreError> {
        let DeviceState::Block(state) = state else { return Err(RestoreError::Kind(DeviceType::Block)) };
        let size = queues.first().map_or(0, |queue| usize::from(queue.size()));
        if state.in_flight.len() > size {
            let reason = "more requests are in flight than its queue is long";
            return Err(RestoreError::Field { device: DeviceType::Block, reason });
        }
        self.again.extend(&state.in_flight);
        self.limiter.set(&state.limits, Instant::now());
        if self.image.remembers() {
            // The guest has written to it elsewhere since it was opened here.
            let again = self.use_image(self.made_from.clone());
            again.map_err(|cause| RestoreError::Image(Box::new(cause)))?;
        }
        Ok(())
    }
}
