//! The state of a vCPU: captured into a buffer inside the pause, turned into [`VcpuState`] after it, restored from it.

use kvm_bindings::{
    CpuId, Xsave, kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs,
    kvm_sregs, kvm_vcpu_events, kvm_xcrs,
};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};
use thiserror::Error;
use zerocopy::{FromBytes, IntoBytes};

use crate::host::msr_is_not_state;
use crate::msrs::{self, IA32_TSC_DEADLINE, MsrBuffer, MsrError};
use crate::processor::Processor;

/// Words in the part of an XSAVE area that every KVM has.
const XSAVE_WORDS: usize = 1024;

/// Largest difference of TSC frequencies, in parts per million, that a guest is made to bear when the host cannot scale.
const TSC_TOLERANCE_PPM: u64 = 10_000;

/// Everything that a vCPU is, apart from memory.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VcpuState {
    /// What CPUID answers.
    pub cpuid: Vec<kvm_cpuid_entry2>,
    /// Running, halted, waiting for a start-up interrupt.
    pub mp_state: kvm_mp_state,
    /// General registers.
    pub regs: kvm_regs,
    /// Segment and control registers.
    pub sregs: kvm_sregs,
    /// XCR0.
    pub xcrs: kvm_xcrs,
    /// The XSAVE area in 32-bit words: x87, SSE, AVX, …
    pub xsave: Vec<u32>,
    /// Debug registers.
    pub debugregs: kvm_debugregs,
    /// Model-specific registers; the TSC deadline is the last.
    pub msrs: Vec<kvm_msr_entry>,
    /// Registers of the local APIC, 1024 bytes.
    pub lapic: Vec<u8>,
    /// Exceptions and interrupts that are on their way.
    pub events: kvm_vcpu_events,
    /// TSC frequency; 0 if the host does not tell.
    pub tsc_khz: u32,
}

/// Why the state of a vCPU cannot be captured or restored.
#[derive(Debug, Error)]
pub enum VcpuStateError {
    /// KVM refuses a request.
    #[error("{request}: {cause}")]
    Request {
        /// The ioctl.
        request: &'static str,
        /// What KVM answered.
        cause: kvm_ioctls::Error,
    },
    /// Model-specific registers.
    #[error(transparent)]
    Msrs(#[from] MsrError),
    /// A list of the state has a length that it cannot have.
    #[error("the state of a vCPU has {len} {what}, which cannot be")]
    Length {
        /// Which list.
        what: &'static str,
        /// Its length.
        len: usize,
    },
    /// The area for extended registers is larger than this host's.
    #[error(
        "the state has {state} bytes of extended registers and this host {host}: it has other processor features"
    )]
    Xsave {
        /// Bytes in the state.
        state: usize,
        /// Bytes that the host has.
        host: usize,
    },
    /// The clocks differ.
    #[error(
        "the guest's TSC runs at {guest} kHz and this host's at {host} kHz, which this host cannot scale"
    )]
    Tsc {
        /// Of the state.
        guest: u32,
        /// Of this host.
        host: u32,
    },
}

fn request<T>(request: &'static str, answer: Result<T, kvm_ioctls::Error>) -> Result<T, VcpuStateError> {
    answer.map_err(|cause| VcpuStateError::Request { request, cause })
}

/// Where a vCPU's state is captured to. Made once, so that capturing allocates nothing.
pub(crate) struct VcpuCapture {
    cpuid: CpuId,
    tsc_khz: u32,
    /// Whether the host's XSAVE area is larger than 4 KiB, and so KVM_GET_XSAVE2 needed.
    large_xsave: bool,
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xcrs: kvm_xcrs,
    xsave: Xsave,
    debugregs: kvm_debugregs,
    msrs: MsrBuffer,
    lapic: kvm_lapic_state,
    events: kvm_vcpu_events,
}

impl VcpuCapture {
    /// A buffer for a vCPU that has `cpuid` and `msrs`, on a host whose XSAVE area has `xsave_bytes` (0: 4 KiB).
    pub(crate) fn new(
        vcpu: &VcpuFd,
        cpuid: CpuId,
        msrs: MsrBuffer,
        xsave_bytes: usize,
    ) -> Result<Self, VcpuStateError> {
        let extra = (xsave_bytes / 4).saturating_sub(XSAVE_WORDS);
        let xsave =
            Xsave::new(extra).map_err(|_| VcpuStateError::Length { what: "XSAVE words", len: extra })?;
        Ok(Self {
            cpuid,
            tsc_khz: vcpu.get_tsc_khz().unwrap_or(0),
            large_xsave: xsave_bytes > 0,
            mp_state: kvm_mp_state::default(),
            regs: kvm_regs::default(),
            sregs: kvm_sregs::default(),
            xcrs: kvm_xcrs::default(),
            xsave,
            debugregs: kvm_debugregs::default(),
            msrs,
            lapic: kvm_lapic_state::default(),
            events: kvm_vcpu_events::default(),
        })
    }

    /// What of the processor a guest on this vCPU counts on.
    pub(crate) fn processor(&self) -> Processor {
        let msrs = self.msrs.entries().map(|entry| entry.index).filter(|&index| !msr_is_not_state(index));
        Processor::new(self.cpuid.as_slice(), msrs.collect())
    }

    /// Replaces what CPUID answers, as it was replaced in the vCPU.
    fn set_cpuid(&mut self, cpuid: CpuId) {
        self.cpuid = cpuid;
    }

    /// Reads the state of `vcpu`. No vCPU may run. Allocates nothing.
    pub(crate) fn capture(&mut self, vcpu: &VcpuFd) -> Result<(), VcpuStateError> {
        // First: it takes pending INIT and start-up interrupts, which changes what follows.
        self.mp_state = request("KVM_GET_MP_STATE", vcpu.get_mp_state())?;
        self.regs = request("KVM_GET_REGS", vcpu.get_regs())?;
        self.sregs = request("KVM_GET_SREGS", vcpu.get_sregs())?;
        self.xcrs = request("KVM_GET_XCRS", vcpu.get_xcrs())?;
        self.capture_xsave(vcpu)?;
        self.debugregs = request("KVM_GET_DEBUGREGS", vcpu.get_debug_regs())?;
        // Before the local APIC: a deadline that passes in between is then captured twice, which costs the guest a
        // spurious interrupt; the other way round it would be lost.
        self.msrs.capture(vcpu)?;
        self.lapic = request("KVM_GET_LAPIC", vcpu.get_lapic())?;
        self.events = request("KVM_GET_VCPU_EVENTS", vcpu.get_vcpu_events())?;
        Ok(())
    }

    fn capture_xsave(&mut self, vcpu: &VcpuFd) -> Result<(), VcpuStateError> {
        if self.large_xsave {
            // SAFETY: the buffer was made with the size that KVM_CAP_XSAVE2 tells, which is what KVM writes.
            let answer = unsafe { vcpu.get_xsave2(&mut self.xsave) };
            request("KVM_GET_XSAVE2", answer)
        } else {
            let area = request("KVM_GET_XSAVE", vcpu.get_xsave())?;
            // SAFETY: only the fixed part is written, the length of the variable part stays as it is.
            unsafe { self.xsave.as_mut_fam_struct() }.xsave.region = area.region;
            Ok(())
        }
    }

    /// What was captured last.
    pub(crate) fn state(&self) -> VcpuState {
        let mut xsave = self.xsave.as_fam_struct_ref().xsave.region.to_vec();
        xsave.extend(self.xsave.as_slice());
        VcpuState {
            cpuid: self.cpuid.as_slice().to_vec(),
            mp_state: self.mp_state,
            regs: self.regs,
            sregs: self.sregs,
            xcrs: self.xcrs,
            xsave,
            debugregs: self.debugregs,
            msrs: self.msrs.entries().copied().collect(),
            lapic: self.lapic.as_bytes().to_vec(),
            events: self.events,
            tsc_khz: self.tsc_khz,
        }
    }

    /// Gives `vcpu`, which has not run yet, the state `state`. The order is that of the dependencies: what CPUID offers
    /// decides which registers there are; the APIC base (in sregs) where and how the local APIC is; the TSC and the local
    /// APIC's timer mode what a deadline means; and events are put on their way when all else is in place.
    pub(crate) fn restore(
        &mut self,
        vcpu: &VcpuFd,
        state: &VcpuState,
        tsc_control: bool,
    ) -> Result<(), VcpuStateError> {
        let cpuid = CpuId::from_entries(&state.cpuid)
            .map_err(|_| VcpuStateError::Length { what: "CPUID entries", len: state.cpuid.len() })?;
        let lapic = kvm_lapic_state::read_from_bytes(&state.lapic)
            .map_err(|_| VcpuStateError::Length { what: "local APIC bytes", len: state.lapic.len() })?;
        if state.xcrs.nr_xcrs as usize > state.xcrs.xcrs.len() {
            return Err(VcpuStateError::Length { what: "XCRs", len: state.xcrs.nr_xcrs as usize });
        }
        request("KVM_SET_CPUID2", vcpu.set_cpuid2(&cpuid))?;
        self.set_cpuid(cpuid);
        self.restore_tsc_frequency(vcpu, state.tsc_khz, tsc_control)?;
        request("KVM_SET_SREGS", vcpu.set_sregs(&state.sregs))?;
        request("KVM_SET_REGS", vcpu.set_regs(&state.regs))?;
        request("KVM_SET_XCRS", vcpu.set_xcrs(&state.xcrs))?;
        self.restore_xsave(vcpu, &state.xsave)?;
        request("KVM_SET_DEBUGREGS", vcpu.set_debug_regs(&state.debugregs))?;
        let (last, others): (Vec<_>, Vec<_>) =
            state.msrs.iter().copied().partition(|entry| entry.index == IA32_TSC_DEADLINE);
        msrs::restore(vcpu, &others)?;
        request("KVM_SET_LAPIC", vcpu.set_lapic(&lapic))?;
        msrs::restore(vcpu, &last)?;
        request("KVM_SET_VCPU_EVENTS", vcpu.set_vcpu_events(&state.events))?;
        request("KVM_SET_MP_STATE", vcpu.set_mp_state(state.mp_state))?;
        // Tells a guest that has a kvmclock that it stood still, so that its watchdogs do not bark. Others refuse.
        let _ = vcpu.kvmclock_ctrl();
        Ok(())
    }

    fn restore_tsc_frequency(
        &mut self,
        vcpu: &VcpuFd,
        guest: u32,
        control: bool,
    ) -> Result<(), VcpuStateError> {
        let host = self.tsc_khz;
        if guest == 0 || host == 0 || guest == host {
            return Ok(());
        }
        if control && vcpu.set_tsc_khz(guest).is_ok() {
            self.tsc_khz = guest;
            return Ok(());
        }
        let difference = u64::from(guest.abs_diff(host)) * 1_000_000 / u64::from(host);
        if difference > TSC_TOLERANCE_PPM {
            return Err(VcpuStateError::Tsc { guest, host });
        }
        Ok(())
    }

    fn restore_xsave(&mut self, vcpu: &VcpuFd, words: &[u32]) -> Result<(), VcpuStateError> {
        let host = XSAVE_WORDS + self.xsave.as_slice().len();
        if words.len() < XSAVE_WORDS || words.len() > host {
            return Err(VcpuStateError::Xsave { state: words.len() * 4, host: host * 4 });
        }
        let (region, extra) = words.split_at(XSAVE_WORDS);
        // SAFETY: only the fixed part is written, the length of the variable part stays as it is.
        unsafe { self.xsave.as_mut_fam_struct() }.xsave.region.copy_from_slice(region);
        let rest = self.xsave.as_mut_slice();
        rest[..extra.len()].copy_from_slice(extra);
        rest[extra.len()..].fill(0);
        // SAFETY: the buffer is as long as the area that KVM reads.
        let answer = unsafe { vcpu.set_xsave2(&self.xsave) };
        request("KVM_SET_XSAVE", answer)
    }
}
