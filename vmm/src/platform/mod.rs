//! The devices of the machine at their places, and the ways in which a guest asks for its end.

mod build;
mod device_loop;
mod virtio;

use std::io::{self, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use devices::exit_port::EXIT_PORT;
use devices::i8042::{I8042_LEN, I8042_PORT, KEYBOARD_IRQ};
use devices::metadata::Metadata;
use devices::power_switch::{POWER_SWITCH_LEN, PowerSwitch, SLEEP_CONTROL_PORT};
use devices::serial::{SERIAL_IRQ, SERIAL_LEN, SERIAL_PORT};
use devices::virtio::VirtioState;
use devices::virtio::block::replica::{KeepError, Keeper};
use devices::{Bus, BusError, ExitPort, I8042, I8042State, Serial, SerialState};
use kvm_ioctls::VmFd;
use mirror::console::Console;
use mirror::memory::GuestRam;
use thiserror::Error;
use vm_superio::Trigger;

use crate::config::DevicesConfig;
use crate::exit::Exit;
use crate::memory::Returned;

pub use build::DeviceCreateError;
pub(crate) use virtio::VirtioDevices;
#[cfg(test)]
pub(crate) use virtio::window;
pub use virtio::{AttachError, MAX_VIRTIO_DEVICES, MmioWindow};

/// Why the devices of a machine cannot be had.
#[derive(Debug, Error)]
pub enum PlatformError {
    /// Two devices want the same place.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// A device cannot be created.
    #[error(transparent)]
    Create(#[from] DeviceCreateError),
    /// A virtio device cannot be put into the machine.
    #[error(transparent)]
    Attach(#[from] AttachError),
    /// What a standby has kept of its disks.
    #[error(transparent)]
    Disks(#[from] KeepError),
}

/// Where the state of the devices is captured to.
#[derive(Default)]
pub(crate) struct DevicesCapture {
    pub(crate) serial: SerialState,
    pub(crate) keyboard: I8042State,
    pub(crate) virtio: Vec<VirtioState>,
}

/// An interrupt line of the in-kernel interrupt controllers. A pulse is in their state when the call returns, which an
/// eventfd would not promise: an interrupt that is still on its way when the guest pauses would be lost to its twin.
#[derive(Clone)]
pub(crate) struct IrqLine {
    vm: Arc<VmFd>,
    irq: u32,
}

impl Trigger for IrqLine {
    type E = kvm_ioctls::Error;

    fn trigger(&self) -> Result<(), Self::E> {
        self.vm.set_irq_line(self.irq, true)?;
        self.vm.set_irq_line(self.irq, false)
    }
}

/// The console as a serial port's sink.
#[derive(Clone)]
pub(crate) struct ConsoleSink(Arc<Console>);

impl Write for ConsoleSink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.push(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

pub(crate) type SerialPort = Serial<IrqLine, ConsoleSink>;
pub(crate) type KeyboardController = I8042<IrqLine, Box<dyn FnMut() + Send>>;

/// The devices of a machine.
pub(crate) struct Platform {
    pub(crate) pio: Bus,
    pub(crate) mmio: Bus,
    pub(crate) serial: Arc<Mutex<SerialPort>>,
    pub(crate) keyboard: Arc<Mutex<KeyboardController>>,
    pub(crate) virtio: VirtioDevices,
    /// Keeps what a primary elsewhere writes to the replicated disks.
    pub(crate) keeper: Keeper,
    /// What the guest can read of the metadata service.
    pub(crate) metadata: Metadata,
    /// The end that the guest has asked for.
    request: Arc<Mutex<Option<Exit>>>,
}

impl Platform {
    pub(crate) fn new(
        config: &DevicesConfig,
        vm: &Arc<VmFd>,
        ram: &Arc<GuestRam>,
        console: &Arc<Console>,
        returned: &Returned,
    ) -> Result<Self, PlatformError> {
        let line = |irq| IrqLine { vm: Arc::clone(vm), irq };
        let serial = Serial::new(line(SERIAL_IRQ), ConsoleSink(Arc::clone(console)));
        let serial = Arc::new(Mutex::new(serial));
        let request = Arc::new(Mutex::new(None));
        let ask = |request: &Arc<Mutex<Option<Exit>>>| {
            let request = Arc::clone(request);
            move |exit| {
                lock(&request).get_or_insert(exit);
            }
        };
        let (on_code, on_reset, on_off) = (ask(&request), ask(&request), ask(&request));
        let mut pio = Bus::new();
        pio.insert(SERIAL_PORT, SERIAL_LEN, serial.clone())?;
        let on_reset: Box<dyn FnMut() + Send> = Box::new(move || on_reset(Exit::Reset));
        let keyboard = Arc::new(Mutex::new(I8042::new(line(KEYBOARD_IRQ), on_reset)));
        pio.insert(I8042_PORT, I8042_LEN, keyboard.clone())?;
        let exit_port = ExitPort::new(move |code| on_code(Exit::Code(code)));
        pio.insert(EXIT_PORT, 1, Arc::new(Mutex::new(exit_port)))?;
        let power_switch = PowerSwitch::new(move || on_off(Exit::PowerOff));
        pio.insert(SLEEP_CONTROL_PORT, POWER_SWITCH_LEN, Arc::new(Mutex::new(power_switch)))?;
        let mut mmio = Bus::new();
        let metadata = Metadata::default();
        let list = build::devices(config, returned, &metadata)?;
        let virtio = VirtioDevices::attach(list, ram, vm, &mut mmio)?;
        let keeper = Keeper::open(virtio.replicas())?;
        Ok(Self { pio, mmio, serial, keyboard, virtio, keeper, metadata, request })
    }

    /// The end that the guest has asked for since the last call.
    pub(crate) fn take_request(&self) -> Option<Exit> {
        lock(&self.request).take()
    }

    pub(crate) fn serial(&self) -> MutexGuard<'_, SerialPort> {
        lock(&self.serial)
    }

    pub(crate) fn keyboard(&self) -> MutexGuard<'_, KeyboardController> {
        lock(&self.keyboard)
    }

    /// Copies the state of all devices.
    pub(crate) fn save(&self, capture: &mut DevicesCapture) {
        self.serial().save(&mut capture.serial);
        capture.keyboard = self.keyboard().save();
        self.virtio.save(&mut capture.virtio);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
