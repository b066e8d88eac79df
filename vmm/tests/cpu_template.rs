//! CPU templates: what a guest finds, what a host refuses, and a lesser host that can run a guest because of one.

mod common;

use common::{Code, PATIENCE, SMALL};
use mirror::guest::{Guest, StandbyMachine};
use mirror::ids::Guid;
use vmm::cpu_template::{Bits, LeafChange, MsrChange};
use vmm::processor::Register::{self, Eax, Ebx, Ecx};
use vmm::{CpuTemplate, Exit, Host, Machine, MachineConfig, StandbyHost};

/// The guest's name.
const GUEST: Guid = Guid::from_u128(1);

/// Leaf 1, ECX: CMPXCHG16B, which every KVM offers.
const CX16: u32 = 13;
/// A patch level of the microcode, which every KVM takes.
const UCODE_REV: u32 = 0x8b;

/// Where a guest says that it wants to know of stolen time.
const STEAL_TIME: u32 = 0x4b56_4d03;

fn change(leaf: u32, register: Register, bits: Bits) -> CpuTemplate {
    let leaves = vec![LeafChange { leaf, subleaf: 0, flags: 0, registers: vec![(register, bits)] }];
    CpuTemplate { leaves, ..CpuTemplate::NONE }
}

fn without_cx16() -> CpuTemplate {
    change(1, Ecx, Bits { mask: 1 << CX16, value: 0 })
}

fn config(cpu_template: CpuTemplate) -> MachineConfig {
    MachineConfig { cpu_template, ..SMALL }
}

fn create(cpu_template: CpuTemplate) -> Result<Machine, String> {
    Machine::create(&config(cpu_template), common::console().0).map_err(|error| error.to_string())
}

/// Ends with bits 8 to 15 of leaf 1, ECX.
fn tells_features() -> Code {
    // mov eax, 1; mov ecx, 0; cpuid; shr ecx, 8; mov al, cl; mov dx, 0x501; out dx, al
    Code::new()
        .bytes(&[0xb8, 1, 0, 0, 0, 0xb9, 0, 0, 0, 0, 0x0f, 0xa2, 0xc1, 0xe9, 8, 0x88, 0xc8])
        .bytes(&[0x66, 0xba, 0x01, 0x05, 0xee])
        .spin()
}

#[test]
fn guest_does_not_find_what_the_template_hides() {
    for (template, there) in [(CpuTemplate::NONE, true), (without_cx16(), false)] {
        let (mut machine, _output) = common::machine(&config(template), &tells_features());
        machine.start();
        let Some(Exit::Code(bits)) = machine.exit_handle().wait_timeout(PATIENCE) else { panic!("no end") };
        assert_eq!(bits & 1 << (CX16 - 8) != 0, there);
    }
}

#[test]
fn lesser_host_takes_a_guest_whose_template_hides_what_it_lacks() {
    for (template, taken) in [(CpuTemplate::NONE, false), (without_cx16(), true)] {
        let (machine, _output) = common::machine(&config(template), &Code::new().spin());
        let lesser = Host::open().unwrap().reduced_by(without_cx16());
        let mut standby = StandbyHost::on(lesser, common::console().0);
        let answer = standby.allocate(GUEST, &machine.describe(), machine.layout());
        match answer {
            Ok(_) => assert!(taken),
            Err(error) => {
                assert!(!taken, "{error}");
                assert!(error.to_string().contains("lacks cx16"), "{error}");
            }
        }
    }
}

#[test]
fn register_has_the_templates_bits_on_every_vcpu_and_in_the_state() {
    let bits = Bits { mask: 0xff << 32, value: 0x5a << 32 };
    let msrs = vec![MsrChange { index: UCODE_REV, bits }];
    let cpu_template = CpuTemplate { msrs, ..CpuTemplate::NONE };
    let config = MachineConfig { vcpu_count: 2, ..config(cpu_template) };
    let mut machine = Machine::create(&config, common::console().0).unwrap();
    for vcpu in machine.save().unwrap().vcpus {
        let entry = vcpu.msrs.iter().find(|entry| entry.index == UCODE_REV).unwrap();
        assert_eq!(entry.data >> 32 & 0xff, 0x5a);
    }
}

#[test]
fn register_of_a_hidden_feature_is_no_part_of_the_state_and_no_other_host_needs_it() {
    // Steal time (Linux, Documentation/virt/kvm/x86/cpuid.rst and msr.rst).
    let hidden = change(0x4000_0001, Eax, Bits { mask: 1 << 5, value: 0 });
    for (template, there) in [(CpuTemplate::NONE, true), (hidden, false)] {
        let mut machine = create(template).unwrap();
        let state = machine.save().unwrap();
        assert_eq!(state.vcpus[0].msrs.iter().any(|entry| entry.index == STEAL_TIME), there);
        assert_eq!(machine.processor().msrs.contains(&STEAL_TIME), there);
    }
}

#[test]
fn what_the_host_cannot_offer_is_named() {
    let cases = [
        (change(0x1234_5678, Ebx, Bits::default()), "CPUID leaf 0x12345678, subleaf 0x0"),
        // Leaf 7, EBX, bit 14: memory protection extensions, which no KVM has any more.
        (change(7, Ebx, Bits { mask: 1 << 14, value: 1 << 14 }), "lacks: CPUID 0x7.0 ebx bit 14"),
        (
            CpuTemplate {
                msrs: vec![MsrChange { index: 0x1234_5678, bits: Bits::default() }],
                ..CpuTemplate::NONE
            },
            "MSR 0x12345678",
        ),
        (CpuTemplate { capabilities: vec![65_000], ..CpuTemplate::NONE }, "capability 65000 of KVM"),
    ];
    for (template, expected) in cases {
        let error = create(template).err().unwrap();
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn value_that_the_host_refuses_is_named() {
    // Memory type 7 is none (Intel SDM volume 3A, 12.11.2.1).
    let bits = Bits { mask: 0xff, value: 7 };
    let msrs = vec![MsrChange { index: 0x2ff, bits }];
    let error = create(CpuTemplate { msrs, ..CpuTemplate::NONE }).err().unwrap();
    assert!(error.contains("MSR 0x2ff") && error.contains("0x7"), "{error}");
}
