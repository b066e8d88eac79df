//! What the processors of a guest say of themselves: the host's features, and a topology of one core a vCPU.
//!
//! Sources: Intel SDM volume 2A, CPUID; AMD64 APM volume 3, appendix E.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};
use vmm_sys_util::fam::Error as FamError;

use crate::host::Host;

const LEAF_1_ECX_VMX: u32 = 1 << 5;
const LEAF_1_ECX_TSC_DEADLINE: u32 = 1 << 24;
const LEAF_1_ECX_HYPERVISOR: u32 = 1 << 31;
const LEAF_1_EDX_HTT: u32 = 1 << 28;
const EXT_1_ECX_CMP_LEGACY: u32 = 1 << 1;
const EXT_1_ECX_SVM: u32 = 1 << 2;

/// Level types of leaf 0xb and 0x1f.
const LEVEL_SMT: u32 = 1 << 8;
const LEVEL_CORE: u32 = 2 << 8;

/// Turns what the host supports into what vCPU `index` of `count` reports.
///
/// # Errors
/// More entries than KVM takes.
pub(crate) fn for_vcpu(host: &Host, supported: &CpuId, index: u8, count: u8) -> Result<CpuId, FamError> {
    let mut entries = supported.as_slice().to_vec();
    let topology = Topology::new(index, count);
    // Without 0x8000_0026, the newest form of the same, guests look at the others.
    entries.retain(|entry| !matches!(entry.function, 0xb | 0x1f | 0x8000_0026));
    let max_leaf = entries.iter().find(|entry| entry.function == 0).map_or(0, |entry| entry.eax);
    for leaf in [0xb, 0x1f] {
        if leaf <= max_leaf {
            entries.extend(topology.levels(leaf));
        }
    }
    for entry in &mut entries {
        topology.describe_in(entry);
        if entry.function == 1 && host.tsc_deadline() {
            entry.ecx |= LEAF_1_ECX_TSC_DEADLINE;
        }
    }
    CpuId::from_entries(&entries)
}

/// One package of `count` cores with one thread each; the APIC ID is the vCPU's index.
struct Topology {
    apic_id: u32,
    count: u32,
    /// Bits of an APIC ID that name the core.
    core_bits: u32,
}

impl Topology {
    fn new(index: u8, count: u8) -> Self {
        let count = u32::from(count.max(1));
        Self { apic_id: u32::from(index), count, core_bits: count.next_power_of_two().trailing_zeros() }
    }

    fn describe_in(&self, entry: &mut kvm_cpuid_entry2) {
        let several = self.count > 1;
        match entry.function {
            1 => {
                entry.ebx =
                    (entry.ebx & 0x0000_ffff) | (self.apic_id << 24) | ((1 << self.core_bits) & 0xff) << 16;
                // Nested guests would have state that is not saved.
                entry.ecx = (entry.ecx & !LEAF_1_ECX_VMX) | LEAF_1_ECX_HYPERVISOR;
                set(&mut entry.edx, LEAF_1_EDX_HTT, several);
            }
            // Caches of Intel: cores in the package, threads that share the cache.
            4 if entry.eax & 0x1f != 0 => {
                entry.eax = (entry.eax & 0x3fff)
                    | self.sharing(entry.eax)
                    | (((1 << self.core_bits) - 1) & 0x3f) << 26;
            }
            // Caches of AMD.
            0x8000_001d if entry.eax & 0x1f != 0 => {
                entry.eax = (entry.eax & !(0xfff << 14)) | self.sharing(entry.eax);
            }
            0x8000_0001 => {
                entry.ecx &= !EXT_1_ECX_SVM;
                set(&mut entry.ecx, EXT_1_ECX_CMP_LEGACY, several);
            }
            0x8000_0008 => {
                entry.ecx = (entry.ecx & !0xf0ff) | (self.core_bits << 12) | (self.count - 1);
            }
            0x8000_001e => {
                entry.eax = self.apic_id;
                entry.ebx = self.apic_id & 0xff;
                entry.ecx = 0;
            }
            _ => {}
        }
    }

    /// The field of threads that share a cache, less one: level 3 is the package's, the others a core's.
    fn sharing(&self, cache: u32) -> u32 {
        let level = (cache >> 5) & 7;
        if level >= 3 { (self.count - 1) << 14 } else { 0 }
    }

    /// The levels of an extended topology leaf (0xb or 0x1f).
    fn levels(&self, leaf: u32) -> [kvm_cpuid_entry2; 3] {
        let level = |index: u32, shift: u32, threads: u32, kind: u32| kvm_cpuid_entry2 {
            function: leaf,
            index,
            flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            eax: shift,
            ebx: threads,
            ecx: index | kind,
            edx: self.apic_id,
            ..kvm_cpuid_entry2::default()
        };
        [level(0, 0, 1, LEVEL_SMT), level(1, self.core_bits, self.count, LEVEL_CORE), level(2, 0, 0, 0)]
    }
}

fn set(register: &mut u32, bit: u32, on: bool) {
    *register = if on { *register | bit } else { *register & !bit };
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            eax: u32::MAX,
            ebx: u32::MAX,
            ecx: u32::MAX,
            edx: u32::MAX,
            ..Default::default()
        }
    }

    #[test]
    fn leaf_1_names_the_vcpu_and_the_hypervisor_but_no_virtualisation() {
        let mut entry = leaf(1);
        Topology::new(2, 3).describe_in(&mut entry);
        assert_eq!(entry.ebx >> 24, 2);
        assert_eq!((entry.ebx >> 16) & 0xff, 4, "APIC IDs reserved for 3 processors");
        assert_ne!(entry.ecx & LEAF_1_ECX_HYPERVISOR, 0);
        assert_eq!(entry.ecx & LEAF_1_ECX_VMX, 0);
        assert_ne!(entry.edx & LEAF_1_EDX_HTT, 0);

        let mut alone = leaf(1);
        Topology::new(0, 1).describe_in(&mut alone);
        assert_eq!(alone.edx & LEAF_1_EDX_HTT, 0);
    }

    #[test]
    fn every_leaf_tells_of_as_many_cores_in_one_package() {
        for count in [1, 2, 3, 6, 8, 31, 32] {
            let bits = u32::from(count).next_power_of_two().trailing_zeros();
            let mut ids = Vec::new();
            for index in 0..count {
                let topology = Topology::new(index, count);
                let [smt, core, _] = topology.levels(0x1f);
                assert_eq!((smt.eax, smt.ebx, core.eax, core.ebx), (0, 1, bits, u32::from(count)));
                let [mut one, mut size, mut id] = [leaf(1), leaf(0x8000_0008), leaf(0x8000_001e)];
                let mut cache = kvm_cpuid_entry2 { function: 4, eax: 3 | 3 << 5, ..Default::default() };
                for entry in [&mut one, &mut size, &mut id, &mut cache] {
                    topology.describe_in(entry);
                }
                assert_eq!(one.ebx >> 16 & 0xff, 1 << bits, "APIC IDs of the package");
                assert_eq!((cache.eax >> 26) + 1, 1 << bits, "core IDs of the package");
                assert_eq!((size.ecx & 0xff, size.ecx >> 12 & 0xf), (u32::from(count) - 1, bits));
                assert_eq!(id.ebx >> 8, 0, "one thread a core");
                assert!(
                    [one.ebx >> 24, core.edx, id.eax, id.ebx & 0xff].iter().all(|&id| id == u32::from(index))
                );
                ids.push(core.edx >> core.eax);
            }
            assert!(ids.iter().all(|&package| package == 0), "{count} cores are one package");
        }
    }

    #[test]
    fn extended_topology_is_one_thread_a_core() {
        let [smt, core, end] = Topology::new(5, 6).levels(0xb);
        assert_eq!((smt.eax, smt.ebx, smt.ecx), (0, 1, 0x100));
        assert_eq!((core.eax, core.ebx, core.ecx), (3, 6, 0x201));
        assert_eq!((end.ebx, end.ecx), (0, 2));
        assert!([smt, core, end].iter().all(|level| level.edx == 5));
    }

    #[test]
    fn amd_leaves_count_cores() {
        let mut size = leaf(0x8000_0008);
        Topology::new(0, 32).describe_in(&mut size);
        assert_eq!((size.ecx & 0xff, (size.ecx >> 12) & 0xf), (31, 5));
        let mut features = leaf(0x8000_0001);
        Topology::new(0, 2).describe_in(&mut features);
        assert_eq!(features.ecx & (EXT_1_ECX_SVM | EXT_1_ECX_CMP_LEGACY), EXT_1_ECX_CMP_LEGACY);
        let mut id = leaf(0x8000_001e);
        Topology::new(3, 4).describe_in(&mut id);
        assert_eq!((id.eax, id.ebx, id.ecx), (3, 3, 0));
    }

    #[test]
    fn shared_cache_is_the_last_level_only() {
        let mut level2 = kvm_cpuid_entry2 { function: 4, eax: 3 | 2 << 5, ..Default::default() };
        let mut level3 = kvm_cpuid_entry2 { function: 4, eax: 3 | 3 << 5, ..Default::default() };
        let topology = Topology::new(0, 4);
        topology.describe_in(&mut level2);
        topology.describe_in(&mut level3);
        assert_eq!(((level2.eax >> 14) & 0xfff, level2.eax >> 26), (0, 3));
        assert_eq!(((level3.eax >> 14) & 0xfff, level3.eax >> 26), (3, 3));
    }
}
