//! What a virtio device is to its transport, to the event loop and to the mirror.

use std::any::Any;
use std::os::fd::RawFd;

use thiserror::Error;
use virtio_bindings::{virtio_config, virtio_ids};
use vmm_sys_util::epoll::EventSet;

use super::counters::DeviceCounters;
use super::held::OutputPolicy;
use super::queue::{QueueError, VirtQueue};
use super::slot::RestoreError;
use super::state::DeviceState;

/// The feature bit of virtio 1.0 and later, which every driver must accept here (virtio 1.2, 6.1).
pub const VERSION_1: u64 = 1 << virtio_config::VIRTIO_F_VERSION_1;

/// What kind of device it is (virtio 1.2, 5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum DeviceType {
    /// Network card.
    Net = virtio_ids::VIRTIO_ID_NET,
    /// Disk.
    Block = virtio_ids::VIRTIO_ID_BLOCK,
    /// Console.
    Console = virtio_ids::VIRTIO_ID_CONSOLE,
    /// Source of random numbers.
    Rng = virtio_ids::VIRTIO_ID_RNG,
    /// Memory balloon.
    Balloon = virtio_ids::VIRTIO_ID_BALLOON,
    /// Sockets between guest and host.
    Vsock = virtio_ids::VIRTIO_ID_VSOCK,
}

/// Why a device cannot go on: it then needs a reset by its driver. The driver is at fault.
#[derive(Debug, Error)]
pub enum DeviceError {
    /// A queue or a chain is malformed.
    #[error(transparent)]
    Queue(#[from] QueueError),
    /// A request is malformed in a way that it cannot be answered.
    #[error("{0}")]
    Request(&'static str),
}

/// A descriptor that a device wants to be watched, for as long as it lives.
#[derive(Clone, Copy, Debug)]
pub struct Source {
    /// The descriptor.
    pub fd: RawFd,
    /// For what.
    pub events: EventSet,
}

/// A virtio device.
///
/// All calls come one at a time: from the event loop, from a vCPU that accesses registers, from the mirror. None of them
/// may block for long. Until [`activate`](Self::activate), and after [`reset`](Self::reset), the queues are empty. After an
/// error of [`DeviceError`] it is reset at once, and told of no queue until its driver has reset it as well.
pub trait VirtioDevice: Any + Send {
    /// What it is.
    fn device_type(&self) -> DeviceType;

    /// What it counts, always the same.
    fn counters(&self) -> DeviceCounters {
        DeviceCounters::None
    }

    /// The most descriptors of each queue, each a power of two.
    fn queue_sizes(&self) -> &[u16];

    /// Feature bits that it offers. [`VERSION_1`], RING_EVENT_IDX and INDIRECT_DESC are offered for every device and
    /// need not be among them.
    fn features(&self) -> u64;

    /// Reads the configuration space. What lies beyond it stays as it is in `data`.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Writes the configuration space; what is not writable is ignored.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    /// The driver is ready, having accepted `features`; `queues` are as many as [`queue_sizes`](Self::queue_sizes).
    /// Nothing has been made available yet, unless the device is being restored: then
    /// [`restore`](Self::restore) follows.
    fn activate(&mut self, features: u64, queues: &mut [VirtQueue]);

    /// Everything that the driver has asked for is forgotten; nothing touches guest memory any more on return.
    fn reset(&mut self);

    /// The driver has rung the doorbell of queue `index`.
    ///
    /// # Errors
    /// [`DeviceError`]
    fn doorbell(&mut self, index: usize, queues: &mut [VirtQueue]) -> Result<(), DeviceError>;

    /// Descriptors to be watched, always the same. They are watched also while the device is not active.
    fn sources(&self) -> Vec<Source> {
        Vec::new()
    }

    /// Something has happened on source `index`. While the device is not active `queues` is empty.
    ///
    /// # Errors
    /// [`DeviceError`]
    fn ready(&mut self, _index: usize, _queues: &mut [VirtQueue]) -> Result<(), DeviceError> {
        Ok(())
    }

    /// What is to happen to requests with an effect that can be seen outside. [`attend`](Self::attend) follows.
    fn set_output(&mut self, _policy: OutputPolicy) {}

    /// The epoch of the last [`save`](Self::save) is committed. [`attend`](Self::attend) follows.
    fn release_output(&mut self) {}

    /// Whether output waits that no capture knows of: it should not wait long.
    fn output_waits(&self) -> bool {
        false
    }

    /// Carries out what may be carried out now, and looks at all queues: output was released, or the guest is about to
    /// run after a restore.
    ///
    /// # Errors
    /// [`DeviceError`]
    fn attend(&mut self, _queues: &mut [VirtQueue]) -> Result<(), DeviceError> {
        Ok(())
    }

    /// Waits until nothing that the driver has asked for is still being carried out by the host. What has been is
    /// completed later, what is held stays held.
    fn drain(&mut self) {}

    /// The guest has moved: it runs here from now on, and the world may have to be told. [`attend`](Self::attend) follows.
    fn moved(&mut self) {}

    /// Copies the device's state, including all requests in flight, to `state`, and marks the output that it knows of.
    /// Allocates only if `state` has never held this device's state before. Called while the guest stands still.
    fn save(&mut self, state: &mut DeviceState);

    /// Becomes the device that `state` was saved from; its queues, if it was active, are `queues`. Requests in flight are
    /// carried out at the next [`attend`](Self::attend).
    ///
    /// # Errors
    /// [`RestoreError`] if the state cannot have come from such a device.
    fn restore(&mut self, state: &DeviceState, queues: &mut [VirtQueue]) -> Result<(), RestoreError>;
}

/// Copies what of `config` lies at `offset` to `data`: for [`VirtioDevice::read_config`].
pub fn read_config(config: &[u8], offset: u64, data: &mut [u8]) {
    let Some(rest) = usize::try_from(offset).ok().and_then(|offset| config.get(offset..)) else { return };
    let len = rest.len().min(data.len());
    data[..len].copy_from_slice(&rest[..len]);
}
