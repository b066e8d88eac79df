//! A device with its queues: what the event loop and the mirror work with.

use std::any::Any;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use thiserror::Error;
use virtio_bindings::{virtio_config, virtio_ring};
use vmm_sys_util::eventfd::EventFd;

use super::block::BlockError;
use super::counters::DeviceCounters;
use super::device::{DeviceError, DeviceType, Source, VERSION_1, VirtioDevice};
use super::held::OutputPolicy;
use super::queue::{Doorbell, QueueError, RingState, VirtQueue};
use super::state::DeviceState;
use super::{GuestRam, Interrupt};

/// Feature bits that every device offers.
const COMMON_FEATURES: u64 =
    VERSION_1 | 1 << virtio_ring::VIRTIO_RING_F_EVENT_IDX | 1 << virtio_ring::VIRTIO_RING_F_INDIRECT_DESC;

/// A saved state that the device cannot have come from.
#[derive(Debug, Error)]
pub enum RestoreError {
    /// It is another device's.
    #[error("the saved state is not that of a {0:?} device with these queues")]
    Kind(DeviceType),
    /// A queue.
    #[error("a saved queue of the {device:?} device: {cause}")]
    Queue {
        /// Which device.
        device: DeviceType,
        /// What is wrong.
        cause: QueueError,
    },
    /// A field of the device's own state.
    #[error("the saved state of the {device:?} device: {reason}")]
    Field {
        /// Which device.
        device: DeviceType,
        /// What is wrong.
        reason: &'static str,
    },
    /// A disk's image, which the guest has written to elsewhere, cannot be opened again.
    #[error(transparent)]
    Image(Box<BlockError>),
}

/// The device, and its queues while it is active.
struct Core {
    device: Box<dyn VirtioDevice>,
    queues: Vec<VirtQueue>,
    /// Why the device needed its last reset.
    fault: Option<DeviceError>,
}

/// A device with its queues, interrupt and doorbells. Clones are the same device.
#[derive(Clone)]
pub struct VirtioSlot {
    core: Arc<Mutex<Core>>,
    ram: Arc<GuestRam>,
    interrupt: Interrupt,
    doorbells: Arc<[EventFd]>,
    counters: DeviceCounters,
    device_type: DeviceType,
    features: u64,
    queue_sizes: Arc<[u16]>,
}

impl VirtioSlot {
    /// Holds `device`, which works on `ram` and raises `interrupt`.
    ///
    /// # Errors
    /// The process has no descriptor left for the doorbells.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        ram: &Arc<GuestRam>,
        interrupt: &Interrupt,
    ) -> io::Result<Self> {
        let queue_sizes: Arc<[u16]> = device.queue_sizes().into();
        let doorbell = |_| EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC);
        let doorbells = (0..queue_sizes.len()).map(doorbell).collect::<io::Result<_>>()?;
        Ok(Self {
            counters: device.counters(),
            device_type: device.device_type(),
            features: device.features() | COMMON_FEATURES,
            core: Arc::new(Mutex::new(Core { device, queues: Vec::new(), fault: None })),
            ram: Arc::clone(ram),
            interrupt: interrupt.clone(),
            doorbells,
            queue_sizes,
        })
    }

    /// What it is.
    pub fn device_type(&self) -> DeviceType {
        self.device_type
    }

    /// What it counts: read without its lock.
    pub fn counters(&self) -> &DeviceCounters {
        &self.counters
    }

    /// Its interrupt.
    pub fn interrupt(&self) -> &Interrupt {
        &self.interrupt
    }

    /// One eventfd a queue, which the driver's notifications are to count.
    pub fn doorbells(&self) -> &[EventFd] {
        &self.doorbells
    }

    /// What the device wants to be watched.
    pub fn sources(&self) -> Vec<Source> {
        self.lock().device.sources()
    }

    /// The doorbell of queue `index` has rung.
    pub fn doorbell(&self, index: usize) {
        // Emptied before the queue is looked at: what is made available after that rings again.
        let _ = self.doorbells[index].read();
        self.work(
            |device, queues| {
                if index < queues.len() { device.doorbell(index, queues) } else { Ok(()) }
            },
        );
    }

    /// Something has happened on source `index` of the device.
    pub fn ready(&self, index: usize) {
        self.work(|device, queues| device.ready(index, queues));
    }

    /// Carries out what output policy and commits allow, and looks at all queues.
    pub fn attend(&self) {
        self.work(|device, queues| if queues.is_empty() { Ok(()) } else { device.attend(queues) });
    }

    /// Changes what happens to output. [`attend`](Self::attend) must follow.
    pub fn set_output(&self, policy: OutputPolicy) {
        self.lock().device.set_output(policy);
    }

    /// The epoch of the last save is committed. [`attend`](Self::attend) must follow.
    pub fn release_output(&self) {
        self.lock().device.release_output();
    }

    /// Whether output waits that no capture knows of.
    pub fn output_waits(&self) -> bool {
        self.lock().device.output_waits()
    }

    /// Waits until the host carries out nothing for the device any more.
    pub fn drain(&self) {
        self.lock().device.drain();
    }

    /// The guest runs here from now on. [`attend`](Self::attend) must follow.
    pub fn moved(&self) {
        self.lock().device.moved();
    }

    /// Calls `with` with the device, for what only its kind can do; `None` if it is of another.
    pub fn with_device<D: VirtioDevice, T>(&self, with: impl FnOnce(&mut D) -> T) -> Option<T> {
        let mut core = self.lock();
        let device: &mut dyn Any = &mut *core.device;
        device.downcast_mut().map(with)
    }

    /// Why the device needed its last reset, if it did.
    pub fn fault(&self) -> Option<String> {
        self.lock().fault.as_ref().map(ToString::to_string)
    }

    pub(super) fn features(&self) -> u64 {
        self.features
    }

    pub(super) fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    pub(super) fn read_config(&self, offset: u64, data: &mut [u8]) {
        self.lock().device.read_config(offset, data);
    }

    pub(super) fn write_config(&self, offset: u64, data: &[u8]) {
        self.lock().device.write_config(offset, data);
    }

    /// The driver is ready. An impossible queue makes the device one that needs a reset.
    pub(super) fn activate(&self, features: u64, rings: &[RingState]) {
        let mut core = self.lock();
        match self.queues(features, rings) {
            Ok(mut queues) => {
                core.device.activate(features, &mut queues);
                core.queues = queues;
            }
            Err(cause) => self.fail(&mut core, cause.into()),
        }
    }

    pub(super) fn reset(&self) {
        let mut core = self.lock();
        core.device.reset();
        core.queues.clear();
        self.interrupt.reset();
    }

    /// Copies the state of the queues, if the device is active, and of the device.
    pub(super) fn save(&self, rings: &mut [RingState], device: &mut DeviceState) {
        let mut core = self.lock();
        for (ring, queue) in rings.iter_mut().zip(&core.queues) {
            *ring = queue.state();
        }
        core.device.save(device);
    }

    /// `active`: the features and queues of a driver that was ready.
    pub(super) fn restore(
        &self,
        active: Option<(u64, &[RingState])>,
        state: &DeviceState,
    ) -> Result<(), RestoreError> {
        let mut core = self.lock();
        core.device.reset();
        core.queues.clear();
        let core = &mut *core;
        if let Some((features, rings)) = active {
            let wrong = |cause| RestoreError::Queue { device: self.device_type, cause };
            core.queues = self.queues(features, rings).map_err(wrong)?;
            core.device.activate(features, &mut core.queues);
        }
        match core.device.restore(state, &mut core.queues) {
            // The state is sound; the driver has spoilt a chain that is in flight, as it may on any host.
            Err(RestoreError::Queue { cause: cause @ QueueError::Chain(_), .. }) => {
                self.fail(core, cause.into());
                Ok(())
            }
            restored => restored,
        }
    }

    fn queues(&self, features: u64, rings: &[RingState]) -> Result<Vec<VirtQueue>, QueueError> {
        let event_idx = features & 1 << virtio_ring::VIRTIO_RING_F_EVENT_IDX != 0;
        let queue = |(index, (ring, &max))| {
            let doorbell = Doorbell { all: Arc::clone(&self.doorbells), index };
            VirtQueue::new(ring, max, event_idx, &self.ram, &self.interrupt, doorbell)
        };
        rings.iter().zip(&*self.queue_sizes).enumerate().map(queue).collect()
    }

    fn work(&self, work: impl FnOnce(&mut dyn VirtioDevice, &mut [VirtQueue]) -> Result<(), DeviceError>) {
        let mut core = self.lock();
        let Core { device, queues, .. } = &mut *core;
        if let Err(error) = work(&mut **device, queues) {
            self.fail(&mut core, error);
        }
    }

    /// The device waits for a reset. What it had to do is forgotten already now: so nothing of it is in its saved state,
    /// guest memory is left alone, and its sources find it as one without a driver, which does not leave them ready.
    fn fail(&self, core: &mut Core, error: DeviceError) {
        core.fault = Some(error);
        core.device.reset();
        core.queues.clear();
        self.interrupt.need_reset();
    }

    fn lock(&self) -> MutexGuard<'_, Core> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Debug for VirtioSlot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VirtioSlot")
            .field("device_type", &self.device_type)
            .field("interrupt", &self.interrupt.line().as_raw_fd())
            .finish_non_exhaustive()
    }
}

const _: () = assert!(virtio_config::VIRTIO_F_VERSION_1 == 32);
