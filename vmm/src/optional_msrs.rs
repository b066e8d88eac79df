//! Model-specific registers that exist only with a feature of CPUID.
//!
//! KVM lists all that its host has. A guest from which the feature is hidden cannot use them, so they are none of its
//! state, and another host need not have them. Source: Intel SDM volume 4; AMD64 APM volume 2, appendix A.

use std::ops::RangeInclusive;

use kvm_bindings::kvm_cpuid_entry2;

use crate::processor::Register::{self, Eax, Ebx, Ecx, Edx};

/// Bits of a CPUID register: leaf, subleaf, register, mask.
type Feature = (u32, u32, Register, u32);

const VMX: Feature = (1, 0, Ecx, 1 << 5);
const SVM: Feature = (0x8000_0001, 0, Ecx, 1 << 2);
const PERFORMANCE_COUNTERS: Feature = (0xa, 0, Eax, 0xff);
const PERFORMANCE_COUNTERS_OF_AMD: Feature = (0x8000_0001, 0, Ecx, 1 << 23);
const PERFORMANCE_COUNTERS_2_OF_AMD: Feature = (0x8000_0022, 0, Eax, 1);
const SPECULATION_CONTROL: [Feature; 2] =
    [(7, 0, Edx, 1 << 26 | 1 << 27 | 1 << 31), (0x8000_0008, 0, Ebx, 1 << 14 | 1 << 15 | 1 << 24)];
const TSC_AUX: [Feature; 2] = [(0x8000_0001, 0, Edx, 1 << 27), (7, 0, Ecx, 1 << 22)];
const SHADOW_STACKS: [Feature; 2] = [(7, 0, Ecx, 1 << 7), (7, 0, Edx, 1 << 20)];
const PROCESSOR_TRACE: Feature = (7, 0, Ebx, 1 << 25);
const DYNAMIC_XSTATE: Feature = (0xd, 1, Eax, 1 << 4);

/// A feature of KVM itself (Linux, Documentation/virt/kvm/x86/cpuid.rst and msr.rst).
const fn kvm(bit: u32) -> Feature {
    (0x4000_0001, 0, Eax, 1 << bit)
}

/// Which registers exist with any of which features.
const OPTIONAL: [(RangeInclusive<u32>, &[Feature]); 31] = [
    (0x11..=0x12, &[kvm(0)]),
    (0x3b..=0x3b, &[(7, 0, Ebx, 1 << 1)]),
    (0x48..=0x48, &SPECULATION_CONTROL),
    (0xc1..=0xc8, &[PERFORMANCE_COUNTERS]),
    (0xe1..=0xe1, &[(7, 0, Ecx, 1 << 5)]),
    (0x186..=0x18d, &[PERFORMANCE_COUNTERS]),
    (0x1c4..=0x1c5, &[DYNAMIC_XSTATE]),
    (0x309..=0x30c, &[PERFORMANCE_COUNTERS]),
    (0x345..=0x345, &[(1, 0, Ecx, 1 << 15)]),
    (0x38d..=0x390, &[PERFORMANCE_COUNTERS]),
    (0x3f1..=0x3f2, &[PERFORMANCE_COUNTERS]),
    (0x480..=0x493, &[VMX]),
    (0x4c1..=0x4c8, &[PERFORMANCE_COUNTERS]),
    (0x560..=0x561, &[PROCESSOR_TRACE]),
    (0x570..=0x572, &[PROCESSOR_TRACE]),
    (0x580..=0x587, &[PROCESSOR_TRACE]),
    (0x600..=0x600, &[PERFORMANCE_COUNTERS]),
    (0x6a0..=0x6a8, &SHADOW_STACKS),
    (0xd90..=0xd90, &[(7, 0, Ebx, 1 << 14)]),
    (0xda0..=0xda0, &[(0xd, 1, Eax, 1 << 3)]),
    (0x4b56_4d00..=0x4b56_4d01, &[kvm(3)]),
    (0x4b56_4d02..=0x4b56_4d02, &[kvm(4)]),
    (0x4b56_4d03..=0x4b56_4d03, &[kvm(5)]),
    (0x4b56_4d04..=0x4b56_4d04, &[kvm(6)]),
    (0x4b56_4d05..=0x4b56_4d05, &[kvm(12)]),
    (0x4b56_4d06..=0x4b56_4d07, &[kvm(14)]),
    (0xc000_0103..=0xc000_0103, &TSC_AUX),
    (0xc000_0300..=0xc000_0302, &[PERFORMANCE_COUNTERS_2_OF_AMD]),
    (0xc001_0117..=0xc001_0117, &[SVM]),
    (0xc001_011f..=0xc001_011f, &[(0x8000_0008, 0, Ebx, 1 << 25)]),
    (0xc001_0200..=0xc001_020b, &[PERFORMANCE_COUNTERS_OF_AMD]),
];

/// Whether a guest that sees `cpuid` may use MSR `index`.
pub(crate) fn is_there(index: u32, cpuid: &[kvm_cpuid_entry2]) -> bool {
    let Some((_, features)) = OPTIONAL.iter().find(|(range, _)| range.contains(&index)) else { return true };
    features.iter().any(|&(leaf, subleaf, register, mask)| {
        let is_it = |entry: &&kvm_cpuid_entry2| entry.function == leaf && entry.index == subleaf;
        cpuid.iter().find(is_it).is_some_and(|entry| register.of(entry) & mask != 0)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn register_of_a_hidden_feature_is_none_of_the_guests() {
        let leaf = |function, index, eax| kvm_cpuid_entry2 { function, index, eax, ..Default::default() };
        let cpuid = [leaf(0xd, 0, u32::MAX), leaf(0xd, 1, 1 << 3)];
        assert!(is_there(0xda0, &cpuid), "XSS comes with XSAVES");
        assert!(!is_there(0x1c4, &cpuid), "XFD has a bit of its own");
        assert!(is_there(0x10, &[]), "every processor has a TSC");
    }

    #[test]
    fn one_of_several_features_is_enough() {
        let rdpid = kvm_cpuid_entry2 { function: 7, ecx: 1 << 22, ..Default::default() };
        assert!(is_there(0xc000_0103, &[rdpid]));
        assert!(!is_there(0xc000_0103, &[]));
    }
}
