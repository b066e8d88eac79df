//! What a guest counts on of the processor and of KVM, and whether a host has it.
//!
//! A guest that has seen a feature may use it at any time, so another host may run it only if it has all of them. That
//! is checked when a standby is attached and when a snapshot is restored, and the missing features are named.
//! Sources: Intel SDM volume 2A, CPUID; AMD64 APM volume 3, appendix E; Linux, Documentation/virt/kvm/x86/cpuid.rst.

use kvm_bindings::kvm_cpuid_entry2;
use serde::{Deserialize, Serialize};

/// A register of a CPUID leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "they are called so everywhere")]
pub enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

use Register::{Eax, Ebx, Ecx, Edx};

impl Register {
    pub(crate) fn of(self, entry: &kvm_cpuid_entry2) -> u32 {
        match self {
            Eax => entry.eax,
            Ebx => entry.ebx,
            Ecx => entry.ecx,
            Edx => entry.edx,
        }
    }

    pub(crate) fn of_mut(self, entry: &mut kvm_cpuid_entry2) -> &mut u32 {
        match self {
            Eax => &mut entry.eax,
            Ebx => &mut entry.ebx,
            Ecx => &mut entry.ecx,
            Edx => &mut entry.edx,
        }
    }
}

/// The registers in which each bit is a feature: leaf, subleaf, register.
const FEATURES: [(u32, u32, Register); 14] = [
    (1, 0, Ecx),
    (1, 0, Edx),
    (7, 0, Ebx),
    (7, 0, Ecx),
    (7, 0, Edx),
    (7, 1, Eax),
    (0xd, 0, Eax),
    (0xd, 1, Eax),
    (0x4000_0001, 0, Eax),
    (0x8000_0001, 0, Ecx),
    (0x8000_0001, 0, Edx),
    (0x8000_0007, 0, Edx),
    (0x8000_0008, 0, Ebx),
    (0x8000_0021, 0, Eax),
];

/// Bits that tell of the moment and not of the processor: OSXSAVE and OSPKE mirror CR4.
const MOMENTARY: [(u32, u32, Register, u32); 2] = [(1, 0, Ecx, 27), (7, 0, Ecx, 4)];

/// What people call them.
const NAMES: [(u32, u32, Register, u32, &str); 64] = [
    (1, 0, Ecx, 0, "sse3"),
    (1, 0, Ecx, 1, "pclmulqdq"),
    (1, 0, Ecx, 9, "ssse3"),
    (1, 0, Ecx, 12, "fma"),
    (1, 0, Ecx, 13, "cx16"),
    (1, 0, Ecx, 17, "pcid"),
    (1, 0, Ecx, 19, "sse4_1"),
    (1, 0, Ecx, 20, "sse4_2"),
    (1, 0, Ecx, 21, "x2apic"),
    (1, 0, Ecx, 22, "movbe"),
    (1, 0, Ecx, 23, "popcnt"),
    (1, 0, Ecx, 24, "tsc_deadline_timer"),
    (1, 0, Ecx, 25, "aes"),
    (1, 0, Ecx, 26, "xsave"),
    (1, 0, Ecx, 28, "avx"),
    (1, 0, Ecx, 29, "f16c"),
    (1, 0, Ecx, 30, "rdrand"),
    (1, 0, Edx, 15, "cmov"),
    (1, 0, Edx, 25, "sse"),
    (1, 0, Edx, 26, "sse2"),
    (7, 0, Ebx, 0, "fsgsbase"),
    (7, 0, Ebx, 1, "tsc_adjust"),
    (7, 0, Ebx, 3, "bmi1"),
    (7, 0, Ebx, 5, "avx2"),
    (7, 0, Ebx, 7, "smep"),
    (7, 0, Ebx, 8, "bmi2"),
    (7, 0, Ebx, 9, "erms"),
    (7, 0, Ebx, 10, "invpcid"),
    (7, 0, Ebx, 16, "avx512f"),
    (7, 0, Ebx, 17, "avx512dq"),
    (7, 0, Ebx, 18, "rdseed"),
    (7, 0, Ebx, 19, "adx"),
    (7, 0, Ebx, 20, "smap"),
    (7, 0, Ebx, 23, "clflushopt"),
    (7, 0, Ebx, 24, "clwb"),
    (7, 0, Ebx, 28, "avx512cd"),
    (7, 0, Ebx, 29, "sha_ni"),
    (7, 0, Ebx, 30, "avx512bw"),
    (7, 0, Ebx, 31, "avx512vl"),
    (7, 0, Ecx, 2, "umip"),
    (7, 0, Ecx, 3, "pku"),
    (7, 0, Ecx, 8, "gfni"),
    (7, 0, Ecx, 9, "vaes"),
    (7, 0, Ecx, 10, "vpclmulqdq"),
    (7, 0, Ecx, 11, "avx512_vnni"),
    (7, 0, Ecx, 16, "la57"),
    (7, 0, Ecx, 22, "rdpid"),
    (7, 0, Edx, 4, "fsrm"),
    (7, 0, Edx, 18, "pconfig"),
    (7, 0, Edx, 22, "amx_bf16"),
    (7, 0, Edx, 24, "amx_tile"),
    (7, 0, Edx, 26, "spec_ctrl"),
    (7, 0, Edx, 29, "arch_capabilities"),
    (0xd, 1, Eax, 0, "xsaveopt"),
    (0xd, 1, Eax, 1, "xsavec"),
    (0xd, 1, Eax, 3, "xsaves"),
    (0x4000_0001, 0, Eax, 3, "kvmclock"),
    (0x4000_0001, 0, Eax, 5, "kvm_steal_time"),
    (0x8000_0001, 0, Ecx, 5, "abm"),
    (0x8000_0001, 0, Ecx, 6, "sse4a"),
    (0x8000_0001, 0, Edx, 20, "nx"),
    (0x8000_0001, 0, Edx, 26, "pdpe1gb"),
    (0x8000_0001, 0, Edx, 27, "rdtscp"),
    (0x8000_0007, 0, Edx, 8, "invariant_tsc"),
];

/// Longest list that is told in words.
const MAX_NAMED: usize = 40;

/// What a guest has seen of its processor, as far as it may count on it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Processor {
    /// The vendor's name, in the order in which CPUID leaf 0 gives it.
    pub vendor: [u8; 12],
    /// Bits of a guest physical address.
    pub address_bits: u8,
    /// One word for each register that carries features a guest may count on.
    pub features: Vec<u32>,
    /// Model-specific registers that are part of its state.
    pub msrs: Vec<u32>,
}

impl Processor {
    /// The processor that answers CPUID by `cpuid` and has `msrs`.
    pub(crate) fn new(cpuid: &[kvm_cpuid_entry2], msrs: Vec<u32>) -> Self {
        let leaf =
            |function, index| cpuid.iter().find(|entry| entry.function == function && entry.index == index);
        let mut vendor = [0; 12];
        if let Some(zero) = leaf(0, 0) {
            for (bytes, word) in vendor.chunks_exact_mut(4).zip([zero.ebx, zero.edx, zero.ecx]) {
                bytes.copy_from_slice(&word.to_le_bytes());
            }
        }
        let features = FEATURES
            .iter()
            .map(|&(function, index, register)| leaf(function, index).map_or(0, |entry| register.of(entry)));
        let features = features.collect();
        let address_bits = leaf(0x8000_0008, 0).map_or(36, |entry| entry.eax as u8);
        Self { vendor, address_bits, features, msrs }
    }

    /// What of this processor `host` has not: names for people, none if a guest that has seen this one can run there.
    pub fn missing_in(&self, host: &Self) -> Vec<String> {
        let mut missing = Vec::new();
        if self.vendor != host.vendor {
            let name = |vendor: &[u8]| String::from_utf8_lossy(vendor).into_owned();
            missing.push(format!("a processor by {} (there: {})", name(&self.vendor), name(&host.vendor)));
        }
        if self.address_bits > host.address_bits {
            missing.push(format!("{} address bits (there: {})", self.address_bits, host.address_bits));
        }
        for (index, &(function, subleaf, register)) in FEATURES.iter().enumerate() {
            let word = |processor: &Self| processor.features.get(index).copied().unwrap_or(0);
            let absent = word(self) & !word(host);
            let bits = (0..32).filter(|bit| absent & 1 << bit != 0);
            let lasting = |bit: &u32| !MOMENTARY.contains(&(function, subleaf, register, *bit));
            missing.extend(bits.filter(lasting).map(|bit| name(function, subleaf, register, bit)));
        }
        let absent = self.msrs.iter().filter(|msr| !host.msrs.contains(msr));
        missing.extend(absent.map(|msr| format!("MSR {msr:#x}")));
        if missing.len() > MAX_NAMED {
            let more = missing.len() - MAX_NAMED;
            missing.truncate(MAX_NAMED);
            missing.push(format!("{more} more"));
        }
        missing
    }
}

fn name(function: u32, subleaf: u32, register: Register, bit: u32) -> String {
    let known = NAMES.iter().find(|&&(f, s, r, b, _)| (f, s, r, b) == (function, subleaf, register, bit));
    match known {
        Some((.., name)) => (*name).into(),
        None => format!("CPUID {function:#x}.{subleaf} {register:?} bit {bit}")
            .to_lowercase()
            .replace("cpuid", "CPUID"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, index: u32, ecx: u32, edx: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, index, ecx, edx, ..Default::default() }
    }

    #[test]
    fn same_processor_and_a_larger_one_lack_nothing() {
        let guest = Processor::new(&[entry(1, 0, 0b11, 1 << 25)], vec![0x10]);
        let larger = Processor::new(&[entry(1, 0, 0b111, u32::MAX)], vec![0x10, 0x11]);
        assert_eq!(guest.missing_in(&guest), Vec::<String>::new());
        assert_eq!(guest.missing_in(&larger), Vec::<String>::new());
    }

    #[test]
    fn what_is_missing_is_named() {
        let guest = Processor::new(
            &[entry(1, 0, 1 << 28 | 1 << 27, 0), entry(7, 0, 1 << 3 | 1 << 30, 0)],
            vec![0xc000_0103],
        );
        let host = Processor::new(&[entry(1, 0, 0, 0)], vec![]);
        assert_eq!(guest.missing_in(&host), ["avx", "pku", "CPUID 0x7.0 ecx bit 30", "MSR 0xc0000103"]);
    }

    #[test]
    fn another_vendor_and_fewer_address_bits_are_told() {
        let vendor = |name: &[u8; 12], bits: u32| {
            let word = |at: usize| u32::from_le_bytes([name[at], name[at + 1], name[at + 2], name[at + 3]]);
            let zero = kvm_cpuid_entry2 { ebx: word(0), edx: word(4), ecx: word(8), ..Default::default() };
            let size = kvm_cpuid_entry2 { function: 0x8000_0008, eax: bits, ..Default::default() };
            Processor::new(&[zero, size], vec![])
        };
        let missing = vendor(b"AuthenticAMD", 48).missing_in(&vendor(b"GenuineIntel", 39));
        assert_eq!(missing[0], "a processor by AuthenticAMD (there: GenuineIntel)");
        assert_eq!(missing[1], "48 address bits (there: 39)");
    }
}
