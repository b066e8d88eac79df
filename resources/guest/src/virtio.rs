//! Virtio devices behind MMIO windows (virtio 1.2, 4.2), found by the words `virtio_mmio.device=` of the command line.

mod disk;
mod nic;
mod queue;

pub use disk::{Disk, KIND as DISK, Operation, Outcome, SLOTS as DISK_SLOTS};
pub use nic::{KIND as NIC, Nic};
pub use queue::Queue;

use core::ptr;

use crate::io_apic;
use crate::memory::Addresses;

const MAGIC: usize = 0x000;
const VERSION: usize = 0x004;
const DEVICE_ID: usize = 0x008;
const DEVICE_FEATURES: usize = 0x010;
const DEVICE_FEATURES_SELECT: usize = 0x014;
const DRIVER_FEATURES: usize = 0x020;
const DRIVER_FEATURES_SELECT: usize = 0x024;
const QUEUE_SELECT: usize = 0x030;
const QUEUE_SIZE_MAX: usize = 0x034;
const QUEUE_SIZE: usize = 0x038;
const QUEUE_READY: usize = 0x044;
const QUEUE_NOTIFY: usize = 0x050;
const STATUS: usize = 0x070;
const QUEUE_TABLE: usize = 0x080;
const QUEUE_AVAILABLE: usize = 0x090;
const QUEUE_USED: usize = 0x0a0;
const CONFIG: usize = 0x100;

const MAGIC_VALUE: u32 = 0x7472_6976;
/// Driver is there, and knows the device.
const ACKNOWLEDGED: u32 = 1 | 2;
const DRIVER_OK: u32 = 4;
const FEATURES_OK: u32 = 8;
const VERSION_1: u64 = 1 << 32;
/// Both sides say at which index they want to be told.
const EVENT_IDX: u64 = 1 << 29;

/// Where windows can be: the part that `ring0.s` maps.
const WINDOWS: core::ops::Range<u64> = 0xd000_0000..0xd020_0000;
const WINDOW_BYTES: u64 = 0x1000;

/// A device's window.
#[derive(Clone, Copy)]
pub struct Window {
    base: usize,
    line: u32,
}

impl Window {
    /// The windows that `command_line` names, as far as they can be reached.
    pub fn all(command_line: &str) -> impl Iterator<Item = Self> + Clone {
        command_line.split_ascii_whitespace().filter_map(|word| {
            let (_, place) = word.strip_prefix("virtio_mmio.device=")?.split_once('@')?;
            let (base, line) = place.split_once(':')?;
            let base = u64::from_str_radix(base.strip_prefix("0x")?, 16).ok()?;
            let reachable = WINDOWS.contains(&base) && base.is_multiple_of(WINDOW_BYTES);
            reachable.then_some(Self { base: base as usize, line: line.parse().ok()? })
        })
    }

    /// What kind of device is there (virtio 1.2, section 5); 0 for none.
    pub fn kind(self) -> u32 {
        if self.read(MAGIC) == MAGIC_VALUE && self.read(VERSION) == 2 { self.read(DEVICE_ID) } else { 0 }
    }

    /// Resets the device and agrees with it on `required` features and on as many as it has of `wanted`; the queues are
    /// to be set up next. `None` if it refuses.
    fn negotiate(self, required: u64, wanted: u64) -> Option<u64> {
        self.write(STATUS, 0);
        self.write(STATUS, ACKNOWLEDGED);
        let offered = (0..2).fold(0, |offered, word| {
            self.write(DEVICE_FEATURES_SELECT, word);
            offered | u64::from(self.read(DEVICE_FEATURES)) << (32 * word)
        });
        let required = required | VERSION_1 | EVENT_IDX;
        let features = offered & (required | wanted);
        for word in 0..2 {
            self.write(DRIVER_FEATURES_SELECT, word);
            self.write(DRIVER_FEATURES, (features >> (32 * word)) as u32);
        }
        self.write(STATUS, ACKNOWLEDGED | FEATURES_OK);
        (features & required == required && self.read(STATUS) & FEATURES_OK != 0).then_some(features)
    }

    /// Gives the device queue number `index`. False if it does not take one of this size.
    fn set_up<const N: usize>(self, index: u16, queue: &Queue<N>, addresses: Addresses) -> bool {
        self.write(QUEUE_SELECT, index.into());
        if (self.read(QUEUE_SIZE_MAX) as usize) < N {
            return false;
        }
        self.write(QUEUE_SIZE, N as u32);
        let (table, available, used) = queue.parts(addresses);
        for (register, address) in [(QUEUE_TABLE, table), (QUEUE_AVAILABLE, available), (QUEUE_USED, used)] {
            self.write(register, address as u32);
            self.write(register + 4, (address >> 32) as u32);
        }
        self.write(QUEUE_READY, 1);
        true
    }

    /// The device may begin; its interrupts come to vCPU 0.
    fn begin(self) {
        io_apic::route(self.line);
        self.write(STATUS, ACKNOWLEDGED | FEATURES_OK | DRIVER_OK);
    }

    /// Rings the doorbell of queue `index`.
    fn notify(self, index: u16) {
        self.write(QUEUE_NOTIFY, index.into());
    }

    fn read_config(self, offset: usize) -> u8 {
        // SAFETY: inside of the window, which is mapped; reading what a device shows of itself changes nothing.
        unsafe { ptr::read_volatile((self.base + CONFIG + offset) as *const u8) }
    }

    fn read(self, register: usize) -> u32 {
        // SAFETY: as above.
        unsafe { ptr::read_volatile((self.base + register) as *const u32) }
    }

    fn write(self, register: usize, value: u32) {
        // SAFETY: inside of the window, which is mapped and holds no memory of ours. What the device does with memory is
        // the business of its driver, which gives it addresses.
        unsafe { ptr::write_volatile((self.base + register) as *mut u32, value) };
    }
}
