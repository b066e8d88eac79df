//! The registers of a virtio device on the memory bus (virtio 1.2, 4.2).

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FAILED,
    VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
};
use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_CONFIG, VIRTIO_MMIO_CONFIG_GENERATION, VIRTIO_MMIO_DEVICE_FEATURES,
    VIRTIO_MMIO_DEVICE_FEATURES_SEL, VIRTIO_MMIO_DEVICE_ID, VIRTIO_MMIO_DRIVER_FEATURES,
    VIRTIO_MMIO_DRIVER_FEATURES_SEL, VIRTIO_MMIO_INTERRUPT_ACK, VIRTIO_MMIO_INTERRUPT_STATUS,
    VIRTIO_MMIO_MAGIC_VALUE, VIRTIO_MMIO_QUEUE_AVAIL_HIGH, VIRTIO_MMIO_QUEUE_AVAIL_LOW,
    VIRTIO_MMIO_QUEUE_DESC_HIGH, VIRTIO_MMIO_QUEUE_DESC_LOW, VIRTIO_MMIO_QUEUE_NOTIFY, VIRTIO_MMIO_QUEUE_NUM,
    VIRTIO_MMIO_QUEUE_NUM_MAX, VIRTIO_MMIO_QUEUE_READY, VIRTIO_MMIO_QUEUE_SEL, VIRTIO_MMIO_QUEUE_USED_HIGH,
    VIRTIO_MMIO_QUEUE_USED_LOW, VIRTIO_MMIO_STATUS, VIRTIO_MMIO_VENDOR_ID, VIRTIO_MMIO_VERSION,
};

use super::device::VERSION_1;
use super::queue::RingState;
use super::slot::{RestoreError, VirtioSlot};
use super::state::{TransportState, VirtioState};
use crate::bus::BusDevice;

/// Length of a device's register window in bytes.
pub const WINDOW: u64 = 0x1000;
/// Offset of the register to which the driver writes the number of a queue to ring its doorbell.
pub const QUEUE_NOTIFY: u64 = VIRTIO_MMIO_QUEUE_NOTIFY as u64;

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
const VENDOR: u32 = u32::from_le_bytes(*b"undr");
const CONFIG: u64 = VIRTIO_MMIO_CONFIG as u64;
/// SHMLenLow, SHMLenHigh, SHMBaseLow and SHMBaseHigh read so where there is no such memory.
const SHARED_MEMORY: std::ops::RangeInclusive<u32> = 0xb0..=0xbc;

/// The status bits that a driver may set.
const DRIVER_STATUS: u32 = VIRTIO_CONFIG_S_ACKNOWLEDGE
    | VIRTIO_CONFIG_S_DRIVER
    | VIRTIO_CONFIG_S_DRIVER_OK
    | VIRTIO_CONFIG_S_FEATURES_OK
    | VIRTIO_CONFIG_S_FAILED;

/// The register window of a device.
pub struct VirtioMmio {
    slot: VirtioSlot,
    registers: TransportState,
}

impl VirtioMmio {
    /// The window of the device in `slot`, as after a reset.
    pub fn new(slot: VirtioSlot) -> Self {
        let queues = initial_queues(&slot);
        Self { slot, registers: TransportState { queues, ..TransportState::default() } }
    }

    /// The device behind it.
    pub fn slot(&self) -> &VirtioSlot {
        &self.slot
    }

    /// Copies registers, queues and the device's own state. Allocates only into a state that has not held this device's
    /// before. The guest must stand still.
    pub fn save(&mut self, state: &mut VirtioState) {
        let interrupt = self.slot.interrupt();
        self.registers.interrupt_status = interrupt.status();
        self.registers.config_generation = interrupt.generation();
        self.registers.needs_reset = interrupt.needs_reset();
        self.slot.save(&mut self.registers.queues, &mut state.device);
        state.transport.clone_from(&self.registers);
    }

    /// Becomes what `state` was saved from. [`resume`](Self::resume) must follow before the guest runs.
    ///
    /// # Errors
    /// [`RestoreError`]; the device must then not be used.
    pub fn restore(&mut self, state: &VirtioState) -> Result<(), RestoreError> {
        let transport = &state.transport;
        if transport.queues.len() != self.slot.queue_sizes().len() {
            return Err(RestoreError::Kind(self.slot.device_type()));
        }
        let wrong = |reason| Err(RestoreError::Field { device: self.slot.device_type(), reason });
        if transport.status & !DRIVER_STATUS != 0 {
            return wrong("its status has bits that no driver sets");
        }
        let status = VIRTIO_CONFIG_S_FEATURES_OK | VIRTIO_CONFIG_S_DRIVER_OK;
        if transport.status & status != 0 && transport.driver_features & !self.slot.features() != 0 {
            return wrong("its driver counts on features that the device here does not have");
        }
        self.registers = transport.clone();
        self.slot.interrupt().restore(
            transport.interrupt_status,
            transport.config_generation,
            transport.needs_reset,
        );
        let active = (self.is_set(VIRTIO_CONFIG_S_DRIVER_OK) && !transport.needs_reset)
            .then_some((transport.driver_features, &transport.queues[..]));
        self.slot.restore(active, &state.device)
    }

    /// The guest is about to run after a restore: the driver is told again of what it has not acknowledged.
    pub fn resume(&mut self) {
        self.slot.interrupt().raise_again();
    }

    fn is_set(&self, status: u32) -> bool {
        self.registers.status & status != 0
    }

    fn read_register(&self, register: u32) -> u32 {
        let registers = &self.registers;
        match register {
            VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            VIRTIO_MMIO_VERSION => VERSION,
            VIRTIO_MMIO_DEVICE_ID => self.slot.device_type() as u32,
            VIRTIO_MMIO_VENDOR_ID => VENDOR,
            VIRTIO_MMIO_DEVICE_FEATURES => half(self.slot.features(), registers.device_features_select),
            VIRTIO_MMIO_QUEUE_NUM_MAX => {
                let selected = self.slot.queue_sizes().get(registers.queue_select as usize);
                selected.copied().map_or(0, u32::from)
            }
            VIRTIO_MMIO_QUEUE_READY => self.queue().is_some_and(|queue| queue.ready).into(),
            VIRTIO_MMIO_INTERRUPT_STATUS => self.slot.interrupt().status(),
            VIRTIO_MMIO_STATUS => {
                let broken = self.slot.interrupt().needs_reset();
                registers.status | if broken { VIRTIO_CONFIG_S_NEEDS_RESET } else { 0 }
            }
            VIRTIO_MMIO_CONFIG_GENERATION => self.slot.interrupt().generation(),
            register if SHARED_MEMORY.contains(&register) => u32::MAX,
            _ => 0,
        }
    }

    fn write_register(&mut self, register: u32, value: u32) {
        match register {
            VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.registers.device_features_select = value,
            VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.registers.driver_features_select = value,
            VIRTIO_MMIO_DRIVER_FEATURES if !self.is_set(VIRTIO_CONFIG_S_FEATURES_OK) => {
                let select = self.registers.driver_features_select;
                set_half(&mut self.registers.driver_features, select, value);
            }
            VIRTIO_MMIO_QUEUE_SEL => self.registers.queue_select = value,
            // KVM counts doorbells itself; one that it lets through (of another width) is counted here.
            VIRTIO_MMIO_QUEUE_NOTIFY => {
                if let Some(doorbell) = self.slot.doorbells().get(value as usize) {
                    let _ = doorbell.write(1);
                }
            }
            VIRTIO_MMIO_INTERRUPT_ACK => self.slot.interrupt().acknowledge(value),
            VIRTIO_MMIO_STATUS => self.set_status(value),
            _ => self.configure_queue(register, value),
        }
    }

    /// What the driver sets of the selected queue before it is ready itself.
    fn configure_queue(&mut self, register: u32, value: u32) {
        if self.is_set(VIRTIO_CONFIG_S_DRIVER_OK) || !self.is_set(VIRTIO_CONFIG_S_FEATURES_OK) {
            return;
        }
        let Some(queue) = self.registers.queues.get_mut(self.registers.queue_select as usize) else { return };
        match register {
            VIRTIO_MMIO_QUEUE_READY => queue.ready = value == 1,
            _ if queue.ready => {}
            // A size that cannot be is found when the driver says that it is ready.
            VIRTIO_MMIO_QUEUE_NUM => queue.size = u16::try_from(value).unwrap_or(0),
            VIRTIO_MMIO_QUEUE_DESC_LOW => set_half(&mut queue.table, 0, value),
            VIRTIO_MMIO_QUEUE_DESC_HIGH => set_half(&mut queue.table, 1, value),
            VIRTIO_MMIO_QUEUE_AVAIL_LOW => set_half(&mut queue.available, 0, value),
            VIRTIO_MMIO_QUEUE_AVAIL_HIGH => set_half(&mut queue.available, 1, value),
            VIRTIO_MMIO_QUEUE_USED_LOW => set_half(&mut queue.used, 0, value),
            VIRTIO_MMIO_QUEUE_USED_HIGH => set_half(&mut queue.used, 1, value),
            _ => {}
        }
    }

    fn set_status(&mut self, value: u32) {
        if value == 0 {
            self.slot.reset();
            let queues = initial_queues(&self.slot);
            self.registers = TransportState { queues, ..TransportState::default() };
            return;
        }
        // Bits are only ever added (virtio 1.2, 2.1.1).
        let mut added = value & DRIVER_STATUS & !self.registers.status;
        let accepted = self.registers.driver_features;
        if added & VIRTIO_CONFIG_S_FEATURES_OK != 0
            && (accepted & !self.slot.features() != 0 || accepted & VERSION_1 == 0)
        {
            // The driver reads the status back and sees that its choice was not taken.
            added &= !VIRTIO_CONFIG_S_FEATURES_OK;
        }
        let has_features = (self.registers.status | added) & VIRTIO_CONFIG_S_FEATURES_OK != 0;
        if !has_features {
            added &= !VIRTIO_CONFIG_S_DRIVER_OK;
        }
        self.registers.status |= added;
        if added & VIRTIO_CONFIG_S_DRIVER_OK != 0 {
            self.slot.activate(accepted, &self.registers.queues);
        }
    }

    fn queue(&self) -> Option<&RingState> {
        self.registers.queues.get(self.registers.queue_select as usize)
    }
}

impl BusDevice for VirtioMmio {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(offset) = offset.checked_sub(CONFIG) {
            self.slot.read_config(offset, data);
        } else if offset.is_multiple_of(4)
            && let Ok(data) = <&mut [u8; 4]>::try_from(data)
        {
            *data = self.read_register(offset as u32).to_le_bytes();
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some(offset) = offset.checked_sub(CONFIG) {
            self.slot.write_config(offset, data);
        } else if offset.is_multiple_of(4)
            && let Ok(data) = <[u8; 4]>::try_from(data)
        {
            self.write_register(offset as u32, u32::from_le_bytes(data));
        }
    }
}

fn initial_queues(slot: &VirtioSlot) -> Vec<RingState> {
    slot.queue_sizes().iter().map(|&size| RingState { size, ..RingState::default() }).collect()
}

/// The 32 bits of `features` that `select` names; none but the first two words have any.
fn half(features: u64, select: u32) -> u32 {
    match select {
        0 => features as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}

fn set_half(word: &mut u64, select: u32, value: u32) {
    match select {
        0 => *word = *word & !0xffff_ffff | u64::from(value),
        1 => *word = *word & 0xffff_ffff | u64::from(value) << 32,
        _ => {}
    }
}

#[cfg(test)]
mod tests;
