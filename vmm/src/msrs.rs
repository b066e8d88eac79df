//! The model-specific registers of a vCPU: which there are, and how they are read and set.

use kvm_bindings::{KVM_MAX_MSR_ENTRIES, Msrs, kvm_cpuid_entry2, kvm_msr_entry};
use kvm_ioctls::VcpuFd;
use thiserror::Error;

use crate::host::msr_is_not_state;
use crate::optional_msrs;

pub(crate) const IA32_TSC: u32 = 0x10;
pub(crate) const IA32_TSC_DEADLINE: u32 = 0x6e0;
const IA32_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1;
const MTRR_DEF_TYPE: u32 = 0x2ff;
/// MTRRs on, default type write-back.
const MTRR_WRITE_BACK: u64 = 1 << 11 | 6;
const MCG_CAP: u32 = 0x179;
const MC0_CTL: u32 = 0x400;
const APIC_BASE: u32 = 0x1b;
/// The registers of the x2APIC, which are the local APIC's state.
const X2APIC: std::ops::RangeInclusive<u32> = 0x800..=0x8ff;

/// MTRRs, which KVM has but does not list: variable ranges, fixed ranges, default type.
const MTRRS: &[(u32, u32)] = &[(0x200, 16), (0x250, 1), (0x258, 2), (0x268, 8), (MTRR_DEF_TYPE, 1)];

/// Why a vCPU's model-specific registers cannot be read or set.
#[derive(Debug, Error)]
pub enum MsrError {
    /// KVM refuses the request.
    #[error("{request}: {cause}")]
    Request {
        /// The ioctl.
        request: &'static str,
        /// What KVM answered.
        cause: kvm_ioctls::Error,
    },
    /// One register cannot be read.
    #[error("KVM_GET_MSRS stopped at MSR {0:#x}")]
    Get(u32),
    /// One register cannot be set.
    #[error(
        "MSR {index:#x} of the saved state is {data:#x}, which this host's KVM does not set: the hosts differ too much"
    )]
    Set {
        /// The register.
        index: u32,
        /// Its value.
        data: u64,
    },
}

/// The registers that can be read on this host, in requests that KVM takes at once. Made once, filled at each capture.
#[derive(Clone)]
pub(crate) struct MsrBuffer {
    requests: Vec<Msrs>,
}

impl MsrBuffer {
    /// Finds out which of `listed`, and of those that KVM does not list, `vcpu` can read and its guest, which sees
    /// `cpuid`, may use.
    pub(crate) fn probe(vcpu: &VcpuFd, listed: &[u32], cpuid: &[kvm_cpuid_entry2]) -> Result<Self, MsrError> {
        let mut wanted = listed.to_vec();
        wanted.extend(MTRRS.iter().flat_map(|&(first, count)| first..first + count));
        let banks = read(vcpu, MCG_CAP)?.unwrap_or(0) & 0xff;
        wanted.extend(MC0_CTL..MC0_CTL + 4 * banks as u32);
        wanted.sort_unstable();
        wanted.dedup();
        wanted.retain(|index| *index != APIC_BASE && !X2APIC.contains(index) && !msr_is_not_state(*index));
        wanted.retain(|&index| optional_msrs::is_there(index, cpuid));
        // The deadline is set after all others: it is compared with the TSC when it is set.
        wanted.sort_by_key(|&index| index == IA32_TSC_DEADLINE);
        let readable = readable(vcpu, &wanted)?;
        let requests = readable
            .chunks(KVM_MAX_MSR_ENTRIES)
            .map(|chunk| entries(chunk.iter().map(|&index| (index, 0))))
            .collect();
        Ok(Self { requests })
    }

    /// Reads all registers. Does not allocate.
    pub(crate) fn capture(&mut self, vcpu: &VcpuFd) -> Result<(), MsrError> {
        for request in &mut self.requests {
            let count = vcpu
                .get_msrs(request)
                .map_err(|cause| MsrError::Request { request: "KVM_GET_MSRS", cause })?;
            if let Some(entry) = request.as_slice().get(count) {
                return Err(MsrError::Get(entry.index));
            }
        }
        Ok(())
    }

    /// What was read.
    pub(crate) fn entries(&self) -> impl Iterator<Item = &kvm_msr_entry> {
        self.requests.iter().flat_map(Msrs::as_slice)
    }
}

/// Sets registers, in the order given. One that this host does not set is no error if it has the value already.
pub(crate) fn restore(vcpu: &VcpuFd, state: &[kvm_msr_entry]) -> Result<(), MsrError> {
    let mut rest: Vec<_> =
        state.iter().map(|e| (e.index, e.data)).filter(|(index, _)| !msr_is_not_state(*index)).collect();
    while !rest.is_empty() {
        let batch = entries(rest.iter().copied().take(KVM_MAX_MSR_ENTRIES));
        let set =
            vcpu.set_msrs(&batch).map_err(|cause| MsrError::Request { request: "KVM_SET_MSRS", cause })?;
        let mut done = set;
        if let Some(entry) = batch.as_slice().get(set) {
            if read(vcpu, entry.index)? != Some(entry.data) {
                return Err(MsrError::Set { index: entry.index, data: entry.data });
            }
            done += 1;
        }
        rest.drain(..done);
    }
    Ok(())
}

/// Gives the registers the values that firmware would have left.
pub(crate) fn set_boot_values(vcpu: &VcpuFd) -> Result<(), MsrError> {
    for (index, bits) in [(IA32_MISC_ENABLE, MISC_ENABLE_FAST_STRING), (MTRR_DEF_TYPE, MTRR_WRITE_BACK)] {
        let Some(old) = read(vcpu, index)? else { continue };
        // A KVM without these registers boots just as well.
        set(vcpu, index, old | bits)?;
    }
    Ok(())
}

/// The value of one register; `None` if there is no such register.
pub(crate) fn read(vcpu: &VcpuFd, index: u32) -> Result<Option<u64>, MsrError> {
    let mut request = entries([(index, 0)].into_iter());
    let count =
        vcpu.get_msrs(&mut request).map_err(|cause| MsrError::Request { request: "KVM_GET_MSRS", cause })?;
    Ok((count == 1).then(|| request.as_slice()[0].data))
}

/// Sets one register; says whether it took the value.
pub(crate) fn set(vcpu: &VcpuFd, index: u32, value: u64) -> Result<bool, MsrError> {
    let request = entries([(index, value)].into_iter());
    let count =
        vcpu.set_msrs(&request).map_err(|cause| MsrError::Request { request: "KVM_SET_MSRS", cause })?;
    Ok(count == 1)
}

/// Those of `wanted` that `vcpu` can read.
fn readable(vcpu: &VcpuFd, wanted: &[u32]) -> Result<Vec<u32>, MsrError> {
    let mut found = Vec::with_capacity(wanted.len());
    let mut rest = wanted;
    while !rest.is_empty() {
        let batch = &rest[..rest.len().min(KVM_MAX_MSR_ENTRIES)];
        let mut request = entries(batch.iter().map(|&index| (index, 0)));
        let count = vcpu
            .get_msrs(&mut request)
            .map_err(|cause| MsrError::Request { request: "KVM_GET_MSRS", cause })?;
        found.extend(&batch[..count]);
        // KVM stops at the first register that it does not have, which is then skipped.
        let skip = usize::from(count < batch.len());
        rest = &rest[count + skip..];
    }
    Ok(found)
}

fn entries(list: impl Iterator<Item = (u32, u64)>) -> Msrs {
    let entries: Vec<_> =
        list.map(|(index, data)| kvm_msr_entry { index, data, ..Default::default() }).collect();
    // Only more than KVM_MAX_MSR_ENTRIES could fail, and every caller bounds the list.
    Msrs::from_entries(&entries).expect("a bounded list of MSRs")
}
