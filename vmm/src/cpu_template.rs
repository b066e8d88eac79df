//! CPU templates: bits of CPUID and of model-specific registers that a guest finds otherwise than the host has them.
//!
//! A template that hides what only some hosts have makes all of them offer one processor, so that a guest can move
//! between them. The meaning is that of Firecracker's custom templates: a template changes what KVM supports, and the
//! VMM puts on top what it must say itself (topology, APIC IDs, the hypervisor bit).

use kvm_bindings::{CpuId, kvm_cpuid_entry2};
use kvm_ioctls::{Kvm, VcpuFd};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::msrs::{self, MsrError};
use crate::processor::Register;

/// What is different from what the host's KVM supports.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuTemplate {
    /// Capabilities that the host's KVM must have (numbers of KVM_CHECK_EXTENSION).
    pub capabilities: Vec<u32>,
    /// Changes of CPUID.
    pub leaves: Vec<LeafChange>,
    /// Changes of model-specific registers.
    pub msrs: Vec<MsrChange>,
}

/// What is different in a leaf of CPUID.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeafChange {
    /// The leaf.
    pub leaf: u32,
    /// The subleaf; 0 if the leaf has none.
    pub subleaf: u32,
    /// KVM's flags of the leaf (KVM API, KVM_SET_CPUID2).
    pub flags: u32,
    /// The registers in which there are other bits.
    pub registers: Vec<(Register, Bits)>,
}

/// What is different in a model-specific register.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MsrChange {
    /// Which.
    pub index: u32,
    /// Its bits.
    pub bits: Bits,
}

/// Bits that a template gives a value. All others stay as they are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bits {
    /// Which bits.
    pub mask: u64,
    /// Their values.
    pub value: u64,
}

impl Bits {
    fn apply(self, to: u64) -> u64 {
        to & !self.mask | self.value & self.mask
    }
}

/// A template that this host cannot offer.
#[derive(Debug, Error)]
pub enum TemplateError {
    /// A capability is missing.
    #[error("the CPU template needs capability {0} of KVM, which this host's KVM lacks")]
    Capability(u32),
    /// There is no such leaf.
    #[error(
        "the CPU template changes CPUID leaf {leaf:#x}, subleaf {subleaf:#x}, which this host's KVM does not have: leave it out"
    )]
    Leaf {
        /// The leaf.
        leaf: u32,
        /// The subleaf.
        subleaf: u32,
    },
    /// Features that the host has not.
    #[error(
        "the CPU template offers what this host's processor or KVM lacks: {}; leave these bits alone or clear them",
        .0.join(", ")
    )]
    Features(Vec<String>),
    /// There is no such register.
    #[error("the CPU template changes MSR {0:#x}, which this host's KVM does not have: leave it out")]
    Msr(u32),
    /// The register does not take the value.
    #[error(
        "this host's KVM refuses the value {value:#x} that the CPU template gives MSR {index:#x}; change its bits or leave it out"
    )]
    Value {
        /// The register.
        index: u32,
        /// The value.
        value: u64,
    },
    /// KVM refuses the request.
    #[error(transparent)]
    Request(#[from] MsrError),
}

impl CpuTemplate {
    /// Changes nothing.
    pub const NONE: Self = Self { capabilities: Vec::new(), leaves: Vec::new(), msrs: Vec::new() };

    /// Whether the host's KVM has what the template needs.
    pub(crate) fn check_capabilities(&self, kvm: &Kvm) -> Result<(), TemplateError> {
        let missing = self.capabilities.iter().find(|&&cap| kvm.check_extension_raw(cap.into()) <= 0);
        missing.map_or(Ok(()), |&cap| Err(TemplateError::Capability(cap)))
    }

    /// Changes what KVM supports.
    pub(crate) fn change_cpuid(&self, supported: &mut CpuId) -> Result<(), TemplateError> {
        for change in &self.leaves {
            let &LeafChange { leaf, subleaf, flags, .. } = change;
            let is_it = |entry: &&mut kvm_cpuid_entry2| entry.function == leaf && entry.index == subleaf;
            let entry = supported.as_mut_slice().iter_mut().find(is_it);
            let entry = entry.ok_or(TemplateError::Leaf { leaf, subleaf })?;
            entry.flags = flags;
            for (register, bits) in &change.registers {
                let word = register.of_mut(entry);
                *word = bits.apply(u64::from(*word)) as u32;
            }
        }
        Ok(())
    }

    /// Gives `vcpu` the registers.
    pub(crate) fn set_msrs(&self, vcpu: &VcpuFd) -> Result<(), TemplateError> {
        for &MsrChange { index, bits } in &self.msrs {
            let before = msrs::read(vcpu, index)?.ok_or(TemplateError::Msr(index))?;
            let value = bits.apply(before);
            if value != before && !msrs::set(vcpu, index, value)? {
                return Err(TemplateError::Value { index, value });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::processor::Register::{Ebx, Ecx};

    fn supported() -> CpuId {
        let leaf = |function, index| kvm_cpuid_entry2 { function, index, ebx: 0xff, ..Default::default() };
        CpuId::from_entries(&[leaf(7, 0), leaf(7, 1)]).unwrap()
    }

    fn template(leaf: u32, subleaf: u32) -> CpuTemplate {
        let registers =
            vec![(Ebx, Bits { mask: 0b1010, value: 0b1000 }), (Ecx, Bits { mask: 1 << 31, value: 1 << 31 })];
        let leaves = vec![LeafChange { leaf, subleaf, flags: 1, registers }];
        CpuTemplate { leaves, ..CpuTemplate::NONE }
    }

    #[test]
    fn bits_named_change_and_all_others_stay() {
        let mut cpuid = supported();
        template(7, 1).change_cpuid(&mut cpuid).unwrap();
        let [first, second] = cpuid.as_slice() else { unreachable!() };
        assert_eq!((first.ebx, first.ecx, first.flags), (0xff, 0, 0));
        assert_eq!((second.ebx, second.ecx, second.flags), (0xfd, 1 << 31, 1));
    }

    #[test]
    fn leaf_that_the_host_has_not_is_named() {
        for (leaf, subleaf) in [(0x4000_0010, 0), (7, 2)] {
            let error = template(leaf, subleaf).change_cpuid(&mut supported()).unwrap_err().to_string();
            assert!(error.contains(&format!("leaf {leaf:#x}, subleaf {subleaf:#x}")), "{error}");
        }
    }
}
