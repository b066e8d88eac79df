//! What to tell of a vCPU that cannot go on: where it stood, and on which instruction.

use std::fmt::Write;

use kvm_bindings::{
    KVM_INTERNAL_ERROR_EMULATION, KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES, kvm_run,
};
use kvm_ioctls::VcpuFd;
use mirror::memory::GuestRam;
use vm_memory::{Bytes, GuestAddress};

/// Longest x86 instruction in bytes.
const MAX_INSTRUCTION: usize = 15;

/// Describes KVM_EXIT_INTERNAL_ERROR.
pub(crate) fn internal_error(vcpu: &mut VcpuFd, ram: &GuestRam) -> String {
    let run = vcpu.get_kvm_run();
    let (suberror, flagged) = emulation_failure(run);
    if suberror == KVM_INTERNAL_ERROR_EMULATION {
        let bytes = flagged.or_else(|| instruction(vcpu, ram));
        let bytes = bytes.map_or("not readable".into(), |bytes| hex(&bytes));
        return format!(
            "KVM internal error 1: KVM cannot emulate an instruction, bytes {bytes}; {}",
            registers(vcpu)
        );
    }
    // SAFETY: the exit reason says that this member of the union is the one that was written.
    let internal = unsafe { run.__bindgen_anon_1.internal };
    let count = (internal.ndata as usize).min(internal.data.len());
    let data = &internal.data[..count];
    format!("KVM internal error {suberror}, data {data:x?}; {}", registers(vcpu))
}

/// The suberror, and the instruction if KVM gives it.
fn emulation_failure(run: &kvm_run) -> (u32, Option<Vec<u8>>) {
    // SAFETY: the exit reason is an internal error, of which this member of the union is one form: integers all.
    let failure = unsafe { run.__bindgen_anon_1.emulation_failure };
    let flag = u64::from(KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES);
    // Flags and bytes are there if KVM counts at least the four words that hold them.
    if failure.suberror != KVM_INTERNAL_ERROR_EMULATION || failure.ndata < 3 || failure.flags & flag == 0 {
        return (failure.suberror, None);
    }
    // SAFETY: KVM says by the flag that it wrote this member, of bytes.
    let instruction = unsafe { failure.__bindgen_anon_1.__bindgen_anon_1 };
    let len = usize::from(instruction.insn_size).min(instruction.insn_bytes.len());
    (failure.suberror, (len > 0).then(|| instruction.insn_bytes[..len].to_vec()))
}

/// The bytes at the instruction pointer.
fn instruction(vcpu: &VcpuFd, ram: &GuestRam) -> Option<Vec<u8>> {
    let (regs, sregs) = (vcpu.get_regs().ok()?, vcpu.get_sregs().ok()?);
    let translation = vcpu.translate_gva(sregs.cs.base.wrapping_add(regs.rip)).ok()?;
    if translation.valid == 0 {
        return None;
    }
    let mut bytes = vec![0; MAX_INSTRUCTION];
    let count = ram.read(&mut bytes, GuestAddress(translation.physical_address)).ok()?;
    bytes.truncate(count);
    Some(bytes)
}

/// The registers that tell where a vCPU stands.
pub(crate) fn registers(vcpu: &VcpuFd) -> String {
    let (Ok(regs), Ok(sregs)) = (vcpu.get_regs(), vcpu.get_sregs()) else {
        return "registers not readable".into();
    };
    format!(
        "rip {:#x} rsp {:#x} rflags {:#x} rax {:#x} rbx {:#x} rcx {:#x} rdx {:#x} rsi {:#x} rdi {:#x} rbp {:#x} \
         cs {:#x} (dpl {}) cr0 {:#x} cr2 {:#x} cr3 {:#x} cr4 {:#x} efer {:#x}",
        regs.rip,
        regs.rsp,
        regs.rflags,
        regs.rax,
        regs.rbx,
        regs.rcx,
        regs.rdx,
        regs.rsi,
        regs.rdi,
        regs.rbp,
        sregs.cs.selector,
        sregs.cs.dpl,
        sregs.cr0,
        sregs.cr2,
        sregs.cr3,
        sregs.cr4,
        sregs.efer,
    )
}

fn hex(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len() * 3);
    for (index, byte) in bytes.iter().enumerate() {
        let space = if index == 0 { "" } else { " " };
        // Writing to a string does not fail.
        let _ = write!(text, "{space}{byte:02x}");
    }
    text
}
