//! Ring 0 of the embedded guest holds nothing that the machine's own KVM cannot emulate.
//!
//! That KVM runs ring 0 through its instruction emulator and gives up ("internal error, suberror 1") at SSE, x87 and
//! more. A compiler puts such instructions wherever it likes, so ring 0 is assembly in sections of its own, and this
//! decodes them.

use std::ops::Range;

use iced_x86::{CpuidFeature, Decoder, DecoderOptions, FlowControl, Mnemonic, OpKind};
use resources::GUEST_ELF;

/// The sections of ring 0, with the processor mode they run in.
const RING0: [(&str, u32); 3] = [(".ring0.code16", 16), (".ring0.code32", 32), (".ring0.code64", 64)];

/// What belongs to the plain integer machine. All else (SSE, x87, POPCNT, SMAP, XSAVE, CMPXCHG16B, SYSCALL…) is refused.
const EMULATED: [CpuidFeature; 11] = [
    CpuidFeature::INTEL8086,
    CpuidFeature::INTEL8086_ONLY,
    CpuidFeature::INTEL186,
    CpuidFeature::INTEL286,
    CpuidFeature::INTEL386,
    CpuidFeature::INTEL486,
    CpuidFeature::X64,
    CpuidFeature::CPUID,
    CpuidFeature::MSR,
    CpuidFeature::MULTIBYTENOP,
    CpuidFeature::PAUSE,
];

/// Old enough, and still not emulated.
const REFUSED: [Mnemonic; 6] =
    [Mnemonic::Int3, Mnemonic::Int, Mnemonic::Into, Mnemonic::Int1, Mnemonic::Wait, Mnemonic::Sysret];

/// What `code` holds that ring 0 must not, each with its address.
fn violations(code: &[u8], bitness: u32, address: u64) -> Vec<String> {
    let mut found = Vec::new();
    for instruction in &mut Decoder::with_ip(bitness, code, address, DecoderOptions::NONE) {
        let features = instruction.cpuid_features();
        let known = !instruction.is_invalid() && features.iter().all(|feature| EMULATED.contains(feature));
        if !known || REFUSED.contains(&instruction.mnemonic()) {
            found.push(format!("{:#x}: {:?} {features:?}", instruction.ip(), instruction.mnemonic()));
        }
    }
    found
}

/// Addresses that `code` jumps to or calls, directly.
fn targets(code: &[u8], bitness: u32, address: u64) -> Vec<u64> {
    let decoder = Decoder::with_ip(bitness, code, address, DecoderOptions::NONE);
    let branches = decoder.into_iter().filter(|instruction| instruction.flow_control() != FlowControl::Next);
    branches
        .filter_map(|instruction| match instruction.op0_kind() {
            OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64 => {
                Some(instruction.near_branch_target())
            }
            OpKind::FarBranch32 => Some(u64::from(instruction.far_branch32())),
            _ => None,
        })
        .collect()
}

fn number<const N: usize>(bytes: &[u8], at: usize) -> usize {
    let mut word = [0; 8];
    word[..N].copy_from_slice(&bytes[at..at + N]);
    usize::try_from(u64::from_le_bytes(word)).unwrap()
}

/// Address and content of a section of the guest.
fn section(name: &str) -> (u64, &'static [u8]) {
    let elf = GUEST_ELF;
    let (table, size, count) = (number::<8>(elf, 0x28), number::<2>(elf, 0x3a), number::<2>(elf, 0x3c));
    let header = |index| &elf[table + index * size..][..size];
    let names = number::<8>(header(number::<2>(elf, 0x3e)), 0x18);
    for index in 0..count {
        let header = header(index);
        let found = &elf[names + number::<4>(header, 0)..];
        if found.split(|byte| *byte == 0).next() == Some(name.as_bytes()) {
            let (at, len) = (number::<8>(header, 0x18), number::<8>(header, 0x20));
            return (number::<8>(header, 0x10) as u64, &elf[at..at + len]);
        }
    }
    panic!("the guest has no section {name}");
}

#[test]
fn ring0_holds_only_what_the_emulator_knows() {
    for (name, bitness) in RING0 {
        let (address, code) = section(name);
        assert!(code.len() > 16, "{name} is empty");
        assert_eq!(violations(code, bitness, address), Vec::<String>::new(), "in {name}");
    }
}

#[test]
fn ring0_never_jumps_into_compiled_code() {
    let within: Vec<Range<u64>> = RING0
        .iter()
        .map(|(name, _)| section(name))
        .map(|(address, code)| address..address + code.len() as u64)
        .collect();
    let mut checked = 0;
    for (name, bitness) in RING0 {
        let (address, code) = section(name);
        for target in targets(code, bitness, address) {
            assert!(within.iter().any(|range| range.contains(&target)), "{name} jumps to {target:#x}");
            checked += 1;
        }
    }
    assert!(checked > 30, "only {checked} jumps found: the decoder does not see the code");
}

#[test]
fn the_check_finds_each_kind_of_instruction_that_must_not_be() {
    let samples: [(&str, &[u8]); 14] = [
        ("movups xmm0, [rax]", &[0x0f, 0x10, 0x00]),
        ("cvtsi2sd xmm0, rax", &[0xf2, 0x48, 0x0f, 0x2a, 0xc0]),
        ("vmovdqu ymm0, [rax]", &[0xc5, 0xfe, 0x6f, 0x00]),
        ("fild dword [rax]", &[0xdb, 0x00]),
        ("int3", &[0xcc]),
        ("int 0x80", &[0xcd, 0x80]),
        ("lock cmpxchg16b [rax]", &[0xf0, 0x48, 0x0f, 0xc7, 0x08]),
        ("popcnt eax, eax", &[0xf3, 0x0f, 0xb8, 0xc0]),
        ("clac", &[0x0f, 0x01, 0xca]),
        ("stac", &[0x0f, 0x01, 0xcb]),
        ("xsave [rax]", &[0x0f, 0xae, 0x20]),
        ("syscall", &[0x0f, 0x05]),
        ("vmmcall", &[0x0f, 0x01, 0xd9]),
        ("an undefined opcode", &[0x06]),
    ];
    for (name, code) in samples {
        // Between instructions that are allowed, as it would be in real code.
        let code = [&[0xfa], code, &[0xfb, 0xf4]].concat();
        assert_eq!(violations(&code, 64, 0).len(), 1, "{name} was not found");
    }
    assert_eq!(violations(&[0xfa, 0xfb, 0xf4], 64, 0), Vec::<String>::new());
}
