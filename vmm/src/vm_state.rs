//! The state that belongs to the VM and to none of its vCPUs: interrupt controllers, timer, clock.

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_irqchip,
    kvm_irqchip__bindgen_ty_1, kvm_pit_state2,
};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};
use thiserror::Error;
use zerocopy::{FromBytes, IntoBytes};

/// The interrupt controllers, in the order in which they are saved.
const CHIPS: [u32; 3] = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC];

/// State of the VM.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VmState {
    /// Registers of the first PIC, the second PIC and the IOAPIC, as KVM lays them out (512 bytes each).
    pub irqchips: [Vec<u8>; 3],
    /// The interval timer.
    pub pit: kvm_pit_state2,
    /// The kvmclock in nanoseconds.
    pub clock: u64,
}

/// Why the state of the VM cannot be captured or restored.
#[derive(Debug, Error)]
pub enum VmStateError {
    /// KVM refuses a request.
    #[error("{request}: {cause}")]
    Request {
        /// The ioctl.
        request: &'static str,
        /// What KVM answered.
        cause: kvm_ioctls::Error,
    },
    /// A state that cannot have come from a VM.
    #[error("the state of interrupt controller {chip} has {len} bytes, which cannot be")]
    Length {
        /// Which: 0 and 1 the PICs, 2 the IOAPIC.
        chip: u32,
        /// Its length.
        len: usize,
    },
}

fn request<T>(request: &'static str, answer: Result<T, kvm_ioctls::Error>) -> Result<T, VmStateError> {
    answer.map_err(|cause| VmStateError::Request { request, cause })
}

/// Where the state of the VM is captured to.
#[derive(Default)]
pub(crate) struct VmCapture {
    irqchips: [kvm_irqchip; 3],
    pit: kvm_pit_state2,
    clock: u64,
}

impl VmCapture {
    /// Reads the state of `vm`. No vCPU may run. Allocates nothing.
    pub(crate) fn capture(&mut self, vm: &VmFd) -> Result<(), VmStateError> {
        for (chip, id) in self.irqchips.iter_mut().zip(CHIPS) {
            chip.chip_id = id;
            request("KVM_GET_IRQCHIP", vm.get_irqchip(chip))?;
        }
        self.pit = request("KVM_GET_PIT2", vm.get_pit2())?;
        self.clock = request("KVM_GET_CLOCK", vm.get_clock())?.clock;
        Ok(())
    }

    /// What was captured last.
    pub(crate) fn state(&self) -> VmState {
        VmState {
            irqchips: self.irqchips.each_ref().map(|chip| chip.chip.as_bytes().to_vec()),
            pit: self.pit,
            clock: self.clock,
        }
    }
}

/// Gives `vm` the state `state`. The local APICs must have theirs already: an interrupt that waits in an IOAPIC is
/// delivered to them at once.
pub(crate) fn restore(vm: &VmFd, state: &VmState) -> Result<(), VmStateError> {
    for (bytes, id) in state.irqchips.iter().zip(CHIPS) {
        let chip = kvm_irqchip__bindgen_ty_1::read_from_bytes(bytes)
            .map_err(|_| VmStateError::Length { chip: id, len: bytes.len() })?;
        let irqchip = kvm_irqchip { chip_id: id, pad: 0, chip };
        request("KVM_SET_IRQCHIP", vm.set_irqchip(&irqchip))?;
    }
    request("KVM_SET_PIT2", vm.set_pit2(&state.pit))?;
    // Without flags: the clock goes on where it stood, it does not jump over the time that nobody ran.
    let clock = kvm_clock_data { clock: state.clock, ..kvm_clock_data::default() };
    request("KVM_SET_CLOCK", vm.set_clock(&clock))
}
