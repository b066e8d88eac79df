//! The virtio devices at their places in the machine: register windows, doorbells, interrupt lines.

use std::io;
use std::sync::{Arc, Mutex};

use devices::virtio::block::Block;
use devices::virtio::block::fence::Fences;
use devices::virtio::block::replica::Replicas;
use devices::virtio::{
    GuestRam, Interrupt, OutputPolicy, RestoreError, VirtioDevice, VirtioMmio, VirtioSlot, VirtioState,
    transport,
};
use devices::{Bus, BusError};
use kvm_ioctls::{IoEventAddress, VmFd};
use thiserror::Error;

use super::device_loop::{DeviceLoop, DeviceLoopError};
use super::lock;

/// Where the first device's registers lie; those of the next follow.
const FIRST_WINDOW: u64 = 0xd000_0000;
/// Interrupt line of the first device; the next lines follow.
const FIRST_GSI: u32 = 5;
/// One behind the last line of the IOAPIC.
const END_GSI: u32 = 24;

/// Most virtio devices of a machine: each has an interrupt line of its own.
pub const MAX_VIRTIO_DEVICES: usize = (END_GSI - FIRST_GSI) as usize;

/// Where a guest finds a virtio device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MmioWindow {
    /// Guest physical address of its registers.
    pub base: u64,
    /// Their length in bytes.
    pub len: u64,
    /// Its interrupt line, edge-triggered.
    pub gsi: u32,
}

/// The window of device `index`, in the order in which a machine lists its devices.
pub(crate) fn window(index: usize) -> MmioWindow {
    MmioWindow {
        base: FIRST_WINDOW + index as u64 * transport::WINDOW,
        len: transport::WINDOW,
        gsi: FIRST_GSI + index as u32,
    }
}

/// Why a virtio device cannot be put into the machine.
#[derive(Debug, Error)]
pub enum AttachError {
    /// Too many.
    #[error(
        "{0} virtio devices are more than the {MAX_VIRTIO_DEVICES} interrupt lines that a machine has for them"
    )]
    TooMany(usize),
    /// Descriptors.
    #[error("creating the doorbells and interrupts of the virtio devices: {0}")]
    Descriptors(#[from] io::Error),
    /// The bus.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// KVM refuses a doorbell or an interrupt.
    #[error("{request} for the virtio device at {base:#x}: {cause}")]
    Request {
        /// The ioctl.
        request: &'static str,
        /// The device's address.
        base: u64,
        /// What KVM answered.
        cause: kvm_ioctls::Error,
    },
    /// The loop.
    #[error(transparent)]
    Loop(#[from] DeviceLoopError),
}

/// All virtio devices of a machine.
pub(crate) struct VirtioDevices {
    windows: Vec<Arc<Mutex<VirtioMmio>>>,
    slots: Vec<VirtioSlot>,
    /// What belongs to the replicated disks among them.
    replicas: Replicas,
    /// Those of the shared disks among them.
    fences: Arc<Fences>,
    /// None without devices.
    served: Option<DeviceLoop>,
}

impl VirtioDevices {
    /// Puts `list` on `bus` and connects it with `vm`.
    pub(crate) fn attach(
        list: Vec<Box<dyn VirtioDevice>>,
        ram: &Arc<GuestRam>,
        vm: &VmFd,
        bus: &mut Bus,
    ) -> Result<Self, AttachError> {
        if list.len() > MAX_VIRTIO_DEVICES {
            return Err(AttachError::TooMany(list.len()));
        }
        let (mut windows, mut slots) = (Vec::new(), Vec::new());
        for (index, device) in list.into_iter().enumerate() {
            let interrupt = Interrupt::new()?;
            let slot = VirtioSlot::new(device, ram, &interrupt)?;
            connect(vm, &slot, window(index))?;
            let registers = Arc::new(Mutex::new(VirtioMmio::new(slot.clone())));
            bus.insert(window(index).base, window(index).len, registers.clone())?;
            windows.push(registers);
            slots.push(slot);
        }
        let replica = |slot: &VirtioSlot| slot.with_device(|disk: &mut Block| disk.replica().cloned());
        let replicas = slots.iter().filter_map(replica).flatten().collect();
        let mut fences = Fences::default();
        for slot in &slots {
            let _ = slot.with_device(|disk: &mut Block| fences.add(disk));
        }
        let served = if slots.is_empty() { None } else { Some(DeviceLoop::start(&slots)?) };
        Ok(Self { windows, slots, replicas, fences: Arc::new(fences), served })
    }

    /// Where the guest finds them.
    pub(crate) fn windows(&self) -> Vec<MmioWindow> {
        (0..self.slots.len()).map(window).collect()
    }

    /// The devices, in their order.
    pub(crate) fn slots(&self) -> &[VirtioSlot] {
        &self.slots
    }

    /// What belongs to the replicated disks.
    pub(crate) fn replicas(&self) -> &Replicas {
        &self.replicas
    }

    /// The fences of the shared disks.
    pub(crate) fn fences(&self) -> &Arc<Fences> {
        &self.fences
    }

    /// What is written to shared disks is durable before it is completed, until output is passed again.
    pub(crate) fn write_through(&self) {
        for slot in &self.slots {
            let _ = slot.with_device(Block::write_through);
        }
    }

    /// Returns when no device works any more.
    pub(crate) fn pause(&self) {
        if let Some(served) = &self.served {
            served.close();
        }
    }

    /// A device may be stuck for ever: nobody waits for it, and none works any more.
    pub(crate) fn give_up(&self) {
        if let Some(served) = &self.served {
            served.give_up();
        }
    }

    /// Lets the devices work.
    pub(crate) fn resume(&self) {
        if let Some(served) = &self.served {
            served.open();
        }
    }

    /// Copies the state of all devices, which must be paused, to `states`. Allocates only the first time.
    pub(crate) fn save(&self, states: &mut Vec<VirtioState>) {
        states.resize_with(self.windows.len(), VirtioState::default);
        for (registers, state) in self.windows.iter().zip(states) {
            lock(registers).save(state);
        }
    }

    /// Gives the paused devices the state `states`. They go on at [`Self::resume`].
    pub(crate) fn restore(&self, states: &[VirtioState]) -> Result<(), RestoreError> {
        for (registers, state) in self.windows.iter().zip(states) {
            lock(registers).restore(state)?;
        }
        for (registers, slot) in self.windows.iter().zip(&self.slots) {
            slot.moved();
            lock(registers).resume();
        }
        self.attend();
        Ok(())
    }

    /// Changes what happens to output that can be seen outside.
    pub(crate) fn set_output(&self, policy: OutputPolicy) {
        self.slots.iter().for_each(|slot| slot.set_output(policy));
        self.attend();
    }

    /// Lets out what the last save knew of.
    pub(crate) fn release_output(&self) {
        self.slots.iter().for_each(VirtioSlot::release_output);
        self.attend();
    }

    /// Whether output waits that no save knows of.
    pub(crate) fn output_waits(&self) -> bool {
        self.slots.iter().any(VirtioSlot::output_waits)
    }

    /// From now on `tell` is called when a device has such output.
    pub(crate) fn tell_of_output(&self, tell: Box<dyn Fn() + Send + Sync>) {
        if let Some(served) = &self.served {
            served.tell_of_output(tell);
        }
    }

    /// Changes the device at `index`, which is a `D`, and lets it go on; `None` if there is no such device.
    pub(crate) fn change<D: VirtioDevice, T>(
        &self,
        index: usize,
        change: impl FnOnce(&mut D) -> T,
    ) -> Option<T> {
        let outcome = self.slots.get(index)?.with_device(change);
        self.attend();
        outcome
    }

    /// Tells the guest that the configuration of the device at `index` is another.
    pub(crate) fn tell_of_change(&self, index: usize) {
        if let Some(slot) = self.slots.get(index) {
            slot.interrupt().config_changed();
        }
    }

    /// Waits until the host carries out nothing for any device.
    pub(crate) fn drain(&self) {
        self.slots.iter().for_each(VirtioSlot::drain);
    }

    fn attend(&self) {
        if let Some(served) = &self.served {
            served.attend();
        }
    }
}

/// Lets KVM count the doorbells of `slot` and listen to its interrupt (KVM API, KVM_IOEVENTFD and KVM_IRQFD).
fn connect(vm: &VmFd, slot: &VirtioSlot, window: MmioWindow) -> Result<(), AttachError> {
    let refused = |request| move |cause| AttachError::Request { request, base: window.base, cause };
    let notify = IoEventAddress::Mmio(window.base + transport::QUEUE_NOTIFY);
    for (queue, doorbell) in slot.doorbells().iter().enumerate() {
        vm.register_ioevent(doorbell, &notify, queue as u32).map_err(refused("KVM_IOEVENTFD"))?;
    }
    vm.register_irqfd(slot.interrupt().line(), window.gsi).map_err(refused("KVM_IRQFD"))
}
